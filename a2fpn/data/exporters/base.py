"""Common parts of the exporters: registry, placement of images, losses."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from a2fpn._registry import Registry
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.importers.folder import CATEGORIES_FILE, IDS_FILE
from a2fpn.data.importers.writer import Placing, check_output, place
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        images: Whether images are linked or copied; None leaves them in place if the format allows it.
        splits: Whether splits become folders; False for a single set, such as predictions.
    """

    images: Placing | None = "link"
    splits: bool = True


class Exporter(ABC):
    """Base of the exporters; a new format is a subclass with ``@register_exporter``.

    Args:
        output: The folder.
        categories: All classes, in their order.
        log: Log of losses.
        options: The options.
    """

    name = ""

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        self.output = output
        self.categories = list(categories)
        self.index = {category.name: number for number, category in enumerate(self.categories)}
        self.log = log
        self.options = options or ExportOptions()
        self.written = 0

    @abstractmethod
    def write(self, image: LabeledImage) -> None:
        """Write an image with its objects; losses are logged."""

    def close(self) -> None:
        """Write files shared by all images; ``categories.json`` preserves ids for a later import."""
        entries = [
            category.to_coco(number if category.id is None else category.id)
            for number, category in enumerate(self.categories, 1)
        ]
        self.save(self.output / CATEGORIES_FILE, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")

    def split_of(self, image: LabeledImage) -> str:
        """Folder of an image's split; empty without splits."""
        return (image.split or "train") if self.options.splits else ""

    def place(self, image: LabeledImage, *folders: str) -> Path:
        """Place the image file below a folder of the output, under its name; return its actual or potential path."""
        target = self.output.joinpath(*filter(None, folders), image.name)
        if image.path is not None and self.options.images is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            place(image.path, target, self.options.images)
        return target

    @staticmethod
    def save(path: Path, text: str) -> None:
        """Write text, creating folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def lose(self, kind: str, image: LabeledImage, labeled: LabeledObject, detail: str) -> None:
        """Log the loss of an object, or of a part of it."""
        self.log.add(kind, image.name, f"{labeled.category}: {detail}", place=labeled.line)

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
            if shown[number] < areas[number]:
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
    log = log or LossLog()
    exporter = EXPORTERS[format](output, categories, log, options)
    ids = {}
    for image in images:
        exporter.write(image)
        exporter.written += 1
        if image.id is not None:
            ids[image.name] = image.id
    exporter.close()
    if ids:
        exporter.save(output / IDS_FILE, json.dumps(ids, ensure_ascii=False, indent=0) + "\n")
    return log
