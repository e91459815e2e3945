"""Multiple-choice questions from JSON lines or CSV, with a place for every complaint."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.data.records import read_records, read_utf8, text_field
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Read a .jsonl or .csv file of multiple-choice questions.

    JSON lines hold "question", "choices" (a list) and "answer"; a CSV has the header question,
    choice0, choice1, …, answer, or none and the question first and the answer last. The answer is
    the index of a choice from 0, else the text of a choice, else its letter from A.

    Raises `PomonaError` with file and line for what cannot be understood.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise PomonaError(
            f"{path} is no .jsonl and no .csv file; give one with question, choices and answer"
        )
    found = _of_csv(path) if path.suffix == ".csv" else _of_json_lines(path)
    if not found:
        raise PomonaError(f"{path} is empty; it should hold one question per line")
    return found


def mmlu_subjects(folder: Path) -> list[str]:
    """Return the subjects of an MMLU folder: test/SUBJECT_test.csv, in order.

    Raises `PomonaError` when there is none.
    """
    subjects = sorted(p.name[: -len("_test.csv")] for p in folder.glob("test/*_test.csv"))
    if not subjects:
        raise PomonaError(
            f"{folder} holds no test/SUBJECT_test.csv; give MMLU's folder, with dev and test in it"
        )
    return subjects


def read_mmlu(folder: Path, subject: str, split: str) -> list[Question]:
    """Read a subject's "dev" or "test" questions, each with four choices."""
    path = folder / split / f"{subject}_{split}.csv"
    found = read_questions(path)
    for number, question in enumerate(found, start=1):
        if len(question.choices) != 4:
            raise PomonaError(
                f"{path}: question {number} has {len(question.choices)} choices and MMLU has four; "
                "measure it as multiple_choice"
            )
    return found


def _of_json_lines(path: Path) -> list[Question]:
    return [
        _question(
            text_field(record, "question", f"{path}:{line}"),
            record.get("choices"),
            record.get("answer"),
            f"{path}:{line}",
        )
        for line, record in read_records(path)
    ]


def _of_csv(path: Path) -> list[Question]:
    lines = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    header: list[str] | None = None
    found: list[Question] = []
    try:
        for cells in lines:
            where = f"{path}:{lines.line_num}"
            if header is None:
                named = bool(cells) and cells[0].strip().lower() == "question"
                header = [cell.strip().lower() for cell in cells] if named else []
                if named:
                    _check_header(header, where)
                    continue
            if cells:
                found.append(_of_cells(cells, len(header), where))
    except csv.Error as error:
        raise PomonaError(f"{path}:{lines.line_num}: not valid CSV ({error})") from error
    return found


def _check_header(header: Sequence[str], where: str) -> None:
    if len(header) < 4 or header[-1] != "answer":
        raise PomonaError(
            f"{where}: the header is {', '.join(header)}; it should be question, choice0, choice1 and "
            "so on, answer"
        )


def _of_cells(cells: Sequence[str], columns: int, where: str) -> Question:
    if len(cells) < 4 or (columns and len(cells) != columns):
        raise PomonaError(
            f"{where}: the line has {len(cells)} columns and needs "
            f"{columns or 'at least 4'}: a question, its choices, the answer"
        )
    question, *choices, answer = cells
    while choices and not choices[-1].strip():  # questions with fewer choices than the widest
        choices.pop()
    answer = answer.strip()
    return _question(question, choices, int(answer) if answer.isdecimal() else answer, where)


def _question(question: str, choices: Any, answer: Any, where: str) -> Question:
    if not question.strip():
        raise PomonaError(f"{where}: the question is empty")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise PomonaError(
            f"{where}: the choices are {choices!r}; they should be a list of two texts or more"
        )
    return Question(question, tuple(choices), _index(answer, choices, where))


def _index(answer: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, str) and list(choices).count(answer) == 1:
        return choices.index(answer)
    index = answer
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha() and answer.isascii():
        index = ord(answer.upper()) - ord("A")
    if type(index) is not int or not 0 <= index < len(choices):
        raise PomonaError(
            f"{where}: the answer {answer!r} is none of the {len(choices)} choices; give an index from "
            "0, a letter from A or a choice's text"
        )
    return index
