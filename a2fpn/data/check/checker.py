"""Checks of a COCO data set before a model is trained on it.

A COCO file can be valid JSON and still be useless for training: every object a crowd, boxes given as corners, ids
unknown to the model. :func:`check_data` checks the raw JSON, the result of :func:`a2fpn.data.read_coco`, and the image
files, and reports problems with ids and advice.

Shape shorthand: N annotations, one row each, in the order of the file. Boxes are float64, in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from a2fpn.config import Category
from a2fpn.data.annotation_table import AnnotationTable
from a2fpn.data.check.annotations import (
    area_problems,
    box_format,
    box_problems,
    fault_problems,
    id_problems,
)
from a2fpn.data.check.categories import compare_with_model, compare_with_other
from a2fpn.data.check.classes import class_counts, scales, use_findings
from a2fpn.data.check.files import file_findings
from a2fpn.data.check.problem import used_categories
from a2fpn.data.check.reader import read_document
from a2fpn.data.check.report import (
    AnnotatedImage,
    DataReport,
    Finding,
    Track,
)
from a2fpn.data.check.sizes import size_findings
from a2fpn.data.document import CocoDocument, CocoImage, Source, source_name
from a2fpn.data.duplicates import duplicate_findings
from a2fpn.data.rules import find_faults, usable_rows
from a2fpn.errors import ConfigError, DataError
from a2fpn.masks.rle import Rle
from a2fpn.masks.segmentation import Polygons, segmentation_to_rle

T = TypeVar("T")
_LARGEST_PICTURE = 2**27  # pixels; larger images are not drawn


def check_data(
    images: str | Path | None,
    annotations: Source,
    *,
    against: Source | None = None,
    against_is: Literal["validation", "training"] = "validation",
    categories: Sequence[Category] = (),
    target_size: Callable[[int, int], tuple[int, int]] | None = None,
    anchor_sizes: Sequence[Sequence[float]] = (),
    anchor_ratios: Sequence[float] = (1.0,),
    sample: int | None = None,
    decode: bool = False,
    examples: int = 0,
    duplicates: bool = False,
    track: Track | None = None,
) -> DataReport:
    """Check a COCO data set; invalid content of the file is reported, never raised.

    Args:
        images: The image folder; None checks the JSON only.
        annotations: The JSON file or its content.
        against: The other split of the data set; its categories must be the same.
        against_is: Purpose of ``against``. The model trains on one of both files and is measured on the other.
        categories: The model's classes, if the data must match them.
        target_size: Function from (height, width) of an image to that of the network's input, usually
            ``model.preprocess.target_size``. Enables the check of object sizes.
        anchor_sizes: Per level the model's anchor sizes in pixels of its input; empty for a model without anchors.
        anchor_ratios: Height / width of the anchors.
        sample: Number of image files to open, evenly spread over the list; None for all.
        decode: Whether to decode opened files, which finds truncated files. Otherwise only the
            headers are read, many times faster.
        examples: Number of images to pick for drawing, see :class:`DataReport`.
        duplicates: Whether to search for near-duplicates of images of ``against``, in the same folder: photos of one
            scene in training and validation. All images are decoded.
        track: Called as ``track(items, description, total)`` around long loops.

    Raises:
        DataError: If the folder or a JSON file can't be opened.
        ValueError: If ``sample`` or ``examples`` is negative.

    Example:
        >>> report = check_data(None, {
        ...     "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 5, "category_id": 7, "bbox": [70, 10, 20, 20]}],
        ... })
        >>> report.fatal[0].code, report.fatal[0].message
        ('no-usable-objects', 'None of 1 annotation can be used (box-outside: 1).')
    """
    root = None if images is None else Path(images)
    if root is not None and not root.is_dir():
        raise DataError(f"{root}: no such folder of images.")
    for name, value in {"sample": sample, "examples": examples}.items():
        if value is not None and value < 0:
            raise ConfigError(f"{name} must be 0 or more, got {value}.")
    track = track or _untracked
    file, findings = read_document(annotations, track)
    if file is None:
        return DataReport(source_name(annotations), 0, 0, 0, (), tuple(findings))
    table = _table(file, track)
    if categories:
        findings += compare_with_model({category.id: category.name for category in categories}, file, table)
    elsewhere: frozenset[int] = frozenset()
    if against is not None:
        other, problems = read_document(against, track)
        findings += problems
        if other is not None:
            pair = [(file, table), (other, _table(other, track, masks=False))]
            elsewhere = used_categories(*pair[1])
            training, validation = pair if against_is == "validation" else pair[::-1]
            findings += compare_with_other(*training, *validation)
        if duplicates and root is not None and other is not None:
            names = {entry.id: entry.file_name for entry in file.images}
            others = [entry.file_name for entry in other.images]
            findings += duplicate_findings(names, others, (root, root), track)

    faults = find_faults(table)
    every = itertools.chain(
        fault_problems(table, faults), id_problems(table), box_problems(table), area_problems(table)
    )
    findings += [problem.finding(file, table) for problem in every if problem.rows.any()]
    usable = usable_rows(len(table), faults)
    findings += box_format(table)
    left_out = [fault for fault in faults if fault.outcome == "left out"]
    findings += use_findings(file, table, usable, left_out, elsewhere=elsewhere)

    objects = np.flatnonzero(usable & ~table.crowd)
    sides = table.inside[objects]
    resized = None if target_size is None else sides * scales(file.images, target_size)[table.image[objects]]
    if resized is not None and len(objects):
        findings += size_findings(sides, resized, table.category[objects], anchor_sizes, anchor_ratios)
    opened = [] if root is None else _spread(file.images, sample)
    if root is not None:
        findings += file_findings(root, opened, track, decode=decode)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    return DataReport(
        file.name,
        len(file.images),
        len(table),
        len(opened),
        class_counts(file, table, usable, sides, resized),
        tuple(findings),
        tuple(_annotated_image(file, table, index, findings) for index in _choose(file, table, findings, examples)),
    )


def _table(file: CocoDocument, track: Track, *, masks: bool = True) -> AnnotationTable:
    return AnnotationTable.of(
        file.entries,
        file.images,
        file.index,
        file.categories,
        num_keypoints=file.num_keypoints,
        masks=masks,
        track=track,
    )


def _untracked(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    return items


def _spread(items: Sequence[T], count: int | None) -> Sequence[T]:
    """Select ``count`` items, evenly spread; None for all."""
    if count is None or count >= len(items):
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, count).astype(int).tolist()]


def _choose(file: CocoDocument, table: AnnotationTable, findings: Sequence[Finding], count: int) -> list[int]:
    """Choose images to draw, by index: one of each finding, the next of each, ..., then others with objects."""
    rounds = itertools.zip_longest(*(finding.image_ids for finding in findings))
    named = (file.index[image_id] for ids in rounds for image_id in ids if image_id is not None)
    annotated = _spread(np.unique(table.image[table.image >= 0]).tolist(), count)
    indices = dict.fromkeys(itertools.chain(named, annotated))
    drawable = (i for i in indices if file.images[i].height * file.images[i].width <= _LARGEST_PICTURE)
    return list(itertools.islice(drawable, count))


def _annotated_image(
    file: CocoDocument, table: AnnotationTable, index: int, findings: Sequence[Finding]
) -> AnnotatedImage:
    entry = file.images[index]
    drawable = (table.image == index) & (table.category >= 0) & ~np.isnan(table.box).any(1)
    rows = np.flatnonzero(drawable).tolist()
    boxes = table.box[rows]
    boxes[:, 2:] += boxes[:, :2]
    sides = np.array([entry.width, entry.height] * 2)
    boxes = np.clip(boxes, -sides, 2 * sides)  # parts farther outside are not visible, and may overflow float32
    rles = tuple(_mask_or_empty(table, number, entry) for number in table.mask[rows].tolist())
    codes = tuple(finding.code for finding in findings if entry.id in finding.image_ids)
    return AnnotatedImage(
        entry.id,
        entry.file_name,
        (entry.height, entry.width),
        boxes.astype(np.float32),
        table.category[rows],
        table.crowd[rows],
        rles if table.has_masks else None,
        codes,
    )


def _mask_or_empty(table: AnnotationTable, number: int, entry: CocoImage) -> Rle:
    """Return a mask as RLE, empty if there is none."""
    if number >= 0:
        mask = table.segmentations[number]
        return mask.to_rle() if isinstance(mask, Polygons) else mask
    nothing = {"size": [entry.height, entry.width], "counts": [entry.height * entry.width]}
    return segmentation_to_rle(nothing, entry.height, entry.width)
