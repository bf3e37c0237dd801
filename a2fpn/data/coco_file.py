"""Reading and validation of the JSON of a COCO data set.

Label problems are found when the file is read, not in the middle of an epoch. By default invalid labels are skipped,
logged once and counted; with ``strict=True`` the first one is an error. A file that is not a COCO file is always an
error. The rules are those of :mod:`a2fpn.data.rules`.
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
        bbox: x, y, width, height in pixels, as in the file; positive width and height. If the file has no box with an
            area, the bounding box of the mask.
        mask: The mask, or None for an object without one.
        area: Pixels; as in the file if positive, else of the mask, else of the box.
        iscrowd: Whether it marks a group, which is ignored in training and evaluation.
        keypoints: x, y in pixels and visibility (0: not labeled, 1: hidden, 2: visible) of each keypoint; empty in a
            file without keypoints, and for an object without any.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    mask: Polygons | Rle | None
    area: float
    iscrowd: bool
    keypoints: tuple[tuple[float, float, float], ...] = ()

    @property
    def rle(self) -> Rle | None:
        """Mask as RLE; polygons are rasterized on each access, about 20 µs."""
        return self.mask.to_rle() if isinstance(self.mask, Polygons) else self.mask

    def region(self, image: CocoImage) -> Rle:
        """Return the mask as RLE, or the box if the object has no mask.

        Args:
            image: Its image.
        """
        if (rle := self.rle) is not None:
            return rle
        x, y, width, height = self.bbox
        corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        return Polygons((corners,), (image.height, image.width)).to_rle()


@dataclass(frozen=True)
class CocoFile:
    """A checked COCO file.

    Args:
        name: The file, for messages.
        images: By image id, in the file's order.
        categories: Sorted by id.
        annotations: By image id; every image has an entry.
        has_masks: Whether any annotation has a mask; True for a file without annotations.
        problems: One message for each dropped annotation.
        num_keypoints: Keypoints of every object; 0 if no annotation has any.
        keypoint_names: Their names, if the categories have them.
        losses: One message for each annotation kept without its mask, a part of it or its keypoints.
        info: ``info`` of the file; empty if there is none or it is invalid.
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
        """Return the number of objects with a mask, and of all objects, without crowds."""
        objects = [a for annotations in self.annotations.values() for a in annotations if not a.iscrowd]
        return sum(a.mask is not None for a in objects), len(objects)

    def with_all_masks(self) -> CocoFile:
        """Return the file for an evaluation of masks, in which objects without one become crowds of their boxes.

        Detections in them are ignored.
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
    """Result of checking annotations.

    Args:
        usable: Valid annotations by image id, with an entry for every image.
        problems: One message for each dropped annotation.
        losses: One message for each annotation kept without its mask, a part of it or its keypoints.
        has_masks: Whether any has a mask.
    """

    usable: dict[int, list[Annotation]]
    problems: list[str]
    losses: list[str]
    has_masks: bool


def read_coco(source: str | Path | Mapping[str, Any] | CocoFile, *, strict: bool = False) -> CocoFile:
    """Read and check a COCO file.

    Annotation ids may be 0, repeated or missing: nothing depends on them. A missing ``iscrowd`` is 0, and its spelling
    is free; a missing or non-positive ``area`` is computed, and a missing or empty ``bbox`` is computed from the mask.

    Masks and boxes are checked independently: an object with an invalid mask keeps its box, one with some invalid
    polygons keeps the others, and one with invalid keypoints is kept without them.

    Args:
        source: The JSON file, or its content. A :class:`CocoFile` is returned unchanged.
        strict: Whether an invalid annotation (unknown image or category, a box without area or outside
            the image), mask, part of a mask or list of keypoints is an error instead of being dropped.

    Raises:
        DataError: If the source is not a COCO file; if ``strict``, for the first item that would be dropped.

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
            "%s: %d of %d objects have no mask; they are used for boxes only, in training and evaluation",
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
    """Check annotations like :func:`read_coco`, for sources that provide them image by image.

    Args:
        entries: Entries of ``annotations`` as in a COCO file.
        images: Images by id.
        categories: Categories by id.
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
    """Return one message for each of the rows with any of the faults, that of the first."""
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
    """Group keypoints into triples; none if they are missing."""
    numbers = [float(value) for value in (() if values is None else values)]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
