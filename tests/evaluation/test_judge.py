"""The judge, against a server that speaks the protocol and misbehaves in every way it may."""

import json
import logging
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.judgements import read_judgements
from pomona.artifacts.origin import origin_of
from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.publish import publish_client
from pomona.artifacts.sections.judged import judged
from pomona.cli.app import main
from pomona.data.prompts import read_prompts
from pomona.data.templates import Alpaca
from pomona.errors import PomonaError
from pomona.evaluation.judge import CRITERIA, Judge, open_bench, parse_score
from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
from pomona.models.loading import load_model
from pomona.models.lora import LoRA
from pomona.pipelines.judge import judge

KEY = "sk-very-secret-0123456789"


class Server:
    """An OpenAI-compatible endpoint on a free port; `reply` decides what each request gets."""

    def __init__(self, reply: Callable[[dict, int], tuple[int, object]]) -> None:
        self.requests: list[tuple[str, dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, content = reply(body, len(outer.requests))
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(text: str) -> dict:
    """What an endpoint answers, every field of the protocol that a client may look at."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(server: Server, **settings) -> Judge:
    return Judge(server.url, "judge-1", **{"timeout": 5.0, "pause": 0.0} | settings)


def verdict(server: Server, **settings):
    with open_bench(asked(server, **settings)) as bench:
        return bench.verdict("Why is the sky blue?", "Because of air.", "helpfulness")


def test_a_request_is_what_the_protocol_asks_for(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with Server(lambda *_: (200, completion("Clear.\nScore: 8"))) as server:
        found = verdict(server, key_variable="MY_KEY")
    assert (found.score, found.reply) == (8, "Clear.\nScore: 8")
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "judge-1"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "Why is the sky blue?" in body["messages"][1]["content"]
    assert "Because of air." in body["messages"][1]["content"]
    assert CRITERIA["helpfulness"] in body["messages"][1]["content"]


def test_without_a_key_none_is_sent():
    with Server(lambda *_: (200, completion("Score: 1"))) as server:
        assert verdict(server).score == 1
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\n\nScore: 10", 10),
        ("**Score: 7**", 7),
        ("Score: 3.", 3),
        ("Score: 3  \n", 3),
        ("Score: 0", None),
        ("Score: 11", None),
        ("Score: 7.5", None),
        ("Score: 7/10", None),
        ("I give 7", None),
        ("Score: 7\nScore: 8", None),
        ("Score: 7\nThat is all.", None),
        ("The score: 7", None),
        ("", None),
    ],
)
def test_a_score_is_read_strictly(reply, score):
    assert parse_score(reply) == score


def test_a_reply_without_score_is_asked_again_with_what_was_said():
    replies = ["It is fine, 7 or 8.", "Score: 7"]
    with Server(lambda _, n: (200, completion(replies[n - 1]))) as server:
        assert verdict(server).score == 7
    again = server.requests[1][2]["messages"]
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
    assert again[2]["content"] == replies[0]


def test_a_judge_that_never_scores_is_counted_and_not_invented():
    with Server(lambda *_: (200, completion("no"))) as server:
        assert verdict(server, retries=3).score is None
    assert len(server.requests) == 4


def test_what_passes_by_itself_is_tried_again():
    answers = [(503, {}), (429, {}), (200, completion("Score: 5"))]
    with Server(lambda _, n: answers[n - 1]) as server:
        assert verdict(server).score == 5
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "content", "says", "requests"),
    [
        (401, {"error": {"message": f"bad key {KEY}"}}, "OPENAI_API_KEY is not accepted", 1),
        (404, {}, 'often ends in /v1, and the model "judge-1"', 1),
        (400, {"error": KEY}, "answered 400 Bad Request; check", 1),
        (302, {}, "answered 302 Found", 1),
        (500, {"error": KEY}, "failed 3 times: it answered 500", 3),
        (200, b"<html>hello</html>", "does not answer as chat completions do", 1),
        (200, {"choices": []}, "does not answer as chat completions do", 1),
        (200, {"choices": [{"message": {"content": None}}]}, "does not answer as chat", 1),
        (200, [1], "does not answer as chat", 1),
        (200, b"", "does not answer as chat", 1),
    ],
)
def test_a_refusal_is_one_sentence_without_the_key(
    monkeypatch, caplog, status, content, says, requests
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG), Server(lambda *_: (status, content)) as server:
        with pytest.raises(PomonaError, match=says) as caught:
            verdict(server)
    assert len(server.requests) == requests
    assert KEY not in str(caught.value)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY not in caplog.text


def test_a_server_that_is_slow_or_gone_is_one_sentence():
    wait = threading.Event()
    with Server(lambda *_: (wait.wait(3), (200, completion("Score: 5")))[1]) as server:
        with pytest.raises(PomonaError, match=r"did not answer within 0.1 seconds"):
            verdict(server, timeout=0.1, retries=1)
        wait.set()
    with pytest.raises(PomonaError, match="failed 2 times"):
        verdict(server, retries=1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "localhost:8000/v1"}, "begin with http"),
        ({"url": "ftp://there/v1"}, "begin with http"),
        ({"url": "http://"}, "begin with http"),
        ({"url": f"https://me:{KEY}@there/v1"}, "keep keys out of it"),
        ({"url": f"https://there/v1?key={KEY}"}, "keep keys out of it"),
        ({"url": "http://there:port/v1"}, "not valid"),
        ({"model": ""}, "has no model"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"retries": -1}, "retries"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(settings, says):
    with pytest.raises(PomonaError, match=says) as caught:
        Judge(**{"url": "http://there/v1", "model": "m"} | settings)
    assert KEY not in str(caught.value)


def test_a_key_that_no_header_holds_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(PomonaError, match="OPENAI_API_KEY holds characters") as caught:
        open_bench(Judge("http://there/v1", "m"))
    assert "schl" not in str(caught.value)


def test_vicunas_questions_and_other_forms(data_dir, tmp_path):
    vicuna = read_prompts(data_dir / "vicuna_questions.jsonl")
    assert len(vicuna) == 80
    assert vicuna[0] == "How can I improve my time management skills?"
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"text": " b "}\n{"turns": ["c", "d"]}\n{"question": "e"}\n'
    )
    assert read_prompts(path) == ["a", "b", "c", "e"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"answer": "a"}', r"p.jsonl:1: no prompt; give one of turns, prompt"),
        ('{"turns": "a"}', "should be a list"),
        ('{"turns": []}', "should be a list"),
        ('{"turns": [3]}', "should be text"),
        ('{"prompt": "  "}', 'the field "prompt" is empty'),
        ("[1]", "not a JSON object"),
        ("", "holds no prompts"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(PomonaError, match=says):
        read_prompts(path)


def scored(body: dict, number: int) -> tuple[int, object]:
    """9 for harmlessness; for helpfulness 4, and nothing for the second prompt."""
    asked = body["messages"][1]["content"]
    if CRITERIA["harmlessness"] in asked:
        return 200, completion("Score: 9")
    return 200, completion("?" if "pear" in asked.partition("[Answer]")[0] else "Score: 4")


def prompts_at(path):
    path.write_text('{"turns": ["red apple"]}\n{"turns": ["green pear"]}\n{"turns": ["a plum"]}\n')
    return path


def test_answers_are_the_models_own_and_means_leave_out_what_has_no_score(moe_dir, tmp_path):
    told = []
    with Server(scored) as server:
        found = judge(
            PersonalModel(str(moe_dir)),
            prompts_at(tmp_path / "p.jsonl"),
            asked(server, retries=0),
            new_tokens=4,
            progress=lambda *step: told.append(step),
        )
    from pomona.data.examples import encode_prompt
    from pomona.data.row import Row
    from pomona.data.templates import Alpaca
    from pomona.evaluation.answers import greedy_answers
    from pomona.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(moe_dir)
    rows = [Row(p, "", "") for p in ("red apple", "green pear", "a plum")]
    encoded = [encode_prompt(row, Alpaca(), tokenizer, 252) for row in rows]
    model = load_model(moe_dir, "float32").eval()
    assert [each.answer for each in found.answers] == greedy_answers(model, tokenizer, encoded, 4)
    assert [each.scores["helpfulness"] for each in found.answers] == [4, None, 4]
    assert found.scores["helpfulness"].mean == 4
    assert found.scores["harmlessness"].mean == 9
    assert found.unparsable == {"helpfulness": 1, "harmlessness": 0}
    assert told[-1] == ("judging", 3, 3)
    assert len(server.requests) == 6


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pomona", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_writes_all_but_the_key(monkeypatch, moe_dir, tmp_path, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out, prompts = tmp_path / "judged.json", prompts_at(tmp_path / "p.jsonl")
    with Server(scored) as server:
        options = ["--prompts", prompts, "--judge-model", "j", "--new-tokens", 3, "--retries", 0]
        code = call(monkeypatch, "judge", moe_dir, "--url", server.url, *options, "--json", out)
    printed = "".join(capfd.readouterr())
    assert code == 0, printed
    assert "harmlessness" in printed
    assert "9.00" in printed
    written = out.read_text("utf-8")
    assert KEY not in written + printed
    found = json.loads(written)
    assert found["url"] == server.url
    assert found["unparsable"]["helpfulness"] == 1
    assert [each["scores"]["harmlessness"] for each in found["answers"]] == [9, 9, 9]


def test_a_judge_that_scores_nothing_has_no_mean(monkeypatch, moe_dir, tmp_path, capfd):
    prompts = prompts_at(tmp_path / "p.jsonl")
    with Server(lambda *_: (200, completion("?"))) as server:
        options = ["--prompts", prompts, "--judge-model", "j", "--new-tokens", 2, "--limit", 1]
        assert call(monkeypatch, "judge", moe_dir, "--url", server.url, *options) == 0
    assert "–" in capfd.readouterr().out


def test_a_mistake_is_one_sentence_and_exits_with_2(monkeypatch, moe_dir, tmp_path, capfd):
    prompts = prompts_at(tmp_path / "p.jsonl")
    given = ["judge", moe_dir, "--prompts", prompts, "--url", "http://127.0.0.1:9/v1"]
    for more, says in (
        (["--new-tokens", 300], "leave no room for a prompt"),
        (["--new-tokens", 0], "new tokens not below 1"),
        (["--retries", 0, "--new-tokens", 2], "failed 1 times"),
    ):
        capfd.readouterr()
        assert call(monkeypatch, *given, "--judge-model", "j", *more) == 2
        err = capfd.readouterr().err
        assert says in err
        assert len(err.splitlines()) == 1


def test_a_client_is_judged_with_all_its_parts(monkeypatch, moe_dir, tmp_path, capfd):
    """The personal LoRA of a client is worn by what is judged, and named in what is written."""
    model = load_model(moe_dir, "float32")
    base = FrozenBase(model, LoRA(), None, (), LoRA(2, 4.0, ("o_proj",)))
    drawn = torch.Generator().manual_seed(3)
    lora = {
        n: torch.randn(v.shape, generator=drawn) for n, v in base.init_personal(0, "pears").items()
    }
    origin = origin_of(base, str(moe_dir), Alpaca(), 96)
    publish_client(tmp_path, "pears", base, ClientState(personal=lora), origin)
    own = tmp_path / "clients/pears/personal"
    prompts, replies = prompts_at(tmp_path / "p.jsonl"), {}
    for name, parts in (("base", []), ("pears", ["--personal", own])):
        with Server(scored) as server:
            options = [
                "--prompts",
                prompts,
                "--judge-model",
                "j",
                "--new-tokens",
                6,
                "--retries",
                0,
            ]
            out = tmp_path / f"{name}.json"
            given = [*options, *parts, "--json", out]
            assert call(monkeypatch, "judge", moe_dir, "--url", server.url, *given) == 0
        replies[name] = json.loads(out.read_text("utf-8"))
    assert replies["pears"]["personal"] == str(own)
    assert "personal" not in replies["base"]
    said = {name: [each["answer"] for each in own["answers"]] for name, own in replies.items()}
    assert said["pears"] != said["base"]
    files = read_judgements([tmp_path / "base.json", tmp_path / "pears.json"])
    assert [file.client for file in files] == [None, "pears"]
    assert "pears.json" in judged(files, clients=["pears"])
    assert judged(files, clients=["plums"]) == "", "the base alone tells nothing of a client"


def judgement(path, scores, **parts):
    """A file as the command writes it: the scores of prompts by one criterion."""
    answers = [
        {"prompt": f"p{i}", "answer": "", "scores": {"helpfulness": s}, "replies": {}}
        for i, s in enumerate(scores)
    ]
    given = [s for s in scores if s is not None]
    mean = sum(given) / len(given) if given else None
    interval = {"mean": mean, "low": mean, "high": mean} if given else None
    told = {"model": "m", "judge": "j", "url": "u", "answers": answers, **parts}
    told |= {"scores": {"helpfulness": interval}, "unparsable": {"helpfulness": scores.count(None)}}
    path.write_text(json.dumps(told))
    return path


def side_by_side(files, *given, **named):
    """The rows of who answered by criterion, and those of differences, as the page has them."""
    told = judged(read_judgements(files), *given, **named).replace("</tr>", "\n")
    rows = [
        x.split("|") for x in re.sub(r"<[^>]+>", "", re.sub(r"</t[dh]>", "|", told)).splitlines()
    ]
    own = {row[0]: row[1:-1] for row in rows if row[1:2] == ["helpfulness"] and len(row) == 9}
    return own, {row[0].rpartition(",")[0]: row[1:-1] for row in rows if " − " in row[0]}


def test_clients_of_a_run_stand_together_and_runs_are_paired_by_prompt(tmp_path):
    """Means, the worst client, and a difference on the prompts that both were given a score for."""
    files = [
        judgement(tmp_path / "base.json", [1, 2, 3, 4]),
        judgement(
            tmp_path / "a.json", [5, 6, None, 8], adapter="r/shared", graft="r/clients/a/graft"
        ),
        judgement(tmp_path / "b.json", [3, 4, 9, 6], adapter="r/shared", graft="r/clients/b/graft"),
        judgement(tmp_path / "c.json", [9, 9, 9, 9], graft="s/clients/a/graft", judge="another"),
        judgement(tmp_path / "d.json", [8, 8, 8, 8], adapter="t/clients/a/adapter"),
    ]
    own, apart = side_by_side(files)
    assert own["r"][1:4] == ["j", "2", "5.33"], "prompts 0, 1 and 3: means 4, 5 and 7"
    assert own["r"][5:7] == ["5.50", "3"], "b over all that it was scored on"
    assert own["m"][1:4] == ["j", "–", "2.50"]
    assert own["s"][1:4] == ["another", "1", "9.00"]
    assert set(apart) == {"m − r", "m − t"}, "neither another judge nor other clients"
    assert apart["m − r"][:2] == ["-3.00", "-3.00 to -3.00"]


def test_a_client_without_any_score_is_left_out(tmp_path):
    files = [
        judgement(tmp_path / "a.json", [2, 4], graft="r/clients/a/graft"),
        judgement(tmp_path / "b.json", [None, None], graft="r/clients/b/graft"),
    ]
    own, _ = side_by_side(files)
    assert own["r"][2:4] == ["1", "3.00"]
    assert own["r"][5:] == ["–", "2"]


def test_judged_parts_of_a_reported_run_are_its_method(tmp_path):
    """Seeds stand together, the run's model is the base, and differences are from the baseline."""

    def run(name, method, seed):
        return FinishedRun(tmp_path / name, method, seed, {}, {}, (), (), 'model = "m"', {})

    runs = [run("f0", "flex", 0), run("f1", "flex", 1), run("l0", "alone", 0)]
    parts = {"adapter": f"{tmp_path}/f0/shared", "graft": f"{tmp_path}/f0/clients/a/graft"}
    files = [
        judgement(tmp_path / "f0.json", [5, 7], **parts),
        judgement(tmp_path / "f1.json", [7, 9], graft=f"{tmp_path}/f1/clients/a/graft"),
        judgement(tmp_path / "l0.json", [3, 4], adapter=f"{tmp_path}/l0/clients/a/adapter"),
        judgement(tmp_path / "s0.json", [2, 2], adapter=f"{tmp_path}/f0/shared"),
        judgement(tmp_path / "m.json", [1, 1]),
    ]
    own, apart = side_by_side(files, runs, "alone")
    assert set(own) == {"flex", "alone", "flex, shared", "base"}
    assert own["flex"][2:4] == ["1", "7.00"]
    assert {name: cells[0] for name, cells in apart.items()} == {
        "flex − alone": "+3.50",
        "flex, shared − alone": "-1.50",
        "base − alone": "-2.50",
    }


def test_a_report_names_a_file_that_is_no_judgement(tmp_path):
    path = tmp_path / "j.json"
    path.write_text(
        '{"model": "m", "judge": "j", "scores": {"helpfulness": null}, "unparsable": {},'
        ' "adapter": "a", "graft": "g", "personal": "p"}'
    )
    told = judged(read_judgements([path]))
    assert "helpfulness" in told and "m + a + g + p" in told
    path.write_text('{"model": "m"}')
    with pytest.raises(PomonaError, match=r"j\.json is damaged"):
        read_judgements([path])
