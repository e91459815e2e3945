"""Personal models that answer: with OpenAI's own client, in a terminal, many in one batch."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from socket import socket

import openai
import pytest
import torch
import uvicorn
from parts import Form, published
from typer.testing import CliRunner

from pomona.artifacts.personal import clients_of_run, open_personal
from pomona.cli.app import app
from pomona.data.examples import encode_prompt
from pomona.data.row import Row
from pomona.data.templates import Alpaca
from pomona.errors import PomonaError
from pomona.evaluation.answers import greedy_answers
from pomona.models.lora import LoRA
from pomona.serving import answering as answering_module
from pomona.serving.answering import Answering
from pomona.serving.asked import Asked
from pomona.serving.decoding import drawn
from pomona.serving.models import BASE, load_served
from pomona.serving.openai import endpoint

NAMES = ("apples", "pears", "plums")
QUESTION = "which fruit is ripe"


@pytest.fixture(scope="module")
def run(moe_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    published(moe_dir, folder, Form(personal=LoRA(2, 4.0)), NAMES, scale=0.5)
    return folder


@pytest.fixture(scope="module")
def models(moe_dir, run):
    from pomona.artifacts.personal import PersonalModel

    base = PersonalModel(str(moe_dir), device="cpu")
    return {BASE: base, **clients_of_run(run, base)}


@pytest.fixture(scope="module")
def served(models):
    return load_served(models)


@contextmanager
def listening(answering: Answering) -> Iterator[openai.OpenAI]:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(endpoint(answering), "127.0.0.1", port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def client(served):
    with Answering(*served, batch=4) as answering, listening(answering) as found:
        yield found


def alone(models, name: str, question: str = QUESTION, new_tokens: int = 12) -> str:
    """What evaluation would have the same client answer."""
    base, state = open_personal(models[name])
    from pomona.models.loading import load_tokenizer

    tokenizer = load_tokenizer(models[name].source)
    prompt = encode_prompt(Row(question, "", ""), Alpaca(), tokenizer, 1 << 20)
    with base.attach_one(state):
        return greedy_answers(base.model, tokenizer, [prompt], new_tokens)[0]


def said(client, name: str, question: str = QUESTION, **options) -> str:
    options = {"max_tokens": 12, "temperature": 0, **options}
    turns = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=name, messages=turns, **options)
    return answer.choices[0].message.content.strip()


def test_a_models_name_picks_the_client(client, models):
    assert [model.id for model in client.models.list()] == [BASE, *NAMES]
    assert client.models.retrieve("pears").id == "pears"
    answers = {name: said(client, name) for name in models}
    assert answers == {name: alone(models, name) for name in models}
    assert len(set(answers.values())) == 4


def test_clients_that_ask_together_share_a_batch(served, models, monkeypatch):
    sizes = []
    real = answering_module.decode

    def counted(base, states, *rest):
        sizes.append(len(states))
        time.sleep(0.3)  # the next ones come meanwhile
        return real(base, states, *rest)

    monkeypatch.setattr(answering_module, "decode", counted)
    questions = [f"{QUESTION} {word}" for word in ("now", "here", "today", "again")]
    with (
        Answering(*served, batch=8) as answering,
        listening(answering) as client,
        ThreadPoolExecutor(9) as pool,
    ):
        first = pool.submit(said, client, "pears")
        time.sleep(0.15)
        pairs = [(name, question) for name in NAMES[:2] for question in questions]
        found = list(pool.map(lambda pair: said(client, *pair), pairs))
        assert first.result() == alone(models, "pears")
    assert sizes == [1, 8]
    assert found == [alone(models, *pair) for pair in pairs]


def test_a_stream_is_the_whole_in_pieces(client, models):
    turns = [{"role": "user", "content": QUESTION}]
    stream = client.chat.completions.create(
        model="plums",
        messages=turns,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces).strip() == alone(models, "plums")
    assert len([piece for piece in pieces if piece]) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 3


def test_a_seed_draws_the_same_and_another_something_else(client):
    def draw(seed: int) -> str:
        return said(client, "pears", temperature=1.5, top_p=0.9, seed=seed, max_tokens=20)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_an_answer_stops_where_it_was_told_to(client, models):
    whole = alone(models, "pears", new_tokens=20)
    stop = whole[len(whole) // 2 :][:3]
    turns = [{"role": "user", "content": QUESTION}]
    found = client.chat.completions.create(
        model="pears", messages=turns, max_tokens=20, temperature=0, stop=[stop]
    )
    (choice,) = found.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content.strip() == whole[: whole.index(stop)].strip()
    pieces = client.chat.completions.create(
        model="pears", messages=turns, max_tokens=20, temperature=0, stop=stop, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in pieces)
    assert text.strip() == whole[: whole.index(stop)].strip()


def test_a_length_ends_an_answer_and_tokens_are_counted(client):
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}]},
    ]
    found = client.chat.completions.create(
        model="base", messages=turns, max_completion_tokens=3, temperature=0
    )
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 3
    assert found.usage.total_tokens == found.usage.prompt_tokens + 3


def test_plain_completions_go_on_with_the_text(client):
    one, other = (
        client.completions.create(model=name, prompt="the ripe", max_tokens=8, temperature=0)
        for name in ("base", "pears")
    )
    assert one.choices[0].text != other.choices[0].text
    assert one.usage.prompt_tokens < 12


@pytest.mark.parametrize(
    ("given", "status", "complaint"),
    [
        ({"model": "cherries"}, 404, 'no model "cherries"; there are base, apples'),
        ({"messages": []}, 400, "ends with what the user says"),
        (
            {"messages": [{"role": "user", "content": "x " * 900}]},
            400,
            "tokens, and with the answer",
        ),
        ({"max_tokens": 100_000}, 400, "leave no room for a prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"logprobs": True}, 400, "logprobs: Extra inputs are not permitted"),
        ({"stop": [""]}, 400, "a text to stop at is empty"),
    ],
)
def test_what_cannot_be_answered_is_told(client, given, status, complaint):
    turns = [{"role": "user", "content": QUESTION}]
    asked = {"model": "pears", "messages": turns, "max_tokens": 4, **given}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.status_code == status
    assert complaint in refused.value.body["message"]
    assert said(client, "pears")  # and it goes on


def test_an_error_of_one_batch_is_told_and_the_next_is_answered(served, monkeypatch):
    real, calls = answering_module.decode, []

    def failing(*given):
        calls.append(None)
        if len(calls) == 1:
            raise PomonaError("out of luck")
        return real(*given)

    monkeypatch.setattr(answering_module, "decode", failing)
    with Answering(*served) as answering:
        asked = Asked((5, 6, 7), 4)
        with pytest.raises(PomonaError, match="out of luck"):
            list(answering.ask("pears", asked))
        assert "".join(answering.ask("pears", asked))
        with pytest.raises(PomonaError, match='no model "cherries"'):
            answering.ask("cherries", asked)


def test_the_likeliest_that_hold_a_share_are_drawn_from():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def found(top_p: float) -> set[int]:
        asked = Asked((1,), 1, 1.0, top_p)
        return {drawn(scores, asked, generator) for _ in range(200)}

    assert found(0.5) == {0}
    assert found(0.6) == {0, 1}
    assert found(0.95) == {0, 1, 2}
    assert found(1.0) == {0, 1, 2, 3}


def parts_of(run, name: str) -> list[str]:
    own = run / "clients" / name
    words = ["--adapter", run / "shared", "--graft", own / "graft", "--personal", own / "personal"]
    return [str(word) for word in words]


def test_talking_in_a_terminal(moe_dir, run, models, monkeypatch):
    words = ["chat", str(moe_dir), *parts_of(run, "pears"), "--temperature", "0"]
    words += ["--new-tokens", "12", "--device", "cpu"]
    done = CliRunner().invoke(app, words, input=f"{QUESTION}\n\n{QUESTION}\nand now\n")
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    assert lines[:2] == [alone(models, "pears")] * 2
    assert len(lines) == 3
    long = CliRunner().invoke(app, words, input="x " * 900)
    assert long.exit_code == 2
    assert "start a new one, or ask for fewer" in long.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--graft", "x"], '--graft "x" names no client'),
        (["--graft", "a=x", "--graft", "a=y"], 'given twice for "a"'),
        (["--adapter", "x", "--adapter", "y"], "given twice for all clients"),
        (["--batch", "0"], "is no number of answers"),
        (["--run", "nowhere"], "nowhere holds no personal models"),
        (["--graft", "base=x"], 'a client is called "base"'),
    ],
)
def test_serving_what_is_not_there_is_told(moe_dir, words, complaint):
    done = CliRunner().invoke(app, ["serve-model", str(moe_dir), *words])
    assert done.exit_code == 2, done.output
    assert complaint in " ".join(done.output.split())
