"""What a model is asked: a conversation as tokens, and how the answer is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pomona.data.examples import encode_prompt
from pomona.data.row import Row, Turn
from pomona.data.templates import Template
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Asked:
    """A prompt's tokens, and how the answer to it is drawn.

    At most `new_tokens` tokens, from the likeliest ones that hold the share `top_p` at `temperature`; 0 takes
    the likeliest always. The same `seed` draws the same. It ends before any of the texts `stop`.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PomonaError("the prompt is empty; ask something")
        if self.new_tokens < 1:
            raise PomonaError(f"{self.new_tokens} new tokens are no answer; use 1 or more")
        if not 0 <= self.temperature <= 100:
            raise PomonaError(f"temperature {self.temperature} is not between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise PomonaError(f"top_p {self.top_p} is not a share; use for example 0.9")
        if any(not text for text in self.stop):
            raise PomonaError("a text to stop at is empty; leave it out")


def prompt_tokens(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
) -> tuple[int, ...]:
    """Return a conversation's tokens up to where the assistant answers, as a client's rows were trained.

    Raises `PomonaError` when it does not end with the user's turn, or is longer than `room` tokens.
    """
    if not turns or turns[-1][0] != "user":
        raise PomonaError("a conversation ends with what the user says")
    row = Row(turns[-1][1], "", "", history=tuple(turns[:-1]))
    return check_room(encode_prompt(row, template, tokenizer, 1 << 30), room)


def check_room(tokens: Sequence[int], room: int) -> tuple[int, ...]:
    """Return a prompt's tokens; raises `PomonaError` when there are more than `room`."""
    if len(tokens) > room:
        raise PomonaError(
            f"the conversation has {len(tokens)} tokens, and with the answer there is room for {room}; "
            "start a new one, or ask for fewer new tokens"
        )
    return tuple(tokens)
