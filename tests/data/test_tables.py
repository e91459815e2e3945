"""Files of every kind give the same records; the Hub's are read through `datasets`."""

import csv
import json
from functools import partial

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from pomona.data.rows import Row, read_rows, rows_digest
from pomona.data.tables import TABLES, is_file_name, read_table
from pomona.errors import PomonaError

RECORDS = [
    {"instruction": "a, b", "input": 'say "x"', "output": "two\nlines", "category": "é"},
    {"instruction": "d", "input": "", "output": " f ", "category": "k"},
]
ROWS = [Row("a, b", 'say "x"', "two\nlines", "é"), Row("d", "", " f ", "k")]


def of_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


def of_json(path, records):
    path.write_text(json.dumps(records, indent=2), "utf-8")


def of_csv(path, records):
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, list(records[0]))
        lines.writeheader()
        lines.writerows(records)


def of_parquet(path, records):
    parquet.write_table(pa.Table.from_pylist(records), path)


WRITERS = {".jsonl": of_jsonl, ".json": of_json, ".csv": of_csv, ".parquet": of_parquet}


def test_every_kind_is_tried_here():
    assert WRITERS.keys() == TABLES.keys()


@pytest.mark.parametrize("suffix", TABLES)
def test_every_kind_gives_the_same_rows_and_the_same_digest(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, RECORDS)
    rows = read_rows(path)
    assert rows == ROWS
    assert rows_digest(rows) == rows_digest(ROWS)
    assert read_rows(str(path)) == ROWS
    with pytest.raises(PomonaError, match=rf"cannot read .*none{suffix}: No such file"):
        read_rows(tmp_path / f"none{suffix}")


@pytest.mark.parametrize("suffix", TABLES)
def test_real_rows_are_the_same_in_every_kind(tmp_path, data_dir, suffix):
    source = data_dir / "dolly-15k" / "test.jsonl"
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, [record for _, record in read_table(source)])
    assert rows_digest(read_rows(path)) == rows_digest(read_rows(source))


@pytest.mark.parametrize("suffix", TABLES)
def test_a_conversation_survives_every_kind(tmp_path, suffix):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / f"x{suffix}"
    held = json.dumps(turns) if suffix == ".csv" else turns
    WRITERS[suffix](path, [{"messages": held}])
    assert read_rows(path) == [Row("a", "", "c")]


@pytest.mark.parametrize("text", ["", "[]", " [ ] ", "a,b\n", "\n\n"])
def test_empty_files_are_named(tmp_path, text):
    path = tmp_path / ("x.csv" if text == "a,b\n" else "x.json")
    path.write_text(text)
    with pytest.raises(PomonaError, match=rf"{path.name} is empty"):
        read_rows(path)


def test_lines_that_some_call_json(tmp_path):
    path = tmp_path / "x.json"
    of_jsonl(path, RECORDS)
    assert read_rows(path) == ROWS


GOOD = '{"question": "a", "answer": "c"}'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.json", f"[\n{GOOD},\n{{oops}}]", r"x.json:3: not valid JSON \(.* at column 2\)"),
        ("x.json", f"[\n{GOOD},\n[1]]", "x.json:3: not a JSON object"),
        ("x.json", f"[\n{GOOD},\n]", "x.json:3: not valid JSON"),
        ("x.json", f"[\n{GOOD}\n{GOOD}]", "x.json:2: not valid JSON .*comma"),
        ("x.json", f"[\n{GOOD}", "x.json:2: not valid JSON .*end of the list"),
        ("x.json", f"[\n{GOOD}] more", "x.json:2: not valid JSON"),
        ("x.json", f'[{GOOD},\n\n{{"question": "a"}}]', 'x.json:3: the field "answer" is missing'),
        ("x.json", "[" + '{"a": ' * 100_000, "x.json:1: nested too deeply"),
        ("x.json", "3", "x.json:1: not a JSON object"),
        ("x.csv", 'question,answer\n"a\nb",c\nd\n', "x.csv:4: the line has 1 columns and the hea"),
        ("x.csv", "question,answer\na,b,c\n", "x.csv:2: the line has 3 columns and the header 2"),
        ("x.csv", 'question,answer\na,"b\n', r"x.csv:2: not valid CSV"),
        ("x.csv", "question,question\na,b\n", "x.csv:1: the header question, question has an em"),
        ("x.csv", "question,\na,b\n", "x.csv:1: the header question,  has an empty"),
        ("x.csv", "q,a\nb,c\n", "x.csv:2: fields q, a fit no row format"),
        ("x.parquet", "PAR1 not really", "x.parquet is no whole Parquet file"),
        ("x.txt", "a", "x.txt is no .jsonl, .json, .csv or .parquet file"),
    ],
)
def test_complaints_name_file_and_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(PomonaError, match=says):
        read_rows(tmp_path / name)


def test_a_csv_cell_may_be_longer_than_python_s_limit(tmp_path):
    of_csv(tmp_path / "x.csv", [{"question": "a" * 200_000, "answer": "c"}])
    assert len(read_rows(tmp_path / "x.csv")[0].instruction) == 200_000


def test_a_null_in_a_table_is_told_as_missing(tmp_path):
    records = [{"question": "a", "answer": "c"}, {"question": "a", "answer": None}]
    of_parquet(tmp_path / "x.parquet", records)
    with pytest.raises(PomonaError, match=r'x.parquet:2: the field "answer" is missing'):
        read_rows(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("org/name", False),
        ("org/name-v1.5", False),
        ("gsm8k", False),
        ("org/name:main:train[:90%]", False),
        ("rows.jsonl", True),
        ("rows/x.csv", True),
        ("./rows", True),
        ("/rows", True),
        ("~/rows", True),
    ],
)
def test_a_file_is_told_from_a_hub_id(source, file):
    assert is_file_name(source) == file


def test_without_the_hub_there_is_one_sentence():
    with pytest.raises(PomonaError) as caught:
        read_rows("org/no-such-data-set:train")
    message = str(caught.value)
    assert message.startswith(
        'cannot load the data set "org/no-such-data-set:train" from the Hub: '
    )
    assert message.endswith(
        "; check the name and the network, or give a .jsonl, .json, .csv or .parquet file"
    )
    assert "\n" not in message


@pytest.mark.parametrize("source", ["a/b/c", "org/name:", "org/name:a:b:c", "two words", ""])
def test_what_is_neither_file_nor_hub_id_is_refused(source):
    with pytest.raises(PomonaError, match=f'"{source}" is no .*file and no Hub id; write NAME'):
        read_rows(source)


@pytest.mark.parametrize(
    ("asked", "config", "split", "revision"),
    [
        ("org/name", None, "test", None),
        ("org/name:train[:90%]", None, "train[:90%]", None),
        ("org/name@v1.0", None, "test", "v1.0"),
        ("org/name@abc:main:train", "main", "train", "abc"),
    ],
)
def test_a_hub_id_is_what_datasets_is_asked_for(
    tmp_path, monkeypatch, asked, config, split, revision
):
    """The Hub's place is taken by a folder of Parquet files, which `datasets` loads as it does the Hub's."""
    load, requests = datasets.load_dataset, []
    of_parquet(tmp_path / "all.parquet", RECORDS * 5)
    files = {"train": str(tmp_path / "all.parquet"), "test": str(tmp_path / "all.parquet")}

    def local(name, config=None, *, split, revision):
        requests.append((name, config, split, revision))
        return load("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows = read_rows(asked, split="test")
    assert requests == [("org/name", config, split, revision)]
    assert rows == ROWS * 5 if "[" not in split else rows == (ROWS * 5)[:9]
    assert rows[2].where == f"{asked}:3"


def test_readers_read_as_they_go(tmp_path):
    """A broken line at the end does not keep the records before it from being seen."""
    path = tmp_path / "x.json"
    path.write_text(f"[{GOOD}, {GOOD}, oops]")
    records = read_table(path)
    take = partial(next, records)
    assert take() == take() == (1, json.loads(GOOD))
    with pytest.raises(PomonaError, match="not valid JSON"):
        take()
