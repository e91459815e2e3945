"""Reading rows and text: a file and line for every complaint."""

import json
import tracemalloc

import pytest
import torch
from conftest import word_text

from pomona.data.rows import read_rows
from pomona.data.texts import consecutive_windows, encode_texts, read_domains, sample_windows
from pomona.errors import PomonaError
from pomona.models.loading import load_tokenizer
from pomona.seeds import numpy_generator

QA = {"question": "a", "answer": "c"}


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "x.jsonl is empty"),
        ([QA, "{oops"], r"x.jsonl:2: not valid JSON"),
        ([QA, "[1]"], r"x.jsonl:2: not a JSON object"),
        (
            [QA, {"question": "a"}],
            r'x.jsonl:2: the field "answer" is missing; the line has question',
        ),
        (
            [{"question": "a", "answer": 3}],
            r'x.jsonl:1: the field "answer" is 3; it should be text',
        ),
        ([{"foo": "a"}], r'x.jsonl:1: fields foo fit no row format .*kind = "mapped"'),
    ],
)
def test_complaints_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(PomonaError, match=message):
        read_rows(write(tmp_path / "x.jsonl", *lines))


def test_missing_file_wrong_encoding_unknown_suffix(tmp_path):
    with pytest.raises(PomonaError, match=r"cannot read .*none.jsonl: No such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(PomonaError, match=r"latin.jsonl is not UTF-8 text"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(PomonaError, match=r"x is no .jsonl, .json, .csv or .parquet file"):
        read_rows(tmp_path / "x")


def test_domains_are_named_by_file_and_held_out_files_kept_apart(tmp_path):
    write(tmp_path / "b.train.jsonl", {"text": "one"}, {"text": " two "})
    write(tmp_path / "b.valid.jsonl", {"text": "three"})
    (tmp_path / "a.txt").write_text("first\nline\n\nsecond\n")
    (tmp_path / "notes.md").write_text("no")
    assert read_domains(tmp_path) == {"a": ["first\nline", "second"], "b": ["one", "two"]}
    assert list(read_domains(tmp_path)) == ["a", "b"]
    assert read_domains(tmp_path, "valid") == {"b": ["three"]}
    assert read_domains(str(tmp_path / "*.train.jsonl")) == {"b": ["one", "two"]}
    write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(PomonaError, match='second file of the domain "a"'):
        read_domains(tmp_path)


@pytest.mark.parametrize("make", ["missing", "empty folder", "empty file", "no text"])
def test_bad_domains(tmp_path, make):
    folder = tmp_path / "d"
    if make != "missing":
        folder.mkdir()
    if make == "empty file":
        (folder / "a.txt").write_text("\n\n")
    if make == "no text":
        write(folder / "a.jsonl", {"txt": "x"})
    with pytest.raises(
        PomonaError, match=r"is no folder and no file|holds no|a.txt is empty|a.jsonl:1: the field"
    ):
        read_domains(folder)


def test_windows_are_a_function_of_seed_and_domain(moe_dir):
    tokenizer = load_tokenizer(moe_dir)
    texts = ["red green", "blue apple pear plum tree leaf root seed rain sun " * 5, "sun"]
    documents = encode_texts(texts, tokenizer)
    first = sample_windows(documents, 20, 16, 0, "x")
    assert first.shape == (20, 16)
    assert first.tolist() == sample_windows(documents, 20, 16, 0, "x").tolist()
    assert first.tolist() != sample_windows(documents, 20, 16, 1, "x").tolist()
    assert first.tolist() != sample_windows(documents, 20, 16, 0, "y").tolist()
    assert set(first.flatten().tolist()) <= set(documents.token_N.tolist())
    with pytest.raises(
        PomonaError, match=r'domain "x" has \d+ tokens, fewer than one window of 999'
    ):
        sample_windows(documents, 1, 999, 0, "x")


def plainly_encoded(texts, tokenizer):
    """Every document by itself, as lists."""
    return [[tokenizer.bos_token_id, *tokenizer.encode(t, add_special_tokens=False)] for t in texts]


@pytest.mark.parametrize("characters", [1, 1 << 9, 1 << 18])
def test_windows_are_those_of_the_plain_way_bit_for_bit(moe_dir, monkeypatch, characters):
    """However few documents are encoded at a time: the same tokens, the same windows."""
    monkeypatch.setattr("pomona.data.texts._CHARACTERS", characters)
    tokenizer = load_tokenizer(moe_dir)
    texts = [word_text(i, 1 + 13 * i % 70) for i in range(60)]
    plain = plainly_encoded(texts, tokenizer)
    documents = encode_texts(texts, tokenizer)
    assert [documents[i].tolist() for i in range(len(documents))] == plain
    assert documents.token_N.dtype == torch.int32
    generator = numpy_generator("5/calibration", "windows", "x")
    expected = []
    for _ in range(30):
        joined = []
        while len(joined) < 48:
            joined += plain[int(generator.integers(len(plain)))]
        start = int(generator.integers(len(joined) - 48 + 1))
        expected.append(joined[start : start + 48])
    windows = sample_windows(documents, 30, 48, "5/calibration", "x")
    assert torch.equal(windows, torch.tensor(expected))
    assert windows.dtype == torch.int64


def test_encoding_keeps_a_few_bytes_per_token(moe_dir):
    """tracemalloc sees Python's memory, where lists of numbers take 36 bytes per token and more."""
    tokenizer = load_tokenizer(moe_dir)
    texts = [word_text(i, 300) for i in range(1200)]
    short = [word_text(i, 30) for i in range(4000)]
    peaks = []
    tracemalloc.start()
    for own in (texts[:400], texts, short):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        documents = encode_texts(own, tokenizer)
        peaks.append((len(documents.token_N), tracemalloc.get_traced_memory()[1] - before))
        del documents
    tracemalloc.stop()
    (small, first), (large, second), (_, third) = peaks
    assert large > 2.9 * small > 2.9 * 100_000
    assert second - first < 5 * (large - small)
    assert third < second


def test_consecutive_windows_cover_the_text_once(moe_dir):
    tokenizer = load_tokenizer(moe_dir)
    texts = ["red green blue apple " * 10, "pear plum"]
    joined = [t for document in plainly_encoded(texts, tokenizer) for t in document]
    windows = consecutive_windows(texts, tokenizer, 7)
    assert windows.flatten().tolist() == joined[: len(joined) // 7 * 7]
    assert consecutive_windows(texts, tokenizer, 7, 2).tolist() == windows[:2].tolist()
