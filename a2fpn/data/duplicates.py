"""Near-duplicate images across splits, which leak training scenes into validation and inflate its metrics.

The hash is the perceptual one of Zauner (Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the
8 x 8 lowest DCT frequencies of the image at 32 x 32 gray pixels, each thresholded at their median. Scaling, compression
and brightness changes flip only a few bits. Candidates are verified by the correlation of the 32 x 32 pixels, since
images with little structure have similar hashes.

Shape shorthand: N images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from a2fpn.data.check.report import Finding, Track, few
from a2fpn.data.images import image_path, open_image

_SIDE, _LOW = 32, 8  # pixels of the small image, frequencies of the hash
_BITS = 12  # of 64 that may differ; different images differ by 16 or more
_CORRELATION = 0.7  # minimum correlation of the small images
_ROWS = 1024  # images compared at once


@dataclass(frozen=True)
class NearDuplicate:
    """Two nearly identical images.

    Args:
        first: The image of the first set.
        second: The image of the second set.
        bits: Hamming distance of their 64-bit hashes.
        correlation: Correlation of their small versions, in [-1, 1].
    """

    first: str
    second: str
    bits: int
    correlation: float


def near_duplicates(
    first: Sequence[str], second: Sequence[str], roots: tuple[Path, Path], track: Track
) -> list[NearDuplicate]:
    """Find pairs of nearly identical images, one of each set.

    Args:
        first: Names of the images of the first set, relative to its folder.
        second: Names of the images of the second set.
        roots: The two folders.
        track: Shows the progress.

    Returns:
        The pairs, the closest first. Unreadable files are skipped; the check of files reports them.
    """
    names, hashes, small = [], [], []
    for root, files in zip(roots, (first, second), strict=True):
        found = _hashed(root, files, track)
        names.append([name for name, *_ in found])
        hashes.append(np.array([value for _, value, _ in found], dtype=np.uint64))
        small.append(np.array([pixels for *_, pixels in found], dtype=np.float32).reshape(len(found), -1))
    pairs = []
    for start in range(0, len(names[0]), _ROWS):
        bits = _count_bits(hashes[0][start : start + _ROWS, None] ^ hashes[1][None])
        for row, column in np.argwhere(bits <= _BITS).tolist():
            correlation = float(small[0][start + row] @ small[1][column])
            if correlation >= _CORRELATION:
                pair = (names[0][start + row], names[1][column])
                pairs.append(NearDuplicate(*pair, int(bits[row, column]), round(correlation, 4)))
    return sorted(pairs, key=lambda pair: (pair.bits, -pair.correlation, pair.first, pair.second))


def duplicate_findings(
    first: Mapping[int, str], second: Sequence[str], roots: tuple[Path, Path], track: Track
) -> Iterator[Finding]:
    """Report images of one set that are nearly identical to images of another, as a finding of the data check.

    Args:
        first: File names by image id.
        second: File names of the other set.
        roots: The folders of both.
        track: Shows the progress.
    """
    pairs = near_duplicates(list(first.values()), second, roots, track)
    if not pairs:
        return
    ids = {name: image_id for image_id, name in first.items()}
    images = list(dict.fromkeys(pair.first for pair in pairs))
    shown = few((f"{pair.first} and {pair.second} ({pair.bits} of 64 bits)" for pair in pairs), len(pairs))
    message = f"{len(images)} of {len(first)} images are nearly the same as images of the other set: {shown}."
    advice = "Put images of one scene into one split (a2fpn data split --group-by), or remove the copies."
    yield Finding(
        "warning", "near-duplicate-split", message, advice, len(images), tuple(ids[name] for name in images[:50])
    )


def image_hash(image: Image.Image) -> int:
    """Return the perceptual hash of an image, 64 bits.

    Example:
        >>> picture = Image.radial_gradient("L").crop((0, 40, 200, 256))
        >>> (image_hash(picture) ^ image_hash(picture.resize((100, 100)))).bit_count() <= 4
        True
    """
    return _hash(_small(image))[0]


def _hashed(root: Path, names: Sequence[str], track: Track) -> list[tuple[str, int, NDArray[np.float32]]]:
    def one(name: str) -> tuple[str, int, NDArray[np.float32]] | None:
        try:
            with open_image(image_path(root, name)) as image:
                image.draft("L", (4 * _SIDE, 4 * _SIDE))  # JPEGs are decoded at an eighth of their size
                ImageOps.exif_transpose(image, in_place=True)
                return (name, *_hash(_small(image)))
        except Exception:  # PIL raises almost anything on a corrupt file
            return None

    with ThreadPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(track(pool.imap(one, names, 16), "comparing images", len(names)))
    return [item for item in found if item is not None]


def _small(image: Image.Image) -> NDArray[np.float64]:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((255 * (values - values.min()) / max(float(np.ptp(values)), 1e-9)).astype(np.uint8))
    gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(gray, dtype=np.float64)


def _hash(pixels: NDArray[np.float64]) -> tuple[int, NDArray[np.float32]]:
    """Compute the hash, and the pixels with zero mean and unit norm."""
    low = (_COSINES @ pixels @ _COSINES.T).ravel()
    low[0] = 0  # the mean carries no structure
    bits = low > np.median(low)
    value = int.from_bytes(np.packbits(bits).tobytes(), "big")
    centered = pixels - pixels.mean()
    return value, (centered / max(float(np.linalg.norm(centered)), 1e-9)).astype(np.float32)


def _cosines() -> NDArray[np.float64]:
    """Lowest rows of the DCT matrix, (8, 32)."""
    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    return np.asarray(np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE)), dtype=np.float64)


_COSINES = _cosines()


def _count_bits(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Count the set bits of each value."""
    octets = np.ascontiguousarray(values)[..., None].view(np.uint8)
    counts: NDArray[np.uint8] = _ONES[octets].sum(-1, dtype=np.uint8)
    return counts


_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)
