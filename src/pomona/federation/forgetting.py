"""What was forgotten: held-out text and tasks under the untuned, the shared and the personal models."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pomona.data.examples import Example
from pomona.data.texts import consecutive_windows, has_held_out, read_domains
from pomona.errors import PomonaError
from pomona.evaluation.tasks import TaskResults, installed_harness
from pomona.federation.cohort import FrozenBase
from pomona.federation.measure import Models, losses_of
from pomona.progress import Progress, silent
from pomona.shapes import Tokens


def held_out_windows(
    source: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int
) -> dict[str, Tokens]:
    """Return every domain's windows [n, length], at most `limit` of them (0: all).

    Files called NAME.valid.* or NAME.test.* alone are read where there are any. Raises `PomonaError`
    for text that cannot be read, or too short to predict a token of.
    """
    split = "valid" if has_held_out(source) else "train"
    windows = {
        name: consecutive_windows(texts, tokenizer, length, limit)
        for name, texts in read_domains(source, split).items()
    }
    for name, windows_BT in windows.items():
        if windows_BT.shape[1] < 2:
            raise PomonaError(
                f'evaluation forgetting: the domain "{name}" of {source} has fewer than two tokens; '
                "give it more text"
            )
    return windows


def forgetting_lines(
    base: FrozenBase, models: Models, windows: Mapping[str, Tokens], pad_id: int, batch: int
) -> list[list[dict[str, Any]]]:
    """Return nats and tokens of every window under every client's model, `batch` windows in a pass.

    The client is None for a model that is nobody's in particular: the base and the shared one.
    """
    places = [(name, number) for name, own in windows.items() for number in range(len(own))]
    rows = [Example(tuple(windows[name][number].tolist()), 1) for name, number in places]
    losses = losses_of(base, models.states, [rows] * len(models.states), pad_id, batch)
    return [
        [
            {
                "model": models.kind,
                "client": client,
                "domain": domain,
                "window": number,
                "nats": loss.nats,
                "tokens": loss.tokens,
            }
            for (domain, number), loss in zip(places, own, strict=True)
        ]
        for (client, _), own in zip(models.each(), cycle(losses), strict=False)
    ]


def task_lines(
    base: FrozenBase,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    limit: int,
    progress: Progress = silent,
) -> Iterable[dict[str, Any]]:
    """Yield every metric of every task under every client's model, as the harness has it.

    `tasks` is what `harness.prepare_tasks` returned. `error` is the standard error, None where a metric has
    none, `scores` what each question was given where the value is their mean, `asked` the digest of all
    prompts, and `cut` how many requests of all tasks were longer than the context and lost their beginning.
    """
    run_tasks = installed_harness().run_tasks
    for client, state in models.each():
        with base.attach_one(state):
            found: TaskResults = run_tasks(base.model, tokenizer, tasks, limit, progress)
        for task, own in found.tasks.items():
            for metric, value in own.metrics.items():
                yield {
                    "model": models.kind,
                    "client": client,
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "error": own.errors[metric],
                    "questions": own.questions,
                    "fewshot": own.fewshot,
                    "scores": own.scores.get(metric, ()),
                    "asked": own.asked,
                    "cut": found.cut,
                    "harness": found.harness,
                }
