"""Print the folder of the app."""

from pathlib import Path

print(Path(__file__).parent)  # noqa: T201
