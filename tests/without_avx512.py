"""Runs the CPU backend's equivalence tests with the tiles of a processor that has AVX2 only, in a
process of its own, since tiles take their size when they are imported:

    python tests/without_avx512.py
"""

import os
import sys
from pathlib import Path

os.environ["NUMBA_CPU_NAME"] = "haswell"
os.environ["NUMBA_CPU_FEATURES"] = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2"

import llvmlite.binding  # type: ignore[import-untyped]
import pytest

llvmlite.binding.get_host_cpu_features = dict

from minivae.backends.cpu_tiles import LANES  # noqa: E402

assert LANES == 8
products = "(cpu and (dense_ or conv2d_ or conv_transpose2d_)) or tile_by_tile"
file = str(Path(__file__).parent / "test_backends.py")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", products, file]))
