"""A round of federated LoRA on rows of Dolly, as the benchmarks of speed have it trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from subjects import SUBJECTS, material
from torch import Tensor
from transformers import PreTrainedModel

from pomona.data.examples import Example, encode, padding_id
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
from pomona.models.frozen_experts import use_frozen_experts
from pomona.models.loading import load_model, load_tokenizer
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack
from pomona.models.placement import find_device, moved

RATE, SEED = 1e-3, 0
LORA = LoRA(rank=8, alpha=16)
ROWS_OF_A_CLIENT = 32


@dataclass(frozen=True)
class Work:
    """A round: of which model and where, whose rows, how many a step, how many steps."""

    subject: str
    folder: Path
    device: torch.device
    rows: int
    tokens: int
    steps: int
    examples: Sequence[Sequence[Example]] = field(repr=False)
    pad_id: int

    def load(self) -> PreTrainedModel:
        """Return the model, in its subject's type and where it computes."""
        return moved(load_model(self.folder, SUBJECTS[self.subject].dtype), self.device)

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


def work_of(
    subject: str, out: Path, clients: int, rows: int, tokens: int, steps: int, device: str = "cpu"
) -> Work:
    """Deal Dolly's rows, in their order, so that every client has rows of its own."""
    folder, where = SUBJECTS[subject].make(out), find_device(device)
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
    return Work(subject, folder, where, rows, tokens, steps, examples, padding_id(tokenizer))


def base_of(work: Work) -> FrozenBase:
    """Return the model with LoRA to train, ready for the work's rows."""
    model = work.load()
    freeze(model)
    use_frozen_experts(model)
    return FrozenBase(model, LORA, packs=can_pack(model, work.tokens))


def trained_round(work: Work) -> Callable[[], Done]:
    """Return what trains all clients of a round in one cohort."""
    base = base_of(work)
    replicas, first = replicas_of(base), base.init_adapter(SEED)
    return lambda: trained(replicas, work, first, len(work.examples))


def one_batch(work: Work) -> Callable[[], Done]:
    """Return what trains all clients of a round in one batch: one forward and backward pass a step."""
    base = base_of(work)
    first = base.init_adapter(SEED)
    return lambda: trained(Replicas((base,)), work, first, len(work.examples))


def trained(replicas: Replicas, work: Work, first: Mapping[str, Tensor], size: int) -> Done:
    """Train all clients in cohorts of a size and average."""
    tasks = [Task(_name(c), ClientState(first), own) for c, own in enumerate(work.examples)]

    def train(base: FrozenBase, cohort: Sequence[Task]) -> list[Trained]:
        return train_cohort(base, cohort, work.training, FedAvg(), SEED, 1, 1, work.pad_id)

    cohorts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    done = [one for cohort in cohorts for one in replicas.map(train, cohort)]
    adapters = [one.state.adapter for one in done]
    mean = {name: torch.stack([own[name] for own in adapters]).mean(0) for name in first}
    return Done(mean, [one.losses for one in done])


def _name(client: int) -> str:
    return f"client-{client:03}"
