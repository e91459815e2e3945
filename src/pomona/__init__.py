"""Pomona: personalised federated tuning of mixture-of-experts language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.artifacts.personal import load_personal as load_personal

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name == "load_personal":
        from pomona.artifacts.personal import load_personal

        return load_personal
    raise AttributeError(f"module 'pomona' has no attribute '{name}'")
