"""The convolutional VAE of mnist_conv.py with 20 latent dimensions, seen class by class.

    python examples/mnist_class.py --data mnist

Look at class_reconstructions.png (two digits of each class beside their reconstructions), at
latent_means.png and latent_logvars.png (their principal components, coloured by class: the means
separate the classes, the log-variances say where the encoder is sure), and at samples.png (25
draws from the prior).
"""

from common import run, train_and_draw
from mnist_conv import TRAINING
from mnist_conv import build as build_convolutional

from minivae import VAE


def build(seed: int = 0) -> VAE:
    """Those layers, with a wider latent."""
    return build_convolutional(seed, latent=20)


if __name__ == "__main__":
    run(lambda: train_and_draw("mnist-class", __doc__, "mnist", build, TRAINING))
