"""Annotations as columns, for vectorized checks.

Shape shorthand: N annotations, one row each, in the order of the file. Boxes are float64, in pixels.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.document import CocoImage, is_whole
from a2fpn.masks.segmentation import Segmentations

Rows = NDArray[np.bool_]
UNKNOWN, NO_ID = -1, -2  # instead of an index: an id that is not in the file; not an integer
LEAST_SIDE = 0.01  # pixels inside the image; less may vanish in float32 corners of a large image
_NO_BOX = (np.nan,) * 4
_CROWD: dict[object, bool] = {
    **dict.fromkeys((0, "0", "false", "no", "n", "f", "", None), False),
    **dict.fromkeys((1, "1", "true", "yes", "y", "t"), True),
}


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """Annotations as columns.

    Args:
        entries: As in the file; an empty object replaces an entry that is not a JSON object.
        image: (N,) index of the image, ``UNKNOWN`` or ``NO_ID``.
        category: (N,) index of the category, ``UNKNOWN`` or ``NO_ID``.
        crowd: (N,); False if undefined.
        odd_crowd: (N,) whether ``iscrowd`` is neither yes nor no.
        given_box: (N, 4) x, y, width, height as in the file; NaN unless these are four finite numbers.
        box: (N, 4) likewise, computed from the mask if the file has no box with an area.
        limits: (N, 2) width and height of the image; NaN if unknown.
        area: (N,) pixels as in the file; NaN if it is not a number.
        segmentations: The given segmentations.
        mask: (N,) index of the valid segmentation, or -1.
        broken: Index of each invalid segmentation, by row.
        has_masks: Whether masks are read and any is valid.
        num_keypoints: Keypoints of every object; 0 for none.
    """

    entries: Sequence[Mapping[str, Any]]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    crowd: Rows
    odd_crowd: Rows
    given_box: NDArray[np.float64]
    box: NDArray[np.float64]
    limits: NDArray[np.float64]
    area: NDArray[np.float64]
    segmentations: Segmentations
    mask: NDArray[np.int64]
    broken: Mapping[int, int]
    has_masks: bool
    num_keypoints: int

    @classmethod
    def of(
        cls,
        entries: Sequence[Any],
        images: Sequence[CocoImage],
        index: Mapping[int, int],
        categories: Iterable[int],
        *,
        num_keypoints: int = 0,
        masks: bool = True,
        track: Callable[..., Iterable[Any]] | None = None,
    ) -> AnnotationTable:
        """Build the table from ``annotations``.

        Args:
            entries: The annotations.
            images: The images.
            index: Position in ``images`` by id.
            categories: Ids of the categories, in their order.
            num_keypoints: Keypoints of every object; 0 for none.
            masks: Whether masks are read.
            track: Called as ``track(items, description, total)`` around long loops.
        """
        track = track or _untracked
        category_index = {category_id: position for position, category_id in enumerate(categories)}
        rows = [raw if isinstance(raw, Mapping) else {} for raw in entries]
        boxes, areas = array("d"), array("d")
        image: list[int] = []
        category: list[int] = []
        crowd: list[bool | None] = []
        for raw in track(rows, "reading annotations", len(rows)):
            image_id, category_id = raw.get("image_id"), raw.get("category_id")
            image.append(index.get(image_id, UNKNOWN) if is_whole(image_id) else NO_ID)
            category.append(category_index.get(category_id, UNKNOWN) if is_whole(category_id) else NO_ID)
            crowd.append(crowd_flag(raw.get("iscrowd")))
            areas.append(_number(raw.get("area")))
            box, end = raw.get("bbox"), len(boxes)
            try:
                boxes.extend(box if isinstance(box, (list, tuple, np.ndarray)) and len(box) == 4 else _NO_BOX)
            except (TypeError, ValueError, OverflowError):  # not numbers, or an integer too large for a float
                del boxes[end:]
                boxes.extend(_NO_BOX)
        given_box = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        given_box[~np.isfinite(given_box).all(1)] = np.nan
        sides = np.array([*((entry.width, entry.height) for entry in images), (np.nan, np.nan)])
        image_column = np.array(image, dtype=np.int64)
        limits = sides[np.where(image_column >= 0, image_column, -1)]
        drawn = [row for row in range(len(rows)) if image[row] >= 0 and given(rows[row].get("segmentation"))]
        segmentations = Segmentations.of(
            (rows[row].get("segmentation"), images[image[row]].height, images[image[row]].width)
            for row in track(drawn if masks else [], "checking masks", len(drawn) if masks else 0)
        )
        box, mask, broken = _with_masks(given_box, limits, drawn if masks else [], segmentations)
        return cls(
            rows,
            image_column,
            np.array(category, dtype=np.int64),
            np.array([bool(flag) for flag in crowd], dtype=np.bool_),
            np.array([flag is None for flag in crowd], dtype=np.bool_),
            given_box,
            box,
            limits,
            np.array(areas, dtype=np.float64),
            segmentations,
            mask,
            broken,
            bool((mask >= 0).any()),
            num_keypoints,
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def corners(self) -> NDArray[np.float64]:
        """(N, 4) boxes as xyxy, clipped to the image."""
        low, sides = self.box[:, :2], self.box[:, 2:]
        return np.concatenate([np.maximum(low, 0), np.minimum(low + sides, self.limits)], axis=1)

    @property
    def inside(self) -> NDArray[np.float64]:
        """(N, 2) width and height of the boxes inside the image; negative outside."""
        corners = self.corners
        inside: NDArray[np.float64] = corners[:, 2:] - corners[:, :2]
        return inside

    def of_masks(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map values of the segmentations, (M, ...), to the annotations, (N, ...); NaN without a mask."""
        nothing = np.full((1, *values.shape[1:]), np.nan)
        spread: NDArray[np.float64] = np.concatenate([values, nothing])[self.mask]
        return spread


def any_column(cells: NDArray[np.bool_]) -> Rows:
    """Return a mask of the rows of (N, C) with a true value."""
    rows: Rows = np.logical_or.reduce(cells, axis=1)
    return rows


def given(value: object) -> bool:
    """Return whether a value is given: not null, and not an empty list, text or object."""
    return value is not None and not (isinstance(value, (list, tuple, str, Mapping, np.ndarray)) and len(value) == 0)


def crowd_flag(value: object) -> bool | None:
    """Parse ``iscrowd`` in any spelling; None if undefined.

    Example:
        >>> [crowd_flag(value) for value in (None, 0, 1.0, "0", "True", "maybe", 2)]
        [False, False, True, False, True, None, None]
    """
    try:
        return _CROWD.get(value.strip().lower() if isinstance(value, str) else value)
    except TypeError:  # a list
        return None


def _untracked(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return items


def _number(value: object) -> float:
    """Return a number as a float; NaN for anything else."""
    if type(value) is float or type(value) is int or isinstance(value, (np.integer, np.floating)):
        try:
            return float(value)
        except OverflowError:
            pass
    return math.nan


def _with_masks(
    given_box: NDArray[np.float64], limits: NDArray[np.float64], drawn: Sequence[int], segmentations: Segmentations
) -> tuple[NDArray[np.float64], NDArray[np.int64], dict[int, int]]:
    """Return boxes, computed from masks if missing; the valid mask of each row; and the invalid ones by row."""
    rows = np.array(drawn, dtype=np.int64)
    extents = segmentations.extents
    low, high = np.maximum(extents[:, :2], 0), np.minimum(extents[:, 2:], limits[rows])
    bad = any_column(high <= low)  # outside the image
    bad[list(segmentations.errors)] = True
    mask = np.full(len(given_box), -1, dtype=np.int64)
    mask[rows[~bad]] = np.flatnonzero(~bad)
    broken = dict(zip(rows[bad].tolist(), np.flatnonzero(bad).tolist(), strict=True))
    box = given_box.copy()
    lacking = any_column(~(given_box[:, 2:] >= LEAST_SIDE)) & (mask >= 0)
    own = extents[mask[lacking]]
    box[lacking] = np.concatenate([own[:, :2], own[:, 2:] - own[:, :2]], axis=1)
    return box, mask, broken
