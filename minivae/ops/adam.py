"""Adam (Kingma & Ba 2015, algorithm 1) and AdamW (Loshchilov & Hutter 2019, algorithm 2).

With the gradient g of step t = 1, 2, ...:

    E1    m <- m + (1 - beta1) (g - m)                               running mean
    E2    v <- v + (1 - beta2) (g^2 - v)                             running uncentred variance
    E3    p <- p - [lr / (1 - beta1^t)] m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

Both moments start at zero. After t steps m = (1 - beta1) sum_{s<=t} beta1^(t-s) g_s, whose weights
sum to 1 - beta1^t instead of 1, and likewise v with beta2. E3 corrects this bias: it divides m by
1 - beta1^t and sqrt(v) by sqrt(1 - beta2^t). (If v starts at `Adam.second_moment`, this correction
is not exact.) Kingma & Ba's section 2 also has a form with fewer operations, whose epsilon is added
to the uncorrected sqrt(v) (`Adam.epsilon_hat`):

    E3'   p <- p - [lr sqrt(1 - beta2^t) / (1 - beta1^t)] m / (sqrt(v) + epsilon_hat)

AdamW shrinks the weights directly, before E3, instead of adding weight_decay p to g, where it would
be divided by sqrt(v):

    E4    p <- (1 - lr weight_decay) p                               (Adam: weight_decay = 0)

which is PyTorch's weight_decay; the paper's lambda is weight_decay times the unscheduled rate. The
numbers that depend on t are a row of the schedule (state.py).

**Clipping by global norm** (Pascanu et al. 2013) scales the gradient of all parameters at once:

    E5    g <- g min(1, max_norm / |g|)
"""

import numpy as np
from numpy.typing import NDArray

from .state import DECAY, FAILED, INDEX, ROOT, STEP_SIZE


def adam_update(
    p: NDArray,
    g: NDArray,
    m: NDArray,
    v: NDArray,
    schedule: NDArray,
    state: NDArray,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """E1 to E4 on flat buffers, unless the step failed.

    Shapes: p, g, m and v (size,), schedule (steps, 5), state (5,).
    """
    if state[FAILED]:
        return
    row = schedule[state[INDEX]]
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    p *= row[DECAY]
    p -= row[STEP_SIZE] * m / (np.sqrt(v) / row[ROOT] + epsilon)


def clip_gradient(g: NDArray, max_norm: float, norm: NDArray) -> None:
    """E5 in place. Shapes: g (size,), all parameters' gradient; norm (1,), the |g| before E5."""
    norm[0] = np.sqrt(np.sum(np.square(g, dtype=np.float64)))
    if norm[0] > max_norm:
        g *= max_norm / norm[0]
