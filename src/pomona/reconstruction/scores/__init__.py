"""Importance of FFN channels: one score per file."""

from pomona.reconstruction.scores.chance import RandomScore
from pomona.reconstruction.scores.magnitude import Magnitude
from pomona.reconstruction.scores.protocol import Score, score_layers
from pomona.reconstruction.scores.taylor import Taylor
from pomona.reconstruction.scores.wanda import Wanda
from pomona.reconstruction.scores.wifv import WIFV

SCORES: dict[str, type[Score]] = {
    "wifv": WIFV,
    "wanda": Wanda,
    "magnitude": Magnitude,
    "taylor": Taylor,
    "random": RandomScore,
}

__all__ = [
    "SCORES",
    "WIFV",
    "Magnitude",
    "RandomScore",
    "Score",
    "Taylor",
    "Wanda",
    "score_layers",
]
