"""The command line. A command's module loads when it is called, so that help answers at once."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..errors import InputError
from .arguments import parse

MODULES = {
    "train": "train",
    "reconstruct": "runs",
    "sample": "runs",
    "encode": "runs",
    "evaluate": "evaluate",
    "plot": "runs",
    "export": "runs",
    "gradcheck": "tools",
    "bench": "tools",
    "info": "tools",
}
"""Where a command is: a function of its name, of the parsed arguments."""

LESS_MEMORY = {
    "train": "a smaller model or --batch-size, or --accumulate",
    "evaluate": "a smaller --chunk",
}
"""What helps a command that ran out of it."""

BAD_INPUT, NOT_FINITE = 2, 1


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    command: Callable[[argparse.Namespace], None]
    command = getattr(import_module(f".{MODULES[name]}", __name__), name)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    _open_standard_streams()
    try:
        parsed = parse(arguments)
        _command(parsed.command)(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:  # of standard output: others are told where they occur
        _drop_output()
        print(f"minivae: error: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except InputError as error:
        print(f"minivae: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except MemoryError:
        less = LESS_MEMORY.get(parsed.command)
        hint = f"; {less}, needs less" if less else ""
        print(f"minivae: error: out of memory{hint}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        return _report(error)
    except KeyboardInterrupt as interrupt:
        print(f"minivae: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    return 0


def _open_standard_streams() -> None:
    """Has both streams written to, whatever the caller closed and whatever they can encode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Nobody can read what the interpreter would flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: Exception) -> int:
    from ..train import NotFiniteError

    if not isinstance(error, NotFiniteError):
        raise error
    print(f"minivae: error: {error}", file=sys.stderr)
    return NOT_FINITE
