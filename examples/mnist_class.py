"""The convolutional VAE with 20 latent dimensions, seen class by class.

    python examples/mnist_class.py --data mnist

Look at class_reconstructions.png (two digits of each class beside their reconstructions), at
latent_means.png and latent_logvars.png (their principal components, coloured by class: the means
separate the classes, the log-variances say where the encoder is sure), and at samples.png (25
draws from the prior).
"""

from common import run, train_and_draw

from minivae import (
    VAE,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    Objective,
    ReLU,
    Reshape,
    Sigmoid,
    Training,
)

LATENT = 20


def build(seed: int = 0) -> VAE:
    """The layers of mnist_conv.py, with a wider latent."""
    encoder = [
        *(Conv2d(32, 3, stride=2, padding=1), ReLU()),  # 28 to 14
        *(Conv2d(64, 3, stride=2, padding=1), ReLU()),  # 14 to 7
        *(Flatten(), Dense(2 * LATENT)),
    ]
    decoder = [
        *(Dense(7 * 7 * 64), Reshape((7, 7, 64))),
        *(ConvTranspose2d(64, 3, stride=2, padding=1, output_size=(14, 14)), ReLU()),
        *(ConvTranspose2d(32, 3, stride=2, padding=1, output_size=(28, 28)), ReLU()),
        *(ConvTranspose2d(1, 3, padding=1), Sigmoid()),
    ]
    return VAE(encoder, decoder, Objective("squared-error", weight=0.5), (28, 28, 1), seed=seed)


TRAINING = Training(epochs=30, batch_size=128)

if __name__ == "__main__":
    run(lambda: train_and_draw("mnist-class", __doc__, "mnist", build, TRAINING))
