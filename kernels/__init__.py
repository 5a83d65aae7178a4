"""The engine's CUDA kernels: CUDA C++ sources and their Numba CUDA twins."""

from pathlib import Path

STEMS = (
    *("adam", "batch", "conv", "elbo", "elementwise", "gemm", "importance", "labels", "latent"),
    *("objectives", "weights"),
)
WITH_TILES = {"conv": (16, 32, 64), "gemm": (16, 32, 64), "weights": (64,)}
"""The sources of matrix products, with the columns that their tiles may have."""

OPTIONS = ("--std=c++17",)
"""What NVRTC is asked for, beside the architecture; CuPy adds -ftz=true."""

FOLDER = Path(__file__).parent


def source(stem: str, *, tensor_cores: bool = False, tile_columns: int = 64) -> str:
    """The shared headers and `stem.cu` as one string: CuPy's kernel cache knows the source that it
    is given, and no header beside it.

    The sources in WITH_TILES come in one specialisation for each of `tensor_cores` and of
    `tile_columns`; the others are the same for all.
    """
    headers, settings = ["common.cuh", "philox.cuh", "elbo.cuh", "importance.cuh"], ""
    if stem in WITH_TILES:
        headers += ["async.cuh", "mma.cuh", "tile.cuh"]
        settings = (
            f"#define TENSOR_CORES {int(tensor_cores)}\n#define TILE_COLUMNS {tile_columns}\n"
        )
    return settings + "\n".join((FOLDER / name).read_text() for name in (*headers, f"{stem}.cu"))
