"""One round of federated LoRA: by Pomona's cohort, Pomona one by one, a PEFT loop and Flower's simulation.

    python benchmarks/simulate.py [--clients C …] [--rows B …] [--tokens T …] [--subject NAME …]
                                  [--steps 2] [--repeats 3] [--threads 2] [--without-flower]
                                  [--compile] [--device cpu] [--quick] [--out DIR] [--json PATH]

Every client takes the same steps on its own rows of Dolly: `rows` of at most `tokens` tokens a step, of ragged
length, answers included. Subjects: `rootstock-3m` made into a mixture (vocabulary 4,096) and a Mixtral of 24
million random weights (32,000). All begin with the same adapter; the losses of every step and the mean adapter
have to agree. Repeats are interleaved, the median counts; what others do one after another is tried with one
thread and with all, and goes on with the faster. Flower's simulation is measured tuned to the machine (as many
workers as threads, each keeps its model) and with its defaults (a client is given two threads, and loads the
model for every round, as in Flower's examples). Workers live as long as their simulation: its rounds follow one
another, after those of the others, and the first, which starts the workers, is not among them. `--compile`: the
cohort with compiled normalisations, too. `--device cuda`: all but Flower on the GPU, where `qwen1.5-moe-a2.7b`
(random weights, bfloat16) is a subject to ask for. Ratios are those of one run on one machine; sizes that are
asked for replace those of the JSON, the others stay there.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peers.flower_loop import Flower, flower
from peers.peft_loop import Padded, round_of, with_adapter
from record import ROOT, at_least, commit, record, timed
from rounds import LORA, RATE, SEED, Done, Work, base_of, trained, work_of
from subjects import SMALL, SUBJECTS, find_material
from torch import Tensor

from pomona.cli.console import print_table
from pomona.data.examples import Example, collate
from pomona.federation.cohort import FrozenBase
from pomona.federation.replicas import Replicas, replicas_of
from pomona.models.compiled import compile_norms

PREFIX = "base_model.model."
COHORT, ONE_BY_ONE, PEFT_LOOP = "cohort", "one by one", "PEFT loop"
TUNED, DEFAULTS, COMPILED = "Flower tuned", "Flower's defaults", "compiled"
SIZES = [(16, *size) for size in product((1, 2, 4), (128, 256, 512))]
SIZES += [(clients, *size) for clients in (4, 64) for size in ((1, 128), (2, 256))]
"""(clients, rows a step, tokens of a row at most) that are measured unless others are asked for."""


def main() -> None:
    options = _options()
    find_material()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what Flower started ends with this
    torch.set_num_threads(options.threads)  # before the replicas are counted
    rows: list[dict[str, Any]] = []
    with nullcontext() if options.without_flower else flower() as link:
        for row in _rows(options, link):
            rows.append(row)
            kept = _merged(options.json, rows)
            record(options.json, kept, list(_bars(kept)))
    columns = ["subject", "C", "rows", "≤ tokens", "a step", "cohort s"]
    columns += [*(f"÷ {peer}" for peer in rows[0]["times_faster"]), "apart"]
    print_table("one round", columns, [_shown(row) for row in rows])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for size in ("clients", "rows", "tokens"):
        parser.add_argument(f"--{size}", type=int, nargs="+", help="default: those of SIZES")
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS, default=SMALL)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--without-flower", action="store_true", help="leave Flower's simulation out"
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one small size of the small subject")
    parser.add_argument("--compile", action="store_true", help="compile normalisations, too")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federate")
    parser.add_argument("--json", type=Path, help="default: results/simulate.json beside this file")
    options = parser.parse_args()
    if options.quick:
        options.subject, options.clients, options.rows, options.tokens = (
            SMALL[:1],
            [4],
            [1],
            [128],
        )
    options.without_flower |= options.device != "cpu"  # whose workers are of the processor
    kept = ROOT / "benchmarks" / "results" / "simulate.json"
    options.json = options.json or (options.out / "simulate-quick.json" if options.quick else kept)
    return options


def _sizes(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return all sizes of the benchmark, or those of what is asked for."""
    asked = (options.clients, options.rows, options.tokens)
    if not any(asked):
        return SIZES
    known = [sorted(set(axis)) for axis in zip(*SIZES, strict=True)]
    return list(product(*(own or axis for own, axis in zip(asked, known, strict=True))))


def _merged(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of a JSON, with these in the place of those of the same work."""

    def work(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(
            row[key]
            for key in ("subject", "clients", "rows", "tokens", "steps", "threads", "device")
        )

    found = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    kept = {work(row): row for row in (*found, *rows)}
    return [kept[key] for key in sorted(kept)]


def _rows(options: argparse.Namespace, link: Flower | None) -> Iterator[dict[str, Any]]:
    for subject in options.subject:
        for size in _sizes(options):
            work = work_of(subject, options.out, *size, options.steps, options.device)
            yield _measured(work, options, link)


def _measured(work: Work, options: argparse.Namespace, link: Flower | None) -> dict[str, Any]:
    """Return one size's times, ratios and how far the results are apart."""
    base = base_of(work)
    first, starts = base.init_adapter(SEED), dict[str, dict[str, float]]()
    ways, repeats = _ways(base, first, work, options.threads), options.repeats
    if options.compile:
        ways[COMPILED] = _compiled(work, options.threads)
    done = {name: way() for name, way in ways.items()}  # the first round of each warms up
    seconds = timed(_faster(ways), repeats)
    if link:
        padded = _batches(work)
        for way in (TUNED, DEFAULTS):
            given = (work.folder, LORA, _to_peft(first), padded, RATE, repeats + 1, options.threads)
            found = link.rounds(*given, tuned=way == TUNED)
            done[way] = Done(_from_peft(found.mean), found.losses)
            start, *seconds[way] = found.seconds
            starts[way] = {"first round": start, "around the rounds": found.around}
    median = {name: statistics.median(own) for name, own in seconds.items()}
    best = {
        peer: min(own for name, own in median.items() if name.startswith(peer))
        for peer in (ONE_BY_ONE, PEFT_LOOP, TUNED, DEFAULTS, COMPILED)
        if any(name.startswith(peer) for name in median)
    }
    drawn = [example for own in work.drawn() for example in own[0]]
    answers = sum(len(e.input_ids) - e.prompt_length for e in drawn)
    return {
        "commit": commit(),
        "subject": work.subject,
        "clients": len(work.examples),
        "rows": work.rows,
        "tokens": work.tokens,
        "steps": work.steps,
        "threads": options.threads,
        "device": work.device.type,
        "tokens_of_a_step": sum(len(e.input_ids) for e in drawn) / len(work.examples),
        "answer_tokens_of_a_step": answers / len(work.examples),
        "seconds": seconds,
        "start_seconds": starts,
        "times_faster": {peer: own / median[COHORT] for peer, own in best.items()},
        "adapters_apart": max(_apart(done[COHORT].mean, other.mean) for other in done.values()),
        "losses_apart": max(
            float((torch.tensor(done[COHORT].losses) - torch.tensor(other.losses)).abs().max())
            for other in done.values()
        ),
    }


def _ways(
    base: FrozenBase, first: Mapping[str, Tensor], work: Work, threads: int
) -> dict[str, Callable[[], Done]]:
    """Return what trains the round in this process, by name."""
    tuned = with_adapter(work.load(), LORA.rank, LORA.alpha, LORA.targets)
    padded = _batches(work)

    def peft_loop() -> Done:
        mean, losses = round_of(tuned, _to_peft(first), padded, RATE)
        return Done(_from_peft(mean), losses)

    replicas, size = replicas_of(base), len(work.examples)
    ways: dict[str, Callable[[], Done]] = {
        COHORT: _on(threads, lambda: trained(replicas, work, first, size))
    }
    alone = Replicas((base,))
    for count in sorted({1, threads}):
        ways[f"{ONE_BY_ONE}, {count} threads"] = _on(count, lambda: trained(alone, work, first, 1))
        ways[f"{PEFT_LOOP}, {count} threads"] = _on(count, peft_loop)
    return ways


def _faster(ways: Mapping[str, Callable[[], Done]]) -> dict[str, Callable[[], Done]]:
    """Leave of the numbers of threads of a way the one with which a round takes less time."""
    once = {name: own[0] for name, own in timed(ways, 1).items()}
    best: dict[str, str] = {}
    for name in sorted(once, key=once.__getitem__):
        best.setdefault(name.split(",")[0], name)
    return {name: way for name, way in ways.items() if name in best.values()}


def _on(threads: int, way: Callable[[], Done]) -> Callable[[], Done]:
    def run() -> Done:
        torch.set_num_threads(threads)
        return way()

    return run


def _compiled(work: Work, threads: int) -> Callable[[], Done]:
    base = base_of(work)
    replicas, first = replicas_of(base), base.init_adapter(SEED)
    for replica in replicas.bases:
        compile_norms(replica.model)
    return _on(threads, lambda: trained(replicas, work, first, len(work.examples)))


def _to_peft(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.weight": value for name, value in adapter.items()}


def _from_peft(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(PREFIX).removesuffix(".weight"): v for n, v in adapter.items()}


def _batches(work: Work) -> list[list[Padded]]:
    return [[_padded(step, work.pad_id) for step in own] for own in work.drawn()]


def _padded(examples: Sequence[Example], pad_id: int) -> Padded:
    batch = collate(examples, pad_id)
    labels = batch.input_ids_BT.masked_fill(~batch.label_mask_BT, -100)
    return {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "labels": labels,
    }


def _apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return ‖ours − theirs‖ ÷ ‖ours‖ over all tensors."""
    difference = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return (difference / sum(float(v.square().sum()) for v in ours.values())) ** 0.5


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        size = f"{row['subject']}, C {row['clients']}, {row['rows']} × ≤ {row['tokens']}"
        faster, tokens = row["times_faster"], row["tokens_of_a_step"]
        at_16 = row["clients"] == 16
        few = at_16 and row["rows"] <= 2
        least = 5.0 if at_16 and row["device"] == "cuda" else 3.0 if few else 1.0
        yield at_least(f"{size}: times the PEFT loop", faster[PEFT_LOOP], least)
        for peer in (TUNED, DEFAULTS):
            if few and peer in faster:
                yield at_least(f"{size}: times {peer}", faster[peer], 6.0)
        if at_16 and tokens <= 256:
            least = 2.0 if tokens <= 128 else 1.4
            yield at_least(f"{size}: times one by one", faster[ONE_BY_ONE], least)


def _shown(row: Mapping[str, Any]) -> list[str]:
    faster = row["times_faster"]
    return [
        row["subject"],
        str(row["clients"]),
        str(row["rows"]),
        str(row["tokens"]),
        f"{row['tokens_of_a_step']:.0f}",
        f"{statistics.median(row['seconds'][COHORT]):.2f}",
        *(f"{times:.2f}" for times in faster.values()),
        f"{row['adapters_apart']:.0e}",
    ]


if __name__ == "__main__":
    main()
