"""Plots over rounds as inline SVG."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pomona.artifacts.figures import svg
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.rounds import client_series, mean_series

Color = str | tuple[float, float, float, float]

_PANELS = {
    "training": "training loss",
    "shared": "test loss, shared model",
    "personal": "test loss, personal model",
}
_MANY = 10  # more clients than a plot can show as lines of their own


def convergence(methods: Mapping[str, Sequence[FinishedRun]]) -> str:
    """Draw losses over the rounds: every client of every seed thin, the mean thick, one colour a method."""
    shown = [m for m in _PANELS if any(r.results.get(m, True) for g in methods.values() for r in g)]
    size = (7.0, 0.4 + 2.6 * len(shown))
    figure, grid = plt.subplots(len(shown), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, model in zip(grid[:, 0], shown, strict=True):
        for color, (method, group) in zip(_colors(len(methods)), methods.items(), strict=True):
            _draw(axes, group, model, color, method)
        if model != "training":
            base = next(iter(methods.values()))[0].results["base"]["mean"]["loss"]
            axes.axhline(base, color="#718096", linestyle="--", label="base (untuned)")
        axes.set(title=_PANELS[model], ylabel="nats per answer token")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[-1, 0].set_xlabel("round")
    # Panels may lack a method or the base: every name once.
    named = dict[str, Artist]()
    for axes in grid[:, 0]:
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    figure.legend(
        list(named.values()),
        list(named),
        frameon=False,
        loc="outside upper center",
        ncols=min(4, len(named)),
    )
    return svg(figure)


def _colors(count: int) -> list[Color]:
    """Return the house's colours, or as many as there have to be."""
    if count <= 5:
        return [f"C{number}" for number in range(count)]
    return [plt.get_cmap("turbo")(number / (count - 1)) for number in range(count)]


def _draw(axes: Axes, runs: Sequence[FinishedRun], model: str, color: Color, method: str) -> None:
    start = [own for run in runs for own in client_series(run, "base").values()]
    series = [own for run in runs for own in client_series(run, model).values()]
    if not series:
        return
    if len(series) <= _MANY * len(runs):
        for own in series:
            axes.plot(list(own), list(own.values()), color=color, alpha=0.25, linewidth=0.8)
    begun = {} if model == "training" else mean_series(start)
    mean = begun | mean_series(series)
    axes.plot(list(mean), list(mean.values()), color=color, linewidth=2.2, label=method)


def layers_by_round(methods: Mapping[str, Mapping[int, NDArray[np.float64]]], ylabel: str) -> str:
    """Draw one thin line per layer over the rounds and their mean thick, a panel per method."""
    rows = -(-len(methods) // 2)
    size = (8.0, 0.4 + 2.6 * rows)
    figure, grid = plt.subplots(
        rows, 2, figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for place, axes in enumerate(grid.flat):
        if place >= len(methods):
            axes.set_axis_off()
            continue
        method, found = list(methods.items())[place]
        values_QL, colors = np.stack(list(found.values())), plt.get_cmap("viridis")
        layers = values_QL.shape[1]
        for layer in range(layers):
            color = colors(layer / max(layers - 1, 1))
            axes.plot(list(found), values_QL[:, layer], color=color, alpha=0.5, linewidth=0.8)
        axes.plot(list(found), values_QL.mean(1), color="#1a202c", linewidth=2.2)
        axes.set(title=method, xlabel="round", ylabel=ylabel if place % 2 == 0 else "")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return svg(figure)
