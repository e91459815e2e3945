"""Evaluate: what a model, or a client's personal model, is worth on text and on rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.origin import check_base, prompt_for
from pomona.data.examples import encode, padding_id
from pomona.data.rows import read_rows
from pomona.data.templates import Template
from pomona.data.texts import consecutive_windows, has_held_out, read_domains, read_texts
from pomona.errors import PomonaError
from pomona.evaluation.loss import RowLoss, perplexity, text_loss
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import selected_experts
from pomona.federation.measure import Evaluation, answers_of, loss_summary, losses_of
from pomona.federation.update import ClientState
from pomona.models.experts import ExpertSite, find_expert_sites, freeze
from pomona.models.loading import context_length, load_model, load_tokenizer
from pomona.models.lora import LoRA
from pomona.models.peft_format import read_adapter
from pomona.progress import Progress, silent

Figures = dict[str, dict[str, float]]


def measure(
    source: str,
    text: str | None,
    rows: Path | None,
    adapter: Path | None,
    graft: Path | None,
    template: str | None,
    limit: int,
    length: int | None,
    new_tokens: int,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda told: None,
) -> Figures:
    """Return the figures of each text domain (loss, perplexity) or of the rows (and ROUGE-L).

    Without a `length` the longest row or window has 512 tokens, or what the model's context holds.
    Without a `template` rows are asked as the adapter or graft says it was trained, else as Alpaca's;
    `note` is told when they are asked otherwise.

    Raises `PomonaError` when there is nothing to measure on or the length does not fit.
    """
    _check(text, rows, limit, 512 if length is None else length, new_tokens)
    parts = [part for part in (adapter, graft) if part is not None]
    form = prompt_for(template, parts if rows is not None else [], note)
    base, state = _personal(source, adapter, graft)
    if length is None:
        length = min(512, context_length(base.model))
    elif length > context_length(base.model):
        raise PomonaError(
            f"length {length} is longer than the context of {source}, "
            f"{context_length(base.model)} tokens; make it smaller"
        )
    if rows is not None:
        return _on_rows(source, base, state, rows, form, limit, length, new_tokens, progress)
    return _on_text(source, base, state, str(text), limit, length, progress)


def _check(
    text: str | None,
    rows: Path | None,
    limit: int,
    length: int,
    new_tokens: int,
) -> None:
    """See what can be seen before a model is loaded."""
    if (text is None) == (rows is None):
        raise PomonaError("give either --text or --rows to measure on")
    for name, value, least in (
        ("limit", limit, 0),
        ("length", length, 2),
        ("new tokens", new_tokens, 0),
    ):
        if value < least:
            raise PomonaError(f"{name} {value} is too small; use {least} or more")
    if rows is not None and new_tokens >= length:
        raise PomonaError(
            f"new tokens {new_tokens} leave no room for a prompt in length {length}; "
            "make one smaller or the other larger"
        )


def _personal(
    source: str, adapter: Path | None, graft: Path | None
) -> tuple[FrozenBase, ClientState]:
    model = load_model(source, "float32")
    freeze(model)
    lora, shared = (LoRA(), {}) if adapter is None else read_adapter(adapter)
    settings, private = (None, {}) if graft is None else read_graft(graft)
    sites = () if graft is None else tuple(find_expert_sites(model))
    base = FrozenBase(model, lora, settings, sites)
    if adapter is not None:
        _check_fits(shared, base.init_adapter(0), adapter, source)
    if graft is not None:
        _check_fits(private, base.init_graft(0, "", [0] * len(sites)), graft, source)
        _check_experts(private, sites, graft, source)
    check_base([part for part in (adapter, graft) if part is not None], base, source, private)
    return base, ClientState(shared, private)


def _check_fits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path, source: str
) -> None:
    """Compare names and shapes with a newborn's, the first difference is named."""
    for name in sorted({*tensors, *expected}):
        found, wanted = (list(t[name].shape) if name in t else None for t in (tensors, expected))
        if found != wanted:
            raise PomonaError(
                f'{folder} does not belong to {source}: the tensor "{name}" is '
                f"{_shape(found)} there and for the model {_shape(wanted)}"
            )


def _check_experts(
    graft: Mapping[str, Tensor], sites: Sequence[ExpertSite], folder: Path, source: str
) -> None:
    for site, expert in zip(sites, selected_experts(sites, graft), strict=True):
        if not 0 <= expert < site.num_experts:
            raise PomonaError(
                f"{folder} does not belong to {source}: it grew from expert {expert} of "
                f"{site.name}, which has {site.num_experts}"
            )


def _shape(size: list[int] | None) -> str:
    return "absent" if size is None else f"of shape {size}"


def _on_text(
    source: str,
    base: FrozenBase,
    state: ClientState,
    text: str,
    limit: int,
    length: int,
    progress: Progress,
) -> Figures:
    tokenizer = load_tokenizer(source)
    single = Path(text).is_file()
    split = "valid" if not single and has_held_out(text) else "train"
    domains = {Path(text).name: read_texts(Path(text))} if single else read_domains(text, split)
    figures: Figures = {}
    with base.attach_one(state):
        for done, (name, texts) in enumerate(domains.items()):
            progress("evaluating", done, len(domains))
            windows_BT = consecutive_windows(texts, tokenizer, length, limit)
            if windows_BT.shape[1] < 2:
                raise PomonaError(f'"{name}" has fewer than two tokens; give it more text')
            nats = text_loss(base.model, windows_BT)
            figures[name] = {"loss": nats, "perplexity": perplexity(nats)}
    mean = sum(own["loss"] for own in figures.values()) / len(figures)
    progress("evaluating", len(domains), len(domains))
    return figures | {"mean": {"loss": mean, "perplexity": perplexity(mean)}}


def _on_rows(
    source: str,
    base: FrozenBase,
    state: ClientState,
    path: Path,
    form: Template,
    limit: int,
    length: int,
    new_tokens: int,
    progress: Progress,
) -> Figures:
    tokenizer = load_tokenizer(source)
    encoded = [
        (row, encode(row, form, tokenizer, length)) for row in read_rows(path)[: limit or None]
    ]
    # Rows of like length share a batch; the figures do not depend on the order.
    encoded.sort(key=lambda pair: len(pair[1].input_ids))
    pad_id, evaluation = padding_id(tokenizer), Evaluation(new_tokens=max(new_tokens, 1))
    losses: list[RowLoss] = []
    said: list[float] = []
    for start in range(0, len(encoded), evaluation.batch):
        progress("evaluating", start, len(encoded))
        rows, examples = zip(*encoded[start : start + evaluation.batch], strict=True)
        losses += losses_of(base, state, examples, pad_id, evaluation)
        if new_tokens > 0:
            answers = answers_of(base, state, rows, tokenizer, form, length, evaluation)
            said += [answer["rouge_l"] for answer in answers]
    progress("evaluating", len(encoded), len(encoded))
    rouge = {"rouge_l": sum(said) / len(said)} if said else {}
    return {path.name: loss_summary(losses) | rouge}
