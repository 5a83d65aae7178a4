"""Pictures of a run, from NumPy arrays and metrics records. Loads matplotlib, without pyplot and
its global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .data.dataset import called, unit_pixels
from .errors import InputError
from .files import replacing

DPI = 120
TITLE_INCHES, TICK_INCHES = 0.1, 0.1
"""Width of a character, with a margin."""

MOST_CLASSES = 20
"""How many classes a picture tells apart."""

SPLIT_COLOURS = {"train": "tab:blue", "validation": "tab:green", "test": "tab:orange"}
LOSS_TERMS = {"loss": "loss", "reconstruction": "reconstruction", "kl": "KL [nats]"}


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches, or as wide as its title."""
    width = max(width, TITLE_INCHES * len(title))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure in the format of the path's suffix, atomically. Raises InputError if
    matplotlib has no such format or the file cannot be written."""
    kind, known = path.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"{path}: expected a picture's suffix: {', '.join(known)}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind)


def _tile(images: NDArray, side: float = 0.8) -> tuple[float, float]:
    """Width and height in inches of images (..., h, w, c) in a mosaic: the area of a square of
    `side`, but room for a tick's label at least."""
    height, width = images.shape[-3:-1]
    stretch = float(np.sqrt(width / height))
    return max(side * stretch, 0.3), max(side / stretch, 0.2)


def _mosaic(images: NDArray, gap: int) -> NDArray:
    """Rows of images (rows, columns, h, w, c) as one picture, with white gaps between them."""
    images = np.clip(images, 0, 1)
    rows, columns, height, width, channels = images.shape
    tile_height, tile_width = height + gap, width + gap
    canvas = np.ones((rows * tile_height + gap, columns * tile_width + gap, channels))
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * tile_height, gap + column * tile_width
            canvas[top : top + height, left : left + width] = images[row, column]
    return canvas if channels in (3, 4) else canvas.mean(axis=-1)


def _show(axes: Axes, images: NDArray, gap: int = 2) -> None:
    """A mosaic with a tick in the middle of each row and column of images."""
    rows, columns, height, width = images.shape[:4]
    axes.imshow(_mosaic(images, gap), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(gap + width / 2 + (width + gap) * np.arange(columns))
    axes.set_yticks(gap + height / 2 + (height + gap) * np.arange(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label(axes: Axes, x: str, y: str, columns: Sequence[Any], rows: Sequence[Any]) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xticklabels([str(column) for column in columns], parse_math=False)
    axes.set_yticklabels([str(row) for row in rows], parse_math=False)


def loss_curves(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Loss, reconstruction and KL by epoch; by step where records were written every few steps.

    `metrics` are the records of metrics.jsonl.
    """
    epochs = [record for record in metrics if "epoch" in record]
    steps = [record for record in metrics if "epoch" not in record]
    unit = "step" if steps else "epoch"
    # Without a KL the reconstruction is the loss.
    shown = LOSS_TERMS if metrics[-1]["train"].get("kl") else ("loss",)
    terms = {key: LOSS_TERMS[key] for key in shown}
    figure = new_figure(4.2 * len(terms), 3.6, "Training and test loss")
    panels = np.atleast_1d(figure.subplots(1, len(terms)))
    for axes, (key, label) in zip(panels, terms.items(), strict=True):
        for split, colour in SPLIT_COLOURS.items():
            records = steps if steps and split == "train" else epochs
            points = [(record[unit], record[split][key]) for record in records if split in record]
            if not points:
                continue
            marker = "o" if len(points) <= 40 else None
            axes.plot(
                *np.array(points).reshape(-1, 2).T,
                color=colour,
                marker=marker,
                markersize=3,
                label=split,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(unit)
        axes.set_ylabel(f"{label}, mean per image")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(path, figure)


def reconstructions(
    path: Path,
    originals: NDArray,
    decoded: NDArray,
    *,
    title: str,
) -> None:
    """Originals (n, h, w, c) above their reconstructions, at most ten pairs a row of pairs; the
    last may be short."""
    columns = min(10, len(originals))
    parts = [_rows(images, columns) for images in (originals, decoded)]
    pairs = len(parts[0])
    stacked = np.stack(parts, axis=1).reshape(2 * pairs, columns, *originals.shape[1:])
    width, height = _tile(originals)
    figure = new_figure(width * columns + 1.4, 2.05 * height * pairs + 1.1, title)
    axes = figure.subplots()
    _show(axes, stacked)
    firsts = range(0, len(originals), columns)
    numbers = [f"{first + 1}-{min(first + columns, len(originals))}" for first in firsts]
    names = [name for number in numbers for name in (number, "decoded")]
    _label(axes, "column", "test images", range(1, columns + 1), names)
    save_figure(path, figure)


def _rows(images: NDArray, columns: int) -> NDArray:
    """Images (n, h, w, c) as (rows, columns, h, w, c), filled up with white ones."""
    rows = -(-len(images) // columns)
    padded = np.ones((rows * columns, *images.shape[1:]))
    padded[: len(images)] = unit_pixels(images)
    return padded.reshape(rows, columns, *images.shape[1:])


def sample_grid(
    path: Path,
    images: NDArray,
    *,
    title: str = "Samples",
    classes: int = 0,
    names: Sequence[str] = (),
) -> None:
    """Images (n, h, w, c) in a grid as square as possible; if they are of `classes` classes in
    turn, with a column for each, called by its name in `names`. The last row may be short."""
    by_class = 0 < classes <= min(MOST_CLASSES, len(images))
    columns = classes if by_class else int(np.ceil(np.sqrt(len(images))))
    grid = _rows(images, columns)
    width, height = _tile(images)
    figure = new_figure(width * columns + 0.8, height * len(grid) + 1.1, title)
    axes = figure.subplots()
    _show(axes, grid)
    first = [row * columns + 1 for row in range(len(grid))]
    if by_class:
        shown = called(range(columns), names)
        _label(axes, "class", "row", shown, range(1, len(grid) + 1))
        if max(map(len, shown)) * TICK_INCHES > width:
            axes.tick_params("x", rotation=90)
    else:
        _label(axes, "column", "first image of row", range(1, columns + 1), first)
    save_figure(path, figure)


def class_reconstructions(
    path: Path,
    originals: NDArray,
    decoded: NDArray,
    labels: NDArray,
    *,
    names: Sequence[str] = (),
) -> None:
    """For each of the first MOST_CLASSES classes two originals, each beside its reconstruction."""
    classes = np.unique(labels)
    most = f", of the first {MOST_CLASSES}," if len(classes) > MOST_CLASSES else ""
    classes = classes[:MOST_CLASSES]
    rows = []
    for c in classes:
        index = np.resize(np.flatnonzero(labels == c)[:2], 2)
        pairs = (unit_pixels(images[index]) for images in (originals, decoded))
        rows.append(np.stack(list(pairs), axis=1).reshape(4, *originals.shape[1:]))
    width, height = _tile(originals)
    figure = new_figure(
        4 * width + 1.8,
        height * len(classes) + 1.2,
        f"Two images of each class{most} and their reconstructions",
    )
    axes = figure.subplots()
    _show(axes, np.stack(rows))
    _label(axes, "two images", "class", ["original", "decoded"] * 2, called(classes, names))
    save_figure(path, figure)


def principal_components(x: NDArray, count: int) -> tuple[NDArray, NDArray]:
    """The projection (n, count) of x (n, d) on its first principal components, and the share of the
    variance that each explains (count,). Signs are fixed: the largest loading is positive."""
    centred = x - x.mean(axis=0)
    # Rows of zeros change no direction; with them there are `count` even of fewer points.
    filled = np.pad(centred, ((0, count), (0, 0)))
    _, sizes, directions = np.linalg.svd(filled, full_matrices=False)
    directions = directions[:count]
    largest = np.argmax(np.abs(directions), axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    shares = sizes**2 / max(float(np.sum(sizes**2)), np.finfo(np.float64).tiny)
    return centred @ directions.T, shares[:count]


def latent_scatter(
    path: Path,
    codes: NDArray,
    labels: NDArray | None,
    *,
    names: Sequence[str] = (),
    quantity: str = "posterior mean",
) -> None:
    """Codes (n, d) in the plane, coloured by class: both dimensions if d = 2, the first two
    principal components if there are more, a histogram if d = 1."""
    dimensions = codes.shape[1]
    figure = new_figure(6.6, 5.4, f"Test images in the latent space: {quantity}")
    axes = figure.subplots()
    classes = [] if labels is None else list(np.unique(labels))
    groups = [labels == c for c in classes] or [slice(None)]
    shown = called(classes, names) or [""]
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    colours = [palette(index % palette.N) for index in range(len(groups))]
    if dimensions == 1:
        axes.hist(
            [
                codes[group, 0].astype(np.float64) for group in groups
            ],  # float32 has no room for bins
            bins=40,
            stacked=True,
            color=colours,
        )
        quantities = [f"{quantity} of z1", "test images"]
    else:
        points, quantities = codes, [f"{quantity} of z1", f"{quantity} of z2"]
        if dimensions > 2:
            points, shares = principal_components(codes, 2)
            quantities = [
                f"principal component {i + 1} of the {quantity}s ({shares[i]:.0%} of variance)"
                for i in range(2)
            ]
        shades = np.empty((len(points), 4))
        for group, colour in zip(groups, colours, strict=True):
            shades[group] = colour
        # Mixed, so that no class hides those drawn before it.
        order = np.random.default_rng(0).permutation(len(points))
        x, y = points[order, 0], points[order, 1]
        axes.scatter(x, y, s=8, alpha=0.6, c=shades[order], linewidths=0)
    axes.set_xlabel(quantities[0])
    axes.set_ylabel(quantities[1])
    if 0 < len(classes) <= MOST_CLASSES:
        # Handles of its own: a label that begins with _ would be left out.
        dots = [axes.scatter([], [], s=8, color=colour) for colour in colours]
        options: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "markerscale": 3}
        for text in axes.legend(dots, shown, title="class", **options).get_texts():
            text.set_parse_math(False)
    axes.grid(alpha=0.3)
    save_figure(path, figure)


def _quantiles(size: int) -> NDArray[np.float64]:
    """`size` values that cut the standard normal into equal shares, the outermost at 2.5%."""
    normal = NormalDist()
    return np.array([normal.inv_cdf(p) for p in np.linspace(0.025, 0.975, size)])


def manifold_grid(size: int) -> NDArray[np.float64]:
    """Latents (size * size, 2) by rows, z2 falling from the top, z1 rising to the right."""
    values = _quantiles(size)
    z2, z1 = np.meshgrid(values[::-1], values, indexing="ij")
    return np.stack([z1, z2], axis=-1).reshape(-1, 2)


def manifold(path: Path, images: NDArray, size: int) -> None:
    """The images (size * size, h, w, c) decoded from `manifold_grid(size)`."""
    width, height = _tile(images, 0.38)
    figure = new_figure(width * size + 1.4, height * size + 1.4, "Decoded two-dimensional latent")
    axes = figure.subplots()
    _show(axes, unit_pixels(images).reshape(size, size, *images.shape[1:]), gap=0)
    values = _quantiles(size)
    every = max(1, size // 10)
    ticks = [f"{value:.1f}" if i % every == 0 else "" for i, value in enumerate(values)]
    _label(axes, "z1", "z2", ticks, ticks[::-1])
    save_figure(path, figure)


def traversals(
    path: Path,
    images: NDArray,
    values: Sequence[float] | NDArray,
    dimensions: Sequence[int] | NDArray | None = None,
) -> None:
    """Images (rows, steps, h, w, c): row i decoded with `dimensions[i]` set to each of `values`."""
    rows, columns = images.shape[:2]
    dimensions = range(rows) if dimensions is None else dimensions
    width, height = _tile(images)
    figure = new_figure(
        width * columns + 1.3,
        height * rows + 1.2,
        "Latent traversals from one image, most informative dimension first",
    )
    axes = figure.subplots()
    _show(axes, unit_pixels(images))
    ticks = [f"{value:.3g}" for value in values]
    _label(axes, "value of the dimension", "dimension", ticks, [f"z{d + 1}" for d in dimensions])
    save_figure(path, figure)


def error_histogram(
    path: Path,
    errors: NDArray,
) -> None:
    """A histogram of errors (n,), with the median and the 95th percentile."""
    figure = new_figure(6, 3.8, "Reconstruction errors of the test images")
    axes = figure.subplots()
    bins = min(60, max(5, len(errors) // 10))
    axes.hist(errors.astype(np.float64), bins=bins, color="tab:blue", alpha=0.8)
    for share, style in ((50, "-"), (95, "--")):
        value = float(np.percentile(errors, share))
        axes.axvline(
            value, color="black", linestyle=style, label=f"{share}th percentile: {value:.3g}"
        )
    axes.set_xlabel("squared error per image")
    axes.set_ylabel("test images")
    axes.legend()
    save_figure(path, figure)


def kl_per_dimension(path: Path, kl: NDArray) -> None:
    """The mean KL (d,) of each dimension, largest first."""
    order = np.argsort(-kl)
    figure = new_figure(
        min(14, max(4.5, 0.28 * len(kl) + 1.5)), 3.6, "Information in each latent dimension"
    )
    axes = figure.subplots()
    axes.bar(range(len(kl)), kl[order], color="tab:blue")
    every = max(1, len(kl) // 25)
    axes.set_xticks(range(0, len(kl), every), [f"z{d + 1}" for d in order[::every]], fontsize=7)
    axes.set_xlabel("latent dimension, sorted")
    axes.set_ylabel("KL [nats], mean per image")
    save_figure(path, figure)


def importance_bounds(path: Path, bounds: Mapping[int, tuple[float, float]]) -> None:
    """The bound L_k by k, each a mean and its standard error."""
    ks = sorted(bounds)
    figure = new_figure(4.8, 3.6, "Bound against draws")
    axes = figure.subplots()
    means, errors = zip(*(bounds[k] for k in ks), strict=True)
    axes.errorbar(ks, means, errors, marker="o", capsize=3, color="tab:blue")
    axes.set_xscale("log")
    axes.set_xlabel("draws k of each image")
    axes.set_ylabel("importance-weighted bound [nats]")
    save_figure(path, figure)


def compare_grids(path: Path, columns: Mapping[str, NDArray], *, title: str) -> None:
    """Grids of images (rows, columns, h, w, c) side by side, each under its name."""
    grids = list(columns.values())
    width, height = _tile(grids[0], 0.7)
    columns_and_gaps = sum(width * grid.shape[1] + 0.7 for grid in grids)
    most_rows = max(grid.shape[0] for grid in grids)
    figure = new_figure(max(columns_and_gaps, 5), height * most_rows + 1.4, title)
    ratios = [grid.shape[1] for grid in grids]
    panels = np.atleast_1d(figure.subplots(1, len(grids), width_ratios=ratios))
    for axes, (name, images) in zip(panels, columns.items(), strict=True):
        _show(axes, unit_pixels(images))
        axes.set_title(name, fontsize=9)
        rows, steps = images.shape[:2]
        _label(axes, "column", "row", range(1, steps + 1), range(1, rows + 1))
    save_figure(path, figure)
