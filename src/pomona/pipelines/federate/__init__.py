"""Federate: sites tune one mixture of experts together, each with a private expert of its own.

FLEx (arXiv 2506.00965): graft once → rounds of {sample → train a cohort → aggregate → evaluate} →
results. The in-process engine: the sampled clients of a cohort train in one batch.
"""

from typing import Any

from pomona.artifacts.holdings import write_holdings
from pomona.artifacts.inputs import inputs_of
from pomona.artifacts.run import RunDirectory
from pomona.data.duplicates import told
from pomona.federation.holdings import holdings_of
from pomona.federation.settings import FederateSettings
from pomona.models.placement import find_devices
from pomona.pipelines.federate.birth import begin
from pomona.pipelines.federate.finish import finish
from pomona.pipelines.federate.in_process import InProcess
from pomona.pipelines.federate.pace import paced
from pomona.pipelines.federate.prepare import prepare
from pomona.pipelines.federate.rounds import through_rounds
from pomona.progress import Progress, Tell, silent, unheard

__all__ = ["federate"]


def federate(
    settings: FederateSettings,
    run: RunDirectory,
    progress: Progress = silent,
    tell: Tell = unheard,
    device: str = "auto",
) -> dict[str, Any]:
    """Run, or go on with, a federation in `run` and return its results (see `artifacts.results`).

    `tell` is told before training which test rows are also trained on. `device` is where the model computes:
    "auto" is all GPUs, each with a copy of the base, else the processor; "cuda:1" is that GPU alone. Raises
    `PomonaError` for whatever is wrong with the model, the data or the disk.
    """
    devices = find_devices(device)
    rows = settings.load()
    settings.check_clients(list(rows))
    inputs = inputs_of(settings.model, rows, progress, settings.warm_start)
    run.claim(inputs)
    holdings = holdings_of(rows)
    tell(told(holdings.duplicates))
    if run.finished:
        return run.results()
    federation = paced(prepare(settings, run, rows, progress, tell, holdings, devices), inputs)
    del rows  # of many clients their text is most of what they take
    write_holdings(run.path, holdings)
    snapshot = run.snapshot(federation.train) or begin(federation)
    snapshot = through_rounds(InProcess(federation), snapshot)
    return finish(federation, snapshot)
