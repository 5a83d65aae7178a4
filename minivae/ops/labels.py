"""A class label joins encoder and decoder: the conditional VAE (Sohn, Lee and Yan, "Learning
Structured Output Representation using Deep Conditional Generative Models", 2015).

For an image x of class y, with a prior that does not depend on the class,

    E1    log p(x|y) >= E[log p(x|z,y)] - KL(q(z|x,y) || p(z)),  z ~ q(z|x,y)

so the latent need not encode what the label says, and decoding z ~ p(z) with a chosen label draws
an image of that class. The loss and its gradient are those of elbo.py and latent.py: the label is
just one more input of both networks. One-hot over K classes,

    E2    o_k = 1 if k = y else 0

it is appended to m numbers v = f(a), f being an activation:

    E3    u = (v_1, ..., v_m, o_1, ..., o_K)
    E4    da_i = du_i f'(a_i),  i <= m          (the chain rule as in dense.E4; o is given)

A dense layer after it reads u w + b = v w_v + (w_o[y] + b): each class has a bias of its own.
"""

import numpy as np
from numpy.typing import NDArray

from .activations import Activation, activation_backward
from .state import FIRST


def gather_labels(labels: NDArray, permutation: NDArray, state: NDArray, onehot: NDArray) -> None:
    """E2 for the batch that starts at `state[FIRST]`, in the order of `batch.gather_batch`.

    Shapes: labels and permutation (images,) in int64, onehot (n, classes). A label outside of
    [0, classes) is undefined: the host checks them once.
    """
    n, first = len(onehot), int(state[FIRST])
    onehot[...] = 0
    onehot[np.arange(n), labels[permutation[first : first + n]]] = 1


def join_forward(x: NDArray, onehot: NDArray, y: NDArray) -> None:
    """E3: y = (x, onehot); the k rows of x that belong to one image share a onehot row.

    Shapes: x (n k, m), onehot (n, classes), y (n k, m + classes).
    """
    m = x.shape[1]
    y[:, :m] = x
    y.reshape(len(onehot), -1, y.shape[1])[:, :, m:] = onehot[:, None]


def join_input_gradient(dy: NDArray, x: NDArray, dx: NDArray, activation: Activation) -> None:
    """E4, for the activation that made x. Shapes: dy (n k, m + classes), x and dx (n k, m)."""
    activation_backward(None, x, dy[:, : x.shape[1]], dx, activation)
