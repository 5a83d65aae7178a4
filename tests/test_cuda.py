"""The `cuda` backend. Without a GPU on a stand-in for CuPy (fake_cupy.py), with one (`-m gpu`) for
real: graphs, determinism, agreement with the CPU over many steps, resume across devices."""

import dataclasses
import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
from numpy.typing import NDArray

from minivae import backends
from minivae.backends.reference import ReferenceBackend
from minivae.cli import main
from minivae.data import Splits, load
from minivae.errors import InputError
from minivae.ops.activations import IDENTITY
from minivae.presets import PRESETS, Training, preset
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


def test_the_twins_device_is_named_where_it_fails(without_a_card: Any) -> None:
    without_a_card(driver=0)
    with pytest.raises(InputError, match="device 'numba_cuda': no NVIDIA driver was found"):
        backends.get("numba_cuda")


def test_auto_takes_the_gpu_where_it_works(without_a_card: Any) -> None:
    without_a_card()
    backend, reasons = backends.choose()
    assert (backend.name, reasons) == ("cuda", [])


def test_auto_says_why_it_does_not_take_the_gpu(without_a_card: Any) -> None:
    without_a_card(driver=0)
    backend, reasons = backends.choose()
    assert backend.name == "cpu"
    assert reasons == ["device 'cuda': no NVIDIA driver was found"]


def test_a_model_that_goes_to_the_best_device_says_why_that_is_no_gpu(
    without_a_card: Any, caplog: pytest.LogCaptureFixture
) -> None:
    without_a_card(driver=0)
    backends._log_once.cache_clear()
    for _ in range(2):
        preset("glyphs").model(**SMALL).to("auto")
    assert caplog.messages == ["no GPU: device 'cuda': no NVIDIA driver was found"]
    assert caplog.records[0].levelname == "WARNING"


def test_without_cupy_a_model_goes_to_the_cpu_unless_asked_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "minivae.backends.cuda", raising=False)
    backends._log_once.cache_clear()
    with caplog.at_level("INFO"):
        preset("glyphs").model(**SMALL).to("auto")
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_auto_does_not_take_a_gpu_that_another_has_for_itself(without_a_card: Any) -> None:
    cupy = without_a_card()

    def busy(non_blocking: bool) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(46, "all CUDA-capable devices are busy")

    cupy.cuda.Stream = busy
    backend, reasons = backends.choose()
    assert backend.name == "cpu"
    assert reasons == ["device 'cuda': all CUDA-capable devices are busy"]


def test_memory_that_runs_out_is_one_line(without_a_card: Any) -> None:
    without_a_card(memory=2**25)
    backend = backends.get("cuda")
    with pytest.raises(InputError, match=r"out of memory, 32 of 32 MiB are free: .*smaller batch"):
        backend.zeros((2**24,))


@pytest.mark.parametrize(
    ("status", "expected", "message"),
    [
        (2, InputError, "device 'cuda': out of memory, 32 of 32 MiB are free: no room"),
        (700, RuntimeError, "^no room$"),
    ],
)
def test_a_graph_that_finds_no_memory_is_one_line(
    without_a_card: Any, status: int, expected: type[Exception], message: str
) -> None:
    cupy = without_a_card(memory=2**25)

    def fail(stream: Any) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(status, "no room")

    cupy.cuda.Stream.end_capture = fail
    replay = backends.get("cuda").capture(lambda: None)
    replay()
    with pytest.raises(expected, match=message):
        replay()


def test_memory_that_runs_out_is_told_before_a_run_has_a_folder(
    without_a_card: Any, tmp_path: Path
) -> None:
    without_a_card(memory=2**24)  # for the images as bytes, not for a batch of them as float32
    options: Any = {"out": tmp_path / "run", "device": "cuda", "progress": False}
    with pytest.raises(InputError, match="out of memory"):
        fit(preset("glyphs").model(**SMALL), glyphs(), Training(batch_size=8192), **options)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere_yet_is_trained_and_evaluated_on_the_gpu(
    without_a_card: Any,
) -> None:
    without_a_card()
    model = preset("glyphs").model(**SMALL)
    fit(model, glyphs(), Training(steps=1, batch_size=32), progress=False)
    assert model.backend.name == "cuda"
    assert preset("glyphs").model(**SMALL).evaluate(glyphs().test.images[:3])["loss"] > 0


@functools.cache
def glyphs() -> Splits:
    return load("glyphs")


def trained(
    backend: ReferenceBackend,
    steps: int,
    *,
    model: str = "glyphs",
    graph: bool = True,
    **options: Any,
) -> tuple[bytes, list[float]]:
    """The parameters after some steps, and the loss of each step."""
    if not graph:
        backend.capture = lambda step: step  # type: ignore[method-assign]
    built = preset(model).model(**(SMALL if model == "glyphs" else {})).to(backend)
    trainer = Trainer(built, glyphs(), Training(**options))
    found = losses(trainer, steps)
    trainer.check_loss()
    return backend.to_numpy(built.parameters.flat["values"]).tobytes(), found


def losses(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each of some steps."""
    found = []
    for _ in range(steps):
        before = trainer.progress.totals
        trainer.step()
        found.append(trainer.means_since(before, 1)["loss"])
    return found


@pytest.mark.parametrize("before", [0, 1])
def test_a_step_that_failed_the_first_time_or_while_it_was_recorded_is_taken_anew(
    without_a_card: Any, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    without_a_card()
    model = preset("glyphs").model(**SMALL).to("cuda")
    trainer = Trainer(model, glyphs(), Training())
    for _ in range(before):
        trainer.step()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.backend, "optimizer_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
    for _ in range(before, 3):
        trainer.step()
    undisturbed, _ = trained(backends.get("cuda"), 3)
    assert model.backend.to_numpy(model.parameters.flat["values"]).tobytes() == undisturbed


def test_what_another_thread_runs_is_no_part_of_a_graph_that_is_recorded(
    without_a_card: Any,
) -> None:
    without_a_card()
    backend, others = backends.get("cuda"), backends.get("cuda")
    x, y, other_x, other_y = (backend.zeros((4,)) for _ in range(4))
    begun = threading.Event()

    def step() -> None:
        backend.activation_forward(x, y, IDENTITY)
        begun.set()
        time.sleep(0.2)

    def run_another() -> NDArray:
        begun.wait()
        others.assign(other_x, np.ones(4, np.float32))
        others.activation_forward(other_x, other_y, IDENTITY)
        return others.to_numpy(other_y)

    replay = backend.capture(step)
    replay()
    begun.clear()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run_another)
        replay()
    assert found.result().tolist() == [1, 1, 1, 1]
    others.assign(other_x, np.zeros(4, np.float32))
    replay()
    assert others.to_numpy(other_y).tolist() == [1, 1, 1, 1]


def test_a_step_is_recorded_with_its_own_memory_where_the_model_has_taken_more(
    without_a_card: Any,
) -> None:
    without_a_card()
    model = preset("glyphs").model(**SMALL).to("cuda")
    trainer = Trainer(model, glyphs(), Training(batch_size=8))
    trainer.step()
    model.bind(128)
    # It would be an error to ask for memory, or to copy there, while the step is recorded.
    trainer.step()
    assert trainer.finished_steps == 2


def test_steps_in_a_row_share_a_graph_and_all_are_run_before_anything_else(
    without_a_card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card()
    backend = backends.get("cuda")
    expected, _ = trained(backends.get("cuda"), 21)  # which reads each step's loss
    trainer = Trainer(preset("glyphs").model(**SMALL).to(backend), glyphs(), Training())
    for _ in range(2):
        trainer.step()
    (step,) = trainer._captured.values()
    graphs, launched = step._graphs, []  # type: ignore[attr-defined]
    launch = type(graphs[1]).launch

    def noted(graph: Any, stream: Any) -> None:
        launched.append(next(steps for steps, found in graphs.items() if found is graph))
        launch(graph, stream)

    monkeypatch.setattr(type(graphs[1]), "launch", noted)
    for _ in range(19):
        trainer.step()
    assert launched == [8, 8]
    actual = backend.to_numpy(trainer.model.parameters.flat["values"])
    assert launched == [8, 8, *[1] * 4]  # the second step, too, was waiting
    assert actual.tobytes() == expected


def test_where_no_graph_of_several_steps_can_be_recorded_those_asked_for_are_run(
    without_a_card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_card()
    backend = backends.get("cuda")
    after_eight, after_nine = (trained(backends.get("cuda"), steps)[0] for steps in (8, 9))
    trainer = Trainer(preset("glyphs").model(**SMALL).to(backend), glyphs(), Training())
    for _ in range(8):
        trainer.step()

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(backend, "optimizer_step", fail)
        with pytest.raises(RuntimeError, match="no room"):
            trainer.step()
    values = trainer.model.parameters.flat["values"]
    assert trainer.finished_steps == 8
    assert backend.to_numpy(values).tobytes() == after_eight
    trainer.step()
    assert backend.to_numpy(values).tobytes() == after_nine


def taking_turns(device: str) -> list[bytes]:
    """The parameters of two models after four steps of each, the second begun after a step of the
    first, each on a backend of its own."""
    trainers: list[Trainer] = []
    for turn in range(5):
        if turn < 2:
            built = preset("glyphs").model(**SMALL).to(device)
            trainers.append(Trainer(built, glyphs(), Training(seed=turn)))
        for trainer in trainers:
            if trainer.finished_steps < 4:
                trainer.step()
    return [
        trainer.model.backend.to_numpy(trainer.model.parameters.flat["values"]).tobytes()
        for trainer in trainers
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_steps_on_the_kernels_have_the_cpus_losses(
    without_a_card: Any, name: str
) -> None:
    without_a_card()
    chosen = PRESETS[name]
    hidden = [17 + index for index, _ in enumerate(chosen.hidden)]
    training = dataclasses.replace(chosen.training, batch_size=2, images=0)
    found = []
    for device in ("cuda", "cpu"):
        trainer = Trainer(chosen.model(hidden=hidden).to(device), glyphs(), training)
        trainer.begin()
        found.append(losses(trainer, 3))  # eager, recorded, replayed
    np.testing.assert_allclose(*found, rtol=1e-5)


# Over the end of an epoch of five batches, the last of them partial: schedule, permutation, state
# and batch size change under the graphs.
EPOCHS: dict[str, Any] = {"steps": 12, "batch_size": 900, "images": 4000, "keep_last": True}


def test_a_replayed_graph_has_the_bits_of_eager_steps(without_a_card: Any) -> None:
    without_a_card()
    graphed, eager = (trained(backends.get("cuda"), graph=g, **EPOCHS) for g in (True, False))
    assert graphed == eager


def test_two_models_that_take_turns_train_as_each_would_alone(without_a_card: Any) -> None:
    without_a_card()
    assert taking_turns("cuda") == [trained(backends.get("cuda"), 4, seed=s)[0] for s in (0, 1)]


def test_the_command_trains_goes_on_and_evaluates_on_the_gpu_as_on_the_cpu(
    without_a_card: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    without_a_card()
    size = ("--hidden", "40", "--latent", "5", "--binarization", "threshold", "--quiet")
    evaluations = []
    for device in ("cuda", "cpu"):
        run = str(tmp_path / device)
        where = ("--device", device)
        assert main(["train", "--steps", "3", *size, *where, "--out", run]) == 0
        assert main(["train", "--resume", run, "--steps", "5", "--quiet", *where]) == 0
        options = ("--samples", "10", "--images", "50", "--quiet")
        assert main(["evaluate", run, *options, *where]) == 0
        evaluations.append(json.loads((tmp_path / device / "evaluation.json").read_text()))
    on_gpu, on_cpu = evaluations
    assert on_gpu["environment"]["machine"] == "a stand-in"
    assert on_gpu["environment"]["versions"]["CUDA driver"] == "13.0"
    for figure in ("loss", "reconstruction", "kl", "negative_log_likelihood"):
        assert on_gpu[figure]["mean"] == pytest.approx(on_cpu[figure]["mean"], rel=1e-4), figure


LAUNCHES = [("glyphs", 9), ("mnist-dense", 13), ("iwae-paper-iwae", 16)]


def trainer_of(name: str) -> Trainer:
    chosen = preset(name)
    training = dataclasses.replace(chosen.training, images=0)  # all that there are
    return Trainer(chosen.model().to("cuda"), glyphs(), training)


@pytest.mark.parametrize(("name", "launches"), LAUNCHES)
def test_a_dense_step_is_this_many_launches(without_a_card: Any, name: str, launches: int) -> None:
    cupy = without_a_card()
    trainer_of(name).step()
    assert len(cupy.launches) == launches


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize("precision", backends.PRECISIONS)
@pytest.mark.parametrize("model", ["glyphs", "mnist-conv", "mnist-conv-ae"])
def test_on_a_card_a_replayed_graph_has_the_bits_of_eager_steps(model: str, precision: str) -> None:
    graphed, eager = (
        trained(backends.get("cuda", precision), model=model, graph=graph, **EPOCHS)
        for graph in (True, False)
    )
    assert graphed == eager


@pytest.mark.gpu
def test_on_a_card_two_models_that_take_turns_train_as_each_would_alone() -> None:
    alone = [trained(backends.get("cuda"), 4, seed=seed)[0] for seed in (0, 1)]
    assert taking_turns("cuda") == alone


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["glyphs", "mnist-conv"])
def test_on_a_card_two_runs_have_the_same_bits(model: str) -> None:
    first, second = (trained(backends.get("cuda"), 50, model=model) for _ in range(2))
    assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("device", "precision"), [("cuda", "fp32"), ("cuda", "tf32"), ("numba_cuda", "fp32")]
)
@pytest.mark.parametrize(
    ("model", "tolerance"), [("glyphs", 1e-3), ("mnist-conv", 3e-3), ("iwae-paper-iwae", 5e-2)]
)
def test_on_a_card_200_steps_follow_the_cpus_losses(
    model: str, tolerance: float, device: str, precision: str
) -> None:
    _, actual = trained(backends.get(device, precision), 200, model=model)
    _, expected = trained(backends.get("cpu"), 200, model=model)
    # Rounding grows with the steps, in both: the curves agree, not the bits. On a CPU a change of
    # all weights by 1e-7 of themselves moved some loss of mnist-conv by 1.1e-3, and of the IWAE by
    # 1.3e-2.
    if precision == "tf32":
        tolerance = max(tolerance, 1e-2)
    np.testing.assert_allclose(actual, expected, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_on_a_card_a_run_goes_on_on_the_other_device(
    tmp_path: Path, first: str, second: str
) -> None:
    for steps, device in ((30, first), (60, second)):
        model = preset("glyphs").model(**SMALL)
        training = Training(steps=steps, log_every=1)
        options: dict[str, Any] = {"out": tmp_path, "progress": False, "resume": steps == 60}
        metrics = fit(model, "glyphs", training, device=device, **options)
    actual = [line["train"]["loss"] for line in metrics if "epoch" not in line]
    _, expected = trained(backends.get("cpu"), 60)
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "launches"), LAUNCHES)
def test_on_a_card_a_dense_step_is_one_graph_of_as_many_kernels(name: str, launches: int) -> None:
    trainer = trainer_of(name)
    for _ in range(2):
        trainer.step()
    (step,) = trainer._captured.values()
    drawn = step._graphs[1].debug_dot_str()  # type: ignore[attr-defined]
    assert drawn.count('shape="octagon"') == launches, drawn  # which is how kernels are drawn
