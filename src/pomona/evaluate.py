"""Evaluate: what a model, or a client's personal model, is worth on text and on rows."""

from pathlib import Path

from pomona.artifacts.run import read_graft
from pomona.data.examples import encode, padding_id
from pomona.data.rows import read_rows
from pomona.data.templates import TEMPLATES
from pomona.data.texts import consecutive_windows, read_domains, read_texts
from pomona.errors import PomonaError
from pomona.evaluation.loss import perplexity, text_loss
from pomona.federation.cohort import FrozenBase
from pomona.federation.measure import Evaluation, answers_of, loss_summary, losses_of
from pomona.federation.update import ClientState
from pomona.models.experts import find_expert_sites, freeze
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
    template: str,
    limit: int,
    length: int,
    new_tokens: int,
    progress: Progress = silent,
) -> Figures:
    """Return the figures of each text domain (loss, perplexity) or of the rows (and ROUGE-L).

    Raises `PomonaError` when there is nothing to measure on or the length does not fit.
    """
    if (text is None) == (rows is None):
        raise PomonaError("give either --text or --rows to measure on")
    base, state = _personal(source, adapter, graft)
    if length > context_length(base.model):
        raise PomonaError(
            f"length {length} is longer than the context of {source}, "
            f"{context_length(base.model)} tokens; make it smaller"
        )
    if rows is not None:
        return _on_rows(source, base, state, rows, template, limit, length, new_tokens)
    return _on_text(source, base, state, str(text), limit, length, progress)


def _personal(
    source: str, adapter: Path | None, graft: Path | None
) -> tuple[FrozenBase, ClientState]:
    model = load_model(source, "float32")
    freeze(model)
    lora, shared = (LoRA(), {}) if adapter is None else read_adapter(adapter)
    settings, private = (None, {}) if graft is None else read_graft(graft)
    sites = () if graft is None else tuple(find_expert_sites(model))
    return FrozenBase(model, lora, settings, sites), ClientState(shared, private)


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
    domains = {Path(text).name: read_texts(Path(text))} if single else _held_out(text)
    figures: Figures = {}
    with base.attach_one(state):
        for done, (name, texts) in enumerate(domains.items()):
            progress("evaluating", done, len(domains))
            windows_BT = consecutive_windows(texts, tokenizer, length, limit)
            nats = text_loss(base.model, windows_BT)
            figures[name] = {"loss": nats, "perplexity": perplexity(nats)}
    mean = sum(own["loss"] for own in figures.values()) / len(figures)
    progress("evaluating", len(domains), len(domains))
    return figures | {"mean": {"loss": mean, "perplexity": perplexity(mean)}}


def _held_out(text: str) -> dict[str, list[str]]:
    """Prefer the held-out files of a folder of domains."""
    try:
        return read_domains(text, "valid")
    except PomonaError:
        return read_domains(text, "train")


def _on_rows(
    source: str,
    base: FrozenBase,
    state: ClientState,
    path: Path,
    template: str,
    limit: int,
    length: int,
    new_tokens: int,
) -> Figures:
    if template not in TEMPLATES:
        raise PomonaError(f'unknown template "{template}"; there are {", ".join(TEMPLATES)}')
    tokenizer, form = load_tokenizer(source), TEMPLATES[template]()
    rows = read_rows(path)[: limit or None]
    examples = [encode(row, form, tokenizer, length) for row in rows]
    pad_id = padding_id(tokenizer)
    evaluation = Evaluation(new_tokens=max(new_tokens, 1))
    summary = loss_summary(losses_of(base, state, examples, pad_id, evaluation))
    if new_tokens > 0:
        said = answers_of(base, state, rows, tokenizer, form, length, evaluation)
        summary["rouge_l"] = sum(line["rouge_l"] for line in said) / len(said)
    return {path.name: summary}
