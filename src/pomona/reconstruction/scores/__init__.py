"""Importance of FFN channels: one score per file."""

from pomona.reconstruction.scores.magnitude import Magnitude
from pomona.reconstruction.scores.protocol import Score, score_layers
from pomona.reconstruction.scores.wanda import Wanda
from pomona.reconstruction.scores.wifv import WIFV

SCORES: dict[str, type[WIFV] | type[Wanda] | type[Magnitude]] = {
    "wifv": WIFV,
    "wanda": Wanda,
    "magnitude": Magnitude,
}

__all__ = ["SCORES", "WIFV", "Magnitude", "Score", "Wanda", "score_layers"]
