"""The whole story on the embedded default: reconstruct → federate three ways → report."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.data.row import Row
from pomona.demo.clients import client_rows
from pomona.demo.domains import domain_texts
from pomona.federation.graft import Graft
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import FedAvg, LocalOnly, Strategy
from pomona.files import write_text
from pomona.pipelines.federate import federate
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.progress import Progress, silent, titled
from pomona.recipe import build, dump
from pomona.recipe.read import read_table

MODEL = Path(str(files("pomona.demo"))) / "model"
_RECIPE = Path(str(files("pomona.demo"))) / "recipe.toml"


METHODS: dict[str, tuple[Strategy, Graft | None]] = {
    "local-only": (LocalOnly(), None),
    "FedAvg": (FedAvg(), None),
    "FLEx": (FedAvg(), Graft(rank=8)),
    "local-only + graft": (LocalOnly(), Graft(rank=8)),
}
STORY = ("local-only", "FedAvg", "FLEx")


def tell(
    out: Path, seed: int = 0, progress: Progress = silent, methods: Sequence[str] = STORY
) -> tuple[list[Path], Path]:
    """Run the demo in `out`, or go on with it; return its run directories and the report.

    The mixture is made once; each seed has runs, clients' rows and draws of its own.
    """
    mixture, clients = out / "mixture", out / f"clients-{seed}"
    if not mixture.exists():
        settings = ReconstructSettings(experts=4, active=2, keep=0.5, windows=32, length=128)
        texts = domain_texts(seed=2, documents=60)
        reconstruct(MODEL, texts, mixture, replace(settings, affinity_windows=4), progress)
    write_clients(clients, seed)
    runs = [
        _federate(out, settings_of(method, mixture, clients, seed), progress) for method in methods
    ]
    write_report(runs, out / "report.html")
    return runs, out / "report.html"


def settings_of(method: str, mixture: Path, clients: Path, seed: int) -> FederateSettings:
    """Return one method's federation: the same recipe for all, other strategy and graft."""
    table = read_table(_RECIPE)
    table |= {"model": str(mixture.resolve()), "data": {"folder": str(clients.resolve())}}
    common = build(FederateSettings, table, Path.cwd(), str(_RECIPE))
    strategy, graft = METHODS[method]
    return replace(common, name=method, seed=seed, strategy=strategy, graft=graft)


def write_clients(folder: Path, seed: int) -> None:
    """Write every house's NAME.train.jsonl and NAME.test.jsonl, as users have theirs."""
    for name, (train, test) in client_rows(seed).items():
        _write_rows(folder / f"{name}.train.jsonl", train)
        _write_rows(folder / f"{name}.test.jsonl", test)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    fields = ("instruction", "context", "response", "category")
    records = [{name: getattr(row, name) for name in fields} for row in rows]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _federate(out: Path, settings: FederateSettings, progress: Progress) -> Path:
    path = out / f"{settings.name.lower().replace(' + ', '-')}-{settings.seed}"
    about = {"command": ["pomona", "demo"], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(path, dump(settings), about) as run:
        federate(settings, run, titled(settings.name, progress))
    return path
