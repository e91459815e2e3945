"""The process that holds a site's model, kept warm between messages; another takes its place when it dies."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from socket import AF_UNIX, SOCK_STREAM, socket, socketpair

from pomona.errors import PomonaError
from pomona.parcel import Parcel, receive, send
from pomona.progress import Tell


@dataclass
class Worker:
    """A worker process.

    `command` starts it and is given the number of a socket, `first` is what it is told first.
    """

    command: Sequence[str]
    first: Parcel
    tell: Tell = field(repr=False)
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)
    _link: socket | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: bool = False

    def start(self) -> None:
        """Start the process; raises `PomonaError` when it refuses what it is told first."""
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [*self.command, str(number)],
            pass_fds=(number,),
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        theirs.close()
        threading.Thread(target=self._relay, args=(self._process,), daemon=True).start()
        self._link = ours
        answer = self._exchange(self.first)
        if answer is None:
            raise PomonaError(self._how_it_died())
        if answer.kind == "refused":
            raise PomonaError(str(answer.told["reason"]))

    @property
    def pid(self) -> int | None:
        """The id of the process that works now."""
        return self._process and self._process.pid

    def answer(self, parcel: Parcel) -> Parcel:
        """Have the worker answer; one that dies is started anew and asked once more.

        Raises `PomonaError` when that one dies too.
        """
        with self._lock:
            for again in (False, True):
                if self._process is None or self._process.poll() is not None:
                    self._start_anew()
                answer = self._exchange(parcel)
                if answer is not None:
                    return answer
                if self._closed:
                    raise PomonaError("this site is stopping")
                if not again:
                    self._start_anew()
            raise PomonaError(
                f"{self._how_it_died()} twice at the same work; see the last lines of the log, give the "
                "machine more memory or lower the recipe's local.batch"
            )

    def close(self) -> None:
        """End the process, and what it has started."""
        self._closed = True
        process = self._process
        if process is None:
            return
        if self._link is not None:
            self._link.close()
        for signal_, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)

    def _relay(self, process: subprocess.Popen[str]) -> None:
        """Tell what a process says on its way, and at its end."""
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self.tell(f"worker: {line.strip()}")

    def _start_anew(self) -> None:
        if self._link is not None:
            self._link.close()
        self.tell(f"{self._how_it_died()}; it is started anew")
        self.start()

    def _exchange(self, parcel: Parcel) -> Parcel | None:
        """Send a parcel and return the answer, or None when the worker has gone."""
        assert self._link is not None
        try:
            send(self._link, parcel)
            return receive(self._link)
        except OSError:
            return None

    def _how_it_died(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the worker was killed (out of memory?)"
        return f"the worker ended with code {code}"


def python_module(name: str) -> list[str]:
    """Return the command that runs a module with this Python."""
    return [sys.executable, "-m", name]
