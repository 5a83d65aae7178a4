"""The latent: z drawn from q(z|x) by reparameterization, and its KL to the standard normal prior.

The encoder's head gives, for each image, the means first and then the log-variances of a diagonal
Gaussian posterior (Kingma & Welling, "Auto-Encoding Variational Bayes", 2014):

    E1    z_j  = mu_j + exp(logvar_j / 2) eps_j,       eps ~ N(0, 1)          (their section 2.4)
    E2    KL_j = E_q[log q(z_j|x) - log p(z_j)] = E[z_j^2 - eps_j^2 - logvar_j] / 2
               = (mu_j^2 + exp(logvar_j) - 1 - logvar_j) / 2     in nats     (their appendix B)

since (z_j - mu_j) / exp(logvar_j / 2) = eps_j, the densities' constants cancel, E[eps_j^2] = 1 and
E[z_j^2] = mu_j^2 + exp(logvar_j).

A z sampled directly from q has no derivative with respect to the head. E1 makes it a differentiable
function of the head and of noise that does not depend on the head, so the gradient of a loss l
moves inside the expectation, and the gradient of a single draw is an unbiased estimate of it:

    E_q[l(z)] = E_eps[l(z(head, eps))],    ∂/∂head E_q[l(z)] = E_eps[∂l/∂z ∂z/∂head]

The loss depends on the head through z, whose gradient dz comes from the decoder, and through KL_j,
with c_j = ∂L/∂KL_j for one image (elbo.E6 or capacity.E4). With ∂z_j/∂mu_j = 1,
∂z_j/∂logvar_j = exp(logvar_j / 2) eps_j / 2, ∂KL_j/∂mu_j = mu_j and
∂KL_j/∂logvar_j = (exp(logvar_j) - 1) / 2:

    E3    dmu_j     = dz_j + c_j mu_j
    E4    dlogvar_j = dz_j eps_j exp(logvar_j / 2) / 2 + c_j (exp(logvar_j) - 1) / 2

The noise eps is a function of (seed, stream, step, row, j): the backward pass regenerates it; it is
not stored.
"""

import numpy as np
from numpy.typing import NDArray

from .philox import Noise, standard_normal
from .state import STEP


def split_head(head: NDArray) -> tuple[NDArray, NDArray]:
    """The views (mu, logvar), each (n, d), of a head (n, 2 d)."""
    d = head.shape[1] // 2
    return head[:, :d], head[:, d:]


def kl_to_prior(mu: NDArray, logvar: NDArray) -> NDArray:
    """E2, in nats. Shapes: mu, logvar and result (n, d)."""
    return 0.5 * (mu * mu + np.expm1(logvar) - logvar)


def latent_forward(head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray) -> None:
    """z by E1 and kl by E2, per image and dimension. Shapes: head (n, 2 d), z and kl (n, d)."""
    mu, logvar = split_head(head)
    eps = standard_normal(z.shape, noise, int(state[STEP]), head.dtype.type)
    z[...] = mu + np.exp(0.5 * logvar) * eps
    kl[...] = kl_to_prior(mu, logvar)


def latent_backward(
    head: NDArray,
    dz: NDArray,
    kl_weight: NDArray,
    dhead: NDArray,
    noise: Noise,
    state: NDArray,
) -> None:
    """dhead = (dmu, dlogvar) by E3 and E4.

    Shapes: head and dhead (n, 2 d), dz (n, d), kl_weight (d,), which holds c.
    """
    mu, logvar = split_head(head)
    dmu, dlogvar = split_head(dhead)
    eps = standard_normal(dz.shape, noise, int(state[STEP]), head.dtype.type)
    dmu[...] = dz + kl_weight * mu
    dlogvar[...] = 0.5 * (dz * eps * np.exp(0.5 * logvar) + kl_weight * np.expm1(logvar))
