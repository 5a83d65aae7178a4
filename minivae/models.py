"""Autoencoder and VAE: an encoder, a latent, a decoder and an objective, trained by hand-derived
gradients on any backend.

A model is built in two steps: `to` picks the backend and gives it parameters, `bind` takes all the
memory that a batch needs. Both happen by themselves at the first use that needs them.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import backends
from .backends.reference import ReferenceBackend
from .data.dataset import as_array, checked_pixels, unit_pixels
from .errors import InputError, check_choice, check_count, check_is, check_seed
from .layers import INITIALIZATIONS, JoinLabel, Layer, Shape, Sigmoid, layer_from_config
from .model_pass import INFERENCE_BATCH, ModelBuffers, ModelPass
from .network import VIEWS, Network
from .objective import SMALLEST_SIGMA, Objective
from .ops.activations import sigmoid
from .ops.batch import BINARIZATIONS
from .ops.elbo import KL, LOSS, RECONSTRUCTION, TOTALS_SIZE
from .ops.philox import EVALUATION_BINARIZATION_STREAM, EVALUATION_STREAM, Noise
from .ops.state import BETA, CAPACITY, FAILED, SCHEDULE_COLUMNS, new_state
from .params import Parameters

HEADS = {"logvar": 1.0, "log-sigma": 2.0}
"""What the second half of an encoder's head may be, with its factor to the log-variance."""


def check_image_shape(shape: Any) -> None:
    """Raises InputError unless `shape` is (height, width, channels)."""
    sizes = shape if isinstance(shape, tuple | list) and len(shape) == 3 else (0,)
    if not all(isinstance(size, numbers.Integral) and int(size) >= 1 for size in sizes):
        raise InputError(f"image_shape is {shape!r}, expected (height, width, channels)")


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
        if all(isinstance(layer, VIEWS) for layer in (*encoder, *decoder)):
            raise InputError("the model computes nothing: expected more than Flatten and Reshape")
        check_choice("initialization", initialization, INITIALIZATIONS)
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
        self._memory: ModelBuffers | None = None

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
        words = objective.reconstruction_in_words + "; mean per image"
        words = str(objective) if self.latent else words
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
        """Moves the model to a device by name ("auto", "cpu", ...) or to a backend object, in a
        `dtype` that the backend computes in. Parameters, moments and sigma come along; the first
        call makes initial ones. Returns the model.

        Raises InputError on an unknown device, one that does not work here, or another dtype.
        """
        check_is("device", device, str, ReferenceBackend)
        backend = backends.get(device) if isinstance(device, str) else device
        check_choice(f"dtype on {backend.name}", np.dtype(dtype).name, backend.dtypes)
        shapes = self.encoder.parameter_shapes() | self.decoder.parameter_shapes()
        parameters, sigma = Parameters(shapes, backend, dtype), backend.zeros((1,), dtype)
        before, before_sigma, former = self._parameters, self._sigma, self._backend
        self._parameters, self._sigma, self._memory = parameters, sigma, None
        self._backend, self.dtype = backend, np.dtype(dtype)
        if before is None or former is None:
            rng = np.random.default_rng([self.seed, INITIALIZATION_STREAM])
            for network in (self.encoder, self.decoder):
                for name, value in network.initial_values(self.initialization, rng).items():
                    self._assign(parameters.values[name], value)
        else:
            for kind in ("values", "first_moments", "second_moments"):
                self._assign(parameters.flat[kind], former.to_numpy(before.flat[kind]))
            self._assign(sigma, former.to_numpy(before_sigma))
        return self

    def _assign(self, array: Any, value: NDArray) -> None:
        self.backend.assign(array, np.asarray(value, self.dtype))

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
                "output_bias: expected logits from a dense layer, with a bias for each pixel"
            )
        clipped = np.clip(mean.reshape(-1), 0.001, 0.999)
        self._assign(bias, np.log(clipped / (1 - clipped)))

    def bind(self, rows: int, *, one_draw: bool = False) -> "ModelPass":
        """The model bound to memory for a batch of `rows` with the objective's draws of z for each,
        or with one; allocates it if there is too little."""
        parameters = self.parameters
        draws = 1 if one_draw else self.objective.samples
        memory = self._memory
        if memory is None or memory.rows < rows or memory.draws < rows * draws:
            self._memory = memory = ModelBuffers(self, rows, rows * draws)
        key = rows, draws
        if key not in memory.passes:
            memory.passes[key] = ModelPass(self, parameters, memory, rows, draws)
        return memory.passes[key]

    # Inference

    def _chunks(self, rows: int, most: int = INFERENCE_BATCH) -> Iterator[slice]:
        for first in range(0, rows, most):
            yield slice(first, min(first + most, rows))

    def unit_images(self, images: ArrayLike) -> NDArray[np.float32]:
        """Images (n, h, w, c) in [0, 1] as float32, from what `checked_images` takes."""
        return unit_pixels(self.checked_images(images))

    def checked_images(self, images: ArrayLike) -> NDArray:
        """Images (n, h, w, c) as they are, uint8 or float32, from (n, h, w, c) or, with one
        channel, (n, h, w), in what `checked_pixels` takes.

        Raises InputError on any other shape, type or range.
        """
        array = as_array(images, "images")
        if array.shape[1:] == self.image_shape[:2] and self.image_shape[2] == 1:
            array = array[..., None]
        if array.shape[1:] != self.image_shape:
            raise InputError(
                f"images have shape {array.shape}, the model takes (n, "
                + ", ".join(map(str, self.image_shape))
                + ")"
            )
        return checked_pixels(array, "data")

    def checked_labels(self, labels: ArrayLike | None, rows: int) -> NDArray[np.int64] | None:
        """The labels (rows,) that a conditional model needs, from as many or from one for all; None
        for a model that is not conditional.

        Raises InputError if they are missing, of another shape, or not among the classes.
        """
        if not self.classes:
            return None
        expected = f"a conditional model takes an integer label of 0 to {self.classes - 1}"
        if labels is None:
            raise InputError(f"{expected} for each image, got none")
        array = as_array(labels, "labels")
        if array.shape not in ((), (rows,)) or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{expected} for each of {rows} images, got {array.dtype} of shape {array.shape}"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.classes:
            least, largest = array.min(), array.max()
            found = least if least == largest else f"{least} to {largest}"
            raise InputError(f"{expected}, got {found}")
        return np.array(np.broadcast_to(array, rows), np.int64)

    def by_chunks(
        self, rows: int, labels: ArrayLike | None, run: Callable[[ModelPass, slice], Any]
    ) -> list[NDArray]:
        """What `run(model_pass, chunk)` returns for each chunk of rows, as NumPy arrays. The
        chunk's labels are in `model_pass.onehot` by then."""
        checked = self.checked_labels(labels, rows)
        outputs = []
        for chunk in self._chunks(rows):
            model_pass = self.bind(chunk.stop - chunk.start, one_draw=True)
            if checked is not None:
                self._assign(model_pass.onehot, np.eye(self.classes)[checked[chunk]])
            outputs.append(self.backend.to_numpy(run(model_pass, chunk)))
        return outputs

    def _encoded(self, images: ArrayLike, labels: ArrayLike | None) -> NDArray:
        pixels = self.unit_images(images)

        def run(model_pass: ModelPass, chunk: slice) -> Any:
            self._assign(model_pass.x, pixels[chunk].reshape(model_pass.x.shape))
            model_pass.encoder.forward()
            return model_pass.encoder.output

        none = np.empty((0, *self.encoder.output_shape), self.dtype)
        return np.concatenate([none, *self.by_chunks(len(pixels), labels, run)])

    def encode(self, images: ArrayLike, labels: ArrayLike | None = None) -> Any:
        """The codes (n, *code_shape) of images (n, h, w, c).

        Here as elsewhere, `labels` are (n,), or one for all images: a conditional model needs them,
        others ignore them. Raises InputError on images or labels that do not fit.
        """
        return self._encoded(images, labels)

    def decode(self, codes: ArrayLike, labels: ArrayLike | None = None) -> NDArray:
        """The mean images (n, h, w, c) of codes (n, *code_shape). Raises InputError on codes or
        labels of another shape."""
        array = as_array(codes, "codes", self.dtype)
        if array.shape[1:] != self.code_shape:
            expected = ", ".join(map(str, ("n", *self.code_shape)))
            raise InputError(f"codes have shape {array.shape}, expected ({expected})")

        def run(model_pass: ModelPass, chunk: slice) -> Any:
            self._assign(model_pass.code, array[chunk])
            model_pass.decoder.forward()
            return model_pass.decoder.output

        none = np.empty((0, *self.decoder.output_shape), self.dtype)
        outputs = np.concatenate([none, *self.by_chunks(len(array), labels, run)])
        images = outputs.reshape(-1, *self.image_shape)
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
        images: NDArray,
        labels: ArrayLike | None = None,
        *,
        seed: int = 0,
        binarization: str = "none",
    ) -> float:
        """Sets and returns the sigma, in units of a pixel, that makes training images (n, h, w, c)
        most likely, with one draw of z each (calibration.E2). Arguments as for `evaluate`.

        Raises InputError if the objective's likelihood is not calibrated, or the images are
        reproduced exactly.
        """
        if not self.objective.calibrated:
            raise InputError(f"likelihood is {self.objective.likelihood!r}: nothing to calibrate")
        squares = Objective("squared-error")
        options: Any = {"seed": seed, "binarization": binarization, "objective": squares}
        error = self.evaluate(images, labels, **options)
        sigma = math.sqrt(error["reconstruction"] / self.pixels)
        if sigma <= SMALLEST_SIGMA:
            raise InputError(
                "no sigma is most likely: the decoder reproduces the training images exactly; "
                "expected other images, or --likelihood gaussian --sigma X"
            )
        self._assign(self._sigma, np.array([sigma]))
        return sigma

    def evaluate(
        self,
        images: NDArray,
        labels: ArrayLike | None = None,
        *,
        seed: int = 0,
        binarization: str = "none",
        objective: Objective | None = None,
    ) -> dict[str, float]:
        """The mean loss, reconstruction and KL of images (n, h, w, c) in the objective's units
        (nats, or weighted squared error). Estimators by draws ("monte-carlo", "importance") give
        the loss alone, plain autoencoders no KL.

        The images are uint8 or float in [0, 1]; `binarization` is one of BINARIZATIONS
        (ops/batch.py). `objective` replaces `final_objective`: it must keep the model's estimator,
        samples and kind of output (logits or pixels). Free bits and a capacity apply to the mean KL
        of each chunk of INFERENCE_BATCH images. Every mean is infinite if the loss of any image is
        not finite.

        Raises InputError on images or labels that do not fit or are missing, on an unknown
        binarization, on an objective or seed that does not fit, and before `calibrate` where that
        is needed.
        """
        check_choice("binarization", binarization, BINARIZATIONS)
        check_seed(seed)
        objective = objective or self.final_objective
        self._check_objective(objective)
        pixels = self.checked_images(images)
        backend, rows = self.backend, len(pixels)
        if not rows:
            raise InputError("no images to evaluate, expected at least one")
        resident = backend.asarray(pixels.reshape(rows, -1))
        order = backend.asarray(np.arange(rows))
        checked = self.checked_labels(labels, rows)
        resident_labels = None if checked is None else backend.asarray(checked)
        most = max(1, INFERENCE_BATCH // self.objective.samples)
        sizes = [chunk.stop - chunk.start for chunk in self._chunks(rows, most)]
        schedule = np.zeros((len(sizes), SCHEDULE_COLUMNS))
        schedule[:, BETA], schedule[:, CAPACITY] = objective.beta, objective.capacity
        schedule = backend.asarray(schedule.astype(self.dtype))
        totals, state = backend.zeros((TOTALS_SIZE,), np.float64), backend.asarray(new_state())
        noise = Noise(seed, EVALUATION_STREAM)
        binarization_noise = Noise(seed, EVALUATION_BINARIZATION_STREAM)

        def run(size: int) -> None:
            model_pass = self.bind(size)
            drawn = (model_pass.x, binarization, binarization_noise)
            backend.gather_batch(resident, order, state, *drawn)
            if resident_labels is not None:
                backend.gather_labels(resident_labels, order, state, model_pass.onehot)
            calls = model_pass.forward_calls(noise, schedule, state, totals, objective)
            backend.sequence(*calls)
            backend.advance_state(state, size)

        captured = {size: backend.capture(partial(run, size)) for size in set(sizes)}
        for size in sizes:
            captured[size]()
        sums = backend.to_numpy(totals)
        if backend.to_numpy(state)[FAILED]:
            # What is not finite is not added up.
            sums = np.full(TOTALS_SIZE, np.inf)
        return self.means(sums, rows, objective)

    def _check_objective(self, objective: Objective) -> None:
        """Raises InputError unless the layers and draws of the model's own can compute it."""
        check_is("objective", objective, Objective)
        given, own = (
            (of.likelihood == "bernoulli", of.estimator, of.samples)
            for of in (objective, self.objective)
        )
        if given != own:
            raise InputError(
                f"objective is {objective}: expected the model's estimator and samples, and a "
                "likelihood that takes what its decoder makes, logits or pixels"
            )

    def means(
        self, totals: NDArray, images: int, objective: Objective | None = None
    ) -> dict[str, float]:
        """The sums `totals` (3,) of `elbo_totals` over so many `images`, as means by name, plus the
        constant of the objective (the model's own unless another is given). An estimator by draws
        gives "loss" alone, a plain autoencoder no "kl"."""
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
    log-variances, of a diagonal Gaussian q(z|x); the decoder takes a z drawn from it.

    Arguments as for `Autoencoder`; the encoder must end in 2 d numbers for d latent dimensions.
    `head` says what the last d are: "logvar", or, with the estimators "monte-carlo" and
    "importance" only, "log-sigma".
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
        check_choice("head", head, HEADS)
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
            raise InputError("the encoder computes nothing: expected more than Flatten and Reshape")
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
        """`count` mean images (count, h, w, c) decoded from draws of the standard normal prior. A
        conditional model takes `labels`, (count,) or one for all; without them it draws each class
        in turn. Raises InputError on a count below 1 and on labels that do not fit."""
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
