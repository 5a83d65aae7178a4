"""What changes from one step to the next, in two small arrays that live where the tensors live.

No number that changes between steps is passed by value, so that a step captured once (a CUDA graph)
can be replayed unchanged.

`state` holds five int64 numbers:

    STEP     optimizer steps finished so far: the step (philox) of the latent noise
    INDEX    row of the schedule
    FIRST    where the batch starts in the epoch's permutation
    EPOCH    epochs finished so far: the step (philox) of the binarization noise
    FAILED   1 from the first step whose loss was not finite; from then on neither the parameters
             nor this state change, so that the last good ones survive until the host looks

`schedule` holds a row for each step ahead, computed by the host in float64:

    STEP_SIZE    lr / (1 - beta1^t)              the first moment's bias correction (adam.E3)
    ROOT         sqrt(1 - beta2^t)               the second moment's (adam.E3); for adam.E3' it is a
                                                 factor of STEP_SIZE, and ROOT is 1
    DECAY        1 - lr * weight_decay           (adam.E4)
    BETA         the weight of the KL (elbo.E7)
    CAPACITY     C(t) in nats (capacity.E2)
"""

import numpy as np
from numpy.typing import NDArray

STEP, INDEX, FIRST, EPOCH, FAILED = range(5)

STEP_SIZE, ROOT, DECAY, BETA, CAPACITY = range(5)
SCHEDULE_COLUMNS = 5


def new_state(step: int = 0, first: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    """A state (5,) at the first row of its schedule."""
    return np.array([step, 0, first, epoch, 0], np.int64)


def advance_state(state: NDArray, batch_size: int) -> None:
    """On to the next step of the epoch, unless this one failed. Shape: state (5,)."""
    if state[FAILED]:
        return
    state[STEP] += 1
    state[INDEX] += 1
    state[FIRST] += batch_size
