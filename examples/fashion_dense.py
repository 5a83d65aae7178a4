"""A small dense VAE on Fashion-MNIST: Bernoulli likelihood on logits, 10 latent dimensions.

    python examples/fashion_dense.py --data fashion-mnist

Look at class_reconstructions.png: shape and shade survive ten numbers, prints and seams do not.
"""

from common import run, train_and_draw

from minivae import VAE, Adam, Dense, Flatten, Objective, ReLU, Reshape, Training


def build(seed: int = 0) -> VAE:
    """784-128-(10 + 10)-128-784. The decoder ends in logits: the likelihood takes the sigmoid."""
    encoder = [Flatten(), Dense(128), ReLU(), Dense(2 * 10)]
    decoder = [Dense(128), ReLU(), Dense(784), Reshape((28, 28, 1))]
    return VAE(encoder, decoder, Objective("bernoulli"), (28, 28, 1), seed=seed)


TRAINING = Training(epochs=100, batch_size=512, optimizer=Adam(lr=1e-3))

if __name__ == "__main__":
    run(lambda: train_and_draw("fashion-dense", __doc__, "fashion-mnist", build, TRAINING))
