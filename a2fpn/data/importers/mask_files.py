"""One mask file per object: the layout of the 2018 Data Science Bowl.

``DIR/<image>/images/<image>.png`` with ``DIR/<image>/masks/*.png``, each with its object in white. Folders below
``masks/`` are classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from a2fpn.data.images import is_image, open_image
from a2fpn.data.importers.base import Importer, ImportOptions, register_importer
from a2fpn.data.importers.files import ImageIndex, folders_named, walk
from a2fpn.data.importers.folder import Folder
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog, split_name
from a2fpn.masks.rle import encode_masks


@register_importer("mask_files")
class MaskFilesImporter(Importer):
    """Reads one folder per image, with ``images/`` and ``masks/``."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        if folder.file is not None:
            return ""
        count = len(mask_units(folder.root))
        return f"{count} folders with images/ and masks/" if count else ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.units = mask_units(self.root)
        self.total = len(self.units)
        self.images = ImageIndex(self.root, frozenset(("masks",)))

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for unit in self.units:
            images = [path for path in sorted((unit / "images").iterdir()) if is_image(path.name)]
            if len(images) != 1:
                self.log.add("missing-image", unit / "images", f"expected one image, got {len(images)}; skipped")
                used.update(images)
                continue
            image = images[0]
            size = self.images.size(image, self.log)
            if size is None:
                continue
            used.add(image)
            self.begin_image()
            objects = []
            for path in sorted(Path(folder, name) for folder, _, names in walk(unit / "masks") for name in names):
                if is_image(path.name):
                    labeled = self._object(path, unit, size)
                    if labeled is not None:
                        objects.append(labeled)
            parts = unit.relative_to(self.root).parts
            split = next((split_name(part.removeprefix("stage1_")) for part in parts[:-1]), "")
            folders = [part for part in parts[:-1] if not split_name(part.removeprefix("stage1_"))]
            name = "/".join([*folders, image.name])
            yield LabeledImage(image, name, *size, objects, split, str(unit / "masks"))
        yield from self.unlabeled(used)

    def _object(self, path: Path, unit: Path, size: tuple[int, int]) -> LabeledObject | None:
        try:
            with open_image(path) as image:
                # A JPEG is not black beside its object.
                mask = np.asarray(image.convert("L")) > (127 if image.format == "JPEG" else 0)
        except (OSError, SyntaxError, ValueError) as error:
            self.log.add("unreadable-labels", path, f"not a mask ({error}); skipped")
            return None
        if mask.shape != size:
            detail = f"{mask.shape[1]} x {mask.shape[0]} pixels, its image has {size[1]} x {size[0]}; skipped"
            self.log.add("size-mismatch", path, detail)
            return None
        if not mask.any():
            self.log.add("unusable-object", path, "the mask is empty; skipped")
            return None
        folders = path.relative_to(unit / "masks").parts[:-1]
        return LabeledObject(self.class_of(folders[0] if folders else ""), None, encode_masks(mask[None])[0])


def mask_units(root: Path) -> list[Path]:
    """Return the folders with one image in ``images/`` and masks with other names in ``masks/``.

    Among such folders a mask may also have the name of its image.
    """
    units = []
    certain = False
    for masks in folders_named(root, "masks"):
        images = masks.parent / "images"
        if masks in (root, root / "masks") or not images.is_dir():
            continue
        stems = {path.stem for path in images.iterdir() if is_image(path.name)}
        if len(stems) <= 1:
            units.append(masks.parent)
            certain = certain or not any(path.stem in stems and path.is_file() for path in masks.iterdir())
    return units if certain else []
