"""Who holds what, as a table and as a picture."""

import csv
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Int
from numpy import ndarray

from pomona.artifacts.figures import MOST_ROWS, name_rows, svg
from pomona.federation.holdings import Holdings
from pomona.files import write_text

_MOST_CATEGORIES, _MOST_NUMBERS = 24, 400


def write_holdings(folder: Path, holdings: Holdings) -> None:
    """Write holdings.csv (client, split, category, rows) and its plot, holdings.svg."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("client", "split", "category", "rows"))
    for split, held in (("train", holdings.train), ("test", holdings.test)):
        for client, counts in held.items():
            for category, count in zip(holdings.categories, counts, strict=True):
                lines.writerow((client, split, category, count))
    write_text(folder / "holdings.csv", text.getvalue())
    write_text(folder / "holdings.svg", holdings_map(holdings))


def holdings_map(holdings: Holdings) -> str:
    """Clients by categories as SVG: train rows as colours and, where there is room, as numbers."""
    categories, rows_CK = _drawn(holdings)
    names = [f"{name} ({own.sum():,})" for name, own in zip(holdings.train, rows_CK, strict=True)]
    size = (8.0, 1.4 + 0.28 * min(max(len(names), 3), MOST_ROWS))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(rows_CK, aspect="auto", cmap="Blues", vmin=0)
    name_rows(axes, names)
    axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
    figure.colorbar(image, ax=axes, label="train rows")
    if rows_CK.size <= _MOST_NUMBERS:
        half = rows_CK.max() / 2
        for client, category in np.argwhere(rows_CK > 0):
            count = int(rows_CK[client, category])
            colour = "white" if count > half else "black"
            at = (float(category), float(client))
            axes.text(*at, str(count), ha="center", va="center", color=colour, fontsize="small")
    return svg(figure)


def _drawn(holdings: Holdings) -> tuple[list[str], Int[ndarray, "C K"]]:
    """Return the categories that are drawn, the largest where there are many, and rows [C, K]."""
    rows_CK = np.array(list(holdings.train.values()))
    names = [name or "no category" for name in holdings.categories]
    if len(names) <= _MOST_CATEGORIES:
        return names, rows_CK
    order = np.argsort(-rows_CK.sum(0), kind="stable")
    kept, rest = np.sort(order[: _MOST_CATEGORIES - 1]), order[_MOST_CATEGORIES - 1 :]
    others_C1 = rows_CK[:, rest].sum(1, keepdims=True)
    return (
        [*(names[k] for k in kept), f"{len(rest)} others"],
        np.concatenate([rows_CK[:, kept], others_C1], axis=1),
    )
