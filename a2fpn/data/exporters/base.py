"""Common parts of the exporters: registry, placement of images, losses."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn._registry import Registry
from a2fpn.data.exporters.rings import rle_of, window_of
from a2fpn.data.images import SUFFIXES, suffix_of
from a2fpn.data.importers.annotation import usable
from a2fpn.data.importers.folder import CATEGORIES_FILE, IDS_FILE, REPORT_FILE
from a2fpn.data.importers.placing import Placing, check_output, place
from a2fpn.data.labeled import Box, CategoryInfo, LabeledImage, LabeledObject, LossLog, folder_name, polygon_box
from a2fpn.data.leftovers import file_states, untouched
from a2fpn.errors import DataError

# Carriage returns are valid, but read as line feeds.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TOLERANCE = 1  # pixels by which a box may differ from its mask's and count as the same


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        images: Whether images are linked or copied; None leaves them in place if the format allows it.
        predictions: Whether the labels are a model's, to be corrected: they have no splits.
    """

    images: Placing | None = "link"
    predictions: bool = False


class Exporter(ABC):
    """Base of the exporters; a new format is a subclass with ``@register_exporter``.

    Args:
        output: The folder.
        categories: All classes, in their order.
        log: Log of losses.
        options: The options.

    Raises:
        DataError: If the format can't hold the name of a class.

    Attributes:
        stems: Whether files of labels have the stems of their images, which must differ then.
        split_folders: Whether each split has its own folders.
        xml: Whether names are written as XML, which has no control characters.
        reserved: Stems, lower case, of files that the importer does not read.
    """

    name = ""
    stems = True
    split_folders = True
    xml = False
    reserved: frozenset[str] = frozenset()

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        self.output = output
        self.categories = list(categories)
        self.index = {category.name: number for number, category in enumerate(self.categories)}
        self.log = log
        self.options = options or ExportOptions()
        self.written = 0
        self._taken: set[str] = set()
        names = [name for category in categories for name in (category.name, *category.keypoints)]
        if self.xml and (bad := [name for name in names if _NOT_XML.search(name)]):
            raise DataError(
                f"{self.name} can't hold the name {bad[0]!r}, as XML has no such control characters; rename it first "
                "(a2fpn data rename)."
            )

    @abstractmethod
    def write(self, image: LabeledImage) -> None:
        """Write an image with its objects, as returned by :meth:`prepared`; losses are logged."""

    def close(self) -> None:
        """Write files shared by all images; ``categories.json`` preserves ids for a later import."""
        entries = [
            category.to_coco(number if category.id is None else category.id)
            for number, category in enumerate(self.categories, 1)
        ]
        self.save(self.output / CATEGORIES_FILE, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")

    def prepared(self, image: LabeledImage) -> LabeledImage:
        """Return an image under a name of its own, with usable objects, all of which have boxes; losses are logged."""
        split = folder_name(image.split) if image.split else ""
        found = (self._usable(labeled, image) for labeled in image.objects)
        objects = [labeled for labeled in found if labeled is not None]
        return self._named(replace(image, split=split, objects=objects))

    def _usable(self, labeled: LabeledObject, image: LabeledImage) -> LabeledObject | None:
        values = labeled.keypoints
        known = len(self.categories[self.index[labeled.category]].keypoints)
        if len(values) % 3 or (known and len(values) > 3 * known) or not all(map(math.isfinite, values)):
            wanted = f"x, y and visibility of {known or 'all'} keypoints"
            self.lose("keypoints", image, labeled, f"{len(values)} numbers are not {wanted}; kept without them")
            labeled = replace(labeled, keypoints=())
        found = usable(labeled, image.height, image.width, self.log, image.source or image.name)
        return found and replace(found[0], bbox=found[1])

    def _named(self, image: LabeledImage) -> LabeledImage:
        """Rename an image that the importer would skip, or whose files would replace another one's."""
        parts = [part for part in image.name.split("/") if part]
        hidden = [part.startswith(".") or os.path.splitext(part)[0].lower() in self.reserved for part in parts]
        stem, suffix = os.path.splitext("/".join("_" * hide + part for part, hide in zip(parts, hidden, strict=True)))
        invalid = self.xml and _NOT_XML.search(image.name) is not None
        if invalid:
            stem, suffix = (_NOT_XML.sub("_", part) for part in (stem, suffix))
        missing = "" if image.file is None or suffix.lower() in SUFFIXES else suffix_of(image.file)
        if missing:
            stem, suffix = stem + suffix, missing
        folder = self.split_of(image) if self.split_folders else ""
        name = self.unique(stem, folder, "" if self.stems else suffix) + suffix
        if name != image.name:
            unread = any(hidden) or invalid or missing
            reason = "such names are not read" if unread else "another image has this name or stem"
            self.log.add("image-name", image.source or image.name, f"{image.name} is written as {name}, as {reason}")
        return replace(image, name=name)

    def unique(self, path: str, folder: str = "", suffix: str = "") -> str:
        """Return a path that no other image has in a folder, numbered if necessary; importers ignore the case."""
        numbered = (f"{path}_{number}" for number in itertools.count(2))
        free = next(x for x in itertools.chain([path], numbered) if f"{folder}/{x}{suffix}".lower() not in self._taken)
        self._taken.add(f"{folder}/{free}{suffix}".lower())
        return free

    def split_of(self, image: LabeledImage) -> str:
        """Folder of an image's split; empty for predictions."""
        return "" if self.options.predictions else (image.split or "train")

    def place(self, image: LabeledImage, *folders: str) -> Path:
        """Place the image file below a folder of the output, under its name; return its actual or potential path."""
        target = self.output.joinpath(*filter(None, folders), image.name)
        if image.file is not None and self.options.images is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            place(image.file, target, self.options.images)
        return target

    @staticmethod
    def save(path: Path, text: str) -> None:
        """Write text, creating folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def lose(self, kind: str, image: LabeledImage, labeled: LabeledObject, detail: str) -> None:
        """Log the loss of an object, or of a part of it."""
        self.log.add(kind, image.name, f"{labeled.category}: {detail}", place=labeled.line)

    def own_box(self, labeled: LabeledObject, image: LabeledImage) -> Box | None:
        """Return the box of an object if it is not that of its mask."""
        segmentation = labeled.segmentation
        if segmentation is None or labeled.bbox is None:
            return None
        if isinstance(segmentation, list):
            extent = polygon_box(segmentation)
        else:
            extent = mask_utils.toBbox(rle_of(segmentation, image.height, image.width))
        corners = np.array([labeled.bbox, extent], dtype=np.float64).reshape(2, 2, 2)
        corners[:, 1] += corners[:, 0]
        corners = corners.clip(0, (image.width, image.height))
        return labeled.bbox if np.abs(corners[0] - corners[1]).max() > _TOLERANCE else None

    def lose_box(self, labeled: LabeledObject, image: LabeledImage) -> None:
        """Log the loss of a box that is not that of its mask."""
        if self.own_box(labeled, image) is not None:
            self.lose("box", image, labeled, "the format has no boxes of objects with masks, and its box differs")

    def paint(self, image: LabeledImage, objects: Sequence[tuple[int, LabeledObject]]) -> NDArray[np.int32]:
        """Paint objects as numbers into one label image, small ones on top; occlusions are logged.

        Args:
            image: The image, for its size.
            objects: Objects with their numbers, 1 or more.

        Returns:
            (H, W); 0 is background.
        """
        canvas = np.zeros((image.height, image.width), dtype=np.int32)
        windows = [
            (number, labeled, *window_of(labeled.segmentation, image.height, image.width))
            for number, labeled in objects
            if labeled.segmentation is not None
        ]
        areas = {}
        for number, _, window, (left, top, right, bottom) in sorted(windows, key=lambda item: -int(item[2].sum())):
            canvas[top:bottom, left:right][window > 0] = number
            areas[number] = int(window.sum())
        shown = np.bincount(canvas.ravel(), minlength=max(areas, default=0) + 1)
        for number, labeled, *_ in windows:
            if not areas[number]:
                self.lose("mask", image, labeled, "its mask covers no pixel")
            elif shown[number] < areas[number]:
                covered = areas[number] - int(shown[number])
                detail = (
                    f"{covered} of its {areas[number]} pixels are covered by other objects; "
                    "a label image stores one id per pixel"
                )
                self.lose("overlap", image, labeled, detail)
        return canvas


EXPORTERS: Registry[type[Exporter]] = Registry("export format")


def register_exporter(name: str) -> Callable[[type[Exporter]], type[Exporter]]:
    """Return a decorator that registers an :class:`Exporter` under the name of its format."""

    def decorator(cls: type[Exporter]) -> type[Exporter]:
        cls.name = name
        return EXPORTERS.register(name)(cls)

    return decorator


def export_images(
    images: Iterable[LabeledImage],
    output: str | Path,
    *,
    format: str,
    categories: Sequence[CategoryInfo],
    options: ExportOptions | None = None,
    log: LossLog | None = None,
    overwrite: bool = False,
) -> LossLog:
    """Write labeled images in a format.

    Args:
        images: The images.
        output: The folder; created if necessary.
        format: One of the registered formats.
        categories: All classes, in their order.
        options: The options.
        log: Log of losses; by default a new one.
        overwrite: Whether the folder may be non-empty.

    Returns:
        The log.

    Raises:
        DataError: If the folder is not empty and ``overwrite`` is off.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    before = file_states(output) if overwrite else {}
    log = log or LossLog()
    exporter = EXPORTERS[format](output, categories, log, options)
    ids = {}
    for image in map(exporter.prepared, images):
        exporter.write(image)
        exporter.written += 1
        if image.id is not None:
            ids[image.name] = image.id
    exporter.close()
    if ids:
        exporter.save(output / IDS_FILE, json.dumps(ids, ensure_ascii=False, indent=0) + "\n")
    if kept := [path for path in untouched(output, before) if path.name != REPORT_FILE]:
        log.note(f"files from before stay in {output}, such as {kept[0].name}; an import reads them too", len(kept))
    return log
