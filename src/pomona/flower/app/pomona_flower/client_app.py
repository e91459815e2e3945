"""A client, as Flower finds it."""

from pomona.flower.client_app import app

__all__ = ["app"]
