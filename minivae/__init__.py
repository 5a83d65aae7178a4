"""minivae: variational autoencoders from low-level primitives, with every gradient by hand."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":  # without fcntl (files.py) and sched_yield (cpu_threads.py)
    raise ImportError("minivae does not run on Windows itself: use it in WSL")

from .checkpoint import load, save
from .errors import InputError
from .layers import (
    ELU,
    GELU,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    JoinLabel,
    LeakyReLU,
    ReLU,
    Reshape,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from .models import VAE, Autoencoder, Objective
from .optim import Adam
from .presets import PRESETS, Training, preset
from .train import fit

__all__ = [
    "ELU",
    "GELU",
    "PRESETS",
    "VAE",
    "Adam",
    "Autoencoder",
    "Conv2d",
    "ConvTranspose2d",
    "Dense",
    "Flatten",
    "InputError",
    "JoinLabel",
    "LeakyReLU",
    "Objective",
    "ReLU",
    "Reshape",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "Training",
    "fit",
    "load",
    "preset",
    "save",
]
