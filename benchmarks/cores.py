"""How far apart two cores are: what it takes a cache line to go from one to the other and back. On
a virtual machine they share a cache at times, and at others they do not."""

from typing import Any

import numpy as np
from numba import get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .measure import Candidate

TRIPS = 1000
IDLE, SENT, ENDED = 0, 1, 2


def _pointer(context: Any, builder: Any, signature: Any, flag: Any) -> Any:
    """To the first element of an array."""
    array = context.make_array(signature.args[0])(context, builder, flag)
    return cgutils.gep(builder, array.data, 0)


@intrinsic
def _read(typing_context: Any, flag: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments[0])
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(flag), generate


@intrinsic
def _write(typing_context: Any, flag: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments[0])
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(flag, types.int64), generate


@njit(parallel=True, nogil=True)
def _trips(flag: NDArray[np.int64], trips: int) -> None:
    for side in prange(2):
        if side == 0:
            for _ in range(trips):
                _write(flag, SENT)
                while _read(flag) == SENT:
                    pass
            _write(flag, ENDED)
        else:
            while _read(flag) != ENDED:
                if _read(flag) == SENT:
                    _write(flag, IDLE)


def round_trip() -> Candidate | None:
    """What makes TRIPS of them between the first two threads of Numba; None where there is one."""
    if get_num_threads() < 2:
        return None
    flag = np.zeros(64, np.int64)

    def run() -> None:
        flag[0] = IDLE
        _trips(flag, TRIPS)

    return Candidate(run, calls=TRIPS)
