"""Pomona: personalised federated tuning of mixture-of-experts language models."""

__version__ = "0.1.0"
