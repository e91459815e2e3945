"""A template as a table that can be kept beside what was trained with it, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pomona.data.templates import TEMPLATES, Template


def template_table(template: Template) -> dict[str, Any]:
    """Return a template's kind, as a recipe names it, with its fields."""
    own = type(template)
    outside = f"{own.__module__}:{own.__qualname__}"
    kind = next((name for name, cls in TEMPLATES.items() if cls is own), outside)
    fields = asdict(template) if is_dataclass(template) else {}
    return {"kind": kind, **fields}


def template_from(table: Mapping[str, Any]) -> Template:
    """Return the template of such a table.

    Raises `ValueError` for a kind that is not Pomona's own: a file that lies beside weights never
    decides which code is imported. Also for fields that do not fit.
    """
    kind = table.get("kind")
    if kind not in TEMPLATES:
        raise ValueError(f"its template {json.dumps(kind)} is none of {', '.join(TEMPLATES)}")
    fields = {key: value for key, value in table.items() if key != "kind"}
    try:
        return TypeAdapter(TEMPLATES[kind]).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ValueError(f"its template's {error.errors()[0]['loc'][0]} is no text") from error
