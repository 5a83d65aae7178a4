"""The `cuda` backend. Without a GPU on a stand-in for CuPy (fake_cupy.py), with one (`-m gpu`) for
real: graphs, determinism, agreement with the CPU over many steps, resume across devices."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest

from minivae import backends
from minivae.backends.reference import ReferenceBackend
from minivae.data import load
from minivae.errors import InputError
from minivae.presets import Training, preset
from minivae.train import Trainer, fit

SMALL: dict[str, Any] = {"hidden": (40,), "latent": 5}


@pytest.fixture
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs a stand-in for CuPy with the options of `fake_cupy.make`; returns it."""

    def install(**options: Any) -> Any:
        cupy = fake_cupy.make(**options)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.delitem(sys.modules, "minivae.backends.cuda", raising=False)
        return cupy

    yield install
    sys.modules.pop("minivae.backends.cuda", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        ({"driver": 0}, "fp32", "no NVIDIA driver was found"),
        ({"driver": 12040}, "fp32", "the driver serves CUDA 12.4, the installed CuPy needs 13.0"),
        ({"devices": 0}, "fp32", "the driver found no GPU"),
        ({"capability": "70"}, "fp32", "compute capability 7.0, expected at least 7.5"),
        ({"capability": "75"}, "tf32", "compute capability 7.5, expected at least 8.0"),
    ],
)
def test_a_machine_that_cannot_is_told_why_in_one_line(
    without_a_card: Any, options: dict[str, Any], precision: str, message: str
) -> None:
    without_a_card(**options)
    with pytest.raises(InputError, match=message) as raised:
        backends.get("cuda", precision)
    assert "\n" not in str(raised.value)


def test_auto_takes_the_gpu_where_it_works(without_a_card: Any) -> None:
    without_a_card()
    backend, reasons = backends.choose()
    assert (backend.name, reasons) == ("cuda", [])


def test_auto_says_why_it_does_not_take_the_gpu(without_a_card: Any) -> None:
    without_a_card(driver=0)
    backend, reasons = backends.choose()
    assert backend.name == "cpu"
    assert reasons == ["device 'cuda': no NVIDIA driver was found"]


def test_memory_that_runs_out_is_one_line(without_a_card: Any) -> None:
    without_a_card(memory=2**23)
    backend = backends.get("cuda")
    with pytest.raises(InputError, match=r"out of memory, 8 of 8 MiB are free: .*smaller batch"):
        backend.zeros((2**22,))


def parameters_after(device: str | ReferenceBackend, steps: int, **options: Any) -> bytes:
    model = preset("glyphs").model(**SMALL).to(device)
    trainer = Trainer(model, load("glyphs"), Training(batch_size=100, **options))
    for _ in range(steps):
        trainer.step()
    trainer.check()
    return model.backend.to_numpy(model.parameters.flat["values"]).tobytes()


def test_a_replayed_graph_is_the_eager_step(without_a_card: Any) -> None:
    without_a_card()
    # Beyond the end of an epoch, so that schedule, permutation and state have changed under it.
    steps = 5
    options = {"keep_last": True, "batch_size": 1000}
    assert graphed(steps, **options) == eager(steps, **options)


def graphed(steps: int, **options: Any) -> bytes:
    return _parameters(backends.get("cuda"), steps, **options)


def eager(steps: int, **options: Any) -> bytes:
    backend = backends.get("cuda")
    backend.capture = lambda step: step  # type: ignore[method-assign]
    return _parameters(backend, steps, **options)


def _parameters(backend: ReferenceBackend, steps: int, **options: Any) -> bytes:
    model = preset("glyphs").model(**SMALL).to(backend)
    trainer = Trainer(model, load("glyphs"), Training(**options))
    for _ in range(steps):
        trainer.step()
    trainer.check()
    return backend.to_numpy(model.parameters.flat["values"]).tobytes()


def test_a_dense_step_is_this_many_launches(without_a_card: Any) -> None:
    cupy = without_a_card()
    model = preset("glyphs").model().to("cuda")
    trainer = Trainer(model, load("glyphs"), Training())
    trainer.step()
    del cupy.launches[:]
    trainer.step()
    assert len(cupy.launches) == 13
