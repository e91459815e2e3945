"""Encoded rows: what `encode` gives, once, from the disk the second time."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tokenizer

from pomona.data import encoded
from pomona.data.encoded import cache_folder, encode_groups
from pomona.data.examples import encode
from pomona.data.rows import Row
from pomona.data.templates import TEMPLATES, Alpaca, Chat
from pomona.models.loading import load_tokenizer

GROUPS = {
    "apples": [Row(f"Name fruit {i}.", "é" * i, f"Apple {i}.") for i in range(5)],
    "nobody": [],
    "pears": [Row("Name one.", "", "pear " * i) for i in range(3)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    return tokenizer


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("length", [24, 200])
@pytest.mark.parametrize("kept", [False, True])
def test_groups_are_encoded_as_their_rows_one_by_one(tokenizer, tmp_path, template, length, kept):
    form = TEMPLATES[template]()
    for _ in range(2):
        cache = tmp_path if kept else None
        found = encode_groups(GROUPS, form, tokenizer, length, cache)
        for name, rows in GROUPS.items():
            alone = [encode(row, form, tokenizer, length) for row in rows]
            assert list(found[name]) == alone
            assert len(found[name]) == len(alone)
            assert list(found[name][1:]) == alone[1:]
            if alone:
                assert found[name][-1] == alone[-1]
                assert found[name][::2][1:] is not None
    assert bool(files(tmp_path)) == kept


def test_what_was_seen_before_is_not_encoded_again(tokenizer, tmp_path, monkeypatch):
    first = encode_groups(GROUPS, Alpaca(), tokenizer, 64, tmp_path)
    written = files(tmp_path)
    assert len(written) == 1
    assert stat.S_IMODE(written[0].stat().st_mode) == 0o600

    def never(*_):
        raise AssertionError("rows were encoded")

    with monkeypatch.context() as patch:
        patch.setattr(encoded, "examples_of", never)
        again = encode_groups(GROUPS, Alpaca(), tokenizer, 64, tmp_path)
        assert {n: list(e) for n, e in again.items()} == {n: list(e) for n, e in first.items()}
        moved = {"pears": GROUPS["apples"], "plums": GROUPS["pears"]}  # dealt otherwise
        assert list(encode_groups(moved, Alpaca(), tokenizer, 64, tmp_path)["plums"]) == list(
            first["pears"]
        )


def test_everything_that_matters_makes_another_store(tokenizer, tmp_path):
    other = load_tokenizer(tokenizer.name_or_path)
    other.add_tokens(["Apple"])
    apart = load_tokenizer(tokenizer.name_or_path)
    apart.split_special_tokens = True
    more = {**GROUPS, "plums": [Row("Name it.", "", "A plum.")]}
    spoken = load_tokenizer(tokenizer.name_or_path)
    spoken.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    made = [
        (GROUPS, Alpaca(), tokenizer, 64),
        (GROUPS, Alpaca(), tokenizer, 65),
        (GROUPS, Alpaca(), other, 64),
        (GROUPS, Alpaca(), apart, 64),
        (more, Alpaca(), tokenizer, 64),
        (GROUPS, Chat(), tokenizer, 64),
        (GROUPS, Chat(), spoken, 64),
        (GROUPS, Chat("Be brief."), tokenizer, 64),
    ]
    for number, (groups, template, used, length) in enumerate(made, 1):
        found = encode_groups(groups, template, used, length, tmp_path)
        assert list(found["apples"]) == [
            encode(row, template, used, length) for row in groups["apples"]
        ]
        assert len(files(tmp_path)) == number


@pytest.mark.parametrize("left", [0, 7, 100, -8])
def test_half_a_store_is_made_anew(tokenizer, tmp_path, left):
    expected = list(encode_groups(GROUPS, Alpaca(), tokenizer, 64, tmp_path)["apples"])
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    again = encode_groups(GROUPS, Alpaca(), tokenizer, 64, tmp_path)
    assert list(again["apples"]) == expected
    assert path.read_bytes() == whole


def test_a_template_whose_rendering_changes_is_encoded_again(tokenizer, tmp_path):
    """What counts is the text, not what the template is called."""

    class Mine:
        said = "Say:"

        def prompt(self, row, _tokenizer):
            return f"{self.said} {row.instruction}"

        def __repr__(self):
            return "Mine()"

    mine = Mine()
    first = list(encode_groups(GROUPS, mine, tokenizer, 64, tmp_path)["pears"])
    mine.said = "Tell:"
    second = list(encode_groups(GROUPS, mine, tokenizer, 64, tmp_path)["pears"])
    assert first != second == [encode(row, mine, tokenizer, 64) for row in GROUPS["pears"]]


def test_two_that_write_the_same_at_once_both_go_on(tokenizer, tmp_path):
    """Processes that begin together, as a loop over seeds does."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from data.test_encoded import GROUPS; from pomona.data.encoded import encode_groups\n"
        "from pomona.data.templates import Alpaca; from pomona.models.loading import load_tokenizer\n"
        "found = encode_groups(GROUPS, Alpaca(), load_tokenizer(sys.argv[2]), 64, Path(sys.argv[3]))\n"
        "print(found['pears'][0].input_ids)"
    )
    tests = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", script, tests, tokenizer.name_or_path, tmp_path]
    started = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in started}
    assert said == {f"{encode(GROUPS['pears'][0], Alpaca(), tokenizer, 64).input_ids}\n"}
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_done_without(tokenizer, tmp_path):
    (tmp_path / "tokens").write_text("a file")
    found = encode_groups(GROUPS, Alpaca(), tokenizer, 64, tmp_path)
    assert list(found["pears"]) == [encode(r, Alpaca(), tokenizer, 64) for r in GROUPS["pears"]]
    assert files(tmp_path) == [tmp_path / "tokens"]


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("POMONA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pomona"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "pomona"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
