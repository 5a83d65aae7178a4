"""The one exception that means: the user's input is wrong, and here is what was expected."""

import dataclasses
import numbers
from typing import Any

KINDS: dict[Any, tuple[type, str]] = {
    str: (str, "a string"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
}


class InputError(Exception):
    """Bad input. The message is one line that names the file or option and what was expected."""


def check_kinds(settings: Any) -> None:
    """Raises InputError for the first field of a dataclass that is declared as a string, an integer
    or a number and is not one."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        kind, expected = KINDS.get(field.type, (object, ""))
        if not isinstance(value, kind):
            raise InputError(f"{field.name} is {value!r}, expected {expected}")
