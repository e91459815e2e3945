"""Plots as inline SVG; every figure names the file its numbers come from."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from cycler import cycler

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from pomona.artifacts.table import Line
from pomona.evaluation.experts import ExpertLoad
from pomona.reconstruction.affinity import DomainAffinity
from pomona.reconstruction.cluster import Clusters

# The same run gives the same page: no dates, no random element ids. Text stays text, in the page's font.
mpl.rcParams.update(
    {
        "svg.hashsalt": "pomona",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=["#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b7791f"]),
    }
)


MOST_ROWS = 40
"""A map with more rows is no higher, and names some of them."""


def per_client(lines: Sequence[Line], ylabel: str) -> str:
    """One bar per client and method."""
    clients = list(lines[0].clients)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    width = 0.8 / len(lines)
    for place, line in enumerate(lines):
        left = [i + (place - (len(lines) - 1) / 2) * width for i in range(len(clients))]
        color = "#a0aec0" if place == 0 else None
        axes.bar(left, [line.clients[c] for c in clients], width, label=line.method, color=color)
    axes.set_xticks(range(len(clients)), clients, rotation=12 if len(clients) > 3 else 0)
    values = [value for line in lines for value in line.clients.values()]
    if min(values) > 0.5 * max(values):  # small differences of large figures need a closer look
        axes.set_ylim(min(values) * 0.95, max(values) * 1.02)
    axes.set_ylabel(ylabel)
    _legend_above(figure, axes)
    return svg(figure)


def _legend_above(figure: Figure, axes: Axes) -> None:
    """Put the legend where no bar and no line can be."""
    names = axes.get_legend_handles_labels()[1]
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        loc="outside upper center",
        ncols=min(4, len(names)),
    )


def heat_map(
    matrix: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str
) -> str:
    """A matrix with its values as colours: expert load, gate openness, affinity."""
    size = (7, 0.8 + 0.32 * min(max(len(rows), 3), MOST_ROWS))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(matrix, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=30 if len(columns) > 10 else 0)
    name_rows(axes, rows)
    figure.colorbar(image, ax=axes, label=label)
    return svg(figure)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a map; where they are too many, every second, third or so."""
    axes.set_yticks(*_thinned(names, MOST_ROWS))


def _thinned(names: Sequence[str], most: int) -> tuple[range, list[str]]:
    """Return the places that are named and their names, evenly: all of them if they are few."""
    places = range(0, len(names), max(1, -(-len(names) // most)))
    return places, [names[place] for place in places]


def message_map(
    messages: Mapping[str, Sequence[Sequence[float]]], clients: Sequence[str], rounds: Sequence[int]
) -> str:
    """Clients by rounds, a panel per way of messages, on one scale from nothing; NaN is no message."""
    size = (8.0, 1.0 + 0.24 * min(max(len(clients), 3), MOST_ROWS))
    figure, grid = plt.subplots(
        1, len(messages), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    most = max(float(np.nanmax(matrix, initial=0.0)) for matrix in messages.values())
    for place, (axes, (way, matrix)) in enumerate(zip(grid[0], messages.items(), strict=True)):
        image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, vmax=most)
        axes.set(title=way, xlabel="round")
        axes.set_xticks(*_thinned([str(round_) for round_ in rounds], 10))
        name_rows(axes, clients)
        if place == 0:
            figure.colorbar(image, ax=grid[0].tolist(), label="kB")
    return svg(figure)


def expert_load_map(routing: Mapping[str, ExpertLoad]) -> str:
    """Domains or clients by experts, one panel per MoE layer, all of them on one colour scale."""
    domains, layers = list(routing), next(iter(routing.values())).num_experts
    rows = -(-len(layers) // 2)
    size = (8.0, 0.6 + rows * (0.9 + 0.22 * min(len(domains), MOST_ROWS)))
    figure, grid = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False)
    most = max(float(load.share_LE.max()) for load in routing.values())
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_axis_off()
            continue
        shares = [load.layer(place) for load in routing.values()]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=most)
        name_rows(axes, domains if place % 2 == 0 else [""] * len(domains))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"MoE layer {place}", fontsize="medium")
        if place == 0:
            figure.colorbar(image, ax=grid.ravel().tolist(), label="share of assignments")
    return svg(figure)


def affinity_map(affinity: DomainAffinity, clusters: Clusters) -> str:
    """The domains' correlations as a heat map, in the order of the tree drawn beside it.

    Where perplexity decides, what the scores say stands on its other side in the same order, with the
    rank correlation of both in the title. Each has a colour scale of its own: the order is compared.
    """
    maps = {"scores" if affinity.perplexity_MM is None else "perplexity": affinity.correlation_MM}
    if affinity.by_scores_MM is not None:
        maps["scores"] = affinity.by_scores_MM
    size = 1.6 + 0.34 * len(affinity.domains)
    figure, (tree, *panels) = plt.subplots(
        1,
        1 + len(maps),
        figsize=(size * len(maps) + 3, size + 0.5 * (len(maps) - 1)),
        layout="constrained",
        width_ratios=[1, *[3] * len(maps)],
    )
    order = _tree(tree, clusters)
    names = [affinity.domains[i] for i in order]
    for place, (axes, (kind, matrix_MM)) in enumerate(zip(panels, maps.items(), strict=True)):
        shown_MM = matrix_MM[order][:, order].numpy()
        image = axes.imshow(shown_MM, aspect="auto", cmap="viridis")
        axes.set_title(f"by {kind}", fontsize="medium")
        axes.set_xticks(range(len(names)), names, rotation=60)
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
        label = "correlation" if place == len(maps) - 1 else ""
        figure.colorbar(image, ax=axes, label=label)
    if len(maps) > 1:
        found = "not defined" if affinity.agreement is None else f"{affinity.agreement:.3f}"
        figure.suptitle(f"rank correlation of both affinities: {found}", fontsize="medium")
    return svg(figure)


def _tree(axes: Axes, clusters: Clusters) -> list[int]:
    """Draw the tree of the clusters; return its leaves from the top down."""
    drawn = dendrogram(
        np.array(clusters.tree),
        ax=axes,
        orientation="left",
        color_threshold=0,
        above_threshold_color="#4a5568",
    )
    axes.invert_yaxis()  # the first leaf on top, as the first row of the map
    axes.set_axis_off()
    return cast(list[int], drawn["leaves"])


def svg(figure: Any) -> str:
    """Return a figure as one SVG element, without a date, and close it.

    The solver of a layout leaves the last bits of a place to chance, and ids are hashed from it: rounded.
    """
    figure.set_dpi(72)  # an SVG's
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(part, 6) for part in axes.get_position(original=True).bounds])
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
