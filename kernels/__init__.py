"""The engine's CUDA kernels: CUDA C++ sources and their Numba CUDA twins."""

from pathlib import Path

STEMS = ("adam", "batch", "conv", "elbo", "elementwise", "gemm", "latent", "weights")
_PRODUCTS = ("conv", "gemm", "weights")
FOLDER = Path(__file__).parent


def source(stem: str, *, tensor_cores: bool = False, tile_columns: int = 64) -> str:
    """The shared headers and `stem.cu` as one string: CuPy's kernel cache knows the source that it
    is given, and no header beside it.

    The matrix products come in one specialisation for each value of `tensor_cores` and of
    `tile_columns` (16 or 64); the other sources are the same for all.
    """
    headers, settings = ["common.cuh", "philox.cuh"], ""
    if stem in _PRODUCTS:
        headers += ["async.cuh", "mma.cuh", "tile.cuh"]
        settings = f"#define TENSOR_CORES {int(tensor_cores)}\n#define TILE_COLUMNS {tile_columns}\n"
    return settings + "\n".join((FOLDER / name).read_text() for name in (*headers, f"{stem}.cu"))
