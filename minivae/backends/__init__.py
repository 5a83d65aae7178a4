"""The backends: one table of primitives each, loaded when its name is asked for."""

import importlib
import importlib.util
import logging
from functools import cache

from ..errors import InputError, unknown
from .reference import ReferenceBackend

BACKENDS = {
    "reference": "reference:ReferenceBackend",
    "cpu": "cpu:CpuBackend",
    "cuda": "cuda:CudaBackend",
    "numba_cuda": "numba_cuda:numba_cuda_backend",
    "emulated": "emulated:EmulatedBackend",
}
"""What makes the backend of each name, as "module:callable" in this package. A module is imported
when its name is asked for; it or the callable raise ImportError where a package is missing, the
callable InputError where another requirement is."""

AUTOMATIC = ("cuda", "cpu")
"""What "auto" tries, in order of preference."""

PRECISIONS = ("fp32", "tf32")
"""float32 throughout, or matrix products on tensor cores with operands rounded to TF32."""

WITHOUT_TF32 = ("reference", "cpu")
LOGGER = logging.getLogger("minivae")


def get(name: str, precision: str = "fp32") -> ReferenceBackend:
    """A backend by name; for "auto" the best one that works here, with a line in the log "minivae"
    on each better one that does not.

    Raises InputError on an unknown name or precision, or if what the backend needs is missing.
    """
    if name == "auto":
        backend, reasons = choose(precision)
        # Who installed CuPy expects a GPU; who did not hears of it by asking for more.
        level = logging.WARNING if importlib.util.find_spec("cupy") else logging.INFO
        for reason in reasons:
            _log_once(level, f"no GPU: {reason}")
        return backend
    if name not in BACKENDS:
        meant = "cuda" if name == "gpu" else ""
        raise unknown("device", name, ["auto", *BACKENDS], meant)
    _check_precision(precision)
    if precision == "tf32" and name in WITHOUT_TF32:
        raise InputError(f"device {name!r} computes in fp32: tf32 needs a GPU's tensor cores")
    module_name, maker = BACKENDS[name].split(":")
    try:
        make = getattr(importlib.import_module(f".{module_name}", __name__), maker)
        made: ReferenceBackend = make() if name in WITHOUT_TF32 else make(precision)
        return made
    except ImportError as error:
        cause = _cause(error)
        extra = "; install minivae[cuda13] or minivae[cuda12]" if "cuda" in name else ""
        raise InputError(
            f"device {name!r} needs a package that is missing: {cause}{extra}"
        ) from None


@cache
def _log_once(level: int, line: str) -> None:
    LOGGER.log(level, line)


def _cause(error: ImportError) -> str:
    """The first line of an error; of CuPy's page on an import that failed, that of the cause."""
    lines = map(str.strip, str(error).split("Original error:")[-1].splitlines())
    return next((line for line in lines if line.strip("=")), type(error).__name__)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def choose(precision: str = "fp32") -> tuple[ReferenceBackend, list[str]]:
    """The best backend that works here, and for each better one in a line why it does not."""
    _check_precision(precision)
    reasons: list[str] = []
    for name in AUTOMATIC:
        try:
            return get(name, precision), reasons
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
