"""Which pretrained experts a client's grafts grow from: one rule per file."""

from pomona.federation.selection.chance import RandomExpert
from pomona.federation.selection.gradient import Gradient
from pomona.federation.selection.greedy import Greedy
from pomona.federation.selection.protocol import Selection
from pomona.federation.selection.reconstruction import Reconstruction
from pomona.federation.selection.same import SameExpert
from pomona.federation.selection.usage import Usage

SELECTIONS: dict[str, type[Selection]] = {
    "reconstruction": Reconstruction,
    "greedy": Greedy,
    "usage": Usage,
    "gradient": Gradient,
    "random": RandomExpert,
    "same": SameExpert,
}

__all__ = [
    "SELECTIONS",
    "Gradient",
    "Greedy",
    "RandomExpert",
    "Reconstruction",
    "SameExpert",
    "Selection",
    "Usage",
]
