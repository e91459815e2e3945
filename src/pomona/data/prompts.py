"""Open-ended prompts, one per line, as Vicuna's questions come."""

from pathlib import Path

from pomona.data.records import read_records, text_field
from pomona.errors import PomonaError

_FIELDS = ("turns", "prompt", "text", "question", "instruction")


def read_prompts(path: Path) -> list[str]:
    """Read JSON lines, each with `turns` (a list: the first is asked) or a text by another known name.

    The other names are `prompt`, `text`, `question` and `instruction`. Raises `PomonaError` naming file,
    line and field for anything else, and for a file without prompts.
    """
    prompts: list[str] = []
    for number, record in read_records(path):
        where = f"{path}:{number}"
        name = next((name for name in _FIELDS if name in record), None)
        if name is None:
            raise PomonaError(
                f"{where}: no prompt; give one of {', '.join(_FIELDS)} (the line has "
                f"{', '.join(record) or 'nothing'})"
            )
        if name == "turns":
            turns = record["turns"]
            if not isinstance(turns, list) or not turns:
                raise PomonaError(f'{where}: the field "turns" should be a list of texts')
            record = {"turns": turns[0]}
        prompt = text_field(record, name, where).strip()
        if not prompt:
            raise PomonaError(f'{where}: the field "{name}" is empty; give it a prompt')
        prompts.append(prompt)
    if not prompts:
        raise PomonaError(f"{path} holds no prompts; put one JSON object per line")
    return prompts
