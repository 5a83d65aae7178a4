"""The presets: a model by name, and how it is trained.

Each but `glyphs` is a published or widely used set-up. All drop the last partial training batch.
Except for the two of the IWAE paper they use PyTorch's default initialisation, and one draw of the
latent per image if they are VAEs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import (
    InputError,
    check_choice,
    check_count,
    check_is,
    check_kinds,
    check_seed,
    check_settings,
    unknown,
)
from .layers import (
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    JoinLabel,
    Layer,
    LeakyReLU,
    ReLU,
    Reshape,
    Shape,
    Sigmoid,
    Tanh,
)
from .models import VAE, Autoencoder, check_image_shape
from .network import Network
from .objective import Objective
from .ops.batch import BINARIZATIONS
from .optim import Adam


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    `validation` training images, drawn by the seed, are held out: the best checkpoint is the one
    with the lowest loss on them. A run ends after `steps`, or after `epochs` where `steps` is 0, or
    earlier if the validation loss has not improved for `patience` epochs (0: never). `keep_last`
    also trains on the last, partial batch of an epoch; without `shuffle` every epoch keeps the
    order of the data; `images` limits training to the first so many (0: all). `binarization` is one
    of BINARIZATIONS (ops/batch.py). A batch goes through the model in `accumulate` equal parts, one
    after another, to need less memory, down to what inference needs (INFERENCE_BATCH); their
    gradients make one update (dense.E5), and each part has its own noise, free bits, capacity and
    calibrated variance. With `output_bias` the last bias starts at the logits of the training
    images' mean, clipped to [0.001, 0.999]. Metrics and checkpoints are written each epoch, and
    also every `log_every` and `checkpoint_every` steps; every `picture_every` steps `fit` calls
    `on_step`, with which the command line draws pictures (0: never, for all three).

    Raises InputError on a value out of its range, and on settings that do not go together.
    """

    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Adam = field(default_factory=Adam)
    binarization: str = "none"
    seed: int = 0
    steps: int = 0
    patience: int = 0
    keep_last: bool = False
    shuffle: bool = True
    images: int = 0
    validation: int = 0
    output_bias: bool = False
    log_every: int = 0
    picture_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        check_is("optimizer", self.optimizer, Adam)
        checks = {
            name: (getattr(self, name) >= 1, "1 or above")
            for name in ("epochs", "batch_size", "accumulate")
        }
        not_negative = (
            *("steps", "patience", "images", "validation"),
            *("log_every", "picture_every", "checkpoint_every"),
        )
        checks |= {name: (getattr(self, name) >= 0, "0 or above") for name in not_negative}
        check_settings(self, checks)
        check_seed(self.seed)
        check_choice("binarization", self.binarization, BINARIZATIONS)
        if self.batch_size % self.accumulate or (self.keep_last and self.accumulate > 1):
            raise InputError(
                f"accumulate is {self.accumulate}, expected a divisor of the batch size "
                f"{self.batch_size}, and keep_last off"
            )
        if self.patience and not self.validation:
            raise InputError(
                f"patience is {self.patience} without validation images: expected validation above "
                "0, since test images must not choose when to stop"
            )


def training_from_config(config: dict[str, Any]) -> Training:
    """The training that `dataclasses.asdict` described; InputError if the description is none."""
    try:
        return Training(**{**config, "optimizer": Adam(**config["optimizer"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a training configuration: {error}") from None


Build = Callable[[Shape, int, Sequence[int], Objective, int], Autoencoder]


@dataclass(frozen=True)
class Preset:
    """A named model and its training. `hidden` is empty where the architecture is fixed, `latent`
    is 0 for a plain autoencoder."""

    summary: str
    data: str
    build: Build
    objective: Objective
    training: Training
    latent: int
    hidden: tuple[int, ...] = ()

    def model(
        self,
        image_shape: Shape = (28, 28, 1),
        *,
        latent: int | None = None,
        hidden: Sequence[int] = (),
        beta: float | None = None,
        samples: int | None = None,
        seed: int | None = None,
        classes: int = 0,
    ) -> Autoencoder:
        """The model for images of `image_shape`, with what is given instead of the preset's own
        latent dimensions, hidden units, KL weight, draws of z for each image and seed; conditional
        on a label if there are `classes`. Raises InputError on what the preset does not have, or
        where the layers do not fit the images."""
        check_image_shape(image_shape)
        if latent is not None:
            check_count("latent", latent)
        if latent is not None and not self.latent:
            raise InputError("latent: this preset's code is fixed by its convolutions")
        check_is("hidden", hidden, list, tuple)
        if hidden and not self.hidden:
            raise InputError("hidden: this preset has convolutions, not hidden dense layers")
        objective = self.objective
        if beta is not None:
            objective = dataclasses.replace(objective, beta=beta)
        if samples is not None:
            objective = dataclasses.replace(objective, samples=samples)
        model = self.build(
            tuple(image_shape),
            latent or self.latent,
            tuple(hidden) or self.hidden,
            objective,
            self.training.seed if seed is None else seed,
        )
        return conditional(model, classes) if classes else model


def conditional(model: Autoencoder, classes: int) -> VAE:
    """The VAE with a label of `classes` joining before the encoder's first dense layer and at the
    decoder's input. InputError for a plain autoencoder."""
    if not isinstance(model, VAE):
        raise InputError("conditional: this preset is a plain autoencoder, expected a VAE")
    join, encoder = JoinLabel(classes), model.encoder.layers
    first = next(index for index, layer in enumerate(encoder) if isinstance(layer, Dense))
    return VAE(
        [*encoder[:first], join, *encoder[first:]],
        [join, *model.decoder.layers],
        model.objective,
        model.image_shape,
        initialization=model.initialization,
        seed=model.seed,
        head=model.head,
    )


def dense_vae(
    image_shape: Shape, latent: int, hidden: Sequence[int], objective: Objective, seed: int
) -> VAE:
    """Flatten, `hidden` dense layers with ReLU, the head; the decoder mirrored."""
    encoder = [Flatten(), *_dense_layers(hidden, ReLU()), Dense(2 * latent)]
    decoder = [*_dense_layers(reversed(hidden), ReLU()), Dense(math.prod(image_shape))]
    if objective.likelihood != "bernoulli":
        decoder.append(Sigmoid())
    decoder.append(Reshape(image_shape))
    return VAE(encoder, decoder, objective, image_shape, seed=seed)


def _dense_layers(units: Iterable[int], activation: Layer) -> list[Layer]:
    return [layer for outputs in units for layer in (Dense(outputs), activation)]


def conv_vae(
    image_shape: Shape, latent: int, hidden: Sequence[int], objective: Objective, seed: int
) -> VAE:
    """Two convolutions of stride 2, a dense head; a projection and three transposed
    convolutions back (the layout of MATLAB's "Train Variational Autoencoder (VAE) to Generate
    Images")."""
    encoder: list[Layer] = [
        *(Conv2d(32, 3, stride=2, padding=1), ReLU()),
        *(Conv2d(64, 3, stride=2, padding=1), ReLU()),
    ]
    half, quarter = (Network("", encoder, image_shape).shapes[i] for i in (1, 3))
    decoder: list[Layer] = [
        *(Dense(quarter[0] * quarter[1] * 64), Reshape((quarter[0], quarter[1], 64))),
        *(ConvTranspose2d(64, 3, stride=2, padding=1, output_size=half[:2]), ReLU()),
        *(ConvTranspose2d(32, 3, stride=2, padding=1, output_size=image_shape[:2]), ReLU()),
        ConvTranspose2d(image_shape[2], 3, padding=1),
    ]
    if objective.likelihood != "bernoulli":
        decoder.append(Sigmoid())
    return VAE([*encoder, Flatten(), Dense(2 * latent)], decoder, objective, image_shape, seed=seed)


def conv_autoencoder(
    image_shape: Shape, latent: int, hidden: Sequence[int], objective: Objective, seed: int
) -> Autoencoder:
    """Four convolutions of stride 2 and four transposed ones back, leaky ReLU 0.2, tanh output
    unless that is logits."""
    encoder: list[Layer] = []
    for channels in (16, 32, 64, 128):
        encoder += [Conv2d(channels, 3, stride=2, padding=1), LeakyReLU(0.2)]
    shapes = Network("", encoder, image_shape).shapes
    decoder: list[Layer] = []
    for index, channels in ((6, 64), (4, 32), (2, 16)):
        size = shapes[index][:2]
        decoder += [
            ConvTranspose2d(channels, 3, stride=2, padding=1, output_size=size),
            LeakyReLU(0.2),
        ]
    size = image_shape[:2]
    decoder.append(ConvTranspose2d(image_shape[2], 3, stride=2, padding=1, output_size=size))
    if objective.likelihood != "bernoulli":
        decoder.append(Tanh())
    return Autoencoder(encoder, decoder, objective, image_shape, seed=seed)


def iwae_paper_model(
    image_shape: Shape, latent: int, hidden: Sequence[int], objective: Objective, seed: int
) -> VAE:
    """Flatten, `hidden` dense layers with tanh, a head of log sigma; the decoder mirrored (Burda,
    Grosse & Salakhutdinov 2016, section 5, with one stochastic layer).

    Two things differ from the authors' code: means and log sigma are one layer, whose Glorot
    bound is that of all its outputs, not of each half; and an update uses the moments after this
    step's gradient, where theirs uses those before it.
    """
    pixels = math.prod(image_shape)
    return VAE(
        [Flatten(), *_dense_layers(hidden, Tanh()), Dense(2 * latent)],
        [*_dense_layers(reversed(hidden), Tanh()), Dense(pixels), Reshape(image_shape)],
        objective,
        image_shape,
        initialization="glorot",
        seed=seed,
        head="log-sigma",
    )


IWAE_PAPER_BATCH, IWAE_PAPER_IMAGES = 20, 59_600
"""MNIST's training images but the last 400, which the authors' code holds out."""

IWAE_PAPER_PASSES = tuple(3**i for i in range(8))
IWAE_PAPER_RATES = (10, 7.2, 5.2, 3.7, 2.7, 1.9, 1.4, 1)
"""Learning rates in 1e-4, each for as many passes: 10^(1 - i/7), rounded."""

IWAE_PAPER_TRAINING = Training(
    epochs=sum(IWAE_PAPER_PASSES),
    batch_size=IWAE_PAPER_BATCH,
    binarization="stochastic",
    shuffle=False,
    images=IWAE_PAPER_IMAGES,
    output_bias=True,
    optimizer=Adam(
        lr=1e-4,
        beta1=0.99,  # the authors' code; the paper says 0.9
        # The authors sum gradients over the batch where we average them: epsilon and the second
        # moment's start, 1e-4 and 1 there, go down with the gradient and with its square.
        epsilon=1e-4 / IWAE_PAPER_BATCH,
        epsilon_hat=True,
        second_moment=1 / IWAE_PAPER_BATCH**2,
        schedule="pieces",
        pieces=tuple(zip(IWAE_PAPER_PASSES, IWAE_PAPER_RATES, strict=True)),
    ),
)


def iwae_paper(summary: str, estimator: str, samples: int) -> Preset:
    """A row of Table 1 of Burda et al. 2016."""
    return Preset(
        summary,
        data="mnist",
        build=iwae_paper_model,
        objective=Objective("bernoulli", estimator=estimator, samples=samples),
        training=IWAE_PAPER_TRAINING,
        latent=50,
        hidden=(200, 200),
    )


HALF_SQUARED_ERROR = Objective("squared-error", weight=0.5)

PRESETS: dict[str, Preset] = {
    "glyphs": Preset(
        "dense VAE on the embedded digits: the default",
        data="glyphs",
        build=dense_vae,
        objective=Objective("bernoulli"),
        training=Training(epochs=20),
        latent=20,
        hidden=(400,),
    ),
    "mnist-dense": Preset(
        "dense VAE, sum of squared error through a sigmoid",
        data="mnist",
        build=dense_vae,
        objective=Objective("squared-error"),
        training=Training(epochs=20, batch_size=64, optimizer=Adam(weight_decay=0.01)),
        latent=50,
        hidden=(512, 256),
    ),
    "fashion-dense": Preset(
        "dense VAE, Bernoulli likelihood on logits",
        data="fashion-mnist",
        build=dense_vae,
        objective=Objective("bernoulli"),
        training=Training(epochs=100, batch_size=512),
        latent=10,
        hidden=(128,),
    ),
    "mnist-conv": Preset(
        "convolutional VAE, half the sum of squared error",
        data="mnist",
        build=conv_vae,
        objective=HALF_SQUARED_ERROR,
        training=Training(epochs=30),
        latent=16,
    ),
    "mnist-conv-ae": Preset(
        "plain convolutional autoencoder, sum of squared error",
        data="mnist",
        build=conv_autoencoder,
        objective=Objective("squared-error"),
        training=Training(epochs=4, steps=3000, batch_size=64, log_every=10, picture_every=50),
        latent=0,
    ),
    "mnist-class": Preset(
        "the convolutional VAE with 20 latent dimensions, drawn class by class",
        data="mnist",
        build=conv_vae,
        objective=HALF_SQUARED_ERROR,
        training=Training(epochs=30),
        latent=20,
    ),
    "mnist-bernoulli": Preset(
        "the classic dense VAE 784-400-20, Bernoulli on greyscale",
        data="mnist",
        build=dense_vae,
        objective=Objective("bernoulli"),
        training=Training(epochs=10),
        latent=20,
        hidden=(400,),
    ),
    "iwae-paper-vae": iwae_paper("Burda et al. 2016, VAE: mean of k ELBOs", "monte-carlo", 1),
    "iwae-paper-iwae": iwae_paper("Burda et al. 2016, IWAE: bound of k draws", "importance", 50),
}


def preset(name: str) -> Preset:
    """The preset called `name`; InputError if there is none."""
    check_is("preset", name, str)
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
