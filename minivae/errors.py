"""The one exception that means: the user's input is wrong, and here is what was expected."""

import dataclasses
import difflib
import numbers
from collections.abc import Iterable
from typing import Any

KINDS: dict[Any, tuple[type, str]] = {
    str: (str, "a string"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
}


LARGEST_COUNT = 10**9
TOO_LARGE = 1e30


class InputError(Exception):
    """Bad input. The message is one line that names the file or option and what was expected."""


def unknown(what: str, name: str, known: Iterable[str], meant: str = "") -> InputError:
    """The error that `name` is not a known one, with the one that is `meant`, or else the nearest
    if one is near."""
    names = list(known)
    near = [meant] if meant else difflib.get_close_matches(name, names, 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {name!r}; {hint}expected one of {', '.join(names)}")


def check_settings(settings: Any, checks: dict[str, tuple[bool, str]]) -> None:
    """Raises InputError for the first field of a dataclass whose check, (whether it holds, what was
    expected), does not hold, or that float32 or a count has no room for."""
    for name, (holds, expected) in checks.items():
        value = getattr(settings, name)
        limit = TOO_LARGE if isinstance(value, float) else LARGEST_COUNT
        if not holds or (isinstance(value, int | float) and not abs(value) < limit):
            beyond = f", below {limit:g}" if holds else ""
            raise InputError(f"{name} is {value!r}, expected {expected}{beyond}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of the choices."""
    known = list(choices)
    if value not in known:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def check_seed(seed: Any) -> None:
    """Raises InputError unless `seed` is one that every generator takes."""
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
        raise InputError(f"seed is {seed!r}, expected an integer of 0 to 2^64 - 1")


def check_count(name: str, count: Any) -> None:
    """Raises InputError unless `count` is an integer of 1 to LARGEST_COUNT."""
    if (
        not isinstance(count, numbers.Integral)
        or isinstance(count, bool)
        or not 1 <= int(count) <= LARGEST_COUNT
    ):
        raise InputError(f"{name} is {count!r}, expected an integer of 1 to {LARGEST_COUNT:,}")


def check_is(name: str, value: Any, *kinds: type, hint: str = "") -> None:
    """Raises InputError, whose end is `hint`, unless `value` is of one of the kinds."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name} is of type {type(value).__name__}, expected {expected}{hint}")


def check_kinds(settings: Any) -> None:
    """Raises InputError for the first field of a dataclass that is declared as one of KINDS and is
    not one."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        kind, expected = KINDS.get(field.type, (object, ""))
        if not isinstance(value, kind) or (field.type is not bool and isinstance(value, bool)):
            raise InputError(f"{field.name} is {value!r}, expected {expected}")
