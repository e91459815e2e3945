"""Tasks of the LM evaluation harness on a model in memory; the only importer of lm_eval.

Gao et al., "The Language Model Evaluation Harness", 2024. The tasks `mmlu` and `multiple_choice` can
read local files; their wording is in `tasks/`. Every other task is the harness's own.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from difflib import get_close_matches
from hashlib import sha256
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, cast

import lm_eval
import yaml
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.model import CacheHook
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pomona.data.questions import Question, mmlu_subjects, read_mmlu, read_questions
from pomona.errors import PomonaError
from pomona.evaluation.tasks import LOCAL, TaskFigures, TaskResults
from pomona.progress import Progress, silent

_HFLM: Any = HFLM  # its registration loses its type
_SEED = 1234  # the harness's own default for drawing examples


def prepare_tasks(
    tasks: Sequence[str],
    data: Path | None = None,
    fewshot: int | None = None,
    key: str = "--data",
) -> TaskDict:
    """Load tasks with their data: by name, or by the path of a task's YAML.

    `data` is what the local tasks read, and `key` how the user names it. `fewshot` is the number of
    examples before a question, else the task's own or none. Raises `PomonaError` for a task that is unknown
    or whose data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stderr(StringIO()):  # progress bars of the harness and of datasets
        prepared = _load(tasks, data, fewshot or 0, key)
    for task in cast(dict[str, Any], prepared["tasks"]).values():
        if fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return prepared


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: TaskDict,
    limit: int = 0,
    progress: Progress = silent,
) -> TaskResults:
    """Measure what `prepare_tasks` loaded; whatever is hooked onto the model counts.

    Every call draws the same examples, so that models one after the other answer the same questions.
    `limit` is the number of questions per task, 0 for all. Raises `PomonaError` when a task cannot
    be run.
    """
    for task in cast(dict[str, Any], prepared["tasks"]).values():
        task.set_fewshot_seed(seed=_SEED)
    wrapped = _Wrapped(model, tokenizer, progress)
    try:
        with redirect_stderr(StringIO()):
            found = evaluate(wrapped, prepared, limit=limit or None, log_samples=True)
    except (AssertionError, ValueError) as error:
        raise PomonaError(
            f"the harness refuses the tasks asked for: {_first_line(error)}; choose others or fewer "
            "examples"
        ) from error
    wrapped.finish()
    return TaskResults(_figures(cast(dict[str, Any], found)), wrapped.cut, lm_eval.__version__)


class _Wrapped(_HFLM):
    """The harness's view of a model in memory; tells our progress and counts what it has to cut."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=16)
        self.cut = 0
        self._progress, self._done, self._total = progress, 0, 0
        self.set_cache_hook(_Told(self._tell))

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._total += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._total += len(requests)
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        room = self.max_length + 1  # the last token is predicted and never read
        self.cut += sum(len(context) + len(rest) > room for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def finish(self) -> None:
        self._progress("answering", self._total, self._total)

    def _tell(self) -> None:
        self._progress("answering", min(self._done, self._total), self._total)
        self._done += 1


class _Told(CacheHook):
    """Where the harness would store a finished request; nothing is stored."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__(None)
        self._finished = tell

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._finished()


def _load(tasks: Sequence[str], data: Path | None, fewshot: int, key: str) -> TaskDict:
    """Build the tasks; only the harness's own are looked up in its index, which takes seconds."""
    if not tasks:
        raise PomonaError(f"name a task, such as mmlu or multiple_choice with {key}")
    if data is None and "multiple_choice" in tasks:
        raise PomonaError(f"the task multiple_choice reads a local file; name it with {key}")
    if data is not None and not set(LOCAL) & set(tasks):
        raise PomonaError(f"{key} is read by {' and '.join(LOCAL)} only; leave it out")
    specs = [_local(task, data, fewshot) if data and task in LOCAL else task for task in tasks]
    named = [spec for spec in specs if isinstance(spec, str) and not Path(spec).is_file()]
    index = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in index.all_tasks:
            close = ", ".join(get_close_matches(name, [*index.all_tasks, *LOCAL])) or "none"
            raise PomonaError(f'the harness has no task "{name}"; names like it: {close}')
    try:
        return index.load(specs)
    except PomonaError:
        raise
    except Exception as error:  # whatever a task's own loading may raise
        raise PomonaError(
            f"cannot load {', '.join(tasks)}: {_first_line(error)}; the data must be here or reachable "
            f"({' and '.join(LOCAL)} read local files with {key})"
        ) from error


def _local(task: str, data: Path, fewshot: int) -> Task | Group:
    """Build a task of ours, or a group of them, on local files."""
    wording = yaml.safe_load((files("pomona.evaluation.tasks") / f"{task}.yaml").read_text())
    if task == "multiple_choice":
        questions = read_questions(data)
        _check_examples(data, len(questions) - 1, fewshot)
        return ConfigurableTask(config=wording | _reading({"test": _dataset(questions)}))
    group = Group(task, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    for subject in mmlu_subjects(data):
        own = _reading(_mmlu(data, subject, fewshot))
        group.add(ConfigurableTask(config=wording | {"task": f"mmlu_{subject}"} | own))
    return group


def _reading(splits: dict[str, Dataset]) -> dict[str, Any]:
    """Return what makes the harness take these questions."""

    def read(**_metadata: object) -> dict[str, Dataset]:
        return splits

    return {"custom_dataset": read}


def _mmlu(folder: Path, subject: str, fewshot: int) -> dict[str, Dataset]:
    dev: list[Question] = read_mmlu(folder, subject, "dev") if fewshot else []
    _check_examples(folder / "dev" / f"{subject}_dev.csv", len(dev), fewshot)
    test = read_mmlu(folder, subject, "test")
    return {"test": _dataset(test, subject), "dev": _dataset(dev, subject)}


def _dataset(questions: Sequence[Question], subject: str = "") -> Dataset:
    return Dataset.from_list(
        [asdict(question) | {"subject": subject.replace("_", " ")} for question in questions]
    )


def _check_examples(path: Path, there: int, fewshot: int) -> None:
    if fewshot > there:
        raise PomonaError(f"{path} has {there} examples and {fewshot} are asked for; use fewer")


def _figures(found: Mapping[str, Any]) -> dict[str, TaskFigures]:
    sizes, members = found["n-samples"], found.get("group_subtasks", {})
    figures: dict[str, TaskFigures] = {}
    for name, own in {**found.get("groups", {}), **found["results"]}.items():
        counted = _leaves(name, members)
        samples = [sample for task in counted for sample in found["samples"].get(task, ())]
        metrics: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        scores: dict[str, list[float]] = {}
        for key, value in own.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = metric if kind == "none" else f"{metric} ({kind})"
            error = own.get(f"{metric}_stderr,{kind}")
            metrics[label] = float(value)
            errors[label] = float(error) if isinstance(error, (int, float)) else None
            every = _scores(samples, metric, kind)
            if every and math.isclose(math.fsum(every) / len(every), value, abs_tol=1e-9):
                scores[label] = every
        questions = sum(sizes[task]["effective"] for task in counted if task in sizes)
        figures[name] = TaskFigures(
            metrics, errors, questions, found["n-shot"].get(name), scores, _asked(samples)
        )
    return figures


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group, those of its groups too; of a task itself."""
    below = [task for task in members.get(name, ()) if task != name]
    return [leaf for task in below for leaf in _leaves(task, members)] if below else [name]


def _asked(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of all prompts: examples, wording and questions, in their order."""
    return sha256("".join(sample["prompt_hash"] for sample in samples).encode()).hexdigest()


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> list[float]:
    """Return what a metric gave each question that it gives a number."""
    found = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    return [float(value) for value in found if isinstance(value, (int, float))]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
