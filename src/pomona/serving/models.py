"""Which personal models there are to talk to: folders of clients' parts on one base."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pomona.artifacts.origin import prompt_for
from pomona.artifacts.personal import PersonalModel, load_base, put_on
from pomona.errors import PomonaError
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


def clients_of_run(run: Path, base: PersonalModel) -> dict[str, PersonalModel]:
    """Return every client's personal model as a finished run has published it.

    Raises `PomonaError` for a folder that holds none.
    """
    shared = run / "shared"
    folders = sorted(path for path in (run / "clients").glob("*") if path.is_dir())
    if not folders and not shared.is_dir():
        raise PomonaError(
            f"{run} holds no personal models; give the run folder of a finished federation"
        )
    found: dict[str, PersonalModel] = {}
    for folder in folders:
        adapter = next((p for p in (folder / "adapter", shared) if p.is_dir()), None)
        graft, personal = (
            own if (own := folder / part).is_dir() else None for part in ("graft", "personal")
        )
        found[folder.name] = replace(base, adapter=adapter, graft=graft, personal=personal)
    if shared.is_dir() and not folders:
        found["shared"] = replace(base, adapter=shared)
    return found
