"""MNIST and Fashion-MNIST: found where the user has them, or downloaded once and verified.

The gzip files differ from mirror to mirror, so the SHA-256 is that of the decompressed content.
"""

import gzip
import hashlib
import os
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

from ..errors import InputError
from ..files import replacing
from .idx import TEST, TRAIN, file_name, find_file, has_idx_files

TIMEOUT_SECONDS = 30
LARGEST_FILE = 1 << 26
"""Bytes that a download may have, compressed or not: the largest real file has 47 million."""

MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}

CLASS_NAMES = {
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
}
"""What the classes are called where their numbers do not say it."""

IMAGES, LABELS = 3, 1
SHA256 = {
    "mnist": {
        (TRAIN, IMAGES): "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        (TRAIN, LABELS): "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        (TEST, IMAGES): "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        (TEST, LABELS): "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        (TRAIN, IMAGES): "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        (TRAIN, LABELS): "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        (TEST, IMAGES): "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        (TEST, LABELS): "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}


def find_or_download(name: str) -> Path:
    """The folder with the IDX files of a data set: `$MINIVAE_DATA/NAME` if it has them, else the
    cache, filled by a download where a file is missing.

    Raises InputError if that folder lacks one of them, or no mirror gives a file with the right
    content.
    """
    own = os.environ.get("MINIVAE_DATA")
    if own and has_idx_files(Path(own) / name):
        for split, axes in SHA256[name]:
            if find_file(Path(own) / name, split, axes) is None:
                raise InputError(f"{Path(own) / name}: expected {file_name(split, axes)} as well")
        return Path(own) / name
    from platformdirs import user_cache_path

    folder = user_cache_path("minivae") / name
    for (split, axes), digest in SHA256[name].items():
        target = folder / f"{file_name(split, axes)}.gz"
        if not target.is_file():
            _download(name, target, digest)
    return folder


def _download(name: str, target: Path, digest: str) -> None:
    reasons = []
    for mirror in MIRRORS[name]:
        try:
            content = _fetch(mirror + target.name)
            found = hashlib.sha256(_decompress(content)).hexdigest()
        except (OSError, ValueError, HTTPException, zlib.error) as error:
            reasons.append(f"{mirror}: {error}")
            continue
        if found == digest:
            with replacing(target) as path:
                path.write_bytes(content)
            return
        reasons.append(f"{mirror}: SHA-256 {found[:12]}..., expected {digest[:12]}...")
    raise InputError(
        f"{target.name} of {name} could not be downloaded ({'; '.join(reasons)}); give a "
        f"folder with its files as --data, or put them in $MINIVAE_DATA/{name}"
    )


def _fetch(url: str) -> bytes:
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        size = int(response.headers.get("Content-Length") or 0)
        blocks = []
        with tqdm(total=size or None, desc=url.split("/")[-1], unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 16):
                blocks.append(block)
                bar.update(len(block))
                if bar.n > LARGEST_FILE:
                    raise OSError(f"more than {LARGEST_FILE} bytes")
    content = b"".join(blocks)
    if size and len(content) != size:
        raise OSError(f"{len(content)} bytes, expected {size}")
    return content


def _decompress(content: bytes) -> bytes:
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    result = decompressor.decompress(content, LARGEST_FILE)
    if decompressor.unconsumed_tail or not decompressor.eof:
        raise gzip.BadGzipFile("not one whole gzip stream of the expected size")
    return result
