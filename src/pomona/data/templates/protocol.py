"""What a template is."""

from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from pomona.data.row import Row


@runtime_checkable
class Template(Protocol):
    """Turns a row, with its history, into the text after which the answer begins."""

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the prompt's text; its beginning-of-sequence token is added when encoding."""
        ...
