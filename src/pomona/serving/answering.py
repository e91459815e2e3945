"""One base that answers for many clients: what is asked meanwhile shares the next batch."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pomona.data.templates import Template
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
from pomona.models.loading import context_length
from pomona.serving.asked import Asked
from pomona.serving.decoding import decode, end_tokens

_GATHERING = 0.01
"""Seconds in which requests that come together find each other."""

End = Literal["stop", "length"]


@dataclass(frozen=True)
class Served:
    """A personal model that is served: what hangs on the base, and how its rows were asked."""

    base: FrozenBase = field(repr=False)
    state: ClientState = field(repr=False)
    template: Template

    @property
    def context(self) -> int:
        """How many tokens a conversation may have, the answer included."""
        return context_length(self.base.model)


@dataclass(eq=False)
class Answer:
    """An answer on its way: its text comes in pieces."""

    asked: Asked
    tokens: list[int] = field(default_factory=list[int])
    end: End = "length"
    cancelled: bool = False
    _pieces: queue.SimpleQueue[str | Exception | None] = field(
        default_factory=queue.SimpleQueue[str | Exception | None], repr=False
    )
    _text: str = ""

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces as they come; raises what went wrong."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def hear(self, token: int, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> bool:
        """Take a token; return whether the answer is over."""
        if token in ends:
            self.end = "stop"
            self._say(final=True, tokenizer=tokenizer)
            return True
        self.tokens.append(token)
        return self._say(final=False, tokenizer=tokenizer) or self.cancelled

    def finish(self, tokenizer: PreTrainedTokenizerBase, error: Exception | None = None) -> None:
        """Say what is left, and that there is no more."""
        if error is None:
            self._say(final=True, tokenizer=tokenizer)
        else:
            self._pieces.put(error)
        self._pieces.put(None)

    def _say(self, final: bool, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Hand on what can be told for sure; return whether a text to stop at has come."""
        text = str(tokenizer.decode(self.tokens, skip_special_tokens=True))
        at = [place for stop in self.asked.stop if (place := text.find(stop)) >= 0]
        if at:
            self.end, text = "stop", text[: min(at)]
        elif not final:
            if text.endswith("\ufffd"):  # half a character
                return False
            text = text[: len(text) - self._held_back(text)]
        if len(text) > len(self._text):
            self._pieces.put(text[len(self._text) :])
            self._text = text
        return bool(at)

    def _held_back(self, text: str) -> int:
        """Return how much of the end may be the beginning of a text to stop at."""
        longest = max((len(stop) for stop in self.asked.stop), default=1) - 1
        fits = (
            size
            for size in range(min(longest, len(text)), 0, -1)
            if any(stop.startswith(text[-size:]) for stop in self.asked.stop)
        )
        return next(fits, 0)


class Answering:
    """A thread that answers what is asked, up to `batch` prompts at once.

    `models` are personal models on the same base; those whose parts have the same form share a batch.
    """

    def __init__(
        self, models: Mapping[str, Served], tokenizer: PreTrainedTokenizerBase, batch: int = 16
    ):
        self.models, self.tokenizer, self.batch = models, tokenizer, batch
        self._waiting: list[tuple[str, Answer]] = []
        self._news = threading.Condition()
        self._active: list[Answer] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Answering":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        with self._news:
            self._over = True
            for answer in (*self._active, *(answer for _, answer in self._waiting)):
                answer.cancelled = True
            self._news.notify()
        self._thread.join()

    def ask(self, model: str, asked: Asked) -> Answer:
        """Have a model answer; raises `PomonaError` for one that is not served."""
        if model not in self.models:
            raise PomonaError(f'there is no model "{model}"; there are {", ".join(self.models)}')
        answer = Answer(asked)
        with self._news:
            if self._over:
                raise PomonaError("the server is stopping")
            self._waiting.append((model, answer))
            self._news.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._over)
                if self._over:
                    break
            time.sleep(_GATHERING)
            self._answer(self._next())
        for _, answer in self._waiting:
            answer.finish(self.tokenizer, PomonaError("the server is stopping"))

    def _next(self) -> list[tuple[str, Answer]]:
        """Take who has waited longest, and of the others those that fit beside."""
        with self._news:
            for _, answer in self._waiting:
                if answer.cancelled:
                    answer.finish(self.tokenizer)
            self._waiting = [one for one in self._waiting if not one[1].cancelled]
            if not self._waiting:
                return []
            form = _form(self.models[self._waiting[0][0]])
            fitting = [one for one in self._waiting if _form(self.models[one[0]]) == form]
            chosen = fitting[: self.batch]
            self._waiting = [one for one in self._waiting if one not in chosen]
            return chosen

    def _answer(self, chosen: Sequence[tuple[str, Answer]]) -> None:
        if not chosen:
            return
        answers = self._active = [answer for _, answer in chosen]
        error = None
        try:
            served = [self.models[name] for name, _ in chosen]
            base, states = served[0].base, [own.state for own in served]
            ends = end_tokens(base, self.tokenizer)

            def hear(row: int, token: int) -> bool:
                return answers[row].hear(token, self.tokenizer, ends)

            decode(base, states, [answer.asked for answer in answers], self.tokenizer, hear)
        except PomonaError as raised:
            error = raised
        except Exception as raised:  # those who wait are told, and the next are answered
            error = PomonaError(f"the answer failed: {str(raised)[:300]}")
        for answer in answers:
            answer.finish(self.tokenizer, error)
        self._active = []


def _form(served: Served) -> tuple[object, ...]:
    """What clients in one batch have in common: the rules by which their parts hang on the base."""
    base, state = served.base, served.state
    rules = (base.lora, base.graft, base.personal, base.shared_expert)
    return (*rules, bool(state.adapter), bool(state.graft), bool(state.personal))
