"""The evidence lower bound (ELBO), as a loss to minimise, in nats per image.

A decoder p(x|z) and a prior p(z) give an image x the probability p(x), an intractable integral over
z. With any q(z|x) to draw z from, Jensen's inequality bounds its logarithm:

    E0    log p(x) = log E_q[p(x|z) p(z) / q(z|x)]
                  >= E_q[log p(x|z) + log p(z) - log q(z|x)] = ELBO(x)

Since p(x|z) p(z) = p(z|x) p(x), ELBO(x) = log p(x) - KL(q(z|x) || p(z|x)): a q that is nearer to
the true posterior tightens the bound. Regrouped,

    E1    -ELBO(x) = E_q[-log p(x|z)] + KL(q(z|x) || p(z))           (Kingma & Welling 2014, eq. 3)
                   ≈ -log p(x|z) + KL(q(z|x) || p(z)),  z ~ q(z|x)   one draw: unbiased (eq. 7)

Every reconstruction loss here sums over pixels, to one number per image; `scale`, one over the
batch size, turns the gradient into that of the batch mean. Value and gradient are computed
together, so that a kernel reads each pixel once.

**Bernoulli likelihood on logits** a, pixel x in [0, 1], white with probability sigmoid(a). Since
log sigmoid(a) = a - softplus(a), log(1 - sigmoid(a)) = -softplus(a) and softplus' = sigmoid:

    E2    -log p(x|a) = -x log sigmoid(a) - (1 - x) log(1 - sigmoid(a)) = softplus(a) - x a
                      = max(a, 0) - x a + log(1 + e^-|a|)                (no overflow, no log 0)
          ∂/∂a        = sigmoid(a) - x

**Squared error** of the output y = f(a), weighted by w (1: the sum of squares; 1/2: its half;
1 / (2 sigma^2): a Gaussian likelihood up to the constant of E4):

    E3    l     = w (y - x)^2,      ∂l/∂a = 2 w (y - x) f'(a)
    E4    -log N(x; y, sigma^2) = (y - x)^2 / (2 sigma^2) + log(2 pi sigma^2) / 2      (per pixel)

**The whole objective**, with means over a batch of n images, latent dimensions j, KL weight beta
(Higgins et al. 2017) and free bits of lambda nats per dimension (Kingma et al. 2016, "Improved
Variational Inference with Inverse Autoregressive Flow", eq. 15):

    E5    L = mean reconstruction + beta sum_j max(lambda, mean KL_j)
    E6    c_j = ∂L/∂KL_j of one image = beta / n if mean KL_j > lambda else 0

**KL annealing** (Bowman et al. 2016, "Generating Sentences from a Continuous Space", section 3.1).
Early in training the decoder ignores z, and the KL would push q(z|x) onto the prior for good
(posterior collapse). Beta therefore rises linearly over the first T steps; t counts from 0:

    E7    beta(t) = beta min(1, (t + 1) / T),      beta at once for T = 0

Within a step it is a constant, so E6 holds with beta(t). The host computes it (`Objective.beta_at`)
as a column of the schedule (state.py).
"""

import numpy as np
from numpy.typing import NDArray

from .activations import Activation, activation_backward, sigmoid, softplus
from .state import BETA, FAILED, INDEX

LOSS, RECONSTRUCTION, KL = range(3)
TOTALS_SIZE = 3


def bernoulli_loss(
    logits: NDArray, x: NDArray, loss: NDArray, dlogits: NDArray, scale: float
) -> None:
    """E2: the loss of each image and `scale` times its gradient with respect to the logits.

    Shapes: logits, x and dlogits (n, m), loss (n,).
    """
    loss[...] = np.sum(softplus(logits) - x * logits, axis=1)
    dlogits[...] = (sigmoid(logits) - x) * scale


def squared_error_loss(
    y: NDArray,
    x: NDArray,
    loss: NDArray,
    da: NDArray,
    scale: float,
    weight: float,
    activation: Activation,
) -> None:
    """E3: the loss of each image and `scale` times its gradient with respect to a, where y = f(a).

    Shapes: y, x and da (n, m), loss (n,).
    """
    error = y - x
    loss[...] = weight * np.sum(error * error, axis=1)
    activation_backward(None, y, (2 * weight * scale) * error, da, activation)


def elbo_totals(
    reconstruction: NDArray,
    kl: NDArray,
    schedule: NDArray,
    state: NDArray,
    free_bits: float,
    kl_weight: NDArray,
    totals: NDArray,
) -> None:
    """E5 and E6: adds the batch's loss, reconstruction and KL to `totals`, and sets `kl_weight`.

    Each is its batch mean times n, so that `totals` divided by the number of images seen are the
    means over them. The KL in `totals` is the true one, without free bits (`free_bits` is lambda,
    in nats). A plain autoencoder has d = 0. A loss that is not finite sets `state[FAILED]` and adds
    nothing. Shapes: reconstruction (n,), kl (n, d), schedule (steps, 5), state (5,), kl_weight
    (d,), totals (3,) in float64.
    """
    n = len(reconstruction)
    beta = schedule[state[INDEX], BETA]
    mean_kl = np.mean(kl, axis=0)
    kl_weight[...] = np.where(mean_kl > free_bits, beta / n, 0)
    reconstruction_total = np.sum(reconstruction, dtype=np.float64)
    loss_total = reconstruction_total + n * beta * np.sum(np.maximum(free_bits, mean_kl))
    add_to_totals(totals, state, loss_total, reconstruction_total, n * np.sum(mean_kl))


def add_to_totals(
    totals: NDArray, state: NDArray, loss: float, reconstruction: float, kl: float
) -> None:
    """Adds a batch's sums to `totals` (3,), unless its loss, or that of a step before, is not
    finite: then `state[FAILED]` is 1."""
    if not np.isfinite(loss):
        state[FAILED] = 1
    if not state[FAILED]:
        totals += (loss, reconstruction, kl)
