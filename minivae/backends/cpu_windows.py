"""Which pixels of one image each pixel of another takes from, for the CPU backend's products.

Pixels that see the same taps of the kernel form a group. Within it the pixel seen through a tap is
always as far from a source of the pixel's own, so a group is a plain matrix product over every
window in it: no tap outside the image is multiplied, and in a transposed convolution none that
falls between the strides.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ops.conv import ConvGeometry
from .cpu_tiles import ROWS

Size = tuple[int, int]


class Windows(NamedTuple):
    """Groups of output pixels. Pixels and taps are numbered row by row.

    Group g has the pixels first_pixel[g] to first_pixel[g + 1] of `targets` and `sources`, and
    the taps first_tap[g] to first_tap[g + 1] of `taps` and `shifts`. Pixel targets[p] sees input
    pixel sources[p] + shifts[t] through tap taps[t]. Along a row of a group, which has runs[g]
    pixels, target and source move on by `steps`.
    """

    steps: NDArray[np.int64]
    first_pixel: NDArray[np.int64]
    targets: NDArray[np.int64]
    sources: NDArray[np.int64]
    first_tap: NDArray[np.int64]
    taps: NDArray[np.int64]
    shifts: NDArray[np.int64]
    runs: NDArray[np.int64]


@lru_cache
def windows(large: Size, small: Size, kernel: Size, geometry: ConvGeometry, back: bool) -> Windows:
    """The windows of a convolution from `large` to `small` images (conv.E1'), or, `back`, of the
    map from small to large ones (conv.E2)."""
    inputs = small if back else large
    targets, sources, taps, shifts, runs = [], [], [], [], []
    first_pixel, first_tap = [0], [0]
    axes = [
        _groups(large[axis], small[axis], kernel[axis], geometry[axis], geometry[axis + 2], back)
        for axis in (0, 1)
    ]
    for (row_taps, rows), (column_taps, columns) in product(*(axis.items() for axis in axes)):
        for (p, source_row), (q, source_column) in product(rows, columns):
            targets.append(p * (large if back else small)[1] + q)
            sources.append(source_row * inputs[1] + source_column)
        for (i, down), (j, right) in product(row_taps, column_taps):
            taps.append(i * kernel[1] + j)
            shifts.append(down * inputs[1] + right)
        first_pixel.append(len(targets))
        first_tap.append(len(taps))
        runs.append(len(columns))
    steps = (geometry.stride_w, 1) if back else (1, geometry.stride_w)
    lists = (steps, first_pixel, targets, sources, first_tap, taps, shifts, runs)
    return Windows(*(np.array(numbers, np.int64) for numbers in lists))


Taps = tuple[tuple[int, int], ...]


def _groups(
    large: int, small: int, kernel: int, stride: int, before: int, back: bool
) -> dict[Taps, list[tuple[int, int]]]:
    """One axis: the (output, source) of each pixel by the (tap, shift) that it sees."""
    groups: dict[Taps, list[tuple[int, int]]] = {}
    for output in range(large if back else small):
        if back:
            # Through tap i the small pixel (output + before - i) / stride, if that is whole.
            source, phase = divmod(output + before, stride)
            shifts = [(i, -(i // stride)) for i in range(phase, kernel, stride)]
        else:
            source = output * stride - before
            shifts = [(i, i) for i in range(kernel)]
        size = small if back else large
        seen = tuple((i, shift) for i, shift in shifts if 0 <= source + shift < size)
        groups.setdefault(seen, []).append((output, source))
    return groups


class WeightTiles(NamedTuple):
    """The rows (tap, channel) of a weight gradient, cut into tiles for each group of windows.

    Group g has the tiles first[g] to first[g + 1]. Tile i has the rows `weights[i]` of the
    gradient, the first counts[i] of ROWS; they come from the places `inputs[i]` of the input,
    relative to a source. All are within the ROWS rows of number `owned[i]`, whatever the group,
    so that cores may share the work by that number.
    """

    first: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.int64]
    inputs: NDArray[np.int64]
    owned: NDArray[np.int64]


@lru_cache
def weight_tiles(
    large: Size, small: Size, kernel: Size, geometry: ConvGeometry, channels: int
) -> WeightTiles:
    """The tiles of the weight gradient (conv.E3) for `windows` with `channels` in large images."""
    seen = windows(large, small, kernel, geometry, False)
    first, counts, weights, inputs, owned = [0], [], [], [], []
    for begin, end in zip(seen.first_tap[:-1], seen.first_tap[1:], strict=True):
        rows = np.arange(channels)
        weight_rows = (seen.taps[begin:end, None] * channels + rows).ravel()
        input_places = (seen.shifts[begin:end, None] * channels + rows).ravel()
        for number in np.unique(weight_rows // ROWS):
            inside = np.flatnonzero(weight_rows // ROWS == number)
            counts.append(len(inside))
            inside = np.resize(inside, ROWS)
            weights.append(weight_rows[inside])
            inputs.append(input_places[inside])
            owned.append(number)
        first.append(len(counts))
    tiles = (np.array(weights).reshape(-1, ROWS), np.array(inputs).reshape(-1, ROWS))
    return WeightTiles(np.array(first), np.array(counts), *tiles, np.array(owned))
