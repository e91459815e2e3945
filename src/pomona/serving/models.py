"""Which personal models there are to talk to: folders of clients' parts on one base."""

from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

from pomona.artifacts.origin import prompt_for
from pomona.artifacts.personal import PersonalModel, load_base, put_on
from pomona.models.loading import load_tokenizer
from pomona.serving.answering import Served

BASE = "base"
"""What the base without any part is called."""


def load_served(
    personal: Mapping[str, PersonalModel],
    template: str | None = None,
    note: Callable[[str], None] = lambda told: None,
) -> tuple[dict[str, Served], PreTrainedTokenizerBase]:
    """Load one base and the parts of every personal model on it; all have the same `source`.

    Prompts have the form that a client's rows had, unless `template` names another; `note` is told then. Raises
    `PomonaError` for parts that do not belong to the base.
    """
    first = next(iter(personal.values()))
    model, tokenizer = load_base(first.source, first.device), load_tokenizer(first.source)
    served: dict[str, Served] = {}
    for name, own in personal.items():
        form = prompt_for(template, own.parts, note)
        if not own.parts and template is None and tokenizer.chat_template:
            form = prompt_for("chat", [], note)
        base, state = put_on(model, own)
        served[name] = Served(base, state, form)
    return served, tokenizer
