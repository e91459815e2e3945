"""What `pomona evaluate` found: as tables on screen and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pomona.cli.console import console, print_table
from pomona.evaluation.experts import ExpertLoad
from pomona.evaluation.speed import Speed
from pomona.evaluation.tasks import TaskResults
from pomona.files import write_text
from pomona.pipelines.evaluate import Figures, TextMeasures


@dataclass(frozen=True)
class Shown:
    """A table: its title ("" is the model's), the header, the rows; and what is said below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


Found = tuple[list[Shown], dict[str, Any]]


def show(model: str, tables: Sequence[Shown]) -> None:
    """Print the tables of a model."""
    for table in tables:
        print_table(table.title or model, table.header, table.rows)
        if table.note:
            console.print(table.note)


def of_rows(figures: Figures) -> Found:
    """Return the table and the JSON of rows."""
    return [_table(list(figures.items()))], {"figures": figures}


def of_text(measured: Mapping[int, TextMeasures], folder: Path | None = None) -> Found:
    """Return the tables and the JSON of text; draw the experts' load in a folder if one is given.

    The JSON of a single length has its figures and routing by domain; of several, by length first.
    """
    lengths = list(measured)
    tables = [
        _table(
            [
                (name, {"length": length, **each.figures[name]})
                for name in measured[lengths[0]].figures
                for length, each in measured.items()
            ]
        )
    ]
    found: dict[str, Any] = {"lengths": lengths}
    figures = {str(length): each.figures for length, each in measured.items()}
    routing = {
        str(length): {name: _routing(load) for name, load in each.routing.items()}
        for length, each in measured.items()
        if each.routing
    }
    single = str(lengths[0]) if len(lengths) == 1 else None
    found["figures"] = figures[single] if single else figures
    if routing:
        found["routing"] = routing[single] if single else routing
    for length, each in measured.items():
        tables += [_load_table(name, length, load) for name, load in each.routing.items()]
        if folder is not None:
            _draw(folder / f"expert-load-{length}.svg", each.routing)
    return tables, found


def of_tasks(results: TaskResults) -> Found:
    """Return the table and the JSON of tasks."""
    rows = [
        [
            name,
            metric,
            f"{value:.4f}",
            "–" if own.errors[metric] is None else f"{own.errors[metric]:.4f}",
            str(own.questions),
            "–" if own.fewshot is None else str(own.fewshot),
        ]
        for name, own in results.tasks.items()
        for metric, value in own.metrics.items()
    ]
    note = f"{results.cut} requests were longer than the context and lost their beginning"
    header = ["task", "metric", "value", "std. error", "questions", "examples"]
    tasks = {name: asdict(own) for name, own in results.tasks.items()}
    return [Shown("", header, rows, note if results.cut else "")], {
        "figures": tasks,
        "cut": results.cut,
        "harness": results.harness,
    }


def of_speed(speeds: Mapping[str, Speed]) -> Found:
    """Return the table and the JSON of speeds; the ratio is that of the medians."""
    figures = {
        name: {"prefill": own.prefill, "decode": own.decode, **asdict(own)}
        for name, own in speeds.items()
    }
    rows = [[name, f"{own.prefill:.1f}", f"{own.decode:.1f}"] for name, own in speeds.items()]
    own = speeds["model"]
    found: dict[str, Any] = {"figures": figures, "threads": torch.get_num_threads()}
    if "dense" in speeds:
        ratio = {
            "prefill": own.prefill / speeds["dense"].prefill,
            "decode": own.decode / speeds["dense"].decode,
        }
        rows.append(["model / dense", *(f"{value:.3f}" for value in ratio.values())])
        found["ratio"] = ratio
    note = (
        f"median of {len(own.decode_seconds)}; prompt of {own.prompt} tokens, {own.new_tokens} new "
        f"ones, batch of 1, float32, {torch.get_num_threads()} threads"
    )
    return [Shown("", ["", "prefill, tokens/s", "decode, tokens/s"], rows, note)], found


def _table(figures: Sequence[tuple[str, Mapping[str, float]]]) -> Shown:
    columns = list(figures[0][1])
    rows = [[name, *(_figure(own.get(c)) for c in columns)] for name, own in figures]
    return Shown("", ["on", *columns], rows)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _load_table(domain: str, length: int, load: ExpertLoad) -> Shown:
    rows = [
        [
            str(layer),
            f"{entropy:.3f}",
            f"{variation:.3f}",
            " ".join(f"{100 * share:3.0f}" for share in load.layer(layer)),
        ]
        for layer, (entropy, variation) in enumerate(
            zip(load.entropy_L.tolist(), load.variation_L.tolist(), strict=True)
        )
    ]
    title = f"experts on {domain}, windows of {length} tokens"
    return Shown(title, ["MoE layer", "entropy", "variation", "load per expert, %"], rows)


def _routing(load: ExpertLoad) -> dict[str, Any]:
    return {
        "load": [load.layer(layer) for layer in range(len(load.num_experts))],
        "entropy": load.entropy_L.tolist(),
        "variation": load.variation_L.tolist(),
    }


def _draw(path: Path, routing: Mapping[str, ExpertLoad]) -> None:
    from pomona.artifacts.figures import expert_load_map

    write_text(path, expert_load_map(routing))
