"""What a site may not do to a federation: it is rejected, named, and the others go on."""

import ast
import json
import pickle
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, PushObjectRequest
from loopback import free_port, run_across, sites_of
from safetensors.torch import load, save

from pomona.errors import PomonaError
from pomona.flower.link import Link
from pomona.flower.node import Node
from pomona.flower.sites import FlowerSites, LinkPost
from pomona.models.received import decoded
from pomona.parcel import Parcel, Refused
from pomona.pipelines.federate.asking import Patience
from pomona.pipelines.federate.policy import Policy, model_digest, recipe_digest
from pomona.recipe.remote import at_site, for_sites


def with_tensors(answer: Parcel, change: Callable[[dict], object]) -> Parcel:
    tensors = load(answer.tensors)
    change(tensors)
    return replace(answer, tensors=save(tensors))


def first(tensors: dict) -> str:
    return min(tensors)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/pomona-was-here"),))


ATTACKS: list[tuple[Callable[[Parcel, list[Parcel]], Parcel], str]] = [
    (
        lambda a, _: with_tensors(a, lambda t: t[first(t)].view(-1)[0].fill_(torch.nan)),
        "values that are not finite",
    ),
    (
        lambda a, _: with_tensors(a, lambda t: t[first(t)].view(-1)[0].fill_(torch.inf)),
        "values that are not finite",
    ),
    (lambda a, _: with_tensors(a, lambda t: t.update(graft=torch.ones(2))), "was not asked for"),
    (lambda a, _: with_tensors(a, lambda t: t.pop(first(t))), "is missing"),
    (
        lambda a, _: with_tensors(a, lambda t: t.update({first(t): torch.ones(1)})),
        "is float32 [1] and should be",
    ),
    (
        lambda a, _: with_tensors(a, lambda t: t.update({first(t): t[first(t)].half()})),
        "is float16",
    ),
    (
        lambda a, _: with_tensors(a, lambda t: [v.mul_(1e5) for v in t.values()]),
        "more than 10 times one plus the norm",
    ),
    (lambda a, sent: sent[0], "is not one to round 9"),
    (lambda a, _: replace(a, tensors=pickle.dumps(Bomb())), "the tensors are no safetensors"),
    (
        lambda a, _: replace(a, told={**a.told, "rows": 10**9}),
        "it says that 1000000000 rows stand behind",
    ),
    (lambda a, _: replace(a, told={**a.told, "losses": ["x"]}), "its losses are no numbers"),
    (lambda a, _: replace(a, told={**a.told, "federation": "mine"}), "of this federation"),
    (lambda a, _: replace(a, kind="hello"), 'it answers "hello" where "update" was asked for'),
    (lambda a, _: replace(a, tensors=secrets.token_bytes(70 << 20)), "larger than any may be"),
]


def test_every_attack_is_rejected_and_named_and_the_round_goes_on(settings, tmp_path):
    """Round 1 is honest; after it every round has one of the attacks, of one site of three."""
    evaluation = replace(settings.evaluation, every=99)
    local = replace(settings.local, steps=1)
    settings = replace(settings, rounds=1 + len(ATTACKS), evaluation=evaluation, local=local)
    honest: list[Parcel] = []

    def twist(asked: Parcel, answer: Parcel) -> Parcel:
        if asked.kind != "train":
            return answer
        honest.append(answer)
        round_ = asked.told["round"]
        return answer if round_ == 1 else ATTACKS[round_ - 2][0](answer, honest)

    told: list[str] = []
    with sites_of(settings, tmp_path / "sites", {"pears": twist}) as (sites, _):
        run_across(settings, tmp_path, sites, Patience(deadline=60), told)
    rejected = [sentence for sentence in told if "does not count" in sentence]
    assert len(rejected) == len(ATTACKS) == 14, "\n".join(rejected)
    for round_, (sentence, (_, reason)) in enumerate(zip(rejected, ATTACKS, strict=True), 2):
        assert sentence.startswith(f'round {round_}: site "pears" does not count: ')
        assert reason in sentence
    assert not Path("/tmp/pomona-was-here").exists()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    trained = [line for line in map(json.loads, lines) if line["model"] == "training"]
    who = {r: [own["client"] for own in trained if own["round"] == r] for r in (1, 2, 15)}
    assert who == {1: ["apples", "pears", "plums"], 2: ["apples", "plums"], 15: ["apples", "plums"]}


POLICIES = {
    "tensors": (Policy(tensors=("*.lora_B",)), "does not let the tensor"),
    "size": (Policy(largest_message=100), "bytes, and the policy of this site allows 100"),
    "recipe": (Policy(recipes=("0" * 64,)), "does not accept the recipe"),
    "model": (Policy(models=("0" * 64,)), "does not accept the base model"),
}


def test_a_site_refuses_what_its_policy_does_not_allow(settings, tmp_path):
    """Every client has another policy; nobody is left, and the coordinator hears why from each."""
    told: list[str] = []
    kinds = ["tensors", "recipe", "model"]
    policies = dict(zip(settings.load(), [POLICIES[kind][0] for kind in kinds], strict=True))
    with sites_of(settings, tmp_path / "sites", policies=policies) as (sites, threads):
        with pytest.raises(PomonaError, match="0 of 3 sites have answered and 2 are needed"):
            run_across(settings, tmp_path, sites, Patience(deadline=10, retries=0), told)
        for (name, thread), kind in zip(threads.items(), kinds, strict=True):
            reason = POLICIES[kind][1]
            assert any(f'site "{name}"' in s and reason in s for s in told), (kind, told)
            assert any(reason in s for s in thread.told)
            assert not any(sent.kind == "update" for sent in thread.sent)


def test_a_policy_accepts_what_it_lists(settings, tmp_path):
    text = for_sites(settings)
    policy = Policy(recipes=(recipe_digest(text),), models=("a" * 64,), largest_message=10)
    policy.check_recipe(text)
    policy.check_size("goes out", 10)
    for check in (
        lambda: policy.check_recipe(text + " "),
        lambda: policy.check_model({"a": "b"}),
        lambda: policy.check_size("comes in", 11),
    ):
        with pytest.raises(PomonaError):
            check()
    Policy(models=(model_digest({"a": "b"}),)).check_model({"a": "b"})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('strategy = "os:system"', "names code outside Pomona"),
        ('[strategy]\nkind = "os:system"', "names code outside Pomona"),
        ('warm_start = "/etc"', 'has "warm_start", which is a site\'s own'),
        ('[data]\nfolder = "/etc"', 'has "data", which is a site\'s own'),
        (
            '[evaluation]\nforgetting = "/etc/passwd"',
            '"evaluation.forgetting", which no site measures',
        ),
        ("rounds = ", "is not valid TOML"),
        ("[unknown]\nx = 1", 'unknown key "unknown"'),
    ],
)
def test_a_coordinators_recipe_names_no_code_and_no_path(line, complaint):
    with pytest.raises(PomonaError, match=complaint.replace("[", r"\[")):
        at_site(f"rounds = 2\n{line}\n" if "rounds" not in line else line, "model")


def test_only_the_fleets_routes_exist_and_a_stranger_is_not_heard(tmp_path):
    port = free_port()
    url, protobuf = f"http://127.0.0.1:{port}", {"content-type": "application/protobuf"}
    with Link("127.0.0.1", port, tmp_path / "messages", keys={"a": b"no key"}) as link:
        assert len(link.routes) == 12
        assert all(path.startswith("/v1/fleet/") for path in link.routes)
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/push-messages",
            "/docs",
            "/openapi.json",
        ):
            assert httpx.post(url + path, headers=protobuf).status_code == 404
            assert httpx.get(url + path).status_code in (404, 415)
        unsigned = httpx.post(f"{url}/v1/fleet/pull-messages", headers=protobuf)
        assert unsigned.status_code == 401
        key = ec.generate_private_key(ec.SECP384R1())
        node = Node(f"127.0.0.1:{port}", key, lambda parcel: parcel, lambda _: None)
        with pytest.raises(PomonaError, match="does not know this site's key"):
            node.run()
        registers = replace_registers(node)
        with pytest.raises(PomonaError, match="does not know this site's key"):
            registers.run()
        found = list(
            FlowerSites(LinkPost(link), dict(link.names), True).ask({"a": Parcel("x")}, 0.5)
        )
        assert found == []


def replace_registers(node: Node) -> Node:
    return Node(node.coordinator, node.key, node.answer, node.tell, registers=True)


def test_a_message_that_is_none_of_ours_is_refused():
    for bad in (b"", b"[]", b"{", b'{"a": NaN}', b"\xff"):
        from pomona.parcel import loaded

        with pytest.raises(PomonaError):
            loaded(bad)
    with pytest.raises(PomonaError):
        decoded(pickle.dumps(Bomb()))
    assert not Path("/tmp/pomona-was-here").exists()
    assert Refused("x").reason == "x"


def test_nothing_is_unpickled_anywhere():
    """No module of ours loads pickles, evaluates text, or lets torch do so."""
    files = list((ROOT / "src").rglob("*.py"))
    assert len(files) > 250
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & set(
                    names
                ), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load"), path


def test_nobody_answers_in_the_name_of_another_and_nothing_huge_is_read(tmp_path):
    port = free_port()
    with Link("127.0.0.1", port, tmp_path / "messages") as link:
        key = ec.generate_private_key(ec.SECP384R1())
        address = f"127.0.0.1:{port}"
        node = Node(address, key, lambda p: p, lambda _: None, registers=True)
        with node._client() as client, node._active(client) as own:
            assert link.online() == {own.node_id: 1}
            forged = MessageProto(
                metadata=Metadata(src_node_id=own.node_id + 1, run_id=link.run_id)
            )
            with pytest.raises(httpx.HTTPStatusError) as refused:
                client.PushMessages(PushMessagesRequest(node=own, messages_list=[forged]))
            assert refused.value.response.status_code == 403
            part = PushObjectRequest(node=own, run_id=link.run_id, object_content=bytes(1 << 20))
            with pytest.raises(httpx.HTTPStatusError) as refused:
                client.PushObject(part)
            assert refused.value.response.status_code == 413
            huge = PushObjectRequest(node=own, object_content=bytes(17 << 20))
            with pytest.raises((httpx.HTTPError, OSError)):
                client.PushObject(huge)
            again = Node(address, key, lambda p: p, lambda _: None)
            with again._client() as other, again._active(other) as same:
                assert same.node_id == own.node_id  # a site that was restarted is back at once
                assert link.online() == {own.node_id: 2}
