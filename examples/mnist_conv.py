"""A convolutional VAE on MNIST: half the squared error, 16 latent dimensions.

    python examples/mnist_conv.py --data mnist

Look at samples.png: most draws from the prior are digits, and those between two are plausible.
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


def build(seed: int = 0, latent: int = 16) -> VAE:
    """Two strided convolutions to 7 x 7 x 64 and a dense head; three transposed ones back."""
    encoder = [
        *(Conv2d(32, 3, stride=2, padding=1), ReLU()),  # 28 to 14
        *(Conv2d(64, 3, stride=2, padding=1), ReLU()),  # 14 to 7
        *(Flatten(), Dense(2 * latent)),
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
    run(lambda: train_and_draw("mnist-conv", __doc__, "mnist", build, TRAINING))
