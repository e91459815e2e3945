"""Runs read back once they are finished, and whether they can be compared."""

import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pomona.artifacts.inputs import Inputs
from pomona.artifacts.results import (
    FORGETTING,
    MODELS,
    SPEED,
    TASKS,
    SpeedFile,
    of_model,
    pooled_routing,
    read_results,
)
from pomona.artifacts.run import read_about
from pomona.errors import PomonaError
from pomona.evaluation.exact import exact_match
from pomona.files import damaged, digest_of, read_as


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory tells once it is finished.

    `test_rows` is the digest of every client's test rows; `forgetting`, `tasks` and `speed` are there if
    the recipe asked for them.
    """

    path: Path
    method: str
    seed: int
    about: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)
    answers: Sequence[Mapping[str, Any]] = field(repr=False)
    metrics: Sequence[Mapping[str, Any]] = field(repr=False)
    recipe: str = field(repr=False)
    test_rows: Mapping[str, str] = field(repr=False)
    forgetting: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    speed: SpeedFile | None = field(default=None, repr=False)
    tasks: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def served(self) -> str:
        """The model a client ends up with: its personal one or, without one, the shared one."""
        return "personal" if self.results["personal"] is not None else "shared"

    @property
    def model(self) -> str:
        """The model that was federated, as the recipe names it."""
        return tomllib.loads(self.recipe)["model"]

    @property
    def newcomers(self) -> list[str]:
        """The clients that took part in no round: everybody where there was none."""
        recipe = tomllib.loads(self.recipe)
        everybody = list(self.results["base"]["clients"])
        return everybody if recipe.get("rounds") == 0 else list(recipe.get("newcomers", ()))

    def of(self, clients: Collection[str]) -> "FinishedRun":
        """Return the run as if it had measured these clients alone."""

        def own(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
            return [line for line in lines if line.get("client", "") in {*clients, None}]

        def kept(by_client: Mapping[str, Any] | None) -> dict[str, Any]:
            return {n: v for n, v in (by_client or {}).items() if n in clients}

        def messages(line: Mapping[str, Any]) -> dict[str, Any]:
            sent, received = (kept(line.get(way)) for way in ("sent", "received"))
            both = {"sent_bytes": sum(sent.values()), "received_bytes": sum(received.values())}
            return {**line, **both, "sent": sent, "received": received}

        measured, communicated = (
            [m for m in self.metrics if (m["model"] == "communication") == sent]
            for sent in (False, True)
        )
        answers, results = own(self.answers), dict(self.results)
        results |= {
            model: of_model([a for a in answers if a["model"] == model]) for model in MODELS
        }
        results |= {what: kept(results[what]) or None for what in ("selection", "gate_openness")}
        return replace(
            self,
            answers=answers,
            results={**results, "routing": self._routing_of(clients)},
            metrics=[*own(measured), *(m for m in map(messages, communicated) if m["sent"])],
            speed=self.speed if self.speed and self.speed.client in clients else None,
            forgetting=own(self.forgetting),
            tasks=own(self.tasks),
        )

    def _routing_of(self, clients: Collection[str]) -> dict[str, Any]:
        """Pool what metrics.jsonl counted last of these clients, by model; runs of before cannot tell."""
        found: dict[str, Any] = {}
        for model, pooled in self.results["routing"].items():
            last = {
                line["client"]: line["counts"]
                for line in self.metrics
                if line["model"] == model and "counts" in line and line["client"] in clients
            }
            if last and pooled.get("experts"):
                found[model] = pooled_routing(list(last.values()), pooled["experts"])
        return found


def load_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Read finished run directories.

    Raises `PomonaError` naming one that is none, its file that is damaged, or two that cannot be
    compared: of different models, or of one method and not only of different seeds.
    """
    runs = [load_run(path) for path in paths]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            _check_comparable(other, run)
    return runs


def load_run(path: Path) -> FinishedRun:
    """Read a finished run directory; raises `PomonaError` naming what is missing or damaged."""
    if not (path / "run.json").is_file():
        raise PomonaError(f"{path} is no run directory: it holds no run.json")
    if not (path / "results.json").is_file():
        raise PomonaError(f"{path} is not finished; run its command again to go on with it")
    about, results = read_about(path / "run.json"), read_results(path / "results.json")
    for name, digest in results["files"].items():
        if digest_of(path / name) != digest:
            raise damaged(path / name, "it is not what the run wrote")
    inputs = read_as(path / "inputs.json", Inputs)
    return FinishedRun(
        path,
        about["method"],
        about["seed"],
        about,
        results,
        [_with_match(line) for line in _lines(path / "answers.jsonl")],
        _lines(path / "metrics.jsonl"),
        (path / "recipe.toml").read_text("utf-8"),
        {name: own["test"] for name, own in inputs.clients.items()},
        _lines(path / FORGETTING) if FORGETTING in results["files"] else (),
        read_as(path / SPEED, SpeedFile) if (path / SPEED).is_file() else None,
        _lines(path / TASKS) if TASKS in results["files"] else (),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    # bytes: text would be split at U+2028 and its like too, which answers may hold
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _with_match(answer: dict[str, Any]) -> dict[str, Any]:
    """Runs of before exact match was measured hold all that it takes."""
    if "exact_match" in answer:
        return answer
    said = answer["answer"] is not None
    return answer | {
        "exact_match": exact_match(answer["answer"], answer["reference"]) if said else None
    }


def _check_comparable(a: FinishedRun, b: FinishedRun) -> None:
    ours, theirs = tomllib.loads(a.recipe), tomllib.loads(b.recipe)
    if a.model != b.model:
        raise PomonaError(
            f"{a.path} and {b.path} are of different models ({a.model}, {b.model}); "
            "compare runs of one model"
        )
    if a.method != b.method:
        return
    if a.seed == b.seed:
        raise PomonaError(
            f'{a.path} and {b.path} are both "{a.method}" with seed {a.seed}; give each run once, and '
            "other methods other names"
        )
    differs = sorted(
        key
        for key in {*ours, *theirs} - {"seed", "data"}  # a seed may have clients of its own
        if ours.get(key) != theirs.get(key)
    )
    if differs:
        raise PomonaError(
            f'{a.path} and {b.path} are both called "{a.method}" and differ in {", ".join(differs)}; give '
            "them different names in their recipes"
        )
