"""How many clients train at once and how the frozen experts are computed: what is fastest here, by trial.

As many clients as a round samples take a real step that nobody keeps, in cohorts of growing size, as far as
memory reaches. What was found is kept beside the run, which goes on with it, and for the machine: the same
recipe on it computes the same bytes.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from accelerate.utils import get_max_memory

from pomona.artifacts.inputs import Inputs
from pomona.data.encoded import cache_folder
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.local import Trained, train_cohort
from pomona.federation.settings import FederateSettings
from pomona.federation.stage import Task
from pomona.files import read_as, write_json
from pomona.models.frozen_experts import use_frozen_experts
from pomona.pipelines.federate.prepare import Federation
from pomona.pipelines.federate.preview import cohort_memory

_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
_MOST = 64  # clients in one batch
_USUAL = 16
_BETTER = 1.03  # by what more clients at once, or another implementation, have to be faster
_SHARE = 0.5  # of free memory: glibc was seen to hold back almost as much as a step keeps
_REPEATS = 3


@dataclass(frozen=True)
class Trial:
    """Tokens that were trained in a second by so many clients at once."""

    cohort: int
    experts: str
    tokens_per_second: float


@dataclass(frozen=True)
class Pace:
    """What was chosen, and what it was chosen from."""

    cohort: int
    experts: str
    trials: list[Trial] = field(default_factory=list[Trial])


def paced(federation: Federation, inputs: Inputs) -> Federation:
    """Return a federation whose cohort and experts' implementation are those asked for, or the fastest."""
    settings = federation.settings
    if "auto" not in (settings.cohort, settings.experts):
        return _at(federation, Pace(federation.cohort, settings.experts))
    own = federation.run.path / "pace.json"
    if own.is_file():
        found = read_as(own, Pace)
    else:
        found = _known_here(federation, inputs)
        write_json(own, asdict(found))
    federation.tell(f"{found.cohort} clients train at once, experts by {found.experts}")
    return _at(federation, found)


def _known_here(federation: Federation, inputs: Inputs) -> Pace:
    """Return what this machine has found before, else what it finds; it does without a file that is damaged."""
    path = _machine_file(federation, inputs)
    if path is not None and path.is_file():
        with suppress(PomonaError):
            return read_as(path, Pace)
    found = measured_pace(federation)
    if path is not None:
        with suppress(PomonaError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(found))
    return found


def measured_pace(federation: Federation) -> Pace:
    """Try implementations of the experts at a usual size, then sizes of a cohort."""
    settings, present = federation.settings, _present(federation)
    rows, device = max(map(len, federation.train.values())), federation.base.device
    sizes = [size for size in _sizes(len(present)) if _fits(settings, rows, size, device)] or [1]
    trials: list[Trial] = []

    def tried(cohort: int, experts: str) -> Trial:
        federation.progress("finding the pace", len(trials), len(trials) + 1)
        _use(federation, experts)
        rate = _rate(federation, present[:cohort])
        trials.append(Trial(cohort, experts, rate))
        return trials[-1]

    experts = settings.experts
    if experts == "auto":
        usual = max(size for size in sizes if size <= _USUAL)
        found = [tried(usual, name) for name in _implementations(federation, usual)]
        experts = _fastest(found).experts if found else "default"
    if settings.cohort != "auto":
        return Pace(federation.cohort, experts, trials)
    found: list[Trial] = []
    for size in sizes:
        found.append(tried(size, experts))
        if len(found) > 2 and _fastest(found) not in found[-2:]:
            break  # the last two have brought nothing
    federation.progress("finding the pace", len(trials), len(trials))
    return Pace(_fastest(found).cohort, experts, trials)


def _fastest(trials: Sequence[Trial]) -> Trial:
    """Return the first of the trials that none of the later ones beats by enough."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.tokens_per_second > _BETTER * best.tokens_per_second:
            best = trial
    return best


def _sizes(clients: int) -> Iterator[int]:
    size = 1
    while size < min(clients, _MOST):
        yield size
        size *= 2
    yield min(clients, _MOST)


def _present(federation: Federation) -> list[Task]:
    """Return as many clients as a round samples with what they begin with, on experts that nobody chose."""
    settings = federation.settings
    last = settings.rounds or settings.last_round
    names = [n for n in federation.train if settings.takes_part(n, last)] or list(federation.train)
    if settings.rounds:
        names = names[: settings.sample(federation.train, last)[0]]
    server = settings.strategy.init(federation.server_first)
    count = settings.graft.count if settings.graft else 0
    experts = [list(range(count)) for _ in federation.base.sites]
    return [
        Task(
            name,
            federation.state(name, server.shared, federation.newborn(name, experts)),
            federation.train[name],
            server.memory,
        )
        for name in names[:_MOST]
    ]


def _rate(federation: Federation, tasks: Sequence[Task]) -> float:
    """Return the tokens per second of one step of these clients; the first of several warms up."""
    settings = federation.settings
    training = replace(settings.local, steps=1, epochs=0)

    def train(base: FrozenBase, part: Sequence[Task]) -> list[Trained]:
        return train_cohort(base, part, training, settings.strategy, 0, 1, 1, federation.pad_id)

    seconds: list[float] = []
    for _ in range(1 + _REPEATS):
        began = perf_counter()
        federation.replicas.map(train, tasks)
        for base in federation.replicas.bases:
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
        seconds.append(perf_counter() - began)
    return _tokens(settings, tasks) / min(seconds[1:])


def _tokens(settings: FederateSettings, tasks: Sequence[Task]) -> float:
    """Return about how many tokens a step of these clients has."""
    said = settings.rehearsal.rows * settings.rehearsal.length if settings.rehearsal else 0
    tokens = 0.0
    for task in tasks:
        first = task.examples[:_USUAL]
        mean = sum(len(example.input_ids) for example in first) / len(first)
        tokens += mean * min(settings.local.batch, len(task.examples)) + said
    return tokens


def _implementations(federation: Federation, cohort: int) -> list[str]:
    """Return those that fit: batched products gather an expert's weights for every token it is sent."""
    sites, settings = federation.base.sites, federation.settings
    if not sites:
        return []
    batch = cohort * settings.local.batch * settings.max_length
    gathered = max(
        sum(p.nbytes for p in site.experts.parameters()) // site.num_experts for site in sites
    )
    room = _SHARE * free_bytes(federation.base.device)
    return [
        name for name in _IMPLEMENTATIONS if name != "batched_mm" or batch * gathered * 2 < room
    ]


def _fits(settings: FederateSettings, rows: int, cohort: int, device: torch.device) -> bool:
    """Tell whether a step of so many clients, of whom one has so many rows, has room on a device."""
    needed = cohort_memory(settings, rows, cohort).training(settings.checkpointing)
    return needed <= _SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device, on a processor within the bounds of its container."""
    if device.type != "cpu":
        return int(get_max_memory()[device.index or 0])
    free, group = int(get_max_memory()["cpu"]), Path("/sys/fs/cgroup")
    try:
        most, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(most) - int(used))
    except (OSError, ValueError):  # no container, or one without bounds
        return free


def _use(federation: Federation, experts: str) -> None:
    if experts == "default" or not federation.base.sites:
        return
    for base in federation.replicas.bases:
        try:
            base.model.set_experts_implementation(experts)
            use_frozen_experts(base.model)
        except (ValueError, ImportError, RuntimeError) as error:
            raise PomonaError(
                f'experts = "{experts}" is not to be had for {federation.settings.model}: {error}'
            ) from error


def _at(federation: Federation, pace: Pace) -> Federation:
    _use(federation, pace.experts)
    return replace(federation, cohort=pace.cohort)


def _machine_file(federation: Federation, inputs: Inputs) -> Path | None:
    """Return where this machine keeps what was found for a model, its parts and clients like these."""
    folder, settings = cache_folder(), federation.settings
    if folder is None:
        return None
    device = federation.base.device
    computer = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    told = [
        repr(replace(settings, seed=0)),
        asdict(inputs),
        [computer, device.type, len(federation.replicas.bases), torch.get_num_threads()],
        torch.__version__,
    ]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return folder / "pace" / f"{digest[:32]}.json"


__all__ = ["Pace", "Trial", "free_bytes", "measured_pace", "paced"]
