"""Conversion of data sets from any importable to any exportable format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from a2fpn._registry import natural_key
from a2fpn.data.check.report import Track
from a2fpn.data.exporters.base import EXPORTERS, ExportOptions, export_images
from a2fpn.data.importers import open_source
from a2fpn.data.importers.folder import REPORT_FILE, Folder
from a2fpn.data.importers.importing import ImportReport
from a2fpn.data.importers.placing import Placing
from a2fpn.data.importers.writer import SplitCount, no_image
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LossLog
from a2fpn.errors import DataError

T = TypeVar("T")


def convert_data(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    format: str = "auto",
    images: Placing | None = "link",
    categories: str | Path | Sequence[str] | None = None,
    category: str = "",
    strict: bool = False,
    overwrite: bool = False,
    track: Track | None = None,
) -> ImportReport:
    """Convert a data set, usually a COCO folder, into another format.

    Args:
        source: The data set's folder, or a file of it.
        output: The folder to write; its ``categories.json`` preserves ids for a later import.
        to: The format to write: one of ``EXPORTERS``.
        format: Format of the source; ``"auto"`` detects it.
        images: Whether images are linked or copied.
        categories: The classes in their order, or a file with them; by default those of the source.
        category: The class of objects in formats with masks but no classes; by default the only class.
        strict: Whether the first loss is an error.
        overwrite: Whether the output may be non-empty.
        track: Called as ``track(items, description, total)`` around long loops.

    Returns:
        Report of everything read, written and lost.

    Raises:
        DataError: If the source can't be read, or, if ``strict``, for the first loss.
    """
    source, output = Path(source), Path(output)
    track = track or _untracked
    EXPORTERS[to]  # raises for an unknown name before anything is read
    if output.resolve().is_relative_to(Folder.of(source).root.resolve()):
        raise DataError(f"the output {output} is inside the source {source}; choose a folder outside it.")
    log = LossLog(strict=strict)
    importer = open_source(source, log, format=format, categories=categories, category=category, unlabeled="keep")
    found = list(track(importer.read(), f"reading {importer.name}", importer.total))
    if not any(image.objects for image in found) and (not found or log.counts["missing-image"]):
        raise no_image(log)
    known = {info.name for info in importer.categories}
    used = {labeled.category for image in found for labeled in image.objects}
    infos = [*importer.categories, *(CategoryInfo(name) for name in sorted(used - known, key=natural_key))]
    infos = _with_keypoint_names(infos, found, log)
    options = ExportOptions(images)
    tracked = track(found, f"writing {to}", len(found))
    export_images(tracked, output, format=to, categories=infos, options=options, log=log, overwrite=overwrite)
    report = ImportReport(
        f"{importer.name} to {to}",
        str(source),
        str(output),
        _counts(found),
        {number if info.id is None else info.id: info.name for number, info in enumerate(infos, 1)},
        tuple(log.losses),
        dict(log.counts),
        {file: dict(counts) for file, counts in log.files.items()},
        dict(log.notes),
    )
    (output / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def _with_keypoint_names(
    infos: Sequence[CategoryInfo], images: Sequence[LabeledImage], log: LossLog
) -> list[CategoryInfo]:
    """Name the keypoints of classes without names, since formats store them by name or in the order of names."""
    most: dict[str, int] = {}
    for labeled in (labeled for image in images for labeled in image.objects if labeled.keypoints):
        most[labeled.category] = max(most.get(labeled.category, 0), len(labeled.keypoints) // 3)
    unnamed = {info.name for info in infos if not info.keypoints and most.get(info.name)}
    if unnamed:
        log.note("classes whose keypoints have no names, now point 1, point 2, ...", len(unnamed))
    return [
        replace(info, keypoints=tuple(f"point {n}" for n in range(1, most[info.name] + 1)))
        if info.name in unnamed
        else info
        for info in infos
    ]


def _counts(images: Sequence[LabeledImage]) -> dict[str, SplitCount]:
    """Count the images and objects of each split, before the format's own losses."""
    counts = {}
    for split in dict.fromkeys(image.split or "train" for image in images):
        members = [image for image in images if (image.split or "train") == split]
        objects = [labeled for image in members for labeled in image.objects]
        counts[split] = SplitCount(
            len(members),
            len(objects),
            sum(not image.objects for image in members),
            sum(labeled.segmentation is not None for labeled in objects),
            sum(labeled.iscrowd for labeled in objects),
        )
    return counts


def _untracked(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    return items
