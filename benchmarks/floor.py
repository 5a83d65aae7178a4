"""The floor: bytes over the machine's copy bandwidth, or operations over the rate of its library's
matrix product, whichever takes longer. Below it is what stays in a cache, or a better product."""

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
from .measure import ROUNDS, Candidate, interleaved

FLOAT = 4
ADAM_ARRAYS = 6
"""Parameters and both moments, read and written."""


class Rates(NamedTuple):
    """Copy bandwidth, counting bytes read and written, and float32 products."""

    copy_gigabytes_per_second: float
    product_gigaflops: float

    def milliseconds(self, moved: float, operations: float) -> float:
        """The floor of something that must move and do so much."""
        billionths = moved / self.copy_gigabytes_per_second, operations / self.product_gigaflops
        return max(billionths) / 1e6


def machine_rates(device: str, quick: bool) -> Rates:
    """The rates of a device; those of the CPU where it is emulated."""
    on_gpu = device in ("cuda", "numba_cuda")
    size, edge = (1 << 22, 512) if quick else (1 << 26, 8192 if on_gpu else 2048)
    if on_gpu:
        import cupy as xp
    else:
        xp = np
    wait = backends.get(device if on_gpu else "cpu").synchronize
    # Of random numbers, as a model's are: equal ones take a GPU less power.
    rng = np.random.default_rng(0)
    source, a, b = (
        xp.asarray(rng.random(shape, np.float32)) for shape in (size, (edge, edge), (edge, edge))
    )
    target, c = xp.empty_like(source), xp.empty_like(a)
    times = interleaved(
        {
            "copy": Candidate(_copy(xp, target, source), wait),
            "product": Candidate(lambda: xp.matmul(a, b, out=c), wait),
        },
        3 if quick else ROUNDS,
    )
    # The fastest fifth: a floor is what the machine can do when nobody disturbs it.
    return Rates(
        2 * FLOAT * size / times["copy"]["p20"] / 1e6,
        2 * edge**3 / times["product"]["p20"] / 1e6,
    )


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


def step_floor(case: Case, rates: Rates) -> float:
    """Milliseconds that a step needs at least."""
    counter = step_counts(case)
    return rates.milliseconds(counter.moved, counter.operations)
