"""Which registry a field's protocol is filled from: `kind = "NAME"` in a recipe."""

from collections.abc import Callable
from dataclasses import is_dataclass
from importlib import import_module
from inspect import Parameter, getattr_static, isfunction, signature
from typing import Any

from pomona.data.formats import FORMATS, RowFormat
from pomona.data.templates import TEMPLATES, Template
from pomona.errors import PomonaError
from pomona.federation.partition import PARTITIONS, Partition
from pomona.federation.selection import SELECTIONS, Selection
from pomona.federation.strategies import STRATEGIES, Strategy
from pomona.reconstruction.compensate import COMPENSATIONS, Compensation
from pomona.reconstruction.planners import PLANNERS, Planner
from pomona.reconstruction.router import ROUTERS, Router
from pomona.reconstruction.scores import SCORES, Score

REGISTRIES: dict[Any, dict[str, Any]] = {
    RowFormat: FORMATS,
    Template: TEMPLATES,
    Partition: PARTITIONS,
    Selection: SELECTIONS,
    Strategy: STRATEGIES,
    Score: SCORES,
    Planner: PLANNERS,
    Compensation: COMPENSATIONS,
    Router: ROUTERS,
}


def member(protocol: Any, kind: str, where: str) -> type[Any]:
    """Return the class behind a kind: a registry's name or an outside "package.module:Name"."""
    registry = REGISTRIES[protocol]
    if ":" in kind:
        return _outside(kind, where)
    if kind not in registry:
        raise PomonaError(
            f'{where}: unknown kind "{kind}"; there are {", ".join(sorted(registry))}'
        )
    return registry[kind]


def _outside(kind: str, where: str) -> type[Any]:
    module, _, name = kind.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # an outside module may fail in any way while it is imported
        raise PomonaError(f'{where}: cannot import "{kind}": {error}') from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise PomonaError(
            f'{where}: "{kind}" is no dataclass; name one whose fields are its settings'
        )
    return found


def kind_of(protocol: Any, value: Any) -> str:
    """Return the name under which a value's class is registered."""
    for name, cls in REGISTRIES[protocol].items():
        if type(value) is cls:
            return name
    return f"{type(value).__module__}:{type(value).__qualname__}"


def lacking(protocol: Any, value: object) -> str | None:
    """Return what keeps a value from being what its protocol asks for, or None.

    Every method has to be there and take the protocol's arguments by position; every property has to
    be there. Types are not looked at.
    """
    for name, wanted in vars(protocol).items():
        if name.startswith("_") and name != "__call__":
            continue
        if not isfunction(wanted):
            if getattr_static(value, name, None) is None:
                return f"it has no {name}"
            continue
        own = getattr(value, name, None)
        arguments = list(signature(wanted).parameters)[1:]  # without self
        if not callable(own):
            return f"it has no method {name}({', '.join(arguments)})"
        if not _takes(own, len(arguments)):
            return f"its {name} does not take ({', '.join(arguments)})"
    return None


def _takes(method: Callable[..., Any], arguments: int) -> bool:
    try:
        signature(method).bind(*[Parameter.empty] * arguments)
    except TypeError:
        return False
    except ValueError:  # written in another language, it does not tell
        return True
    return True
