"""What was forgotten: held-out text and tasks under the untuned, the shared and the personal models."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pomona.data.texts import consecutive_windows, has_held_out, read_domains
from pomona.errors import PomonaError
from pomona.evaluation.loss import window_losses
from pomona.evaluation.tasks import TaskResults, installed_harness
from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
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
    base: FrozenBase,
    models: Iterable[tuple[str, str | None, ClientState]],
    windows: Mapping[str, Tokens],
    batch: int,
) -> Iterable[dict[str, Any]]:
    """Yield nats and tokens of every window under every (model, client, state).

    The client is None for a model that all clients have: the base and the shared one.
    """
    for model, client, state in models:
        with base.attach_one(state):
            for domain, windows_BT in windows.items():
                losses = window_losses(base.model, windows_BT, batch)
                for number, loss in enumerate(losses):
                    yield {
                        "model": model,
                        "client": client,
                        "domain": domain,
                        "window": number,
                        "nats": loss.nats,
                        "tokens": loss.tokens,
                    }


def task_lines(
    base: FrozenBase,
    models: Iterable[tuple[str, str | None, ClientState]],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    limit: int,
    progress: Progress = silent,
) -> Iterable[dict[str, Any]]:
    """Yield every metric of every task under every (model, client, state), as the harness has it.

    `tasks` is what `harness.prepare_tasks` returned. `error` is the standard error, None where a metric has
    none, `cut` how many requests of all tasks were longer than the context and lost their beginning.
    """
    run_tasks = installed_harness().run_tasks
    for model, client, state in models:
        with base.attach_one(state):
            found: TaskResults = run_tasks(base.model, tokenizer, tasks, limit, progress)
        for task, own in found.tasks.items():
            for metric, value in own.metrics.items():
                yield {
                    "model": model,
                    "client": client,
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "error": own.errors[metric],
                    "questions": own.questions,
                    "fewshot": own.fewshot,
                    "cut": found.cut,
                    "harness": found.harness,
                }
