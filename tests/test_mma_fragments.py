"""The layout of mma.sync's fragments and of ldmatrix in the host shim, against figures typed from
the PTX ISA ("Matrix Fragments for mma.m16n8k8", .tf32; "ldmatrix"), so that kernel and shim cannot
share one misreading."""

import ctypes

import numpy as np
import pytest

from minivae.backends.emulated import build
from minivae.kernels import source

# (lane, register): (row, column), spot by spot from the manual's figures of A, B and C.
MANUAL = {
    "a": {
        **{(0, 0): (0, 0), (0, 1): (8, 0), (0, 2): (0, 4), (0, 3): (8, 4)},
        **{(1, 0): (0, 1), (3, 2): (0, 7), (4, 0): (1, 0), (7, 3): (9, 7)},
        **{(28, 0): (7, 0), (31, 0): (7, 3), (31, 1): (15, 3), (31, 3): (15, 7)},
    },
    "b": {
        **{(0, 0): (0, 0), (0, 1): (4, 0), (1, 0): (1, 0), (3, 1): (7, 0)},
        **{(4, 0): (0, 1), (6, 1): (6, 1), (28, 0): (0, 7), (31, 1): (7, 7)},
    },
    "c": {
        **{(0, 0): (0, 0), (0, 1): (0, 1), (0, 2): (8, 0), (0, 3): (8, 1)},
        **{(1, 0): (0, 2), (3, 1): (0, 7), (4, 0): (1, 0), (5, 3): (9, 3)},
        **{(28, 0): (7, 0), (31, 1): (7, 7), (31, 3): (15, 7)},
    },
}
# (lane, register): (matrix, row, element of 32 bits) of ldmatrix with .x4. Lanes 0 to 7 give where
# the first matrix's rows are, 8 to 15 the second's, and so on.
LOADED = {
    **{(0, 0): (0, 0, 0), (1, 0): (0, 0, 1), (3, 0): (0, 0, 3), (4, 0): (0, 1, 0)},
    **{(31, 0): (0, 7, 3), (0, 1): (1, 0, 0), (5, 2): (2, 1, 1), (30, 3): (3, 7, 2)},
}
REGISTERS = {"a": 4, "b": 2, "c": 4}
SHAPES = {"a": (16, 8), "b": (8, 8), "c": (16, 8)}

PROBE = r"""
extern "C" __global__ void round_to_tf32(const float* x, int* bits, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) bits[i] = (int)to_tf32(x[i]);
}

extern "C" __global__ void load(float* values) {
  __shared__ __align__(16) float rows[32][8];
  for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = 8 * threadIdx.x + i;
  __syncthreads();
  float loaded[4];
  load_matrices(loaded, rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) values[4 * threadIdx.x + i] = loaded[i];
}
}  // the rest is outside of the unnamed namespace

extern "C" int position_of(char matrix, int lane, int index) {
  auto [row, column] = host::position(matrix, lane, index);
  return 100 * row + column;
}

namespace {
"""


def build_probe(*flags: str) -> ctypes.CDLL:
    return build(source("gemm", tensor_cores=True) + PROBE, *flags)


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return build_probe()


def position(probe: ctypes.CDLL, matrix: str, lane: int, register: int) -> tuple[int, int]:
    return divmod(probe.position_of(ctypes.c_char(matrix.encode()), lane, register), 100)


@pytest.mark.parametrize("matrix", MANUAL)
def test_fragments_lie_where_the_manual_draws_them(probe: ctypes.CDLL, matrix: str) -> None:
    for (lane, register), expected in MANUAL[matrix].items():
        assert position(probe, matrix, lane, register) == expected, (lane, register)


@pytest.mark.parametrize("matrix", MANUAL)
def test_a_warp_holds_every_element_of_a_matrix_once(probe: ctypes.CDLL, matrix: str) -> None:
    held = [
        position(probe, matrix, lane, register)
        for lane in range(32)
        for register in range(REGISTERS[matrix])
    ]
    assert sorted(held) == [(r, c) for r in range(SHAPES[matrix][0]) for c in range(8)]


def test_matrices_are_loaded_as_the_manual_draws_them(probe: ctypes.CDLL) -> None:
    values = np.zeros((32, 4), np.float32)
    probe.run_load(1, 1, 1, 32, ctypes.c_void_p(values.ctypes.data))
    for (lane, register), (matrix, row, element) in LOADED.items():
        assert values[lane, register] == 8 * (8 * matrix + row) + element, (lane, register)


STEP = 2.0**-10
"""Between neighbours of 1 with 10 bits of mantissa."""


@pytest.mark.parametrize(
    ("ties_to_even", "tie"), [(0, 1 + STEP), (1, 1)], ids=["as before sm_90", "as from sm_90"]
)
def test_rounding_to_tf32_goes_to_the_nearest(ties_to_even: int, tie: float) -> None:
    probe = build_probe(f"-DTIES_TO_EVEN={ties_to_even}")
    rounded = {
        **{1: 1, 1 + 0.49 * STEP: 1, 1 + 0.51 * STEP: 1 + STEP, 1 + STEP: 1 + STEP},
        **{1 + 0.5 * STEP: tie, -1 - 0.5 * STEP: -tie, 1 + 1.5 * STEP: 1 + 2 * STEP},
    }
    x, expected = (np.array(list(side), np.float32) for side in (rounded, rounded.values()))
    bits = np.zeros(x.size, np.int32)
    arguments = [ctypes.c_void_p(array.ctypes.data) for array in (x, bits)]
    probe.run_round_to_tf32(1, 1, 1, 32, *arguments, x.size)
    np.testing.assert_array_equal(bits.view(np.float32), expected)
