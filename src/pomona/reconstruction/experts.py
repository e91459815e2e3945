"""The experts of every layer, a few layers at a time: compensate → route → specialise."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pomona.progress import Progress
from pomona.reconstruction.compensate import Refit, Ridge
from pomona.reconstruction.ffn import DenseModel, sample_inputs
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.router import Fitted
from pomona.reconstruction.settings import ReconstructSettings
from pomona.reconstruction.specialise import LayerExperts


def layer_experts(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    settings: ReconstructSettings,
    at_once: int,
    progress: Progress,
) -> Iterator[LayerExperts]:
    """Yield every layer's experts in order, given the windows of each expert's group.

    Sums and experts of `at_once` layers are in memory at a time; every such set of layers needs the
    windows to pass through the model again, as far as its last layer.
    """
    count = len(dense.ffns)
    for first in range(0, count, at_once):
        layers = range(first, min(first + at_once, count))
        refits = _compensate(dense, windows, plan, settings, layers, progress)
        made = _route(dense, windows, plan, settings, layers, refits, progress)
        yield from _specialise(dense, windows, plan, settings, layers, made, progress)
        del refits, made  # before the next ones are made
    progress("experts", count, count)


def _compensate(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    settings: ReconstructSettings,
    layers: range,
    progress: Progress,
) -> list[Sequence[Refit]]:
    """Return each layer's refits, one per expert."""
    per_expert: list[Sequence[Refit]] = []
    for expert, windows_BT in enumerate(windows):
        progress(f"experts of {_named(layers)}: compensating", expert, len(windows))
        found = settings.compensation(dense, windows_BT, plan, expert, layers)
        per_expert.append([refit.scaled(plan.gain) for refit in found])
    return list(zip(*per_expert, strict=True))


def _route(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    settings: ReconstructSettings,
    layers: range,
    refits: Sequence[Sequence[Refit]],
    progress: Progress,
) -> list[LayerExperts]:
    if len(windows) == 1:
        rows = [torch.zeros(1, dense.hidden) for _ in layers]  # nobody reads them
    else:
        progress(f"experts of {_named(layers)}: routing", 0, 1)
        columns = [[refit.column_DW for refit in layer] for layer in refits]
        rows = settings.router(dense, windows, plan, columns, layers, settings.seed)
    return [
        LayerExperts(plan.keep_LEW[layer], own, row_ED)
        for layer, own, row_ED in zip(layers, refits, rows, strict=True)
    ]


def _specialise(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    settings: ReconstructSettings,
    layers: range,
    made: Sequence[LayerExperts],
    progress: Progress,
) -> Iterator[LayerExperts]:
    ridge, router = settings.compensation, settings.router
    rounds = settings.specialise.rounds > 0 and len(windows) > 1
    if not (rounds and isinstance(ridge, Ridge) and isinstance(router, Fitted)):
        yield from made
        return
    inputs = sample_inputs(dense, windows, settings.specialise.tokens, layers)
    for place, (layer, start) in enumerate(zip(layers, made, strict=True)):
        progress(f"experts of {_named(layers)}: specialising", place, len(layers))
        yield settings.specialise(dense, plan, layer, inputs[place], start, ridge, router)


def _named(layers: range) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
