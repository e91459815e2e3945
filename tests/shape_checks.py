"""The type checker under which the tests run: beartype, shapes included.

pytest --jaxtyping-packages=pomona,shape_checks.checked
"""

import inspect
from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result.

    What returns `Self` is known outside its class only, and settings are made with wrong values on
    purpose, to see what they say. A function inside another is made anew at every call; making its
    check as well took a third of a federation's time.
    """
    if not inspect.isfunction(function) or function.__name__ == "__init__":
        return function
    if "<locals>" in function.__qualname__ or Self in function.__annotations__.values():
        return function
    return _CHECK(function)
