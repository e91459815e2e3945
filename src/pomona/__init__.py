"""Pomona: personalised federated tuning of mixture-of-experts language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.api import evaluate, federate, load_personal, reconstruct

__version__ = "0.1.0"
__all__ = ["evaluate", "federate", "load_personal", "reconstruct"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in __all__:
        return getattr(import_module("pomona.api"), name)
    raise AttributeError(f"module 'pomona' has no attribute '{name}'")
