"""Fixtures and the rule that a check which was expected to run did run."""

import os

# The tests' arrays are small. Waiting BLAS threads would only take the cores from what else runs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from minivae.backends import kernel_backend
from minivae.kernels import LARGE


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives wide products of any size the tiles that are meant for much larger ones."""
    monkeypatch.setattr(kernel_backend, "wide_tile", lambda products: LARGE)


@pytest.fixture(params=["chosen tiles", "large tiles"])
def tiles(request: pytest.FixtureRequest) -> None:
    """Both with the tiles that products of a size get and with large ones."""
    if request.param == "large tiles":
        request.getfixturevalue("large_tiles")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `mnist` and `fashion-mnist`."""
    folder = Path(os.environ.get("MINIVAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        pytest.skip("real MNIST not found: set MINIVAE_DATA to the folder above it")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where MINIVAE_NO_SKIPS is set, as in CI, a test that was skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("MINIVAE_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped where nothing may be: {report.longrepr}"
    return report
