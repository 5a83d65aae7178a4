"""A plain convolutional autoencoder on MNIST: no distribution, no KL, only reconstruction.

    python examples/mnist_conv_ae.py --data mnist

Look at pictures/step_*.png, one every 50 steps: blobs, then strokes, then the digit. The tanh
output reaches below 0, where no pixel is; what is drawn is clipped.
"""

from common import run, train_and_draw

from minivae import Autoencoder, Conv2d, ConvTranspose2d, LeakyReLU, Objective, Tanh, Training


def build(seed: int = 0) -> Autoencoder:
    """28, 14, 7, 4, 2 pixels on the way down, and the same sizes back up."""
    encoder, decoder = [], []
    for channels in (16, 32, 64, 128):
        encoder += [Conv2d(channels, 3, stride=2, padding=1), LeakyReLU(0.2)]
    for channels, size in ((64, 4), (32, 7), (16, 14)):
        transposed = ConvTranspose2d(channels, 3, stride=2, padding=1, output_size=(size, size))
        decoder += [transposed, LeakyReLU(0.2)]
    decoder += [ConvTranspose2d(1, 3, stride=2, padding=1, output_size=(28, 28)), Tanh()]
    return Autoencoder(encoder, decoder, Objective("squared-error"), (28, 28, 1), seed=seed)


TRAINING = Training(epochs=4, steps=3000, batch_size=64, log_every=10, picture_every=50)

if __name__ == "__main__":
    run(lambda: train_and_draw("mnist-conv-ae", __doc__, "mnist", build, TRAINING))
