"""The engine's CUDA kernels: CUDA C++ sources and their Numba CUDA twins."""

from pathlib import Path
from typing import NamedTuple

STEMS = (
    *("adam", "batch", "conv", "conv_few_channels", "elbo", "elementwise", "gemm", "importance"),
    *("labels", "latent", "objectives", "weights"),
)


class Tile(NamedTuple):
    """The rows and columns of a matrix product's result that a block has."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


SMALL, MEDIUM, LARGE = Tile(32, 32), Tile(64, 64), Tile(128, 64)
DENSE_TILES = (SMALL, MEDIUM, LARGE)
TILES = (Tile(128, 16), Tile(128, 32), *DENSE_TILES)
WITH_TILES = {"conv": TILES, "gemm": DENSE_TILES, "weights": DENSE_TILES}
"""The sources of matrix products, with the tiles that they may have."""

OPTIONS = ("--std=c++17",)
"""What NVRTC is asked for, beside the architecture and what CuPy adds."""

FOLDER = Path(__file__).parent


def source(stem: str, *, tensor_cores: bool = False, tile: Tile = MEDIUM) -> str:
    """The shared headers and `stem.cu` as one string: CuPy's kernel cache knows the source that it
    is given, and no header beside it.

    The sources in WITH_TILES come in one specialisation for each of `tensor_cores` and of their
    tiles; the others are the same for all.
    """
    headers, settings = ["common.cuh", "philox.cuh", "elbo.cuh", "epilogues.cuh"], ""
    if stem.startswith("conv"):
        headers += ["conv.cuh"]
    if stem in WITH_TILES:
        headers += ["async.cuh", "mma.cuh", "tile.cuh"]
        settings = (
            f"#define TENSOR_CORES {int(tensor_cores)}\n"
            f"#define TILE_ROWS {tile.rows}\n#define TILE_COLUMNS {tile.columns}\n"
        )
    return settings + "\n".join((FOLDER / name).read_text() for name in (*headers, f"{stem}.cu"))
