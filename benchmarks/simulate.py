"""One round of federated LoRA, the same work by Pomona's cohort, Pomona one by one and a PEFT loop.

    python benchmarks/simulate.py [--clients C …] [--rows B …] [--tokens T …] [--subject NAME …]
                                  [--steps 2] [--repeats 3] [--threads 2] [--out DIR] [--json PATH]

Every client takes the same steps on its own rows of Dolly: `rows` of at most `tokens` tokens a step, of ragged
length, answers included. Subjects: `rootstock-3m` made into a mixture (vocabulary 4,096) and a Mixtral of 24
million random weights (32,000). All begin with the same adapter; the losses of every step and the mean adapter
have to agree. Repeats are interleaved, the median counts; what others do one after another is measured with
one thread and with all, and the faster counts. Ratios are those of one run on one machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers.peft_loop import Padded, round_of, with_adapter
from record import ROOT, record
from subjects import find_material, material, rootstock, wide_vocabulary
from torch import Tensor

from pomona.cli.console import print_table
from pomona.data.examples import Example, collate, encode, padding_id
from pomona.data.rows import read_rows
from pomona.data.templates import Alpaca
from pomona.federation.cohort import FrozenBase
from pomona.federation.local import LocalTraining, Trained, train_cohort
from pomona.federation.replicas import Replicas, replicas_of
from pomona.federation.sampling import batches
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState
from pomona.models.experts import freeze
from pomona.models.loading import load_model, load_tokenizer
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack

SUBJECTS = {"rootstock-3m": rootstock, "mixtral-24m": wide_vocabulary}
RATE, SEED = 1e-3, 0
LORA = LoRA(rank=8, alpha=16)
ROWS_OF_A_CLIENT = 32
PREFIX = "base_model.model."
COHORT, ONE_BY_ONE, PEFT_LOOP = "cohort", "one by one", "PEFT loop"


@dataclass(frozen=True)
class Work:
    """A round: whose rows, how many a step, how many steps."""

    subject: str
    rows: int
    tokens: int
    steps: int
    examples: Sequence[Sequence[Example]] = field(repr=False)
    pad_id: int

    @property
    def training(self) -> LocalTraining:
        return LocalTraining(
            steps=self.steps, batch=self.rows, learning_rate=RATE, final_learning_rate=RATE
        )

    def drawn(self) -> list[list[list[Example]]]:
        """Return the rows of every client's steps, as the cohort draws them."""
        return [
            [
                [own[i] for i in step]
                for step in batches(SEED, 1, _name(c), len(own), self.rows, self.steps)
            ]
            for c, own in enumerate(self.examples)
        ]


@dataclass(frozen=True)
class Done:
    """What a round gave: the mean adapter and every client's losses."""

    mean: Mapping[str, Tensor] = field(repr=False)
    losses: Sequence[Sequence[float]]


def main() -> None:
    options = _options()
    find_material()
    torch.set_num_threads(options.threads)  # before the replicas are counted
    rows: list[dict[str, Any]] = []
    for subject in options.subject or SUBJECTS:
        folder = SUBJECTS[subject](options.out)
        for clients in options.clients:
            for batch in options.rows:
                for tokens in options.tokens:
                    work = work_of(subject, folder, clients, batch, tokens, options.steps)
                    rows.append(_measured(folder, work, options.repeats, options.threads))
    columns = [
        "subject",
        "C",
        "rows",
        "≤ tokens",
        "a step",
        "cohort s",
        "÷ one by one",
        "÷ PEFT",
        "apart",
    ]
    print_table("one round", columns, [_shown(row) for row in rows])
    record(options.json, rows, list(_bars(rows)), threads=options.threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federate")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "simulate.json"
    )
    return parser.parse_args()


def _name(client: int) -> str:
    return f"client-{client:03}"


def work_of(subject: str, folder: Path, clients: int, rows: int, tokens: int, steps: int) -> Work:
    """Deal Dolly's rows, in their order, so that every client has rows of its own."""
    tokenizer = load_tokenizer(folder)
    dolly = read_rows(material() / "dolly-15k" / "train.jsonl")
    assert len(dolly) >= clients * ROWS_OF_A_CLIENT
    examples = [
        [
            encode(row, Alpaca(), tokenizer, tokens)
            for row in dolly[c * ROWS_OF_A_CLIENT : (c + 1) * ROWS_OF_A_CLIENT]
        ]
        for c in range(clients)
    ]
    return Work(subject, rows, tokens, steps, examples, padding_id(tokenizer))


def _measured(folder: Path, work: Work, repeats: int, threads: int) -> dict[str, Any]:
    """Return one size's times, ratios and how far the results are apart."""
    ways = _ways(folder, work, threads)
    done = {name: way() for name, way in ways.items()}  # the first round of each warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(own) for name, own in seconds.items()}
    drawn = work.drawn()
    return {
        "subject": work.subject,
        "clients": len(work.examples),
        "rows": work.rows,
        "tokens": work.tokens,
        "tokens_of_a_step": sum(len(e.input_ids) for own in drawn for e in own[0]) / len(drawn),
        "answer_tokens_of_a_step": sum(
            len(e.input_ids) - e.prompt_length for own in drawn for e in own[0]
        )
        / len(drawn),
        "seconds": seconds,
        "times_faster": {
            peer: min(own for name, own in median.items() if name.startswith(peer)) / median[COHORT]
            for peer in (ONE_BY_ONE, PEFT_LOOP)
        },
        "adapters_apart": max(_apart(done[COHORT].mean, other.mean) for other in done.values()),
        "losses_apart": max(
            float((torch.tensor(done[COHORT].losses) - torch.tensor(other.losses)).abs().max())
            for other in done.values()
        ),
    }


def base_of(folder: Path, tokens: int) -> FrozenBase:
    """Return a model with LoRA to train, ready for rows of so many tokens."""
    model = load_model(folder, "float32")
    freeze(model)
    return FrozenBase(model, LORA, packs=can_pack(model, tokens))


def trained_round(folder: Path, work: Work) -> Callable[[], Done]:
    """Return what trains all clients of a round in one cohort."""
    base = base_of(folder, work.tokens)
    replicas, first = replicas_of(base), base.init_adapter(SEED)
    return lambda: _trained(replicas, work, first, len(work.examples))


def one_batch(folder: Path, work: Work) -> Callable[[], Done]:
    """Return what trains all clients of a round in one batch: one forward and backward pass a step."""
    base = base_of(folder, work.tokens)
    first = base.init_adapter(SEED)
    return lambda: _trained(Replicas((base,)), work, first, len(work.examples))


def _ways(folder: Path, work: Work, threads: int) -> dict[str, Callable[[], Done]]:
    base = base_of(folder, work.tokens)
    first = base.init_adapter(SEED)
    tuned = with_adapter(load_model(folder, "float32"), LORA.rank, LORA.alpha, LORA.targets)
    theirs = {f"{PREFIX}{name}.weight": value for name, value in first.items()}
    padded = [[_padded(step, work.pad_id) for step in own] for own in work.drawn()]

    def peft_loop() -> Done:
        mean, losses = round_of(tuned, theirs, padded, RATE)
        named = {n.removeprefix(PREFIX).removesuffix(".weight"): v for n, v in mean.items()}
        return Done(named, losses)

    def on(threads: int, way: Callable[[], Done]) -> Callable[[], Done]:
        def run() -> Done:
            torch.set_num_threads(threads)
            return way()

        return run

    replicas, size = replicas_of(base), len(work.examples)
    ways: dict[str, Callable[[], Done]] = {
        COHORT: on(threads, lambda: _trained(replicas, work, first, size))
    }
    alone = Replicas((base,))
    for count in sorted({1, threads}):
        ways[f"{ONE_BY_ONE}, {count} threads"] = on(count, lambda: _trained(alone, work, first, 1))
        ways[f"{PEFT_LOOP}, {count} threads"] = on(count, peft_loop)
    return ways


def _trained(replicas: Replicas, work: Work, first: Mapping[str, Tensor], size: int) -> Done:
    """Train all clients in cohorts of a size and average."""
    tasks = [Task(_name(c), ClientState(first), own) for c, own in enumerate(work.examples)]

    def train(base: FrozenBase, cohort: Sequence[Task]) -> list[Trained]:
        return train_cohort(base, cohort, work.training, FedAvg(), SEED, 1, 1, work.pad_id)

    cohorts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    trained = [one for cohort in cohorts for one in replicas.map(train, cohort)]
    adapters = [one.state.adapter for one in trained]
    mean = {name: torch.stack([own[name] for own in adapters]).mean(0) for name in first}
    return Done(mean, [one.losses for one in trained])


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


def _bars(rows: Sequence[Mapping[str, Any]]):
    for row in rows:
        size = f"{row['subject']}, C {row['clients']}, {row['rows']} × ≤ {row['tokens']}"
        faster, tokens = row["times_faster"], row["tokens_of_a_step"]
        at_16 = row["clients"] == 16
        peft = 3.0 if at_16 and row["rows"] <= 2 else 1.0
        yield _bar(f"{size}: times the PEFT loop", faster[PEFT_LOOP], peft)
        if at_16 and tokens <= 256:
            least = 2.0 if tokens <= 128 else 1.4
            yield _bar(f"{size}: times one by one", faster[ONE_BY_ONE], least)


def _bar(name: str, value: float, bar: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "holds": value >= bar}


def _shown(row: Mapping[str, Any]) -> list[str]:
    faster = row["times_faster"]
    return [
        row["subject"],
        str(row["clients"]),
        str(row["rows"]),
        str(row["tokens"]),
        f"{row['tokens_of_a_step']:.0f}",
        f"{statistics.median(row['seconds'][COHORT]):.2f}",
        f"{faster[ONE_BY_ONE]:.2f}",
        f"{faster[PEFT_LOOP]:.2f}",
        f"{row['adapters_apart']:.0e}",
    ]


if __name__ == "__main__":
    main()
