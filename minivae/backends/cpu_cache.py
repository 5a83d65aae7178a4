"""Numba's decorators as all kernels of the CPU have them, with machine code kept between runs."""

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from numba import config, njit

from ..files import alone

settings: Any = config


def _cache_folder() -> str:
    """Where compiled kernels are kept, by the hash of all sources: Numba itself looks only at the
    file of a kernel, not at those of the functions that it calls and the constants that it reads.
    """
    here = Path(__file__).parent
    paths = sorted([*here.glob("cpu_*.py"), *(here.parent / "ops").glob("*.py")])
    sources = b"".join(path.read_bytes() for path in paths)
    if settings.CACHE_DIR:
        folder = Path(settings.CACHE_DIR)
    elif os.access(here, os.W_OK):
        folder = here / "__pycache__"
    else:
        from platformdirs import user_cache_path

        folder = user_cache_path("minivae") / "numba"
    folder /= f"kernels-{hashlib.sha256(sources).hexdigest()[:16]}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # then they are kept for this process alone
        folder = Path(tempfile.mkdtemp(prefix="minivae-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


CACHE_FOLDER = _cache_folder()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's decorator, with machine code that is kept between runs."""

    def decorate(function: Callable[..., Any]) -> Any:
        others = settings.CACHE_DIR
        settings.CACHE_DIR = CACHE_FOLDER
        try:
            compiled: Any = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        finally:
            settings.CACHE_DIR = others
        cache = compiled._cache
        cache.save_overload = _saved_alone(cache.save_overload, cache.cache_path)
        return compiled

    return decorate


def _saved_alone(save: Callable[..., None], folder: str) -> Callable[..., None]:
    """Numba reads a kernel's index, numbers one more file in it, and writes it: two processes at a
    time would give two files one number."""

    @wraps(save)
    def saved(*arguments: Any) -> None:
        with alone(Path(folder)):
            save(*arguments)

    return saved


kernel: Any = _compiled(fastmath={"contract"})
sum_kernel: Any = _compiled(fastmath={"contract", "reassoc"})
inlined: Any = njit(inline="always")
"""For what a loop around it must see to be vectorised: a loop of its own."""
