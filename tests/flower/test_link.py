"""Messages between a coordinator and sites over real HTTP, without a model: late, twice, large, restarted."""

import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from loopback import free_port

from pomona.errors import PomonaError
from pomona.flower.link import Link
from pomona.flower.node import Node
from pomona.flower.sites import FlowerSites, LinkPost, named
from pomona.parcel import Parcel, Refused


class Twice(Node):
    """A node that pushes everything two times."""

    def _push(self, *given):
        super()._push(*given)
        super()._push(*given)


@contextmanager
def asked(folder: Path, answers: dict, kind: type[Node] = Node) -> Generator[FlowerSites]:
    """Sites that answer by functions, and what asks them."""
    port = free_port()
    with Link("127.0.0.1", port, folder / "messages") as link:

        def node(name: str) -> Node:
            key = ec.generate_private_key(ec.SECP384R1())

            def answer(parcel: Parcel) -> Parcel:
                return named(parcel, name) or answers[name](parcel)

            return kind(f"127.0.0.1:{port}", key, answer, lambda _: None, registers=True)

        nodes = [node(name) for name in answers]
        threads = [threading.Thread(target=one.run, daemon=True) for one in nodes]
        for thread in threads:
            thread.start()
        yield FlowerSites(LinkPost(link))
        for one in nodes:
            one.stopped.set()
        link.mail.close()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert link.state.num_message_ins() == link.state.num_message_res() == 0
        assert len(link.store) == 0
        assert not list((folder / "messages").iterdir())


def echo(parcel: Parcel) -> Parcel:
    return Parcel("echo", dict(parcel.told), parcel.tensors)


@pytest.mark.parametrize("kind", [Node, Twice])
@pytest.mark.parametrize("size", [0, 1024, 12 << 20])
def test_every_site_answers_once_what_it_was_asked(tmp_path, kind, size):
    tensors = bytes(range(256)) * (size // 256)
    with asked(tmp_path, {"a": echo, "b": echo}, kind) as sites:
        for round_ in range(3):
            parcels = {name: Parcel("x", {"of": name, "n": round_}, tensors) for name in "ab"}
            found = list(sites.ask(parcels, 60))
            assert sorted(name for name, _ in found) == ["a", "b"]
            for name, answer in found:
                assert answer == Parcel("echo", {"of": name, "n": round_}, tensors)
    more = 3 * (len("echo") - len("x"))
    assert sites.bytes_received == {name: sent + more for name, sent in sites.bytes_sent.items()}
    assert all(sent > 3 * size for sent in sites.bytes_sent.values())


def test_what_comes_late_answers_nothing(tmp_path):
    slow = threading.Event()

    def late(parcel: Parcel) -> Parcel:
        if parcel.told["n"] == 1:
            slow.wait(10)
        return echo(parcel)

    with asked(tmp_path, {"a": late}) as sites:
        assert [a.told["n"] for _, a in sites.ask({"a": Parcel("x", {"n": 0})}, 60)] == [0]
        assert list(sites.ask({"a": Parcel("x", {"n": 1})}, 0.5)) == []
        slow.set()
        time.sleep(0.5)
        assert [a.told["n"] for _, a in sites.ask({"a": Parcel("x", {"n": 2})}, 60)] == [2]


def test_a_site_says_why_it_does_not_answer(tmp_path):
    def refuse(parcel: Parcel) -> Parcel:
        raise PomonaError("not for you")

    with asked(tmp_path, {"a": refuse, "b": echo}) as sites:
        found = dict(sites.ask({"a": Parcel("x"), "b": Parcel("x")}, 60))
    assert found["a"] == Refused("not for you")
    assert found["b"] == Parcel("echo")


def test_another_parcel_for_a_site_is_sent_when_it_has_answered(tmp_path):
    """What a round does with a site that has to be greeted first."""
    with asked(tmp_path, {"a": echo, "b": echo}) as sites:
        parcels = {name: Parcel("x", {"n": 0}) for name in "ab"}
        heard = []
        for name, answer in sites.ask(parcels, 60):
            heard.append((name, answer.told["n"]))
            if name == "a" and answer.told["n"] < 2:
                parcels["a"] = Parcel("x", {"n": answer.told["n"] + 1})
    assert sorted(heard) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


def test_enough_is_told_who_is_away(tmp_path):
    told = []

    def enough(away) -> bool:
        told.append(set(away))
        return "a" not in away  # it is named by then: no question is left behind

    with asked(tmp_path, {"a": echo}) as sites:
        found = list(sites.ask({"a": Parcel("x"), "b": Parcel("x")}, 60, enough))
    assert [name for name, _ in found] in (["a"], [])
    assert told[-1] == {"b"} and all("b" in away for away in told)


def test_the_process_that_talks_to_the_coordinator_loads_no_torch():
    """The model is in another one, which may die and come back without the connection."""
    imports = "pomona.cli.app, pomona.cli.log, pomona.cli.status, pomona.flower.keys"
    imports += ", pomona.flower.node, pomona.flower.sites, pomona.flower.warm"
    script = f"import sys, {imports}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
