"""The shipped CUDA C++ kernels on the CPU, beyond every backend's cases in test_backends.py: orders
of threads, fused launches, training, and planted bugs, which must be caught."""

import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import relative_error
from numpy.typing import NDArray
from test_backends import (
    CASES,
    PRODUCTS,
    TF32_TOLERANCE,
    TOLERANCE,
    Case,
    In,
    InOut,
    Out,
    Part,
    Runner,
    Scratch,
    check,
    reference,
)

from minivae import backends
from minivae.backends import emulated, kernel_arguments, kernel_backend
from minivae.backends.emulated import EmulatedBackend
from minivae.backends.kernel_arguments import kernels
from minivae.backends.reference import Call
from minivae.benchmarks.launches import CONV_JOB, DENSE_JOB, SMALL_IMAGE, SPLITS
from minivae.data import load
from minivae.errors import InputError
from minivae.kernels import Tile, source
from minivae.ops.activations import IDENTITY, Activation
from minivae.ops.conv import ConvGeometry
from minivae.ops.philox import LATENT_STREAM, Noise
from minivae.ops.state import FAILED, SCHEDULE_COLUMNS, new_state
from minivae.presets import Training, preset
from minivae.train import Trainer, fit


class NotPlantedError(Exception):
    """A bug that is not in the kernels, and so could not be caught."""


class Shuffled(EmulatedBackend):
    """The kernels, with threads and blocks in an order that `seed` gives, or in their own if 0.
    `grids` has each kernel's last."""

    seed = 0

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__(precision)
        self.grids: dict[str, tuple[int, int, int]] = {}

    def run(self, kernel: str, tile: Tile, grid: tuple[int, int, int], *launch: Any) -> None:
        self.grids[kernel] = grid
        module = self.module(kernels()[kernel].stem, tile)
        module.shuffle(self.seed)
        super().run(kernel, tile, grid, *launch)
        module.shuffle(0)


class Planted(Shuffled):
    """The kernels with one place of one source changed, all compiled with `flags`."""

    def __init__(self, stem: str, right: str, wrong: str, *flags: str, precision: str = "fp32"):
        super().__init__(precision)
        self.stem, self.right, self.wrong, self.flags = stem, right, wrong, flags

    def module(self, stem: str, tile: Tile) -> ctypes.CDLL:
        text = source(stem, tensor_cores=self.precision == "tf32", tile=tile)
        if stem == self.stem:
            if text.count(self.right) != 1:
                raise NotPlantedError(f"{self.right!r} is {text.count(self.right)} times in {stem}")
            text = text.replace(self.right, self.wrong)
        return emulated.build(text, *self.flags)


# The fused update


KERNEL_BACKENDS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GEOMETRY = ConvGeometry(2, 2, 1, 1)
SHAPES = [(131, 67), (67,), (7, 5), (5,), (3, 3, 3, 5), (5,), (3, 3, 1, 5), (1,)]
"""Weights and biases of two dense layers, a convolution and a transposed one to a grey image."""

STARTS = np.cumsum([0, *(32 * -(-math.prod(shape) // 32) for shape in SHAPES)])
IN_A_TENSOR = np.zeros(STARTS[-1], bool)
for start, shape in zip(STARTS[:-1], SHAPES, strict=True):
    IN_A_TENSOR[start:][: math.prod(shape)] = True

FLAT = list(np.random.default_rng(7).random((3, STARTS[-1]), np.float32))
"""Parameters and moments before an update."""


def update(gradient: In | Scratch, *, fused: bool = True, failed: int = 0) -> Case:
    """An update of all layers. It writes parameters, moments and state."""
    rng = np.random.default_rng(4)
    # So many that the contractions are split, that of the convolutions into a tree. The second
    # layer has more rows, as the decoder of a model of several draws has.
    n = 260

    def normal(*shape: int) -> In:
        return In(rng.standard_normal(shape, np.float32))

    def gradients(layer: int) -> list[Part]:
        return [Part(gradient, STARTS[i], SHAPES[i]) for i in (2 * layer, 2 * layer + 1)]

    # So dark that a tile of 8 columns has images without a lit number, and with one.
    images = In(rng.standard_normal((n, 131), np.float32) * (rng.random((n, 131)) < 0.1))
    large, grey, small = (n, 7, 7, 3), (n, 7, 7, 1), (n, 4, 4, 5)
    calls = [
        Call("dense_weight_gradient", images, normal(n, 67), *gradients(0)),
        Call("dense_weight_gradient", normal(3 * n, 7), normal(3 * n, 5), *gradients(1)),
        Call("conv2d_weight_gradient", normal(*large), normal(*small), *gradients(2), GEOMETRY),
        Call(
            "conv_transpose2d_weight_gradient",
            normal(*small),
            normal(*grey),
            *gradients(3),
            GEOMETRY,
        ),
    ]
    state = new_state()
    state[FAILED] = failed
    p, m, v = (InOut(array) for array in FLAT)
    schedule = In(np.full((1, SCHEDULE_COLUMNS), 0.3))
    adam = (p, gradient, m, v, schedule, InOut(state), 0.9, 0.999, 1e-8)
    if fused:
        return Case("optimizer_step", "fused", [calls, *adam, n])
    apart = [Call("weight_gradients", calls, gradient), Call("adam_update", *adam)]
    return Case("sequence", "update", [*apart, Call("advance_state", adam[5], n)])


GRADIENT = Scratch((STARTS[-1],))
NO_GRADIENT = In(np.full(STARTS[-1], np.nan))
"""For gradients that are written, and for those that may not be."""


def in_tensors(written: list[NDArray]) -> list[NDArray]:
    """What an update wrote, where a tensor is, with what was between the tensors before."""
    *flat, state = written
    between = zip(flat, FLAT, strict=True)
    return [*(np.where(IN_A_TENSOR, after, before) for after, before in between), state]


def assert_same_bits(actual: list[NDArray], expected: list[NDArray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("precision", backends.PRECISIONS)
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_a_fused_update_has_the_bits_of_gradient_and_adam_and_writes_no_gradient(
    name: str, precision: str
) -> None:
    run = Runner(backends.get(name, precision), np.float32)
    expected = in_tensors(run(update(GRADIENT, fused=False)))
    for _ in range(2):  # the second time with the counters of arrivals that the first left
        assert_same_bits(run(update(NO_GRADIENT)), expected)


def test_the_fused_updates_are_split_and_those_of_convolutions_into_a_tree() -> None:
    backend = Shuffled()
    Runner(backend, np.float32)(update(NO_GRADIENT))
    (fan,) = re.findall(r"FAN = (\d+);", source("conv"))
    dense, conv = (
        next(np.reshape(jobs, (-1, numbers)) for jobs in backend._jobs if len(jobs) == n * numbers)
        for n, numbers in ((2, DENSE_JOB), (3, CONV_JOB))
    )
    assert (dense[:, SPLITS] > 1).all()
    assert (conv[conv[:, SMALL_IMAGE] > 0, SPLITS] > int(fan)).all()


def test_a_group_that_needs_more_workspace_than_there_is_gets_it() -> None:
    calls, *others = update(NO_GRADIENT).arguments
    case = Case("optimizer_step", "convolutions", [calls[2:], *others])
    expected = Runner(EmulatedBackend(), np.float32)(case)
    backend = EmulatedBackend()
    backend._partials, backend._arrivals = backend.zeros((1,)), backend.zeros((1,), np.int32)
    assert_same_bits(Runner(backend, np.float32)(case), expected)
    assert min(backend._partials.size, backend._arrivals.size) > 1


@pytest.mark.parametrize("name", [*KERNEL_BACKENDS, "cpu"])
def test_a_fused_update_is_the_references(name: str) -> None:
    expected = in_tensors(reference(update(GRADIENT)))
    actual = Runner(backends.get(name), np.float32)(update(GRADIENT))
    for one, exact in zip(actual, expected, strict=True):
        assert relative_error(one, exact) < 2e-6  # Adam divides by roots of rounded squares


@pytest.mark.parametrize("name", [*KERNEL_BACKENDS, "cpu"])
def test_a_fused_update_of_a_failed_step_changes_nothing(name: str) -> None:
    *flat, state = Runner(backends.get(name), np.float32)(update(GRADIENT, failed=1))
    assert_same_bits(flat, FLAT)
    assert state.tolist() == [0, 0, 0, 0, 1]


# Fused sequences


def _totals(loss: In | Out, kl: NDArray, beta: float, free_bits: float) -> Call:
    schedule, state = In(np.full((1, SCHEDULE_COLUMNS), beta)), InOut(new_state())
    written = (Out((kl.shape[1],)), InOut(np.zeros(3), fixed=True))
    return Call("elbo_totals", loss, In(kl), schedule, state, free_bits, *written)


def _input_gradient(dz: Out, w: NDArray, x: NDArray) -> Call:
    """Through the decoder's last layer."""
    return Call("dense_input_gradient", dz, In(w), In(x), Out(x.shape), Activation("tanh"))


def dense_elbo(likelihood: str, n: int, i: int, o: int, d: int) -> Case:
    """The decoder's last layer, its loss, the totals, its input gradient."""
    rng = np.random.default_rng([n, i])
    x, w = rng.standard_normal((n, i)), rng.standard_normal((i, o)) / i**0.5
    y, loss, dz = Out((n, o)), Out((n,)), Out((n, o))
    # The squared error's gradient goes through the activation, that of the logits does not.
    squared = likelihood == "squared_error"
    activation = Activation("sigmoid") if squared else Activation("leaky_relu", 0.2)
    extra = (0.5, activation) if squared else ()
    scored = (y, In(rng.random((n, o))), loss, dz, 1 / n, *extra)
    calls = [
        Call("dense_forward", In(x), In(w), In(rng.random(o)), y, activation),
        Call(f"{likelihood}_loss", *scored),
        _totals(loss, rng.random((n, d)), 0.7, 0.45),
        _input_gradient(dz, w, x),
    ]
    return Case("sequence", f"{likelihood}-{n}x{i}x{o}x{d}", calls)


def dense_bound(importance: bool, n: int, draws: int, i: int, o: int) -> Case:
    """The same with the bound of several draws."""
    rng, rows = np.random.default_rng([n, draws]), n * draws
    x, w = rng.standard_normal((rows, i)), rng.standard_normal((i, o)) / i**0.5
    y, loss, dz = Out((rows, o)), Out((n,)), Out((rows, o))
    given = (y, In(rng.random((n, o))), In(rng.standard_normal(rows)))
    written = (Out((rows,)), loss, dz)
    calls = [
        Call("dense_forward", In(x), In(w), In(rng.random(o)), y, IDENTITY),
        Call("importance_loss", *given, *written, 1 / n, importance),
        _totals(loss, np.zeros((n, 0)), 1.0, 0.0),
        _input_gradient(dz, w, x),
    ]
    return Case("sequence", f"bound-{importance}-{n}x{draws}x{i}x{o}", calls)


def conv_totals(n: int, channels: int, filters: int, stride: int, d: int) -> Case:
    """The totals, and the input gradient of a decoder that ends in a convolution."""
    rng, geometry = np.random.default_rng([n, filters]), ConvGeometry(stride, stride, 1, 1)
    rows, columns = -(-9 // stride), -(-7 // stride)
    small, window = (n, rows, columns, filters), (3, 3, channels, filters)
    dz, w, x = (In(rng.standard_normal(s)) for s in ((n, 9, 7, channels), window, small))
    loss = In(rng.random(n))
    calls = [
        _totals(loss, rng.random((n, d)), 0.7, 0.45),
        Call(
            *("conv_transpose2d_input_gradient", dz, w, x),
            *(Out(small), geometry, Activation("elu")),
        ),
    ]
    return Case("sequence", f"conv_totals-{n}x{channels}x{filters}-stride{stride}x{d}", calls)


def evaluated(case: Case) -> Case:
    """The same without the input gradient, as an evaluation has it."""
    return Case("sequence", f"evaluated-{case.label}", case.arguments[:-1])


def latent_forward(n: int, d: int, o: int) -> Case:
    """The latent and the decoder's first layer."""
    rng, z = np.random.default_rng([n, d]), Out((n, d))
    head, w, b = (In(rng.standard_normal(shape)) for shape in ((n, 2 * d), (d, o), (o,)))
    noise, state = Noise(7, LATENT_STREAM), In(new_state(step=9))
    calls = [
        Call("latent_forward", head, z, Out((n, d)), noise, state),
        Call("dense_forward", z, w, b, Out((n, o)), Activation("relu")),
    ]
    return Case("sequence", f"latent_forward-{n}x{d}x{o}", calls)


def latent_backward(n: int, d: int, o: int) -> Case:
    """The gradients of the decoder's first layer and of the latent."""
    rng, dx = np.random.default_rng([n, d]), Scratch((n, d))
    shapes = ((n, o), (d, o), (n, d), (n, 2 * d), (d,))
    dz, w, x, head, weight = (In(rng.standard_normal(shape)) for shape in shapes)
    noise, state = Noise(7, LATENT_STREAM), In(new_state(step=9))
    calls = [
        Call("dense_input_gradient", dz, w, x, dx, IDENTITY),
        Call("latent_backward", head, dx, weight, Out((n, 2 * d)), noise, state),
    ]
    return Case("sequence", f"latent_backward-{n}x{d}x{o}", calls)


LOSS_SHAPES = [(1, 1, 1, 1), (33, 7, 67, 5), (65, 31, 12, 0), (40, 50, 29, 6), (129, 400, 784, 33)]
BOUND_SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 31, 67),
    (3, 33, 7, 12),
    (20, 50, 200, 784),
    (129, 2, 7, 12),
    (2, 257, 7, 9),
]
LATENT_SHAPES = [(1, 1, 1), (33, 5, 67), (128, 20, 400), (129, 65, 7), (40, 64, 33)]
CONV_TOTALS_SHAPES = [(1, 1, 1, 1, 1), (3, 1, 32, 1, 16), (33, 3, 5, 2, 0), (6, 64, 66, 2, 40)]
SEQUENCES = [
    *(dense_elbo("bernoulli", *shape) for shape in LOSS_SHAPES),
    *(dense_elbo("squared_error", *shape) for shape in LOSS_SHAPES),
    *(evaluated(dense_elbo("bernoulli", *shape)) for shape in LOSS_SHAPES),
    *(evaluated(dense_elbo("squared_error", *shape)) for shape in LOSS_SHAPES),
    *(dense_bound(importance, *s) for importance in (True, False) for s in BOUND_SHAPES),
    *(evaluated(dense_bound(True, *s)) for s in BOUND_SHAPES),
    *(make(*s) for make in (latent_forward, latent_backward) for s in LATENT_SHAPES),
    *(conv_totals(*shape) for shape in CONV_TOTALS_SHAPES),
]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.id)
def test_a_fused_sequence_is_the_references(name: str, case: Case) -> None:
    # A weight of a draw is the exponential of a difference of sums over all pixels.
    tolerance = TOLERANCE[np.float32] * (10 if "bound" in case.label else 1)
    check(Runner(backends.get(name), np.float32)(case), case, tolerance)


IN_TF32 = [case for case in SEQUENCES if case.label.startswith(("latent", "bernoulli", "conv"))]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", IN_TF32, ids=lambda case: case.id)
def test_a_fused_sequence_of_tf32_numbers_is_as_close_as_their_rounding(
    name: str, case: Case
) -> None:
    check(Runner(backends.get(name, "tf32"), np.float32)(case), case, TF32_TOLERANCE)


def test_no_more_draws_are_fused_than_a_block_can_weigh() -> None:
    (most,) = re.findall(r"MOST_WEIGHED = (\d+);", source("importance"))
    assert int(most) == kernel_backend.LARGEST_FUSED_DRAWS


def test_a_fused_bound_that_is_not_finite_is_seen() -> None:
    case = dense_bound(True, 2, 3, 3, 4)
    case.arguments[0].arguments[0].array[4, 1] = np.nan
    *_, state, _, totals, _ = Runner(EmulatedBackend(), np.float32)(case)
    assert state[FAILED] == 1
    assert not totals.any()


def test_a_size_that_kernels_cannot_count_to_is_refused() -> None:
    backend = EmulatedBackend()
    with pytest.raises(InputError, match="advance_state: batch_size is 2147483648"):
        backend.advance_state(backend.asarray(new_state()), 2**31)


def test_calls_that_do_not_follow_from_each_other_are_not_fused() -> None:
    case = dense_elbo("bernoulli", 5, 3, 4, 2)
    loss = case.arguments[1]
    case.arguments[1] = Call(loss.primitive, In(np.zeros((5, 4))), *loss.arguments[1:])
    check(Runner(EmulatedBackend(), np.float32)(case), case, TOLERANCE[np.float32])


# The order of threads


def case_of(primitive: str, label: str = "") -> Case:
    cases = (*CASES, *SEQUENCES)
    return next(c for c in cases if c.primitive == primitive and c.label.startswith(label))


DENSE = case_of("dense_forward", "128x784x400")
"""Split over several blocks, several stages deep."""

ORDERED = [
    *{case.primitive: case for case in CASES}.values(),
    DENSE,
    case_of("dense_weight_gradient", "128x784x400"),
    case_of("conv2d_weight_gradient", "6x28x28"),
    case_of("conv2d_input_gradient", "5x28x28x1-3x3x32-stride2x2"),
    case_of("conv_transpose2d_forward", "6x28x28"),
    case_of("conv_transpose2d_forward", "5x28x28x1-3x3x32-stride1x1"),
    case_of("conv_transpose2d_weight_gradient", "5x28x28x1-3x3x32-stride1x1"),
    case_of("elbo_totals"),
    case_of("capacity_totals", "127x50"),
    case_of("importance_loss", "2x50"),
    case_of("gather_batch", "uint8-stochastic"),
    case_of("sequence", "bernoulli-33"),
    case_of("sequence", "squared_error-129"),
    case_of("sequence", "bound-True-7x5"),
    case_of("sequence", "evaluated-bernoulli-40"),
    case_of("sequence", "latent_forward-40x64"),
    case_of("sequence", "latent_backward-129"),
    case_of("sequence", "conv_totals-33"),
    update(NO_GRADIENT),
]
"""Every kernel is in one of them at least."""

ORDERED_IN_TF32 = [
    case for case in ORDERED if case in (*PRODUCTS, *SEQUENCES) or case.label == "fused"
]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("case", "precision"),
    [*((case, "fp32") for case in ORDERED), *((case, "tf32") for case in ORDERED_IN_TF32)],
    ids=lambda value: getattr(value, "id", value),
)
def test_the_order_of_threads_and_blocks_changes_no_bit(case: Case, precision: str) -> None:
    backend = Shuffled(precision)
    run = Runner(backend, np.float32)
    expected = run(case)
    for backend.seed in range(1, 4):
        assert_same_bits(run(case), expected)


def test_every_kernel_is_run_in_other_orders() -> None:
    backend = Shuffled()
    for case in ORDERED:
        Runner(backend, np.float32)(case)
    assert backend.grids.keys() == kernels().keys()


# Training


def losses(device: str, name: str, steps: int, **options: Any) -> list[float]:
    model = preset(name).model(**SMALL[name]).to(device)
    trainer = Trainer(model, load("glyphs"), Training(batch_size=32, **options))
    found = []
    for _ in range(steps):
        before = trainer.progress.totals
        trainer.step()
        found.append(trainer.means_since(before, 1)["loss"])
    return found


SMALL: dict[str, dict[str, Any]] = {
    "glyphs": {"hidden": (40,), "latent": 5},
    "mnist-conv": {"latent": 3},
    "iwae-paper-iwae": {"samples": 7},
}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", SMALL)
def test_training_on_the_emulated_device_lands_on_the_cpus_losses(name: str) -> None:
    steps = 6 if name == "glyphs" else 2
    actual, expected = (losses(device, name, steps) for device in ("emulated", "cpu"))
    # Float32 sums in another order: the first losses agree to rounding, later ones drift.
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_run_stopped_on_one_device_goes_on_on_another(tmp_path: Path) -> None:
    model = preset("glyphs").model(**SMALL["glyphs"])
    options: dict[str, Any] = {"out": tmp_path, "progress": False}
    half, whole = (Training(steps=steps, batch_size=32, log_every=1) for steps in (3, 6))
    fit(model, "glyphs", half, device="emulated", **options)
    resumed = preset("glyphs").model(**SMALL["glyphs"])
    metrics = fit(resumed, "glyphs", whole, device="cpu", resume=True, **options)
    actual = [line["train"]["loss"] for line in metrics if "epoch" not in line]
    np.testing.assert_allclose(actual, losses("cpu", "glyphs", 6), rtol=1e-5)


def test_a_step_on_a_kernel_backend_allocates_nothing_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = preset("glyphs").model(**SMALL["glyphs"]).to("emulated")
    trainer = Trainer(model, load("glyphs"), Training(batch_size=32))
    trainer.step()
    backend, made = trainer.model.backend, []
    for name in ("zeros", "asarray"):
        monkeypatch.setattr(backend, name, lambda *arguments: made.append(arguments))
    trainer.step()
    assert made == []


# Bad arguments


def test_a_strided_array_is_refused() -> None:
    backend = EmulatedBackend()
    x, w, b, y = (np.zeros(s, np.float32) for s in ((4, 6), (3, 2), (2,), (4, 2)))
    with pytest.raises(TypeError, match="dense_forward: x is a strided array"):
        backend.dense_forward(x[:, ::2], w, b, y, IDENTITY)


def test_an_array_of_another_type_is_refused() -> None:
    backend = EmulatedBackend()
    x, w, b, y = (np.zeros(s) for s in ((4, 3), (3, 2), (2,), (4, 2)))
    with pytest.raises(TypeError, match="x is a C-contiguous array of float64"):
        backend.dense_forward(x, w, b, y, IDENTITY)


def test_more_pixels_than_a_kernel_can_count_are_refused() -> None:
    backend = EmulatedBackend()
    one = np.zeros((), np.float32)  # seen as so many
    x = np.broadcast_to(one, (2**15, 2**8, 2**8, 1))
    w, b, y = (np.broadcast_to(one, s) for s in ((1, 1, 1, 1), (1,), x.shape))
    with pytest.raises(InputError, match=r"a batch has 2147483648 pixels .* --accumulate"):
        backend.conv2d_forward(x, w, b, y, ConvGeometry(1, 1, 0, 0), IDENTITY)


def test_more_numbers_than_a_kernel_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EmulatedBackend()
    monkeypatch.setattr(kernel_arguments, "LARGEST_INT", 49)
    v, onehot, u = (np.zeros(s, np.float32) for s in ((10, 3), (10, 2), (10, 5)))
    with pytest.raises(InputError, match="join_forward: the size of u is 50, expected at most 49"):
        backend.join_forward(v, onehot, u)


# Planted bugs


def caught(backend: Shuffled, case: Case, tolerance: float = TOLERANCE[np.float32]) -> bool:
    """Whether the equivalence test fails, under some order of threads."""
    for backend.seed in range(5):
        try:
            check(Runner(backend, np.float32)(case), case, tolerance)
        except (AssertionError, RuntimeError):
            return True
    return False


PLANTED = {
    "a missing barrier": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n    __syncthreads();",
        "    wait_copies<STAGES - 2>();",
        DENSE,
    ),
    "a missing wait for a copy": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n",
        "",
        DENSE,
    ),
    "a wait for too few copies": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n",
        "    wait_copies<STAGES - 1>();\n",
        DENSE,
    ),
    "a wrong epilogue": (
        "gemm",
        "activate(known.value, slope, z.lane[i] + bias.lane[i])",
        "activate(known.value, slope, z.lane[i]) + bias.lane[i]",
        case_of("dense_forward", "129x67x257"),
    ),
    "a tail without a guard": (
        "gemm",
        "return run < runs ? columns - column(run) : 0;",
        "return run < runs ? RUN : 0;",
        case_of("dense_forward", "7x13x17"),
    ),
    "a split left out": (
        "gemm",
        "if (i < runs && other + t < count) terms",
        "if (i < runs && other + t < count - 1) terms",
        DENSE,
    ),
    "a level of the tree left out": (
        "conv",
        "while (left > 1) {",
        "while (left == splits) {",
        case_of("conv2d_weight_gradient", "5x28x28x1-3x3x32-stride1x1"),
    ),
    "runs that lie elsewhere than they are read": (
        "gemm",
        "float* target = slice + Layout::at(run_outer(r), run_depth(r));\n      copy_async_16",
        "float* target = slice + Layout::at(run_outer(r) ^ 8, run_depth(r));\n      copy_async_16",
        case_of("dense_input_gradient", "128x784x400"),
    ),
    "a wrong phase": (
        "conv",
        "first_tap_h = (first_row + s.top) % s.stride_h;",
        "first_tap_h = first_row % s.stride_h;",
        case_of("conv2d_input_gradient", "6x28x28"),
    ),
    "a wrong neighbour of a pixel": (
        "conv_few_channels",
        "source + t * s.filters",
        "source + (t ^ 1) * s.filters",
        case_of("conv_transpose2d_forward", "5x28x28x1-3x3x32-stride1x1"),
    ),
    "a row that is not in its image": (
        "conv",
        "i < s.taps_h && (unsigned int)(row + i) < (unsigned int)s.height;",
        "i < s.taps_h;",
        case_of("conv_transpose2d_weight_gradient", "5x28x28x1-3x3x32-stride1x1"),
    ),
    "a missing barrier before the sums of all teams": (
        "conv",
        "= taps[i][j];\n      }\n    }\n    __syncthreads();",
        "= taps[i][j];\n      }\n    }",
        case_of("conv_transpose2d_weight_gradient", "5x28x28x1-3x3x32-stride1x1"),
    ),
    "a missing barrier in a sum": (
        "elbo",
        "if (lane == 0) sums[warp] = value;\n  __syncthreads();",
        "if (lane == 0) sums[warp] = value;",
        case_of("bernoulli_loss", "31x784"),
    ),
    "a missing barrier before an arrival": (
        "gemm",
        "  __shared__ bool last;\n  __syncthreads();",
        "  __shared__ bool last;",
        DENSE,
    ),
    "a missing barrier before a bound": (
        "importance",
        "weights[first + s] = total;\n  }\n  __syncthreads();",
        "weights[first + s] = total;\n  }",
        case_of("importance_loss", "2x50"),
    ),
    "a missing barrier before a bound that weighs": (
        "importance",
        "rows + first + s];\n    });\n  }\n  __syncthreads();",
        "rows + first + s];\n    });\n  }",
        case_of("sequence", "bound-True-3x33"),
    ),
    "a loss of a row that is none": (
        "gemm",
        "if (column % COLUMNS == 0 && count > 0)",
        "if (column % COLUMNS == 0)",
        case_of("sequence", "bernoulli-33"),
    ),
    "a wrong equation": (
        "latent",
        "z = mu + expf(0.5f * logvar) * eps;",
        "z = mu + expf(logvar) * eps;",
        case_of("latent_forward"),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    stem, right, wrong, case = PLANTED[bug]
    assert not caught(Shuffled(), case)
    assert caught(Planted(stem, right, wrong), case)


FRAGMENTS = {
    "rows by ldmatrix": (
        "gemm",
        "first + lane() % 16, k + lane() / 16 * 4",
        "first + lane() % 8, k + lane() / 16 * 4",
        case_of("dense_input_gradient", "128x784x400"),
    ),
    "columns by ldmatrix": (
        "gemm",
        "int column = lane() / 16 * 8 + lane() % 8;",
        "int column = lane() % 16;",
        DENSE,
    ),
    "rows by pairs": (
        "weights",
        "values[0] = low.x, values[1] = low.y,",
        "values[0] = low.y, values[1] = low.x,",
        case_of("dense_weight_gradient", "128x784x400"),
    ),
    "columns one by one": (
        "weights",
        "values[2 * j + 1] = source[4 * Layout::PITCH]",
        "values[2 * j + 1] = source[2 * Layout::PITCH]",
        case_of("dense_weight_gradient", "128x784x400"),
    ),
}


@pytest.mark.parametrize("bug", FRAGMENTS)
def test_a_planted_fragment_in_the_wrong_place_is_caught(bug: str) -> None:
    stem, right, wrong, case = FRAGMENTS[bug]
    assert not caught(Shuffled("tf32"), case, 1e-3)
    assert caught(Planted(stem, right, wrong, precision="tf32"), case, 1e-3)


def test_a_bug_that_is_not_planted_is_no_bug_caught() -> None:
    with pytest.raises(NotPlantedError, match="is 0 times in gemm"):
        caught(Planted("gemm", "not in the kernels", ""), DENSE)


def test_threads_that_reach_different_barriers_are_reported() -> None:
    backend = Planted("elbo", "  value = warp_sum(value);\n", "  if (warp == 1) return 0.0f;\n")
    with pytest.raises(RuntimeError, match="bernoulli_loss: threads of a block"):
        Runner(backend, np.float32)(case_of("bernoulli_loss", "31x784"))


# AddressSanitizer, in a process of its own, since its runtime must be loaded before Python's memory


SANITIZED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_emulated import CASES, NO_GRADIENT, SEQUENCES, Planted, Runner, update
from minivae.backends.kernel_arguments import kernels
stem, right, wrong, *primitives = sys.argv[2:]
backend = Planted(stem, right, wrong, "-fsanitize=address", "--param=asan-stack=0")
for case in (*CASES, *SEQUENCES, update(NO_GRADIENT)):
    if case.primitive in primitives or not primitives:
        Runner(backend, np.float32)(case)
print("clean:", *sorted(backend.grids))
"""


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the cases of some primitives, or all, with one place of a source changed."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(Path(__file__).parent), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.toolchain
def test_no_kernel_touches_memory_that_is_not_its_own() -> None:
    done = sanitized("gemm", "enum State { STEP", "enum State { STEP")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["clean:", *sorted(kernels())]


BEYOND_THE_END = {
    "of an array": (
        *("gemm", "product(o, depths) : o), o < outers};", "product(o, depths) : o), true};"),
        "dense_forward",
    ),
    "of shared memory": (
        *("elbo", "__shared__ float sums[WARP];", "__shared__ float sums[WARP / 16];"),
        "bernoulli_loss",
    ),
}


@pytest.mark.toolchain
@pytest.mark.parametrize("end", BEYOND_THE_END)
def test_a_planted_access_past_the_end_is_caught(end: str) -> None:
    done = sanitized(*BEYOND_THE_END[end])
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: " in done.stderr
