"""The Alpaca prompt (Taori et al., Stanford Alpaca, 2023), which FLEx trains with."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pomona.data.row import Row

WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)

_TURN = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


@dataclass(frozen=True)
class Alpaca:
    """Two forms, with and without an input.

    Earlier turns of a conversation stand between the first sentence and the instruction, a user's
    under "### Instruction:", the assistant's under "### Response:", a system's as it is.
    """

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the prompt; it does not depend on the tokenizer."""
        form = WITH_CONTEXT if row.context.strip() else ALONE
        asked = form.format(instruction=row.instruction.strip(), context=row.context.strip())
        if not row.history:
            return asked
        first, _, rest = asked.partition("\n\n")
        turns = [_TURN[role] + text.strip() for role, text in row.history]
        return "\n\n".join((first, *turns, rest))
