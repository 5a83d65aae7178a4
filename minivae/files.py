"""Files that are never half written."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to: synced to disk and renamed to `path` if the
    block succeeds, removed if it does not, so that `path` is always the old file or the new one.

    Raises InputError, in one line, if the file cannot be written (no space, no permission), or if
    there is something else at `path`, such as a folder or a device.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file():
            found = "found something else there"
            raise InputError(f"cannot write {path}: expected a file's name, {found}")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def exists(path: Path) -> bool:
    """Whether there is something at `path`; InputError where the system does not tell."""
    try:
        return path.exists()
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise InputError(f"{path}: {error.strerror}") from None


def resolved(path: Path) -> Path:
    """The absolute path without links; InputError where there is none."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, a folder that is gone
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the operating system unlocks it if the process is killed.
    InputError if another process holds the lock."""
    with _holding(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process holds a folder, and holds it."""
    with _holding(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def _holding(folder: Path, operation: int) -> Iterator[None]:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be opened: {error.strerror}") from None
    try:
        with suppress(OSError):  # of a file system without locks
            _lock(handle, operation, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, operation: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training this run") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
