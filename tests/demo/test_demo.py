"""The embedded default: what ships, what it generates, and the story in small."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from pomona.artifacts.table import load_runs
from pomona.data.texts import encode_texts
from pomona.demo import story
from pomona.demo.clients import HOUSES, answer, client_rows, tool_of
from pomona.demo.domains import DOMAINS, FRUITS, SEASONS, domain_texts
from pomona.federation.evaluation import Evaluation
from pomona.federation.local import LocalTraining
from pomona.models.loading import load_model, load_tokenizer


def test_the_shipped_model_is_small_and_knows_every_domain():
    assert sum(f.stat().st_size for f in story.MODEL.iterdir()) < 4_000_000
    from pomona.artifacts.personal import PersonalModel
    from pomona.pipelines.evaluate import on_text

    tokenizer = load_tokenizer(story.MODEL)
    assert load_model(story.MODEL).config.vocab_size == len(tokenizer)
    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for name, texts in domain_texts(seed=9, documents=12).items():
            (Path(folder) / f"{name}.jsonl").write_text(
                "\n".join(json.dumps({"text": text}) for text in texts)
            )
        figures = on_text(PersonalModel(str(story.MODEL)), folder, [128], 8)[128].figures
    assert len(figures) == len(DOMAINS) + 1
    assert all(own["loss"] < 2.0 for own in figures.values())  # uniform guessing is 6.6


def test_domains_are_reproducible_and_clearly_different():
    assert len(DOMAINS) >= 6
    texts = domain_texts(seed=3, documents=40)
    assert texts == domain_texts(seed=3, documents=40)
    assert texts != domain_texts(seed=4, documents=40)
    assert all(len(set(documents)) > 20 for documents in texts.values())
    counts = {name: Counter(w for t in texts[name] for w in t.split()) for name in texts}

    def guess(text: str) -> str:
        """The domain whose word frequencies make the text likeliest."""
        total = {name: count.total() for name, count in counts.items()}
        return max(
            counts,
            key=lambda n: sum(math.log((counts[n][w] + 0.1) / total[n]) for w in text.split()),
        )

    other = domain_texts(seed=4, documents=25)
    right = [guess(text) == name for name, documents in other.items() for text in documents]
    assert sum(right) / len(right) > 0.97
    tokenizer = load_tokenizer(story.MODEL)
    for documents in domain_texts(seed=2, documents=60).values():
        assert sum(map(len, encode_texts(documents, tokenizer))) > 128 * 8


def test_houses_answer_the_same_question_differently():
    assert len(HOUSES) >= 4
    for fruit, season in itertools.product(FRUITS, SEASONS):
        assert len({answer(house, fruit, season) for house in HOUSES}) == len(HOUSES)
    for season in SEASONS:
        assert len({tool_of(house, season) for house in HOUSES}) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_asked_about_everything_and_told_a_part(seed):
    dealt = client_rows(seed)
    for train, test in dealt.values():
        assert not {r.instruction for r in train} & {r.instruction for r in test}
        assert {r.instruction.split()[3] for r in test} == set(FRUITS)
        assert len({r.instruction.split()[3] for r in train}) == len(FRUITS) // 2
    known = {r.instruction.split()[3] for train, _ in dealt.values() for r in train}
    assert known == set(FRUITS)
    assert client_rows(seed) == dealt


def test_the_story_in_small(tmp_path, monkeypatch):
    whole = story.settings_of

    def short(*arguments):
        return replace(
            whole(*arguments),
            rounds=2,
            local=LocalTraining(steps=2, batch=4, learning_rate=1e-2),
            evaluation=Evaluation(every=2, rows=6, answers=2, new_tokens=8),
        )

    monkeypatch.setattr(story, "settings_of", short)
    stages = []
    runs, page = story.tell(tmp_path, 0, lambda stage, *_: stages.append(stage))
    assert [run.method for run in load_runs(runs)] == ["local-only", "FedAvg", "FLEx"]
    assert page.is_file()
    assert {"calibrating", "FLEx rounds"} <= set(stages)
    for run in load_runs(runs):
        assert run.results[run.served]["mean"]["loss"] < run.results["base"]["mean"]["loss"]
