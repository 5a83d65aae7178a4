"""A class label as input of encoder and decoder: the conditional VAE (Sohn, Lee and Yan, "Learning
Structured Output Representation using Deep Conditional Generative Models", 2015).

For an image x of class k, with a prior that does not depend on the class,

    E1    log p(x|k) >= E[log p(x|z,k)] - KL(q(z|x,k) || p(z)),  z ~ q(z|x,k)

so the latent need not encode what the label says, and decoding z ~ p(z) with a chosen label draws
an image of that class. The loss and its gradient are those of elbo.py and latent.py: the label is
just one more input of both networks. As a one-hot vector over the classes c,

    E2    o_c = 1 if c = k else 0

it is appended to m numbers v = f(a), the output of the activation f below:

    E3    u = (v_0, ..., v_{m-1}, o_0, o_1, ...)
    E4    da_i = du_i f'(a_i),  i < m           (the chain rule as in dense.E4; o is given)

With w_v the first m rows of w and w_o the others, a dense layer on u computes
u w + b = v w_v + (w_o[k] + b): each class has its own bias.
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


def join_forward(v: NDArray, onehot: NDArray, u: NDArray) -> None:
    """E3: u = (v, onehot); the rows of v that are an image's draws share a row of onehot.

    Shapes: v (n draws, m), onehot (n, classes), u (n draws, m + classes).
    """
    m = v.shape[1]
    u[:, :m] = v
    u.reshape(len(onehot), -1, u.shape[1])[:, :, m:] = onehot[:, None]


def join_input_gradient(du: NDArray, v: NDArray, da: NDArray, below: Activation) -> None:
    """E4, for the activation `below`, which made v. Shapes: du (n draws, m + classes), v and da
    (n draws, m)."""
    activation_backward(None, v, du[:, : v.shape[1]], da, below)
