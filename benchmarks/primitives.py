"""Each primitive against its floor, with the machine's rates as measured in the same run. Small
arrays stay in cache, where a primitive can beat that floor."""

from typing import Any

import numpy as np

from minivae import backends
from minivae.backends.reference import Call
from minivae.ops.activations import IDENTITY, Activation
from minivae.ops.conv import ConvGeometry
from minivae.ops.elbo import TOTALS_SIZE
from minivae.ops.philox import Noise
from minivae.ops.state import SCHEDULE_COLUMNS, new_state

from .floor import Counter, Floor, RateMeter, median_rates
from .measure import (
    LIMIT,
    ROUNDS,
    SECONDS_A_TURN,
    Candidate,
    OwnProcess,
    Turns,
    collected,
    summary,
)

RELU = Activation("relu")
CALLS_A_GRAPH = 20
"""Calls that are one launch on a GPU, so that launching is not what is timed."""

LATENT, CLASSES, DRAWS, PARAMETERS, IMAGES = 20, 10, 5, 652_824, 4096
NOISE = Noise(0, 0)


class _Arrays:
    """Random arrays of a backend."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.rng = backend, np.random.default_rng(0)

    def __call__(self, *shape: int) -> Any:
        return self.backend.asarray(self.rng.standard_normal(shape, np.float32))

    def unit(self, *shape: int) -> Any:
        """Numbers in [0, 1)."""
        return self.backend.asarray(self.rng.random(shape, np.float32))

    def integers(self, limit: int, *shape: int, dtype: Any = np.int64) -> Any:
        """Numbers from 0 on, below `limit`."""
        return self.backend.asarray(self.rng.integers(limit, size=shape, dtype=dtype))


def _dense(array: _Arrays, n: int, i: int, o: int) -> dict[str, Call]:
    x, w, b, y, dx = array(n, i), array(i, o), array(o), array(n, o), array(n, i)
    calls = (
        Call("dense_forward", x, w, b, y, RELU),
        Call("dense_input_gradient", y, w, x, dx, RELU),
        Call("dense_weight_gradient", x, y, array(i, o), array(o)),
    )
    return _labelled(f"{n}x{i}x{o}", calls)


def _conv(array: _Arrays, n: int, size: int, c: int, k: int, stride: int) -> dict[str, Call]:
    """A convolution of images (size, size, c) to k channels."""
    small = -(-size // stride)
    x, y, w = array(n, size, size, c), array(n, small, small, k), array(3, 3, c, k)
    calls = _gradients("conv2d", x, y, w, array, stride)
    return _labelled(f"{n}x{size}x{size}x{c} to {k}, stride {stride}", calls)


def _conv_transpose(
    array: _Arrays, n: int, size: int, c: int, k: int, stride: int
) -> dict[str, Call]:
    """A transposed convolution of images (size, size, c) to k channels."""
    large = size * stride
    x, y, w = array(n, size, size, c), array(n, large, large, k), array(3, 3, k, c)
    calls = _gradients("conv_transpose2d", x, y, w, array, stride)
    return _labelled(f"{n}x{size}x{size}x{c} to {k}, stride {stride}", calls)


def _gradients(kind: str, x: Any, y: Any, w: Any, array: _Arrays, stride: int) -> tuple[Call, ...]:
    geometry = ConvGeometry(stride, stride, 1, 1)
    b, dx, dw, db = array(y.shape[3]), array(*x.shape), array(*w.shape), array(y.shape[3])
    return (
        Call(f"{kind}_forward", x, w, b, y, geometry, RELU),
        Call(f"{kind}_input_gradient", y, w, x, dx, geometry, RELU),
        Call(f"{kind}_weight_gradient", x, y, dw, db, geometry),
    )


def _batch(array: _Arrays, n: int, m: int) -> dict[str, Call]:
    state = array.backend.asarray(new_state())
    order = array.backend.asarray(np.random.default_rng(3).permutation(IMAGES))
    data = array.integers(256, IMAGES, m, dtype=np.uint8)
    onehot = array.backend.zeros((n, CLASSES))
    onehot[:, 0] = 1
    gather = Call("gather_batch", data, order, state, array(n, m), "none", NOISE)
    labels = Call("gather_labels", array.integers(CLASSES, IMAGES), order, state, onehot)
    x, joined = array(n, m), array(n, m + CLASSES)
    join = (
        Call("join_forward", x, onehot, joined),
        Call("join_input_gradient", joined, x, array(n, m), RELU),
    )
    activation = (
        Call("activation_forward", x, array(n, m), RELU),
        Call("activation_backward", None, x, array(n, m), array(n, m), RELU),
    )
    return {
        **_labelled(f"{n}x{m}", [gather, *join, *activation]),
        **_labelled(f"{n}x{CLASSES}", [labels]),
    }


def _latent(array: _Arrays, n: int, d: int) -> dict[str, Call]:
    state = array.backend.asarray(new_state())
    head, z, kl, dhead = array(n, 2 * d), array(n, d), array(n, d), array(n, 2 * d)
    drawn, log_ratio, weights = array(n * DRAWS, d), array(n * DRAWS), array.unit(n * DRAWS)
    noise = (NOISE, state)
    calls = (
        Call("latent_forward", head, z, kl, *noise),
        Call("latent_backward", head, z, array(d), dhead, *noise),
    )
    importance = (
        Call("importance_latent_forward", head, drawn, log_ratio, 1.0, *noise),
        Call("importance_latent_backward", head, drawn, weights, dhead, 1 / n, 1.0, *noise),
    )
    return {
        **_labelled(f"{n}x{d}", calls),
        **_labelled(f"{n}x{d}, {DRAWS} draws", importance),
    }


def _losses(array: _Arrays, n: int, m: int, d: int) -> dict[str, Call]:
    x, logits, loss, dlogits = array.unit(n, m), array(n, m), array(n), array(n, m)
    drawn, ddrawn = array(n * DRAWS, m), array(n * DRAWS, m)
    log_ratio, weights = array(n * DRAWS), array(n * DRAWS)
    backend = array.backend
    schedule = backend.asarray(np.full((1, SCHEDULE_COLUMNS), 1e-3, np.float32))
    sums = (loss, array(n, d), schedule, backend.asarray(new_state()))
    totals, kl_weight = backend.zeros((TOTALS_SIZE,), np.float64), array(d)
    calls = (
        Call("bernoulli_loss", logits, x, loss, dlogits, 1 / n),
        Call("squared_error_loss", logits, x, loss, dlogits, 1 / n, 1.0, IDENTITY),
        Call("calibrate_gaussian", array.unit(n), array(n, m), backend.zeros((1,))),
    )
    importance = Call("importance_loss", drawn, x, log_ratio, weights, loss, ddrawn, 1 / n, True)
    sums_calls = (
        Call("elbo_totals", *sums, 0.0, kl_weight, totals),
        Call("capacity_totals", *sums, kl_weight, totals),
    )
    return {
        **_labelled(f"{n}x{m}", calls),
        **_labelled(f"{n}x{m}, {DRAWS} draws", [importance]),
        **_labelled(f"{n}x{d}", sums_calls),
    }


def _optimizer(array: _Arrays, parameters: int) -> dict[str, Call]:
    p, g, first, second = (
        array(parameters),
        array(parameters),
        array(parameters),
        array.unit(parameters),
    )
    schedule = array.backend.asarray(np.full((1, SCHEDULE_COLUMNS), 1e-3, np.float32))
    state = array.backend.asarray(new_state())
    calls = (
        Call("adam_update", p, g, first, second, schedule, state, 0.9, 0.999, 1e-8),
        Call("clip_gradient", array(parameters), 1e9, array(1)),
    )
    return _labelled(str(parameters), calls)


def _labelled(sizes: str, calls: Any) -> dict[str, Call]:
    return {f"{call.primitive} {sizes}": call for call in calls}


def primitive_calls(backend: Any, n: int) -> dict[str, Call]:
    """Every primitive but `advance_state`, which moves nothing, at the sizes of dense 784-400-20
    and of the convolutional VAE at batch `n`."""
    array = _Arrays(backend)
    return {
        **_dense(array, n, 784, 400),
        **_dense(array, n, 400, 2 * LATENT),
        **_conv(array, n, 28, 1, 32, 2),
        **_conv(array, n, 14, 32, 64, 2),
        **_conv_transpose(array, n, 7, 64, 64, 2),
        **_conv_transpose(array, n, 14, 64, 32, 2),
        **_conv_transpose(array, n, 28, 32, 1, 1),
        **_latent(array, n, LATENT),
        **_losses(array, n, 784, LATENT),
        **_optimizer(array, PARAMETERS),
        **_batch(array, n, 784),
    }


def measure_primitives(device: str, quick: bool) -> dict[str, Any]:
    """The machine's rates, and each primitive's time, floor and their ratio."""
    backend = backends.get(device)
    n = 8 if quick else 128
    rounds, seconds = (3, 0.01) if quick else (ROUNDS, SECONDS_A_TURN)
    repeats = CALLS_A_GRAPH if device == "cuda" else 1

    def candidate(call: Call) -> Candidate:
        def run() -> None:
            for _ in range(repeats):
                call.run(backend)

        return Candidate(backend.capture(run), backend.synchronize, repeats)

    calls = primitive_calls(backend, n)
    turns = Turns({name: candidate(call) for name, call in calls.items()}, seconds)
    meter = OwnProcess(RateMeter, device, quick)
    meter.wait_until_prepared(LIMIT)  # else it does so in the first turn
    try:
        taken = [(turns.take(), meter.ask(LIMIT)) for _ in range(rounds)]
    finally:
        meter.end()
    times, rates = collected(turn for turn, _ in taken), [rate for _, rate in taken]
    counter = Counter(fused=False)
    results = []
    for name, call in primitive_calls(counter, n).items():
        counter.moved = counter.operations = 0.0
        call.run(counter)
        floor = Floor.of(counter, times[name], rates)
        results.append(
            {
                "primitive": name,
                "milliseconds": summary(times[name]),
                "floor_milliseconds": floor.milliseconds,
                "times_the_floor": floor.times_the_floor,
            }
        )
    return {"rates": median_rates(rates), "primitives": results}
