"""Sites that train nothing: they speak with a coordinator as sites do, and answer at once.

    python benchmarks/simulated_sites.py PORT NAME …

The site that stands at place i of all names adds (i + 1) · STEP to every number it is sent, so that what the
coordinator ends with can be checked. One process holds all of them, each in a thread; four compute at a time.
"""

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load, save

from pomona.flower.node import Node
from pomona.flower.sites import named
from pomona.parcel import Parcel
from pomona.progress import unheard

ROWS = 10
STEP = 1e-6
_AT_ONCE = threading.Semaphore(4)


@dataclass
class SimulatedSite:
    """The site `name`, whose every answer is `add` more than what it was asked."""

    name: str
    add: float
    port: int
    node: Node = field(init=False)

    def __post_init__(self) -> None:
        key = ec.generate_private_key(ec.SECP384R1())
        self.node = Node(f"127.0.0.1:{self.port}", key, self.answer, unheard, registers=True)

    def answer(self, asked: Parcel) -> Parcel:
        """Answer what a coordinator asks."""
        if asked.kind == "bye":
            self.node.stopped.set()
            return Parcel("bye")
        with _AT_ONCE:
            return named(asked, self.name) or self._work(asked)

    def _work(self, asked: Parcel) -> Parcel:
        round_ = asked.told.get("round", 0)
        if asked.kind == "hello":
            told: Mapping[str, Any] = {"site": self.name, "train": ROWS, "test": 1, "round": 0}
            lines = [self._line(0, "base")]
            return Parcel("here", {**told, "model": asked.told["model"], "lines": lines})
        if asked.kind == "finish":
            rows = [[model, 1.0, 1, None, None] for model in ("base", "shared", "personal")]
            return Parcel("finished", {"site": self.name, "rows": rows})
        if asked.kind != "train":
            lines = [self._line(round_, model) for model in ("shared", "personal")]
            return Parcel("figures", {"round": round_, "lines": lines})
        told = {"federation": asked.told["federation"], "round": round_, "rows": ROWS}
        told |= {"losses": [1.0], "loss": None, "epsilon": None}
        more = {name: value + np.float32(self.add) for name, value in load(asked.tensors).items()}
        return Parcel("update", told, save(more))

    def _line(self, round_: int, model: str) -> Mapping[str, Any]:
        figures = {"loss": 1.0, "perplexity": 2.7, "rows": 1, "tokens": 1}
        return {"round": round_, "model": model, "client": self.name, **figures}


def main(port: int, names: list[str]) -> None:
    """Be these sites until the federation is over."""
    threads = [
        threading.Thread(target=SimulatedSite(name, (i + 1) * STEP, port).node.run)
        for i, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
