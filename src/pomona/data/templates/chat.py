"""The tokenizer's own chat template."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pomona.data.row import Row
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Chat:
    """One user turn of instruction and context, after an optional `system` turn."""

    system: str = ""

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the rendered conversation up to where the assistant answers.

        Raises `PomonaError` when the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise PomonaError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
                'use the template "alpaca"'
            )
        asked = "\n\n".join(part for part in (row.instruction.strip(), row.context.strip()) if part)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": asked})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(text)
