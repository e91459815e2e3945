"""What a user gets wrong with serve, join, keys and status."""

import stat
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest
from refusals import Refusal

from pomona.flower.keys import coordinator_keys, make_keys, site_keys
from pomona.recipe import dump

LOCAL = ("--coordinator", "127.0.0.1:1")


@pytest.fixture
def refused(monkeypatch, capsys) -> Refusal:
    return Refusal(monkeypatch, capsys)


@pytest.fixture
def recipe(settings, tmp_path) -> Path:
    (tmp_path / "recipe.toml").write_text(dump(replace(settings, data=None)), "utf-8")
    return tmp_path / "recipe.toml"


def joined(tmp_path: Path, *words: object) -> list[object]:
    """A join that would work but for its security, with other words in the place of some."""
    return [
        "join",
        "--data",
        tmp_path / "x.jsonl",
        "--model",
        tmp_path,
        "--state",
        tmp_path / "state",
        *words,
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            (*LOCAL,),
            "pomona join needs --keys (made by pomona keys); on one machine alone --insecure does",
        ),
        (("--coordinator", "host", "--insecure"), '"host" is no HOST:PORT; give for example'),
        (
            ("--coordinator", "192.0.2.1:8", "--insecure"),
            "for this machine alone, and 192.0.2.1 is another",
        ),
        (
            (*LOCAL, "--insecure", "--keys", "k"),
            "--keys and --insecure exclude each other; leave one out",
        ),
        ((*LOCAL, "--insecure"), "a site without keys needs a name; give --name"),
        ((*LOCAL, "--insecure", "--name", "a/b"), 'client name "a/b" cannot be a folder name'),
        (
            (*LOCAL, "--keys", "nowhere"),
            "nowhere holds 0 files NAME.key; it should hold the one of this",
        ),
    ],
)
def test_joining_without_what_keeps_it_safe(refused, tmp_path, words, complaint):
    assert complaint in refused(*joined(tmp_path, *words))


def test_the_rows_of_a_site_are_read_before_anybody_is_asked(refused, tmp_path):
    said = refused(*joined(tmp_path, *LOCAL, "--insecure", "--name", "a"))
    assert "cannot read" in said
    assert "x.jsonl" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "pomona serve needs --keys (made by pomona keys)"),
        (("--insecure",), "without keys the sites have to be named; give --site NAME for each"),
        (("--insecure", "--site", "a", "--site", "a"), "a site is named twice; name each once"),
        (
            ("--insecure", "--site", "a", "--host", "0.0.0.0"),
            "for this machine alone, and 0.0.0.0 is",
        ),
        (("--insecure", "--site", "a", "--quorum", "2"), "quorum 2.0 is no share of the sites"),
        (("--insecure", "--site", "a", "--deadline", "0"), "deadline 0.0 is no time; give seconds"),
        (("--keys", "nowhere"), "coordinator.crt is missing; make it with pomona keys"),
    ],
)
def test_serving_wrongly_leaves_nothing(refused, recipe, tmp_path, words, complaint):
    assert complaint in refused("serve", recipe, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken(refused, recipe, tmp_path):
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("--insecure", "--site", "a", "--port", port)
        said = refused("serve", recipe, "--out", tmp_path / "run", *words)
    assert f"cannot listen on 127.0.0.1:{port}; it is taken" in said


def test_a_simulation_needs_the_rows_that_sites_bring(refused, recipe, tmp_path):
    said = refused("federate", recipe, "--out", tmp_path / "run")
    assert "the recipe has no [data], which a simulation needs" in said


def test_status_of_what_is_no_federation(refused, tmp_path):
    assert "status.json is missing; give the folder" in refused("status", tmp_path)


def test_keys_are_made_once_and_only_their_owner_reads_them(tmp_path):
    assert make_keys(tmp_path, ["localhost"], ["north"]) == ["authority", "coordinator", "north"]
    authority = (tmp_path / "authority/ca.crt").read_bytes()
    assert make_keys(tmp_path, [], ["north", "south"]) == ["south"]
    assert (tmp_path / "authority/ca.crt").read_bytes() == authority
    for secret in ("authority/ca.key", "coordinator/coordinator.key", "sites/north/north.key"):
        assert stat.S_IMODE((tmp_path / secret).stat().st_mode) == 0o600
    assert set(coordinator_keys(tmp_path / "coordinator").sites) == {"north", "south"}
    assert site_keys(tmp_path / "sites/north").name == "north"


def test_a_damaged_key_is_named(refused, recipe, tmp_path):
    make_keys(tmp_path / "keys", [], ["north"])
    public = tmp_path / "keys/coordinator/sites/north.pub"
    public.write_text("no key", "utf-8")
    words = ("--keys", tmp_path / "keys/coordinator")
    said = refused("serve", recipe, "--out", tmp_path / "run", *words)
    assert f"{public} is damaged or cut off" in said
    own = tmp_path / "keys/sites/north"
    (own / "ca.crt").unlink()
    said = refused(*joined(tmp_path, *LOCAL, "--keys", own))
    assert f"{own / 'ca.crt'} is missing; copy it from the folder" in said
