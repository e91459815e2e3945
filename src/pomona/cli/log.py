"""What a process that runs for days tells: lines with their time, on the screen and in one file."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from pomona.cli.console import console


@dataclass
class Log:
    """A log file, appended to; what is told, not only noted, is printed as well."""

    path: Path
    last: str = ""
    _lock: Lock = field(default_factory=Lock, repr=False)

    def tell(self, sentence: str) -> None:
        """Write a line, on disk too as long as there is room for it."""
        line = _dated(sentence)
        with self._lock:
            self.last = line
            console.print(line)
            self._write(line)

    def note(self, sentence: str) -> None:
        """Write a line to the file alone."""
        with self._lock:
            self._write(_dated(sentence))

    def _write(self, line: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass  # a full disk must not end what else goes on


def _dated(sentence: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {' '.join(sentence.splitlines())}"
