"""What a site lets out and whom it works for; anything else is refused with a sentence."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from pomona.errors import PomonaError


@dataclass(frozen=True)
class Policy:
    """A site's own rules.

    Attributes:
        tensors: Patterns of names, of which one must fit every tensor that leaves.
        largest_message: In bytes, either way.
        recipes: SHA-256 of recipes, as `pomona serve` tells them; without any every recipe is accepted, unless
            it names code of another package.
        models: SHA-256 of base models, as `pomona serve` tells them; without any every base is accepted.
        sums_only: Take part in secure aggregation alone.
    """

    tensors: tuple[str, ...] = ("*",)
    largest_message: int = 2_000_000_000
    recipes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    sums_only: bool = False

    def __post_init__(self) -> None:
        if self.largest_message < 1:
            raise PomonaError(
                f"policy largest_message {self.largest_message} is not positive; give a number of bytes"
            )

    def check_recipe(self, text: str) -> None:
        """Raise `PomonaError` for a recipe that is not accepted."""
        own = recipe_digest(text)
        if self.recipes and own not in self.recipes:
            raise PomonaError(f"the policy of this site does not accept the recipe {own}")

    def check_sums(self, secure_aggregation: bool) -> None:
        """Raise `PomonaError` where the coordinator would see this site's update."""
        if self.sums_only and not secure_aggregation:
            raise PomonaError(
                "the policy of this site lets only sums be seen, and the recipe has no secure_aggregation"
            )

    def check_model(self, files: Mapping[str, str]) -> None:
        """Raise `PomonaError` for a base model, told by its files' digests, that is not accepted."""
        own = model_digest(files)
        if self.models and own not in self.models:
            raise PomonaError(f"the policy of this site does not accept the base model {own}")

    def check_tensors(self, names: Iterable[str]) -> None:
        """Raise `PomonaError` for a tensor that may not leave."""
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in self.tensors):
                raise PomonaError(f'the policy of this site does not let the tensor "{name}" leave')

    def check_size(self, way: str, size: int) -> None:
        """Raise `PomonaError` for a message that is too large."""
        if size > self.largest_message:
            raise PomonaError(
                f"a message that {way} has {size} bytes, and the policy of this site allows "
                f"{self.largest_message}"
            )


def recipe_digest(text: str) -> str:
    """Return the SHA-256 of a recipe's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def model_digest(files: Mapping[str, str]) -> str:
    """Return one SHA-256 of a checkpoint, of its files' names and digests."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
