"""How much of what plain matrix products reach does local training reach?

    python benchmarks/roofline.py [--subject NAME …] [--clients C …] [--rows B] [--tokens T] [--threads 2]
                                  [--repeats 5] [--device cpu] [--out DIR] [--json PATH]

A step of a cohort's local training (forward, backward, clipping, AdamW) is recorded operation by operation:
which matrix products, grouped products and attention of which shapes. Then these products alone are computed,
each as one plain product of its shape (a grouped one expert by expert, causal attention as half of its two
products), and timed in turn with the step itself. The share of the step's time that they take is the share of
their FLOP/s that training reaches. What all other operations read and write is counted too, and as many bytes
copied, block by block through a buffer larger than the caches: what their traffic alone would take. LoRA of
rank 8 on q, k and v; one batch, all threads. `qwen1.5-moe-a2.7b` (random weights, bfloat16) is for a GPU.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from record import ROOT, at_least, record, timed
from rounds import Work, one_batch, work_of
from subjects import SMALL, SUBJECTS, find_material
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pomona.cli.console import print_table

Product = tuple[int, int, int]
"""[n, k] times [k, m]."""


BLOCK, BLOCKS = 2**20, 256
"""Bytes that are copied at once, about an activation, and how many such blocks lie one after another."""
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")
GATHERS = ("index_select", "index", "embedding")


class Recorded(TorchDispatchMode):
    """The shapes of all products that are computed, how often, and the bytes of all other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.seen[len(left), left.shape[1], right.shape[1]] += 1
        elif name == "bmm":
            left, right = args
            self.seen[left.shape[1], left.shape[2], right.shape[2]] += len(left)
        elif name == "_grouped_mm":
            self._grouped(*args, **(kwargs or {}))
        elif "flash_attention" in name:
            self._attention(backward=name.endswith("backward"), args=args)
        elif not func.is_view and name not in ALLOCATIONS:
            self.bytes += self._moved(name, args, kwargs, found)
        return found

    def _moved(self, name: str, args: Any, kwargs: Any, found: Any) -> int:
        """Return what an operation reads and writes; of what it gathers from it reads what it gives."""
        read, written = (
            sum(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in tensors)
            for tensors in (
                [x for x in tree_leaves(values) if torch.is_tensor(x)]
                for values in ((args, kwargs), found)
            )
        )
        return 2 * written if name in GATHERS else read + written

    def _grouped(self, left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any) -> None:
        """Groups lie along the tokens of the left one, or of both: a gradient of weights."""
        assert offs is not None
        sizes = [int(size) for size in offs.diff(prepend=offs.new_zeros(1))]
        for size in filter(None, sizes):
            if right.ndim == 3:
                self.seen[size, left.shape[1], right.shape[2]] += 1
            else:
                self.seen[left.shape[0], size, right.shape[1]] += 1

    def _attention(self, backward: bool, args: Sequence[Any]) -> None:
        """Half of all pairs: two products forward, five backward (one of them computes again)."""
        query, key = args[1:3] if backward else args[:2]
        rows, heads, length, width = query.shape
        half = max(1, key.shape[2] // 2)
        count = rows * heads * (5 if backward else 2)
        self.seen[length, width, half] += count


def main() -> None:
    options = _options()
    find_material()
    torch.set_num_threads(options.threads)
    rows = list(_rows(options))
    columns = ["subject", "C", "tokens a step", "GFLOP", "GB", "step s", "GFLOP/s"]
    columns += ["products", "copies"]
    print_table("local training", columns, [_shown(row) for row in rows])
    record(options.json, rows, list(_bars(rows)), threads=options.threads, device=options.device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS, default=SMALL)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federate")
    kept = ROOT / "benchmarks" / "results" / "roofline.json"
    parser.add_argument("--json", type=Path, default=kept)
    return parser.parse_args()


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for subject in options.subject:
        for clients in options.clients:
            size = (clients, options.rows, options.tokens)
            work = work_of(subject, options.out, *size, steps=1, device=options.device)
            step = one_batch(work)
            step()
            with Recorded() as products:
                step()
            ways = {
                "step": step,
                "products": _done(_plain(products.seen, work), work.device),
                "copies": _done(_copies(products.bytes, work.device), work.device),
            }
            timed(ways, 1)
            seconds = timed(ways, options.repeats)
            median = {name: statistics.median(own) for name, own in seconds.items()}
            yield {
                "subject": subject,
                "clients": clients,
                "tokens_of_a_step": sum(len(e.input_ids) for own in work.drawn() for e in own[0]),
                "flops": sum(2 * n * k * m * count for (n, k, m), count in products.seen.items()),
                "products": sum(products.seen.values()),
                "bytes_of_the_others": products.bytes,
                "seconds": seconds,
                "share": median["products"] / median["step"],
                "share_of_copies": median["copies"] / median["step"],
            }


def _done(way: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a way that ends when the device has done it; a step ends with losses, which are waited for."""

    def run() -> None:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _plain(products: Mapping[Product, int], work: Work) -> Callable[[], None]:
    """Return what computes each product as often as it was seen, on numbers of its own."""
    like = torch.zeros((), dtype=getattr(torch, SUBJECTS[work.subject].dtype), device=work.device)
    made = [
        (
            like.new_empty(n, k).normal_(),
            like.new_empty(k, m).normal_(),
            like.new_empty(n, m),
            count,
        )
        for (n, k, m), count in products.items()
    ]

    def run() -> None:
        for left, right, out, count in made:
            for _ in range(count):
                torch.mm(left, right, out=out)

    return run


def _copies(size: int, device: torch.device) -> Callable[[], None]:
    """Return what copies blocks until so many bytes are read and written."""
    source = torch.zeros(BLOCKS, BLOCK // 4, device=device)
    target = torch.zeros_like(source)

    def run() -> None:
        for block in range(size // (2 * BLOCK)):
            target[block % BLOCKS].copy_(source[block % BLOCKS])

    return run


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    bars = {"mixtral-24m": 0.6, "qwen1.5-moe-a2.7b": 0.45}
    for row in rows:
        if row["subject"] in bars and row["tokens_of_a_step"] >= 2048:
            name = f"{row['subject']}, {row['tokens_of_a_step']:,} tokens a step: share of the products' FLOP/s"
            yield at_least(name, row["share"], bars[row["subject"]])


def _shown(row: Mapping[str, Any]) -> list[str]:
    step = statistics.median(row["seconds"]["step"])
    return [
        row["subject"],
        str(row["clients"]),
        f"{row['tokens_of_a_step']:,}",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['bytes_of_the_others'] / 1e9:.2f}",
        f"{step:.3f}",
        f"{row['flops'] / step / 1e9:.1f}",
        f"{row['share']:.2f}",
        f"{row['share_of_copies']:.2f}",
    ]


if __name__ == "__main__":
    main()
