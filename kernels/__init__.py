"""The engine's CUDA kernels: CUDA C++ sources and their Numba CUDA twins."""

from pathlib import Path

STEMS = ("adam", "batch", "elbo", "elementwise", "latent")
_HEADERS = ("common.cuh", "philox.cuh")
_FOLDER = Path(__file__).parent


def source(stem: str) -> str:
    """The shared headers and `stem.cu` as one string: CuPy's kernel cache knows the source that it
    is given, and no header beside it."""
    return "\n".join((_FOLDER / name).read_text() for name in (*_HEADERS, f"{stem}.cu"))
