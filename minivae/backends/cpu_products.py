"""The CPU backend's matrix products: dense layers, convolutions and their gradients, tile by tile.

All of them gather the rows of one operand through `Windows` (cpu_windows.py); no matrix of columns
is written. A kernel runs on one core and without the GIL.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from .cpu_kernels import IDENTITY, ZERO, activate, kernel, multiply_derivative
from .cpu_tiles import (
    LANES,
    ROWS,
    WIDTH,
    add_tile,
    load_tile,
    multiply_add,
    multiply_add_lanes,
    store_tile,
    sum_lanes,
    zero_tile,
)

shared_kernel: Any = njit(cache=True, nogil=True, parallel=True, error_model="numpy")
"""A kernel that hands out its work in as many parts as it is told."""

FEW = LANES // 4
"""So few columns leave most lanes of a tile idle."""


@kernel
def transpose_taps(w, transposed):
    """w (t, c, k) to (t, k, c)."""
    for t in range(w.shape[0]):
        for c in range(w.shape[1]):
            for k in range(w.shape[2]):
                transposed[t, k, c] = w[t, c, k]


@kernel
def _accumulate(tile, count, a, rows, a_at, a_step, b, b_at, b_step, width):
    """The tile plus `count` outer products, whose places in a and b are so many steps apart."""
    for t in range(count):
        tile = multiply_add(tile, a, rows, a_at + t * a_step, b, b_at + t * b_step, width)
    return tile


@kernel
def _next_rows(x_rows, y_rows, place, group, x_shape, y_shape, windows):
    """The places in x and y of the next ROWS pixels of a group, from (image, pixel) = `place` on.

    Returns the place after them. After the last pixel comes the last again, which is then
    computed a second time alike.
    """
    _, inputs, channels = x_shape
    n, outputs, columns = y_shape
    begin, end = windows.first_pixel[group], windows.first_pixel[group + 1]
    image, pixel = place
    for r in range(ROWS):
        x_rows[r] = (image * inputs + windows.sources[pixel]) * channels
        y_rows[r] = (image * outputs + windows.targets[pixel]) * columns
        if pixel + 1 < end:
            pixel += 1
        elif image + 1 < n:
            image, pixel = image + 1, begin
    return image, pixel


@kernel
def _window_product(x, w, b, y, windows):
    """y[n, target of p] = b + sum of x[n, source of p + shift of t] w[t] over the taps t of p.

    Shapes: x (n, s, c), w (t, c, k), b (k,), y (n, p, k).
    """
    channels, columns = w.shape[1:]
    x_flat, w_flat, y_flat = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    x_rows, y_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    b_rows = np.zeros(ROWS, np.intp)
    for group in range(windows.runs.size):
        pixels = windows.first_pixel[group + 1] - windows.first_pixel[group]
        for block in range(0, columns, WIDTH):
            width = min(WIDTH, columns - block)
            place = (0, windows.first_pixel[group])
            for _ in range(0, y.shape[0] * pixels, ROWS):
                place = _next_rows(x_rows, y_rows, place, group, x.shape, y.shape, windows)
                tile = load_tile(b, b_rows, block, width)
                for t in range(windows.first_tap[group], windows.first_tap[group + 1]):
                    x_at = windows.shifts[t] * channels
                    w_at = windows.taps[t] * channels * columns + block
                    tile = _accumulate(
                        tile, channels, x_flat, x_rows, x_at, 1, w_flat, w_at, columns, width
                    )
                store_tile(tile, y_flat, y_rows, block, width)


@kernel
def _window_dots(x, w, b, y, windows):
    """`_window_product` for few columns, with the channels in the lanes instead.

    Shapes: x (n, s, c), w (t, k, c), b (k,), y (n, p, k).
    """
    columns, channels = w.shape[1:]
    x_flat, w_flat, y_flat = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    x_rows, y_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    sums = np.empty(ROWS, np.float32)
    for group in range(windows.runs.size):
        pixels = windows.first_pixel[group + 1] - windows.first_pixel[group]
        place = (0, windows.first_pixel[group])
        for _ in range(0, y.shape[0] * pixels, ROWS):
            place = _next_rows(x_rows, y_rows, place, group, x.shape, y.shape, windows)
            for column in range(columns):
                tile = zero_tile()
                for t in range(windows.first_tap[group], windows.first_tap[group + 1]):
                    x_at = windows.shifts[t] * channels
                    w_at = (windows.taps[t] * columns + column) * channels
                    for block in range(0, channels, WIDTH):
                        width = min(WIDTH, channels - block)
                        tile = multiply_add_lanes(
                            tile, x_flat, x_rows, x_at + block, w_flat, w_at + block, width
                        )
                sum_lanes(tile, sums)
                for r in range(ROWS):
                    y_flat[y_rows[r] + column] = b[column] + sums[r]


@kernel
def _slice(size, part, parts):
    """Where part `part` of `parts` of so many begins and ends."""
    return size * part // parts, size * (part + 1) // parts


@kernel
def _some_forward(x, w, b, y, windows, images, kind, slope):
    """`window_forward` on one core."""
    for first in range(0, x.shape[0], images):
        x_part, y_part = x[first : first + images], y[first : first + images]
        if b.size > FEW:
            _window_product(x_part, w, b, y_part, windows)
        else:
            _window_dots(x_part, w, b, y_part, windows)
        activate(y_part.reshape(-1), y_part.reshape(-1), kind, slope)


@kernel
def _some_input_gradient(dz, w, x, dx, windows, images, kind, slope):
    """`window_input_gradient` on one core."""
    zeros = np.zeros(x.shape[2], np.float32)
    for first in range(0, x.shape[0], images):
        last = first + images
        _some_forward(dz[first:last], w, zeros, dx[first:last], windows, images, IDENTITY, ZERO)
        y, part = x[first:last].reshape(-1), dx[first:last].reshape(-1)
        multiply_derivative(y, y, part, part, kind, slope)


@shared_kernel
def window_forward(x, w, b, y, windows, images, kind, slope, parts):
    """y = f(b + windows of x times w), `images` at a time so that they stay in the cache.

    Shapes: x (n, s, c), w (t, c, k) or, where k is at most FEW, (t, k, c), b (k,), y (n, p, k).
    """
    for part in prange(parts):
        begin, end = _slice(x.shape[0], part, parts)
        _some_forward(x[begin:end], w, b, y[begin:end], windows, images, kind, slope)


@shared_kernel
def window_input_gradient(dz, w, x, dx, windows, images, kind, slope, parts):
    """dx = (windows of dz times w) f'(x), `images` at a time so that they stay in the cache.

    Shapes: dz (n, s, k), w (t, k, c) or, where c is at most FEW, (t, c, k), x and dx (n, p, c).
    """
    for part in prange(parts):
        begin, end = _slice(x.shape[0], part, parts)
        _some_input_gradient(
            *(dz[begin:end], w, x[begin:end], dx[begin:end], windows, images, kind, slope)
        )


@kernel
def _window_sum(tile, x_flat, x_rows, dz_flat, block, width, shapes, windows, group, images):
    """The tile plus what the pixels of a group add to it in the images from images[0] on."""
    inputs, channels, outputs, columns = shapes
    begin, end = windows.first_pixel[group], windows.first_pixel[group + 1]
    first, last = images
    run = windows.runs[group]
    target_step, source_step = windows.steps
    # The innermost loop goes over what there is more of, pixels in a row or images.
    if run < last - first:
        for p in range(begin, end):
            x_at = (first * inputs + windows.sources[p]) * channels
            dz_at = (first * outputs + windows.targets[p]) * columns + block
            x_step, dz_step = inputs * channels, outputs * columns
            tile = _accumulate(
                tile, last - first, x_flat, x_rows, x_at, x_step, dz_flat, dz_at, dz_step, width
            )
    else:
        x_step, dz_step = source_step * channels, target_step * columns
        for image in range(first, last):
            for p in range(begin, end, run):
                x_at = (image * inputs + windows.sources[p]) * channels
                dz_at = (image * outputs + windows.targets[p]) * columns + block
                tile = _accumulate(
                    tile, run, x_flat, x_rows, x_at, x_step, dz_flat, dz_at, dz_step, width
                )
    return tile


@kernel
def _some_weight_gradient(x, dz, dw, windows, tiles, images, part, parts):
    """`window_weight_gradient`, but only every `parts`-th tile from the `part`-th on."""
    n, inputs, channels = x.shape
    _, outputs, columns = dz.shape
    shapes = (inputs, channels, outputs, columns)
    x_flat, dz_flat, dw_flat = x.reshape(-1), dz.reshape(-1), dw.reshape(-1)
    dw_rows = np.empty(ROWS, np.intp)
    for first in range(0, n, images):
        part_of_batch = (first, min(n, first + images))
        for group in range(windows.runs.size):
            for i in range(tiles.first[group], tiles.first[group + 1]):
                if tiles.owned[i] % parts != part:
                    continue
                dw_rows[:] = tiles.weights[i] * columns
                for block in range(0, columns, WIDTH):
                    width = min(WIDTH, columns - block)
                    tile = _window_sum(
                        *(zero_tile(), x_flat, tiles.inputs[i], dz_flat, block, width),
                        *(shapes, windows, group, part_of_batch),
                    )
                    add_tile(tile, dw_flat, dw_rows, tiles.counts[i], block, width)


@shared_kernel
def window_weight_gradient(x, dz, dw, windows, tiles, images, parts):
    """dw[t] = sum of x[n, source of p + shift of t]^T dz[n, target of p] over the p that see t.

    Each number of dw has one owner, so that its bits do not depend on how many cores share the
    work. `images` at a time go through the cache, which also keeps the sums short.

    Shapes: x (n, s, c), dz (n, p, k), dw (t, c, k).
    """
    for part in prange(parts):
        _some_weight_gradient(x, dz, dw, windows, tiles, images, part, parts)
