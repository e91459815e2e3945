"""The coordinator, as Flower finds it."""

from pomona.flower.server_app import app

__all__ = ["app"]
