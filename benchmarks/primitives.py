"""Each primitive against its floor, with the machine's rates as measured in the same run. Small
arrays stay in cache, where a primitive can beat that floor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minivae import backends
from minivae.ops.activations import IDENTITY, Activation
from minivae.ops.conv import ConvGeometry
from minivae.ops.philox import Noise
from minivae.ops.state import SCHEDULE_COLUMNS, new_state

from .floor import FLOAT, machine_rates
from .measure import ROUNDS, SECONDS_A_TURN, Candidate, interleaved

RELU = Activation("relu")
CALLS_A_GRAPH = 20
"""Calls that are one launch on a GPU, so that launching is not what is timed."""


class Work(NamedTuple):
    """A call, the fewest bytes it can move and the multiply-adds it must do, times two."""

    run: Callable[[], None]
    bytes: float
    operations: float


class _Arrays:
    """Random arrays of a backend."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.rng = backend, np.random.default_rng(0)

    def __call__(self, *shape: int) -> Any:
        return self.backend.asarray(self.rng.standard_normal(shape, np.float32))


def _dense(backend: Any, n: int, i: int, o: int) -> dict[str, Work]:
    array = _Arrays(backend)
    x, w, b, y, dw = array(n, i), array(i, o), array(o), array(n, o), array(i, o)
    dx, db = array(n, i), array(o)
    operations = 2.0 * n * i * o
    moved = FLOAT * (n * i + i * o + n * o)
    return {
        f"dense_forward {n}x{i}x{o}": Work(
            lambda: backend.dense_forward(x, w, b, y, RELU), moved, operations
        ),
        f"dense_input_gradient {n}x{i}x{o}": Work(
            lambda: backend.dense_input_gradient(y, w, x, dx, RELU),
            moved + FLOAT * n * i,
            operations,
        ),
        f"dense_weight_gradient {n}x{i}x{o}": Work(
            lambda: backend.dense_weight_gradient(x, y, dw, db), moved, operations
        ),
    }


def _conv(backend: Any, n: int, size: int, c: int, k: int, stride: int) -> dict[str, Work]:
    array = _Arrays(backend)
    small = -(-size // stride)
    x, y = array(n, size, size, c), array(n, small, small, k)
    w, b, dw, db, dx = array(3, 3, c, k), array(k), array(3, 3, c, k), array(k), array(*x.shape)
    geometry = ConvGeometry(stride, stride, 1, 1)
    operations = 2.0 * n * small * small * 9 * c * k
    moved = FLOAT * (x.size + y.size + w.size)
    label = f"{n}x{size}x{size}x{c} to {k}, stride {stride}"
    return {
        f"conv2d_forward {label}": Work(
            lambda: backend.conv2d_forward(x, w, b, y, geometry, RELU), moved, operations
        ),
        f"conv2d_input_gradient {label}": Work(
            lambda: backend.conv2d_input_gradient(y, w, x, dx, geometry, RELU),
            moved + FLOAT * x.size,
            operations,
        ),
        f"conv2d_weight_gradient {label}": Work(
            lambda: backend.conv2d_weight_gradient(x, y, dw, db, geometry), moved, operations
        ),
    }


def _elementwise(backend: Any, n: int, m: int, d: int, parameters: int) -> dict[str, Work]:
    array = _Arrays(backend)
    logits, dlogits, loss = array(n, m), array(n, m), array(n)
    x = backend.asarray(np.random.default_rng(1).random((n, m), np.float32))
    head, z, kl, dhead, weight = (
        array(n, 2 * d),
        array(n, d),
        array(n, d),
        array(n, 2 * d),
        array(d),
    )
    p, g, first, second = (array(parameters) for _ in range(4))
    second *= second
    schedule = backend.asarray(np.full((1, SCHEDULE_COLUMNS), 1e-3, np.float32))
    state = backend.asarray(new_state())
    data = backend.asarray(np.random.default_rng(2).integers(0, 256, (4096, m), dtype=np.uint8))
    order = backend.asarray(np.random.default_rng(3).permutation(4096))
    noise = Noise(0, 0)
    return {
        f"bernoulli_loss {n}x{m}": Work(
            lambda: backend.bernoulli_loss(logits, x, loss, dlogits, 1 / n), 3 * FLOAT * n * m, 0
        ),
        f"squared_error_loss {n}x{m}": Work(
            lambda: backend.squared_error_loss(logits, x, loss, dlogits, 1 / n, 1.0, IDENTITY),
            3 * FLOAT * n * m,
            0,
        ),
        f"latent_forward {n}x{d}": Work(
            lambda: backend.latent_forward(head, z, kl, noise, state), 4 * FLOAT * n * d, 0
        ),
        f"latent_backward {n}x{d}": Work(
            lambda: backend.latent_backward(head, z, weight, dhead, noise, state),
            5 * FLOAT * n * d,
            0,
        ),
        f"adam_update {parameters}": Work(
            lambda: backend.adam_update(p, g, first, second, schedule, state, 0.9, 0.999, 1e-8),
            7 * FLOAT * parameters,
            0,
        ),
        f"gather_batch {n}x{m}": Work(
            lambda: backend.gather_batch(data, order, state, x, "none", noise),
            (1 + FLOAT) * n * m,
            0,
        ),
    }


def measure_primitives(device: str, quick: bool) -> dict[str, Any]:
    """The machine's rates, and each primitive's time, floor and their ratio, at the sizes of dense
    784-400-20 and of the convolutional VAE at batch 128."""
    backend = backends.get(device)
    n = 8 if quick else 128
    works = {
        **_dense(backend, n, 784, 400),
        **_dense(backend, n, 400, 40),
        **_conv(backend, n, 28, 1, 32, 2),
        **_conv(backend, n, 14, 32, 64, 2),
        **_conv(backend, n, 14, 64, 64, 2),
        **_elementwise(backend, n, 784, 20, 652_824),
    }
    rates = machine_rates(device, quick)
    rounds, seconds = (3, 0.01) if quick else (ROUNDS, SECONDS_A_TURN)
    calls = CALLS_A_GRAPH if device == "cuda" else 1

    def candidate(work: Work) -> Candidate:
        def run() -> None:
            for _ in range(calls):
                work.run()

        return Candidate(backend.capture(run), backend.synchronize, calls)

    times = interleaved({name: candidate(work) for name, work in works.items()}, rounds, seconds)
    results = []
    for name, work in works.items():
        floor = rates.milliseconds(work.bytes, work.operations)
        results.append(
            {
                "primitive": name,
                "milliseconds": times[name],
                "floor_milliseconds": float(f"{floor:.4g}"),
                "times_the_floor": float(f"{times[name]['median'] / floor:.3g}"),
            }
        )
    rounded = {name: float(f"{rate:.4g}") for name, rate in rates._asdict().items()}
    return {"rates": rounded, "primitives": results}
