"""Evaluate: what a model, or a client's personal model, is worth on text, on rows and on tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pomona.artifacts.origin import prompt_for
from pomona.artifacts.personal import PersonalModel, open_personal
from pomona.data.examples import encode, padding_id
from pomona.data.rows import read_rows
from pomona.data.texts import consecutive_windows, has_held_out, read_domains, read_texts
from pomona.errors import PomonaError
from pomona.evaluation.experts import ExpertLoad, expert_load
from pomona.evaluation.loss import RowLoss, perplexity, window_losses
from pomona.evaluation.speed import Speed, generation_speeds
from pomona.evaluation.tasks import TaskResults, installed_harness
from pomona.federation.evaluation import Evaluation
from pomona.federation.measure import answers_of, loss_summary, losses_of
from pomona.models.experts import ExpertSite, find_expert_sites
from pomona.models.loading import context_length, load_model, load_tokenizer
from pomona.models.placement import moved
from pomona.models.routing import count_routing
from pomona.progress import Progress, silent
from pomona.shapes import Tokens

Figures = dict[str, dict[str, float]]

_BATCH = 16  # windows per forward pass


@dataclass(frozen=True)
class TextMeasures:
    """What one window length gave: figures per domain and their mean; the load, if it was asked for."""

    figures: Figures
    routing: Mapping[str, ExpertLoad] = field(default_factory=dict[str, ExpertLoad])


def on_text(
    personal: PersonalModel,
    text: str,
    lengths: Sequence[int] = (),
    limit: int = 64,
    routing: bool = False,
    progress: Progress = silent,
) -> dict[int, TextMeasures]:
    """Return loss and perplexity of every text domain for every window length.

    Windows do not overlap; at most `limit` of a domain are taken, 0 for all. Without `lengths` they
    have 512 tokens, or what the model's context holds. With `routing` the same windows tell how the
    experts are used.

    Raises `PomonaError` for text that cannot be read, for a length that does not fit, and for the
    routing of a dense model.
    """
    _check_least(("limit", limit, 0), *(("length", length, 2) for length in lengths))
    single = Path(text).is_file()
    split = "valid" if not single and has_held_out(text) else "train"
    domains = {Path(text).name: read_texts(Path(text))} if single else read_domains(text, split)
    base, state = open_personal(personal)
    sites = find_expert_sites(base.model) if routing else []
    chosen = [_fitting(length, personal.source, base.model) for length in lengths or (None,)]
    tokenizer = load_tokenizer(personal.source)
    windows = {
        length: {
            name: _windows(name, consecutive_windows(texts, tokenizer, length, limit))
            for name, texts in domains.items()
        }
        for length in dict.fromkeys(chosen)
    }
    told = _Steps(progress, sum(len(w) for own in windows.values() for w in own.values()))
    with base.attach_one(state):
        found = {n: _of_windows(base.model, sites, own, told) for n, own in windows.items()}
    told.end()
    return found


def on_rows(
    personal: PersonalModel,
    rows: Path,
    template: str | None = None,
    limit: int = 64,
    length: int | None = None,
    new_tokens: int = 64,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda told: None,
) -> Figures:
    """Return loss and perplexity of rows' answers, ROUGE-L and exact match of those generated.

    Without a `template` rows are asked as the adapter or graft says it was trained, else as Alpaca's;
    `note` is told when they are asked otherwise. Without a `length` the longest row has 512 tokens, or
    what the model's context holds; 0 `new_tokens` skip the answers. Raises `PomonaError` when rows,
    template or length do not fit.
    """
    _check_least(("limit", limit, 0), ("length", length or 2, 2), ("new tokens", new_tokens, 0))
    form = prompt_for(template, personal.parts, note)
    chosen = read_rows(rows)[: limit or None]
    base, state = open_personal(personal)
    length = _fitting(length, personal.source, base.model)
    _check_room(length, new_tokens)
    tokenizer = load_tokenizer(personal.source)
    encoded = [(row, encode(row, form, tokenizer, length)) for row in chosen]
    # Rows of like length share a batch; the figures do not depend on the order.
    encoded.sort(key=lambda pair: len(pair[1].input_ids))
    pad_id, evaluation = padding_id(tokenizer), Evaluation(new_tokens=max(new_tokens, 1))
    losses: list[RowLoss] = []
    said: list[Mapping[str, float]] = []
    told = _Steps(progress, len(encoded))
    for start in range(0, len(encoded), evaluation.batch):
        batch, examples = zip(*encoded[start : start + evaluation.batch], strict=True)
        losses += losses_of(base, [state], [examples], pad_id, len(examples))[0]
        if new_tokens > 0:
            said += answers_of(base, [state], [batch], tokenizer, form, length, evaluation)[0]
        told.step(len(batch))
    told.end()
    kinds = ("rouge_l", "exact_match") if said else ()
    means = {kind: sum(answer[kind] for answer in said) / len(said) for kind in kinds}
    return {rows.name: loss_summary(losses) | means}


def on_tasks(
    personal: PersonalModel,
    tasks: Sequence[str],
    data: Path | None = None,
    fewshot: int | None = None,
    limit: int = 64,
    progress: Progress = silent,
) -> TaskResults:
    """Run tasks of the LM evaluation harness, see `evaluation/harness.py`.

    Raises `PomonaError` when the `eval` extra is not installed or a task cannot be run.
    """
    _check_least(("limit", limit, 0), ("fewshot", fewshot or 0, 0))
    harness = installed_harness()
    progress("loading tasks", 0, 1)
    prepared = harness.prepare_tasks(tasks, data, fewshot)
    progress("loading tasks", 1, 1)
    base, state = open_personal(personal)
    tokenizer = load_tokenizer(personal.source)
    with base.attach_one(state):
        return harness.run_tasks(base.model, tokenizer, prepared, limit, progress)


def speed(
    personal: PersonalModel,
    dense: str | None = None,
    length: int | None = None,
    new_tokens: int = 64,
    repeats: int = 5,
    progress: Progress = silent,
) -> dict[str, Speed]:
    """Return how fast the "model" generates, and "dense" beside it where it is given.

    Prompt and new tokens have `length` tokens in all; without one 512, or what the contexts hold.
    The prompt is the same for both, drawn from the vocabulary they share.

    Raises `PomonaError` for numbers that do not fit.
    """
    _check_least(("length", length or 2, 2), ("new tokens", new_tokens, 1), ("repeats", repeats, 1))
    base, state = open_personal(personal)
    models = {"model": base.model}
    if dense is not None:
        models["dense"] = moved(load_model(dense, "float32").eval(), base.device)
    sources = (personal.source, str(dense))
    total = min(
        _fitting(length, source, model)
        for source, model in zip(sources, models.values(), strict=False)
    )
    _check_room(total, new_tokens)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(vocabulary, (1, total - new_tokens), generator=generator)
    with base.attach_one(state):
        return generation_speeds(models, prompt_BT.to(base.device), new_tokens, repeats, progress)


@dataclass
class _Steps:
    """A stage whose steps are of several sizes."""

    progress: Progress
    total: int
    done: int = 0

    def step(self, size: int) -> None:
        self.progress("evaluating", self.done, self.total)
        self.done += size

    def end(self) -> None:
        self.progress("evaluating", self.total, self.total)


def _of_windows(
    model: PreTrainedModel,
    sites: Sequence[ExpertSite],
    domains: Mapping[str, Tokens],
    told: _Steps,
) -> TextMeasures:
    figures: Figures = {}
    routing: dict[str, ExpertLoad] = {}
    for name, windows_BT in domains.items():
        losses: list[RowLoss] = []
        with count_routing(sites) as counts:
            for batch_BT in windows_BT.split(_BATCH):
                told.step(len(batch_BT))
                losses += window_losses(model, batch_BT, _BATCH)
        tokens = sum(window.tokens for window in losses)
        nats = sum(window.nats for window in losses) / tokens
        sizes = {"windows": len(losses), "tokens": tokens}
        figures[name] = {"loss": nats, "perplexity": perplexity(nats), **sizes}
        if sites:
            routing[name] = expert_load(counts.counts_LCE[:, 0], [s.num_experts for s in sites])
    mean = sum(own["loss"] for own in figures.values()) / len(figures)
    return TextMeasures(figures | {"mean": {"loss": mean, "perplexity": perplexity(mean)}}, routing)


def _windows(name: str, windows_BT: Tokens) -> Tokens:
    if windows_BT.shape[1] < 2:
        raise PomonaError(f'"{name}" has fewer than two tokens; give it more text')
    return windows_BT


def _fitting(length: int | None, source: str, model: PreTrainedModel) -> int:
    """Return the length to use: the one given if it fits the model's context, else 512 or less."""
    context = context_length(model)
    if length is not None and length > context:
        raise PomonaError(
            f"length {length} is longer than the context of {source}, {context} tokens; make it smaller"
        )
    return min(512, context) if length is None else length


def _check_least(*numbers: tuple[str, int, int]) -> None:
    for name, value, least in numbers:
        if value < least:
            raise PomonaError(f"{name} {value} is too small; use {least} or more")


def _check_room(length: int, new_tokens: int) -> None:
    if new_tokens >= length:
        raise PomonaError(
            f"new tokens {new_tokens} leave no room for a prompt in length {length}; "
            "make one smaller or the other larger"
        )
