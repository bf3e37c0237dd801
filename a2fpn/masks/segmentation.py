"""Values of COCO's ``segmentation``, polygons and run lengths, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.masks.rle import Rle, as_text, passes, run_lengths, shorten

_COORDINATE_LIMIT = 1e6  # pycocotools counts polygon steps in 32-bit integers and allocates one per pixel walked


@dataclass(frozen=True, eq=False)
class Polygons:
    """One mask as polygons, which together are the object.

    Args:
        points: Each ``(K, 2)`` float64, x and y in pixels; at least 3 points.
        size: (H, W) of the image.
    """

    points: tuple[NDArray[np.float64], ...]
    size: tuple[int, int]

    def to_rle(self) -> Rle:
        """The pixels that pycocotools finds inside."""
        flat = [points.reshape(-1) for points in self.points]
        return as_text([mask_utils.merge(mask_utils.frPyObjects(flat, *self.size))])[0]


def segmentation_to_rle(segmentation: object, height: int, width: int) -> Rle:
    """Turn a COCO ``segmentation`` into one RLE, after checks that pycocotools leaves out.

    pycocotools reads stray memory, or never returns, on run lengths that don't fill the image, and takes
    a list of four numbers for a box. Both are errors here.

    Args:
        segmentation: Polygons ``[[x0, y0, x1, y1, x2, y2, ...], ...]`` in pixels (all of them together are
            one object), or ``{"size": [H, W], "counts": ...}`` with compressed (text) or uncompressed
            (list of integers) run lengths.
        height: Image height, pixels.
        width: Image width, pixels.

    Raises:
        ValueError: If the value is none of these or doesn't fit the image.

    Example:
        >>> square = [[1, 1, 3, 1, 3, 3, 1, 3]]
        >>> decode_rle([segmentation_to_rle(square, 4, 4)])[0].astype(int)
        array([[0, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]])
        >>> segmentation_to_rle({"size": [4, 4], "counts": [5, 2]}, 4, 4)
        Traceback (most recent call last):
        ...
        ValueError: the run lengths of the mask add up to 7 pixels, the image has 4 x 4 = 16
    """
    mask = parse_segmentation(segmentation, height, width)
    return mask.to_rle() if isinstance(mask, Polygons) else mask


def parse_segmentation(segmentation: object, height: int, width: int) -> Polygons | Rle:
    """Check a COCO ``segmentation`` as :func:`segmentation_to_rle` does, and leave polygons as they are.

    Raises:
        ValueError: As there.
    """
    (mask,) = parse_segmentations([(segmentation, height, width)])
    if isinstance(mask, ValueError):
        raise mask
    return mask


def parse_segmentations(segmentations: Iterable[tuple[object, int, int]]) -> list[Polygons | Rle | ValueError]:
    """Check many as :func:`parse_segmentation` does one, compressed run lengths in a fraction of the time.

    Args:
        segmentations: Each with the height and width of its image, pixels.

    Returns:
        For each the mask, or the error that it would raise.

    Example:
        >>> parse_segmentations([({"size": [3, 3], "counts": "013000"}, 3, 3), (None, 3, 3)])
        [{'size': [3, 3], 'counts': '013000'}, ValueError('a segmentation is a list of polygons or an RLE, got None')]
    """
    masks: list[Polygons | Rle | ValueError] = []
    positions: list[int] = []
    texts: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    for position, (segmentation, height, width) in enumerate(segmentations):
        try:
            mask: Polygons | Rle | bytes | ValueError = _parse(segmentation, height, width)
        except ValueError as error:
            mask = error
        if isinstance(mask, bytes):
            positions.append(position)
            texts.append(mask)
            sizes.append((height, width))
            # Characters behind ASCII are among what the check finds.
            mask = Rle(size=[height, width], counts=mask.decode("ascii", "replace"))
        masks.append(mask)
    for part in passes(texts):
        runs, firsts, problems = run_lengths(texts[part])
        # As floats, which are exact as long as they may be right: sums of long texts overflow 64-bit integers.
        totals = np.add.reduceat(runs, firsts, dtype=np.float64).tolist()
        for number, (position, total, (height, width)) in enumerate(
            zip(positions[part], totals, sizes[part], strict=True)
        ):
            if number in problems:
                masks[position] = ValueError(problems[number])
            elif total != height * width:
                masks[position] = ValueError(_wrong_total(int(total), height, width))
    return masks


def _checked_polygon(polygon: object) -> NDArray[np.float64]:
    try:
        points: NDArray[np.float64] = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.empty(0)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon is a list of at least 3 points x, y, x, y, ..., got {shorten(polygon)}")
    if not (np.abs(points) < _COORDINATE_LIMIT).all():  # also true for NaN
        raise ValueError(f"a polygon has a coordinate that is no pixel position: {shorten(polygon)}")
    return points.reshape(-1, 2)


def _parse(segmentation: object, height: int, width: int) -> Polygons | Rle | bytes:
    """Check all but compressed run lengths, which are returned as they are."""
    if not isinstance(segmentation, Mapping):
        if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not segmentation:
            raise ValueError(f"a segmentation is a list of polygons or an RLE, got {shorten(segmentation)}")
        return Polygons(tuple(_checked_polygon(polygon) for polygon in segmentation), (height, width))
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"the mask's size is {size!r}, the image's [height, width] is {[height, width]}")
    if isinstance(counts, (str, bytes)):
        return counts if isinstance(counts, bytes) else counts.encode()
    if not isinstance(counts, Sequence) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError(f"the counts of an RLE are text or a list of run lengths, got {shorten(counts)}")
    if sum(counts) != height * width:
        raise ValueError(_wrong_total(sum(counts), height, width))
    return as_text([mask_utils.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)])[0]


def _wrong_total(total: int, height: int, width: int) -> str:
    pixels = f"{height} x {width} = {height * width}"
    return f"the run lengths of the mask add up to {total} pixels, the image has {pixels}"
