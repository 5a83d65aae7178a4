"""Every kind of data a user brings, and one clear line for each way in which it can be wrong."""

import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivae import InputError
from minivae.data import Dataset, Splits, download, load
from minivae.data.batching import epoch_permutation
from minivae.data.dataset import unit_pixels
from minivae.data.folder import SUFFIXES

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 5, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 3, 30)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, split: str = "train", count: int = 30, zipped: bool = True) -> None:
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    (folder / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx(IMAGES[:count])))
    (folder / f"{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx(LABELS[:count])))


def refused(source: Path, *words: str) -> None:
    """Checks that loading fails with one line that has the file's name and all the words."""
    with pytest.raises(InputError) as caught:
        load(str(source))
    message = str(caught.value)
    assert "\n" not in message
    for word in (source.name, *words):
        assert word in message, message


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_give_images_and_labels(tmp_path: Path, zipped: bool) -> None:
    write_idx(tmp_path, zipped=zipped)
    write_idx(tmp_path, "t10k", 7, zipped)
    splits = load(str(tmp_path))
    assert np.array_equal(splits.train.images[..., 0], IMAGES)
    assert splits.train.images.dtype == np.uint8
    assert np.array_equal(splits.test.labels, LABELS[:7])


def test_a_tenth_is_held_out_where_no_test_split_is_given(tmp_path: Path) -> None:
    write_idx(tmp_path)
    splits = load(str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (27, 3)
    assert np.array_equal(splits.test.images[..., 0], IMAGES[splits.test.origin])


def test_one_idx_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "some-images"
    path.write_bytes(idx(IMAGES))
    assert load(str(path)).train.images.shape == (27, 5, 4, 1)


@pytest.mark.parametrize("keep", [0, 3, 12, 40, -1])
def test_a_truncated_idx_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(IMAGES)[:keep])
    refused(path)


@pytest.mark.parametrize("keep", [5, 30, -9])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(IMAGES))[:keep])
    refused(path)


def test_a_corrupt_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.compress(idx(IMAGES)))
    content[60:80] = bytes(20)
    path.write_bytes(content)
    refused(path, "gzip")


def test_a_wrong_magic_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(LABELS))
    refused(path, "0x00000801", "0x00000803")


@pytest.mark.parametrize("count", [29, 31, 2**31])
def test_a_header_that_disagrees_with_the_file_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4I", 0x803, count, 5, 4) + IMAGES.tobytes())
    refused(path, f"{count} x 5 x 4")


def test_labels_below_zero_are_refused() -> None:
    with pytest.raises(InputError, match="mine: labels range from -3 to 1, expected 0 to"):
        Dataset.of(np.zeros((2, 4, 4), np.uint8), np.array([1, -3]), "mine")


def test_labels_of_another_count_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:9])))
    with pytest.raises(InputError, match=r"labels.*\(9,\).*30 images"):
        load(str(tmp_path))


def test_npy_takes_grey_and_colour_images(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", IMAGES)
    np.save(tmp_path / "colour.npy", RNG.random((20, 5, 4, 3)))
    assert load(str(tmp_path / "grey.npy")).train.images.shape == (27, 5, 4, 1)
    colour = load(str(tmp_path / "colour.npy")).train.images
    assert colour.shape == (18, 5, 4, 3)
    assert colour.dtype == np.float32


def test_true_is_white(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", IMAGES > 127)
    train = load(str(tmp_path / "data.npy")).train
    assert train.images.dtype == np.uint8
    assert np.array_equal(train.images[..., 0], np.where(IMAGES[train.origin] > 127, 255, 0))


@pytest.mark.parametrize(
    "keys",
    [
        ("images", "labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
)
def test_npz_takes_both_splits_under_either_name(tmp_path: Path, keys: tuple[str, ...]) -> None:
    arrays = (IMAGES, LABELS, IMAGES[:5], LABELS[:5])
    np.savez(tmp_path / "data.npz", **dict(zip(keys, arrays, strict=True)))
    splits = load(str(tmp_path / "data.npz"))
    assert (len(splits.train), len(splits.test)) == (30, 5)
    assert np.array_equal(splits.test.labels, LABELS[:5])


FLOATS = IMAGES / 255


def with_value(value: float) -> np.ndarray:
    images = FLOATS.copy()
    images[3, 2, 1] = value
    return images


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": with_value(np.nan)}, ["NaN"]),
        ({"images": with_value(np.inf)}, ["infinity"]),
        ({"images": with_value(1.5)}, ["1.5", "[0, 1]"]),
        ({"images": with_value(-0.1)}, ["-0.1", "[0, 1]"]),
        ({"images": IMAGES.astype(np.int32)}, ["int32", "uint8"]),
        ({"images": IMAGES[0]}, ["(5, 4)", "n x h x w"]),
        ({"images": IMAGES[:0]}, ["(0, 5, 4)"]),
        ({"images": IMAGES[:1]}, ["1 image", "at least 2"]),
        ({"images": IMAGES, "labels": LABELS[:4]}, ["labels", "30 images"]),
        ({"images": IMAGES, "labels": LABELS / 2}, ["labels", "integer"]),
        ({"images": IMAGES, "test_images": IMAGES[:, :4]}, ["(4, 4, 1)", "(5, 4, 1)"]),
        ({"pictures": IMAGES}, ['"images"', "pictures"]),
        ({"images": np.array([{}, {}], object)}, ["Python objects"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_npz_with_wrong_content_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    refused(tmp_path / "data.npz", *words)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 4, 90, -40])
def test_a_truncated_numpy_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"data{suffix}"
    np.savez(path, images=IMAGES) if suffix == ".npz" else np.save(path, IMAGES)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path)


def test_a_numpy_header_that_is_no_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((4, 5, 5), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"}", b"(", 1))
    refused(path, "not a whole .npy file")


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.array([print, len], object), allow_pickle=True)
    refused(tmp_path / "data.npy", "Python objects")


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (4, 5)) -> None:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = RNG.integers(0, 256, size[::-1], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_subfolders_of_images_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    write_images(tmp_path, {"dogs": 12, "cats": 8})
    splits = load(str(tmp_path))
    labels = np.concatenate([splits.train.labels, splits.test.labels])
    assert np.bincount(labels).tolist() == [8, 12]
    assert splits.train.images.shape == (18, 5, 4, 1)


def test_a_flat_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, {".": 10})
    splits = load(str(tmp_path))
    assert splits.train.labels is None
    assert len(splits.test) == 1


def test_train_and_test_subfolders_are_the_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 4, "b": 4})
    write_images(tmp_path / "test", {"a": 1, "b": 2})
    splits = load(str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (8, 3)


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 4, "dog": 4})
    write_images(tmp_path / "test", {"dog": 2})
    with pytest.raises(InputError, match=r"train has the classes \['cat', 'dog'\], test \['dog'\]"):
        load(str(tmp_path))


def test_colour_images_have_three_channels(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (4, 5), (number, 2, 3)).save(tmp_path / f"{number}.png")
    assert load(str(tmp_path)).train.images.shape == (3, 5, 4, 3)


def test_images_of_mixed_sizes_are_refused_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, {".": 5})
    Image.new("L", (9, 9)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png.*\(9, 9, 1\).*\(5, 4, 1\)"):
        load(str(tmp_path))


def test_an_unreadable_image_is_refused_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, {".": 5})
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"bad\.png: not a readable image"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["deep.png", "deep.pgm", "float.tif"])
def test_grey_of_more_than_8_bits_keeps_its_shades(tmp_path: Path, name: str) -> None:
    shades = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    pixels = shades if name == "float.tif" else np.rint(65535 * shades).astype(np.uint16)
    for copy in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{copy}_{name}")
    images = load(str(tmp_path)).train.images
    assert images.dtype == np.float32
    assert np.allclose(images[0, :, :, 0], shades, atol=1e-5)  # half of 1 / 65535


def test_images_of_8_and_of_16_bits_are_not_mixed(tmp_path: Path) -> None:
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(
        InputError, match=r"b\.png: an image of .* in float32, expected .* in uint8"
    ):
        load(str(tmp_path))


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_an_image_that_ends_anywhere_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / "folder" / f"cut{suffix}"
    mode = "L" if suffix == ".pgm" else "RGB"
    Image.effect_noise((40, 30), 60).convert(mode).save(whole)
    path.parent.mkdir()
    content = whole.read_bytes()
    for keep in (0, 1, 6, 12, 20, 40, len(content) // 2):
        path.write_bytes(content[:keep])
        refused(path.parent, str(path), "not a readable image")


def test_a_class_whose_files_are_no_images_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {"cats": 3})
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "1.avif").touch()
    refused(tmp_path, "dogs: holds no images that can be read, but 1.avif")


def test_a_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 5)) for _ in range(3)]
    pages[0].save(tmp_path / "1.tiff", save_all=True, append_images=pages[1:])
    refused(tmp_path, "1.tiff", "a TIFF of several pages")


def test_data_that_may_not_be_read_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any) -> Path:
        raise PermissionError(13, "Permission denied", "train-images")

    monkeypatch.setattr("minivae.data.download.find_or_download", forbidden)
    with pytest.raises(InputError, match="train-images: cannot be read: Permission denied"):
        load("mnist")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path, "found none")


def test_images_beside_subfolders_of_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {"": 3, "cats": 3})
    refused(tmp_path, "such as 0.png, and subfolders of images, such as cats")


@pytest.mark.parametrize("shape", [(20, 3, 32, 32), (20, 8, 8, 5)])
def test_channels_that_are_not_last_or_too_many_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="with the channels last, at most 4"):
        Dataset.of(np.zeros(shape, np.uint8))


def test_images_that_lie_too_deep_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/cats": 3})
    refused(tmp_path, "found only deeper ones, such as", "cats", "both train and test")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"label": LABELS}, "unknown array 'label'; did you mean 'labels'?"),
        ({"test_labels": LABELS}, "labels of test images, expected the images as well"),
        ({"test_images": IMAGES[:0]}, "npz, test images: images have shape"),
    ],
    ids=["a near miss", "labels alone", "no test images"],
)
def test_an_array_that_would_be_left_out_is_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES, **arrays)
    refused(tmp_path / "data.npz", words)


def test_lists_are_taken_like_arrays() -> None:
    data = Dataset.of([[[0.0, 1.0]]] * 3, [0, 1, 1])
    assert data.images.shape == (3, 1, 2, 1)
    assert data.classes == 2


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed is -1"):
        load("glyphs", seed=-1)


@pytest.mark.parametrize(
    ("name", "near"), [("glyph", "glyphs"), ("fashion", "fashion-mnist"), ("mnits", "mnist")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        load(name)


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text that is not data at all")
    refused(tmp_path / "notes.txt", "magic number")


def test_real_mnist_has_its_sizes(real_data: Path) -> None:
    splits = load(str(real_data / "mnist"))
    assert splits.train.images.shape == (60000, 28, 28, 1)
    assert splits.test.images.shape == (10000, 28, 28, 1)
    assert len(np.bincount(splits.test.labels)) == 10


def test_real_data_has_the_published_hashes(real_data: Path) -> None:
    for name, files in download.SHA256.items():
        for (split, axes), digest in files.items():
            path = real_data / name / f"{download.file_name(split, axes)}.gz"
            content = gzip.decompress(path.read_bytes())
            assert hashlib.sha256(content).hexdigest() == digest


def test_an_epoch_visits_every_image_once() -> None:
    assert np.array_equal(np.sort(epoch_permutation(50, 1, 2)), np.arange(50))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_permutation(50, 1, 2)
    assert np.array_equal(first, epoch_permutation(50, 1, 2))
    assert not np.array_equal(first, epoch_permutation(50, 1, 3))
    assert not np.array_equal(first, epoch_permutation(50, 2, 2))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A local server with the four files, as two mirrors `first` and `second`, and their hashes
    in place of MNIST's. Called with a mirror's name it gives the folder behind it."""
    served, cache = tmp_path / "served", tmp_path / "cache"
    digests = {}
    for name in ("first", "second"):
        (served / name).mkdir(parents=True)
        write_idx(served / name)
        write_idx(served / name, "t10k", 6)
    for split, axes in download.SHA256["mnist"]:
        content = (served / "first" / f"{download.file_name(split, axes)}.gz").read_bytes()
        digests[split, axes] = hashlib.sha256(gzip.decompress(content)).hexdigest()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    mirrors = (f"{address}/first/", f"{address}/second/")
    monkeypatch.setitem(download.MIRRORS, "mnist", mirrors)
    monkeypatch.setitem(download.SHA256, "mnist", digests)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("MINIVAE_DATA", raising=False)
    yield lambda name: served / name
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_download_is_verified_and_cached(mirror: Any, tmp_path: Path) -> None:
    splits: Splits = load("mnist")
    assert np.array_equal(splits.train.images[..., 0], IMAGES)
    assert len(cached(tmp_path)) == 4


def test_a_second_load_needs_no_network(mirror: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load("mnist")
    monkeypatch.setitem(download.MIRRORS, "mnist", ())
    assert len(load("mnist").train) == 30


def test_the_next_mirror_is_tried_when_one_lacks_a_file(mirror: Any) -> None:
    (mirror("first") / "train-labels-idx1-ubyte.gz").unlink()
    assert np.array_equal(load("mnist").train.labels, LABELS)


def test_the_next_mirror_is_tried_when_one_has_another_content(mirror: Any) -> None:
    path = mirror("first") / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(LABELS[::-1])))
    assert np.array_equal(load("mnist").train.labels, LABELS)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", gzip.compress(b"x")], ids=["nothing", "a page", "another file"]
)
def test_a_download_that_no_mirror_has_right_names_each_and_leaves_nothing(
    mirror: Any, tmp_path: Path, content: bytes
) -> None:
    for name in ("first", "second"):
        (mirror(name) / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"first.*second.*--data.*MINIVAE_DATA"):
        load("mnist")
    assert cached(tmp_path) == []


def test_the_users_own_folder_comes_before_the_cache(
    mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVAE_DATA", str(tmp_path / "own"))
    (tmp_path / "own" / "mnist").mkdir(parents=True)
    write_idx(tmp_path / "own" / "mnist", count=20)
    write_idx(tmp_path / "own" / "mnist", "t10k", 7)
    assert len(load("mnist").train) == 20
    assert cached(tmp_path) == []


def test_the_users_own_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVAE_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist", count=20)
    write_idx(tmp_path / "mnist", "t10k", 7)
    next((tmp_path / "mnist").glob("t10k-labels*")).unlink()
    with pytest.raises(InputError, match=r"mnist: expected t10k-labels-idx1-ubyte as well"):
        load("mnist")


def test_glyphs_are_the_same_from_one_seed() -> None:
    from minivae.data.glyphs import glyphs

    first, second, other = (glyphs(seed, 300, 20) for seed in (3, 3, 4))
    assert np.array_equal(first.train.images, second.train.images)
    assert not np.array_equal(first.train.images, other.train.images)


def test_glyphs_are_labelled_digits_of_mnists_size_and_brightness() -> None:
    splits = load("glyphs")
    assert splits.train.images.shape == (20000, 28, 28, 1)
    assert splits.train.images.dtype == np.uint8
    assert np.bincount(splits.train.labels).min() > 1800
    assert 20 < splits.train.images.mean() < 50
    assert splits.train.images.max(axis=(1, 2, 3)).min() > 100


def test_glyphs_can_be_told_apart_by_the_nearest_neighbour() -> None:
    splits = load("glyphs")
    train = splits.train.images[:5000].reshape(5000, -1).astype(np.float32)
    test = splits.test.images[:200].reshape(200, -1).astype(np.float32)
    distances = np.sum(train**2, axis=1) - 2 * test @ train.T
    found = splits.train.labels[np.argmin(distances, axis=1)]
    assert np.mean(found == splits.test.labels[:200]) > 0.9


def test_images_of_either_type_come_to_the_same_numbers() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    scaled = unit_pixels(pixels)
    assert scaled.dtype == np.float32
    assert np.array_equal(unit_pixels(scaled), scaled)
    assert (scaled[0], scaled[255]) == (0, 1)


def test_images_of_several_sizes_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="data: images: expected an array, or values of one shape"):
        Dataset.of([np.zeros((2, 2)), np.zeros((3, 3))])


def test_a_test_split_of_sorted_images_has_all_classes(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), 50)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "sorted.npz", images=pixels, labels=labels)
    splits = load(tmp_path / "sorted.npz")
    assert set(splits.test.labels) == set(range(4))
    for split in (splits.train, splits.test):
        np.testing.assert_array_equal(split.images[..., 0], pixels[split.origin])
        np.testing.assert_array_equal(split.labels, labels[split.origin])
        assert np.all(np.diff(split.origin) > 0)
    assert len({*splits.train.origin, *splits.test.origin}) == 200
    other = load(tmp_path / "sorted.npz", seed=1)
    assert not np.array_equal(other.test.origin, splits.test.origin)


def draw(path: Path, colour: Any, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (3, 2), colour).save(path)


def test_a_folder_names_its_classes_and_where_its_images_came_from(tmp_path: Path) -> None:
    for number in range(10):
        draw(tmp_path / "b" / f"{number}.png", 10 + number)
        draw(tmp_path / "a" / f"{number}.png", 100 + number)
    draw(tmp_path / ".ipynb_checkpoints" / "0.png", 255)
    (tmp_path / "a" / "._0.png").write_text("of another system")
    splits = load(tmp_path)
    assert splits.class_names == ("a", "b")
    for split in (splits.train, splits.test):
        for image, label, origin in zip(split.images, split.labels, split.origin, strict=True):
            name, number = origin.removesuffix(".png").split("/")
            assert name == splits.class_names[label]
            assert image[0, 0, 0] == {"a": 100, "b": 10}[name] + int(number)


def test_a_folder_of_another_second_split_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "0.png", 1)
    draw(tmp_path / "val" / "0.png", 1)
    refused(tmp_path, "has folders train and val, expected train and test")


@pytest.mark.parametrize(("mode", "drawn"), [("LA", (0, 0)), ("RGBA", (0, 0, 0, 0))])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str, drawn: Any) -> None:
    opaque = (*drawn[:-1], 255)
    for name, colour in (("0", drawn), ("1", opaque)):
        draw(tmp_path / f"{name}.png", colour, mode)
    splits = load(tmp_path)
    images = {
        o: i for split in splits[1:3] for o, i in zip(split.origin, split.images, strict=True)
    }
    assert np.all(images["0.png"] == 255)
    assert np.all(images["1.png"] == 0)
    assert images["0.png"].shape == (2, 3, len(drawn) - 1)
