"""Tasks of the harness against accuracies computed by hand; local files; the personal model."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import word_text

from pomona.artifacts.graft_format import write_graft
from pomona.artifacts.origin import origin_of, origin_of_graft
from pomona.artifacts.personal import PersonalModel, open_personal
from pomona.data.questions import read_questions
from pomona.data.templates import Alpaca
from pomona.errors import PomonaError
from pomona.evaluation.tasks import LOCAL, TaskResults
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.models.experts import find_expert_sites
from pomona.models.loading import load_model, load_tokenizer
from pomona.models.lora import LoRA
from pomona.pipelines.evaluate import on_tasks

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed: pip install pomona[eval]")
from lm_eval.tasks import TaskManager

from pomona.evaluation.harness import run_tasks

QUESTIONS = [
    {
        "question": word_text(i, 6),
        "choices": [word_text(100 * i + c, 1 + c) for c in range(3 + i % 2)],
        "answer": i % 3,
    }
    for i in range(24)
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "own.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    return path


def log_likelihood(model, tokenizer, prompt: str, choice: str) -> float:
    """The plain definition: one forward pass, the log-probabilities of the choice's tokens."""
    context = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + " " + choice)
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(len(context), len(whole)))


def by_hand(model, tokenizer, questions=QUESTIONS) -> dict[str, float]:
    right = dict.fromkeys(("acc", "acc_norm"), 0)
    for question in questions:
        prompt = f"Question: {question['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, c) for c in question["choices"]]
        normed = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
        for name, values in (("acc", scores), ("acc_norm", normed)):
            right[name] += values.index(max(values)) == question["answer"]
    return {name: count / len(questions) for name, count in right.items()}


def run(model: Path, questions: Path, **given) -> TaskResults:
    return on_tasks(PersonalModel(str(model)), ["multiple_choice"], questions, limit=0, **given)


def test_accuracy_is_the_one_computed_by_hand(moe_dir, questions):
    found = run(moe_dir, questions)
    (own,) = found.tasks.values()
    expected = by_hand(load_model(moe_dir, "float32").eval(), load_tokenizer(moe_dir))
    assert own.metrics == pytest.approx(expected)
    p, n = expected["acc"], len(QUESTIONS)
    assert 0 < p < 1
    assert own.errors["acc"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert (own.questions, own.fewshot, found.cut) == (n, 0, 0)
    assert len(own.scores["acc"]) == n
    assert sum(own.scores["acc"]) / n == pytest.approx(p)


def test_the_personal_model_is_what_is_measured(moe_dir, questions, tmp_path):
    """A graft of large weights: its accuracies are those of its logits, and not the base's."""
    model = load_model(moe_dir, "float32")
    base = FrozenBase(model, LoRA(), Graft(rank=2), tuple(find_expert_sites(model)))
    grafted = base.init_graft(0, "pears", [[0], [1]])
    generator = torch.Generator().manual_seed(5)
    for name, value in grafted.items():
        if value.is_floating_point():
            grafted[name] = torch.randn(value.shape, generator=generator)
    origin = origin_of(base, str(moe_dir), Alpaca(), 96)
    told = origin_of_graft(origin, base, grafted)
    write_graft(tmp_path / "graft", Graft(rank=2), grafted, told)
    personal = PersonalModel(str(moe_dir), graft=tmp_path / "graft")
    (own,) = on_tasks(personal, ["multiple_choice"], questions, limit=0).tasks.values()
    opened, state = open_personal(personal)
    with opened.attach_one(state):
        expected = by_hand(opened.model, load_tokenizer(moe_dir))
    assert own.metrics == pytest.approx(expected)
    assert own.metrics != by_hand(opened.model, load_tokenizer(moe_dir))


def test_csv_and_json_lines_are_the_same_questions(questions, tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
        for q in QUESTIONS:
            filled = [*q["choices"], ""][:4]
            writer.writerow([q["question"], *filled, q["answer"]])
    assert read_questions(path) == read_questions(questions)
    assert len(read_questions(path)) == 24


def test_an_answer_is_an_index_a_text_or_a_letter(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"question": "q", "choices": ["x", "B", "y"], "answer": a} for a in (2, "y", "C", "B")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [q.answer for q in read_questions(path)] == [2, 2, 2, 1]
    (tmp_path / "own.csv").write_text('"q, with\na break",x,y,z,w,D\n')
    (only,) = read_questions(tmp_path / "own.csv")
    assert (only.question, only.choices, only.answer) == ("q, with\na break", tuple("xyzw"), 3)


def test_examples_and_a_limit(moe_dir, questions):
    found = run(moe_dir, questions, fewshot=2).tasks["multiple_choice"]
    assert found.fewshot == 2
    again = run(moe_dir, questions, fewshot=2).tasks["multiple_choice"]
    assert again == found
    few = on_tasks(PersonalModel(str(moe_dir)), ["multiple_choice"], questions, limit=5)
    assert few.tasks["multiple_choice"].questions == 5
    expected = by_hand(
        load_model(moe_dir, "float32").eval(), load_tokenizer(moe_dir), QUESTIONS[:5]
    )
    assert few.tasks["multiple_choice"].metrics == pytest.approx(expected)


def test_what_is_longer_than_the_context_is_counted(moe_dir, questions):
    requests = sum(len(q["choices"]) for q in QUESTIONS)
    assert 0 < run(moe_dir, questions, fewshot=20).cut <= requests


def test_mmlu_is_read_from_its_folder(data_dir, models_dir):
    model = models_dir / "rootstock-3m"
    told: list[tuple[str, int, int]] = []
    found = on_tasks(
        PersonalModel(str(model)), ["mmlu"], data_dir / "mmlu", 0, 2, lambda *now: told.append(now)
    )
    assert len(found.tasks) == 58
    assert next(iter(found.tasks)) == "mmlu"
    assert found.tasks["mmlu"].questions == 114
    subjects = [own.metrics["acc"] for name, own in found.tasks.items() if name != "mmlu"]
    assert found.tasks["mmlu"].metrics["acc"] == pytest.approx(sum(subjects) / 57)
    assert told[-1] == ("answering", 4 * 114, 4 * 114)
    own = read_questions(data_dir / "mmlu/test/anatomy_test.csv")[:2]
    opened, tokenizer = load_model(model, "float32").eval(), load_tokenizer(model)
    right = 0
    for question in own:
        lines = [f"{letter}. {c}" for letter, c in zip("ABCD", question.choices, strict=True)]
        prompt = "\n".join((question.question.strip(), *lines, "Answer:"))
        about = "The following are multiple choice questions (with answers) about anatomy.\n\n"
        scores = [log_likelihood(opened, tokenizer, about + prompt, letter) for letter in "ABCD"]
        right += scores.index(max(scores)) == question.answer
    assert found.tasks["mmlu_anatomy"].metrics["acc"] == right / 2
    pooled = [x for name, own in found.tasks.items() if name != "mmlu" for x in own.scores["acc"]]
    assert sorted(found.tasks["mmlu"].scores["acc"]) == sorted(pooled)
    assert len(pooled) == 114


def own_task(name, questions):
    return f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_group_of_groups_has_the_questions_of_all_its_tasks(moe_dir, questions, tmp_path):
    """As the harness's own MMLU is built: subjects in areas, areas in one."""
    for name in ("red", "green", "blue"):
        (tmp_path / f"{name}.yaml").write_text(own_task(name, questions))
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (tmp_path / "warm.yaml").write_text(f"group: warm\ntask: [red]\n{aggregate}\n")
    (tmp_path / "cold.yaml").write_text(f"group: cold\ntask: [green, blue]\n{aggregate}\n")
    (tmp_path / "all.yaml").write_text(f"group: all\ntask: [warm, cold]\n{aggregate}\n")
    index = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = load_model(moe_dir, "float32").eval()
    found = run_tasks(model, load_tokenizer(moe_dir), index.load(["all"]), limit=6).tasks
    assert {name: own.questions for name, own in found.items()} == {
        "all": 18,
        "warm": 6,
        "cold": 12,
        "red": 6,
        "green": 6,
        "blue": 6,
    }
    for name in ("all", "cold"):
        own = found[name]
        assert len(own.scores["acc"]) == own.questions
        assert sum(own.scores["acc"]) / own.questions == pytest.approx(own.metrics["acc"])
    assert found["red"].asked == found["green"].asked != found["all"].asked


def test_a_task_of_ones_own_is_a_yaml_file(moe_dir, questions, tmp_path):
    """The harness's way to any local data: no name is looked up, no network is asked."""
    path = tmp_path / "mine.yaml"
    path.write_text(own_task("mine", questions))
    found = on_tasks(PersonalModel(str(moe_dir)), [str(path)], limit=0)
    assert found.tasks["mine"].metrics["acc"] == pytest.approx(
        run(moe_dir, questions).tasks["multiple_choice"].metrics["acc"]
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({}, r'own.jsonl:1: the field "question" is missing'),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "the question is empty"),
        ({"question": "q", "answer": 0}, "the choices are None"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "a list of two texts or more"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "a list of two texts or more"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer 2 is none of the 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "the answer 'C' is none"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "the answer True is none"),
        ({"question": "q", "choices": ["a", "b"]}, "the answer None is none"),
    ],
)
def test_a_question_that_cannot_be_understood_is_named(moe_dir, tmp_path, line, says):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(PomonaError, match=says):
        run(moe_dir, path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.jsonl", "", "own.jsonl is empty"),
        ("own.csv", "question,choice0,choice1\n", "the header is question, choice0, choice1"),
        (
            "own.csv",
            "question,choice0,choice1,answer\nq,a,b\n",
            "own.csv:2: the line has 3 columns",
        ),
        ("own.csv", 'q,"a"b,c,0\n', "own.csv:1: not valid CSV"),
        ("own.txt", "q", "own.txt is no .jsonl and no .csv file"),
    ],
)
def test_a_file_that_holds_no_questions_is_named(moe_dir, tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(PomonaError, match=says):
        run(moe_dir, tmp_path / name)


def test_tasks_that_cannot_be_run_are_told_before_a_model_is_loaded(questions, tmp_path):
    nowhere = PersonalModel("/nowhere")
    wrong = {
        "reads a local file": (["multiple_choice"], None, None),
        "is read by mmlu and multiple_choice only": (["arc_easy"], questions, None),
        "has 23 examples and 24 are asked for": (["multiple_choice"], questions, 24),
        "holds no test/SUBJECT_test.csv": (["mmlu"], tmp_path, None),
        r'no task "arc_eazy"; names like it: .*arc_easy': (["arc_eazy"], None, None),
        "fewshot -1 is too small": (["mmlu"], tmp_path, -1),
        "name a task": ([], None, None),
    }
    for says, (tasks, data, fewshot) in wrong.items():
        with pytest.raises(PomonaError, match=says):
            on_tasks(nowhere, tasks, data, fewshot)


def test_every_local_task_has_its_wording():
    from importlib.resources import files

    found = {path.name for path in files("pomona.evaluation.tasks").iterdir()}
    assert {f"{name}.yaml" for name in LOCAL} <= found
    assert len(LOCAL) == 2
