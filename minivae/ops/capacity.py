"""The KL held at a capacity that grows (Burgess et al., "Understanding disentangling in beta-VAE",
2018): the latent opens little by little, and takes up one factor of variation after another.

A batch of n images has the mean KL

    E1    K = sum_j mean KL_j                                      nats per image, over dimensions j

At step t, counted from 0, the capacity C has risen linearly towards its final value in T steps

    E2    C(t) = C min(1, (t + 1) / T),      C at once for T = 0

and beta (the paper's gamma) weighs K's distance from it, on either side:

    E3    L = mean reconstruction + beta |K - C(t)|

The absolute value is of the batch's mean, not of each image's KL: an image may take more nats than
C where another takes less. Every KL_j of every image enters K with weight 1 / n, so that

    E4    c_j = ∂L/∂KL_j of one image = (beta / n) sign(K - C(t)),   0 at K = C(t)

Below the capacity, gradient descent raises the KL; above it, it lowers it. The host computes C(t)
(`Objective.capacity_at`) as a column of the schedule (state.py). C = 0 is elbo.E5 without free
bits, since K is never negative.
"""

import numpy as np
from numpy.typing import NDArray

from .elbo import add_to_totals
from .state import BETA, CAPACITY, INDEX


def capacity_totals(
    reconstruction: NDArray,
    kl: NDArray,
    schedule: NDArray,
    state: NDArray,
    kl_weight: NDArray,
    totals: NDArray,
) -> None:
    """E3 and E4: adds the batch's loss, reconstruction and KL to `totals`, and sets `kl_weight`.

    The KL in `totals` is the true one. All else, and shapes, as for `elbo.elbo_totals`.
    """
    n = len(reconstruction)
    beta, capacity = schedule[state[INDEX], [BETA, CAPACITY]]
    mean_kl = np.sum(np.mean(kl, axis=0))
    kl_weight[...] = beta / n * np.sign(mean_kl - capacity)
    reconstruction_total = np.sum(reconstruction, dtype=np.float64)
    loss_total = reconstruction_total + n * beta * np.abs(mean_kl - capacity)
    add_to_totals(totals, state, loss_total, reconstruction_total, n * mean_kl)
