"""What leaves a site: every byte of a whole run is looked at."""

import json
from dataclasses import replace
from itertools import pairwise

from loopback import run_across, sites_of
from safetensors.torch import load

from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import Tilted
from pomona.models.lora import LoRA


def test_no_private_tensor_and_no_text_leaves(settings, tmp_path):
    """Everything that all sites answered, against every private tensor of every round and all text."""
    settings = replace(
        settings,
        rounds=2,
        strategy=Tilted(),
        personal=LoRA(2, 4.0),
        shared_expert=SharedGraft(rank=2),
    )
    kept: dict[str, set[bytes]] = {}
    with sites_of(settings, tmp_path / "sites") as (sites, threads):
        original, shared = threads["pears"].member.answer, set[str]()

        def watched(asked):
            answer = original(asked)
            joined = threads["pears"].member._joined
            shared.update(joined.engine.federation.server_first)
            private = (
                joined.engine.federation.private(joined.snapshot, "pears")
                if (not joined.engine.run.finished)
                else None
            )
            for part in ("graft", "personal", "memory") if private else ():
                for value in getattr(private, part).values():
                    if value.is_floating_point() and value.count_nonzero() > 8:
                        kept.setdefault(part, set()).add(value.contiguous().numpy().tobytes())
            return answer

        threads["pears"].member.answer = watched
        run_across(settings, tmp_path, sites)
        sent = threads["pears"].sent
    assert {"graft", "personal"} <= set(kept)
    assert len(kept["graft"]) > 4
    wire = [json.dumps(dict(parcel.told)).encode() + parcel.tensors for parcel in sent]
    assert len(wire) >= 4
    for values in kept.values():
        for value in values:
            for piece in (value, value[:64], value[-64:]):
                assert not any(piece in message for message in wire)
    rows = settings.load()["pears"]
    for row in (*rows.train, *rows.test):
        for text in (row.instruction, row.context, row.response):
            words = text.split()
            for a, b in pairwise(words):
                assert not any(f"{a} {b}".encode() in message for message in wire)
    updates = [load(parcel.tensors) for parcel in sent if parcel.kind == "update"]
    assert len(updates) == settings.rounds
    assert all(set(update) == shared for update in updates)
