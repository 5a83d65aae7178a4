"""Autoencoder and VAE: an encoder, a latent, a decoder and an objective, trained by hand-derived
gradients on any backend.

A model is built in two steps: `to` picks the backend and gives it parameters, `bind` takes all the
memory that a batch needs. Both happen by themselves at the first use that needs them.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import backends
from .backends.reference import Call, ReferenceBackend
from .data.dataset import checked_pixels
from .errors import InputError, check_count, check_is, check_kinds, check_seed, check_settings
from .layers import INITIALIZATIONS, JoinLabel, Layer, Shape, Sigmoid, layer_from_config
from .network import VIEWS, Buffers, Network, Pass
from .ops.activations import IDENTITY, sigmoid
from .ops.batch import BINARIZATIONS
from .ops.elbo import KL, LOSS, RECONSTRUCTION, TOTALS_SIZE
from .ops.philox import EVALUATION_BINARIZATION_STREAM, EVALUATION_STREAM, Noise
from .ops.state import BETA, FAILED, SCHEDULE_COLUMNS, new_state
from .params import Parameters

LIKELIHOODS = ("bernoulli", "squared-error", "gaussian", "calibrated-gaussian")
ESTIMATORS = ("analytic", "monte-carlo", "importance")
HEADS = {"logvar": 1.0, "log-sigma": 2.0}
"""What the second half of an encoder's head may be, with its factor to the log-variance."""
INFERENCE_BATCH = 100
"""Rows that encode, decode and evaluate run at once. Fixed, since evaluation's noise belongs to a
row of a batch, and small, so that it seldom needs more memory than training has."""


def check_binarization(kind: str) -> None:
    """Raises InputError unless `kind` is in BINARIZATIONS."""
    if kind not in BINARIZATIONS:
        known = ", ".join(BINARIZATIONS)
        raise InputError(f"binarization is {kind!r}, expected one of {known}")


def check_image_shape(shape: Any) -> None:
    """Raises InputError unless `shape` is (height, width, channels)."""
    sizes = shape if isinstance(shape, tuple | list) and len(shape) == 3 else (0,)
    if not all(isinstance(size, numbers.Integral) and int(size) >= 1 for size in sizes):
        raise InputError(f"image_shape is {shape!r}, expected (height, width, channels)")


@dataclass(frozen=True)
class Objective:
    """What is minimised: reconstruction + beta KL, a sum over pixels and latent dimensions and a
    mean over images (elbo.E5).

    `likelihood` is one of

        bernoulli            -log p(x|logits), in nats; the decoder ends in logits (elbo.E2)
        squared-error        weight * sum of (y - x)^2 (elbo.E3)
        gaussian             -log N(x; y, sigma^2), in nats, constant included (elbo.E4)
        calibrated-gaussian  the same with the sigma^2 that fits the batch best (calibration.E3);
                             images are evaluated with the sigma of `Autoencoder.calibrate`

    With `estimator` "analytic" the KL is latent.E2, with one draw of z per image. The others use
    log w = log p(x|z) + log p(z) - log q(z|x) of `samples` draws per image (importance.E2):
    "monte-carlo" the mean of log w, again the ELBO; "importance" the log of the mean of w, the
    tighter bound of the IWAE. They need the Bernoulli likelihood, beta 1, no free bits and no
    capacity, and report the whole loss as reconstruction.

    `beta` rises linearly to its value over the first `beta_warmup_steps`; `free_bits` is lambda of
    elbo.E5, in nats a dimension. With a `capacity` above 0, in nats an image, beta weighs the KL's
    distance from it instead (capacity.E3); it rises linearly over `capacity_steps`.
    """

    likelihood: str = "bernoulli"
    weight: float = 1.0
    sigma: float = 1.0
    beta: float = 1.0
    beta_warmup_steps: int = 0
    free_bits: float = 0.0
    estimator: str = "analytic"
    samples: int = 1
    capacity: float = 0.0
    capacity_steps: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        checks = {
            "likelihood": (self.likelihood in LIKELIHOODS, f"one of {', '.join(LIKELIHOODS)}"),
            "weight": (self.weight > 0, "above 0"),
            "sigma": (1e-9 < self.sigma < 1e9, "above 1e-9 and below 1e9"),
            "beta": (self.beta >= 0, "0 or above"),
            "beta_warmup_steps": (self.beta_warmup_steps >= 0, "0 or above"),
            "free_bits": (self.free_bits >= 0, "0 or above"),
            "estimator": (self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
            "samples": (self.samples >= 1, "1 or above"),
            "capacity": (self.capacity >= 0, "0 or above"),
            "capacity_steps": (self.capacity_steps >= 0, "0 or above"),
        }
        check_settings(self, checks)
        if self.free_bits and self.capacity:
            raise InputError("free_bits and capacity exclude each other: both set the KL's level")
        if not self.by_draws and self.samples != 1:
            raise InputError(
                f"samples is {self.samples}, expected 1 unless the bound is by draws (iwae-paper-*)"
            )
        plain = (self.likelihood, self.beta, self.beta_warmup_steps, self.free_bits, self.capacity)
        if self.by_draws and plain != ("bernoulli", 1.0, 0, 0.0, 0.0):
            raise InputError(
                f"a bound by draws (estimator {self.estimator!r}) is for the Bernoulli likelihood "
                "with beta 1, no free bits and no capacity"
            )

    @property
    def error_weight(self) -> float:
        """The weight w of elbo.E3; 1 where calibration.E4 finds it afterwards."""
        if self.likelihood == "gaussian":
            return 0.5 / self.sigma**2
        return self.weight if self.likelihood == "squared-error" else 1.0

    @property
    def calibrated(self) -> bool:
        """Whether the likelihood's variance is calibrated."""
        return self.likelihood == "calibrated-gaussian"

    @property
    def by_draws(self) -> bool:
        """Whether the bound comes from draws alone (importance.py), without an analytic KL."""
        return self.estimator != "analytic"

    def constant(self, pixels: int) -> float:
        """The part of a fixed Gaussian's -log p(x|z) that the loss on the device leaves out
        (elbo.E4), in nats per image; 0 for other likelihoods."""
        if self.likelihood != "gaussian":
            return 0.0
        return 0.5 * pixels * math.log(2 * math.pi * self.sigma**2)

    def beta_at(self, step: int) -> float:
        """The weight of the KL at `step`, counted from 0."""
        if step < self.beta_warmup_steps:
            return self.beta * (step + 1) / self.beta_warmup_steps
        return self.beta

    @property
    def reconstruction(self) -> str:
        """The reconstruction term in words."""
        return {
            "bernoulli": "Bernoulli -log p(x|z) on logits, nats",
            "squared-error": f"{self.weight:g} x sum of squared error",
            "gaussian": f"Gaussian -log p(x|z) with sigma {self.sigma:g}, nats",
            "calibrated-gaussian": "Gaussian -log p(x|z) with sigma^2 = the batch's mean squared "
            "error, nats",
        }[self.likelihood]

    def __str__(self) -> str:
        if self.by_draws:
            bound = "log mean w" if self.estimator == "importance" else "mean log w"
            return (
                f"-({bound}), log w = log p(x|z) + log p(z) - log q(z|x), of {self.samples} draws; "
                "Bernoulli on logits, nats; mean per image"
            )
        warmup = f" (linear over {self.beta_warmup_steps} steps)" if self.beta_warmup_steps else ""
        if self.capacity:
            rise = f" (linear over {self.capacity_steps} steps)" if self.capacity_steps else ""
            target = f"|KL - C|, C = {self.capacity:g} nats{rise}"
            return f"{self.reconstruction} + {self.beta:g}{warmup} x {target}; mean per image"
        floor = f", at least {self.free_bits:g} nats a dimension" if self.free_bits else ""
        return f"{self.reconstruction} + {self.beta:g}{warmup} x KL{floor}; mean per image"


class Autoencoder:
    """Encoder and decoder, trained to reconstruct: codes without a distribution, and no KL.

    Args:
        encoder: layers from images (h, w, c) to the code.
        decoder: layers from the code to h w c numbers, in any shape.
        objective: the reconstruction loss; what it says of the KL has no meaning here.
        image_shape: (h, w, c).
        initialization: see `WeightedLayer.initialize`.
        seed: of the initial weights.

    Raises InputError if the layers do not fit together.
    """

    kind = "autoencoder"
    head = "logvar"

    def __init__(
        self,
        encoder: Sequence[Layer],
        decoder: Sequence[Layer],
        objective: Objective,
        image_shape: Shape,
        *,
        initialization: str = "torch",
        seed: int = 0,
    ) -> None:
        check_image_shape(image_shape)
        check_seed(seed)
        check_is("objective", objective, Objective)
        if objective.by_draws and not isinstance(self, VAE):
            raise InputError(f"estimator is {objective.estimator!r}: only a VAE draws its code")
        if not encoder or not decoder:
            raise InputError("a model needs at least one layer in its encoder and its decoder")
        if initialization not in INITIALIZATIONS:
            known = ", ".join(INITIALIZATIONS)
            raise InputError(f"initialization is {initialization!r}, expected one of {known}")
        self.image_shape = tuple(image_shape)
        self.objective = objective
        self.initialization = initialization
        self.seed = seed
        self.encoder = Network("encoder", list(encoder), self.image_shape)
        self.decoder = Network("decoder", list(decoder), self.code_shape)
        self._check_decoder()
        self.classes = self._joined_classes()
        self._backend: ReferenceBackend | None = None
        self.dtype: Any = np.dtype(np.float32)
        self._parameters: Parameters | None = None
        self._sigma: Any = None
        self._memory: _Memory | None = None

    @property
    def pixels(self) -> int:
        """Numbers in an image."""
        return math.prod(self.image_shape)

    @property
    def latent(self) -> int:
        """Dimensions of the latent distribution; 0 for a plain autoencoder."""
        return 0

    @property
    def logvar_factor(self) -> float:
        """The factor from the head's second half to the log-variance."""
        return HEADS[self.head]

    @property
    def code_shape(self) -> Shape:
        """The shape of a decoder input."""
        return self.encoder.output_shape

    def _check_decoder(self) -> None:
        produced = self.decoder.output_shape
        if math.prod(produced) != self.pixels:
            raise InputError(
                f"the decoder makes {produced}, expected the {self.pixels} numbers of an image "
                f"{self.image_shape}"
            )
        computing = [layer for layer in self.decoder.layers if not isinstance(layer, VIEWS)]
        on_logits = self.objective.likelihood == "bernoulli"
        if on_logits and computing and isinstance(computing[-1], Sigmoid):
            raise InputError(
                "the Bernoulli likelihood takes logits: leave out the decoder's last Sigmoid"
            )

    def __repr__(self) -> str:
        networks = f"encoder={self.encoder.layers}, decoder={self.decoder.layers}"
        return f"{type(self).__name__}({networks}, image_shape={self.image_shape})"

    def describe(self, objective: Objective) -> str:
        """An objective of this model in words."""
        words = str(objective) if self.latent else f"{objective.reconstruction}; mean per image"
        return words + (f"; given the label, of {self.classes} classes" if self.classes else "")

    def _joined_classes(self) -> int:
        """Over how many classes a label joins the model; 0 if none does."""
        layers = self.encoder.layers + self.decoder.layers
        found = {layer.classes for layer in layers if isinstance(layer, JoinLabel)}
        if len(found) > 1:
            raise InputError(
                f"JoinLabel of {sorted(found)} classes in one model, expected one number"
            )
        return found.pop() if found else 0

    def config(self) -> dict[str, Any]:
        """The model as plain data; `model_from_config` reads it."""
        return {
            "model": self.kind,
            "image_shape": list(self.image_shape),
            "encoder": [layer.config() for layer in self.encoder.layers],
            "decoder": [layer.config() for layer in self.decoder.layers],
            "objective": dataclasses.asdict(self.objective),
            "initialization": self.initialization,
            "seed": self.seed,
        }

    # Building

    @property
    def backend(self) -> ReferenceBackend:
        """Where the model is: on the automatic device from its first use on, unless `to` says."""
        if self._backend is None:
            self.to("auto")
        assert self._backend is not None
        return self._backend

    @property
    def parameters(self) -> Parameters:
        """The parameters; made on the automatic device at the first use."""
        if self._parameters is None:
            self.to("auto")
        assert self._parameters is not None
        return self._parameters

    def to(self, device: str | Any, dtype: DTypeLike = np.float32) -> "Autoencoder":
        """Puts the model on a device by name ("auto", "cpu", ...) or on a backend object, with its
        present parameters and moments, or else with initial ones. Returns the model."""
        check_is("device", device, str, ReferenceBackend)
        backend = backends.get(device) if isinstance(device, str) else device
        before = self._parameters
        tensors = self.tensors() if before is not None else None
        self._backend, self.dtype, self._memory = backend, np.dtype(dtype), None
        shapes = self.encoder.parameter_shapes() | self.decoder.parameter_shapes()
        self._parameters = Parameters(shapes, backend, self.dtype)
        self._sigma = backend.zeros((1,), self.dtype)
        if tensors is None:
            rng = np.random.default_rng([self.seed, INITIALIZATION_STREAM])
            for network in (self.encoder, self.decoder):
                for name, value in network.initial_values(self.initialization, rng).items():
                    self._assign(self._parameters.values[name], value)
        else:
            self.set_tensors(tensors)
        return self

    def _assign(self, array: Any, value: NDArray) -> None:
        array[...] = self.backend.asarray(np.asarray(value, self.dtype))

    def tensors(self) -> dict[str, NDArray]:
        """Values and moments as NumPy arrays: `encoder.0.weight`, `first_moment.encoder.0.weight`,
        `second_moment.encoder.0.weight`; and the calibrated `sigma` (1,), 0 before `calibrate`, if
        the objective has one."""
        parameters = self.parameters
        views = {
            "": parameters.values,
            "first_moment.": parameters.first_moments,
            "second_moment.": parameters.second_moments,
            "sigma": {"": self._sigma} if self.objective.calibrated else {},
        }
        return {
            prefix + name: self.backend.to_numpy(view)
            for prefix, tensors in views.items()
            for name, view in tensors.items()
        }

    def set_tensors(self, tensors: dict[str, NDArray]) -> None:
        """Puts back what `tensors` gave. Moments and sigma may be missing, and stay as they are.

        Raises InputError, before anything has changed, on a missing, unknown or misshapen tensor.
        """
        parameters = self.parameters
        targets = dict(parameters.values)
        if self.objective.calibrated and "sigma" in tensors:
            targets["sigma"] = self._sigma
        for prefix, views in (
            ("first_moment.", parameters.first_moments),
            ("second_moment.", parameters.second_moments),
        ):
            if any(name.startswith(prefix) for name in tensors):
                targets |= {prefix + name: view for name, view in views.items()}
        for name in sorted(targets.keys() | tensors.keys()):
            found = tensors[name].shape if name in tensors else "no such tensor"
            expected = tuple(targets[name].shape) if name in targets else "no such tensor"
            if found != expected:
                raise InputError(f"tensor {name}: found {found}, the model has {expected}")
        for name, view in targets.items():
            self._assign(view, tensors[name])

    def set_output_bias(self, mean: NDArray) -> None:
        """Makes the decoder's last bias the logits of `mean` (h, w, c), clipped to [0.001, 0.999].

        Raises InputError unless the likelihood is Bernoulli and the decoder ends in a dense layer.
        """
        names = [name for name in self.parameters.values if name.startswith("decoder.")]
        bias = self.parameters.values[names[-1]]
        if self.objective.likelihood != "bernoulli" or bias.size != self.pixels:
            raise InputError(
                "output_bias: expected logits from a dense layer, with a bias for each"
            )
        clipped = np.clip(mean.reshape(-1), 0.001, 0.999)
        self._assign(bias, np.log(clipped / (1 - clipped)))

    def bind(self, rows: int, draws: int | None = None) -> "ModelPass":
        """The model bound to memory for a batch of `rows` with the objective's draws of z for each,
        or as many as `draws` says; allocates it if there is too little."""
        parameters = self.parameters
        draws = draws or self.objective.samples
        if self._memory is None or self._memory.batch < rows:
            self._memory = _Memory(self, max(rows, INFERENCE_BATCH))
        key = rows, draws
        if key not in self._memory.passes:
            self._memory.passes[key] = ModelPass(self, parameters, self._memory, rows, draws)
        return self._memory.passes[key]

    # Inference

    def _chunks(self, rows: int) -> Iterator[slice]:
        for first in range(0, rows, INFERENCE_BATCH):
            yield slice(first, min(first + INFERENCE_BATCH, rows))

    def images(self, images: ArrayLike) -> NDArray[np.float32]:
        """Images (n, h, w, c) in [0, 1] as float32, from what `pixels_of` takes."""
        array = self.pixels_of(images)
        scale = 255 if array.dtype == np.uint8 else 1
        return np.asarray(array / np.float32(scale), np.float32)

    def pixels_of(self, images: ArrayLike) -> NDArray:
        """Images (n, h, w, c) as they are, uint8 or float32, from (n, h, w, c) or, with one
        channel, (n, h, w), in what `checked_pixels` takes.

        Raises InputError on any other shape, type or range.
        """
        array = np.asarray(images)
        if array.shape[1:] == self.image_shape[:2] and self.image_shape[2] == 1:
            array = array[..., None]
        if array.shape[1:] != self.image_shape:
            raise InputError(
                f"images have shape {array.shape}, the model takes (n, "
                + ", ".join(map(str, self.image_shape))
                + ")"
            )
        return checked_pixels(array, "data")

    def labels(self, labels: ArrayLike | None, rows: int) -> NDArray[np.int64] | None:
        """The labels (rows,) that a conditional model needs, from as many or from one for all; None
        for a model that is not conditional.

        Raises InputError if they are missing, of another shape, or not among the classes.
        """
        if not self.classes:
            return None
        expected = f"a conditional model takes an integer label of 0 to {self.classes - 1}"
        if labels is None:
            raise InputError(f"{expected} for each image, got none")
        array = np.asarray(labels)
        if array.shape not in ((), (rows,)) or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{expected} for each of {rows} images, got {array.dtype} of shape {array.shape}"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.classes:
            least, largest = array.min(), array.max()
            found = least if least == largest else f"{least} to {largest}"
            raise InputError(f"{expected}, got {found}")
        return np.array(np.broadcast_to(array, rows), np.int64)

    def _put_labels(self, bound: "ModelPass", labels: NDArray | None, chunk: slice) -> None:
        if labels is not None:
            self._assign(bound.onehot, np.eye(self.classes)[labels[chunk]])

    def _encoded(self, images: ArrayLike, labels: ArrayLike | None) -> NDArray:
        array = self.images(images)
        checked = self.labels(labels, len(array))
        outputs = []
        for chunk in self._chunks(len(array)):
            bound = self.bind(chunk.stop - chunk.start, 1)
            self._put_labels(bound, checked, chunk)
            self._assign(bound.x, array[chunk].reshape(bound.x.shape))
            bound.encoder.forward()
            outputs.append(self.backend.to_numpy(bound.encoder.output))
        return np.concatenate(outputs) if outputs else np.empty((0, *self.encoder.output_shape))

    def encode(self, images: ArrayLike, labels: ArrayLike | None = None) -> Any:
        """The codes (n, *code_shape) of images (n, h, w, c).

        Here as elsewhere, `labels` are (n,), or one for all images: a conditional model needs them,
        others ignore them. Raises InputError on images or labels that do not fit.
        """
        return self._encoded(images, labels)

    def decode(self, codes: ArrayLike, labels: ArrayLike | None = None) -> NDArray:
        """The mean images (n, h, w, c) of codes (n, *code_shape). Raises InputError on codes or
        labels of another shape."""
        array = np.asarray(codes, self.dtype)
        if array.shape[1:] != self.code_shape:
            expected = ", ".join(map(str, ("n", *self.code_shape)))
            raise InputError(f"codes have shape {array.shape}, expected ({expected})")
        checked = self.labels(labels, len(array))
        outputs = [np.empty((0, *self.image_shape), self.dtype)]
        for chunk in self._chunks(len(array)):
            bound = self.bind(chunk.stop - chunk.start, 1)
            self._put_labels(bound, checked, chunk)
            self._assign(bound.code, array[chunk])
            bound.decoder.forward()
            output = self.backend.to_numpy(bound.decoder.output)
            outputs.append(output.reshape(-1, *self.image_shape))
        images = np.concatenate(outputs)
        return sigmoid(images) if self.objective.likelihood == "bernoulli" else images

    def reconstruct(self, images: ArrayLike, labels: ArrayLike | None = None) -> NDArray:
        """The images (n, h, w, c) as the model sees them: decoded from their codes."""
        return self.decode(self.encode(images, labels), labels)

    @property
    def final_objective(self) -> Objective:
        """The objective for evaluation: beta and capacity at their final values, and a calibrated
        likelihood with the sigma of `calibrate`, before which it raises InputError."""
        final = dataclasses.replace(self.objective, beta_warmup_steps=0, capacity_steps=0)
        if not final.calibrated:
            return final
        sigma = 0.0 if self._sigma is None else float(self.backend.to_numpy(self._sigma)[0])
        if not sigma:
            raise InputError("sigma is not calibrated yet: train for an epoch, or call calibrate")
        return dataclasses.replace(final, likelihood="gaussian", sigma=sigma)

    def calibrate(
        self,
        data: NDArray,
        labels: ArrayLike | None = None,
        *,
        seed: int = 0,
        binarization: str = "none",
    ) -> float:
        """Sets and returns the sigma, in units of a pixel, that makes training images (n, h, w, c)
        most likely, with one draw of z each (calibration.E2). Arguments as for `evaluate`.

        Raises InputError if the objective's likelihood is not calibrated.
        """
        if not self.objective.calibrated:
            raise InputError(f"likelihood is {self.objective.likelihood!r}: nothing to calibrate")
        squares = Objective("squared-error")
        error = self.evaluate(data, labels, seed=seed, binarization=binarization, objective=squares)
        sigma = math.sqrt(error["reconstruction"] / self.pixels)
        self._assign(self._sigma, np.array([sigma]))
        return sigma

    def evaluate(
        self,
        data: NDArray,
        labels: ArrayLike | None = None,
        *,
        seed: int = 0,
        binarization: str = "none",
        objective: Objective | None = None,
    ) -> dict[str, float]:
        """The mean loss, reconstruction and KL of images (n, h, w, c), with as many draws of z each
        as the model's objective has, in its units (nats, or weighted squares); of a bound by draws
        the loss alone, of a plain autoencoder no KL.

        `data` is uint8 or float in [0, 1] as a data set holds it. The objective is
        `final_objective` unless another is given; the KL is weighted by its final beta. Free bits
        and a capacity see the mean KL of INFERENCE_BATCH images at a time. All three are infinite
        where the loss of an image is not finite.

        Raises InputError on images or labels that do not fit or are none, on an unknown
        binarization, and before `calibrate` where that is needed.
        """
        check_binarization(binarization)
        objective = objective or self.final_objective
        pixels = self.pixels_of(data)
        backend, rows = self.backend, len(pixels)
        if not rows:
            raise InputError("no images to evaluate, expected at least one")
        resident = backend.asarray(pixels.reshape(rows, -1))
        order = backend.asarray(np.arange(rows))
        checked = self.labels(labels, rows)
        resident_labels = None if checked is None else backend.asarray(checked)
        schedule = np.zeros((1, SCHEDULE_COLUMNS))
        schedule[0, BETA] = objective.beta
        schedule = backend.asarray(schedule.astype(self.dtype))
        totals = backend.zeros((TOTALS_SIZE,), np.float64)
        noise = Noise(seed, EVALUATION_STREAM)
        binarization_noise = Noise(seed, EVALUATION_BINARIZATION_STREAM)
        states = []
        for index, chunk in enumerate(self._chunks(rows)):
            state = backend.asarray(new_state(step=index, first=chunk.start))
            bound = self.bind(chunk.stop - chunk.start)
            backend.gather_batch(resident, order, state, bound.x, binarization, binarization_noise)
            if resident_labels is not None:
                backend.gather_labels(resident_labels, order, state, bound.onehot)
            bound.forward(noise, schedule, state, totals, objective)
            states.append(state)
        sums = backend.to_numpy(totals)
        if any(backend.to_numpy(state)[FAILED] for state in states):
            # What is not finite is not added up.
            sums = np.full(TOTALS_SIZE, np.inf)
        return self.means(sums, rows, objective)

    def means(
        self, totals: NDArray, images: int, objective: Objective | None = None
    ) -> dict[str, float]:
        """What `elbo_totals` summed over `images`, as means, with the constant of the objective
        (the model's own unless another is given). A bound by draws has no terms, a plain
        autoencoder no KL."""
        objective = objective or self.objective
        constant = objective.constant(self.pixels)
        loss = float(totals[LOSS] / images + constant)
        if objective.by_draws:
            return {"loss": loss}
        terms = {
            "loss": loss,
            "reconstruction": float(totals[RECONSTRUCTION] / images + constant),
        }
        return terms | ({"kl": float(totals[KL] / images)} if self.latent else {})


class VAE(Autoencoder):
    """A variational autoencoder: the encoder's last layer gives the means first, then the
    log-variances, of a diagonal Gaussian over the latent; the decoder takes a draw of it.

    Arguments as for `Autoencoder`; the encoder must end in 2 d numbers for d latent dimensions.
    `head` says what the second d are: "logvar", or with the estimators by draws "log-sigma".
    """

    kind = "vae"

    def __init__(
        self,
        encoder: Sequence[Layer],
        decoder: Sequence[Layer],
        objective: Objective,
        image_shape: Shape,
        *,
        initialization: str = "torch",
        seed: int = 0,
        head: str = "logvar",
    ) -> None:
        if head not in HEADS:
            raise InputError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
        if head != "logvar" and not objective.by_draws:
            raise InputError(f"head is {head!r}, expected 'logvar' with an analytic KL")
        self.head = head
        super().__init__(
            encoder, decoder, objective, image_shape, initialization=initialization, seed=seed
        )

    def config(self) -> dict[str, Any]:
        return super().config() | {"head": self.head}

    @property
    def latent(self) -> int:
        return self.code_shape[0]

    @property
    def code_shape(self) -> Shape:
        if all(isinstance(layer, VIEWS) for layer in self.encoder.layers):
            raise InputError("the encoder computes nothing: expected a layer besides its views")
        head = self.encoder.output_shape
        if len(head) != 1 or head[0] % 2:
            raise InputError(
                f"the encoder ends in shape {head}, expected (2 d,): d means, then d log-variances"
            )
        return (head[0] // 2,)

    def encode(self, images: ArrayLike, labels: ArrayLike | None = None) -> tuple[NDArray, NDArray]:
        """The posterior's (mu, logvar), each (n, d), of images (n, h, w, c). Raises InputError on
        images or labels that do not fit."""
        head = self._encoded(images, labels)
        return head[:, : self.latent], self.logvar_factor * head[:, self.latent :]

    def reconstruct(self, images: ArrayLike, labels: ArrayLike | None = None) -> NDArray:
        """The images (n, h, w, c) decoded from the mean of their posterior. Raises InputError on
        images or labels that do not fit."""
        return self.decode(self.encode(images, labels)[0], labels)

    def sample(self, count: int, *, seed: int = 0, labels: ArrayLike | None = None) -> NDArray:
        """`count` mean images (count, h, w, c) decoded from draws of the standard normal prior; by
        a conditional model of these labels, or else of each class in turn. Raises InputError on a
        count below 1 and on labels that do not fit."""
        check_seed(seed)
        check_count("count", count)
        rng = np.random.default_rng([seed, SAMPLING_STREAM])
        if self.classes and labels is None:
            labels = np.arange(count) % self.classes
        return self.decode(rng.standard_normal((count, self.latent)), labels)


SAMPLING_STREAM, INITIALIZATION_STREAM = 3, 4
"""Of NumPy's generator, as are the streams in data/: numbered apart from those of ops/philox.py."""
MODELS = {model.kind: model for model in (Autoencoder, VAE)}


def model_from_config(config: dict[str, Any]) -> Autoencoder:
    """The model that `Autoencoder.config` described; InputError if the description is not one."""
    try:
        return MODELS[config["model"]](
            [layer_from_config(layer) for layer in config["encoder"]],
            [layer_from_config(layer) for layer in config["decoder"]],
            Objective(**config["objective"]),
            tuple(config["image_shape"]),
            initialization=config["initialization"],
            seed=config["seed"],
            **({"head": config["head"]} if "head" in config else {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a model's configuration: {error}") from None


class _Memory:
    """Every array that batches of up to `batch` rows need, but for parameters."""

    def __init__(self, model: Autoencoder, batch: int) -> None:
        backend, dtype, d = model.backend, model.dtype, model.latent
        draws = batch * model.objective.samples
        by_draws = model.objective.by_draws
        self.batch = batch
        self.x = backend.zeros((batch, model.pixels), dtype)
        self.onehot = backend.zeros((batch, model.classes), dtype)
        self.encoder = Buffers(model.encoder, backend, batch, dtype)
        self.decoder = Buffers(model.decoder, backend, draws, dtype)
        self.z = backend.zeros((draws, d), dtype)
        self.dz = backend.zeros((draws, d), dtype)
        self.kl = backend.zeros((batch, 0 if by_draws else d), dtype)
        self.kl_weight = backend.zeros((self.kl.shape[1],), dtype)
        self.log_ratio = backend.zeros((draws if by_draws else 0,), dtype)
        self.weights = backend.zeros((draws if by_draws else 0,), dtype)
        self.reconstruction = backend.zeros((batch,), dtype)
        self.variance = backend.zeros((1,), dtype)
        self.passes: dict[tuple[int, int], ModelPass] = {}


class ModelPass:
    """A model bound to the memory of one batch size. `x` (rows, pixels) is where the batch goes,
    `onehot` (rows, classes) its labels; `code` (rows draws, d) is the decoder's input."""

    def __init__(
        self,
        model: Autoencoder,
        parameters: Parameters,
        memory: _Memory,
        rows: int,
        draws: int,
    ) -> None:
        self.model, self.backend, self.rows = model, model.backend, rows
        self.x, self.onehot = memory.x[:rows], memory.onehot[:rows]
        self.reconstruction = memory.reconstruction[:rows]
        self.kl, self.kl_weight = memory.kl[:rows], memory.kl_weight
        self.variance = memory.variance
        images = self.x.reshape(rows, *model.image_shape)
        self.encoder = Pass(
            *(model.encoder, self.backend, parameters, memory.encoder, images), onehot=self.onehot
        )
        if model.latent:
            self.code, dcode = memory.z[: rows * draws], memory.dz[: rows * draws]
            below = IDENTITY
        else:
            self.code, dcode = self.encoder.output, self.encoder.output_gradient
            below = self.encoder.output_activation
        self.by_draws = model.objective.by_draws
        self.logvar_factor = model.logvar_factor
        self.log_ratio = memory.log_ratio[: rows * draws]
        self.weights = memory.weights[: rows * draws]
        self.dcode = dcode
        self.decoder = Pass(
            *(model.decoder, self.backend, parameters, memory.decoder, self.code, dcode, below),
            onehot=self.onehot,
        )
        # They come after all input gradients, since the optimizer may change the weights with them.
        self.weight_gradient_calls = [
            *self.decoder.weight_gradient_calls,
            *self.encoder.weight_gradient_calls,
        ]

    def forward(
        self,
        noise: Noise,
        schedule: Any,
        state: Any,
        totals: Any,
        objective: Objective | None = None,
    ) -> None:
        """From `x` to the loss, which is added to `totals`, and its gradient at the decoder's
        output. The loss is the model's objective unless another is given."""
        objective = objective or self.model.objective
        calls = list(self.encoder.forward_calls)
        if self.by_draws:
            scaled = (self.log_ratio, self.logvar_factor, noise, state)
            arguments = (self.encoder.output, self.code, *scaled)
            calls.append(Call("importance_latent_forward", arguments))
        elif self.model.latent:
            drawn = (self.encoder.output, self.code, self.kl, noise, state)
            calls.append(Call("latent_forward", drawn))
        calls += self.decoder.forward_calls
        calls += self._bound() if self.by_draws else self._reconstruction_loss(objective)
        self.backend.sequence(*calls, self._totals(objective, schedule, state, totals))

    def mean_loss(self, noise: Noise) -> float:
        """The mean loss of the rows in `x`, at the objective's final beta."""
        schedule = np.zeros((1, SCHEDULE_COLUMNS), self.model.dtype)
        schedule[0, BETA] = self.model.objective.beta
        totals = self.backend.zeros((TOTALS_SIZE,), np.float64)
        state = self.backend.asarray(new_state())
        self.forward(noise, self.backend.asarray(schedule), state, totals)
        return float(self.backend.to_numpy(totals)[LOSS]) / self.rows

    def _totals(self, objective: Objective, schedule: Any, state: Any, totals: Any) -> Call:
        """The loss from its terms, added to `totals`, and the weight of each KL."""
        terms = (self.reconstruction, self.kl, schedule, state)
        if objective.capacity and self.model.latent:
            bounds = (objective.capacity, objective.capacity_steps)
            return Call("capacity_totals", (*terms, *bounds, self.kl_weight, totals))
        return Call("elbo_totals", (*terms, objective.free_bits, self.kl_weight, totals))

    def _bound(self) -> list[Call]:
        """The loss and its gradient where both come from draws alone."""
        logits, dlogits = self.decoder.output, self.decoder.output_gradient
        shape = (len(self.code), self.x.shape[1])
        arguments = (self.log_ratio, self.weights, self.reconstruction, dlogits.reshape(shape))
        importance = self.model.objective.estimator == "importance"
        scaled = (*arguments, 1 / self.rows, importance)
        loss = Call("importance_loss", (logits.reshape(shape), self.x, *scaled))
        return [loss, *self.decoder.carry_output_gradient()]

    def _reconstruction_loss(self, objective: Objective) -> list[Call]:
        """The loss and its gradient before the activation that made the output."""
        output = self.decoder.output.reshape(self.x.shape)
        doutput = self.decoder.output_gradient.reshape(self.x.shape)
        arguments = (output, self.x, self.reconstruction, doutput, 1 / self.rows)
        if objective.likelihood == "bernoulli":
            loss = Call("bernoulli_loss", arguments)
            return [loss, *self.decoder.carry_output_gradient()]
        weight, activation = objective.error_weight, self.decoder.output_activation
        calls = [Call("squared_error_loss", (*arguments, weight, activation))]
        if objective.calibrated:
            written = (self.reconstruction, doutput, self.variance)
            calls.append(Call("calibrate_gaussian", written))
        return calls

    def input_gradients(self, noise: Noise, state: Any) -> None:
        """The gradient at every layer's output, after `forward` with the same noise and state."""
        calls = list(self.decoder.input_gradient_calls)
        if self.by_draws:
            weighted = (self.encoder.output, self.dcode, self.weights, self.encoder.output_gradient)
            factors = (1 / self.rows, self.logvar_factor, noise, state)
            calls.append(Call("importance_latent_backward", (*weighted, *factors)))
            calls += self.encoder.carry_output_gradient()
        elif self.model.latent:
            upstream = (self.encoder.output, self.dcode, self.kl_weight)
            arguments = (*upstream, self.encoder.output_gradient, noise, state)
            calls.append(Call("latent_backward", arguments))
            calls += self.encoder.carry_output_gradient()
        self.backend.sequence(*calls, *self.encoder.input_gradient_calls)

    def backward(self, noise: Noise, state: Any) -> None:
        """All parameter gradients, after `forward` with the same noise and state."""
        self.input_gradients(noise, state)
        gradients = self.model.parameters.flat["gradients"]
        self.backend.weight_gradients(self.weight_gradient_calls, gradients)

    def named_tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor of the step in the order in which it is computed, for a search for the
        first that is not finite."""
        yield "batch", self.x
        yield from self.model.parameters.values.items()
        for network in (self.encoder, self.decoder):
            if network is self.decoder and self.model.latent:
                yield "latent z", self.code
                yield (
                    ("log p(z) - log q(z|x)", self.log_ratio) if self.by_draws else ("KL", self.kl)
                )
            for stage in network.stages:
                yield f"output of {stage.name} ({stage.layer.kind})", stage.y
        yield "reconstruction loss", self.reconstruction
