"""The pictures of a run: what a trained model is asked, and which plot shows the answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .data import Dataset, Splits
from .models import VAE, Autoencoder
from .ops.latent import kl_to_prior
from .presets import Training

RECONSTRUCTIONS = "Test images and their reconstructions"
GRID = 25
PAIRS = 10
SCATTER = 5000
TRAVERSED_DIMENSIONS = 10
MANIFOLD = 20


def draw_progress(
    model: Autoencoder, splits: Splits, training: Training, path: Path, step: int
) -> None:
    """A grid of samples from the prior; for a plain autoencoder, reconstructions of test images, as
    the training binarized them."""
    if isinstance(model, VAE):
        _draw_samples(model, splits.class_names, path, f"Samples from the prior, step {step}")
        return
    some = splits.test.sample(PAIRS).binarized(training.binarization, training.seed)
    draw_reconstructions(model, some, path, f"{RECONSTRUCTIONS}, step {step}")


def draw_reconstructions(
    model: Autoencoder, data: Dataset, path: Path, title: str = RECONSTRUCTIONS
) -> None:
    """The images above their reconstructions."""
    originals = model.unit_images(data.images)
    plots.reconstructions(path, originals, model.reconstruct(originals, data.labels), title=title)


def draw_run(
    model: Autoencoder,
    splits: Splits,
    training: Training,
    metrics: list[dict[str, Any]],
    folder: Path,
) -> list[Path]:
    """Every picture that fits the model and the data, as the training binarized it, into `folder`.
    Returns their paths."""
    paths: list[Path] = []

    def path(name: str) -> Path:
        paths.append(folder / f"{name}.png")
        return paths[-1]

    some = splits.test.sample(SCATTER).binarized(training.binarization, training.seed)
    originals, labels, names = some.images, some.labels, splits.class_names
    if metrics:
        plots.loss_curves(path("loss_curves"), metrics)
    draw_reconstructions(model, some.sample(PAIRS), path("reconstructions"))
    decoded = model.reconstruct(originals, labels)
    errors = np.sum((originals - decoded) ** 2, axis=(1, 2, 3))
    plots.error_histogram(path("error_histogram"), errors)
    if labels is not None:
        classes = path("class_reconstructions")
        plots.class_reconstructions(classes, originals, decoded, labels, names=names)
    if isinstance(model, VAE):
        mu, logvar = model.encode(originals, labels)
        label = None if labels is None else labels[0]
        for name, quantity, codes in (
            ("latent_means", "posterior mean", mu),
            ("latent_logvars", "posterior log-variance", logvar),
        ):
            plots.latent_scatter(path(name), codes, labels, names=names, quantity=quantity)
        kl = np.mean(kl_to_prior(mu, logvar), axis=0)
        plots.kl_per_dimension(path("kl_per_dimension"), kl)
        _draw_samples(model, names, path("samples"), "Samples from the prior")
        _draw_traversals(model, mu[0], label, kl, path("traversals"))
        if model.latent == 2:
            grid = model.decode(plots.manifold_grid(MANIFOLD), label)
            plots.manifold(path("manifold"), grid, MANIFOLD)
    else:
        codes = model.encode(originals, labels).reshape(len(originals), -1)
        plots.latent_scatter(path("codes"), codes, labels, names=names, quantity="code")
    return paths


def _draw_samples(model: VAE, names: Sequence[str], path: Path, title: str) -> None:
    images = model.sample(GRID)
    plots.sample_grid(path, images, title=title, classes=model.classes, names=names)


def _draw_traversals(model: VAE, start: Any, label: Any, kl: Any, path: Path) -> None:
    """From one image's mean and label, along the dimensions that carry most information."""
    values = np.linspace(-3, 3, 9)
    dimensions = np.argsort(-kl)[:TRAVERSED_DIMENSIONS]
    codes = np.tile(start, (len(dimensions), len(values), 1))
    for row, dimension in enumerate(dimensions):
        codes[row, :, dimension] = values
    images = model.decode(codes.reshape(-1, model.latent), label)
    grid = images.reshape(len(dimensions), len(values), *model.image_shape)
    plots.traversals(path, grid, values, dimensions)
