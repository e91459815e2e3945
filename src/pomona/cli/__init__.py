"""The command line: one sub-command per verb, each in its file."""

from pomona.cli.app import main

__all__ = ["main"]
