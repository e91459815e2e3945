"""Prompts, answers and batches: one template for training and evaluation."""

import pytest
from conftest import save_tokenizer

from pomona.data.examples import (
    Example,
    collate,
    collate_prompts,
    encode,
    encode_prompt,
)
from pomona.data.rows import Row, read_rows
from pomona.data.templates import TEMPLATES, Alpaca, Chat
from pomona.errors import PomonaError
from pomona.models.loading import load_tokenizer

ROWS = [Row("Name a fruit.", "", "A pear."), Row("Name it.", "It is a plum.", "A plum.")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def test_alpaca_has_two_forms(tokenizer):
    alone, with_context = (Alpaca().prompt(row, tokenizer) for row in ROWS)
    assert alone.endswith("### Instruction:\nName a fruit.\n\n### Response:\n")
    assert "### Input" not in alone
    assert "### Input:\nIt is a plum.\n\n### Response:\n" in with_context


def test_chat_uses_the_tokenizers_template(tokenizer):
    text = Chat("Be brief.").prompt(ROWS[1], tokenizer)
    assert text == "<s><system>Be brief.\n<user>Name it.\n\nIt is a plum.\n<assistant>"
    tokens = encode_prompt(ROWS[1], Chat(), tokenizer, 200)
    assert tokens.count(tokenizer.bos_token_id) == 1
    bare = load_tokenizer(tokenizer.name_or_path)
    with pytest.raises(PomonaError, match='no chat template; use the template "alpaca"'):
        Chat().prompt(ROWS[0], bare)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS)
def test_generation_prompt_is_the_start_of_the_training_example(tokenizer, template, row):
    form = TEMPLATES[template]()
    example = encode(row, form, tokenizer, 256)
    prompt = encode_prompt(row, form, tokenizer, 256)
    assert list(example.input_ids[: example.prompt_length]) == prompt
    assert prompt[0] == tokenizer.bos_token_id
    answer = example.input_ids[example.prompt_length :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == row.response


def test_long_rows_fit_and_keep_where_the_answer_is_asked_for(tokenizer):
    row = Row("Name it.", "plum " * 100, "pear " * 50)
    for length in (40, 90, 130):
        example = encode(row, Alpaca(), tokenizer, length)
        assert len(example.input_ids) == length
        prompt = example.input_ids[: example.prompt_length]
        assert len(prompt) >= length // 2
        assert tokenizer.decode(prompt).endswith("Response:\n")
        assert prompt[0] == tokenizer.bos_token_id


def test_batches_are_padded_and_labelled():
    batch = collate([Example((5, 6, 7, 8), 2), Example((9, 4), 1)], 0)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.label_mask_BT.tolist() == [[False, False, True, True], [False, True, False, False]]
    ids, mask = collate_prompts([[5, 6, 7], [9]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_real_tokenizers_and_rows(models_dir, data_dir):
    rows = read_rows(data_dir / "dolly-15k" / "test.jsonl")
    assert len(rows) == 800
    for name in ("rootstock-3m", "stories260K"):
        tokenizer = load_tokenizer(models_dir / name)
        for row in rows[::80]:
            example = encode(row, Alpaca(), tokenizer, 512)
            assert list(example.input_ids[: example.prompt_length]) == encode_prompt(
                row, Alpaca(), tokenizer, example.prompt_length
            )
            assert example.input_ids[0] == tokenizer.bos_token_id
            assert example.input_ids[1] != tokenizer.bos_token_id
