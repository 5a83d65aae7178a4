"""A dense VAE on MNIST: squared error through a sigmoid, 50 latent dimensions.

    python examples/mnist_dense.py --data mnist

Look at traversals.png: each latent dimension moves one property of the digit, and those beyond the
first dozen move nothing (kl_per_dimension.png), since their KL would cost more than they explain.
"""

from common import run, train_and_draw

from minivae import VAE, Adam, Dense, Flatten, Objective, ReLU, Reshape, Sigmoid, Training


def build(seed: int = 0) -> VAE:
    """784-512-256-(50 + 50), and back."""
    encoder = [Flatten(), Dense(512), ReLU(), Dense(256), ReLU(), Dense(2 * 50)]
    decoder = [
        *(Dense(256), ReLU(), Dense(512), ReLU()),
        *(Dense(784), Sigmoid(), Reshape((28, 28, 1))),
    ]
    return VAE(encoder, decoder, Objective("squared-error"), (28, 28, 1), seed=seed)


TRAINING = Training(epochs=20, batch_size=64, optimizer=Adam(lr=1e-3, weight_decay=0.01))

if __name__ == "__main__":
    run(lambda: train_and_draw("mnist-dense", __doc__, "mnist", build, TRAINING))
