"""Rows of every published shape: what is asked, what is answered, and what is refused with its line."""

import json

import pytest
from transformers import AutoTokenizer

from pomona.data.formats import FORMATS, Auto, Mapped, detect
from pomona.data.formats.gsm8k import GSM8K
from pomona.data.formats.qa import QA
from pomona.data.rows import Row, read_rows, rows_digest
from pomona.data.templates import Alpaca, Chat
from pomona.errors import PomonaError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}

# The field names as the data sets are published, in their order.
PUBLISHED = {
    "dolly": [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "closed_qa"},
            Row("a", "b", "c", "closed_qa"),
        ),
    ],
    "alpaca": [
        # tatsu-lab/alpaca, whose `text` holds the prompt with its answer
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "a b c"},
            Row("a", "b", "c"),
        ),
        # vicgalle/alpaca-gpt4
        ({"instruction": "a", "input": "", "output": "c", "text": "a c"}, Row("a", "", "c")),
        # gbharti/finance-alpaca: `text` is empty or absent
        ({"instruction": "a", "input": "", "output": "c", "text": ""}, Row("a", "", "c")),
        # medalpaca/medical_meadow_medical_flashcards
        (
            {
                "input": "What is rickets?",
                "output": "A lack of vitamin D.",
                "instruction": "Answer this question truthfully",
            },
            Row("Answer this question truthfully", "What is rickets?", "A lack of vitamin D."),
        ),
    ],
    "messages": [
        ({"messages": [USER, ASSISTANT]}, Row("a", "", "c")),
        (
            {
                "prompt_id": "7",
                "messages": [{"role": "system", "content": "be"}, USER, ASSISTANT, USER, ASSISTANT],
            },
            Row("a", "", "c", "", (("system", "be"), ("user", "a"), ("assistant", "c"))),
        ),
    ],
    "sharegpt": [
        (
            {
                "id": "x",
                "conversations": [
                    {"from": "system", "value": "be"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "c"},
                    {"from": "human", "value": "and?"},
                ],
            },
            Row("a", "", "c", "", (("system", "be"),)),
        ),
    ],
    "gsm8k": [
        (
            {"question": "a", "answer": "He has 2*3 = <<2*3=6>>6 pears.\n#### 6"},
            Row("a", "", "He has 2*3 = 6 pears.\n#### 6"),
        ),
    ],
    "qa": [
        (
            {"source": "s", "focus": "f", "qtype": "information", "question": "a", "answer": "c"},
            Row("a", "", "c"),
        ),
        ({"question": "a", "context": "b", "answer": "c"}, Row("a", "b", "c")),
    ],
    "prompt": [({"prompt": "a", "completion": "c"}, Row("a", "", "c"))],
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_every_format_is_tried_here():
    assert {*PUBLISHED, "auto", "mapped"} == FORMATS.keys()


@pytest.mark.parametrize(
    ("name", "record", "row"),
    [(name, *each) for name, published in PUBLISHED.items() for each in published],
)
def test_a_published_record_is_recognised_and_read(tmp_path, name, record, row):
    path = write(tmp_path / "x.jsonl", record, record)
    assert read_rows(path) == read_rows(path, FORMATS[name]()) == [row, row]
    assert read_rows(path, Auto()) == [row, row]
    assert [r.where for r in read_rows(path)] == ["x.jsonl:1", "x.jsonl:2"]
    assert type(detect(record, "x:1")) is FORMATS[name]
    assert Auto().fits(record)
    assert Auto()(record, "x:1") == row


def test_an_answer_that_is_in_another_field_never_reaches_the_prompt(dense_dir):
    record = {"instruction": "ask", "input": "", "output": "SECRET", "text": "ask SECRET"}
    row = detect(record, "x:1")(record, "x:1")
    assert "SECRET" not in Alpaca().prompt(row, AutoTokenizer.from_pretrained(dense_dir))


def test_calculations_of_gsm8k_can_be_kept_and_other_answers_are_refused():
    record = {"question": "a", "answer": "<<1+1=2>>2\n#### 2"}
    assert GSM8K(calculations=True)(record, "x:1").response == record["answer"]
    with pytest.raises(PomonaError, match=r'^x:3: the answer has no line "#### n"; use .* "qa"'):
        GSM8K()({"question": "a", "answer": "two"}, "x:3")
    assert not GSM8K().fits({"question": "a", "answer": "see issue #### "})
    assert QA()(record, "x:1").response == record["answer"]


def test_real_gsm8k_and_medquad_are_told_apart(data_dir):
    maths = read_rows(data_dir / "gsm8k" / "test.jsonl")
    assert len(maths) == 1319
    assert not any("<<" in row.response for row in maths)
    assert all("\n#### " in row.response for row in maths)
    medical = read_rows(data_dir / "medquad" / "test.jsonl", category="qtype")
    assert len(medical) == 400
    assert len({row.category for row in medical}) >= 5
    assert {row.category for row in read_rows(data_dir / "medquad" / "test.jsonl")} == {""}


def test_a_field_that_rows_are_dealt_by_is_named_and_may_be_a_number(tmp_path):
    path = write(
        tmp_path / "x.jsonl", *({"question": "a", "answer": "c", "k": k} for k in (3, "x"))
    )
    assert [row.category for row in read_rows(path, category="k")] == ["3", "x"]
    with pytest.raises(
        PomonaError, match=r'x.jsonl:1: the field "l" is missing; the line has question, answer, k'
    ):
        read_rows(path, category="l")


def test_mapped_fields(tmp_path):
    format_ = Mapped("q", "", "a", "topic")
    path = write(tmp_path / "x.jsonl", {"q": "a", "a": "c", "topic": 4, "output": "x"})
    assert read_rows(path, format_) == [Row("a", "", "c", "4")]
    whole = Mapped("q", "c", "a", "")
    assert whole({"q": "a", "c": None, "a": "c"}, "x:1") == Row("a", "", "c")
    assert whole({"q": "a", "c": "b", "a": "c"}, "x:1") == Row("a", "b", "c")


@pytest.mark.parametrize(
    ("made", "record", "says"),
    [
        (
            Mapped("q", "", "a"),
            {"question": "a", "a": "c"},
            'field "q" is missing; the line has qu',
        ),
        (
            Mapped("q", "", "a"),
            {"q": "a", "answer": "c"},
            'field "a" is missing; the line has q, an',
        ),
        (Mapped("q", "c", "a"), {"q": "a", "a": "c"}, 'field "c" is missing; the line has q, a'),
        (
            Mapped("q", "", "a", "t"),
            {"q": "a", "a": "c"},
            'field "t" is missing; the line has q, a',
        ),
        (
            Mapped("q", "", "a", "t"),
            {"q": "a", "a": "c", "t": [1]},
            r'field "t" is \[1\]; it should',
        ),
        (Mapped("q", "", "a"), {"q": None, "a": "c"}, 'field "q" is missing'),
        (Mapped("q", "", "a"), {"q": "a", "a": 3}, 'field "a" is 3; it should be text'),
    ],
)
def test_a_mapped_name_that_a_line_lacks_is_refused_with_file_and_line(
    tmp_path, made, record, says
):
    good = dict.fromkeys((made.instruction, made.context, made.response, made.category), "x")
    path = write(tmp_path / "x.jsonl", good, record)
    with pytest.raises(PomonaError, match=f"x.jsonl:2: the {says}"):
        read_rows(path, made)


@pytest.mark.parametrize("empty", ["instruction", "response"])
def test_a_mapping_needs_a_question_and_an_answer(empty):
    with pytest.raises(PomonaError, match=f"mapped {empty} is empty"):
        Mapped(**{empty: ""})


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ("hello", 'the field "messages" is no list of turns; the line has messages'),
        ([], '"messages" has no user turn that the assistant answers'),
        ([turn("user", "a")], '"messages" has no user turn that the assistant answers'),
        ([turn("assistant", "c")], '"messages" has no user turn'),
        ([turn("system", "s"), turn("assistant", "c")], '"messages" has no user turn'),
        (["hello"], "turn 1 is 'hello'; it should be an object with role and content"),
        (
            [turn("user", "a"), turn("tool", "c")],
            'turn 2 is of "tool"; the roles are system, developer, user, assistant',
        ),
        ([{"role": "user"}], 'turn 1: the field "content" is missing; the line has role'),
        ([turn("user", 3)], 'turn 1: the field "content" is 3; it should be text'),
        ([turn("user", [{"type": "image_url"}])], "turn 1 holds more than text"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_refused_with_its_line(tmp_path, turns, says):
    good = {"messages": [USER, ASSISTANT]}
    path = write(tmp_path / "x.jsonl", good, {"messages": turns})
    with pytest.raises(PomonaError, match=f"x.jsonl:2: {says}"):
        read_rows(path, None)


def test_turns_of_one_role_are_joined_and_parts_are_text(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = [turn("user", "a"), turn("user", parts), turn("assistant", "b"), turn("assistant", "c")]
    path = write(tmp_path / "x.jsonl", {"messages": turns, "category": "k"})
    assert read_rows(path) == [Row("a\n\none\ntwo", "", "b\n\nc", "k")]


HISTORY = (("system", "Be kind."), ("user", "red?"), ("assistant", "green."))


def test_alpaca_shows_earlier_turns_before_the_instruction(dense_dir):
    row = Row("blue?", "", "apple", history=HISTORY)
    assert Alpaca().prompt(row, AutoTokenizer.from_pretrained(dense_dir)) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\nBe kind.\n\n### Instruction:\nred?\n\n### Response:\ngreen.\n\n"
        "### Instruction:\nblue?\n\n### Response:\n"
    )


def test_a_chat_template_gets_all_turns_and_one_system_turn(dense_dir):
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}assistant:"
    )
    row = Row("blue?", "pear", "apple", history=HISTORY)
    asked = "user:red?|assistant:green.|user:blue?\n\npear|assistant:"
    assert Chat().prompt(row, tokenizer) == "system:Be kind.|" + asked
    assert Chat("Be brief.").prompt(row, tokenizer) == "system:Be kind.|" + asked
    assert Chat("Be brief.").prompt(Row("a", "", "c"), tokenizer) == (
        "system:Be brief.|user:a|assistant:"
    )
    tokenizer.chat_template = "{{ raise_exception('no system turn here') }}"
    with pytest.raises(PomonaError, match=r"^f:3: the chat template of .* \(no system turn here\)"):
        Chat().prompt(Row("a", "", "c", where="f:3"), tokenizer)


def test_a_digest_knows_every_part_of_a_row_but_not_where_it_came_from():
    row = Row("a", "b", "c", "d", (("user", "x"),))
    others = [
        Row("A", "b", "c", "d", (("user", "x"),)),
        Row("a", "B", "c", "d", (("user", "x"),)),
        Row("a", "b", "C", "d", (("user", "x"),)),
        Row("a", "b", "c", "D", (("user", "x"),)),
        Row("a", "b", "c", "d", (("user", "X"),)),
        Row("a", "b", "c", "d", (("system", "x"),)),
        Row("a", "b", "c", "d"),
    ]
    assert len({rows_digest([r]) for r in (row, *others)}) == 8
    moved = Row("a", "b", "c", "d", (("user", "x"),), where="other.csv:9")
    assert rows_digest([moved]) == rows_digest([row])
