"""Small things of the CUDA C++ kernels, on the CPU: Philox and binarization at their ends, both
paths of Adam, sums that float32 could not hold. And the READMEs, whose code is that of the
sources and whose figures add up.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_backends import KNOWN_ANSWERS, _words

from minivae.backends import PRECISIONS, kernel_backend
from minivae.backends.emulated import EmulatedBackend, build, call
from minivae.backends.kernel_backend import (
    FEW_CHANNELS,
    FEW_FILTERS,
    FEW_TAPS,
    PIXEL_TEAM,
    PIXELS_OF_A_TEAM,
    POSITIONS_AT_ONCE,
)
from minivae.backends.tiling import (
    DEPTH,
    FAN,
    LEVELS,
    MOST_SPLIT,
    MULTIPROCESSORS,
    RESIDENT,
    Product,
    Tiles,
    result_size,
    stage_depth,
    tiles_of,
    tiles_of_group,
)
from minivae.benchmarks.launches import CONV_JOB, DENSE_JOB
from minivae.kernels import (
    DENSE_TILES,
    LARGE,
    MEDIUM,
    SMALL,
    STEMS,
    TILES,
    WITH_TILES,
    Tile,
    source,
)
from minivae.ops.activations import IDENTITY
from minivae.ops.conv import ConvGeometry
from minivae.ops.state import SCHEDULE_COLUMNS, new_state

KERNELS = Path(__file__).parent.parent / "kernels"


def run(module: Any, kernel: str, grid: int, block: int, *arguments: Any) -> None:
    typed = [np.int32(a) if isinstance(a, int) else a for a in arguments]
    typed = [np.float32(a) if isinstance(a, float) else a for a in typed]
    call(module, kernel, (grid, 1, 1), block, typed)


def module(stem: str) -> Any:
    return EmulatedBackend().module(stem, MEDIUM)


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


def test_philox_known_answers() -> None:
    probe = build(source("latent") + WORDS_OF_A_COUNTER)
    for counter, key, answer in KNOWN_ANSWERS:
        words = np.zeros(4, np.uint32)
        arrays = (np.array(_words(text), np.uint32) for text in (counter, key))
        run(probe, "philox_words", 1, 1, *arrays, words)
        assert words.tolist() == _words(answer)


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


def test_binarization_at_the_largest_and_smallest_words() -> None:
    probe = build(source("batch") + VALUES_OF_PIXELS)
    largest = 2**32 - 1
    words = np.array([largest, 0, 0, largest, 2**31 - 1, 2**31], np.uint32)
    pixels = np.array([255, 0, 1, 254, 128, 127], np.uint8)
    floats = np.array([1, 0, 2.0**-32, 1 - 2.0**-24, 0.5, 0.5], np.float32)
    x = np.full((6, 2), np.nan, np.float32)
    run(probe, "pixel_values", 1, 1, pixels, floats, words, x, 6)
    assert x[:, 0].tolist() == [1, 0, 1, 0, 1, 0]
    assert x[:, 1].tolist() == [1, 0, 1, 0, 1, 0]


DIVISIONS = """
extern "C" __global__ void divisions(
    const unsigned int* __restrict__ numbers, int* __restrict__ results, int divisor, int size) {
  for (int i = 0; i < size; ++i) {
    Divided divided(numbers[i], Divisor(divisor));
    results[2 * i] = divided.quotient;
    results[2 * i + 1] = divided.remainder;
  }
}
"""


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 28, 784, 2**16 + 1, 2**31 - 1])
def test_a_multiplication_with_the_inverse_divides(divisor: int) -> None:
    probe = build(source("conv") + DIVISIONS)
    ends = [0, 1, divisor - 1, divisor, divisor + 1, 2**31 - 1, 2**31 - divisor, 2**31 - 2]
    rng = np.random.default_rng(divisor)
    numbers = np.array([*ends, *rng.integers(0, 2**31, 1000)], np.uint32)
    results = np.zeros((numbers.size, 2), np.int32)
    run(probe, "divisions", 1, 1, numbers, results, divisor, numbers.size)
    np.testing.assert_array_equal(results, np.stack(np.divmod(numbers, divisor), axis=1))


EARLY_AND_LATE = """
extern "C" __global__ void early_and_late(
    const float* __restrict__ x, float* __restrict__ read) {
  __shared__ __align__(16) float target[4];
  target[0] = 1.0f;
  copy_async_16(target, x, 16);
  commit_copies();
  read[0] = target[0];
  wait_copies<0>();
  read[1] = target[0];
}
"""


def test_what_a_copy_brings_is_not_a_number_until_it_was_waited_for() -> None:
    read = np.zeros(2, np.float32)
    probe = build(source("gemm") + EARLY_AND_LATE)
    run(probe, "early_and_late", 1, 1, np.full(4, 2, np.float32), read)
    np.testing.assert_array_equal(read, [np.nan, 2])


def test_four_elements_of_adam_at_a_time_give_the_bits_of_one() -> None:
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
        numbers = (0.1, 0.001, 1e-8, size)
        run(module("adam"), "adam_update", 2, 32, *arrays, schedule, new_state(), *numbers)
        results.append(b"".join(array.tobytes() for array in arrays))
    assert results[0] == results[1]


def test_a_product_gets_the_tiles_that_take_least_time() -> None:
    for precision in PRECISIONS:
        assert tiles_of(precision, "gemm", [(128, 400)], 784) == (SMALL, 52, 5)
        assert tiles_of(precision, "gemm", [(4096, 400)], 784) == (LARGE, 224, 1)
        assert tiles_of(precision, "conv", [(100352, 1)], 288).tile == Tile(128, 16)
        assert tiles_of(precision, "conv", [(100352, 32)], 288).tile == Tile(128, 32)
        weights = tiles_of(precision, "weights", [(784, 400), (400, 784)], 128)
        assert weights == (SMALL, 650, 1)


@pytest.mark.parametrize("tile", [SMALL, MEDIUM])
@pytest.mark.parametrize("depth", [1, 64, 112, 127, 128, 200, 300, 10**6])
def test_no_split_is_less_than_64_deep(
    tile: Tile, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WITH_TILES, "gemm", (tile,))
    splits = tiles_of("fp32", "gemm", [(1, 1)], depth).splits
    assert splits == 1 or depth > 64 * (splits - 1)
    assert (splits > 1) == (depth > (128 if tile == SMALL else 112))


@pytest.mark.parametrize(
    ("products", "depth", "blocks"),
    [
        ([(288, 64)], 25088, 395),  # not 400, of which four multiprocessors would have four
        ([(784, 400), (400, 784)], 128, 364),
        ([(4096, 450)], 10**6, 512),
    ],
)
def test_as_many_blocks_as_take_least_time(
    products: list[tuple[int, int]], depth: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WITH_TILES, "gemm", (MEDIUM,))
    _, number, splits = tiles_of("fp32", "gemm", products, depth)
    assert number * splits == blocks


@pytest.mark.parametrize("tile", TILES)
def test_results_of_splits_fit_in_their_workspace(
    tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WITH_TILES, "conv", (tile,))
    backend = EmulatedBackend()
    rng = np.random.default_rng(tile.rows)
    for rows, columns, depth in np.exp(rng.uniform(0, 11, (1000, 3))).astype(int).tolist():
        for copies in (1, 4):
            _, number, splits = tiles_of("fp32", "conv", [(rows, columns)] * copies, depth)
            if splits == 1:
                continue
            assert number * splits * result_size(tile) <= backend._partials.size
            assert LEVELS * number * splits <= backend._arrivals.size
            assert splits <= FAN**LEVELS
            # No part is left without a stage.
            stages = -(-depth // stage_depth(tile))
            assert (splits - 1) * -(-stages // splits) < stages


@pytest.mark.parametrize("stem", STEMS)
def test_all_shared_memory_is_poisoned_and_put_aside(stem: str) -> None:
    """A variable of a template would lie elsewhere: g++ then takes no section."""
    names = ["nm", build(source(stem))._name]
    symbols = subprocess.run(names, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [line for line in symbols if " b _ZZ" in line and "4host" not in line]


@pytest.mark.parametrize("tile", TILES)
def test_the_kernels_have_the_constants_that_tiles_are_chosen_by(tile: Tile) -> None:
    probe = """
extern "C" __global__ void constants(int* __restrict__ values) {
  values[0] = DEPTH, values[1] = STAGE_DEPTH, values[2] = BLOCKS, values[3] = FAN;
  values[4] = RESULT;
}
"""
    values = np.zeros(5, np.int32)
    run(build(source("gemm", tile=tile) + probe), "constants", 1, 1, values)
    expected = [DEPTH, stage_depth(tile), RESIDENT[tile], FAN, result_size(tile)]
    assert values.tolist() == expected


def test_the_kernels_have_the_constants_that_few_channels_and_taps_are_divided_by() -> None:
    probe = """
extern "C" __global__ void few(int* __restrict__ values) {
  values[0] = FEW_CHANNELS, values[1] = TEAM, values[2] = PIXELS;
}
"""
    values = np.zeros(3, np.int32)
    run(build(source("conv_few_channels") + probe), "few", 1, 1, values)
    assert values.tolist() == [FEW_CHANNELS, PIXEL_TEAM, PIXELS_OF_A_TEAM]
    probe = """
extern "C" __global__ void few(int* __restrict__ values) {
  values[0] = FEW_TAPS, values[1] = FEW_FILTERS, values[2] = POSITIONS * THREADS * RUN;
}
"""
    for tile in TILES:
        run(build(source("conv", tile=tile) + probe), "few", 1, 1, values)
        filters = min(tile.columns, FEW_FILTERS)
        assert values[:2].tolist() == [FEW_TAPS, filters]
        assert values[2] == max(1, FEW_FILTERS // filters) * POSITIONS_AT_ONCE * filters


def test_a_job_has_as_many_numbers_as_its_table() -> None:
    probe = """
extern "C" __global__ void size_of_job(int* __restrict__ size) { size[0] = sizeof(Job) / 8; }
"""
    size = np.zeros(1, np.int32)
    for stem, numbers in (("conv", CONV_JOB), ("weights", DENSE_JOB)):
        run(build(source(stem) + probe), "size_of_job", 1, 1, size)
        assert size == numbers


def test_a_group_that_is_split_has_not_too_many_blocks() -> None:
    rng = np.random.default_rng(5)
    for count in range(1, 60):
        sizes = np.exp(rng.uniform(0, 10, (count, 3))).astype(int).tolist()
        products = [Product(*size) for size in sizes]
        tile, splits = tiles_of_group("fp32", "conv", products)
        tiles = [-(-p.rows // tile.rows) * -(-p.columns // tile.columns) for p in products]
        blocks = int(np.dot(tiles, splits))
        assert max(splits) == 1 or blocks <= MOST_SPLIT
        for product, parts in zip(products, splits, strict=True):
            assert parts == 1 or product.depth > 64 * (parts - 1)
            assert parts <= FAN**LEVELS
            stages = -(-product.depth // stage_depth(tile))
            assert (parts - 1) * -(-stages // parts) < stages


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_group_that_is_split_leaves_room_for_the_blocks_beside_it(precision: str) -> None:
    convolutions = [Product(288, 64, 25088), Product(576, 64, 6272), Product(288, 64, 6272)]
    tile, splits = tiles_of_group(precision, "conv", convolutions, MULTIPROCESSORS)
    tiles = [-(-p.rows // tile.rows) * -(-p.columns // tile.columns) for p in convolutions]
    assert min(splits) > 1
    assert int(np.dot(tiles, splits)) + MULTIPROCESSORS <= RESIDENT[tile] * MULTIPROCESSORS


@pytest.mark.parametrize("tile", DENSE_TILES)
@pytest.mark.parametrize("splits", [FAN, FAN + 1, 3 * MULTIPROCESSORS])
def test_a_tree_of_any_size_adds_up_every_split(
    splits: int, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_backend, "tiles_of", lambda *_: Tiles(tile, 1, splits))
    rng = np.random.default_rng(splits)
    x, w = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((3, 12800), (12800, 29)))
    y, b = np.zeros((3, 29), np.float32), np.zeros(29, np.float32)
    backend = EmulatedBackend()
    for _ in range(2):  # the counters are zero again
        backend.dense_forward(x, w, b, y, IDENTITY)
        np.testing.assert_array_equal(y, x @ w)  # of whole numbers, which float32 adds exactly


def bias_gradient(dz: NDArray, seed: int = 0) -> NDArray:
    """The sums of the columns, as a transposed convolution has them of its pixels, with threads and
    blocks in an order that `seed` gives."""
    rows, columns = dz.shape
    x, dw = np.zeros((rows, 1, 1, 1), np.float32), np.zeros((1, 1, columns, 1), np.float32)
    db, still = np.full(columns, np.nan, np.float32), ConvGeometry(1, 1, 0, 0)
    backend = EmulatedBackend()
    for tile in TILES:
        backend.module("conv", tile).shuffle(seed)
    backend.conv_transpose2d_weight_gradient(x, dz.reshape(rows, 1, 1, columns), dw, db, still)
    for tile in TILES:
        backend.module("conv", tile).shuffle(0)
    return db


@pytest.mark.parametrize("rows", [1, 67, 9000])
@pytest.mark.parametrize("columns", [1, 3, 4, 31, 32, 33, 64, 130, 260])
def test_columns_are_added_up_in_one_order(rows: int, columns: int) -> None:
    dz = np.random.default_rng([rows, columns]).standard_normal((rows, columns), np.float32)
    sums = bias_gradient(dz)
    np.testing.assert_allclose(sums, dz.sum(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-4)
    assert all(bias_gradient(dz, seed).tobytes() == sums.tobytes() for seed in (1, 2))


def test_columns_of_runs_that_are_no_aligned_vectors_are_added_up() -> None:
    whole = np.arange(1 + 500 * 8, dtype=np.float32) % 9
    dz = whole[1:].reshape(500, 8)
    assert (whole.ctypes.data % 16, dz.ctypes.data % 16) == (0, 4)
    np.testing.assert_array_equal(bias_gradient(dz), dz.sum(axis=0))


def test_the_norm_has_the_same_bits_on_every_grid() -> None:
    start = np.random.default_rng(8).standard_normal(3001, np.float32)
    results = []
    for grid in (1, 3):
        g, norm, partials = start.copy(), np.zeros(1, np.float32), np.zeros(256, np.float32)
        run(module("adam"), "clip_gradient_partials", 256, 32, g, partials, g.size)
        run(module("adam"), "clip_gradient", grid, 64, g, 0.5, norm, partials, g.size)
        results.append(g.tobytes() + norm.tobytes())
    assert results[0] == results[1]


def test_totals_hold_the_sums_of_a_long_run() -> None:
    """2^40 + 2^-3 and 2^40 + 2^-2 need 44 bits; float32 has 24."""
    totals = np.full(3, 2.0**40)
    schedule = np.zeros((1, SCHEDULE_COLUMNS), np.float32)
    schedule[0] = 1
    reconstruction, kl = np.array([0.125], np.float32), np.array([[0.25]], np.float32)
    weight, state = np.zeros(1, np.float32), new_state()
    arguments = (reconstruction, kl, schedule, state, 0.0, weight, totals, 1, 1)
    for _ in range(3):
        run(module("elbo"), "elbo_totals", 1, 512, *arguments)
    assert (totals - 2.0**40).tolist() == [3 * 0.375, 3 * 0.125, 3 * 0.25]


# The READMEs


@pytest.mark.parametrize(
    "path", ["minivae/ops/latent.py", "kernels/latent_numba.py", "kernels/common.cuh"]
)
def test_the_readmes_code_is_the_sources(path: str) -> None:
    readme = (KERNELS.parent / "README.md").read_text()
    found = re.search(rf"`{re.escape(path)}`[^`]*```\w+\n(.*?)```", readme, re.DOTALL)
    assert found, path
    assert found[1] in (KERNELS.parent / path).read_text()


def test_the_readmes_figures_add_up() -> None:
    def numbers(*cells: str) -> list[int]:
        return [int(cell.replace(",", "")) for cell in cells]

    row = r"^\| (`\w+`|\*\*a step\*\*)( \d+-\d+)? \| (\d+) \| ([\d,]+) \| ([\d,]+) \|"
    readme = (KERNELS / "README.md").read_text()
    section = readme.split("## What a step moves and computes")[1].split("\n## ")[0]
    rows = re.findall(row, section, re.MULTILINE)
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
