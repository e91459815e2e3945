"""What every stage of one federation needs, read and checked before anything is computed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.run import RunDirectory
from pomona.data.encoded import cache_folder, encode_groups
from pomona.data.examples import Example, padding_id
from pomona.data.row import Row
from pomona.data.views import Joined
from pomona.errors import PomonaError
from pomona.evaluation.tasks import installed_harness
from pomona.federation.clients import ClientRows
from pomona.federation.cohort import FrozenBase
from pomona.federation.forgetting import held_out_windows
from pomona.federation.holdings import Holdings
from pomona.federation.rehearsal import first_token
from pomona.federation.replicas import Replicas, replicas_of
from pomona.federation.settings import FederateSettings
from pomona.federation.update import ClientState, join
from pomona.models.compiled import compile_norms
from pomona.models.experts import (
    ExpertSite,
    enable_checkpointing,
    expert_sites_if_any,
    find_expert_sites,
    freeze,
)
from pomona.models.frozen_experts import use_frozen_experts
from pomona.models.loading import Load, context_length, load_model, load_tokenizer
from pomona.models.lora import narrowed, of_rank
from pomona.models.packing import can_pack
from pomona.models.placement import moved
from pomona.pipelines.federate.first_adapter import dealt, first_adapter
from pomona.progress import Progress, Tell
from pomona.shapes import Tokens
from pomona.training.loss import balance_weight

POOLED = "everyone"


@dataclass(frozen=True)
class Federation:
    """What every stage of one run needs; of the clients' text only the rows that are `answered`."""

    settings: FederateSettings
    run: RunDirectory
    replicas: Replicas
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    answered: Mapping[str, Sequence[Row]]
    train: Mapping[str, Sequence[Example]]
    held_back: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    held_out: Mapping[str, Tokens]
    tasks: Any
    progress: Progress
    tell: Tell
    holdings: Holdings
    server_first: Mapping[str, Tensor]
    client_first: ClientState
    cohort: int

    @property
    def base(self) -> FrozenBase:
        """The frozen base on which everything but training happens."""
        return self.replicas.bases[0]

    def private(self, snapshot: Snapshot, client: str) -> ClientState:
        """Return what a client keeps for itself, as of a snapshot: as it has trained it, or newborn."""
        kept = self.run.checkpoint.client(snapshot, client)
        return kept or self.newborn(client, snapshot.experts[client])

    def newborn(self, client: str, experts: Sequence[Sequence[int]]) -> ClientState:
        """Return what a client that has not trained keeps, with grafts on these experts of every site."""
        return replace(
            self.client_first,
            graft=self.base.init_graft(self.settings.seed, client, experts),
            personal=self.base.init_personal(self.settings.seed, client),
        )

    def state(self, client: str, shared: Mapping[str, Tensor], private: ClientState) -> ClientState:
        """Return a client's whole state: what the server has sent, to its own rank, and its own."""
        whole = join(shared, private)
        if client not in self.settings.ranks:
            return whole
        return replace(whole, adapter=of_rank(whole.adapter, self.settings.ranks[client]))

    def sends(self, client: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what travels of an adapter between the server and a client: no more than its rank."""
        rank = self.settings.ranks.get(client)
        return dict(tensors) if rank is None else narrowed(tensors, rank)

    def cohorts(self, clients: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
        """Yield clients a cohort at a time, with how many have come before."""
        for start in range(0, len(clients), self.cohort):
            yield start, clients[start : start + self.cohort]

    def owner(self, client: str) -> str:
        """Return who trains the model that serves a client."""
        return POOLED if self.settings.pooled else client


def prepare(
    settings: FederateSettings,
    run: RunDirectory,
    rows: Mapping[str, ClientRows],
    progress: Progress,
    tell: Tell,
    holdings: Holdings,
    devices: Sequence[torch.device],
    load: Load = load_model,
) -> Federation:
    """Load the model onto the devices, encode every row; raises `PomonaError` for what does not go together."""
    tokenizer, (device, *others) = load_tokenizer(settings.model), devices
    base = frozen_base(settings, moved(load(settings.model, settings.dtype), device))
    use_frozen_experts(base.model)
    said = settings.rehearsal.length if settings.rehearsal else 0
    base = replace(base, packs=can_pack(base.model, max(settings.max_length, said)))
    if settings.rehearsal is not None:
        progress("sampling what the base says", 0, 1)
        rehearsed = settings.rehearsal.begin(base.model, first_token(tokenizer), settings.seed)
        base = replace(base, rehearsed=rehearsed)
        progress("sampling what the base says", 1, 1)
    limit, answers = settings.evaluation.rows or None, settings.evaluation.answers
    trained, tested = (
        encode_groups(which, settings.template, tokenizer, settings.max_length, cache_folder())
        for which in (
            {name: client.train for name, client in rows.items()},
            {name: client.test[:limit] for name, client in rows.items()},
        )
    )
    replicas = replicas_of(base, others)
    if settings.compile:
        for replica in replicas.bases:
            compile_norms(replica.model)
    server_first, client_first = dealt(settings.strategy, first_adapter(settings, base))
    train, held_back = _held_back(settings, trained)
    return Federation(
        settings,
        run,
        replicas,
        tokenizer,
        padding_id(tokenizer),
        {name: rows[name].test[: min(answers, len(own))] for name, own in tested.items()},
        _trainers(settings, train),
        _trainers(settings, held_back),
        tested,
        _held_out(settings, tokenizer),
        _tasks(settings),
        progress,
        tell,
        holdings,
        server_first,
        client_first,
        settings.least_cohort,
    )


def _held_back(
    settings: FederateSettings, train: Mapping[str, Sequence[Example]]
) -> tuple[Mapping[str, Sequence[Example]], Mapping[str, Sequence[Example]]]:
    """Return every client's rows to train on and those that decide when to stop."""
    stop = settings.early_stop
    if stop is None:
        return train, dict.fromkeys(train, ())
    dealt = {name: stop.hold_back(settings.seed, name, own) for name, own in train.items()}
    return {n: own for n, (own, _) in dealt.items()}, {n: kept for n, (_, kept) in dealt.items()}


def frozen_base(settings: FederateSettings, model: PreTrainedModel) -> FrozenBase:
    """Freeze a model that is loaded or outlined; raises `PomonaError` if it does not fit the recipe."""
    if settings.max_length > context_length(model):
        raise PomonaError(
            f"max_length {settings.max_length} is longer than the context of {settings.model}, "
            f"{context_length(model)} tokens; make max_length smaller"
        )
    freeze(model)
    if settings.checkpointing:
        enable_checkpointing(model)
    together = settings.shared_expert
    sites = _sites(model, needed=settings.graft is not None or together is not None)
    expert = together.on(model, sites) if together is not None else None
    for training in (settings.local, *([settings.finish.training] if settings.finish else [])):
        balance_weight(model, sites, training.router_loss)
    return FrozenBase(model, settings.adapter, settings.graft, sites, settings.personal, expert)


def _trainers(
    settings: FederateSettings, train: Mapping[str, Sequence[Example]]
) -> Mapping[str, Sequence[Example]]:
    """Return who trains on what: every client on its own rows, or one on those of all."""
    if not settings.pooled:
        return train
    return {POOLED: Joined(list(train.values()))}


def _held_out(
    settings: FederateSettings, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, Tokens]:
    """Read the text of forgetting before anything is trained: what is wrong with it shows at once."""
    source, limit = settings.evaluation.forgetting, settings.evaluation.windows
    if source is None:
        return {}
    return held_out_windows(source, tokenizer, settings.max_length, limit)


def _tasks(settings: FederateSettings) -> Any:
    """Return the harness's tasks with their data, or None: what is wrong with them shows at once."""
    asked = settings.evaluation
    if not asked.tasks:
        return None
    given = (asked.tasks, asked.task_data, asked.fewshot, "evaluation.task_data")
    return installed_harness().prepare_tasks(*given)


def _sites(model: Any, needed: bool) -> tuple[ExpertSite, ...]:
    """A graft needs experts to grow from; without one, a dense model federates as well."""
    return tuple(find_expert_sites(model)) if needed else expert_sites_if_any(model)
