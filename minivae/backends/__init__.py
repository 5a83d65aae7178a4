"""The backends: one table of primitives each, loaded when its name is asked for."""

import difflib
import importlib

from ..errors import InputError
from .reference import ReferenceBackend

BACKENDS = {
    "reference": "reference:ReferenceBackend",
    "cpu": "cpu:CpuBackend",
    "numba_cuda": "numba_cuda:NumbaCudaBackend",
}
"""Where the class of each name is, as "module:Class" in this package. A module is imported only
when its name is asked for, and a constructor raises InputError where a requirement is missing."""

AUTOMATIC = ("cpu",)
"""What "auto" tries, in order of preference."""


def get(name: str) -> ReferenceBackend:
    """A backend by name, or the best one that works here for "auto".

    Raises InputError on an unknown name, or if what the backend needs is missing.
    """
    if name == "auto":
        return _first_that_works()
    if name not in BACKENDS:
        known = ["auto", *BACKENDS]
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise InputError(f"unknown device {name!r}; did you mean {near!r}? ({', '.join(known)})")
    module_name, class_name = BACKENDS[name].split(":")
    try:
        module = importlib.import_module(f".{module_name}", __name__)
    except ImportError as error:
        raise InputError(f"device {name!r} needs a package that is missing: {error}") from None
    backend: ReferenceBackend = getattr(module, class_name)()
    return backend


def _first_that_works() -> ReferenceBackend:
    reasons = []
    for name in AUTOMATIC:
        try:
            return get(name)
        except InputError as error:
            reasons.append(str(error))
    raise InputError("; ".join(reasons))


def available() -> dict[str, str]:
    """For each name "works", or in one line why not."""
    status = {}
    for name in BACKENDS:
        try:
            get(name)
            status[name] = "works"
        except InputError as error:
            status[name] = str(error)
    return status
