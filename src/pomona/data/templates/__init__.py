"""Prompt templates by name; the same object serves training and evaluation."""

from pomona.data.templates.alpaca import Alpaca
from pomona.data.templates.chat import Chat
from pomona.data.templates.protocol import Template

TEMPLATES: dict[str, type[Alpaca] | type[Chat]] = {"alpaca": Alpaca, "chat": Chat}

__all__ = ["TEMPLATES", "Alpaca", "Chat", "Template"]
