"""Fixtures and the rule that a check which was expected to run did run."""

import os

# The tests' arrays are small. Waiting BLAS threads would only take the cores from what else runs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import give_all_products

from minivae.kernels import LARGE, MEDIUM

MINUTES = (
    "test_in_the_simulator",
    "test_products_are_right_with_the_tiles_of_a_processor_without_avx512",
    "test_no_kernel_touches_memory_that_is_not_its_own",
)


@pytest.fixture(params=[None, MEDIUM, LARGE], ids=["chosen tiles", "medium tiles", "large tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with the tiles that products of a size get and with those of larger ones."""
    if request.param:
        give_all_products(request.param, monkeypatch)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `mnist` and `fashion-mnist`."""
    folder = Path(os.environ.get("MINIVAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        pytest.skip("real MNIST not found: set MINIVAE_DATA to the folder above it")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes first: at the end one process would wait for the other. And what needs the
    same kernels compiled side by side, so that mostly one process compiles them."""
    items.sort(key=lambda item: (item.name not in MINUTES, _specialisation(item)))


def _specialisation(item: pytest.Item) -> str:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return str(parameters.get("specialisation", ""))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where MINIVAE_NO_SKIPS is set, as in CI, a test that was skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("MINIVAE_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped where nothing may be: {report.longrepr}"
    return report
