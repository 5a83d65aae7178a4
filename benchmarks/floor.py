"""The floor: bytes over the machine's copy bandwidth, or operations over the rate of its library's
matrix product, whichever takes longer, both measured in the same turns as what is compared. Below
it is what stays in a cache, or a better product."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from minivae import backends
from minivae.backends.reference import PRIMITIVES, ReferenceBackend
from minivae.environment import cores
from minivae.train import Trainer

from .cases import Case
from .measure import SECONDS_A_TURN, Candidate, Turns

FLOAT = 4
QUICK_SECONDS = 0.01
ADAM_ARRAYS = 6
"""Parameters and both moments, read and written."""


class Rates(NamedTuple):
    """Copy bandwidth, counting bytes read and written, and of matrix products."""

    copy_gigabytes_per_second: float
    product_gigaflops: float

    def milliseconds(self, moved: float, operations: float) -> float:
        """The floor of something that must move and do so much."""
        billionths = moved / self.copy_gigabytes_per_second, operations / self.product_gigaflops
        return max(billionths) / 1e6


class RateMeter:
    """The rates of a device, or of the CPU where it is emulated, at this moment."""

    def __init__(self, device: str, quick: bool) -> None:
        on_gpu = device in ("cuda", "numba_cuda")
        self._size, self._edge = (1 << 22, 512) if quick else (1 << 26, 8192 if on_gpu else 2048)
        if on_gpu:
            import cupy as xp
        else:
            xp = np
        wait = backends.get(device if on_gpu else "cpu").synchronize
        # Of random numbers, as a model's are: equal ones take a GPU less power.
        rng, square = np.random.default_rng(0), (self._edge, self._edge)
        source, a, b = (
            xp.asarray(rng.random(shape, np.float32)) for shape in (self._size, square, square)
        )
        target, c = xp.empty_like(source), xp.empty_like(a)
        candidates = {
            "copy": Candidate(_copy(xp, target, source), wait),
            "product": Candidate(lambda: xp.matmul(a, b, out=c), wait),
        }
        self._turns = Turns(candidates, QUICK_SECONDS if quick else SECONDS_A_TURN)

    def __call__(self) -> Rates:
        times = self._turns.take()
        copied = 2 * FLOAT * self._size / times["copy"] / 1e6
        return Rates(copied, 2 * self._edge**3 / times["product"] / 1e6)


class Floor(NamedTuple):
    """A floor beside times of the same turns: what slows the machine down slows both."""

    milliseconds: float
    times_the_floor: float

    @staticmethod
    def of(counter: "Counter", times: Sequence[float], rates: Sequence[Rates]) -> "Floor":
        """Medians over turns, each with a time and rates, of something so counted."""
        floors = [rate.milliseconds(counter.moved, counter.operations) for rate in rates]
        ratios = [time / floor for time, floor in zip(times, floors, strict=False)]
        return Floor(*(float(f"{np.median(values):.3g}") for values in (floors, ratios)))


def median_rates(rates: Sequence[Rates]) -> dict[str, float]:
    """For the result file."""
    medians = np.median(np.array(rates), axis=0)
    return {name: float(f"{m:.4g}") for name, m in zip(Rates._fields, medians, strict=True)}


def _copy(xp: Any, target: Any, source: Any) -> Callable[[], None]:
    """A copy by all cores, or by the GPU."""
    if xp is not np:
        return lambda: xp.copyto(target, source)
    parts = cores() or 1
    targets, sources = (np.array_split(array, parts) for array in (target, source))
    pool = ThreadPoolExecutor(parts)

    def copy() -> None:
        list(pool.map(np.copyto, targets, sources))

    return copy


class Counter(ReferenceBackend):
    """Counts what primitives would have to move and do, and does nothing. What a primitive reads or
    writes is moved once; if `fused`, a weight's gradient goes to Adam without being moved."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.moved = self.operations = 0.0

    def count(self, name: str, arguments: Sequence[Any]) -> None:
        if name == "gather_batch":
            data, _, _, x = arguments[:4]
            self.moved += x.size * data.itemsize + x.nbytes
        elif name == "gather_labels":
            labels, order, _, onehot = arguments
            self.moved += len(onehot) * (labels.itemsize + order.itemsize) + onehot.nbytes
        elif name == "adam_update":
            self.moved += (ADAM_ARRAYS + (not self.fused)) * arguments[0].nbytes
        elif name.endswith("weight_gradient"):
            x, dz, dw, db = arguments[:4]
            self.moved += x.nbytes + dz.nbytes + (0 if self.fused else dw.nbytes + db.nbytes)
            self.operations += 2.0 * dw.size * len_of_small(name, x, dz)
        else:
            arrays = {a.ctypes.data: a for a in arguments if isinstance(a, np.ndarray)}
            self.moved += sum(array.nbytes for array in arrays.values())
            if name.startswith(("dense", "conv")):
                first, w, third, fourth = arguments[:4]
                x, y = (third, first) if name.endswith("input_gradient") else (first, fourth)
                self.operations += 2.0 * w.size * len_of_small(name, x, y)


def len_of_small(name: str, x: Any, y: Any) -> int:
    """How often a layer's weight is multiplied with the layer's input x or output y: rows, or
    positions of the smaller image."""
    return math.prod((x if name.startswith("conv_transpose2d") else y).shape[:-1])


def _counting(name: str) -> Any:
    return lambda self, *arguments: self.count(name, arguments)


for _name in PRIMITIVES:
    setattr(Counter, _name, _counting(_name))


def step_counts(case: Case) -> Counter:
    """What a step has to move and do, if each primitive moves its own operands."""
    counter = Counter(fused=True)
    Trainer(case.model.to(counter), case.splits, case.training).step()
    return counter
