"""Objectives of k draws an image: the importance-weighted bound, and the mean of k ELBOs.

With z_s = mu + sigma eps_s, s = 1..k, drawn from q(z|x) (latent.E1), each draw has a log-weight
(Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", 2016, eq. 8). The densities'
constants cancel, and (z - mu) / sigma is eps:

    E1    log w_s = log p(x|z_s) + log p(z_s) - log q(z_s|x)
          log p(z_s) - log q(z_s|x) = sum_j (eps_sj^2 - z_sj^2 + logvar_j) / 2

    E2    bound   = log mean_s w_s     IWAE: a lower bound on log p(x), tighter as k grows
          bound   = mean_s log w_s     VAE: the ELBO with all its terms by Monte Carlo

Both give a gradient that is a weighted sum over the draws, each weighted by (their eq. 14)

    E3    v_s = d bound / d log w_s = softmax_s(log w)   or   1 / k,       sum_s v_s = 1

and otherwise that of a single draw. The loss of an image is -bound. A pixel's logit a of draw s,
with elbo.E2 and the `scale` of the mean over the batch, gets

    E4    dlogit = scale v_s (sigmoid(a) - x)

Below, dz_s is the gradient that the decoder returns for it, so that it has scale and v_s already.
z_s also enters E1 itself, as -z^2 / 2; eps is constant; and logvar enters E1 once for each draw,
which with sum_s v_s = 1 leaves 1/2:

    E5    g_sj      = dz_sj + scale v_s z_sj                       the whole gradient of z_sj
    E6    dmu_j     = sum_s g_sj
    E7    dlogvar_j = sum_s g_sj eps_sj sigma_j / 2 - scale / 2

E3 is the exact derivative of the bound: holding the weights constant in the weighted sum loses
nothing.

A head may also give log sigma in place of logvar = 2 log sigma, as the paper's authors have it:
`log_scale` is 2 then and 1 otherwise, logvar = log_scale head, and E7 is multiplied by it.

Row i k + s of the arrays with k rows an image is draw s of image i, and its noise is that row's.
"""

import numpy as np
from numpy.typing import NDArray

from .activations import sigmoid
from .latent import split_head
from .philox import Noise, standard_normal
from .state import STEP


def importance_latent_forward(
    head: NDArray, z: NDArray, log_ratio: NDArray, log_scale: float, noise: Noise, state: NDArray
) -> None:
    """z by latent.E1 and log p(z) - log q(z|x) by E1.

    Shapes: head (n, 2 d), z (n k, d), log_ratio (n k,).
    """
    draws = len(z) // len(head)
    mu, logvar = (np.repeat(half, draws, axis=0) for half in split_head(head))
    logvar = log_scale * logvar
    eps = standard_normal(z.shape, noise, int(state[STEP]), head.dtype.type)
    z[...] = mu + np.exp(0.5 * logvar) * eps
    log_ratio[...] = 0.5 * np.sum(eps * eps - z * z + logvar, axis=1)


def log_mean_exp(log_weights: NDArray) -> NDArray:
    """log mean_s exp(log_weights) over the last axis, without overflow (E2)."""
    largest = np.max(log_weights, axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.mean(np.exp(log_weights - largest), axis=-1))


def importance_loss(
    logits: NDArray,
    x: NDArray,
    log_ratio: NDArray,
    weights: NDArray,
    loss: NDArray,
    dlogits: NDArray,
    scale: float,
    importance: bool,
) -> None:
    """-bound of each image by E2, the weights by E3 and the logits' gradient by E4: of the IWAE if
    `importance`, else of the VAE.

    Shapes: logits and dlogits (n k, m), x (n, m), log_ratio and weights (n k,), loss (n,).
    """
    draws = len(logits) // len(x)
    pixels = np.repeat(x, draws, axis=0)
    softplus = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
    log_weights = log_ratio - np.sum(softplus - pixels * logits, axis=1)
    log_weights = log_weights.reshape(-1, draws)
    if importance:
        bound = log_mean_exp(log_weights)
        loss[...] = -bound
        weights[...] = (np.exp(log_weights - bound[:, None]) / draws).ravel()
    else:
        loss[...] = -np.mean(log_weights, axis=1)
        weights[...] = 1 / draws
    dlogits[...] = scale * weights[:, None] * (sigmoid(logits) - pixels)


def importance_latent_backward(
    head: NDArray,
    dz: NDArray,
    weights: NDArray,
    dhead: NDArray,
    scale: float,
    log_scale: float,
    noise: Noise,
    state: NDArray,
) -> None:
    """dhead = (dmu, dlogvar log_scale) by E5 to E7.

    Shapes: head and dhead (n, 2 d), dz (n k, d), weights (n k,).
    """
    draws = len(dz) // len(head)
    mu, logvar = (np.repeat(half, draws, axis=0) for half in split_head(head))
    dmu, dlogvar = split_head(dhead)
    eps = standard_normal(dz.shape, noise, int(state[STEP]), head.dtype.type)
    deviation = np.exp(0.5 * log_scale * logvar) * eps
    g = dz + scale * weights[:, None] * (mu + deviation)

    def sums(rows: NDArray) -> NDArray:
        return np.sum(rows.reshape(len(head), draws, -1), axis=1)

    dmu[...] = sums(g)
    dlogvar[...] = log_scale * 0.5 * (sums(g * deviation) - scale)
