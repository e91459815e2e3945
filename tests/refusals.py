"""A user's mistake is one sentence on stderr and exit code 2."""

import sys
from dataclasses import dataclass

import pytest

from pomona.cli.app import main


@dataclass(frozen=True)
class Refusal:
    """Run the command line in this process and expect one sentence."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> str:
        self.monkeypatch.setattr(sys, "argv", ["pomona", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return sentence(ended.value.code, self.capsys.readouterr().err)


def sentence(code: object, stderr: str) -> str:
    """Return the one sentence that a mistake ends in."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]
