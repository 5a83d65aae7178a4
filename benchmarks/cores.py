"""How far apart two cores are: what it takes a cache line to go from one to the other and back. On
a virtual machine they share a cache at times, and at others they do not."""

from functools import partial

import numpy as np

from minivae.backends.cpu_cache import kernel
from minivae.backends.cpu_jobs import job, run
from minivae.backends.cpu_threads import CORES, read, write

from .measure import Candidate

TRIPS = 1000
IDLE, SENT, ENDED = 0, 1, 2


@kernel
def _trips(part, parts, flag, trips):
    """`trips` times, the first thread sends the second a number and gets another."""
    if part == 0:
        for _ in range(trips):
            write(flag, 0, SENT)
            while read(flag, 0) == SENT:
                pass
        write(flag, 0, ENDED)
    elif part == 1:
        while read(flag, 0) != ENDED:
            if read(flag, 0) == SENT:
                write(flag, 0, IDLE)


@kernel
def _reset(flag):
    flag[0] = IDLE


def round_trip() -> Candidate | None:
    """TRIPS round trips between the first two threads, to time; None on a single core."""
    if CORES < 2:
        return None
    flag = np.zeros(64, np.int64)
    trips = job([(_reset, (flag,)), (_trips, (flag, TRIPS))])
    return Candidate(partial(run, trips, CORES), calls=TRIPS)
