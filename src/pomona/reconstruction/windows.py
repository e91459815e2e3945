"""Windows of the domains: which are drawn, and what a group of domains gets of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pomona.data.texts import encode_texts, sample_windows
from pomona.models.loading import load_tokenizer
from pomona.reconstruction.settings import ReconstructSettings
from pomona.shapes import Tokens


@dataclass(frozen=True)
class Windows:
    """Every domain's windows [B, T]: those that calibrate, others that measure pruned models."""

    calibration: Mapping[str, Tokens]
    affinity: Mapping[str, Tokens]


def draw_windows(
    folder: Path, domains: Mapping[str, Sequence[str]], settings: ReconstructSettings
) -> Windows:
    """Draw every domain's windows, from the tokenizer in `folder`; one domain's tokens are held at a time.

    Raises `PomonaError` for a domain that has less than one window.
    """
    tokenizer = load_tokenizer(folder)
    counts = {"calibration": settings.windows}
    if settings.compared_by(len(domains)) == "perplexity":
        counts["affinity"] = settings.affinity_windows
    drawn: dict[str, dict[str, Tokens]] = {"calibration": {}, "affinity": {}}
    for name, texts in domains.items():
        documents = encode_texts(texts, tokenizer)
        for purpose, count in counts.items():
            seed = f"{settings.seed}/{purpose}"
            drawn[purpose][name] = sample_windows(documents, count, settings.length, seed, name)
    return Windows(**drawn)


def equal_shares(windows: Mapping[str, Tensor], group: Sequence[str]) -> Tensor:
    """Give every domain of a group an equal share of the group's windows (DIVE, section 3.2).

    The domains take turns, so that whoever reads only the first windows sees all of them.
    """
    each = max(1, min(len(windows[domain]) for domain in group) // len(group))
    return torch.stack([windows[domain][:each] for domain in group], dim=1).flatten(0, 1)
