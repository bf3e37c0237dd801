"""The JSON of a COCO data set, read and checked once.

Label problems are found when the file is read, not in the middle of an epoch. By default they are skipped,
logged once and counted; with ``strict=True`` the first one is an error. What can't be read as a COCO file
at all is always an error. The rules are those of :mod:`a2fpn.data.rules`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from a2fpn.config import Category
from a2fpn.data.annotation_table import AnnotationTable
from a2fpn.data.document import CocoDocument, CocoImage
from a2fpn.data.rules import Fault, find_faults, usable_rows
from a2fpn.errors import DataError
from a2fpn.masks.rle import Rle
from a2fpn.masks.segmentation import Polygons

logger = logging.getLogger(__name__)
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Annotation:
    """One checked entry of ``annotations``.

    Args:
        category_id: Id of the class, as in the file.
        bbox: x, y, width, height in pixels, as in the file; positive width and height. Where the file has none that
            holds anything, the box around the mask.
        mask: The mask, or None for an object that has none.
        area: Pixels; as in the file where that is above 0, else of the mask, else of the box.
        iscrowd: Whether it marks a group, which is ignored in training and evaluation.
        keypoints: x, y in pixels and visibility (0: not labeled, 1: hidden, 2: visible) of each keypoint; empty in a
            file without keypoints, and in one with them for an object that has none.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    mask: Polygons | Rle | None
    area: float
    iscrowd: bool
    keypoints: tuple[tuple[float, float, float], ...] = ()

    @property
    def rle(self) -> Rle | None:
        """The mask as run lengths; polygons are filled on each call, about 20 µs."""
        return self.mask.to_rle() if isinstance(self.mask, Polygons) else self.mask

    def region(self, image: CocoImage) -> Rle:
        """The mask as run lengths, or the box as one for an object that has no mask.

        Args:
            image: In which it lies.
        """
        if (rle := self.rle) is not None:
            return rle
        x, y, width, height = self.bbox
        corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        return Polygons((corners,), (image.height, image.width)).to_rle()


@dataclass(frozen=True)
class CocoFile:
    """A COCO file, checked.

    Args:
        name: The file, for messages.
        images: By image id, in the file's order.
        categories: Sorted by id.
        annotations: By image id; every image has an entry.
        has_masks: Whether any annotation has a mask; true for a file without annotations.
        problems: One message for each annotation that was left out.
        num_keypoints: Keypoints of every object; 0 if no annotation of the file has any.
        keypoint_names: Their names, if the categories give them.
        losses: One message for each annotation that is kept without its mask, a part of it or its keypoints.
        info: What the file says of itself; empty if it says nothing readable.
        licenses: Likewise.
    """

    name: str
    images: Mapping[int, CocoImage]
    categories: tuple[Category, ...]
    annotations: Mapping[int, Sequence[Annotation]]
    has_masks: bool
    problems: tuple[str, ...]
    num_keypoints: int = 0
    keypoint_names: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    licenses: Sequence[Mapping[str, Any]] = ()

    def count_masks(self) -> tuple[int, int]:
        """Return how many objects have a mask, and how many there are; crowds are none."""
        objects = [a for annotations in self.annotations.values() for a in annotations if not a.iscrowd]
        return sum(a.mask is not None for a in objects), len(objects)

    def with_all_masks(self) -> CocoFile:
        """Return the file for a comparison of masks: objects without one are crowds as large as their boxes.

        What lies there can be found neither rightly nor wrongly.
        """
        annotations = {
            image_id: [
                a if a.mask is not None else dataclasses.replace(a, mask=a.region(self.images[image_id]), iscrowd=True)
                for a in objects
            ]
            for image_id, objects in self.annotations.items()
        }
        return dataclasses.replace(self, annotations=annotations)


class CheckedAnnotations(NamedTuple):
    """Annotations after the check.

    Args:
        usable: By image id, with an entry for every image.
        problems: One message for each annotation that was left out.
        losses: One for each that is kept without its mask, a part of it or its keypoints.
        has_masks: Whether any has a mask.
    """

    usable: dict[int, list[Annotation]]
    problems: list[str]
    losses: list[str]
    has_masks: bool


def read_coco(source: str | Path | Mapping[str, Any] | CocoFile, *, strict: bool = False) -> CocoFile:
    """Read and check a COCO file.

    Annotation ids may be 0, repeated or missing: nothing depends on them. A missing ``iscrowd`` is 0, yes and no may
    be spelled in any way, an ``area`` that is missing or not above 0 is computed, and a missing or empty ``bbox`` is
    that of the mask.

    Masks and boxes are read each for themselves: an object without a usable mask keeps its box, one with some unusable
    polygons keeps the others, and one with wrong keypoints is kept without them.

    Args:
        source: The JSON file, or its content. A :class:`CocoFile` is returned as it is.
        strict: Whether an unusable annotation (unknown image or category, a box without area or outside
            the image), mask, part of a mask or list of keypoints is an error instead of being left out.

    Raises:
        DataError: If the source is no COCO file; if ``strict``, for the first thing that would be left out.

    Example:
        >>> coco = read_coco({
        ...     "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 5, "category_id": 7, "bbox": [10, 10, 20, 20]},
        ...         {"id": 2, "image_id": 5, "category_id": 7, "bbox": [10, 10, 0, 20]},
        ...     ],
        ... })
        >>> coco.annotations[5][0].area
        400.0
        >>> coco.problems
        ('the given mapping: annotation 2: its box [10, 10, 0, 20] has no area inside the image of 60 x 40 pixels',)
    """
    if isinstance(source, CocoFile):
        return source
    document = CocoDocument.read(source)
    name = document.name
    for faults in document.faults:
        if message := faults.message():
            raise DataError(f"{name}: {message}.")
    images = {entry.id: entry for entry in document.images}
    checked = check_annotations(document.entries, images, document.categories, num_keypoints=document.num_keypoints)
    problems, losses = ([f"{name}: {text}" for text in texts] for texts in (checked.problems, checked.losses))
    if strict and (problems or losses):
        raise DataError((problems or losses)[0])
    count = len(document.entries)
    _log(problems, f"{name}: skipped {len(problems)} of {count} annotations:")
    _log(losses, f"{name}: {len(losses)} of {count} annotations are kept in part:")
    file = CocoFile(
        name,
        images,
        tuple(document.categories.values()),
        checked.usable,
        not count or checked.has_masks,
        tuple(problems),
        document.num_keypoints,
        document.keypoint_names,
        tuple(losses),
        document.info,
        document.licenses,
    )
    masked, objects = file.count_masks()
    if checked.has_masks and masked < objects:
        logger.warning(
            "%s: %d of %d objects have no mask: they train and measure boxes, and masks where there are masks",
            name,
            objects - masked,
            objects,
        )
    return file


def _log(problems: Sequence[str], summary: str) -> None:
    if problems:
        more = [f"and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        logger.warning("%s\n  %s", summary, "\n  ".join([*problems[:_PROBLEMS_SHOWN], *more]))


def check_annotations(
    entries: Sequence[Any],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, Category],
    *,
    masks: bool = True,
    num_keypoints: int = 0,
) -> CheckedAnnotations:
    """Check annotations as :func:`read_coco` does, for sources that give them image by image.

    Args:
        entries: What stands in ``annotations`` of a COCO file.
        images: By image id.
        categories: By category id.
        masks: Whether masks are read.
        num_keypoints: Keypoints of every object; 0 for none.
    """
    index = {image_id: position for position, image_id in enumerate(images)}
    listed = list(images.values())
    table = AnnotationTable.of(entries, listed, index, categories, num_keypoints=num_keypoints, masks=masks)
    faults = find_faults(table)
    rows = usable_rows(len(table), faults)
    out = [fault for fault in faults if fault.outcome == "left out"]
    partial = [fault for fault in faults if fault.outcome not in ("left out", "kept")]
    usable: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    ids, class_ids = list(images), list(categories)
    unpointed = np.zeros(len(table), dtype=np.bool_)
    for fault in faults:
        unpointed |= fault.rows & (fault.outcome == "without keypoints")
    kept = np.flatnonzero(rows).tolist()
    columns = (table.image, table.category, table.box, table.mask, table.area, table.crowd, unpointed)
    for row, image, category, box, number, area, crowd, no_points in zip(
        kept, *(column[rows].tolist() for column in columns), strict=True
    ):
        mask = table.segmentations[number] if number >= 0 else None
        points = () if no_points or not num_keypoints else _triples(entries[row].get("keypoints"))
        size = area if area > 0 and area != np.inf else _area(mask, box)
        usable[ids[image]].append(Annotation(class_ids[category], tuple(box), mask, size, crowd, points))
    return CheckedAnnotations(
        usable, _messages(entries, ~rows, out), _messages(entries, rows, partial), table.has_masks
    )


def _messages(entries: Sequence[Any], rows: Any, faults: Sequence[Fault]) -> list[str]:
    """One message for each of the rows that has one of the faults: the first."""
    firsts: dict[int, Fault] = {}
    for fault in reversed(faults):
        firsts |= dict.fromkeys(np.flatnonzero(fault.rows & rows).tolist(), fault)
    return [f"{_label(entries[row], row)}: {firsts[row].reason(row)}" for row in sorted(firsts)]


def _label(raw: Any, row: int) -> str:
    has_id = isinstance(raw, Mapping) and "id" in raw
    return f"annotation {raw['id']}" if has_id else f"the annotation at position {row}"


def _area(mask: Polygons | Rle | None, box: Sequence[float]) -> float:
    rle = mask.to_rle() if isinstance(mask, Polygons) else mask
    return float(mask_utils.area(rle)) if rle else box[2] * box[3]


def _triples(values: Any) -> tuple[tuple[float, float, float], ...]:
    """Keypoints of an annotation; none where they are left out."""
    numbers = [float(value) for value in (() if values is None else values)]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
