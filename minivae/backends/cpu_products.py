"""The CPU backend's matrix products: dense layers, convolutions and their gradients, tile by tile.

Those of convolutions gather the rows of one operand through `Windows` (cpu_windows.py); no matrix
of columns is written.
"""

import numpy as np

from ..ops.state import FAILED, INDEX
from .cpu_cache import inlined, kernel
from .cpu_kernels import (
    ZERO,
    activate,
    adam,
    multiply_derivative,
    share,
    sum_rows,
)
from .cpu_tiles import (
    DENSE_VECTORS,
    LANES,
    ROWS,
    SUMS,
    VECTORS,
    add_tile,
    copy_row,
    fetch,
    leaky_relu_gradient_tile,
    leaky_relu_tile,
    load_tile,
    multiply_add,
    multiply_add_dots,
    nonzero_lanes,
    store_tile,
    sum_lanes,
    transpose_square,
    zero_tile,
)

FEW = LANES // 4
"""With at most this many columns most lanes of a tile are idle."""

HALF_ROWS = ROWS // 2

FEW_ROWS = 4 * ROWS
"""Up to this many rows of one factor, or terms of the sum, packing the other does not pay."""

END = -1
"""After the last step of a list."""

DENSE_WIDTH = DENSE_VECTORS * LANES
"""The columns of a dense layer's whole tile."""

AHEAD = 12
"""How many rows of a weight are prefetched ahead. A list of steps for them is that much
longer."""

MOST_NONZERO = 3 / 4
"""The fraction of all steps above which a list of those that count does not pay."""


@kernel
def _transpose_block(source, at, step, target, to, to_step, rows, columns):
    """`transpose_square`, without masks where the square is whole."""
    if rows >= LANES and columns >= LANES:
        transpose_square(source, at, step, target, to, to_step, LANES, LANES)
    else:
        transpose_square(source, at, step, target, to, to_step, rows, columns)


@kernel
def transpose_taps(part, parts, w, transposed):
    """w (t, c, k) to (t, k, c)."""
    rows, columns = w.shape[1:]
    source, target = w.reshape(-1), transposed.reshape(-1)
    first, end = share(rows, part, parts)
    for origin in range(0, w.size, rows * columns):
        for k in range(0, columns, LANES):
            for c in range(first, end, LANES):
                at, to = origin + c * columns + k, origin + k * rows + c
                _transpose_block(source, at, columns, target, to, rows, end - c, columns - k)


@inlined
def _accumulate(tile, count, a, rows, a_at, a_step, b, b_at, b_step, width):
    """The tile plus `count` outer products, whose places in a and b are a_step and b_step apart."""
    for t in range(count):
        tile = multiply_add(tile, a, rows, a_at + t * a_step, b, b_at + t * b_step, width)
    return tile


@inlined
def _accumulate_listed(tile, steps, count, a, rows, a_step, b, b_at, b_step, width):
    """`_accumulate`, but only the outer products whose numbers are the first `count` of `steps`."""
    for t in range(count):
        a_at, at = steps[t] * a_step, b_at + steps[t] * b_step
        tile = multiply_add(tile, a, rows, a_at, b, at, width)
    return tile


@inlined
def _accumulate_fetched(tile, steps, a, rows, b, b_at, b_step, width, vectors):
    """`_accumulate`, but only the outer products whose numbers are in `steps`, up to END, of
    neighbouring columns of a. Asks for the rows of b AHEAD of time: they lie too far apart for
    the hardware prefetcher."""
    place, step = 0, steps[0]
    # LLVM would unroll a loop of known trip count until the tile spills from registers.
    while step != END:
        fetch(b, b_at + steps[place + AHEAD] * b_step, vectors)
        tile = multiply_add(tile, a, rows, step, b, b_at + step * b_step, width)
        place += 1
        step = steps[place]
    return tile


@inlined
def _wide(columns, vectors):
    """How many columns go to tiles of `vectors` vectors; the rest, at most LANES, go to tiles of
    one."""
    rest = columns % (vectors * LANES)
    return columns if rest > LANES else columns - rest


@inlined
def _next_rows(x_rows, y_rows, image, pixel, begin, end, x_shape, y_shape, sources, targets):
    """The places in x and y of the next ROWS pixels of a group, which goes from `begin` to `end`.

    Takes the first of them as (image, pixel) and returns the one after them. After the last pixel
    of all comes the last again, which is then computed a second time alike.
    """
    for r in range(ROWS):
        x_rows[r] = (image * x_shape[1] + sources[pixel]) * x_shape[2]
        y_rows[r] = (image * y_shape[1] + targets[pixel]) * y_shape[2]
        if pixel + 1 < end:
            pixel += 1
        elif image + 1 < y_shape[0]:
            image, pixel = image + 1, begin
    return image, pixel


@inlined
def _window_tiles(x, w, b, y, windows, first, last, vectors):
    """`_window_product` for the columns from `first` to `last`."""
    _, first_pixel, targets, sources, first_tap, taps, shifts, _ = windows
    channels, columns = w.shape[1:]
    x_flat, w_flat, y_flat = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    x_rows, y_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    b_rows = np.zeros(ROWS, np.intp)
    for group in range(first_pixel.size - 1):
        begin, end = first_pixel[group], first_pixel[group + 1]
        for block in range(first, last, vectors * LANES):
            width = min(vectors * LANES, last - block)
            image, pixel = 0, begin
            for _ in range(0, y.shape[0] * (end - begin), ROWS):
                image, pixel = _next_rows(
                    x_rows, y_rows, image, pixel, begin, end, x.shape, y.shape, sources, targets
                )
                tile = load_tile(b, b_rows, block, width, ROWS, vectors)
                for t in range(first_tap[group], first_tap[group + 1]):
                    x_at, w_at = shifts[t] * channels, taps[t] * channels * columns + block
                    tile = _accumulate(
                        tile, channels, x_flat, x_rows, x_at, 1, w_flat, w_at, columns, width
                    )
                store_tile(tile, y_flat, y_rows, block, width)


@kernel
def _window_product(x, w, b, y, windows):
    """y[n, target of p] = b + sum of x[n, source of p + shift of t] w[t] over the taps t of p.

    Shapes: x (n, s, c), w (t, c, k), b (k,), y (n, p, k).
    """
    columns = w.shape[2]
    wide = _wide(columns, VECTORS)
    _window_tiles(x, w, b, y, windows, 0, wide, VECTORS)
    _window_tiles(x, w, b, y, windows, wide, columns, 1)


@kernel
def _window_dots(x, w, b, y, windows):
    """`_window_product` with each column of w in a row, and the channels in the lanes.

    Shapes: x (n, s, c), w (t, k, c), b (k,), y (n, p, k).
    """
    _, first_pixel, targets, sources, first_tap, taps, shifts, _ = windows
    columns, channels = w.shape[1:]
    x_flat, w_flat, y_flat = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    x_rows, y_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    sums = np.empty(SUMS, np.float32)
    for group in range(first_pixel.size - 1):
        begin, end = first_pixel[group], first_pixel[group + 1]
        image, pixel = 0, begin
        for _ in range(0, y.shape[0] * (end - begin), ROWS):
            image, pixel = _next_rows(
                x_rows, y_rows, image, pixel, begin, end, x.shape, y.shape, sources, targets
            )
            for column in range(0, columns, VECTORS):
                neighbours = min(VECTORS, columns - column)
                # A last column without a neighbour goes twice.
                w_step = channels if neighbours == VECTORS else 0
                tile = zero_tile(ROWS, VECTORS)
                for t in range(first_tap[group], first_tap[group + 1]):
                    x_at, w_at = shifts[t] * channels, (taps[t] * columns + column) * channels
                    for c in range(0, channels, LANES):
                        width = min(LANES, channels - c)
                        tile = multiply_add_dots(
                            tile, x_flat, x_rows, x_at + c, w_flat, w_at + c, w_step, width
                        )
                sum_lanes(tile, sums)
                for r in range(ROWS):
                    for v in range(neighbours):
                        total = b[column + v] + sums[r * VECTORS + v]
                        y_flat[y_rows[r] + column + v] = total


@kernel
def _linear(x, w, b, y, windows, by_columns):
    """y = b + windows of x times w, shapes as for `window_forward`."""
    if by_columns:
        _window_dots(x, w, b, y, windows)
    else:
        _window_product(x, w, b, y, windows)


@kernel
def window_forward(part, parts, x, w, b, y, windows, by_columns, scratch, kind, slope):
    """y = f(b + windows of x times w) (dense.E0, conv.E1, conv.E5), as many images at a time as fit
    in a part of `scratch`.

    The product's scattered rows go to memory that stays in the cache, and from there to y in one
    sweep. Shapes: x (n, s, c), w (t, c, k) or, `by_columns`, (t, k, c), b (k,), y (n, p, k),
    scratch (parts, images, p, k).
    """
    (begin, end), images = share(x.shape[0], part, parts), scratch.shape[1]
    for first in range(begin, end, images):
        some = slice(first, min(end, first + images))
        z = scratch[part, : some.stop - first]
        _linear(x[some], w, b, z, windows, by_columns)
        activate(z.reshape(-1), y[some].reshape(-1), kind, slope)


@kernel
def window_input_gradient(
    part, parts, dz, w, x, dz_below, windows, by_columns, scratch, kind, slope
):
    """dz_below = (windows of dz times w) f'(x) (dense.E4, conv.E2, conv.E6), as many images at a
    time as fit in a part of `scratch`.

    Shapes: dz (n, s, k), w (t, k, c) or, `by_columns`, (t, c, k), x and dz_below (n, p, c), scratch
    (parts, images, p, c).
    """
    (begin, end), images = share(x.shape[0], part, parts), scratch.shape[1]
    zeros = np.zeros(x.shape[2], np.float32)
    for first in range(begin, end, images):
        some = slice(first, min(end, first + images))
        dy, outputs = scratch[part, : some.stop - first], x[some].reshape(-1)
        _linear(dz[some], w, zeros, dy, windows, by_columns)
        below = dz_below[some].reshape(-1)
        multiply_derivative(outputs, outputs, dy.reshape(-1), below, kind, slope)


# Dense layers, by shares of tiles: each core then reads but its part of a w that is larger than x.


@inlined
def _matrix_share(n, columns, width, part, parts):
    """(first tile, the one after the last, tiles in a column of tiles) of a part of a matrix."""
    tiles = (n + ROWS - 1) // ROWS
    begin, end = share(tiles * ((columns + width - 1) // width), part, parts)
    return begin, end, tiles


@inlined
def _matrix_rows(row, n, x_rows, x_columns, y_rows, y_columns):
    """The places in x and y of ROWS rows from `row` on; the last row comes again, to be computed
    a second time alike."""
    for r in range(ROWS):
        place = min(row + r, n - 1)
        x_rows[r], y_rows[r] = place * x_columns, place * y_columns


@kernel
def _list_columns(x, row, steps):
    """Lists the columns in which ROWS rows of x, from `row` on, are not all zero: those that add
    nothing to a product need not be multiplied. Returns how many there are."""
    n, columns = x.shape
    x_flat, rows, count = x.reshape(-1), np.empty(ROWS, np.intp), 0
    for r in range(ROWS):
        rows[r] = min(row + r, n - 1) * columns
    for first in range(0, columns, LANES):
        width = min(LANES, columns - first)
        nonzero = nonzero_lanes(x_flat, rows, first, width)
        for lane in range(width):
            steps[count] = first + lane
            count += nonzero >> lane & 1
    steps[count : count + 1 + AHEAD] = END
    return count


@inlined
def _pack(source, step, first, last, at, width, target, to, vectors):
    """Copies `width` columns of a matrix, from `at` on, of the rows from `first` to `last`, to rows
    of `vectors` whole vectors, one behind the other: they stay in the cache, in an order that the
    hardware prefetcher follows."""
    whole = vectors * LANES
    for row in range(first, last):
        numbers = load_tile(source, None, at + row * step, width, 1, vectors)
        store_tile(numbers, target, None, to + row * whole, whole)


@inlined
def _dense_tiles(x, w, b, y, lists, panel, slope, first, last, vectors, part, parts):
    """`dense_forward` for the columns from `first` to `last`."""
    (n, inputs), columns = x.shape, w.shape[1]
    x_flat, w_flat, y_flat = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    panel_flat, step = panel.reshape(-1), vectors * LANES
    x_rows, y_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    b_rows = np.empty(ROWS, np.intp)
    for r in range(ROWS):
        b_rows[r] = 0
    begin, end, tiles = _matrix_share(n, last - first, step, part, parts)
    listed = lists[0, -1]
    packs, packed = n > FEW_ROWS and listed == 1, -1
    for number in range(begin, end):
        block, row = first + number // tiles * step, number % tiles * ROWS
        width = min(step, last - block)
        steps = lists[number % tiles % listed]
        _matrix_rows(row, n, x_rows, inputs, y_rows, columns)
        # A tile's size is its type, so that another way to make it needs a name of its own.
        if packs:
            if block != packed:
                _pack(w_flat, columns, 0, inputs, block, width, panel_flat, 0, vectors)
                packed = block
            tile = load_tile(b, b_rows, block, width, ROWS, vectors)
            tile = _accumulate(tile, inputs, x_flat, x_rows, 0, 1, panel_flat, 0, step, step)
            store_tile(leaky_relu_tile(tile, slope), y_flat, y_rows, block, width)
        elif n - row > HALF_ROWS:
            whole = load_tile(b, b_rows, block, width, ROWS, vectors)
            whole = _accumulate_fetched(
                whole, steps, x_flat, x_rows, w_flat, block, columns, width, vectors
            )
            store_tile(leaky_relu_tile(whole, slope), y_flat, y_rows, block, width)
        else:
            half = load_tile(b, b_rows, block, width, HALF_ROWS, vectors)
            half = _accumulate_fetched(
                half, steps, x_flat, x_rows, w_flat, block, columns, width, vectors
            )
            store_tile(leaky_relu_tile(half, slope), y_flat, y_rows, block, width)


@kernel
def list_first_columns(x, lists):
    """Lists for `dense_forward` the columns of the first ROWS rows of x that are not all zero; if
    they are most, all columns, and this is the only list.

    Shapes: x (n, i), lists (tiles, i + 2 + AHEAD) of int32; the first one's last number says how
    many lists there are.
    """
    inputs, first = x.shape[1], lists[0]
    first[-1] = lists.shape[0]
    if _list_columns(x, np.int64(0), first) > MOST_NONZERO * inputs:
        first[-1] = 1
        for column in range(inputs):
            first[column] = column
        first[inputs : inputs + 1 + AHEAD] = END


@kernel
def list_other_columns(part, parts, x, lists):
    """`list_first_columns` of the other tiles, if they have lists of their own."""
    for tile in range(*share(lists[0, -1] - 1, part, parts)):
        _list_columns(x, (tile + 1) * ROWS, lists[tile + 1])


@kernel
def dense_forward(part, parts, x, w, b, y, lists, panels, slope):
    """y = x w + b, negative values times `slope` (dense.E0), skipping the columns of x that are
    not in a tile's list.

    Where rows are many and no column is skipped, DENSE_WIDTH columns of w at a time are packed
    into a panel for all rows.

    Shapes: x (n, i), w (i, o), b (o,), y (n, o); lists of `list_first_columns`; scratch panels
    (parts, i, DENSE_WIDTH).
    """
    columns, panel = w.shape[1], panels[part]
    wide = _wide(columns, DENSE_VECTORS)
    _dense_tiles(x, w, b, y, lists, panel, slope, 0, wide, DENSE_VECTORS, part, parts)
    _dense_tiles(x, w, b, y, lists, panel, slope, wide, columns, 1, part, parts)


@inlined
def _dense_back_tiles(dz, w, x, dz_below, panel, slope, first, last, vectors, part, parts):
    """`dense_input_gradient` for the columns from `first` to `last`."""
    (n, outputs), columns = dz.shape, w.shape[0]
    dz_flat, w_flat, panel_flat = dz.reshape(-1), w.reshape(-1), panel.reshape(-1)
    x_flat, below_flat = x.reshape(-1), dz_below.reshape(-1)
    dz_rows, below_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    step = vectors * LANES
    begin, end, tiles = _matrix_share(n, last - first, step, part, parts)
    transposed = -1
    for number in range(begin, end):
        block = first + number // tiles * step
        width = min(step, last - block)
        if block != transposed:
            for c in range(0, width, LANES):
                for k in range(0, outputs, LANES):
                    at, to = (block + c) * outputs + k, k * step + c
                    _transpose_block(
                        w_flat, at, outputs, panel_flat, to, step, width - c, outputs - k
                    )
            transposed = block
        row = number % tiles * ROWS
        _matrix_rows(row, n, dz_rows, outputs, below_rows, columns)
        if n - row > HALF_ROWS:
            tile = zero_tile(ROWS, vectors)
            tile = _accumulate(tile, outputs, dz_flat, dz_rows, 0, 1, panel_flat, 0, step, width)
            tile = leaky_relu_gradient_tile(tile, x_flat, below_rows, block, width, slope)
            store_tile(tile, below_flat, below_rows, block, width)
        else:
            half = zero_tile(HALF_ROWS, vectors)
            half = _accumulate(half, outputs, dz_flat, dz_rows, 0, 1, panel_flat, 0, step, width)
            half = leaky_relu_gradient_tile(half, x_flat, below_rows, block, width, slope)
            store_tile(half, below_flat, below_rows, block, width)


@kernel
def dense_input_gradient(part, parts, dz, w, x, dz_below, panels, slope):
    """dz_below = dz w^T, times `slope` where x is not positive (dense.E4).

    DENSE_WIDTH rows of w at a time are transposed into a panel, which stays in the cache while all
    rows of dz go by.

    Shapes: dz (n, o), w (i, o), x and dz_below (n, i); scratch panels (parts, o, DENSE_WIDTH).
    """
    columns, panel = w.shape[0], panels[part]
    wide = _wide(columns, DENSE_VECTORS)
    _dense_back_tiles(dz, w, x, dz_below, panel, slope, 0, wide, DENSE_VECTORS, part, parts)
    _dense_back_tiles(dz, w, x, dz_below, panel, slope, wide, columns, 1, part, parts)


# Activations that are more than a slope: on each tile by the core that has computed it


@inlined
def _to_square(matrix, rows, block, width, vectors, square, square_rows):
    """Copies a tile to memory in the L1 cache, where its numbers are neighbours. Returns the
    part of the square that it fills."""
    for r in range(ROWS):
        square_rows[r] = r * vectors * LANES
    tile = load_tile(matrix, rows, block, width, ROWS, vectors)
    store_tile(tile, square, square_rows, 0, vectors * LANES)
    return square[: ROWS * vectors * LANES]


@inlined
def _from_square(square, square_rows, matrix, rows, block, width, vectors):
    """Copies the tile back."""
    tile = load_tile(square, square_rows, 0, width, ROWS, vectors)
    store_tile(tile, matrix, rows, block, width)


@inlined
def _activate_region(y, first, last, vectors, part, parts, kind, slope):
    """`activate_tiles` for the columns from `first` to `last`."""
    (n, columns), y_flat, step = y.shape, y.reshape(-1), vectors * LANES
    rows, square_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    squares = np.empty((2, ROWS * DENSE_WIDTH), np.float32)
    begin, end, tiles = _matrix_share(n, last - first, step, part, parts)
    for number in range(begin, end):
        block = first + number // tiles * step
        width = min(step, last - block)
        _matrix_rows(number % tiles * ROWS, n, rows, columns, rows, columns)
        z = _to_square(y_flat, rows, block, width, vectors, squares[0], square_rows)
        activate(z, squares[1, : z.size], kind, slope)
        _from_square(squares[1], square_rows, y_flat, rows, block, width, vectors)


@kernel
def activate_tiles(part, parts, y, kind, slope):
    """y = f(y), for the y (n, o) of `dense_forward`."""
    columns = y.shape[1]
    wide = _wide(columns, DENSE_VECTORS)
    _activate_region(y, 0, wide, DENSE_VECTORS, part, parts, kind, slope)
    _activate_region(y, wide, columns, 1, part, parts, kind, slope)


@inlined
def _derive_region(x, dz_below, first, last, vectors, part, parts, kind, slope):
    """`derive_tiles` for the columns from `first` to `last`."""
    (n, columns), x_flat, below_flat = x.shape, x.reshape(-1), dz_below.reshape(-1)
    rows, square_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    squares, step = np.empty((3, ROWS * DENSE_WIDTH), np.float32), vectors * LANES
    begin, end, tiles = _matrix_share(n, last - first, step, part, parts)
    for number in range(begin, end):
        block = first + number // tiles * step
        width = min(step, last - block)
        _matrix_rows(number % tiles * ROWS, n, rows, columns, rows, columns)
        outputs = _to_square(x_flat, rows, block, width, vectors, squares[0], square_rows)
        gradients = _to_square(below_flat, rows, block, width, vectors, squares[1], square_rows)
        multiply_derivative(outputs, outputs, gradients, squares[2, : outputs.size], kind, slope)
        _from_square(squares[2], square_rows, below_flat, rows, block, width, vectors)


@kernel
def derive_tiles(part, parts, x, dz_below, kind, slope):
    """dz_below = dz_below f'(x), for the x and dz_below (n, i) of `dense_input_gradient`."""
    columns = x.shape[1]
    wide = _wide(columns, DENSE_VECTORS)
    _derive_region(x, dz_below, 0, wide, DENSE_VECTORS, part, parts, kind, slope)
    _derive_region(x, dz_below, wide, columns, 1, part, parts, kind, slope)


@inlined
def _gradient_tiles(left, right, starts, count, target, first, last, vectors):
    """Some rows of dw, in the columns from `first` to `last`: `weight` times the products over runs
    of `count` pixels from each of the starts on, added to what is there if dw `grows`."""
    x, x_rows, x_starts, x_step = left
    dz, dz_starts, dz_step = right
    dw, dw_rows, rows, grows, weight = target
    for block in range(first, last, vectors * LANES):
        width = min(vectors * LANES, last - block)
        tile = zero_tile(ROWS, vectors)
        for start in range(starts):
            x_at, dz_at = x_starts[start], dz_starts[start] + block
            tile = _accumulate(tile, count, x, x_rows, x_at, x_step, dz, dz_at, dz_step, width)
        add_tile(tile, dw, dw_rows, rows, block, width, width if grows else 0, weight)


@inlined
def _run_starts(x, dz, runs, group, steps, first_pixel, targets, sources, images, starts):
    """The runs of pixels of x and dz, of some `images`, that a group of taps multiplies: how many
    there are, how long they are, and their steps in x and in dz. Where each begins in x and in dz
    goes to the two arrays `starts`.

    The innermost loop, over a run, goes over what there is more of, images or pixels in a row.
    """
    first, last = images
    x_starts, dz_starts = starts
    _, inputs, channels = x.shape
    _, outputs, columns = dz.shape
    begin, end, found = first_pixel[group], first_pixel[group + 1], 0
    if runs[group] < last - first:
        for pixel in range(begin, end):
            x_starts[found] = (first * inputs + sources[pixel]) * channels
            dz_starts[found] = (first * outputs + targets[pixel]) * columns
            found += 1
        return found, last - first, inputs * channels, outputs * columns
    for image in range(first, last):
        for pixel in range(begin, end, runs[group]):
            x_starts[found] = (image * inputs + sources[pixel]) * channels
            dz_starts[found] = (image * outputs + targets[pixel]) * columns
            found += 1
    return found, runs[group], steps[1] * channels, steps[0] * columns


@kernel
def window_weight_gradient(part, parts, x, dz, dw, windows, tiles, images, fraction, accumulate):
    """dw[t] = sum of x[n, source of p + shift of t]^T dz[n, target of p] over the p that see t
    (dense.E2, conv.E3, conv.E7), times `fraction`, on top of what dw holds if `accumulate`
    (dense.E5).

    Each number of dw has one owner, so that its bits do not depend on how many cores share the
    work. `images` at a time go through the cache, which also keeps the sums short.

    Shapes: x (n, s, c), dz (n, p, k), dw (t, c, k).
    """
    steps, first_pixel, targets, sources, first_tap, _, _, runs = windows
    first_tile, counts, weights, places, owned = tiles
    n, _, channels = x.shape
    _, outputs, columns = dz.shape
    taps, wide = dw.shape[0], _wide(columns, VECTORS)
    x_flat, dz_flat, dw_flat = x.reshape(-1), dz.reshape(-1), dw.reshape(-1)
    x_rows, dw_rows = np.empty(ROWS, np.intp), np.empty(ROWS, np.intp)
    starts = np.empty(images * outputs, np.intp), np.empty(images * outputs, np.intp)
    one_group = runs.size == 1 and first_tap[1] == taps
    if not one_group and not accumulate:
        for row in range(part * ROWS, taps * channels, parts * ROWS):
            dw_flat[row * columns : min(row + ROWS, taps * channels) * columns] = ZERO
    for first in range(0, n, images):
        last = min(n, first + images)
        for group in range(runs.size):
            found, count, x_step, dz_step = _run_starts(
                x, dz, runs, group, steps, first_pixel, targets, sources, (first, last), starts
            )
            for i in range(first_tile[group], first_tile[group + 1]):
                if owned[i] % parts != part:
                    continue
                for r in range(ROWS):
                    x_rows[r], dw_rows[r] = places[i, r], weights[i, r] * columns
                # A group that sees all taps starts from nothing, with its first images.
                grows = accumulate or not one_group or first > 0
                left = (x_flat, x_rows, starts[0], x_step)
                right = (dz_flat, starts[1], dz_step)
                target = (dw_flat, dw_rows, counts[i], grows, fraction)
                _gradient_tiles(left, right, found, count, target, 0, wide, VECTORS)
                _gradient_tiles(left, right, found, count, target, wide, columns, 1)


@kernel
def partial_sums(part, parts, dz, sums):
    """Sums of dz (n, m) over the row groups of `sums` (groups, m), whatever the thread count."""
    n, groups = dz.shape[0], sums.shape[0]
    for group in range(*share(groups, part, parts)):
        first, end = share(n, group, groups)
        sum_rows(dz[first:end], 0, sums[group])


@kernel
def bias_gradient(sums, db, fraction, accumulate):
    """db = sum of dz over all pixels (dense.E3, conv.E4), from `partial_sums`, times `fraction`, on
    top of what db holds if `accumulate` (dense.E5).

    Shapes: sums (groups, w c), db (c,).
    """
    total = np.empty_like(db)
    sum_rows(sums.reshape(-1, db.size), 0, total)
    for o in range(db.size):
        db[o] = fraction * total[o] + (db[o] if accumulate else ZERO)


@kernel
def pack_blocks(part, parts, dz, blocks):
    """`dense_weight_update`'s blocks of columns of dz, one behind the other."""
    (n, columns), dz_flat, wide = dz.shape, dz.reshape(-1), _wide(dz.shape[1], DENSE_VECTORS)
    first, last = share(n, part, parts)
    for block in range(0, wide, DENSE_WIDTH):
        width = min(DENSE_WIDTH, wide - block)
        _pack(dz_flat, columns, first, last, block, width, blocks, block * n, DENSE_VECTORS)
    if wide < columns:
        _pack(dz_flat, columns, first, last, wide, columns - wide, blocks, wide * n, 1)


@inlined
def _pack_rows(x, at, step, width, n, band, steps):
    """Copies `width` columns of a matrix, from `at` on, to `band`, ROWS to a row, and lists those
    rows that are not all zero there. Returns how many they are."""
    count = 0
    for row in range(n):
        nonzero = copy_row(x, at + row * step, width, band, row * ROWS)
        steps[count] = row
        count += nonzero
    return count


@inlined
def _dense_gradient_tiles(left, right, g, g_rows, first, last, vectors):
    """The columns from `first` to `last` of ROWS rows of x^T dz into g."""
    x, steps, count = left
    dz, n, columns, packs = right
    for block in range(first, last, vectors * LANES):
        whole = vectors * LANES
        width = min(whole, last - block)
        # Two ways and two names, each step a constant: else the tile does not fit into registers.
        if packs:
            at, tile = block * n, zero_tile(ROWS, vectors)
            tile = _accumulate_listed(tile, steps, count, x, None, ROWS, dz, at, whole, whole)
            store_tile(tile, g, g_rows, block, width)
        else:
            seen, direct = width if vectors == 1 else whole, zero_tile(ROWS, vectors)
            direct = _accumulate_listed(
                direct, steps, count, x, None, ROWS, dz, block, columns, seen
            )
            store_tile(direct, g, g_rows, block, width)


@inlined
def _add_up_or_update(gradient, sums, some, parameters, row, adam_numbers, stage):
    """Adds what earlier images left in `sums`, if there were any, to the gradient of `some`
    parameters; after the last images Adam takes it, else it goes to `sums`."""
    (grows, ends), (p, m, v), sums = stage, parameters, sums[some]
    # Loops, since Numba compiles an assignment of arrays for seconds.
    if grows:
        for i in range(gradient.size):
            gradient[i] += sums[i]
    if ends:
        adam(p[some], gradient, m[some], v[some], row, *adam_numbers)
    else:
        for i in range(gradient.size):
            sums[i] = gradient[i]


@kernel
def dense_weight_update(
    part,
    parts,
    x,
    dz,
    packed,
    blocks,
    bands,
    lists,
    sums,
    weight,
    bias,
    schedule,
    state,
    adam_numbers,
    stage,
):
    """Adam on a dense layer with the gradients dense.E2 and E3, of which no more is in memory than
    some rows in the L1 cache; only where there are more images than are taken at a time, they
    grow in `sums`: `stage` says whether these are not the first images, and whether they are the
    last. Images whose numbers are zero in all of these rows are skipped.

    Shapes: x (n, i), dz (n, o), `packed` to blocks or not; sums: dw (i o,) and db (o,); weight and
    bias each values, first and second moments, (i o,) and (o,). Scratch: for each part, a band of x
    in bands (parts, (n + 1) ROWS) and the images that count in lists (parts, n), int32.
    """
    if state[FAILED]:
        return
    row, band, steps = schedule[state[INDEX]], bands[part], lists[part]
    (n, channels), columns, (dw, db) = x.shape, dz.shape[1], sums
    x_flat = x.reshape(-1)
    right = (blocks if packed else dz.reshape(-1)), n, columns, packed
    g, g_rows = np.empty(ROWS * columns, np.float32), np.empty(ROWS, np.intp)
    for r in range(ROWS):
        g_rows[r] = r * columns
    # A packed block may end in idle lanes; one that is not is whole, so that it needs no mask.
    wide = _wide(columns, DENSE_VECTORS) if packed else columns - columns % DENSE_WIDTH
    # Neighbouring rows, which the core also had in the layer's input gradient: a line of memory
    # that goes from core to core costs more than the numbers in it.
    for number in range(*share((channels + ROWS - 1) // ROWS, part, parts)):
        first = number * ROWS
        height = min(ROWS, channels - first)
        # Where the height is a constant, rows are copied without a mask.
        if height == ROWS:
            count = _pack_rows(x_flat, first, channels, ROWS, n, band, steps)
        else:
            count = _pack_rows(x_flat, first, channels, height, n, band, steps)
        left = band, steps, count
        some = slice(first * columns, (first + height) * columns)
        _dense_gradient_tiles(left, right, g, g_rows, 0, wide, DENSE_VECTORS)
        _dense_gradient_tiles(left, right, g, g_rows, wide, columns, 1)
        _add_up_or_update(g[: height * columns], dw, some, weight, row, adam_numbers, stage)
    first, end = share(columns, part, parts)
    some = slice(first, end)
    sum_rows(dz, first, g[some])
    _add_up_or_update(g[some], db, some, bias, row, adam_numbers, stage)
