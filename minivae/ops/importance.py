"""Objectives of k draws per image: the importance-weighted bound and the mean of k ELBOs.

With z_s = mu + sigma eps_s, s = 1..k, drawn from q(z|x), sigma = exp(logvar / 2) (latent.E1), each
draw has a log-weight (Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", 2016, eq.
8). The densities' constants cancel, and (z - mu) / sigma is eps:

    E1    log w_s = log p(x|z_s) + log p(z_s) - log q(z_s|x)
          log p(z_s) - log q(z_s|x) = sum_j (eps_sj^2 - z_sj^2 + logvar_j) / 2

    E2    bound   = log mean_s w_s     IWAE: a lower bound on log p(x), tighter as k grows
          bound   = mean_s log w_s     VAE: the ELBO with all its terms by Monte Carlo

Each is a function of the log-weights alone, so by the chain rule its derivative with respect to any
parameter theta is exactly sum_s v_s ∂log w_s/∂theta, where (their eq. 14)

    E3    v_s = ∂bound/∂log w_s = softmax_s(log w)   or   1 / k,           sum_s v_s = 1

The loss of an image is -bound. With elbo.E2, and with `scale` for the batch mean, the gradient with
respect to the logit a of a pixel x in draw s is

    E4    dlogit = scale v_s (sigmoid(a) - x)

The decoder's backward pass turns E4 into dz_s, which therefore already contains scale and v_s. E1
also holds -z_sj^2 / 2, which adds scale v_s z_sj to g_sj, and in each draw logvar_j / 2, which adds
-scale / 2 to dlogvar_j over all draws, since sum_s v_s = 1; eps is constant:

    E5    g_sj      = dz_sj + scale v_s z_sj                       the whole gradient of z_sj
    E6    dmu_j     = sum_s g_sj
    E7    dlogvar_j = sum_s g_sj eps_sj sigma_j / 2 - scale / 2

A head may also give h = log sigma in place of logvar, as the paper's authors have it: then
`logvar_factor` is 2, otherwise 1, logvar = logvar_factor h, and dh = logvar_factor dlogvar.

Draw s = 1..k of image i = 0, 1, ... is row i k + s - 1 of the arrays with k rows an image, and its
noise is that row's.
"""

import numpy as np
from numpy.typing import NDArray

from .activations import sigmoid, softplus
from .latent import split_head
from .philox import Noise, standard_normal
from .state import STEP


def importance_latent_forward(
    head: NDArray,
    z: NDArray,
    log_ratio: NDArray,
    logvar_factor: float,
    noise: Noise,
    state: NDArray,
) -> None:
    """z by latent.E1 and log p(z) - log q(z|x) by E1.

    Shapes: head (n, 2 d), z (n k, d), log_ratio (n k,).
    """
    draws = len(z) // len(head)
    mu, h = (np.repeat(half, draws, axis=0) for half in split_head(head))
    logvar = logvar_factor * h
    eps = standard_normal(z.shape, noise, int(state[STEP]), head.dtype.type)
    z[...] = mu + np.exp(0.5 * logvar) * eps
    log_ratio[...] = 0.5 * np.sum(eps * eps - z * z + logvar, axis=1)


def log_mean_exp(log_weights: NDArray) -> NDArray:
    """log mean_s exp(log_weights) over the last axis, without overflow (E2).

    Shapes: log_weights (..., k), result (...).
    """
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
    """-bound of each image by E2, `weights` v_s by E3 and the logits' gradient by E4: for the IWAE
    if `importance`, else for the VAE.

    Shapes: logits and dlogits (n k, m), x (n, m), log_ratio and weights (n k,), loss (n,).
    """
    draws = len(logits) // len(x)
    pixels = np.repeat(x, draws, axis=0)
    log_weights = log_ratio - np.sum(softplus(logits) - pixels * logits, axis=1)
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
    logvar_factor: float,
    noise: Noise,
    state: NDArray,
) -> None:
    """dhead = (dmu, dh) by E5 to E7, dh = logvar_factor dlogvar.

    Shapes: head and dhead (n, 2 d), dz (n k, d), weights (n k,).
    """
    draws = len(dz) // len(head)
    mu, h = (np.repeat(half, draws, axis=0) for half in split_head(head))
    dmu, dh = split_head(dhead)
    eps = standard_normal(dz.shape, noise, int(state[STEP]), head.dtype.type)
    offset = np.exp(0.5 * logvar_factor * h) * eps
    g = dz + scale * weights[:, None] * (mu + offset)

    def sums(rows: NDArray) -> NDArray:
        return np.sum(rows.reshape(len(head), draws, -1), axis=1)

    dmu[...] = sums(g)
    dh[...] = logvar_factor * 0.5 * (sums(g * offset) - scale)
