"""How good a model is: ELBO, importance-weighted bounds, log-likelihood, and what its posterior is
like.

For an image x and k draws z_s from q(z|x), with log-weights log w_s as in ops/importance.py,

    L_k = E log (1/k sum_s w_s),      L_1 = ELBO <= L_10 <= L_100 <= ... -> log p(x)

(Burda, Grosse & Salakhutdinov 2016, theorem 1). The negative log-likelihood that the literature
reports is -L_5000. From one set of draws, L_k of a smaller k is estimated by the mean over all
groups of k draws, so that the estimates of nested groups cannot fall as k grows.

None of this is a likelihood where the model is not a distribution over the data: grey pixels under
a Bernoulli, whose density does not integrate to one on [0, 1], or a weighted squared error. Then
only a loss is given.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .data import Dataset
from .errors import InputError, check_choice, check_count, check_is, check_seed
from .model_pass import ModelPass
from .models import VAE, Autoencoder
from .network import NetworkBuffers, NetworkPass
from .ops.batch import BINARIZATIONS
from .ops.importance import log_mean_exp
from .ops.latent import kl_to_prior
from .ops.philox import EVALUATION_STREAM, Noise
from .ops.state import new_state

BLOCK = 100
"""Draws that are made at once. Their noise is a function of (seed, image, block, draw): fixed, so
that a chunk of any size has the same."""

DEFAULT_SAMPLES = 5000
DEFAULT_CHUNK = 1000
DRAWS_OF_A_LOSS = 100
"""Draws of the reconstruction term where there is no likelihood to estimate."""

ACTIVE = 0.01
"""Variance of the posterior mean over images above which a latent dimension is active (Burda,
Grosse & Salakhutdinov 2016, section 5.2)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, None where that is not known."""

    mean: float
    error: float | None = None

    @staticmethod
    def of(values: NDArray) -> "Estimate":
        """The mean of values (n,), with an error if there are several."""
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return Estimate(float(np.mean(values)), error)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: means over images, in nats or in the unit that `objective` names.

    `loss` is reconstruction + KL, without beta, free bits or capacity; it is -ELBO where the
    figures are likelihoods. There `why_no_likelihood` is empty and `bounds` maps k to L_k;
    elsewhere `bounds` is empty, and `negative_log_likelihood` and `bits_per_dimension` are None.
    Bits per dimension take a grey pixel under a Gaussian for one of 256 levels, without
    dequantization noise. `kl_per_dimension`, `active_units` and `aggregate_posterior` describe
    q(z|x) over the images; `error_per_class` maps a label to the mean squared error per pixel of
    images decoded from their posterior mean.
    """

    images: int
    samples: int
    seed: int
    binarization: str
    objective: str
    why_no_likelihood: str
    loss: Estimate
    reconstruction: Estimate
    kl: Estimate
    bounds: dict[int, Estimate] = field(default_factory=dict)
    negative_log_likelihood: Estimate | None = None
    bits_per_dimension: float | None = None
    kl_per_dimension: list[float] = field(default_factory=list)
    active_units: int | None = None
    aggregate_posterior: dict[str, Any] = field(default_factory=dict)
    error_per_class: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a JSON file."""
        return dataclasses.asdict(self)


def why_no_likelihood(model: Autoencoder, images: NDArray, binarization: str) -> str:
    """Why figures on these images are not likelihoods, in a line; empty if they are."""
    objective = model.objective
    if not model.latent:
        return "a plain autoencoder defines no distribution over images"
    if objective.likelihood == "squared-error":
        return "a weighted squared error is not a log-density: it has no variance of its own"
    if objective.likelihood == "bernoulli" and binarization == "none" and not _is_binary(images):
        return (
            "grey pixels under a Bernoulli, whose density over [0, 1] does not integrate to one; "
            "--binarization stochastic makes it a likelihood"
        )
    return ""


def _is_binary(images: NDArray) -> bool:
    white = 255 if images.dtype == np.uint8 else 1
    return bool(np.all((images == 0) | (images == white)))


def _ladder(samples: int) -> list[int]:
    """1, 10, 100, ... and `samples`."""
    powers = [10**power for power in range(len(str(samples)))]
    return sorted({*(k for k in powers if k <= samples), samples})


def grouped_bound(log_weights: NDArray[np.float64], k: int) -> float:
    """The estimate of L_k from the log-weights (samples,) of one image: the mean over all whole
    groups of k."""
    groups = len(log_weights) // k
    return float(np.mean(log_mean_exp(log_weights[: groups * k].reshape(groups, k))))


class _Block(NamedTuple):
    """Up to BLOCK draws of an image, and their rows in a chunk."""

    image: int
    number: int
    rows: slice


def _chunks(images: int, samples: int, chunk: int) -> Iterator[list[_Block]]:
    """All draws of all images in order, at most `chunk` rows at a time."""
    blocks: list[_Block] = []
    rows = 0
    for image in range(images):
        for number in range(-(-samples // BLOCK)):
            count = min(BLOCK, samples - number * BLOCK)
            if rows + count > chunk:
                yield blocks
                blocks, rows = [], 0
            blocks.append(_Block(image, number, slice(rows, rows + count)))
            rows += count
    yield blocks


def _state(block: _Block) -> NDArray[np.int64]:
    # The noise's step is 32 bits wide: 20 for the image, 12 for the block.
    return new_state(step=(block.number << 20) + block.image)


class _Draws:
    """A chunk of draws of z, their log-ratios and reconstruction losses; of images with pixels
    (n, pixels), labels (n, classes) and heads (n, 2 d) on the model's backend."""

    def __init__(
        self, model: VAE, pixels: Any, onehot: Any, heads: Any, chunk: int, seed: int
    ) -> None:
        backend, dtype = model.backend, model.dtype
        self.model, self.backend = model, backend
        self.pixels, self.labelled, self.heads = pixels, onehot, heads
        self.noise = Noise(seed, EVALUATION_STREAM)
        self.z = backend.zeros((chunk, model.latent), dtype)
        self.log_ratio = backend.zeros((chunk,), dtype)
        self.x = backend.zeros((chunk, model.pixels), dtype)
        self.onehot = backend.zeros((chunk, model.classes), dtype)
        self.image_of_row = np.full(chunk, -1)
        self.loss = backend.zeros((chunk,), dtype)
        self.gradient = backend.zeros((chunk, model.pixels), dtype)
        self.buffers = NetworkBuffers(model.decoder, backend, chunk, dtype)
        self.passes: dict[int, NetworkPass] = {}
        self.objective = model.final_objective

    def of(self, blocks: list[_Block]) -> tuple[NDArray, NDArray]:
        """log p(z) - log q(z|x), and -log p(x|z) but for `Objective.constant`, of a chunk's draws,
        each (rows,)."""
        states = self.backend.asarray(np.stack([_state(block) for block in blocks]))
        for index, block in enumerate(blocks):
            self._draw(block, states[index])
        rows = blocks[-1].rows.stop
        self._decode(rows)
        return self.backend.to_numpy(self.log_ratio[:rows]), self.backend.to_numpy(self.loss[:rows])

    def _draw(self, block: _Block, state: Any) -> None:
        image, _, rows = block
        one = slice(image, image + 1)
        if np.any(self.image_of_row[rows] != image):
            self.backend.assign(self.x[rows], self.pixels[one])
            self.backend.assign(self.onehot[rows], self.labelled[one])
            self.image_of_row[rows] = image
        self.backend.importance_latent_forward(
            *(self.heads[one], self.z[rows], self.log_ratio[rows], self.model.logvar_factor),
            *(self.noise, state),
        )

    def _decode(self, rows: int) -> None:
        if rows not in self.passes:
            parameters = self.model.parameters
            arguments = (self.model.decoder, self.backend, parameters, self.buffers)
            self.passes[rows] = NetworkPass(*arguments, self.z[:rows], onehot=self.onehot[:rows])
        decoder, objective = self.passes[rows], self.objective
        decoder.forward()
        output = decoder.output.reshape(rows, self.model.pixels)
        compared = (output, self.x[:rows], self.loss[:rows], self.gradient[:rows], 1.0)
        if objective.likelihood == "bernoulli":
            self.backend.bernoulli_loss(*compared)
        else:
            weight = objective.error_weight
            self.backend.squared_error_loss(*compared, weight, decoder.output_activation)


LARGEST_IMAGES, LARGEST_SAMPLES = 1 << 20, BLOCK << 12


def _check(model: Autoencoder, images: NDArray, samples: int, chunk: int) -> None:
    check_count("samples", samples)
    check_count("chunk", chunk)
    if samples > LARGEST_SAMPLES:
        raise InputError(f"samples is {samples}, expected 1 to {LARGEST_SAMPLES}")
    if chunk % BLOCK:
        raise InputError(f"chunk is {chunk}, expected a multiple of {BLOCK}")
    if images.shape[1:] != model.image_shape:
        raise InputError(
            f"images are {images.shape[1:]}, the model takes {model.image_shape} (h, w, c)"
        )
    if not 1 <= len(images) <= LARGEST_IMAGES:
        raise InputError(f"there are {len(images)} images, expected 1 to {LARGEST_IMAGES}")


def _check_memory(model: VAE, chunk: int) -> None:
    # Every output of the decoder with its gradient, the pixels and theirs.
    numbers = 2 * sum(math.prod(shape) for shape in model.decoder.shapes) + 2 * model.pixels
    needed = 4 * chunk * numbers
    free = model.backend.free_memory()
    if needed > free:
        raise InputError(
            f"a chunk of {chunk} draws needs {needed >> 20} MiB, more than the {free >> 20} MiB "
            "that are free: expected a smaller one"
        )


def evaluate(
    model: Autoencoder,
    data: Dataset,
    *,
    samples: int = DEFAULT_SAMPLES,
    binarization: str = "none",
    seed: int = 0,
    chunk: int = DEFAULT_CHUNK,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a model on images with `samples` draws of z each (at most DRAWS_OF_A_LOSS where
    there is no likelihood), at most `chunk` draws at a time. `seed` is that of the draws and of the
    binarization; `progress` shows a progress bar.

    Raises InputError on images or labels that the model does not take, a loss that is not finite,
    an unknown binarization, an invalid seed, samples outside 1 to LARGEST_SAMPLES, a chunk that is
    not a multiple of BLOCK or needs more memory than is free, and before `Autoencoder.calibrate`
    where that is needed.
    """
    check_is("model", model, Autoencoder)
    check_is("data", data, Dataset)
    check_choice("binarization", binarization, BINARIZATIONS)
    check_seed(seed)
    data = Dataset.of(data.images, data.labels)
    _check(model, data.images, samples, chunk)
    x = data.binarized(binarization, seed).images.reshape(len(data), -1)
    reason = why_no_likelihood(model, data.images, binarization)
    common: dict[str, Any] = {
        "images": len(x),
        "seed": seed,
        "binarization": binarization,
        "objective": model.describe(model.final_objective),
        "why_no_likelihood": reason,
        "error_per_class": _error_per_class(model, x, data.labels),
    }
    if isinstance(model, VAE):
        samples = min(samples, DRAWS_OF_A_LOSS) if reason else samples
        chunk = min(chunk, len(x) * samples)
        _check_memory(model, chunk)
        ladder = [] if reason else _ladder(samples)
        grey = model.objective.likelihood != "bernoulli" and binarization == "none"
        levels = 255 if grey else 1
        draws = (samples, ladder, levels, seed, chunk, progress)
        return Evaluation(**common, **_by_draws(model, x, data.labels, *draws))
    loss = Estimate.of(_losses(model, x, data.labels))
    return Evaluation(samples=0, loss=loss, reconstruction=loss, kl=Estimate(0.0), **common)


def _losses(model: Autoencoder, x: NDArray, labels: NDArray | None) -> NDArray[np.float64]:
    """The loss of each image x (n, pixels) under a plain autoencoder."""
    backend, objective = model.backend, model.final_objective

    def run(model_pass: ModelPass, chunk: slice) -> Any:
        backend.assign(model_pass.x, backend.asarray(x[chunk].astype(model.dtype)))
        model_pass.mean_loss(Noise(0, EVALUATION_STREAM), objective)
        return model_pass.reconstruction

    losses = np.concatenate(model.by_chunks(len(x), labels, run)).astype(np.float64)
    _check_finite(losses)
    return losses + objective.constant(model.pixels)


def _check_finite(losses: NDArray, first: int = 0) -> None:
    """Raises InputError where one of the losses (n,) of images from `first` on is not finite."""
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        raise InputError(
            f"the loss of image {first + wrong[0]} is not finite: expected a model whose training "
            "did not diverge"
        )


def _by_draws(
    model: VAE,
    x: NDArray,
    labels: NDArray | None,
    samples: int,
    ladder: list[int],
    levels: int,
    seed: int,
    chunk: int,
    progress: bool,
) -> dict[str, Any]:
    """What `samples` draws of each image x (n, pixels) and its posterior say; with a ladder of
    bounds, whose last is at `samples`, also the likelihood; pixels in [0, 1] have so many
    levels above 0."""
    mu, logvar = model.encode(x.reshape(-1, *model.image_shape), labels)
    with np.errstate(over="ignore", invalid="ignore"):
        kl = kl_to_prior(mu, logvar)
    _check_finite(np.sum(kl, axis=1))
    head = np.concatenate([mu, logvar / model.logvar_factor], axis=1)
    checked = model.checked_labels(labels, len(x))
    onehot = np.zeros((len(x), 0)) if checked is None else np.eye(model.classes)[checked]
    pixels, labelled, heads = (
        model.backend.asarray(array.astype(model.dtype)) for array in (x, onehot, head)
    )
    draws = _Draws(model, pixels, labelled, heads, chunk, seed)
    chunks = _chunks(len(x), samples, chunk)
    reconstruction, bounds = _by_image(draws, chunks, len(x), samples, ladder, progress)
    found: dict[str, Any] = {
        "samples": samples,
        "loss": Estimate.of(reconstruction + np.sum(kl, axis=1)),
        "reconstruction": Estimate.of(reconstruction),
        "kl": Estimate.of(np.sum(kl, axis=1)),
        "bounds": {k: Estimate.of(bounds[:, index]) for index, k in enumerate(ladder)},
        "kl_per_dimension": [float(value) for value in np.mean(kl, axis=0)],
        "active_units": active_units(mu),
        "aggregate_posterior": aggregate_posterior(mu, logvar),
    }
    if ladder:
        likelihood = Estimate.of(-bounds[:, -1])
        found["negative_log_likelihood"] = likelihood
        # The probability of a level is the density times the spacing of levels.
        bits = likelihood.mean / (model.pixels * math.log(2)) + math.log2(levels)
        found["bits_per_dimension"] = bits
    return found


def _by_image(
    draws: _Draws,
    chunks: Iterable[list[_Block]],
    images: int,
    samples: int,
    ladder: list[int],
    progress: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each image the mean reconstruction loss (n,), and L_k for each k of the ladder
    (n, len(ladder)), from `samples` draws."""
    from tqdm import tqdm

    constant = draws.objective.constant(draws.model.pixels)
    reconstruction, bounds = np.empty(images), np.empty((images, len(ladder)))
    ratio, loss = np.empty(samples), np.empty(samples)
    with tqdm(total=images, unit="image", disable=not progress) as bar:
        for blocks in chunks:
            ratios, losses = draws.of(blocks)
            for image, number, rows in blocks:
                first = number * BLOCK
                some = slice(first, first + rows.stop - rows.start)
                ratio[some], loss[some] = ratios[rows], losses[rows] + constant
                if some.stop == samples:
                    reconstruction[image] = np.mean(loss)
                    _check_finite(reconstruction[image : image + 1] + np.mean(ratio), image)
                    bounds[image] = [grouped_bound(ratio - loss, k) for k in ladder]
                    bar.update()
    return reconstruction, bounds


def active_units(mu: NDArray) -> int | None:
    """How many dimensions of the posterior means (n, d) are active; None of a single image."""
    return int(np.sum(np.var(mu, axis=0) > ACTIVE)) if len(mu) > 1 else None


def aggregate_posterior(mu: NDArray, logvar: NDArray) -> dict[str, Any]:
    """Mean and variance of each dimension of the mixture of all q(z|x), from mu and logvar (n, d),
    and the KL in nats of the normal distribution with these to the prior: 0 for a match."""
    mean = mu.mean(axis=0, dtype=np.float64)
    variance = mu.var(axis=0, dtype=np.float64) + np.exp(logvar).mean(axis=0)
    mismatch = np.sum(kl_to_prior(mean, np.log(variance)))
    return {"mean": mean.tolist(), "variance": variance.tolist(), "kl_to_prior": float(mismatch)}


def _error_per_class(model: Autoencoder, x: NDArray, labels: NDArray | None) -> dict[str, float]:
    if labels is None:
        return {}
    images = x.reshape(-1, *model.image_shape)
    errors = np.mean((model.reconstruct(images, labels) - images) ** 2, axis=(1, 2, 3))
    return {str(label): float(np.mean(errors[labels == label])) for label in np.unique(labels)}
