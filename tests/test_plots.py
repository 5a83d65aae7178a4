"""Each picture: written whole or not at all, with a title and labelled axes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from minivae import InputError, plots

RNG = np.random.default_rng(0)
IMAGES = RNG.random((24, 7, 5, 1))
COLOUR = RNG.integers(0, 256, (24, 7, 5, 3), dtype=np.uint8)
LABELS = np.arange(24) % 3
CODES = RNG.standard_normal((24, 4))
TERMS = {"loss": 3.0, "reconstruction": 2.0, "kl": 1.0}
EPOCHS = [{"epoch": e, "step": 9 * e, "train": TERMS, "test": TERMS} for e in (1, 2, 3)]
STEPS = [{"step": s, "train": TERMS} for s in range(1, 60)]
PLAIN = {"loss": 3.0, "reconstruction": 3.0, "kl": 0.0}

PICTURES: dict[str, Callable[[Path], None]] = {
    "loss curves": lambda p: plots.loss_curves(p, EPOCHS),
    "loss curves of one epoch": lambda p: plots.loss_curves(p, EPOCHS[:1]),
    "loss curves by step": lambda p: plots.loss_curves(p, [*STEPS, *EPOCHS]),
    "loss curves without test": lambda p: plots.loss_curves(p, STEPS),
    "loss curves without KL": lambda p: plots.loss_curves(p, [{"epoch": 1, "train": PLAIN}]),
    "reconstructions": lambda p: plots.reconstructions(p, IMAGES, IMAGES, title="T"),
    "one reconstruction": lambda p: plots.reconstructions(p, IMAGES[:1], IMAGES[:1], title="T"),
    "colour reconstructions": lambda p: plots.reconstructions(p, COLOUR, COLOUR, title="T"),
    "a last row that is short": lambda p: plots.reconstructions(
        p, IMAGES[:15], IMAGES[:15], title="T"
    ),
    "samples": lambda p: plots.sample_grid(p, IMAGES),
    "samples by class": lambda p: plots.sample_grid(p, IMAGES, classes=3),
    "errors one step of float32 apart": lambda p: plots.error_histogram(
        p, np.array([1, 1 + 2**-23], np.float32)
    ),
    "one sample": lambda p: plots.sample_grid(p, IMAGES[:1]),
    "an odd number of colour samples": lambda p: plots.sample_grid(p, COLOUR[:11]),
    "classes": lambda p: plots.class_reconstructions(p, IMAGES, IMAGES, LABELS),
    "classes of one image": lambda p: plots.class_reconstructions(
        p, IMAGES[:3], IMAGES[:3], LABELS[:3]
    ),
    "scatter by principal components": lambda p: plots.latent_scatter(p, CODES, LABELS),
    "scatter of two dimensions": lambda p: plots.latent_scatter(p, CODES[:, :2], LABELS),
    "scatter of one dimension": lambda p: plots.latent_scatter(p, CODES[:, :1], LABELS),
    "scatter without labels": lambda p: plots.latent_scatter(p, CODES, None),
    "scatter of one point": lambda p: plots.latent_scatter(p, CODES[:1], LABELS[:1]),
    "manifold": lambda p: plots.manifold(p, IMAGES[:16], 4),
    "traversals": lambda p: plots.traversals(p, IMAGES.reshape(4, 6, 7, 5, 1), np.arange(6.0)),
    "error histogram": lambda p: plots.error_histogram(p, RNG.random(200)),
    "histogram of one error": lambda p: plots.error_histogram(p, RNG.random(1)),
    "KL bars": lambda p: plots.kl_per_dimension(p, RNG.random(50)),
    "side by side": lambda p: plots.compare_grids(
        p,
        {"left": IMAGES.reshape(4, 6, 7, 5, 1), "right": IMAGES[:8].reshape(4, 2, 7, 5, 1)},
        title="Two grids",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_a_readable_file_with_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture.png"
    PICTURES[name](path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 150
    assert pixels.std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_has_a_title_and_labelled_axes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: saved.append(figure))
    PICTURES[name](tmp_path)
    assert saved[0].get_suptitle()
    for axes in saved[0].axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()


@pytest.mark.parametrize("shape", [(10, 16, 160, 1), (10, 28, 28, 1), (10, 64, 16, 1)])
def test_images_of_any_proportions_fill_their_picture(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    black = np.zeros(shape)
    plots.reconstructions(tmp_path / "p.png", black, black, title="T")
    with Image.open(tmp_path / "p.png") as image:
        assert np.mean(np.asarray(image.convert("L")) < 10) > 0.3  # the rest is for labels


def test_a_loss_without_kl_has_a_single_panel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: saved.append(figure))
    plots.loss_curves(tmp_path, [{"epoch": 1, "train": PLAIN}])
    assert len(saved[0].axes) == 1


def test_a_picture_that_fails_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(self: Figure, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InputError, match=r"picture\.png: No space left"):
        plots.sample_grid(path, IMAGES)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_principal_components_find_the_directions_of_largest_variance() -> None:
    spread = np.array([5.0, 0.1, 2.0])
    x = np.random.default_rng(0).standard_normal((4000, 3)) * spread
    projection, shares = plots.principal_components(x, 2)
    # Four thousand draws: a few percent of sampling error.
    assert projection.std(axis=0) == pytest.approx([5.0, 2.0], rel=0.05)
    assert shares == pytest.approx([25 / 29.01, 4 / 29.01], rel=0.05)


def test_every_reconstruction_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = []
    monkeypatch.setattr(plots, "_show", lambda axes, images: shown.append(images))
    monkeypatch.setattr(plots, "_label", lambda *arguments: None)
    images = IMAGES[:15].astype(np.float32)
    plots.reconstructions(tmp_path / "p.png", images, 1 - images, title="T")
    assert shown[0].shape == (4, 10, 7, 5, 1)
    np.testing.assert_array_equal(shown[0][2, :5], images[10:])
    np.testing.assert_array_equal(shown[0][3, :5], 1 - images[10:])


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".pdf", b"%PDF"), (".jpg", b"\xff\xd8"), (".PNG", b"\x89PNG")]
)
def test_a_picture_has_the_format_of_its_suffix(tmp_path: Path, suffix: str, begin: bytes) -> None:
    path = tmp_path / f"p{suffix}"
    plots.sample_grid(path, IMAGES)
    assert path.read_bytes().startswith(begin)


@pytest.mark.parametrize(
    "draw",
    [
        lambda p, names: plots.sample_grid(p, IMAGES, classes=3, names=names),
        lambda p, names: plots.class_reconstructions(p, IMAGES, IMAGES, LABELS, names=names),
        lambda p, names: plots.latent_scatter(p, CODES, LABELS, names=names),
    ],
    ids=["samples", "reconstructions", "scatter"],
)
def test_classes_with_names_are_called_by_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, draw: Callable[[Path, list[str]], None]
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: saved.append(figure))
    draw(tmp_path, ["hat", "shoe"])
    (axes,) = saved[0].axes
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    if legend := axes.get_legend():
        texts = legend.get_texts()
    shown = [text.get_text() for text in texts]
    # The third has no name, and is shown as its number.
    assert "".join(shown).count("hatshoe2") == 1


@pytest.mark.parametrize("names", [("_bg", r"$\foo$", "a $5 b $6"), ("caf\udce9", "x", "y")])
def test_a_class_may_have_any_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: tuple[str, ...]
) -> None:
    figures: list[Figure] = []
    save = plots.save_figure

    def keep(path: Path, figure: Figure) -> None:
        figures.append(figure)
        save(path, figure)

    monkeypatch.setattr(plots, "save_figure", keep)
    plots.latent_scatter(tmp_path / "means.png", CODES, LABELS, names=names)
    plots.class_reconstructions(tmp_path / "c.png", IMAGES, IMAGES, LABELS, names=names)
    plots.sample_grid(tmp_path / "s.png", IMAGES, classes=3, names=names)
    shown = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert shown == [name.replace("\udce9", "?") for name in names]


def test_twenty_classes_have_colours_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: figures.append(figure))
    plots.latent_scatter(tmp_path / "means.png", RNG.standard_normal((40, 2)), np.arange(40) % 20)
    handles = figures[0].axes[0].get_legend().legend_handles
    assert len({tuple(handle.get_facecolor()[0]) for handle in handles}) == 20


def test_an_unknown_suffix_of_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.txt: expected a picture's suffix: .*png"):
        plots.sample_grid(tmp_path / "p.txt", IMAGES)


def test_principal_components_have_a_fixed_sign() -> None:
    x = RNG.standard_normal((50, 4)) * [3, 1, 1, 1]
    assert np.corrcoef(plots.principal_components(x, 1)[0][:, 0], x[:, 0])[0, 1] > 0.9


def test_the_manifold_runs_from_top_left_to_bottom_right() -> None:
    grid = plots.manifold_grid(3)
    # The 2.5th and 97.5th percentiles of the standard normal.
    assert grid[0] == pytest.approx([-1.95996, 1.95996], abs=1e-4)
    assert grid[4] == pytest.approx([0, 0], abs=1e-12)
    assert grid[8] == pytest.approx([1.95996, -1.95996], abs=1e-4)
