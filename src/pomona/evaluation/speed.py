"""How fast models generate: the prompt at once, then token after token."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from pomona.progress import Progress, silent
from pomona.shapes import Tokens


@dataclass(frozen=True)
class Speed:
    """The seconds every repeat took for `prompt` tokens at once, then `new_tokens` one by one."""

    prompt: int
    new_tokens: int
    prefill_seconds: tuple[float, ...] = field(repr=False)
    decode_seconds: tuple[float, ...] = field(repr=False)

    @property
    def prefill(self) -> float:
        """Prompt tokens per second, of the median repeat."""
        return self.prompt / median(self.prefill_seconds)

    @property
    def decode(self) -> float:
        """New tokens per second, of the median repeat."""
        return self.new_tokens / median(self.decode_seconds)


def generation_speeds(
    models: Mapping[str, nn.Module],
    prompt_BT: Tokens,
    new_tokens: int,
    repeats: int,
    progress: Progress = silent,
    worn: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Speed]:
    """Time greedy generation with a cache for a batch of one, the models side by side.

    Every repeat runs all models, in turn forwards and backwards, so that whatever else the machine
    does meets all of them. A first repeat warms up and is thrown away. An end-of-sequence token ends
    nothing: every repeat does the same work. `worn` says what is on a model meanwhile, by its name, so
    that one model in memory can be measured with and without a client's parts; putting them on is not
    timed.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        progress("generating", repeat, repeats + 1)
        for name in models if repeat % 2 else reversed(list(models)):
            with (worn or {}).get(name, nullcontext)():
                seconds[name].append(_generate(models[name], prompt_BT, new_tokens))
    progress("generating", repeats + 1, repeats + 1)
    return {
        name: Speed(prompt_BT.shape[1], new_tokens, *zip(*timed[1:], strict=True))
        for name, timed in seconds.items()
    }


@torch.no_grad()
def _generate(model: nn.Module, prompt_BT: Tokens, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of the prompt and of the tokens after it; reading a token waits for it."""
    start = time.perf_counter()
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    token = int(output.logits[0, -1].argmax())
    first = time.perf_counter()
    for _ in range(new_tokens):
        step_BT = torch.tensor([[token]], device=prompt_BT.device)
        output = model(input_ids=step_BT, past_key_values=output.past_key_values, use_cache=True)
        token = int(output.logits[0, -1].argmax())
    return first - start, time.perf_counter() - first
