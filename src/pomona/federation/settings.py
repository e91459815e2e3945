"""Everything one can say about a federation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pomona.data.templates import Alpaca, Template
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData, ClientRows
from pomona.federation.early_stop import EarlyStop
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.privacy import Privacy
from pomona.federation.rehearsal import Rehearsal
from pomona.federation.sampling import participants, sample_size, survivors
from pomona.federation.secure_sum import FEWEST
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import (
    AVERAGING,
    FedAvg,
    FlexLoRA,
    FLoRA,
    Hears,
    Krum,
    LocalOnly,
    Scaffold,
    Strategy,
    only_averages,
)
from pomona.models.lora import LoRA

_ANY_RANK = (FlexLoRA, FLoRA, LocalOnly)


@dataclass(frozen=True)
class Finish:
    """Training after the last round that nobody sends: of newcomers, or of everybody.

    What is private is trained, on the shared adapter as it is.

    Attributes:
        rounds: How often `training` is done, along its learning rates.
        training: What is done each time.
        adapter: Train a copy of the shared adapter too, which is then the client's own.
        newcomers_only: Leave the others as they are; without it everybody trains.
    """

    rounds: int = 20
    training: LocalTraining = field(default_factory=LocalTraining)
    adapter: bool = False
    newcomers_only: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PomonaError(f"finish rounds {self.rounds} is not positive; use 1 or more")


@dataclass(frozen=True)
class FederateSettings:
    """A federation, whole: what a recipe says and `federate` does.

    Attributes:
        model: Checkpoint folder or Hub id.
        data: The clients' rows of a simulation; sites have their own.
        name: The method's name in tables.
        seed: Decides partition, participants, rows and births.
        rounds: How often clients train and the server aggregates; 0 only with `warm_start`, when everybody
            is new to what was shared.
        fraction: Share of the clients that take part in a round.
        dropout: Share of those that is lost before it has answered: nothing of theirs changes.
        joins: From which round on a client takes part.
        newcomers: Clients that take part in no round; they graft and train when it is over (`finish`).
        pooled: One model on everybody's rows, the ceiling; every client is tested with it.
        cohort: Clients that train at once: in one batch or, on a processor, in as many side by side as
            torch has threads (`OMP_NUM_THREADS`, at most 8). "auto" is what a trial finds fastest here, within
            free memory.
        experts: How frozen experts are computed: by an implementation of transformers, by the one that the
            model names ("default"), or by the fastest of a trial ("auto").
        dtype: Of the base.
        checkpointing: Compute every layer again in the backward pass: less memory, one more forward pass.
        compile: Have torch compile the normalisations. Needs a C++ compiler on a processor; a run that was
            interrupted may then differ in its last bits.
        template: How a row becomes a prompt.
        max_length: Longest row in tokens; longer prompts are cut from their left.
        adapter: The LoRA that everybody shares.
        ranks: Clients with an adapter of a smaller rank; with `flexlora`, `flora` and `local-only`.
        warm_start: A PEFT folder that the adapter begins as, of the same rank and targets.
        personal: A private LoRA beside the shared one.
        graft: Private experts; without it nobody has any.
        shared_expert: One more expert per layer, which everybody trains and the server aggregates with the
            adapter.
        rehearsal: Holds every client to what the base says by itself, against forgetting.
        strategy: What clients send and what the server does with it.
        local: What a client does in a round.
        early_stop: Ends the rounds when rows that are held back are no longer answered better.
        finish: Training after the last round that nobody sends; with `newcomers` its defaults apply.
        evaluation: What is measured, and when.
        privacy: Differential privacy of whole clients: updates are clipped and noised. Needs the extra
            `privacy`.
        compression: "int8": clients send their change in eight bits, a scale for every 256 values; what
            rounding lost is added to the next change. Not with `flora`.
        secure_aggregation: Across sites the coordinator sees sums alone; a simulation adds up the same
            integers, without masks. For strategies that need only the mean (`fedavg`,
            `fedprox`, `fedavgm`, `fedadagrad`, `fedadam`, `fedyogi`, `ffa-lora`, `fedsa-lora`).
    """

    model: str = field(metadata={"path": True})
    data: ClientData | None = None
    name: str = "federation"
    seed: int = 0
    rounds: int = 20
    fraction: float = 1.0
    dropout: float = 0.0
    joins: Mapping[str, int] = field(default_factory=dict[str, int])
    newcomers: tuple[str, ...] = ()
    pooled: bool = False
    cohort: int | Literal["auto"] = 16
    experts: Literal["default", "auto", "grouped_mm", "batched_mm", "eager"] = "default"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    compile: bool = False
    template: Template = field(default_factory=Alpaca)
    max_length: int = 512
    adapter: LoRA = field(default_factory=LoRA)
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    warm_start: Path | None = None
    personal: LoRA | None = None
    graft: Graft | None = None
    shared_expert: SharedGraft | None = None
    rehearsal: Rehearsal | None = None
    strategy: Strategy = field(default_factory=FedAvg)
    local: LocalTraining = field(default_factory=LocalTraining)
    early_stop: EarlyStop | None = None
    finish: Finish | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    privacy: Privacy | None = None
    compression: Literal["none", "int8"] = "none"
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "cohort", "max_length"):
            value = getattr(self, name)
            if value != "auto" and value < 1 and not (name == "rounds" and self.only_finishes):
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")
        if not 0 < self.fraction <= 1:
            raise PomonaError(f"fraction {self.fraction} is not between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise PomonaError(f"dropout {self.dropout} is not a share below 1")
        if self.evaluation.new_tokens >= self.max_length:
            raise PomonaError(
                f"evaluation new_tokens {self.evaluation.new_tokens} leave no room for a prompt in "
                f"max_length {self.max_length}; make one smaller or the other larger"
            )
        if self.privacy is not None:
            self.privacy.check(self.strategy)
            if self.early_stop is not None:
                raise PomonaError(
                    "early_stop tells the loss of rows without noise, which [privacy] does not protect; leave "
                    "one of them out"
                )
        self._check_messages()
        self._check_dp_sgd()
        self._check_finish()
        if isinstance(self.strategy, Scaffold) and self.strategy.fraction != self.fraction:
            raise PomonaError(
                f"strategy fraction {self.strategy.fraction} of scaffold is not the recipe's fraction "
                f"{self.fraction}; give both the same"
            )
        if self.pooled and (self.newcomers or self.joins):
            raise PomonaError("pooled rows are one client's; leave out newcomers and joins")
        if self.ranks and not isinstance(self.strategy, _ANY_RANK):
            raise PomonaError(
                f"ranks: {type(self.strategy).__name__} needs the same rank of everybody; leave ranks out, "
                "or take flexlora, flora or local-only"
            )
        if self.shared_expert is not None and (self.ranks or isinstance(self.strategy, FLoRA)):
            raise PomonaError(
                "a shared expert has one rank and no residual; leave shared_expert out, or ranks and flora"
            )
        for name, rank in self.ranks.items():
            if not 1 <= rank <= self.adapter.rank:
                raise PomonaError(
                    f'ranks: client "{name}" has rank {rank}, which is not between 1 and that of the adapter, '
                    f"{self.adapter.rank}"
                )
        for name, round_ in self.joins.items():
            if not 1 <= round_ <= self.rounds:
                raise PomonaError(
                    f'client "{name}" joins in round {round_}, but the rounds are 1 to {self.rounds}'
                )

    def _check_messages(self) -> None:
        """Raise `PomonaError` for messages that a strategy has no use for in their form."""
        name = type(self.strategy).__name__
        if self.compression != "none" and (
            self.strategy.shares == "nothing" or isinstance(self.strategy, FLoRA)
        ):
            raise PomonaError(
                f'compression = "{self.compression}" rounds the change of what the server has sent, and {name} '
                "sends back no such thing; leave compression out"
            )
        if not self.secure_aggregation:
            return
        if not only_averages(self.strategy):
            raise PomonaError(
                f"{name} looks at every update, but secure_aggregation shows it only their sum; use one of "
                f"{', '.join(kind.__name__ for kind in AVERAGING)}"
            )
        if self.pooled or self.compression != "none":
            raise PomonaError(
                "secure_aggregation adds up what several clients send in integers of its own; leave out "
                f"{'pooled' if self.pooled else 'compression'}"
            )
        if self.privacy is not None and self.privacy.where == "central":
            raise PomonaError(
                'privacy where = "central" clips every update at the server, but secure_aggregation shows it '
                'only their sum; use privacy where = "local"'
            )

    def _check_finish(self) -> None:
        """Raise `PomonaError` when somebody trains after the last round and has nothing to train."""
        finish, strategy = self.finishing, self.strategy
        private = self.graft or self.personal or strategy.shares != "adapter"
        if finish is None or finish.adapter or private:
            return
        if self.newcomers or self.only_finishes or not finish.newcomers_only:
            raise PomonaError(
                "who trains after the last round (newcomers, finish, or everybody with rounds = 0) has nothing "
                "of its own to train; add [graft] or [personal], or set finish.adapter"
            )

    def _check_dp_sgd(self) -> None:
        """Raise `PomonaError` where a row would be used without the noise that `dp_sgd` promises."""
        finish = self.finishing
        phases = [] if self.only_finishes else [self.local]
        phases += [finish.training] if finish else []
        if len({(phase.dp_sgd, phase.dp_sgd and phase.batch) for phase in phases}) > 1:
            raise PomonaError(
                "local and finish.training see the same rows, but their dp_sgd or their batch differ; give "
                "both the same, or leave dp_sgd out of both"
            )
        if phases[0].dp_sgd is None:
            return
        phases[0].dp_sgd.check(self.graft.selection if self.graft else None)
        if self.early_stop is not None:
            raise PomonaError(
                "early_stop tells the loss of rows without noise, which dp_sgd does not protect; leave one of "
                "them out"
            )
        if isinstance(self.strategy, Hears):
            raise PomonaError(
                f"{type(self.strategy).__name__} is told the loss of rows without noise, which dp_sgd does not "
                "protect; leave one of them out"
            )
        if self.ranks:
            raise PomonaError(
                "dp_sgd puts noise on every direction of an adapter, also on those that a client of a smaller "
                "rank does not have; leave ranks or dp_sgd out"
            )

    @property
    def only_finishes(self) -> bool:
        """Whether there are no rounds: everybody is new to a federation that is over (`warm_start`)."""
        return self.rounds == 0 and self.warm_start is not None

    @property
    def least_cohort(self) -> int:
        """How many clients train at once, as far as the recipe tells."""
        return 1 if self.cohort == "auto" else self.cohort

    @property
    def last_round(self) -> int:
        """The number of the last round, those of `finish` included."""
        return self.rounds + (self.finishing.rounds if self.finishing else 0)

    def load(self) -> dict[str, ClientRows]:
        """Return the rows of a simulation's clients; raises `PomonaError` where the recipe has none."""
        if self.data is None:
            raise PomonaError(
                "the recipe has no [data], which a simulation needs; say where the rows are"
            )
        return self.data.load(self.seed)

    def takes_part(self, client: str, round_: int) -> bool:
        """Whether a client may be sampled in a round."""
        return client not in self.newcomers and self.joins.get(client, 1) <= round_

    def drawn(self, clients: Iterable[str], round_: int) -> tuple[list[str], list[str]]:
        """Return whom a round's sample holds, and who of them answers (`dropout`)."""
        present = [name for name in clients if self.takes_part(name, round_)]
        chosen = participants(self.seed, round_, present, self.fraction)
        return chosen, survivors(self.seed, round_, chosen, self.dropout)

    def sample(self, clients: Iterable[str], round_: int) -> tuple[int, int]:
        """Return how many clients a round samples, and of how many who may take part in it."""
        present = sum(self.takes_part(name, round_) for name in clients)
        return sample_size(present, self.fraction), present

    @property
    def finishing(self) -> Finish | None:
        """What is done after the last round; newcomers need it, told or not."""
        return self.finish or (Finish() if self.newcomers or self.only_finishes else None)

    def finishes(self, client: str) -> bool:
        """Whether a client trains after the last round."""
        finish = self.finishing
        if finish is None:
            return False
        return not finish.newcomers_only or self.is_new(client)

    def is_new(self, client: str) -> bool:
        """Whether a client takes part in no round."""
        return client in self.newcomers or self.only_finishes

    def check_clients(self, names: list[str]) -> None:
        """Raise `PomonaError` for a client of the recipe that the data do not have, or too few of them."""
        for key, told in (
            ("joins", self.joins),
            ("newcomers", self.newcomers),
            ("ranks", self.ranks),
            ("local.rates", () if self.pooled else self.local.rates),
            ("finish.training.rates", self.finishing.training.rates if self.finishing else ()),
        ):
            for name in told:
                if name not in names:
                    raise PomonaError(f'{key}: there is no client "{name}"; there are {names}')
        if set(names) <= set(self.newcomers):
            raise PomonaError("all clients are newcomers; nobody is left to federate")
        present = sum(self.takes_part(name, 1) for name in names)
        if self.rounds and not present:
            raise PomonaError("joins: nobody takes part in round 1; let a client join then")
        if isinstance(self.strategy, Krum) and not self.pooled:
            self._check_krum(self.strategy, names)
        if self.secure_aggregation:
            self._check_sums(names)

    def _check_sums(self, names: list[str]) -> None:
        """Raise `PomonaError` for a round whose sum would tell one client of another."""
        for round_ in range(1, self.rounds + 1):
            answering = self.drawn(names, round_)[1]
            if answering and len(answering) < FEWEST:
                raise PomonaError(
                    f"secure_aggregation: {len(answering)} clients answer in round {round_}, and the sum of "
                    f"fewer than {FEWEST} hides nothing; raise fraction, or leave secure_aggregation out"
                )

    def _check_krum(self, strategy: Krum, names: list[str]) -> None:
        """Raise `PomonaError` for a round that will have too few answers: who is lost is known before."""
        for round_ in range(1, self.rounds + 1):
            answering = self.drawn(names, round_)[1]
            if answering:  # with none a round changes nothing
                strategy.check(len(answering))
