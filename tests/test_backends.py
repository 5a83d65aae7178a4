"""Every backend computes what `ops/` computes: each primitive, on awkward shapes, against float64.

A case lists a primitive's arguments. Outputs are poisoned with NaN and followed by guard words, so
that an element left unwritten or a write beyond the end fails. To put a backend to these tests, add
its name to BACKENDS.
"""

import importlib
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import pytest
from helpers import give_all_products, relative_error
from numpy.typing import DTypeLike, NDArray

from minivae import backends
from minivae.backends import cpu, cpu_cache, cpu_kernels, cpu_products
from minivae.backends.cpu import CpuBackend
from minivae.backends.reference import PRIMITIVES, Call, ReferenceBackend
from minivae.data.glyphs import glyphs
from minivae.errors import InputError
from minivae.kernels import SMALL, WITH_TILES, Tile
from minivae.ops import philox
from minivae.ops.activations import (
    DERIVATIVE_FROM_INPUT,
    DERIVATIVE_FROM_OUTPUT,
    IDENTITY,
    Activation,
    activation_forward,
)
from minivae.ops.batch import BINARIZATIONS
from minivae.ops.conv import ConvGeometry
from minivae.ops.elbo import KL, LOSS, RECONSTRUCTION
from minivae.ops.philox import BINARIZATION_STREAM, LATENT_STREAM, Noise
from minivae.ops.state import (
    BETA,
    CAPACITY,
    EPOCH,
    FAILED,
    FIRST,
    INDEX,
    SCHEDULE_COLUMNS,
    STEP,
    new_state,
)
from minivae.presets import preset
from minivae.train import Trainer

ON_A_CARD = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "numba_cuda")]
BACKENDS = ["reference", "cpu", "emulated", *ON_A_CARD]

TOLERANCE = {
    # By norm: rounding errors of 2^-24 and 2^-53 add up at random over sums of at most some
    # thousand terms, and a function's own error is a few units in the last place.
    np.float32: 2e-6,
    np.float64: 1e-14,
}

TF32_TOLERANCE = 1e-3
"""By norm: each operand is rounded to 11 significant bits, an error of at most 2^-11."""

GUARD = 48
GUARD_WORD = 77

AWKWARD = (1, 31, 32, 33, 127)
FUSED = tuple(Activation(kind, 0.2) for kind in DERIVATIVE_FROM_OUTPUT)
SEED = 0x0123456789ABCDEF


@dataclass
class In:
    """An array that the primitive reads. Floating point comes in the tested type unless `fixed`."""

    array: NDArray
    fixed: bool = False


@dataclass
class InOut:
    """An array that the primitive updates."""

    array: NDArray
    fixed: bool = False


@dataclass
class Out:
    """An array that the primitive writes."""

    shape: tuple[int, ...]


class Scratch(Out):
    """An array that the primitive may write or not: guarded, but no result."""


@dataclass
class Part:
    """A tensor of the flat array `whole`, from `start` on."""

    whole: In | InOut | Out
    start: int
    shape: tuple[int, ...]


@dataclass
class Case:
    """A primitive with arguments: In, InOut, Out, Part, or a plain value; or calls of others with
    such arguments, where what is named several times is one array."""

    primitive: str
    label: str
    arguments: list[Any] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.primitive}-{self.label}"


class Runner:
    """Calls primitives of a backend on arrays of its own."""

    def __init__(self, backend: ReferenceBackend, dtype: type) -> None:
        self.backend, self.dtype = backend, dtype
        # By the argument's identity: it, its allocation, and the view of that the primitive gets.
        self._arrays: dict[int, tuple[In | InOut | Out, Any, Any]] = {}

    def _initial(self, argument: In | InOut | Out) -> NDArray:
        if isinstance(argument, Out):
            return np.full(argument.shape, np.nan, self.dtype)
        array = argument.array
        floating = np.issubdtype(array.dtype, np.floating)
        # Through float32 in any case, so that both types start from the same numbers.
        return (
            array.astype(np.float32).astype(self.dtype)
            if floating and not argument.fixed
            else array
        )

    def _array(self, argument: In | InOut | Out) -> Any:
        """The argument's array, with guard words behind it if it may be written. What is only read
        ends where its memory does, so that AddressSanitizer sees a read beyond."""
        if id(argument) not in self._arrays:
            initial = self._initial(argument)
            if isinstance(argument, In):
                whole = view = self.backend.asarray(initial)
            else:
                guard = np.full(GUARD, GUARD_WORD, initial.dtype)
                whole = self.backend.asarray(np.concatenate([initial.ravel(), guard]))
                view = whole[: initial.size].reshape(initial.shape)
            self._arrays[id(argument)] = argument, whole, view
        return self._arrays[id(argument)][2]

    def _passed(self, argument: Any) -> Any:
        """What the primitive gets for an argument."""
        if isinstance(argument, In | InOut | Out):
            return self._array(argument)
        if isinstance(argument, Part):
            tensor = self._array(argument.whole)[argument.start :]
            return tensor[: math.prod(argument.shape)].reshape(argument.shape)
        if isinstance(argument, Call):
            return Call(argument.primitive, *self._passed(argument.arguments))
        if type(argument) in (list, tuple):
            return type(argument)(self._passed(one) for one in argument)
        return argument

    def __call__(self, case: Case) -> list[NDArray]:
        """The arrays that the call wrote, after checks that it wrote nothing else."""
        self._arrays.clear()
        getattr(self.backend, case.primitive)(*self._passed(case.arguments))
        written = []
        for argument, whole, view in self._arrays.values():
            array = self.backend.to_numpy(view)
            if isinstance(argument, In):
                np.testing.assert_array_equal(array, self._initial(argument), "an input changed")
                continue
            guard = self.backend.to_numpy(whole)[-GUARD:]
            assert (guard == GUARD_WORD).all(), "written beyond the end"
            if not isinstance(argument, Scratch):
                written.append(array)
        return written


def reference(case: Case) -> list[NDArray]:
    return Runner(backends.get("reference"), np.float64)(case)


# The cases


def _rng(label: str) -> np.random.Generator:
    return np.random.default_rng(list(label.encode()))


def _outputs_of(activation: Activation, z: NDArray) -> NDArray:
    y = np.empty_like(z)
    activation_forward(z, y, activation)
    return y


def activation_cases() -> Iterator[Case]:
    for kind in DERIVATIVE_FROM_OUTPUT + DERIVATIVE_FROM_INPUT:
        for size in AWKWARD:
            rng = _rng(kind)
            activation, shape = Activation(kind, 0.2), (3, size)
            z, dy = 3 * rng.standard_normal(shape), rng.standard_normal(shape)
            y = _outputs_of(activation, z)
            label = f"{kind}-{size}"
            yield Case("activation_forward", label, [In(z), Out(shape), activation])
            source = In(z) if kind in DERIVATIVE_FROM_INPUT else None
            arguments = [source, In(y), In(dy), Out(shape), activation]
            yield Case("activation_backward", label, arguments)


DENSE_SHAPES = [
    *((1, 1, 1), (1, 784, 20), (31, 1, 33), (32, 33, 1), (33, 31, 32), (7, 13, 17)),
    *((127, 131, 7), (128, 784, 400), (129, 67, 257), (64, 20, 512)),
    *((12, 21, 49), (13, 49, 20)),  # half of the CPU backend's tile in the last rows, and one more
    (1030, 130, 131),  # more images than the CPU backend adds up at once (MOST_IMAGES)
]


def dense_cases() -> Iterator[Case]:
    for index, (n, i, o) in enumerate(DENSE_SHAPES):
        activation, below = FUSED[index % len(FUSED)], FUSED[(index + 3) % len(FUSED)]
        label = f"{n}x{i}x{o}"
        rng = _rng(label)
        x = _outputs_of(below, rng.standard_normal((n, i)))
        w, b = rng.standard_normal((i, o)) / math.sqrt(i), rng.standard_normal(o)
        dz = rng.standard_normal((n, o))
        yield Case("dense_forward", label, [In(x), In(w), In(b), Out((n, o)), activation])
        yield Case("dense_input_gradient", label, [In(dz), In(w), In(x), Out((n, i)), below])
        yield Case("dense_weight_gradient", label, [In(x), In(dz), Out((i, o)), Out((o,))])
        added = [InOut(w), InOut(b), 0.25, True]
        yield Case("dense_weight_gradient", f"{label}-accumulated", [In(x), In(dz), *added])
        # So dark that a tile of 8 rows has columns without a lit number, and with one.
        arguments = [In(x * (rng.random((n, i)) < 0.1)), In(w), In(b), Out((n, o)), activation]
        yield Case("dense_forward", f"{label}-dark", arguments)


# (n, h, w, c), (kh, kw, k), (stride h, stride w, top, left), (p, q)
CONV_SHAPES = [
    ((1, 1, 1, 1), (1, 1, 1), (1, 1, 0, 0), (1, 1)),
    ((2, 5, 7, 3), (1, 1, 5), (1, 1, 0, 0), (5, 7)),
    ((2, 6, 5, 3), (2, 2, 4), (2, 2, 0, 0), (3, 2)),
    ((3, 8, 7, 1), (3, 3, 5), (2, 2, 1, 1), (4, 4)),
    ((3, 7, 9, 5), (3, 3, 1), (1, 1, 1, 1), (7, 9)),
    ((1, 11, 13, 7), (5, 5, 3), (1, 1, 2, 2), (11, 13)),
    ((2, 13, 11, 2), (3, 5, 17), (3, 2, 1, 2), (5, 6)),
    ((2, 9, 9, 4), (3, 3, 6), (2, 2, 0, 0), (5, 5)),
    ((2, 10, 8, 6), (5, 3, 2), (3, 3, 2, 1), (4, 3)),
    ((2, 4, 4, 3), (3, 3, 33), (2, 2, 0, 1), (2, 2)),
    ((1, 2, 2, 31), (5, 5, 32), (2, 2, 2, 2), (1, 1)),
    ((2, 12, 12, 3), (2, 2, 5), (3, 3, 0, 0), (4, 4)),
    ((2, 12, 9, 5), (2, 2, 5), (3, 3, 0, 0), (4, 3)),
    ((2, 9, 10, 4), (3, 3, 36), (1, 1, 1, 1), (9, 10)),
    ((9, 11, 9, 3), (2, 1, 40), (2, 1, 0, 0), (5, 9)),
    ((4, 10, 9, 1), (2, 3, 68), (1, 2, 0, 1), (9, 5)),
    ((3, 8, 7, 1), (3, 3, 34), (2, 2, 1, 1), (4, 4)),
    ((37, 14, 14, 8), (3, 3, 16), (1, 1, 1, 1), (14, 14)),
    ((5, 28, 28, 1), (3, 3, 32), (2, 2, 1, 1), (14, 14)),
    ((5, 28, 28, 1), (3, 3, 32), (1, 1, 1, 1), (28, 28)),
    ((6, 28, 28, 32), (3, 3, 64), (2, 2, 1, 1), (14, 14)),
    ((7, 7, 7, 64), (3, 3, 64), (2, 2, 1, 1), (4, 4)),
]


def conv_cases() -> Iterator[Case]:
    for index, (image, (kh, kw, k), strides, (p, q)) in enumerate(CONV_SHAPES):
        activation, below = FUSED[index % len(FUSED)], FUSED[(index + 3) % len(FUSED)]
        n, h, w_, c = image
        label = f"{n}x{h}x{w_}x{c}-{kh}x{kw}x{k}-stride{strides[0]}x{strides[1]}"
        rng, geometry = _rng(label), ConvGeometry(*strides)
        small_shape = (n, p, q, k)
        w = rng.standard_normal((kh, kw, c, k)) / math.sqrt(kh * kw * c)
        large, small = rng.standard_normal(image), rng.standard_normal(small_shape)
        bias_k, bias_c = rng.standard_normal(k), rng.standard_normal(c)
        large_y, small_y = _outputs_of(below, large), _outputs_of(below, small)
        out_w = Out(w.shape)
        yield Case(
            *("conv2d_forward", label),
            [In(large), In(w), In(bias_k), Out(small_shape), geometry, activation],
        )
        yield Case(
            *("conv2d_input_gradient", label),
            [In(small), In(w), In(large_y), Out(image), geometry, below],
        )
        yield Case(
            *("conv2d_weight_gradient", label),
            [In(large), In(small), out_w, Out((k,)), geometry],
        )
        yield Case(
            *("conv_transpose2d_forward", label),
            [In(small), In(w), In(bias_c), Out(image), geometry, activation],
        )
        yield Case(
            *("conv_transpose2d_input_gradient", label),
            [In(large), In(w), In(small_y), Out(small_shape), geometry, below],
        )
        yield Case(
            *("conv_transpose2d_weight_gradient", label),
            [In(small), In(large), out_w, Out((c,)), geometry],
        )
        yield Case(
            *("conv2d_weight_gradient", f"{label}-accumulated"),
            [In(large), In(small), InOut(w), InOut(bias_k), geometry, 0.25, True],
        )
        yield Case(
            *("conv_transpose2d_weight_gradient", f"{label}-accumulated"),
            [In(small), In(large), InOut(w), InOut(bias_c), geometry, 0.25, True],
        )


def latent_cases() -> Iterator[Case]:
    for n, d in ((1, 1), (2, 3), (33, 20), (31, 50), (7, 16), (128, 20)):
        label = f"{n}x{d}"
        rng = _rng(label)
        head, dz = rng.standard_normal((n, 2 * d)), rng.standard_normal((n, d))
        noise, state = Noise(SEED, LATENT_STREAM), In(new_state(step=12345))
        yield Case("latent_forward", label, [In(head), Out((n, d)), Out((n, d)), noise, state])
        arguments = [In(head), In(dz), In(rng.random(d)), Out((n, 2 * d)), noise, state]
        yield Case("latent_backward", label, arguments)


def loss_cases() -> Iterator[Case]:
    for n, m in ((1, 1), (3, 31), (2, 32), (5, 33), (31, 784)):
        rng = _rng(f"{n}x{m}")
        a, x = 4 * rng.standard_normal((n, m)), rng.random((n, m))
        outputs = [Out((n,)), Out((n, m))]
        yield Case("bernoulli_loss", f"{n}x{m}", [In(a), In(x), *outputs, 1 / n])
        for activation in FUSED:
            y = _outputs_of(activation, a)
            arguments = [In(y), In(x), *outputs, 1 / n, 0.5, activation]
            yield Case("squared_error_loss", f"{activation.kind}-{n}x{m}", arguments)


def calibration_cases() -> Iterator[Case]:
    for n, m in ((1, 1), (3, 31), (5, 33), (31, 784)):
        rng = _rng(f"calibration-{n}x{m}")
        squares, dz = 0.1 * m * rng.random(n), rng.standard_normal((n, m))
        yield Case("calibrate_gaussian", f"{n}x{m}", [InOut(squares), InOut(dz), Out((1,))])


def _schedule(steps: int = 3) -> NDArray:
    columns = (0.99, 0.5, 3.0)
    return np.array([[1e-2 / (t + 1), math.sqrt(1e-3 * (t + 1)), *columns] for t in range(steps)])


def _state_at(row: int) -> NDArray[np.int64]:
    state = new_state(step=41, first=128, epoch=2)
    state[INDEX] = row
    return state


def elbo_cases() -> Iterator[Case]:
    for n, d in ((1, 1), (33, 20), (127, 50), (64, 0)):
        for free_bits in (0.0, 0.7):
            label = f"{n}x{d}-free{free_bits}"
            rng = _rng(label)
            # Means spread around the free bits, none of them close enough to tip over.
            kl = rng.random((n, d)) + np.arange(d) % 2
            totals = InOut(np.array([1.0, 2.0, 3.0]), fixed=True)
            yield Case(
                *("elbo_totals", label),
                [
                    *(In(100 * rng.random(n)), In(kl), In(_schedule()), InOut(_state_at(1))),
                    *(free_bits, Out((d,)), totals),
                ],
            )


def capacity_cases() -> Iterator[Case]:
    # The KL is about d: a capacity of 0.3 is below it, one of 200 above.
    for n, d in ((1, 1), (33, 20), (127, 50)):
        for capacity in (0.0, 0.3, 200.0):
            label = f"{n}x{d}-{capacity:g}"
            rng = _rng(label)
            kl, totals = 2 * rng.random((n, d)), InOut(np.array([1.0, 2.0, 3.0]), fixed=True)
            schedule = _schedule()
            schedule[1, CAPACITY] = capacity
            arguments = [In(100 * rng.random(n)), In(kl), In(schedule), InOut(_state_at(1))]
            arguments += [Out((d,)), totals]
            yield Case("capacity_totals", label, arguments)


def importance_cases() -> Iterator[Case]:
    for n, draws, d, m in ((1, 1, 1, 1), (3, 5, 4, 31), (2, 50, 33, 33), (33, 2, 20, 31)):
        rng = _rng(f"importance{n}{draws}")
        rows, noise, state = n * draws, Noise(SEED, LATENT_STREAM), In(new_state(step=2**33 + 5))
        head, dz = rng.standard_normal((n, 2 * d)), rng.standard_normal((rows, d))
        logits, x = rng.standard_normal((rows, m)), rng.random((n, m))
        ratio, weights = rng.standard_normal(rows), rng.random(rows)
        for logvar_factor in (1.0, 2.0):
            label = f"{n}x{draws}x{d}x{m}-factor{logvar_factor:g}"
            arguments: list[Any] = [In(head), Out((rows, d)), Out((rows,)), logvar_factor]
            yield Case("importance_latent_forward", label, [*arguments, noise, state])
            arguments = [In(head), In(dz), In(weights), Out((n, 2 * d)), 1 / n, logvar_factor]
            yield Case("importance_latent_backward", label, [*arguments, noise, state])
        for importance in (True, False):
            label = f"{n}x{draws}x{d}x{m}-{'importance' if importance else 'mean'}"
            arguments = [In(logits), In(x), In(ratio), Out((rows,)), Out((n,)), Out((rows, m))]
            yield Case("importance_loss", label, [*arguments, 1 / n, importance])


def adam_cases() -> Iterator[Case]:
    for size in (*AWKWARD, 10007):
        rng = _rng(f"adam-{size}")
        p, g, m = rng.standard_normal((3, size))
        moments = [InOut(m), InOut(rng.random(size))]
        arguments = [InOut(p), In(g), *moments, In(_schedule()), In(_state_at(2)), 0.9, 0.999, 1e-8]
        yield Case("adam_update", str(size), arguments)
        for max_norm in (0.5, 1e6):
            label = f"{size}-max{max_norm:g}"
            yield Case("clip_gradient", label, [InOut(2 + g * g), max_norm, Out((1,))])


def batch_cases() -> Iterator[Case]:
    for n, m in ((1, 1), (5, 31), (33, 33), (16, 784)):
        rng = _rng(f"batch-{n}x{m}")
        images = n + 9
        scaled = rng.random((images, m)).astype(np.float32)
        pixels = {"uint8": rng.integers(0, 256, (images, m), np.uint8), "float32": scaled}
        permutation = In(rng.permutation(images))
        state, noise = In(new_state(first=4, epoch=3)), Noise(SEED, BINARIZATION_STREAM)
        for name, data in pixels.items():
            for binarization in BINARIZATIONS:
                yield Case(
                    *("gather_batch", f"{name}-{binarization}-{n}x{m}"),
                    [In(data, fixed=True), permutation, state, Out((n, m)), binarization, noise],
                )


def label_cases() -> Iterator[Case]:
    for index, (n, m, classes) in enumerate(((1, 1, 1), (5, 31, 10), (33, 20, 3), (64, 784, 10))):
        label = f"{n}x{m}x{classes}"
        rng, images, activation = _rng(label), n + 9, FUSED[index]
        labels, permutation = In(rng.integers(classes, size=images)), In(rng.permutation(images))
        state, joined = In(new_state(first=4)), (n, m + classes)
        yield Case("gather_labels", label, [labels, permutation, state, Out((n, classes))])
        x, onehot = rng.standard_normal((n, m)), np.eye(classes)[rng.integers(classes, size=n)]
        for draws in (1, 3):
            repeated, out = In(np.repeat(x, draws, axis=0)), Out((n * draws, m + classes))
            yield Case("join_forward", f"{label}-{draws}", [repeated, In(onehot), out])
        y, dy = _outputs_of(activation, x), rng.standard_normal(joined)
        yield Case("join_input_gradient", label, [In(dy), In(y), Out((n, m)), activation])


def state_cases() -> Iterator[Case]:
    yield Case("advance_state", "running", [InOut(_state_at(1)), 128])


CASES = [
    *activation_cases(),
    *dense_cases(),
    *conv_cases(),
    *latent_cases(),
    *loss_cases(),
    *calibration_cases(),
    *elbo_cases(),
    *capacity_cases(),
    *importance_cases(),
    *adam_cases(),
    *batch_cases(),
    *label_cases(),
    *state_cases(),
]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ReferenceBackend:
    return backends.get(request.param)


@pytest.fixture(scope="module", params=backends.PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["emulated", ON_A_CARD[0]])
def kernel_backend(request: pytest.FixtureRequest, precision: str) -> ReferenceBackend:
    return backends.get(request.param, precision)


def check(actual: list[NDArray], case: Case, tolerance: float) -> None:
    for index, (a, e) in enumerate(zip(actual, reference(case), strict=True)):
        error = relative_error(a, e)
        assert error < tolerance, f"written array {index}: relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equivalence(backend: ReferenceBackend, case: Case) -> None:
    check(Runner(backend, np.float32)(case), case, TOLERANCE[np.float32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_cpu_leaves_float64_to_the_reference(case: Case) -> None:
    check(Runner(backends.get("cpu"), np.float64)(case), case, TOLERANCE[np.float64])


PRODUCTS = [case for case in CASES if case.primitive.startswith(("dense", "conv"))]


IN_TF32 = pytest.mark.parametrize("precision", ["tf32"], scope="module")


@IN_TF32
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_products_of_tf32_numbers_are_as_close_as_their_rounding(
    kernel_backend: ReferenceBackend, case: Case
) -> None:
    check(Runner(kernel_backend, np.float32)(case), case, TF32_TOLERANCE)


def _tiles(case: Case) -> tuple[Tile, ...]:
    """All that a product may have."""
    return WITH_TILES["conv" if case.primitive.startswith("conv") else "gemm"]


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        pytest.param(case, tile, id=f"{case.id}-{tile}")
        for case in PRODUCTS
        for tile in _tiles(case)
        if tile != SMALL  # which most cases have without being asked
    ],
)
def test_equivalence_with_every_tile(
    kernel_backend: Any, case: Case, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_all_products(tile, monkeypatch)
    tolerance = TOLERANCE[np.float32] if kernel_backend.precision == "fp32" else TF32_TOLERANCE
    check(Runner(kernel_backend, np.float32)(case), case, tolerance)


@IN_TF32
def test_tf32_rounds_each_operand_to_the_nearest(kernel_backend: ReferenceBackend) -> None:
    step = 2.0**-10  # between neighbours of 1 with 10 bits of mantissa
    rounded, one = In(np.full((1, 1), 1 + 0.75 * step)), In(np.ones((1, 1)))
    for x, w in ((rounded, one), (one, rounded)):
        case = Case("dense_forward", "", [x, w, In(np.zeros(1)), Out((1, 1)), IDENTITY])
        (y,) = Runner(kernel_backend, np.float32)(case)
        assert y == 1 + step


@pytest.mark.parametrize("precision", ["fp32"], scope="module")
def test_kernels_flush_denormal_numbers_to_zero(kernel_backend: ReferenceBackend) -> None:
    z = In(np.array([1e-39, -2e-38]))  # the first is one, of the second a fifth is
    case = Case("activation_forward", "", [z, Out((2,)), Activation("leaky_relu", 0.2)])
    (y,) = Runner(kernel_backend, np.float32)(case)
    assert not y.any()


@pytest.mark.parametrize("name", ["cpu", "emulated", ON_A_CARD[0]])
def test_moments_that_fade_away_become_zero_and_those_that_are_not_a_number_do_not(
    name: str,
) -> None:
    smallest = float(np.finfo(np.float32).smallest_normal)
    g, moments = np.zeros(40), np.full(40, 1.5 * smallest)
    g[7] = np.nan
    arguments = [InOut(np.ones(40)), In(g), InOut(moments), InOut(moments), In(_schedule())]
    case = Case("adam_update", "", [*arguments, In(_state_at(2)), 0.5, 0.5, 1e-8])
    _, m, v = Runner(backends.get(name), np.float32)(case)
    for moment in (m, v):
        assert np.isnan(moment[7])
        assert not np.delete(moment, 7).any()


def test_every_override_has_a_case(backend: ReferenceBackend) -> None:
    overridden = {
        name
        for name in PRIMITIVES
        if getattr(type(backend), name) is not getattr(ReferenceBackend, name)
    }
    assert overridden <= {case.primitive for case in CASES}


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 40], ids=lambda case: case.id)
def test_same_call_same_bits(backend: ReferenceBackend, case: Case) -> None:
    run = Runner(backend, np.float32)
    first, second = run(case), run(case)
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


# In place


@pytest.mark.parametrize("kind", DERIVATIVE_FROM_OUTPUT)
def test_activations_work_in_place(backend: ReferenceBackend, kind: str) -> None:
    activation, rng = Activation(kind, 0.2), _rng(kind)
    z, dy = (rng.standard_normal((3, 33)).astype(np.float32) for _ in range(2))
    y, dz = backend.asarray(z), backend.asarray(dy)
    backend.activation_forward(y, y, activation)
    backend.activation_backward(None, y, dz, dz, activation)
    expected = _outputs_of(activation, z.astype(np.float64))
    assert relative_error(backend.to_numpy(y), expected) < TOLERANCE[np.float32]
    expected_dz = np.empty_like(expected)
    backends.get("reference").activation_backward(
        None, expected, dy.astype(np.float64), expected_dz, activation
    )
    assert relative_error(backend.to_numpy(dz), expected_dz) < TOLERANCE[np.float32]


# Numbers that are not finite

EXTREMES = np.array(
    [0, -0.0, 1e-30, -1e-30, 1e-8, 30, -30, 88, -88, 100, -100, 1e30, -1e30, np.inf, -np.inf],
    np.float32,
)


@pytest.mark.parametrize("kind", DERIVATIVE_FROM_OUTPUT + DERIVATIVE_FROM_INPUT)
def test_activations_at_the_extremes(backend: ReferenceBackend, kind: str) -> None:
    z = np.append(EXTREMES, np.float32(np.nan))[None]
    activation = Activation(kind, 0.2)
    y = backend.zeros(z.shape)
    with np.errstate(all="ignore"):
        backend.activation_forward(backend.asarray(z), y, activation)
        expected = _outputs_of(activation, z.astype(np.float64)).astype(np.float32)
    # A GPU flushes sigmoid(-88), a denormal number, to zero, and SiLU multiplies it by 88.
    np.testing.assert_allclose(backend.to_numpy(y), expected, rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("kind", DERIVATIVE_FROM_OUTPUT + DERIVATIVE_FROM_INPUT)
def test_derivatives_keep_nan(backend: ReferenceBackend, kind: str) -> None:
    z = backend.asarray(np.linspace(-2, 2, 40, dtype=np.float32))
    y, dz = backend.zeros((40,)), backend.zeros((40,))
    backend.activation_forward(z, y, Activation(kind, 0.2))
    dy = backend.asarray(np.full(40, np.nan, np.float32))
    backend.activation_backward(z, y, dy, dz, Activation(kind, 0.2))
    assert np.isnan(backend.to_numpy(dz)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 17, 32])
def test_losses_of_numbers_that_are_not_finite(
    backend: ReferenceBackend, bad: float, position: int
) -> None:
    outputs = np.ones((2, 33))
    outputs[1, position] = bad
    x = In(np.full((2, 33), 0.25))
    written = [Out((2,)), Out((2, 33))]
    for case in (
        Case("bernoulli_loss", "", [In(outputs), x, *written, 0.5]),
        Case("squared_error_loss", "", [In(outputs), x, *written, 0.5, 1.0, IDENTITY]),
    ):
        with np.errstate(all="ignore"):
            actual, expected = Runner(backend, np.float32)(case), reference(case)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5)
        assert not np.isfinite(actual[0][1])


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("importance", [True, False])
def test_the_bound_of_a_draw_that_is_not_a_number_is_none(
    backend: ReferenceBackend, draw: int, importance: bool
) -> None:
    logits = np.ones((6, 5))
    logits[3 + draw, 2] = np.nan
    ratio, x = np.zeros(6), np.full((2, 5), 0.25)
    written = [Out((6,)), Out((2,)), Out((6, 5))]
    given = [In(logits), In(x), In(ratio), *written, 0.5, importance]
    with np.errstate(all="ignore"):
        _, loss, _ = Runner(backend, np.float32)(Case("importance_loss", "", given))
    assert np.isfinite(loss[0])
    assert not np.isfinite(loss[1])


@pytest.mark.parametrize("logvar", [np.nan, np.inf, 200.0])
def test_kl_of_numbers_that_are_not_finite(backend: ReferenceBackend, logvar: float) -> None:
    head = np.zeros((2, 6))
    head[1, 4] = logvar
    noise, state = Noise(SEED, LATENT_STREAM), In(new_state())
    case = Case("latent_forward", "", [In(head), Out((2, 3)), Out((2, 3)), noise, state])
    with np.errstate(all="ignore"):
        _, kl = Runner(backend, np.float32)(case)
    assert not np.isfinite(kl[1, 1])
    assert np.isfinite(kl).sum() == 5


def test_bernoulli_loss_of_confident_logits(backend: ReferenceBackend) -> None:
    logits = np.array([[100.0, -100.0, 1e4, -1e4, 100.0, -100.0]])
    x = np.array([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    case = Case("bernoulli_loss", "", [In(logits), In(x), Out((1,)), Out((1, 6)), 1.0])
    loss, dlogits = Runner(backend, np.float32)(case)
    np.testing.assert_allclose(loss, [200], rtol=1e-6)
    np.testing.assert_allclose(dlogits, [[0, 0, 0, 0, 1, -1]], atol=1e-30)


# The latch


def _elbo(backend: ReferenceBackend, loss: float, state: NDArray) -> tuple[NDArray, NDArray]:
    case = Case(
        *("elbo_totals", "latch"),
        [
            *(In(np.array([1.0, loss])), In(np.full((2, 1), 0.5)), In(_schedule())),
            *(InOut(state), 0.0, Out((1,)), InOut(np.zeros(3), fixed=True)),
        ],
    )
    state, _, totals = Runner(backend, np.float32)(case)
    return state, totals


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_sets_the_latch(backend: ReferenceBackend, loss: float) -> None:
    state, totals = _elbo(backend, loss, _state_at(0))
    assert state[FAILED] == 1
    assert (totals == 0).all()


def test_totals_of_a_good_step(backend: ReferenceBackend) -> None:
    state, totals = _elbo(backend, 2.0, _state_at(0))
    assert state[FAILED] == 0
    assert totals[RECONSTRUCTION] == pytest.approx(3)
    assert totals[KL] == pytest.approx(1)
    assert totals[LOSS] == pytest.approx(3 + _schedule()[0, BETA])


def test_after_the_latch_nothing_changes(backend: ReferenceBackend) -> None:
    failed = _state_at(1)
    failed[FAILED] = 1
    state, totals = _elbo(backend, 2.0, failed)
    assert (totals == 0).all()
    np.testing.assert_array_equal(state, failed)

    run = Runner(backend, np.float32)
    ones = np.ones(33)
    adam = [InOut(ones), In(ones), InOut(ones), InOut(ones), In(_schedule()), In(failed)]
    for array in run(Case("adam_update", "", [*adam, 0.9, 0.999, 1e-8])):
        assert (array == 1).all()
    (state,) = run(Case("advance_state", "", [InOut(failed), 128]))
    np.testing.assert_array_equal(state, failed)


def test_advance_state(backend: ReferenceBackend) -> None:
    state = backend.asarray(_state_at(1))
    backend.advance_state(state, 128)
    after, before = backend.to_numpy(state), _state_at(1)
    assert after[STEP] == before[STEP] + 1
    assert after[INDEX] == before[INDEX] + 1
    assert after[FIRST] == before[FIRST] + 128
    assert after[EPOCH] == before[EPOCH]


# Noise and batches

KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Random123's `kat_vectors`: counter, key, words."""


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = _words(key)
    words = philox.philox4x32(np.array(_words(counter), np.uint32), (low, high))
    assert words.tolist() == _words(answer)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_compiled_philox_known_answers(counter: str, key: str, answer: str) -> None:
    from minivae.backends.cpu_kernels import philox4x32

    arguments = [np.uint32(word) for word in _words(counter) + _words(key)]
    assert list(philox4x32(*arguments)) == _words(answer)


def test_noise_is_the_reference_noise(backend: ReferenceBackend) -> None:
    noise, n, d = Noise(SEED, LATENT_STREAM), 65, 50
    z, kl = backend.zeros((n, d)), backend.zeros((n, d))
    state = backend.asarray(new_state(step=2**32 + 7))
    backend.latent_forward(backend.zeros((n, 2 * d)), z, kl, noise, state)
    expected = philox.standard_normal((n, d), noise, 2**32 + 7, np.float64)
    # Near u = 1, where ln u is near 0, the rounding of u to float32 is the error.
    np.testing.assert_allclose(backend.to_numpy(z), expected, atol=2e-5)
    assert (backend.to_numpy(kl) == 0).all()


def _binarized(backend: ReferenceBackend, data: NDArray, epoch: int = 0) -> NDArray:
    images, m = data.shape
    x, order = backend.zeros((images, m)), backend.asarray(np.arange(images))
    state = backend.asarray(new_state(epoch=epoch))
    noise = Noise(SEED, BINARIZATION_STREAM)
    backend.gather_batch(backend.asarray(data), order, state, x, "stochastic", noise)
    return backend.to_numpy(x)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1)])
def test_white_stays_white_and_black_black(
    backend: ReferenceBackend, dtype: type, white: int
) -> None:
    data = np.zeros((2, 100_003), dtype)
    data[1] = white
    x = _binarized(backend, data)
    assert (x[0] == 0).all()
    assert (x[1] == 1).all()


def test_stochastic_binarization_has_the_pixels_mean(backend: ReferenceBackend) -> None:
    x = _binarized(backend, np.full((1, 100_000), 51, np.uint8))
    assert x.mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / 100_000))
    assert set(np.unique(x)) == {0, 1}


def test_every_epoch_binarizes_afresh(backend: ReferenceBackend) -> None:
    gray = np.full((3, 784), 128, np.uint8)
    assert (_binarized(backend, gray, epoch=1) != _binarized(backend, gray, epoch=2)).any()


# The compiled elementary functions


def _ulps(actual: NDArray, exact: NDArray) -> float:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(actual.astype(np.float64) - exact) / spacing))


def _mapped(name: str, x: NDArray) -> NDArray[np.float32]:
    from numba import njit

    function = getattr(cpu_kernels, name)

    @njit
    def mapped(x: NDArray) -> NDArray:
        y = np.empty_like(x)
        for i in range(x.size):
            y[i] = function(x[i])
        return y

    return mapped(x)


@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [
        ("exp", np.exp, -103.9, 88.7),
        ("expm1", np.expm1, -30, 88.7),
        ("expm1", np.expm1, -1e-3, 1e-3),
        ("log1p_of_fraction", np.log1p, 0, 1),
        ("log1p_of_fraction", np.log1p, 0, 1e-3),
        ("log", np.log, 2.0**-33, 1),
        ("log", np.log, 1e-37, 1e37),
    ],
)
def test_elementary_functions_to_two_ulp(name: str, exact: Any, low: float, high: float) -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(low, high, 1_000_000).astype(np.float32)
    if name == "log":
        x = np.exp(rng.uniform(math.log(low), math.log(high), 1_000_000)).astype(np.float32)
    x = x[(x >= np.float32(low)) & (x <= np.float32(high))]
    assert _ulps(_mapped(name, x), exact(x.astype(np.float64))) < 2


def test_cos_and_sin_to_two_ulp() -> None:
    from numba import njit

    from minivae.backends.cpu_kernels import cos_and_sin

    @njit
    def mapped(angles: NDArray, result: NDArray) -> None:
        for i in range(angles.size):
            result[0, i], result[1, i] = cos_and_sin(angles[i])

    angles = np.random.default_rng(3).uniform(0, 2 * math.pi, 1_000_000).astype(np.float32)
    result = np.empty((2, angles.size), np.float32)
    mapped(angles, result)
    exact = np.stack([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))])
    assert _ulps(result, exact) < 2


def test_exp_at_the_ends() -> None:
    x = np.array([np.inf, 1e30, 88.8, 0, -104, -1e30, -np.inf], np.float32)
    np.testing.assert_array_equal(_mapped("exp", x), [np.inf, np.inf, np.inf, 1, 0, 0, 0])
    assert np.isnan(_mapped("exp", np.array([np.nan], np.float32))).all()


def test_columns_that_are_dark_in_every_image_are_not_multiplied() -> None:
    rng, backend = _rng("dark"), backends.get("cpu")
    x, w, b = (rng.standard_normal(size).astype(np.float32) for size in ((13, 40), (40, 33), 33))
    lit = np.arange(3, 40, 5)
    alone, among = np.empty((13, 33), np.float32), np.empty((13, 33), np.float32)
    backend.dense_forward(np.ascontiguousarray(x[:, lit]), w[lit], b, alone, IDENTITY)
    dark = np.delete(np.arange(40), lit)
    x[:, dark], w[dark] = 0, np.nan
    backend.dense_forward(x, w, b, among, IDENTITY)
    assert among.tobytes() == alone.tobytes()


def test_images_that_are_dark_in_a_tile_are_not_multiplied() -> None:
    rng, backend = _rng("dark"), backends.get("cpu")
    x, dz = rng.random((13, 40), np.float32), rng.random((13, 33), np.float32)
    lit = np.arange(0, 13, 3)

    def updated(x: NDArray, dz: NDArray) -> NDArray:
        sizes = x.shape[1] * dz.shape[1], dz.shape[1]
        p, g, m, v = (np.ones(sum(sizes), np.float32) for _ in range(4))
        dw, db = g[: sizes[0]].reshape(x.shape[1], -1), g[sizes[0] :]
        schedule, state = np.full((1, SCHEDULE_COLUMNS), 0.5, np.float32), new_state()
        calls = [Call("dense_weight_gradient", x, dz, dw, db)]
        backend.optimizer_step(calls, p, g, m, v, schedule, state, 0.9, 0.999, 1e-8, len(x))
        return p[: sizes[0]]

    alone = updated(x[lit], dz[lit])
    dark = np.delete(np.arange(13), lit)
    x[dark], dz[dark] = 0, np.nan
    assert updated(x, dz).tobytes() == alone.tobytes()


# Rows, inputs and outputs around a tile's, and so many that the factors are packed.
@pytest.mark.parametrize("at_a_time", [1000, 5, 35])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (13, 40, 33), (33, 33, 33), (70, 53, 101)], ids=str)
def test_a_dense_layer_updated_tile_by_tile_is_the_references(
    sizes: tuple[int, int, int], at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, i, o = sizes
    monkeypatch.setattr(cpu, "STREAM_BYTES", at_a_time * o * 4)
    rng = _rng(f"update {sizes}")
    x, dz = rng.standard_normal((n, i)), rng.standard_normal((n, o))
    x[rng.random(n) < 0.3] = 0
    start = rng.random((4, i * o + o))
    schedule = np.full((1, SCHEDULE_COLUMNS), 0.5)

    def updated(name: str, dtype: DTypeLike) -> list[NDArray]:
        backend = backends.get(name)
        p, g, m, v = start.astype(dtype)
        arrays = (x.astype(dtype), dz.astype(dtype), g[: i * o].reshape(i, o), g[i * o :])
        calls = [Call("dense_weight_gradient", *arrays)]
        state = new_state()
        adam = (p, g, m, v, schedule.astype(dtype), state, 0.9, 0.999, 1e-8)
        backend.optimizer_step(calls, *adam, n)
        assert state[STEP] == 1
        return [p, m, v]

    for actual, expected in zip(
        updated("cpu", np.float32), updated("reference", np.float64), strict=True
    ):
        assert relative_error(actual, expected) < TOLERANCE[np.float32]


def resident_bytes() -> int:
    """Of this process's memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def test_arrays_take_no_memory_before_something_is_written_to_them() -> None:
    backend, size = backends.get("cpu"), 2**25
    before = resident_bytes()
    array = backend.zeros((size // 4,))
    assert resident_bytes() - before < size / 2
    array[:] = 1
    assert resident_bytes() - before > size / 2


@pytest.mark.parametrize("count", [2**60, 2**70])
def test_too_large_an_array_is_a_lack_of_memory(count: int) -> None:
    with pytest.raises(MemoryError):
        backends.get("cpu").zeros((count,))


def test_a_forked_process_writes_to_arrays_of_its_own() -> None:
    array = backends.get("cpu").zeros((3,))
    process = os.fork()
    if not process:
        array[:] = 1
        os._exit(0)
    os.waitpid(process, 0)
    assert not array.any()


# Parts that are packed and unequal (69 by 35: 35 and 34), a last one too small for it (65 by 33, or
# 49 by 25 where tiles are smaller), all on a backend whose workspaces are from another batch.
@pytest.mark.parametrize(("n", "at_a_time"), [(69, 35), (65, 33), (49, 25), (30, 7)])
def test_a_dense_layer_updated_tile_by_tile_stays_within_its_arrays(
    n: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    i, o, rng = 53, 101, _rng("guarded")
    arrays: list[NDArray] = []

    def guarded(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        arrays.append(np.full(math.prod(shape) + 64, np.nan, dtype))
        return arrays[-1][32:-32].reshape(shape)

    monkeypatch.setattr(cpu, "_zeros", guarded)
    x, dz = rng.standard_normal((n, i)), rng.standard_normal((n, o))
    start, gap = rng.random((4, i * o + o + 96)), np.full(i * o + o + 96, True)
    gap[32 : 32 + i * o] = gap[64 + i * o : 64 + i * o + o] = False
    mine, reference = backends.get("cpu"), backends.get("reference")

    def updated(backend: ReferenceBackend, dtype: DTypeLike, images: int = n) -> list[NDArray]:
        p, g, m, v = start.astype(dtype)
        dw, db = g[32 : 32 + i * o].reshape(i, o), g[64 + i * o : 64 + i * o + o]
        batch = (x[:images].astype(dtype), dz[:images].astype(dtype))
        calls = [Call("dense_weight_gradient", *batch, dw, db)]
        schedule, state = np.full((1, SCHEDULE_COLUMNS), 0.5, dtype), new_state()
        backend.optimizer_step(calls, p, g, m, v, schedule, state, 0.9, 0.999, 1e-8, images)
        return [p, m, v]

    updated(mine, np.float32, n // 2)
    monkeypatch.setattr(cpu, "STREAM_BYTES", at_a_time * o * 4)
    for actual, expected, before in zip(
        updated(mine, np.float32), updated(reference, np.float64), start[[0, 2, 3]], strict=True
    ):
        assert relative_error(actual[~gap], expected[~gap]) < TOLERANCE[np.float32]
        np.testing.assert_array_equal(actual[gap], before[gap].astype(np.float32))
    for array in arrays:
        assert np.isnan(array[:32]).all()
        assert np.isnan(array[-32:]).all()


def test_a_dense_layer_updated_by_many_images_is_as_precise_as_by_few() -> None:
    n, i, o, rng = 16384, 9, 10, _rng("many")
    x, dz = rng.standard_normal((n, i)), rng.standard_normal((n, o))

    def momentum(name: str, dtype: DTypeLike) -> NDArray:
        p, g, m, v = np.zeros((4, i * o + o), dtype)
        arrays = (x.astype(dtype), dz.astype(dtype), g[: i * o].reshape(i, o), g[i * o :])
        calls, state = [Call("dense_weight_gradient", *arrays)], new_state()
        schedule = np.full((1, SCHEDULE_COLUMNS), 0.5, dtype)
        backends.get(name).optimizer_step(calls, p, g, m, v, schedule, state, 0.9, 0.999, 1e-8, n)
        return m

    actual, expected = momentum("cpu", np.float32), momentum("reference", np.float64)
    assert relative_error(actual, expected) < TOLERANCE[np.float32]


def test_products_are_right_with_the_tiles_of_a_processor_without_avx512() -> None:
    if not llvmlite.binding.get_host_cpu_features().get("avx2"):
        pytest.skip("the processor has no AVX2, and the tiles in use are those it can have")
    script = Path(__file__).parent / "without_avx512.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", ["glyphs", "mnist-conv"])
def test_a_step_on_the_cpu_takes_no_memory_for_its_batch(name: str) -> None:
    chosen = preset(name)
    model = chosen.model().to(CpuBackend(cores=1))
    trainer = Trainer(model, glyphs(train=1280), chosen.training)
    for _ in range(3):
        trainer.step()
    tracemalloc.start()
    try:
        for _ in range(3):
            trainer.step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A core takes some rows of a weight, and gives them back; 128 images' 400 units are 205 kB.
    assert peak < 2**17


TRAINING = """
import hashlib, sys
import numpy as np
from minivae import *
from minivae.data import Dataset, Splits
pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 1), dtype=np.uint8)
splits = Splits("noise", Dataset(pixels[:30], None), Dataset(pixels[30:], None))
dense = VAE([Flatten(), Dense(90), ReLU(), Dense(6)], [Dense(70), Tanh(), Dense(63)],
            Objective(estimator="importance", samples=3), (9, 7, 1))
convolutions = VAE([Conv2d(5, 3, stride=2, padding=1), SiLU(), Flatten(), Dense(4)],
                   [Dense(140), Reshape((7, 5, 4)), ConvTranspose2d(1, 3), Sigmoid()],
                   Objective("squared-error"), (9, 7, 1))
for model in (dense, convolutions):
    training = Training(epochs=2, batch_size=11, keep_last=True)
    fit(model, splits, training, device="cpu", progress=False)
    for tensor in model.tensors().values():
        print(hashlib.sha256(tensor.tobytes()).hexdigest())
"""


def test_the_bits_of_a_run_do_not_depend_on_how_many_cores_share_it() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", TRAINING],
            env={**os.environ, "NUMBA_NUM_THREADS": cores},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for cores in ("1", "7")
    ]
    assert printed[0].count("\n") > 30
    assert printed[0] == printed[1]


def test_machine_code_is_kept_by_the_content_of_all_its_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = Path(cpu_products.dense_forward.stats.cache_path)
    assert kept.is_relative_to(cpu_cache.CACHE_FOLDER)
    for folder in ("backends", "ops"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(cpu_cache, "__file__", str(tmp_path / "backends" / "cpu_cache.py"))
    folders = {cpu_cache._cache_folder()}
    for path in ("backends/cpu_tiles.py", "ops/state.py"):
        for content in ("x = 1", "x = 2"):
            (tmp_path / path).write_text(content)
            folders.add(cpu_cache._cache_folder())
    assert len(folders) == 5


def test_machine_code_that_nobody_can_keep_is_kept_for_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cpu_cache.settings, "CACHE_DIR", str(tmp_path / "file"))
    folder = Path(cpu_cache._cache_folder())
    assert folder.is_dir()
    assert not folder.is_relative_to(tmp_path)
    shutil.rmtree(folder)


def test_a_product_of_no_images_is_nothing(backend: ReferenceBackend) -> None:
    x, w, b, y = (backend.zeros(shape) for shape in ((0, 40), (40, 50), (50,), (0, 50)))
    backend.dense_forward(x, w, b, y, IDENTITY)
    assert y.shape == (0, 50)


# The registry


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'cpu'"):
        backends.get("cpuu")


def test_a_missing_requirement_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "broken", "no_such_module:Backend")
    with pytest.raises(InputError, match="device 'broken' needs"):
        backends.get("broken")


CUPYS_PAGE = """
================================================================
Failed to import CuPy.

If you installed CuPy via wheels, make sure that the package matches with the version of CUDA.

Original error:
  ImportError: libnvrtc.so.13: cannot open shared object file
================================================================
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (CUPYS_PAGE, "ImportError: libnvrtc.so.13: cannot open shared object file"),
        ("No module named 'cupy'", "No module named 'cupy'"),
        ("", "ImportError"),
    ],
)
def test_an_import_that_fails_is_one_line_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    def fail(*_: str) -> None:
        raise ImportError(text)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(InputError) as raised:
        backends.get("cuda")
    assert str(raised.value) == (
        f"device 'cuda' needs a package that is missing: {cause}; install minivae[cuda13] or "
        "minivae[cuda12]"
    )
