"""What every benchmark does: time ways in turn, hold values to bars, leave a JSON of it."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.artifacts.table import FinishedRun, compare, measured, pairwise
from pomona.cli.console import console
from pomona.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def record(path: Path, rows: object, bars: Sequence[Mapping[str, Any]], **more: object) -> None:
    """Write a benchmark's result; each bar is {name, value, bar, holds}."""
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    write_json(path, {**about, **more, "rows": rows, "bars": list(bars)})
    console.print(str(path))


def timed(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return each way's seconds, all in turn as often as asked: what else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def at_least(name: str, value: float, bar: float) -> dict[str, Any]:
    """Return the bar that a value has to reach."""
    return {"name": name, "value": value, "bar": bar, "holds": value >= bar}


def at_most(name: str, value: float | None, bar: float) -> dict[str, Any]:
    """Return the bar that a value must not exceed; what could not be computed does."""
    return {"name": name, "value": value, "bar": bar, "holds": value is not None and value <= bar}


def below(name: str, value: float, bar: float) -> dict[str, Any]:
    """Return the bar that a value has to stay below."""
    return {"name": name, "value": value, "bar": bar, "holds": value < bar}


def peak_bytes(pid: int | str = "self") -> int:
    """Return the largest resident set that a running process has had (Linux).

    `ru_maxrss` is none of it: a process that another one started has that one's peak in it, from before
    it became a program of its own.
    """
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def comparison_rows(runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    """Return every method's figures and the paired differences of their losses."""
    rows: list[dict[str, object]] = [
        {
            "measure": measure,
            "method": line.method,
            "seeds": line.seeds,
            "clients": line.clients,
            "mean": line.mean.mean,
            "interval": [line.mean.low, line.mean.high],
            "worst": line.worst,
            "spread": line.spread,
        }
        for measure in measured(runs)
        for line in compare(runs, measure)
    ]
    differences = [
        {
            "difference": f"{a} - {b}",
            "mean": c.difference.mean,
            "p": c.p_value,
            "interval": [c.difference.low, c.difference.high],
        }
        for a, b, c in pairwise(runs, "loss")
    ]
    return rows + differences


def lower_loss(
    runs: Sequence[FinishedRun], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, object]]:
    """Return a bar for every (method, opponent): the method's mean answer loss is the lower one."""
    losses = {line.method: line.mean.mean for line in compare(runs, "loss")}
    return [below(f"{a}: mean answer loss below {b}", losses[a], losses[b]) for a, b in pairs]


def commit() -> str:
    """Return the commit of the sources, whatever was changed since."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
