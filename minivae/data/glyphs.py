"""Digits without a download: rasterized from the fonts that ship with matplotlib, then warped,
thickened and jittered, each image differently.

Each font's digit is drawn once, four times as large as needed, and blurred a little. An image
samples it where a random affine map and a smooth random displacement send its pixels, and a random
threshold on the blurred edge makes the stroke thick or thin.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .dataset import Dataset, Splits

TRAIN_IMAGES, TEST_IMAGES = 20_000, 2_000
SIZE = 28
MASTER = 4 * SIZE
DIGIT_HEIGHT = 4 * 20
BLUR = 4.0
CONTROL_POINTS = 4
CHUNK = 1000
GLYPH_STREAM = 7

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)


def glyphs(seed: int = 0, train: int = TRAIN_IMAGES, test: int = TEST_IMAGES) -> Splits:
    """`train` and `test` labelled 28 x 28 digits, white on black, drawn from `seed`."""
    masters = _masters()
    rng = np.random.default_rng([seed, GLYPH_STREAM])
    return Splits("glyphs", _draw(masters, train, rng), _draw(masters, test, rng))


def _masters() -> NDArray[np.floating]:
    """The blurred digits (fonts, 10, MASTER, MASTER) in [0, 1]."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 2 * DIGIT_HEIGHT) for name in FONTS]
    return np.stack([np.stack([_master(font, digit) for digit in "0123456789"]) for font in fonts])


def _master(font: object, digit: str) -> NDArray[np.floating]:
    """One digit, scaled to DIGIT_HEIGHT and centred by its bounding box."""
    from PIL import Image, ImageDraw, ImageFilter

    canvas = Image.new("L", (4 * DIGIT_HEIGHT, 4 * DIGIT_HEIGHT))
    ImageDraw.Draw(canvas).text((DIGIT_HEIGHT, DIGIT_HEIGHT), digit, fill=255, font=font)  # type: ignore[arg-type]
    box = canvas.getbbox()
    assert box is not None
    width = max(1, round((box[2] - box[0]) * DIGIT_HEIGHT / (box[3] - box[1])))
    drawn = canvas.crop(box).resize((width, DIGIT_HEIGHT), Image.Resampling.LANCZOS)
    master = Image.new("L", (MASTER, MASTER))
    master.paste(drawn, ((MASTER - width) // 2, (MASTER - DIGIT_HEIGHT) // 2))
    blurred = master.filter(ImageFilter.GaussianBlur(BLUR))
    return np.asarray(blurred, np.float32) / 255


def _draw(masters: NDArray[np.floating], count: int, rng: np.random.Generator) -> Dataset:
    labels = rng.integers(0, 10, count)
    fonts = rng.integers(0, len(masters), count)
    images = np.concatenate(list(_warped(masters, fonts, labels, rng)))
    return Dataset(images[..., None], labels)


def _warped(
    masters: NDArray[np.floating],
    fonts: NDArray[np.int64],
    labels: NDArray[np.int64],
    rng: np.random.Generator,
) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(labels), CHUNK):
        chunk = slice(first, first + CHUNK)
        which = 10 * fonts[chunk] + labels[chunk]
        values = _bilinear(masters, which, *_source_points(len(which), rng))
        threshold = rng.uniform(0.25, 0.5, (len(which), 1, 1))
        softness = rng.uniform(0.25, 0.45, (len(which), 1, 1))
        yield np.rint(255 * np.clip((values - threshold) / softness + 0.5, 0, 1)).astype(np.uint8)


def _source_points(
    count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where in the master each pixel looks, as (count, SIZE, SIZE) rows and columns."""
    angle = rng.normal(0, 0.12, count)
    shear = rng.normal(0, 0.15, count)
    scale_rows, scale_columns = rng.uniform(0.92, 1.2, count), rng.uniform(0.85, 1.3, count)
    shift = rng.normal(0, 0.7, (2, count, 1, 1))
    offsets = np.arange(SIZE) - (SIZE - 1) / 2
    rows, columns = offsets[None, :, None] + shift[0], offsets[None, None, :] + shift[1]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    turned_rows = cos * rows - sin * columns
    turned_columns = sin * rows + cos * columns + shear[:, None, None] * turned_rows
    bend = _smooth_displacement(count, rng)
    centre, unit = (MASTER - 1) / 2, MASTER / SIZE
    return (
        centre + unit * (turned_rows * scale_rows[:, None, None] + bend[0]),
        centre + unit * (turned_columns * scale_columns[:, None, None] + bend[1]),
    )


def _smooth_displacement(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Random pixels of displacement (2, count, SIZE, SIZE), interpolated between control points."""
    points = rng.normal(0, 0.9, (2, count, CONTROL_POINTS, CONTROL_POINTS))
    position = np.linspace(0, CONTROL_POINTS - 1, SIZE)[:, None] - np.arange(CONTROL_POINTS)
    # A raised cosine between neighbours: smooth, and the weights add to one.
    weights = np.where(np.abs(position) < 1, 0.5 * (1 + np.cos(np.pi * position)), 0)
    return weights @ points @ weights.T


def _bilinear(
    masters: NDArray[np.floating],
    which: NDArray[np.int64],
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
) -> NDArray[np.floating]:
    """The masters number `which` (n,) at fractional positions; the border is black."""
    rows, columns = (np.clip(axis, 0, MASTER - 1.001) for axis in (rows, columns))
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, right = (rows - top).astype(np.float32), (columns - left).astype(np.float32)
    corner = (which[:, None, None] * MASTER + top) * MASTER + left
    pixels = masters.reshape(-1)
    above = pixels.take(corner) * (1 - right) + pixels.take(corner + 1) * right
    corner += MASTER
    below = pixels.take(corner) * (1 - right) + pixels.take(corner + 1) * right
    return above * (1 - down) + below * down
