"""The command line as a user types it, and one clear line for each bad input."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivae import ConvTranspose2d, Objective, Training, backends, cli, fit, preset
from minivae.checkpoint import CHECKPOINT, CONFIG, METRICS, read_metrics
from minivae.checkpoint import load as load_run
from minivae.cli import main
from minivae.cli import train as cli_train
from minivae.data import load

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labelled images of two shapes, ten of them for testing."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 60, (60, 28, 28), dtype=np.uint8)
    images[labels == 0, 8:20, 8:20] += 150
    images[labels == 1, 4:24, 12:16] += 150
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", str(data), "--epochs", "3", "--batch-size", "10", "--hidden", "32"]
    assert train(folder, *arguments) == 0
    return folder


def train(folder: Path, *arguments: str) -> int:
    return main(["train", "--device", "cpu", "--quiet", "--out", str(folder), *arguments])


def complains(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """Checks that a command fails with exit code 2 and one line on stderr with all the words."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("minivae: error: ")
    assert captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err


def test_a_configuration_whose_training_is_none_is_bad_input(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / CONFIG).read_text()) | {"training": [1]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    complains(capsys, ["evaluate", str(tmp_path)], 'expected an object under the key "training"')


def test_a_training_that_is_none_names_its_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / CONFIG).read_text())
    config["training"]["epochs"] = "many"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    complains(
        capsys, ["train", "--resume", str(tmp_path)], str(tmp_path / CONFIG), "epochs is 'many'"
    )


def test_train_leaves_a_run_folder(run: Path) -> None:
    assert {CONFIG, CHECKPOINT, METRICS, "pictures"} == {path.name for path in run.iterdir()}
    assert [record["epoch"] for record in read_metrics(run / METRICS)] == [1, 2, 3]


def test_the_progress_bar_says_why_the_first_step_takes_long(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--batch-size", "10", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["train", "--device", "cpu", *arguments]) == 0
    bars = capsys.readouterr().err.splitlines()
    waiting = ["preparing kernels" in bar for bar in bars]
    assert any(waiting)
    assert not waiting[-1]


def test_train_says_why_it_does_not_take_the_gpu(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cuda", "no_such_module:Backend")
    options = ("--data", str(data), "--steps", "1", "--batch-size", "10", "--quiet")
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("no GPU     device 'cuda' needs a package that is missing: ")
    assert second.endswith("parameters on cpu")


def test_training_on_the_emulated_device_writes_the_cpus_losses(data: Path, tmp_path: Path) -> None:
    small = ["--preset", "mnist-dense", "--hidden", "32", "--latent", "5", "--batch-size", "10"]
    losses = []
    for device in ("emulated", "cpu"):
        arguments = ["--data", str(data), *small, "--steps", "6", "--log-every", "2"]
        assert train(tmp_path / device, *arguments, "--device", device) == 0
        lines = read_metrics(tmp_path / device / METRICS)
        means = [line[split] for line in lines for split in ("train", "test") if split in line]
        losses.append([mean["loss"] for mean in means])
    assert len(losses[0]) == 3 + 2 * 2  # every second step, and both splits after each epoch
    np.testing.assert_allclose(*losses, rtol=1e-5)  # float32 sums in another order


def test_the_configuration_is_readable(run: Path) -> None:
    config = json.loads((run / CONFIG).read_text())
    assert config["preset"] == "glyphs"
    assert config["training"]["batch_size"] == 10
    assert config["model"]["encoder"][1] == {"layer": "dense", "units": 32}
    assert config["environment"]["device"] == "cpu"
    assert config["environment"]["versions"]["numpy"] == np.__version__


def test_train_leaves_the_pictures_of_a_labelled_vae(run: Path) -> None:
    expected = {
        *("loss_curves", "reconstructions", "samples", "error_histogram", "class_reconstructions"),
        *("latent_means", "latent_logvars", "kl_per_dimension", "traversals"),
    }
    pictures = {path.stem: path.read_bytes() for path in (run / "pictures").iterdir()}
    assert pictures.keys() == expected
    assert all(content.startswith(PNG) for content in pictures.values())


def test_two_latent_dimensions_add_the_manifold(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--epochs", "1", "--batch-size", "10", "--latent", "2"]
    assert train(tmp_path / "run", *arguments) == 0
    assert (tmp_path / "run" / "pictures" / "manifold.png").exists()


def test_a_plain_autoencoder_draws_its_progress_and_codes(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--preset", "mnist-conv-ae", "--data", str(data), "--batch-size", "10"]
    assert train(folder, *arguments, "--steps", "4", "--picture-every", "2") == 0
    pictures = {path.stem for path in (folder / "pictures").iterdir()}
    assert {"step_000002", "step_000004", "codes", "reconstructions"} <= pictures


def test_the_papers_presets_train_on_all_of_fewer_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    paper = ["train", "--preset", "iwae-paper-iwae", "--k", "2", "--data", str(data)]
    arguments = [*paper, "--epochs", "1", "--batch-size", "9", "--out", str(folder), "--quiet"]
    complains(capsys, arguments, "images is 59600")
    assert main([*arguments, "--images", "0"]) == 0
    assert read_metrics(folder / METRICS)[-1]["step"] == 54 // 9


def test_reconstruct_writes_a_picture(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.png"
    assert main(["reconstruct", str(run), "-o", str(output), "--count", "3"]) == 0
    assert output.read_bytes().startswith(PNG)


def test_sample_writes_a_picture(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.png"
    assert main(["sample", str(run), "-o", str(output), "--count", "4"]) == 0
    assert output.read_bytes().startswith(PNG)


def test_encode_writes_the_latent_and_the_labels(run: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.npz"
    assert main(["encode", str(run), "--data", str(data), "-o", str(output)]) == 0
    with np.load(output) as codes:
        assert codes["mu"].shape == codes["logvar"].shape == (6, 20)
        assert codes["labels"].tolist() == [origin % 2 for origin in codes["origin"]]


def test_encode_takes_all_images_in_their_order(run: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.npz"
    arguments = ["--data", str(data), "--split", "all", "-o", str(output)]
    assert main(["encode", str(run), *arguments]) == 0
    with np.load(output) as codes:
        assert codes["labels"].tolist() == [0, 1] * 30
        assert codes["origin"].tolist() == list(range(60))


def test_encode_binarizes_as_the_run_did(data: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "codes.npz"
    arguments = ["--data", str(data), "--epochs", "1", "--batch-size", "10"]
    assert train(folder, *arguments, "--binarization", "threshold") == 0
    assert main(["encode", str(folder), "--device", "cpu", "-o", str(output)]) == 0
    with np.load(data) as arrays, np.load(output) as codes:
        white = arrays["images"][codes["origin"]] >= 128
        expected = load_run(folder, "cpu").encode(white)[0]
        np.testing.assert_allclose(codes["mu"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "export"])
def test_an_output_replaces_nothing_that_the_run_needs(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    options = ["--to", "torch"] if command == "export" else []
    files = [run / CHECKPOINT, *([data] if command == "encode" else [])]
    for path in files:
        before = path.read_bytes()
        arguments = [command, str(run), *options, "-o", str(path.parent / "." / path.name)]
        complains(capsys, arguments, "a file of the run or its data")
        assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["encode", "reconstruct", "export", "sample"])
def test_an_output_replaces_no_file_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    folder, options = tmp_path / "run", ["--steps", "1", "--batch-size", "4"]
    assert train(folder, "--data", str(tmp_path / "images"), *options) == 0
    output = tmp_path / "images" / "3.png"
    before = output.read_bytes()
    options = ["--to", "torch"] if command == "export" else []
    complains(capsys, [command, str(folder), *options, "-o", str(output)], "of the run or its data")
    assert output.read_bytes() == before


def test_a_name_in_a_circle_of_links_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    output = str(tmp_path / "circle" / "x.png")
    complains(capsys, ["sample", str(run), "--device", "cpu", "-o", output], "circle")


def test_what_the_output_cannot_encode_is_replaced(run: Path) -> None:
    command = [sys.executable, "-m", "minivae", "evaluate", str(run), "--quiet", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--images", "4"], env=environment, capture_output=True, text=True, check=True
    )
    assert r"\xb1" in done.stdout


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">/dev/full", 2)])
def test_an_output_that_takes_nothing_is_no_traceback(run: Path, closed: str, code: int) -> None:
    command = f'"{sys.executable}" -m minivae info "{run}" {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_class_is_sampled_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        for name in ("round", "square"):
            path = tmp_path / "shapes" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    folder, options = tmp_path / "run", ["--steps", "2", "--batch-size", "4", "--conditional"]
    assert train(folder, "--data", str(tmp_path / "shapes"), *options) == 0
    assert "classes    0 round, 1 square" in capsys.readouterr().out
    output = str(tmp_path / "samples.png")
    common = ["sample", str(folder), "--device", "cpu", "-o", output]
    assert main([*common, "--label", "square"]) == 0
    complains(capsys, [*common, "--label", "squares"], "did you mean 'square'?")
    assert main(["evaluate", str(folder), "--device", "cpu", "--quiet"]) == 0
    assert "  squared error of round 0." in capsys.readouterr().out
    (tmp_path / "shapes" / "round").rename(tmp_path / "shapes" / "zigzag")
    arguments = ["evaluate", str(folder), "--device", "cpu", "--data", str(tmp_path / "shapes")]
    complains(capsys, arguments, "the classes are square, zigzag; expected", "round, square")
    np.save(tmp_path / "bare.npy", np.zeros((20, 28, 28), np.uint8))
    complains(capsys, [*arguments, "--data", str(tmp_path / "bare.npy")], "bare.npy has no labels")


def test_a_run_that_stops_early_says_which_epoch_was_best(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(data), "--batch-size", "10", "--validation", "20", "--patience", "1"]
    assert train(tmp_path / "run", *options, "--epochs", "50", "--lr", "0.03") == 0
    told = capsys.readouterr().out
    validated = [line["validation"]["loss"] for line in read_metrics(tmp_path / "run" / METRICS)]
    best = int(np.argmin(validated)) + 1
    assert f"stopped    after epoch {best + 1}: no better one since epoch {best}" in told
    assert f"best       epoch {best}, validation loss {min(validated):.2f}: used with" in told
    assert main(["info", str(tmp_path / "run")]) == 0
    assert f"best       epoch {best}," in capsys.readouterr().out


def test_a_run_that_is_refused_leaves_no_log(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    arguments = ["train", "--data", str(data), "--tensorboard", "--out", str(run)]
    complains(capsys, arguments, "already holds a run")
    assert not (run / "tensorboard").exists()


def test_tensorboard_gets_every_scalar_and_the_pictures(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    folder = tmp_path / "run"
    arguments = ["--data", str(data), "--epochs", "1", "--batch-size", "10", "--tensorboard"]
    assert train(folder, *arguments, "--picture-every", "3", "--validation", "10") == 0
    events = next((folder / "tensorboard").iterdir()).read_bytes()
    for tag in (
        "loss/train",
        "loss/validation",
        "loss/test",
        "reconstruction/train",
        "kl/test",
        "progress",
    ):
        assert tag.encode() in events


def test_plot_draws_the_pictures_again(run: Path) -> None:
    (run / "pictures" / "samples.png").unlink()
    assert main(["plot", str(run)]) == 0
    assert (run / "pictures" / "samples.png").exists()


def test_export_writes_torch_tensors(run: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    output = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--to", "torch", "-o", str(output)]) == 0
    assert load_file(output)["encoder.1.weight"].shape == (32, 784)


def test_gradcheck_prints_an_error_for_each_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", "--preset", "glyphs"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        f"{part}.{kind}"
        for part in ("encoder.1", "encoder.3", "decoder.0", "decoder.2")
        for kind in ("weight", "bias")
    ]
    assert all(line.endswith("ok") for line in lines)


def test_info_names_devices_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("cpu", "mnist-conv-ae", "glyphs"))


def test_info_describes_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "parameters" in printed


def test_resume_goes_on_for_more_epochs(data: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", ["--data", str(data), "--batch-size", "10"]
    assert train(folder, *options, "--epochs", "1") == 0
    assert main(["train", "--resume", str(folder), "--epochs", "2", "--quiet"]) == 0
    assert [record["epoch"] for record in read_metrics(folder / METRICS)] == [1, 2]


def test_more_epochs_go_before_the_steps_that_a_preset_counts(data: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", ["--data", str(data), "--batch-size", "10"]
    assert train(folder, "--preset", "mnist-conv-ae", *options, "--steps", "7") == 0
    assert main(["train", "--resume", str(folder), "--epochs", "2", "--quiet"]) == 0
    records = [record for record in read_metrics(folder / METRICS) if "epoch" in record]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 5), (2, 10)]


def test_a_run_of_the_library_is_resumed_with_its_data(data: Path, tmp_path: Path) -> None:
    training = Training(epochs=1, batch_size=10)
    fit(preset("glyphs").model(), load(str(data)), training, out=tmp_path, progress=False)
    arguments = ["train", "--resume", str(tmp_path), "--epochs", "2", "--quiet"]
    assert main([*arguments, "--data", str(data)]) == 0


def test_what_a_run_of_the_library_does_not_name_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(epochs=1, batch_size=10)
    fit(preset("glyphs").model(), load(str(data)), training, out=tmp_path, progress=False)
    resume = ["train", "--resume", str(tmp_path), "--quiet"]
    complains(capsys, resume, "names no data: give --data")
    complains(capsys, [*resume, "--latent", "20"], "names no preset: give --preset")


def test_a_schedule_of_ones_own_replaces_the_papers(data: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--images", "0", "--epochs", "1", "--schedule", "cosine"]
    assert train(tmp_path / "run", "--preset", "iwae-paper-vae", *options) == 0


def test_a_bernoulli_decoder_of_the_autoencoder_ends_in_logits() -> None:
    chosen = preset("mnist-conv-ae")
    model = dataclasses.replace(chosen, objective=Objective("bernoulli")).model()
    assert isinstance(model.decoder.layers[-1], ConvTranspose2d)


def test_a_plain_autoencoders_objective_has_no_kl(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(data), "--batch-size", "10", "--steps", "2"]
    assert train(tmp_path / "run", "--preset", "mnist-conv-ae", *options) == 0
    printed = capsys.readouterr().out
    assert "objective  1 x sum of squared error; mean per image; binarization none\n" in printed
    assert "kl" not in printed


@pytest.mark.parametrize(
    ("binarization", "said"), [("none", "a loss, not a likelihood: grey pixels"), ("threshold", "")]
)
def test_a_training_says_where_its_loss_is_no_likelihood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], binarization: str, said: str
) -> None:
    options = ["--hidden", "8", "--latent", "2", "--steps", "1", "--binarization", binarization]
    assert train(tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert f"; binarization {binarization}\n" in printed
    assert said in printed
    assert ("likelihood:" in printed) == bool(said)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_negative_seed_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    complains(capsys, [command, str(run), "--seed", "-1"], "--seed", "0 to 2^64 - 1")


def test_resume_with_the_same_command_is_accepted(run: Path) -> None:
    arguments = ["--preset", "glyphs", "--hidden", "32", "--epochs", "3", "--batch-size", "10"]
    assert main(["train", "--resume", str(run), "--quiet", *arguments]) == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [("reconstruct", "--count"), ("sample", "--count"), ("evaluate", "--images")],
)
def test_a_number_below_one_is_refused_by_its_options_name(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    complains(
        capsys,
        [command, str(run), option, "0"],
        f"{option} is 0, expected an integer of 1 to 1,000,000,000",
    )


def test_what_is_no_file_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    arguments = ["encode", str(run), "-o", str(tmp_path / "pipe.npz")]
    complains(capsys, arguments, "pipe.npz: expected a file's name")
    assert (tmp_path / "pipe.npz").is_fifo()


def test_a_name_that_no_file_can_have_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"{'long' * 100}.npz"
    complains(capsys, ["encode", str(run), "-o", str(output)], "cannot write", "too long")


def test_a_run_does_not_go_where_its_data_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    options = ["--data", str(tmp_path), "--out", str(tmp_path), "--batch-size", "2"]
    complains(capsys, ["train", *options], "expected another folder than that of the data")


def test_labels_that_number_no_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(40) * 10**6
    np.savez(tmp_path / "sparse.npz", images=np.zeros((40, 8, 8), np.uint8), labels=labels)
    options = ["--data", str(tmp_path / "sparse.npz"), "--conditional"]
    complains(capsys, ["train", *options], "sparse.npz reach 39000000", "36 training images")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_data_without_a_name_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = [] if command == "train" else [str(run)]
    complains(capsys, [command, *arguments, "--data", ""], "--data: expected a name or a path")


def test_a_finished_run_says_so_when_it_is_resumed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert "finished   already: give more --epochs or --steps to go on" in capsys.readouterr().out


def test_a_run_is_found_its_data_from_another_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    options = ["--data", data.name, "--steps", "1", "--batch-size", "10", "--hidden", "8"]
    assert train(tmp_path / "run", *options) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "run", "--steps", "2", "--quiet"]) == 0


def test_runs_are_named_after_what_was_asked_for_and_never_share_a_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["train", "--steps", "1", "--batch-size", "10", "--hidden", "8", "--quiet"]
    (tmp_path / "runs" / "shapes").mkdir(parents=True)  # of a run that has only begun
    assert main([*options, "--data", str(data)]) == 0
    assert main([*options, "--data", str(data), "--preset", "mnist-dense"]) == 0
    complains(capsys, [*options, "--data", str(data), "--validation", "54"], "validation is 54")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        *("shapes", "shapes-2", "mnist-dense")
    }


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m minivae info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # whoever was faster


def test_a_run_is_not_evaluated_on_data_that_changed_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = tmp_path / "images.npy", str(tmp_path / "run")
    np.save(images, np.zeros((30, 28, 28), np.uint8))
    options = ["--data", str(images), "--steps", "1", "--batch-size", "10", "--hidden", "8"]
    assert train(Path(run), *options) == 0
    np.save(images, np.zeros((40, 28, 28), np.uint8))
    evaluate = ["evaluate", run, "--device", "cpu", "--samples", "10", "--quiet"]
    complains(capsys, evaluate, "differ from those", "or --data for others")
    assert main([*evaluate, "--data", str(images)]) == 0


def test_resume_with_another_model_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / CHECKPOINT).read_bytes()
    complains(
        capsys, ["train", "--resume", str(run), "--preset", "mnist-conv"], "another model", str(run)
    )
    assert (run / CHECKPOINT).read_bytes() == before


def test_a_run_goes_on_in_its_precision_unless_another_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--data", str(data), "--batch-size", "10", "--epochs", "1") == 0
    config = json.loads((folder / CONFIG).read_text())
    assert config["precision"] == "fp32"
    (folder / CONFIG).write_text(json.dumps(config | {"precision": "tf32"}))
    again = ["train", "--resume", str(folder), "--device", "cpu", "--epochs", "2", "--quiet"]
    complains(capsys, again, "tf32 needs a GPU's tensor cores")
    assert main([*again, "--precision", "fp32"]) == 0


@pytest.mark.parametrize(
    ("command", "less"), [("train", "--accumulate"), ("evaluate", "--chunk"), ("sample", "memory")]
)
def test_what_would_need_less_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, less: str
) -> None:
    def runs_out(arguments: argparse.Namespace) -> None:
        raise MemoryError

    monkeypatch.setattr(f"minivae.cli.{cli.MODULES[command]}.{command}", runs_out)
    complains(capsys, [command, *([] if command == "train" else ["run"])], "out of memory", less)


@pytest.mark.parametrize(
    ("option", "name"), [("--warmup", "warmup_steps"), ("--beta-warmup", "beta_warmup_steps")]
)
def test_a_number_that_nothing_can_count_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    arguments = ["train", option, "1" + "0" * 400, "--out", str(tmp_path / "run")]
    complains(capsys, arguments, f"{name} is 1000", "below 1e+09")


def test_a_run_whose_model_is_none_names_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / CONFIG).write_text('{"model": 3}')
    complains(capsys, ["info", str(tmp_path)], str(tmp_path / CONFIG), "not a model's")


def test_a_log_that_cannot_be_written_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    (tmp_path / "tensorboard").touch()
    arguments = ["--data", str(data), "--batch-size", "10", "--tensorboard", "--quiet"]
    complains(
        *(capsys, ["train", *arguments, "--out", str(tmp_path)]), "tensorboard: cannot be written"
    )


def test_resume_with_another_learning_rate_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complains(capsys, ["train", "--resume", str(run), "--lr", "0.5"], "lr is 0.5", "0.001")


def test_an_unknown_preset_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complains(capsys, ["train", "--preset", "mnist-conf"], "'mnist-conf'", "'mnist-conv'")


def test_an_unknown_data_set_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complains(capsys, ["train", "--data", "fashion"], "fashion", "fashion-mnist")


def test_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complains(capsys, ["train", "--epoch-count", "3"], "--epoch-count", "minivae")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], ["epochs is 0"]),
        (["--epochs", "two"], ["--epochs", "'two'"]),
        (["--epochs", "2", "--steps", "5"], ["--epochs and --steps exclude each other"]),
        (["--steps", "0"], ["--steps is 0"]),
        (["--out", ""], ["--out", "expected a name or a path"]),
        (["--hidden", "9" * 20], ["out of memory"]),
        (["--latent", "9" * 20], ["latent is 9", "expected an integer of 1 to 1,000,000,000"]),
        (["--batch-size", "-1"], ["batch_size is -1"]),
        (["--batch-size", "99"], ["batch_size is 99", "54"]),
        (["--lr", "nan"], ["lr is nan"]),
        (["--lr", "0"], ["lr is 0"]),
        (["--latent", "-3"], ["latent", "-3"]),
        (["--hidden", "64,x"], ["--hidden", "64,x"]),
        (["--hidden", "64,,32"], ["--hidden", "64,,32"]),
        (["--beta", "-1"], ["beta is -1"]),
        (["--free-bits", "inf"], ["free_bits is inf"]),
        (["--seed", "-1"], ["--seed", "'-1'", "0 to 2^64 - 1"]),
        (["--schedule", "linear"], ["schedule", "'linear'", "cosine"]),
        (["--schedule", "pieces"], ["schedule", "'pieces'", "cosine"]),
        (["--binarization", "x"], ["binarization", "'x'", "stochastic"]),
        (["--device", "cpux"], ["cpux", "cpu"]),
        (["--device", "gpu"], ["did you mean 'cuda'?"]),
        (["--images", "99"], ["images is 99, expected at most the 54"]),
        (["--validation", "54"], ["validation is 54, expected below the 54"]),
        (["--preset", "mnist-conv", "--hidden", "64"], ["hidden"]),
        (["--preset", "mnist-conv-ae", "--latent", "4"], ["latent"]),
        (["--preset", "mnist-conv-ae", "--beta", "3"], ["--beta", "has no KL"]),
        (["--k", "5"], ["--k", "iwae-paper"]),
        (["--preset", "iwae-paper-iwae", "--k", "0"], ["--k is 0"]),
        (["--sigma", "2"], ["--sigma", "--likelihood gaussian"]),
        (["--gamma", "0.2"], ["--gamma", "--schedule step"]),
        (["--step-every", "5"], ["--step-every", "--schedule step"]),
        (["--capacity-steps", "5"], ["--capacity-steps", "--capacity"]),
        (["--best"], ["--best", "--resume"]),
        (["--preset", "iwae-paper-iwae", "--likelihood", "gaussian"], ["bound by draws"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_option_is_named_and_nothing_is_written(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    folder = tmp_path / "run"
    command = ["train", "--quiet", "--data", str(data), "--out", str(folder), *arguments]
    complains(capsys, command, *words)
    assert not folder.exists()


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complains(capsys, ["train", "--data", str(tmp_path / "no.npz")], "no.npz")


def test_a_folder_that_holds_a_run_is_not_overwritten(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / CHECKPOINT).read_bytes()
    complains(capsys, ["train", "--data", str(data), "--out", str(run)], str(run), "--resume")
    assert (run / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("command", ["reconstruct", "sample", "plot", "info"])
def test_a_folder_that_is_not_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    complains(capsys, [command, str(tmp_path)], str(tmp_path), "is not a run folder")


def test_images_of_another_size_than_the_model_takes_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "small.npz", images=np.zeros((20, 8, 8), np.uint8))
    command = ["reconstruct", str(run), "--data", str(tmp_path / "small.npz")]
    complains(capsys, command, "28, 28, 1", "8, 8, 1")


def test_sampling_a_plain_autoencoder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = ["--preset", "mnist-conv-ae", "--data", str(data), "--batch-size", "10"]
    assert train(folder, *arguments, "--steps", "1") == 0
    complains(capsys, ["sample", str(folder)], str(folder), "no prior")


def test_a_loss_that_is_not_finite_is_one_line_with_exit_code_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train(tmp_path / "run", "--data", str(data), "--batch-size", "10", "--lr", "1e29")
    captured = capsys.readouterr()
    assert code == 1
    assert "the loss is not finite at step" in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_an_unknown_option_names_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complains(capsys, ["train", "--foo"], "unrecognized", "--foo (see minivae train --help)")


def test_what_a_preset_has_no_use_for_is_told_before_data_are_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_train, "load_data", None)
    complains(capsys, ["train", "--preset", "mnist-conv", "--hidden", "3"], "has convolutions")
    complains(capsys, ["train", "--preset", "mnist-conv-ae", "--beta", "2"], "no KL")


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minivae", "--help"], capture_output=True, text=True, check=True
    )
    for command in cli.MODULES:
        assert command in done.stdout
