"""The CUDA C++ kernels on the CPU (kernels/host.h), where test_kernels_on_host.py does not look.

The tests of every backend on numbers that are not finite, the latch and the noise; both paths of
Adam; sums that float32 could not hold. And kernels/README.md, whose code is that of the sources and
whose figures add up.
"""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_backends import (
    KNOWN_ANSWERS,
    _words,
    test_a_loss_that_is_not_finite_sets_the_latch,
    test_activations_at_the_extremes,
    test_activations_work_in_place,
    test_after_the_latch_nothing_changes,
    test_bernoulli_loss_of_confident_logits,
    test_derivatives_keep_nan,
    test_every_epoch_binarizes_afresh,
    test_kl_of_numbers_that_are_not_finite,
    test_losses_of_numbers_that_are_not_finite,
    test_noise_is_the_reference_noise,
    test_totals_of_a_good_step,
)
from test_kernels_on_host import blocks, build, libraries, run

from minivae.backends.reference import ReferenceBackend
from minivae.kernels import source
from minivae.ops.activations import KINDS, Activation
from minivae.ops.batch import BINARIZATIONS
from minivae.ops.philox import BINARIZATION_STREAM, Noise
from minivae.ops.state import SCHEDULE_COLUMNS, new_state

__all__ = [
    "build",
    "libraries",
    "test_a_loss_that_is_not_finite_sets_the_latch",
    "test_activations_at_the_extremes",
    "test_activations_work_in_place",
    "test_after_the_latch_nothing_changes",
    "test_bernoulli_loss_of_confident_logits",
    "test_derivatives_keep_nan",
    "test_every_epoch_binarizes_afresh",
    "test_kl_of_numbers_that_are_not_finite",
    "test_losses_of_numbers_that_are_not_finite",
    "test_noise_is_the_reference_noise",
    "test_totals_of_a_good_step",
]

Libraries = dict[str, ctypes.CDLL]
BLOCK = 64
KERNELS = Path(__file__).parent.parent / "kernels"


class HostBackend(ReferenceBackend):
    """The reference with the kernels in place of the primitives that have one."""

    name = "host"

    def __init__(self, libraries: Libraries) -> None:
        self.libraries = libraries

    def _elementwise(self, name: str, activation: Activation, *arrays: NDArray | None) -> None:
        size = arrays[-1].size  # type: ignore[union-attr]
        passed = (*arrays, KINDS.index(activation.kind), float(activation.slope), size)
        run(self.libraries["elementwise"], name, blocks(size, BLOCK), BLOCK, *passed)

    def activation_forward(self, z: NDArray, y: NDArray, activation: Activation) -> None:
        self._elementwise("activation_forward", activation, z, y)

    def activation_backward(
        self, z: NDArray | None, y: NDArray, dy: NDArray, dz: NDArray, activation: Activation
    ) -> None:
        self._elementwise("activation_backward", activation, z, y, dy, dz)

    def latent_forward(
        self, head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray
    ) -> None:
        n, d = z.shape
        arguments = (head, z, kl, *noise, state, n, d)
        grid = blocks(n * -(-d // 4), BLOCK)
        run(self.libraries["latent"], "latent_forward", grid, BLOCK, *arguments)

    def bernoulli_loss(
        self, logits: NDArray, x: NDArray, loss: NDArray, dlogits: NDArray, scale: float
    ) -> None:
        arguments = (logits, x, loss, dlogits, float(scale), *logits.shape)
        run(self.libraries["elbo"], "bernoulli_loss", len(logits), BLOCK, *arguments)

    def squared_error_loss(
        self,
        y: NDArray,
        x: NDArray,
        loss: NDArray,
        dz: NDArray,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        kind, slope = KINDS.index(activation.kind), float(activation.slope)
        arguments = (y, x, loss, dz, float(scale), float(weight), kind, slope, *y.shape)
        run(self.libraries["elbo"], "squared_error_loss", len(y), BLOCK, *arguments)

    def elbo_totals(
        self,
        reconstruction: NDArray,
        kl: NDArray,
        schedule: NDArray,
        state: NDArray,
        free_bits: float,
        kl_weight: NDArray,
        totals: NDArray,
    ) -> None:
        arguments = (reconstruction, kl, schedule, state, float(free_bits), kl_weight, totals)
        run(self.libraries["elbo"], "elbo_totals", 1, 512, *arguments, *kl.shape)

    def adam_update(self, p: NDArray, *arguments: Any) -> None:
        run(self.libraries["adam"], "adam_update", 2, BLOCK, p, *arguments, p.size)

    def gather_batch(
        self,
        data: NDArray,
        permutation: NDArray,
        state: NDArray,
        x: NDArray,
        binarization: str,
        noise: Noise,
    ) -> None:
        n, m = x.shape
        arguments = (data, permutation, state, x, BINARIZATIONS.index(binarization), *noise, n, m)
        grid = blocks(n * -(-m // 4), BLOCK)
        run(self.libraries["batch"], f"gather_batch_{data.dtype}", grid, BLOCK, *arguments)

    def advance_state(self, state: NDArray, batch_size: int) -> None:
        run(self.libraries["batch"], "advance_state", 1, BLOCK, state, batch_size)


@pytest.fixture(scope="module")
def backend(libraries: Libraries) -> ReferenceBackend:
    return HostBackend(libraries)


WORDS_OF_A_COUNTER = """
extern "C" __global__ void philox_words(
    const unsigned int* __restrict__ counter, const unsigned int* __restrict__ key,
    unsigned int* __restrict__ words) {
  uint4 result = philox4x32(
      make_uint4(counter[0], counter[1], counter[2], counter[3]), make_uint2(key[0], key[1]));
  words[0] = result.x;
  words[1] = result.y;
  words[2] = result.z;
  words[3] = result.w;
}
"""


def test_philox_known_answers(build: Callable[[str], ctypes.CDLL]) -> None:
    library = build(source("latent") + WORDS_OF_A_COUNTER)
    for counter, key, answer in KNOWN_ANSWERS:
        words = np.zeros(4, np.uint32)
        arrays = (np.array(_words(text), np.uint32) for text in (counter, key))
        run(library, "philox_words", 1, 1, *arrays, words)
        assert words.tolist() == _words(answer)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1)])
def test_white_stays_white_and_black_black(
    backend: ReferenceBackend, dtype: type, white: int
) -> None:
    data = np.zeros((2, 4001), dtype)
    data[1] = white
    x, noise = np.full((2, 4001), np.nan, np.float32), Noise(5, BINARIZATION_STREAM)
    backend.gather_batch(data, np.arange(2), new_state(), x, "stochastic", noise)
    assert (x[0] == 0).all()
    assert (x[1] == 1).all()


VALUES_OF_PIXELS = """
extern "C" __global__ void pixel_values(
    const unsigned char* __restrict__ bytes, const float* __restrict__ floats,
    const unsigned int* __restrict__ words, float* __restrict__ x, int size) {
  for (int i = 0; i < size; ++i) {
    x[2 * i] = pixel_value(bytes[i], STOCHASTIC, words[i]);
    x[2 * i + 1] = pixel_value(floats[i], STOCHASTIC, words[i]);
  }
}
"""


def test_binarization_at_the_largest_and_smallest_words(
    build: Callable[[str], ctypes.CDLL],
) -> None:
    library = build(source("batch") + VALUES_OF_PIXELS)
    largest = 2**32 - 1
    words = np.array([largest, 0, 0, largest, 2**31 - 1, 2**31], np.uint32)
    pixels = np.array([255, 0, 1, 254, 128, 127], np.uint8)
    floats = np.array([1, 0, 2.0**-32, 1 - 2.0**-24, 0.5, 0.5], np.float32)
    x = np.full((6, 2), np.nan, np.float32)
    run(library, "pixel_values", 1, 1, pixels, floats, words, x, 6)
    assert x[:, 0].tolist() == [1, 0, 1, 0, 1, 0]
    assert x[:, 1].tolist() == [1, 0, 1, 0, 1, 0]


def test_four_elements_of_adam_at_a_time_give_the_bits_of_one(libraries: Libraries) -> None:
    size = 131
    rng = np.random.default_rng(7)
    values = rng.standard_normal((4, size), np.float32)
    values[3] = np.abs(values[3])
    schedule = np.array([[0.01, 0.3, 0.999, 1]], np.float32)
    results = []
    for offset in (0, 1):  # float32 elements past a multiple of 16 bytes, which float4 needs
        arrays = []
        for value in values:
            memory = np.empty(size + 8, np.float32)
            start = -memory.ctypes.data % 16 // 4 + offset
            arrays.append(memory[start : start + size])
            arrays[-1][:] = value
            assert arrays[-1].ctypes.data % 16 == 4 * offset
        numbers = (0.9, 0.999, 1e-8, size)
        run(libraries["adam"], "adam_update", 2, 32, *arrays, schedule, new_state(), *numbers)
        results.append(b"".join(array.tobytes() for array in arrays))
    assert results[0] == results[1]


def test_the_norm_has_the_same_bits_on_every_grid(libraries: Libraries) -> None:
    start = np.random.default_rng(8).standard_normal(3001, np.float32)
    results = []
    for grid in (1, 3):
        g, norm, partials = start.copy(), np.zeros(1, np.float32), np.zeros(256, np.float32)
        run(libraries["adam"], "clip_gradient_partials", 256, 32, g, partials, g.size)
        run(libraries["adam"], "clip_gradient", grid, BLOCK, g, 0.5, norm, partials, g.size)
        results.append(g.tobytes() + norm.tobytes())
    assert results[0] == results[1]


def test_totals_hold_the_sums_of_a_long_run(libraries: Libraries) -> None:
    """2^40 + 2^-3 and 2^40 + 2^-2 need 44 bits; float32 has 24."""
    totals = np.full(3, 2.0**40)
    schedule = np.zeros((1, SCHEDULE_COLUMNS), np.float32)
    schedule[0] = 1
    reconstruction, kl = np.array([0.125], np.float32), np.array([[0.25]], np.float32)
    weight, state = np.zeros(1, np.float32), new_state()
    arguments = (reconstruction, kl, schedule, state, 0.0, weight, totals, 1, 1)
    for _ in range(3):
        run(libraries["elbo"], "elbo_totals", 1, 512, *arguments)
    assert (totals - 2.0**40).tolist() == [3 * 0.375, 3 * 0.125, 3 * 0.25]


# The README


def _readme() -> str:
    return (KERNELS / "README.md").read_text()


@pytest.mark.parametrize(
    "path", ["minivae/ops/latent.py", "kernels/latent_numba.py", "kernels/latent.cu"]
)
def test_the_readmes_code_is_the_sources(path: str) -> None:
    found = re.search(rf"`{re.escape(path)}`[^`]*```\w+\n(.*?)```", _readme(), re.DOTALL)
    assert found, path
    assert found[1] in (KERNELS.parent / path).read_text()


def test_the_readmes_figures_add_up() -> None:
    def numbers(*cells: str) -> list[int]:
        return [int(cell.replace(",", "")) for cell in cells]

    row = r"^\| (`\w+`|\*\*a step\*\*)( \d+-\d+)? \| (\d+) \| ([\d,]+) \| ([\d,]+) \|"
    rows = re.findall(row, _readme(), re.MULTILINE)
    *primitives, total = [numbers(*cells) for _, _, *cells in rows]
    assert [sum(column) for column in zip(*primitives, strict=True)] == total
    n, counted = 128, 0
    for name, shape, *cells in rows:
        if shape:
            a, b = map(int, shape.split("-"))
            weight, bias, read, written = a * b, b, *numbers(*cells[1:])
            expected = {
                "`dense_forward`": (n * a + weight + bias, n * b),
                # The gradient of a layer b-a: with its input, whose activation is fused below it,
                # unless that is the latent z.
                "`dense_input_gradient`": (n * a + weight + (n * b if b > 20 else 0), n * b),
                "`dense_weight_gradient`": (n * a + n * b, weight + bias),
            }[name]
            assert (read, written) == (4 * expected[0], 4 * expected[1]), (name, shape)
            counted += 1
    assert counted == 11
