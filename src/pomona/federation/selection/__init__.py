"""Which pretrained expert a client's graft grows from: one rule per file."""

from pomona.federation.selection.chance import RandomExpert
from pomona.federation.selection.protocol import Selection
from pomona.federation.selection.reconstruction import Reconstruction

SELECTIONS: dict[str, type[Reconstruction] | type[RandomExpert]] = {
    "reconstruction": Reconstruction,
    "random": RandomExpert,
}

__all__ = ["SELECTIONS", "RandomExpert", "Reconstruction", "Selection"]
