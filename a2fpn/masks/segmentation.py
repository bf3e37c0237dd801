"""Validation of COCO segmentations, polygons and run lengths, before pycocotools reads them.

Shape shorthand: ``N`` segmentations, ``H`` x ``W`` image pixels.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.masks.rle import Rle, as_text, passes, run_lengths, shorten

COORDINATE_LIMIT = 1e6  # pycocotools counts polygon steps in 32-bit integers and allocates one per pixel walked
_LARGEST_IMAGE = 2**31  # pixels; pycocotools counts them in 32 bits
_AREAS_AT_ONCE = 255  # pycocotools' area raises OverflowError for more


@dataclass(frozen=True, eq=False)
class Polygons:
    """One mask as the union of polygons.

    Args:
        points: Each ``(K, 2)`` float64, x and y in pixels; at least 3 points.
        size: (H, W) of the image.
    """

    points: tuple[NDArray[np.float64], ...]
    size: tuple[int, int]

    def to_rle(self) -> Rle:
        """Rasterize by pycocotools."""
        flat = [points.reshape(-1) for points in self.points]
        return as_text([mask_utils.merge(mask_utils.frPyObjects(flat, *self.size))])[0]


@dataclass(frozen=True, eq=False)
class Segmentations:
    """Segmentations of many objects, parsed in one pass.

    Args:
        sizes: Height and width of each one's image, pixels.
        points: x and y of all valid polygons, concatenated, (P, 2).
        bounds: Start of each polygon, and the end of the last, (Q + 1,).
        owners: Index of each polygon's segmentation, ascending, (Q,).
        rles: Run lengths, by index of the segmentation.
        errors: Error messages of invalid segmentations, by index.
        fragments: Error messages of the parts dropped from the others, by index: one message for each part.
    """

    sizes: Sequence[tuple[int, int]]
    points: NDArray[np.float64]
    bounds: NDArray[np.int64]
    owners: NDArray[np.int64]
    rles: Mapping[int, Rle]
    errors: Mapping[int, str]
    fragments: Mapping[int, Sequence[str]]

    @classmethod
    def of(cls, segmentations: Iterable[tuple[object, int, int]]) -> Segmentations:
        """Check segmentations; an object keeps its valid polygons.

        Args:
            segmentations: Each as in a COCO file, with the height and width of its image, pixels.

        Example:
            >>> square = [1, 1, 3, 1, 3, 3, 1, 3]
            >>> found = Segmentations.of([([square, [5, 5]], 9, 9), ([[5, 5]], 9, 9), ({"size": [1, 1]}, 9, 9)])
            >>> found.extents[0].tolist(), len(found.fragments[0]), sorted(found.errors)
            ([1.0, 1.0, 3.0, 3.0], 1, [1, 2])
        """
        sizes: list[tuple[int, int]] = []
        errors: dict[int, str] = {}
        faulty: dict[int, list[str]] = {}
        drawn = _Polygons()
        runs = _Runs()
        for row, (segmentation, height, width) in enumerate(segmentations):
            sizes.append((height, width))
            if isinstance(segmentation, Mapping):
                try:
                    runs.add(row, segmentation, height, width)
                except ValueError as error:
                    errors[row] = str(error)
            elif not _is_list(segmentation):
                errors[row] = f"a segmentation is a list of polygons or an RLE, got {shorten(segmentation)}"
            elif parts := drawn.add(row, segmentation):
                faulty[row] = parts
        points, bounds, owners = drawn.checked(faulty)
        errors |= runs.check(sizes)
        usable = set(owners.tolist())
        errors |= {row: parts[0] for row, parts in faulty.items() if row not in usable}
        fragments = {row: parts for row, parts in faulty.items() if row in usable}
        return cls(sizes, points, bounds, owners, runs.rles, errors, fragments)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Polygons | Rle:
        """Return a segmentation without an error."""
        if row in self.rles:
            return self.rles[row]
        first, last = self._polygons[row : row + 2]
        edges = self.bounds[first : last + 1].tolist()
        points = tuple(self.points[start:end] for start, end in itertools.pairwise(edges))
        return Polygons(points, self.sizes[row])

    @functools.cached_property
    def _polygons(self) -> list[int]:
        """Index of the first polygon of each segmentation, and the total number, (N + 1,)."""
        first: list[int] = np.searchsorted(self.owners, np.arange(len(self) + 1)).tolist()
        return first

    @functools.cached_property
    def extents(self) -> NDArray[np.float64]:
        """Left, top, right and bottom of each, (N, 4); NaN if it has an error or its image is too large."""
        extents = np.full((len(self), 4), np.nan)
        if len(self.owners):
            rows, firsts = np.unique(self.owners, return_index=True)
            starts = self.bounds[firsts]
            extents[rows, :2] = np.minimum.reduceat(self.points, starts)
            extents[rows, 2:] = np.maximum.reduceat(self.points, starts)
        encoded = [row for row in self.rles if self.sizes[row][0] * self.sizes[row][1] < _LARGEST_IMAGE]
        if encoded:
            boxes = np.asarray(mask_utils.toBbox([self.rles[row] for row in encoded]), dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            extents[encoded] = boxes
        return extents

    @functools.cached_property
    def areas(self) -> NDArray[np.float64]:
        """Area of each in pixels, (N,); of polygons by the shoelace formula, NaN if it has an error."""
        areas = np.full(len(self), np.nan)
        if len(self.owners):
            following = np.arange(1, len(self.points) + 1)
            following[self.bounds[1:] - 1] = self.bounds[:-1]
            x, y = self.points.T
            parts = np.abs(np.add.reduceat(x * y[following] - x[following] * y, self.bounds[:-1])) / 2
            sums = np.bincount(self.owners, parts, minlength=len(self))
            drawn = np.unique(self.owners)
            areas[drawn] = sums[drawn]
        rows = list(self.rles)
        for start in range(0, len(rows), _AREAS_AT_ONCE):
            some = rows[start : start + _AREAS_AT_ONCE]
            areas[some] = mask_utils.area([self.rles[row] for row in some])
        return areas


def _is_list(value: object) -> TypeGuard[Iterable[object]]:
    """Return whether a value is a sequence: JSON's lists, and arrays in memory."""
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0


class _Polygons:
    """Collects polygons and validates them."""

    def __init__(self) -> None:
        self.coordinates = array("d")
        self.ends = [0]
        self.owners: list[int] = []

    def add(self, row: int, polygons: Iterable[object]) -> list[str]:
        """Append an object's polygons; return an error message for each invalid one."""
        faults = []
        for polygon in polygons:
            try:
                count = 0 if isinstance(polygon, (str, bytes, Mapping)) else len(polygon)  # type: ignore[arg-type]
                self.coordinates.extend(polygon)  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                count = 0
            if count < 6 or count % 2:
                del self.coordinates[self.ends[-1] :]
                faults.append(f"a polygon is a list of at least 3 points x, y, x, y, ..., got {shorten(polygon)}")
            else:
                self.ends.append(len(self.coordinates))
                self.owners.append(row)
        return faults

    def checked(self, faulty: dict[int, list[str]]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Return points, bounds and owners of the polygons; those far out of range are added to ``faulty`` instead."""
        points = np.frombuffer(self.coordinates, dtype=np.float64).reshape(-1, 2) if self.owners else np.empty((0, 2))
        bounds, owners = np.array(self.ends, dtype=np.int64) // 2, np.array(self.owners, dtype=np.int64)
        if not len(owners):
            return points, bounds, owners
        largest = np.maximum.reduceat(np.abs(points).max(1), bounds[:-1])
        good = largest < COORDINATE_LIMIT  # false for NaN too
        if good.all():
            return points, bounds, owners
        for number in np.flatnonzero(~good).tolist():
            shown = shorten(points[bounds[number] : bounds[number + 1]].reshape(-1).tolist())
            faulty.setdefault(int(owners[number]), []).append(
                f"a polygon has a coordinate that is not a valid pixel position: {shown}"
            )
        lengths = np.diff(bounds)
        return points[good.repeat(lengths)], np.concatenate([[0], lengths[good].cumsum()]), owners[good]


class _Runs:
    """Collects run lengths and validates compressed ones in batches."""

    def __init__(self) -> None:
        self.rles: dict[int, Rle] = {}
        self._texts: dict[int, bytes] = {}

    def add(self, row: int, segmentation: Mapping[str, object], height: int, width: int) -> None:
        """Add one; compressed ones are checked later.

        Raises:
            ValueError: If it is invalid.
        """
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not _is_list(size) or list(size) != [height, width]:
            raise ValueError(f"the mask's size is {size!r}, the image's [height, width] is {[height, width]}")
        if isinstance(counts, (str, bytes)):
            self._texts[row] = counts if isinstance(counts, bytes) else counts.encode(errors="replace")
            # The later check rejects non-ASCII characters.
            text = self._texts[row].decode("ascii", "replace")
            self.rles[row] = Rle(size=[height, width], counts=text)
            return
        if not isinstance(counts, Sequence) or not all(isinstance(run, int) and run >= 0 for run in counts):
            raise ValueError(f"the counts of an RLE are text or a list of run lengths, got {shorten(counts)}")
        if sum(counts) != height * width:
            raise ValueError(_wrong_total(sum(counts), height, width))
        runs = {"size": [height, width], "counts": list(counts)}
        (self.rles[row],) = as_text([mask_utils.frPyObjects(runs, height, width)])

    def check(self, sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """Drop invalid compressed ones and return their error messages."""
        rows, texts = list(self._texts), list(self._texts.values())
        errors: dict[int, str] = {}
        for part in passes(texts):
            runs, firsts, problems = run_lengths(texts[part])
            # Sums of long texts overflow 64-bit integers; floats are exact for every valid total.
            totals = np.add.reduceat(runs, firsts, dtype=np.float64).tolist()
            for number, (row, total) in enumerate(zip(rows[part], totals, strict=True)):
                height, width = sizes[row]
                if number in problems:
                    errors[row] = problems[number]
                elif total != height * width:
                    errors[row] = _wrong_total(int(total), height, width)
        for row in errors:
            del self.rles[row]
        return errors


def _wrong_total(total: int, height: int, width: int) -> str:
    pixels = f"{height} x {width} = {height * width}"
    return f"the run lengths of the mask add up to {total} pixels, the image has {pixels}"


def segmentation_to_rle(segmentation: object, height: int, width: int) -> Rle:
    """Convert a COCO ``segmentation`` to one RLE, after checks that pycocotools omits.

    pycocotools reads out of bounds, or never returns, on run lengths that don't fill the image, and interprets
    a list of four numbers as a box. Both are errors here, as is any part that is not a polygon.

    Args:
        segmentation: Polygons ``[[x0, y0, x1, y1, x2, y2, ...], ...]`` in pixels (all of them together are
            one object), or ``{"size": [H, W], "counts": ...}`` with compressed (text) or uncompressed
            (list of integers) run lengths.
        height: Image height, pixels.
        width: Image width, pixels.

    Raises:
        ValueError: If the value is none of these or doesn't fit the image.

    Example:
        >>> from a2fpn.masks.rle import decode_rle
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
    """Check a COCO ``segmentation`` like :func:`segmentation_to_rle`, without rasterizing polygons.

    Raises:
        ValueError: As in :func:`segmentation_to_rle`.
    """
    (mask,) = parse_segmentations([(segmentation, height, width)])
    if isinstance(mask, ValueError):
        raise mask
    return mask


def parse_segmentations(segmentations: Iterable[tuple[object, int, int]]) -> list[Polygons | Rle | ValueError]:
    """Check many segmentations like :func:`parse_segmentation`, compressed run lengths in a fraction of the time.

    Args:
        segmentations: Each with the height and width of its image, pixels.

    Returns:
        For each the mask, or the error that :func:`parse_segmentation` would raise.

    Example:
        >>> parse_segmentations([({"size": [3, 3], "counts": "013000"}, 3, 3), (None, 3, 3)])
        [{'size': [3, 3], 'counts': '013000'}, ValueError('a segmentation is a list of polygons or an RLE, got None')]
    """
    found = Segmentations.of(segmentations)
    faults = {**{row: parts[0] for row, parts in found.fragments.items()}, **found.errors}
    return [ValueError(faults[row]) if row in faults else found[row] for row in range(len(found))]
