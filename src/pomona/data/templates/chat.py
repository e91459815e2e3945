"""The tokenizer's own chat template."""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pomona.data.row import Row
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Chat:
    """One user turn of instruction and context, after the turns before it, in the tokenizer's own template.

    Attributes:
        system: System turn of rows that have none of their own.
    """

    system: str = ""

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the rendered conversation up to where the assistant answers.

        Raises `PomonaError` when the tokenizer has no chat template or its template refuses the turns.
        """
        if not tokenizer.chat_template:
            raise PomonaError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
                'use the template "alpaca"'
            )
        asked = "\n\n".join(part for part in (row.instruction.strip(), row.context.strip()) if part)
        turns = [{"role": role, "content": text.strip()} for role, text in row.history]
        if self.system and (not row.history or row.history[0][0] != "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        turns.append({"role": "user", "content": asked})
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # some take no system turn, or want turns to alternate
            raise PomonaError(
                f"{row.where or row.instruction[:40]}: the chat template of {tokenizer.name_or_path} "
                f'refuses the conversation ({error}); leave the line out or use the template "alpaca"'
            ) from error
        return str(text)
