"""What reconstruction needs to know of a dense family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pomona.models.weights import Checkpoint


@dataclass(frozen=True)
class DenseFamily:
    """Where the FFN lies in a dense checkpoint, and which stock mixture holds the result.

    `mlp` is the prefix of a layer's FFN with `{layer}`; `container(config, experts, active, width)`
    returns the mixture's config.json; `expert` and `router` are the container's tensor names on disk;
    `check` raises `PomonaError` for a checkpoint the container cannot hold.
    """

    mlp: str
    container: Callable[[dict[str, Any], int, int, int], dict[str, Any]]
    expert: str
    router: str
    check: Callable[[Checkpoint], None]
