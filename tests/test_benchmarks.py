"""What the benchmarks count by themselves, and that a run cut short can go on."""

import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivae import Adam, backends, cli, environment
from minivae.backends.kernel_arguments import kernels
from minivae.backends.reference import PRIMITIVES, Call
from minivae.backends.tiling import STAGE_INSTRUCTIONS, Part, launch_cycles
from minivae.benchmarks import (
    cores,
    end_to_end,
    gpu_check,
    launch_times,
    measure,
    report,
    run,
    startup,
    steps,
)
from minivae.benchmarks.cases import Case, preset_case
from minivae.benchmarks.floor import FLOAT, Counter, Floor, Rates, step_counts
from minivae.benchmarks.launches import H100, counted_cases, step_launches
from minivae.benchmarks.primitives import primitive_calls
from minivae.benchmarks.runs import RESULTS
from minivae.errors import InputError
from minivae.kernels import TILES, WITH_TILES
from minivae.train import Trainer

# A product takes 2 operations; it occurs forward, in the weight's gradient and in the input's,
# which the first layer does not need.
DENSE = 784 * 400 * 2 + (400 * 40 + 20 * 400 + 400 * 784) * 3
CONVOLUTIONAL = (
    *(14 * 14 * 9 * 32 * 2, 7 * 7 * 9 * 32 * 64 * 3, 3136 * 32 * 3, 16 * 3136 * 3),
    *(7 * 7 * 9 * 64 * 64 * 3, 14 * 14 * 9 * 64 * 32 * 3, 28 * 28 * 9 * 32 * 3),
)


def operations(name: str, batch: int) -> float:
    return step_counts(preset_case(name, batch=batch, images=batch)).operations


def megabytes(name: str, batch: int) -> float:
    return step_counts(preset_case(name, batch=batch, images=batch)).moved / 1e6


def test_the_floor_of_a_step_has_the_operations_of_its_products() -> None:
    assert abs(operations("glyphs", 5) / (2 * 5 * DENSE) - 1) < 1e-12
    assert abs(operations("mnist-conv", 3) / (2 * 3 * sum(CONVOLUTIONAL)) - 1) < 1e-12


def test_the_floor_of_a_step_has_the_bytes_of_adam_and_of_each_image() -> None:
    parameters = preset_case("glyphs", batch=1).model.parameters.count
    least = 6 * FLOAT * parameters / 1e6  # values and both moments, read and written
    # Weights besides: all of them forward, and but for the first layer's half of them backward.
    assert 1.25 < megabytes("glyphs", 1) / least < 1.27  # 7.5 / 6, and one image
    image = megabytes("glyphs", 65) - megabytes("glyphs", 1)
    assert abs(image / 64 - (megabytes("glyphs", 129) - megabytes("glyphs", 65)) / 64) < 1e-9
    assert 16 < image / 64 * 1e6 / (784 * FLOAT) < 17  # the pixels pass from layer to layer


def test_a_cache_line_goes_there_and_back_in_nanoseconds() -> None:
    trip = cores.round_trip()
    if trip is None:
        pytest.skip("there is one core")
    times = measure.collected(measure.Turns({"trip": trip}, 0.01).take() for _ in range(3))
    # A system with other work may hold one of the two threads back for milliseconds.
    assert 5 < 1e6 * min(times["trip"]) < 1e5


def test_a_floor_is_compared_in_each_turn() -> None:
    counter = Counter(fused=True)
    counter.moved, counter.operations = 4e6, 3e6
    # A copy takes 2 ms, then 4 ms in a turn in which everything takes twice as long, and 3 ms where
    # it's the product that is slow.
    rates = [Rates(2, 30), Rates(1, 15), Rates(2, 1)]
    assert Floor.of(counter, [3.0, 6.0, 3.0], rates) == Floor(3.0, 1.5)


def test_every_primitive_that_moves_something_is_measured() -> None:
    measured = {call.primitive for call in primitive_calls(Counter(fused=False), 2).values()}
    assert measured == {*PRIMITIVES} - {"advance_state"}


@pytest.mark.parametrize(("fused", "written"), [(False, 3 * 5 + 5), (True, 0)])
def test_the_floor_of_a_weights_gradient_has_its_bytes_unless_it_goes_to_adam(
    fused: bool, written: int
) -> None:
    counter = Counter(fused)
    x, dz, dw, db = (counter.zeros(shape) for shape in ((7, 3), (7, 5), (3, 5), (5,)))
    Call("dense_weight_gradient", x, dz, dw, db).run(counter)
    assert counter.moved == FLOAT * (7 * 3 + 7 * 5 + written)
    assert counter.operations == 2 * 7 * 3 * 5


@pytest.mark.parametrize("precision", backends.PRECISIONS)
@pytest.mark.parametrize("batch", [None, 512])
def test_products_are_estimated_to_take_longer_than_their_operations(
    batch: int | None, precision: str
) -> None:
    instructions = report._instructions()
    for case in counted_cases(batch):
        launches = step_launches(case, precision)
        estimated = sum(launch.microseconds(precision, instructions) for launch in launches)
        floor = 1e3 * H100[precision].milliseconds(0, step_counts(case).operations)
        assert 1.3 * floor < estimated, case.name
        if precision == "fp32":
            assert estimated < (7 * floor if batch else 1000), case.name


def test_tiles_are_chosen_by_about_the_instructions_that_were_counted() -> None:
    counted = collections.defaultdict(list)
    for (precision, kernel, tile), number in report._instructions().items():
        if kernel == "dense_latent_forward":
            continue  # which draws one of its operands
        counted[precision, kernels()[kernel].stem, tile].append(number)
    chosen = {
        (*key, tile): cycles
        for key, tiles in STAGE_INSTRUCTIONS.items()
        for tile, cycles in tiles.items()
    }
    assert counted.keys() == chosen.keys()
    for key, numbers in counted.items():
        assert np.abs(np.array(numbers) / chosen[key] - 1).max() < 0.2, key


def test_divisions_are_chosen_that_take_about_the_least_time_measured() -> None:
    tiles, chosen, fastest = {str(tile): tile for tile in TILES}, [], []
    measured = json.loads((RESULTS / "launches-h200.json").read_text())["steps"]
    for launch in (launch for step in measured for launch in step["launches"]):
        if "others" not in launch:
            continue
        stem, found = kernels()[launch["kernel"]].stem, []
        own = launch | {"microseconds": launch["overlapped"]}  # as the others were measured
        for division in (own, *launch["others"]):
            tile, parts = tiles[division["tile"]], [Part(*part) for part in division["parts"]]
            instructions = STAGE_INSTRUCTIONS["tf32", stem][tile]
            estimate = launch_cycles("tf32", stem, tile, parts, instructions)
            found.append((estimate, division["microseconds"]))
        chosen.append(min(found)[1])
        fastest.append(min(time for _, time in found))
        assert chosen[-1] < 1.3 * fastest[-1], launch["kernel"]
    assert len(chosen) > 30
    assert sum(chosen) < 1.05 * sum(fastest)


def test_a_convolution_whose_phases_differ_in_depth_has_the_mean_of_their_stages() -> None:
    launches = step_launches(preset_case("mnist-conv", images=1))
    assert len(launches) == 17
    found = [launch for launch in launches if launch.kernel == "conv_transpose2d_forward"]
    # Windows of 3 x 3 at stride 2: 4, 2, 2 and 1 of 64 filters.
    assert [launch.stages for launch in found] == [9, 9]
    assert [launch.sizes["filters"] for launch in found] == [64, 64]


@pytest.mark.parametrize("name", ["dense", "mnist-conv"])
def test_every_launch_of_a_step_is_timed_in_other_divisions_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_times, "SECONDS", 1e-6)
    monkeypatch.setattr(launch_times, "TURNS", 1)
    monkeypatch.setattr(launch_times, "SPLITS", (1, 3))
    case = small_case(name)
    found = launch_times.measure_case(case, "emulated", "fp32", divisions=True, repeats=1)
    assert found["step"] > 0
    counted = step_launches(small_case(name))
    assert [row["kernel"] for row in found["launches"]] == [each.kernel for each in counted]
    for row, launch in zip(found["launches"], counted, strict=True):
        assert row["parts"] == [[*part] for part in launch.parts]
        others = row.get("others", [])
        assert min(each["microseconds"] for each in (row, *others)) > 0
        assert all(each["kernel"] == row["kernel"] for each in others)
        if launch.parts:
            tiles = {row["tile"], *(each["tile"] for each in others)}
            assert tiles == {str(tile) for tile in WITH_TILES[kernels()[launch.kernel].stem]}


def small_case(name: str) -> Case:
    if name == "dense":
        return preset_case("glyphs", batch=16, hidden=(24,), latent=3, images=256, digits=True)
    if name == "importance":
        return preset_case("iwae-paper-iwae", batch=8, samples=3, images=256, digits=True)
    return preset_case(name, batch=4, images=64, digits=True)


# What torch.compile imports warns of itself.
COMPILES = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@COMPILES
@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "device", "precision"),
    [
        *((name, "cpu", "fp32") for name in ("dense", "mnist-conv", "mnist-conv-ae", "importance")),
        *(("dense", "emulated", precision) for precision in ("fp32", "tf32")),
        ("importance", "emulated", "fp32"),
    ],
)
def test_every_peer_has_the_same_loss_and_lowers_it(name: str, device: str, precision: str) -> None:
    without = ("torch compile",) if name == "mnist-conv-ae" else ()
    own = steps.own_side(small_case(name), device, precision, 0.01)
    peers = steps.peers_side(small_case(name), device, precision, without, 0.01)
    # Raises where a peer's loss differs before the steps, or is no lower after them.
    found = steps.measure_case(name, own, peers, 1, precision)
    assert found["failures"] == dict.fromkeys(without, "left out")
    assert {name for name in found["milliseconds"] if steps.OWN not in name} <= set(steps.PEERS)
    assert (device == "cpu") == ("core_round_trip_nanoseconds" in found)
    frameworks = {name.split()[0].strip(",") for name in found["milliseconds"]}
    assert frameworks == {"minivae", "torch", "jax"}


@pytest.mark.peers
def test_every_peer_has_the_same_optimizer() -> None:
    from minivae.benchmarks.jax_peer import JaxPeer
    from minivae.benchmarks.torch_peer import TorchPeer

    def case() -> Case:
        # One image and no latent: nothing in it is random.
        one = preset_case("mnist-conv-ae", batch=1, images=1, digits=True)
        adam = Adam(lr=0.01, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.1)
        return one._replace(training=dataclasses.replace(one.training, optimizer=adam))

    mine, theirs = case(), case()
    images = mine.model.to("reference").unit_images(mine.splits.train.images)
    trainer = Trainer(mine.model, mine.splits, mine.training)
    theirs.model.to("reference")
    torch_peer, jax_peer = TorchPeer(theirs, "cpu", "eager"), JaxPeer(theirs)
    for _ in range(4):
        trainer.step()
        torch_peer.step()
        jax_peer.step()
    expected = steps._own_loss(mine, images)
    for name, peer in (("torch eager", torch_peer), ("jax jit", jax_peer)):
        # Four updates carry the rounding of float32 along.
        loss = steps._peer_loss(name, peer, images, np.zeros((1, 1), np.float32))
        assert loss == pytest.approx(expected, rel=1e-4), name


@pytest.mark.peers
def test_the_papers_adam_is_the_authors() -> None:
    import torch

    from minivae.benchmarks.paper_peer import BETA1, BETA2, EPSILON, PaperAdam

    rng = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(50).astype(np.float32)))
    value, first, second = parameter.detach().numpy().astype(np.float64), 0.0, 1.0
    adam = PaperAdam([parameter])
    for step in range(1, 6):
        gradient = rng.standard_normal(50)
        parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        adam.step(0.01)
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        step_size = 0.01 * np.sqrt(1 - BETA2**step) / (1 - BETA1**step)
        value = value - step_size * first / (np.sqrt(second) + EPSILON)
    np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)


@COMPILES
@pytest.mark.peers
@pytest.mark.parametrize(
    "mode", [name.removeprefix("torch ") for name in steps.PEERS[1:] if "torch" in name]
)
def test_a_peer_for_a_gpu_has_not_trained_before_its_loss_is_compared(mode: str) -> None:
    import torch

    from minivae.benchmarks.torch_peer import TorchPeer

    case = small_case("mnist-conv")
    images = case.model.to("reference").unit_images(case.splits.train.images[:4])
    eps = np.random.default_rng(0).standard_normal((4, case.model.latent)).astype(np.float32)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    eager, peer = (TorchPeer(case, "cpu", kind) for kind in ("eager", mode))
    expected = eager.loss(x, torch.from_numpy(eps))
    assert peer.loss(x, torch.from_numpy(eps)) == pytest.approx(expected, rel=1e-5)


def test_a_training_is_timed_to_the_metrics_of_its_first_step() -> None:
    assert 0 < startup._first_step("cpu", "glyphs") < 600
    with pytest.raises(RuntimeError, match="minivae train ended with status 2"):
        startup._first_step("cpu", "nowhere")


def test_a_process_that_never_ends_is_stopped_at_its_limit() -> None:
    started = time.perf_counter()
    with pytest.raises(TimeoutError):
        measure.in_own_process(time.sleep, 600, limit=5)
    assert time.perf_counter() - started < 60


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a process ended with exit status 3"):
        measure.in_own_process(os._exit, 3)


def test_an_error_in_a_process_is_raised_where_its_result_is_asked_for() -> None:
    with pytest.raises(ZeroDivisionError):
        measure.in_own_process(divmod, 1, 0)


def test_processes_prepare_at_the_same_time_and_work_when_told(tmp_path: Path) -> None:
    # What has been prepared is a callable that makes a folder.
    folders = [tmp_path / name for name in "ab"]
    processes = [measure.OwnProcess(functools.partial, os.mkdir, folder) for folder in folders]
    for process in processes:
        process.wait_until_prepared(60)
    assert not list(tmp_path.iterdir())
    processes[1].ask(60)
    assert list(tmp_path.iterdir()) == [folders[1]]
    for process in processes:
        process.end()
    assert not multiprocessing.active_children()


def test_a_result_file_reads_back_and_has_short_records_on_a_line_each(tmp_path: Path) -> None:
    epochs = [{"epoch": epoch, "test": {"loss": epoch / 3}} for epoch in range(20)]
    result = {"run": {"seed": 0, "epochs": epochs, "parts": []}, "name": "\u00e4\n" * 200}
    measure.write_result(tmp_path / "result.json", result)
    written = (tmp_path / "result.json").read_text()
    assert json.loads(written) == result
    assert [json.loads(line.strip(" ,")) for line in written.splitlines()[4:24]] == epochs


def test_the_table_of_runs_compares_the_seeds_that_both_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(seed: int, loss: float, **framework: str) -> dict[str, Any]:
        epochs = [{"epoch": 2, "test": {"loss": loss}}]
        return {"preset": "mnist-conv-ae", "seed": seed, "epochs": epochs, **framework}

    own = [of(0, 2.2), of(1, 1.98), of(2, 9.0)]
    peer = [of(1, 2.0, framework="PyTorch"), of(0, 2.0, framework="PyTorch")]
    monkeypatch.setattr(report, "_load", lambda name: {"runs": own + peer})
    (row,) = (line for line in report.runs_table().splitlines() if "mnist-conv-ae" in line)
    # +10% and -1%, half of whose distance is their mean's standard error.
    assert row.endswith("| 2.00 ± 0.00 (2) | not run | +4.50 ± 5.50 (2) |")


def test_an_environment_is_told_where_there_is_no_linux_and_no_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("PATH", str(tmp_path))
    told = environment.environment("cpu")
    assert told["cores"] == os.cpu_count()
    assert told["commit"] == "unknown"
    assert told["machine"] == platform.processor()


def test_an_installed_copy_within_another_repository_has_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(environment, "CHECKOUT", installed)
    assert environment.environment("cpu")["commit"] == "unknown"


def timed_case(name: str) -> dict[str, Any]:
    """What `measure_steps` finds of a case where no peer is installed."""
    return {
        "case": name,
        "milliseconds": {"minivae": {"median": 2.12}},
        "failures": {"torch": "not installed"},
        "times_as_fast_as_the_fastest_peer": None,
    }


def interrupted(device: str, quick: bool, measured: list[Any], _: Any) -> Iterator[list[Any]]:
    yield [*measured, timed_case(("first", "second")[len(measured)])]
    raise KeyboardInterrupt


def test_a_result_that_cannot_be_written_is_told_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run.run_suite("cpu", ["steps"], tmp_path / "file" / "steps.json", quick=True)


def test_a_suite_that_was_cut_short_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "measure_steps", interrupted)
    output = tmp_path / "bench.json"
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run.run_suite("cpu", ["steps"], output, resume=resume)
    cases = json.loads(output.read_text())["steps"]
    assert cases == [timed_case("first"), timed_case("second")]


def test_a_result_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    output.write_text("measured for hours")
    with pytest.raises(InputError, match=r"bench.json exists: --resume goes on with it, or name"):
        run.run_suite("cpu", ["steps"], output)
    assert output.read_text() == "measured for hours"


def test_data_that_are_none_leave_no_result_file(tmp_path: Path) -> None:
    output = tmp_path / "races.json"
    with pytest.raises(InputError, match="data 'nope' is neither a path nor one of"):
        run.run_suite("cpu", ["end-to-end"], output, quick=True, data="nope")
    assert not output.exists()


def test_a_case_that_fails_is_named_and_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = True

    class Process:
        def __init__(self, function: Any, number: int, *_: Any) -> None:
            self.number = number

        def wait_until_prepared(self, limit: float) -> None:
            if failing and self.number == 1:
                raise RuntimeError("out of luck")

        def ask(self, limit: float, task: str) -> Any:
            begin = {"minivae": 1.0}, {}
            return {"begin": begin, "turn": {"minivae": 2.12}, "end": None}[task]

        def end(self) -> None:
            pass

    cases = [case.name for case in steps.step_cases(steps.QUICK_BATCH)]
    monkeypatch.setattr(steps, "OwnProcess", Process)
    output = tmp_path / "bench.json"
    with pytest.raises(RuntimeError, match=f"{cases[1]}: RuntimeError: out of luck"):
        run.run_suite("cpu", ["steps"], output, quick=True)
    assert [case["case"] for case in json.loads(output.read_text())["steps"]] == cases
    failing = False
    run.run_suite("cpu", ["steps"], output, quick=True, resume=True)
    found = json.loads(output.read_text())["steps"]
    assert sorted(case["case"] for case in found) == sorted(cases)
    assert not any("failure" in case for case in found)


@pytest.mark.peers
@pytest.mark.parametrize(("name", "expected"), [("glyphs", 60), ("mnist-conv", 71)])
def test_a_step_of_pytorch_is_as_many_operators_as_the_kernels_page_says(
    name: str, expected: int
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from minivae.benchmarks.torch_peer import TorchPeer

    class Counting(TorchDispatchMode):
        computing = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any, options: Any
        ) -> Any:
            views = function.is_view or "_unsafe_view" in str(function)
            self.computing += str(function).startswith("aten.") and not views
            return function(*arguments, **options)

    peer = TorchPeer(preset_case(name, images=256), "cpu", "eager")
    peer.step()  # which makes Adam's moments
    index = next(peer._batches)
    with Counting() as counting:
        peer._step(index)
    assert counting.computing == expected
    page = (Path(__file__).parents[1] / "kernels" / "README.md").read_text()
    assert "60 and 71 operators" in page


def test_a_measured_step_is_told_with_the_peers_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "measure_steps", lambda *_: iter([[timed_case("mnist-dense b64")]]))
    run.run_suite("cpu", ["steps"], tmp_path / "bench.json")
    told = "mnist-dense b64          ms a step: minivae 2.12, torch not installed"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("steps", r"ms a step: minivae [\d.]+(, (torch|jax) \w+ [\d.]+){4}; [\d.]+ times as fast"),
        ("primitives", r"dense_forward 128x784x400 +[\d.]+ ms, [\d.]+ times the floor"),
        ("scaling", r"minivae [\d.]+ ms a step, torch eager [\d.]+ ms a step; [\d.]+ times the"),
        ("end-to-end", r"minivae +test loss 110 in [\d.]+ s, 107 in [\d.]+ s, 105.5 in"),
        ("start-up", r"import minivae +0\.\d\d s"),
    ],
)
def test_what_is_measured_is_told_in_words(section: str, told: str) -> None:
    found = json.loads((RESULTS / f"{section}-cpu.json").read_text())[section]
    assert re.search(told, "\n".join(run.IN_WORDS[section](found)))


def test_a_program_that_fails_is_one_line_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "few.npy", np.zeros((20, 5, 5), np.uint8))  # fewer than a batch
    options = ["--data", str(tmp_path / "few.npy"), "-o", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit, match="minivae: error: minivae train ended with status 2"):
        cli.main(["bench", "start-up", "--quick", *options])


def result_file(path: Path, machine: str = "M", **cases: dict[str, float]) -> Path:
    """A result of `minivae bench steps`, with the milliseconds of each candidate of each case."""
    steps = [
        {"case": case, "milliseconds": {name: {"median": time} for name, time in times.items()}}
        for case, times in cases.items()
    ]
    environment = {"device": "cpu", "machine": machine}
    path.write_text(json.dumps({"environment": environment, "steps": steps}))
    return path


def test_a_lead_that_is_lost_is_reported_as_one_that_shrank(tmp_path: Path) -> None:
    twice = {"minivae": 1.0, "torch eager": 2.0, "jax jit": 3.0}
    before = result_file(tmp_path / "old.json", **dict.fromkeys("abcde", twice))
    after = result_file(
        tmp_path / "new.json",
        a={**twice, "minivae": 1.05},
        b={**twice, "minivae": 1.6},
        c={"minivae": 1.0},
        # The fastest peer is missing, or a faster one came: neither is minivae's doing.
        d={"minivae": 1.0, "jax jit": 3.0},
        e={**twice, "jax scan": 1.1},
    )
    assert run.compare(before, after) == [
        "b: 2.00 times as fast as the fastest peer, now 1.25",
        "c: 2.00 times as fast as the fastest peer, now alone",
    ]


def test_a_lead_that_shrank_is_seen_where_the_fastest_peer_is_missing(tmp_path: Path) -> None:
    before = result_file(tmp_path / "old.json", a={"minivae": 1.0, "torch eager": 3, "jax jit": 2})
    after = result_file(tmp_path / "new.json", a={"minivae": 1.4, "torch eager": 3})
    assert run.compare(before, after) == ["a: 3.00 times as fast as the fastest peer, now 2.14"]


def test_results_that_say_nothing_of_each_other_are_not_compared(tmp_path: Path) -> None:
    times = {"minivae": 1.0, "torch eager": 2.0}
    here = result_file(tmp_path / "here.json", a=times)
    there = result_file(tmp_path / "there.json", machine="N", a=times)
    alone = result_file(tmp_path / "alone.json", a={"minivae": 1.0})
    with pytest.raises(InputError, match="measured with machine N, expected M"):
        run.compare(here, there)
    with pytest.raises(InputError, match="no case has a peer"):
        run.compare(alone, here)


def test_two_runs_of_a_seed_are_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = {"preset": "glyphs", "seed": 3, "epochs": [{"epoch": 1, "test": {"loss": 2.0}}]}
    monkeypatch.setattr(report, "_load", lambda name: {"runs": [twice, twice]})
    with pytest.raises(AssertionError, match="minivae's glyphs of seed 3 twice"):
        report.runs_table()


def test_a_first_run_finds_no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; print(100.0 if os.environ.get('NUMBA_CACHE_DIR') else 106.0)"
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    for name in ("MINIVAE", "TORCH", "JAX"):
        monkeypatch.setattr(end_to_end, name, program)
    found = end_to_end.measure_end_to_end("cpu", "mnist", quick=False)
    assert found["minivae, first run"]["seconds_to"].keys() == {"110", "107", "105.5"}
    assert found["minivae"]["seconds_to"].keys() == {"110", "107"}
    assert len(found["minivae"]["races"]) == end_to_end.ROUNDS


def test_a_suite_without_an_unknown_peer_measures_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown peer 'jax'"):
        run.run_suite("cpu", ["steps"], tmp_path / "bench.json", without=["jax"])


def test_a_suite_for_an_unknown_device_measures_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'nope'"):
        run.run_suite("nope", ["steps"], tmp_path / "bench.json")


def test_a_race_that_fails_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="exit status 3"):
        end_to_end._race("raise SystemExit(3)", "mnist", "cpu", "eager", True, 0, None)


@pytest.mark.peers
def test_a_race_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "MINIVAE", "print(106.0)")
    monkeypatch.setattr(end_to_end, "TORCH", "raise SystemExit(3)")
    monkeypatch.setattr(end_to_end, "JAX", "print(106.0)")
    found = end_to_end.measure_end_to_end("cpu", "mnist", quick=True)
    assert "exit status 3" in found["torch eager"]["failure"]
    assert found["jax scan"]["seconds_to"].keys() == {"110", "107"}


@pytest.mark.peers
def test_every_race_runs_on_a_few_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, test_images=images[:100])
    found = end_to_end.measure_end_to_end("cpu", tmp_path / "few.npz", quick=True)
    assert not any("failure" in races for races in found.values())
    assert all(len(races["races"][0]["test_losses"]) == 1 for races in found.values())


@pytest.mark.peers
def test_the_suite_measures_its_smallest_sizes_and_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    run.run_suite("cpu", ["primitives", "scaling"], output, quick=True)
    found = json.loads(output.read_text())
    assert len(found["scaling"]) == 4
    for size in found["scaling"]:
        assert not size["failures"]
        assert size["torch eager"]["steps_per_second"] > 0
    found["scaling"].pop()
    output.write_text(json.dumps(found))
    run.run_suite("cpu", ["primitives", "scaling"], output, quick=True, resume=True)
    assert len(json.loads(output.read_text())["scaling"]) == 4


def test_a_table_that_differs_from_its_source_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checked() -> int:
        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        return report.main()

    table = "<!-- table: truth -->\n{}\n<!-- end: truth -->\n"
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "READMES", (readme,))
    monkeypatch.setattr(report, "TABLES", {"truth": lambda: "| 1.5 |"})
    readme.write_text(table.format("| 1.5 |"))
    assert checked() == 0
    readme.write_text(table.format("| 1.6 |"))
    assert checked() == 1
    readme.write_text("| 1.5 |")
    assert checked() == 1
    assert "expected each of ['truth'] once" in capsys.readouterr().out


def test_a_rehearsal_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "steps.json").write_text('{"rehearsal": true}')
    with pytest.raises(InputError, match="a rehearsal, or with a failed case"):
        report._load("steps.json")


def test_about_as_many_pixels_of_the_digits_are_dark_as_of_mnists() -> None:
    # MNIST's share is 0.809, of its 60,000 training images.
    images = preset_case("glyphs", images=2000, digits=True).splits.train.images
    assert 0.75 < np.mean(images == 0) < 0.85


def test_a_part_of_the_gpus_check_ends_at_its_limit_with_all_its_children() -> None:
    # Until the grandchild ends, its output stays open: a wait for that would last a minute.
    part = gpu_check.run(["sh", "-c", "echo begun; sleep 60 & wait"], limit=1)
    assert part["status"] == 124
    assert part["output"] == "begun\n\nstopped after 1 s"
    assert part["seconds"] < 50


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizers_run_the_kernels_as_a_step_fuses_them(tool: str) -> None:
    command = gpu_check.parts("cuda")[f"{tool}, fused"]
    pytest_only = command[command.index(sys.executable) :]
    collected = subprocess.run(
        [*pytest_only, "--collect-only"], cwd=gpu_check.CHECKOUT, capture_output=True, text=True
    )
    assert collected.returncode == 0, collected.stdout
    for name in ("update_has_the_bits", "sequence_is_the_references"):
        assert f"test_a_fused_{name}" in collected.stdout


def test_a_suite_does_not_go_on_with_what_was_measured_otherwise(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    environment = {**run.environment("cpu"), "commit": "another"}
    conditions = {"rehearsal": False, "without": []}
    output.write_text(json.dumps({"environment": environment, **conditions}))
    with pytest.raises(InputError, match="measured with commit another, expected"):
        run.run_suite("cpu", ["steps"], output, resume=True)
    output.write_text("{}")
    with pytest.raises(InputError, match="not a result file to go on with"):
        run.run_suite("cpu", ["steps"], output, resume=True)
