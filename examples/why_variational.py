"""Why variational: what a plain autoencoder decodes between and beyond its codes, beside a VAE.

    python examples/why_variational.py --data mnist

Two models with the same layers see the same images for the same time. The autoencoder is free to
put its codes anywhere; the VAE pays for leaving the standard normal. Two tests:

    draws       codes drawn from a normal with the mean and deviation of each dimension of the
                autoencoder's codes; for the VAE from its prior
    midpoints   halfway between the mean codes of two classes

Look at why_variational.png. The autoencoder's draws fall into the gaps between its clusters, where
it was never asked to decode anything, and come out as blurred overlays of strokes. The printed
distance is from each decoded image to the nearest test image (squared error, lower is better).
"""

import numpy as np
from common import chosen, options, run
from numpy.typing import NDArray

import minivae
from minivae import (
    VAE,
    Autoencoder,
    Dense,
    Flatten,
    Objective,
    ReLU,
    Reshape,
    Sigmoid,
    Training,
    plots,
)
from minivae.data import Dataset, load

LATENT = 32
GRID = 5
PAIRS = ((0, 1), (3, 8), (4, 9), (2, 7), (5, 6))


def build(variational: bool, image_shape: tuple[int, ...], seed: int) -> Autoencoder:
    """The same layers, but for the head: a code, or the mean and log-variance of one."""
    pixels = int(np.prod(image_shape))
    encoder = [Flatten(), Dense(512), ReLU(), Dense(256), ReLU()]
    decoder = [
        *(Dense(256), ReLU(), Dense(512), ReLU()),
        *(Dense(pixels), Sigmoid(), Reshape(image_shape)),
    ]
    kind, head = (VAE, 2 * LATENT) if variational else (Autoencoder, LATENT)
    objective = Objective("squared-error")
    return kind([*encoder, Dense(head)], decoder, objective, image_shape, seed=seed)


def codes_of(model: Autoencoder, images: NDArray) -> NDArray:
    """The codes of an autoencoder, the posterior means of a VAE, (n, LATENT)."""
    codes = model.encode(images)
    return codes[0] if isinstance(model, VAE) else codes


def draws(model: Autoencoder, codes: NDArray, count: int, rng: np.random.Generator) -> NDArray:
    """Images decoded from the prior, or from a normal fitted to each dimension of the codes."""
    noise = rng.standard_normal((count, LATENT))
    if not isinstance(model, VAE):
        noise = codes.mean(axis=0) + codes.std(axis=0) * noise
    return model.decode(noise)


def midpoints(model: Autoencoder, codes: NDArray, labels: NDArray) -> NDArray:
    """For each pair of classes: the first one's mean code, the midpoint, the second one's."""
    rows = []
    for first, second in PAIRS:
        ends = codes[labels == first].mean(axis=0), codes[labels == second].mean(axis=0)
        rows.append(model.decode(np.stack([ends[0], (ends[0] + ends[1]) / 2, ends[1]])))
    return np.stack(rows)


def distance_to_nearest(images: NDArray, references: NDArray) -> float:
    """The mean over images of the squared error to the nearest reference."""
    a, b = images.reshape(len(images), -1), references.reshape(len(references), -1)
    squares = np.sum(a**2, axis=1)[:, None] - 2 * a @ b.T + np.sum(b**2, axis=1)
    return float(np.maximum(squares, 0).min(axis=1).mean())


def check_labels(test: Dataset) -> NDArray:
    """The labels; InputError if a class of PAIRS is missing."""
    if test.labels is None or not {c for pair in PAIRS for c in pair} <= set(test.labels):
        raise minivae.InputError("this study needs images labelled 0 to 9")
    return test.labels


def main() -> None:
    """Trains both, and shows them side by side."""
    parser = options(__doc__, "why-variational", "glyphs")
    arguments = parser.parse_args()
    splits = load(arguments.data, seed=arguments.seed)
    labels = check_labels(splits.test)
    training = chosen(Training(epochs=15), arguments)
    shown_draws, shown_midpoints = {}, {}
    for name, variational in (("autoencoder", False), ("VAE", True)):
        model = build(variational, splits.train.image_shape, arguments.seed)
        minivae.fit(model, splits, training)
        images = model.unit_images(splits.test.images)
        codes = codes_of(model, images)
        drawn = draws(model, codes, 200, np.random.default_rng(arguments.seed))
        between = midpoints(model, codes, labels)
        print(
            f"{name:<12} distance to the nearest test image: draws "
            f"{distance_to_nearest(drawn, images):.1f}, midpoints "
            f"{distance_to_nearest(between[:, 1], images):.1f}"
        )
        shape = (GRID, GRID, *model.image_shape)
        shown_draws[f"{name}: draws"] = drawn[: GRID * GRID].reshape(shape)
        shown_midpoints[f"{name}: class, midpoint, class"] = between
    path, grids = arguments.out / "why_variational.png", shown_draws | shown_midpoints
    plots.compare_grids(path, grids, title="Decoding where no image was encoded")
    print(path)


if __name__ == "__main__":
    run(main)
