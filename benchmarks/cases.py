"""What is timed: the presets and the classic dense VAE, on digits or random images."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minivae.data import Dataset, Splits
from minivae.data.glyphs import glyphs
from minivae.errors import InputError
from minivae.models import Autoencoder
from minivae.presets import Training, preset

PRESETS = ("mnist-dense", "fashion-dense", "mnist-conv", "mnist-conv-ae", "mnist-class")
"""The engine's five."""

RANDOM = " random"
"""In the name of a case on random images, where there is one on digits."""

IMAGES = 60_000
"""As many as MNIST has: what is done once an epoch has its true share of a step."""


class Case(NamedTuple):
    """A model with its training; every peer trains the same weights on the same data."""

    name: str
    model: Autoencoder
    training: Training
    splits: Splits


def byte_images(case: Case) -> NDArray[np.uint8]:
    """The training images, which a peer divides by 255. Raises InputError of others than bytes."""
    images = case.splits.train.images
    if images.dtype != np.uint8:
        raise InputError(
            f"{case.splits.name}: images are {images.dtype}, expected uint8 to compare"
        )
    return images


def random_splits(image_shape: tuple[int, ...], images: int = IMAGES) -> Splits:
    """Random images, half of their pixels lit, as in Fashion-MNIST, but anywhere: no row of them is
    dark, which a kernel could skip."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (images, *image_shape), dtype=np.uint8)
    pixels *= rng.integers(2, size=pixels.shape, dtype=np.uint8)
    return Splits("random", Dataset(pixels, None), Dataset(pixels[:100], None))


@functools.cache
def _digits(images: int) -> Splits:
    return glyphs(train=images)


def preset_case(
    name: str,
    *,
    label: str | None = None,
    batch: int | None = None,
    hidden: tuple[int, ...] = (),
    latent: int | None = None,
    samples: int | None = None,
    image_shape: tuple[int, ...] = (28, 28, 1),
    images: int = IMAGES,
    digits: bool = False,
) -> Case:
    """A preset as a case, with what is given instead of its own settings, on random images or on
    the embedded digits, of whose pixels about as many are dark as of MNIST's."""
    chosen = preset(name)
    training = dataclasses.replace(
        chosen.training,
        steps=0,
        images=0,
        epochs=1000,
        log_every=0,
        batch_size=batch or chosen.training.batch_size,
    )
    model = chosen.model(image_shape, hidden=hidden, latent=latent, samples=samples)
    images = max(images, training.batch_size)
    splits = _digits(images) if digits else random_splits(image_shape, images)
    return Case(label or f"{name} b{training.batch_size}", model, training, splits)


def step_cases(batch: int | None = None, images: int = IMAGES) -> list[Case]:
    """Dense 784-400-20, on digits and on random images, the engine's five presets and two of the
    IWAE paper, at their own batches unless `batch` is given, with so many images."""
    size = batch or 128
    dense = (
        preset_case(
            "glyphs",
            label=f"dense-784-400-20{where} b{size}",
            batch=size,
            images=images,
            digits=not where,
        )
        for where in ("", RANDOM)
    )
    few = batch or 20
    paper = (
        preset_case(
            f"iwae-paper-{kind}",
            label=f"iwae-paper-{kind} k={k} b{few}",
            batch=batch,
            samples=k,
            images=images,
            digits=True,
        )
        for kind, k in (("vae", 1), ("iwae", 5))
    )
    presets = (
        preset_case(name, batch=batch, images=images, digits="mnist" in name) for name in PRESETS
    )
    return [*dense, *presets, *paper]
