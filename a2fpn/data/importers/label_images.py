"""Label images: each pixel is the number of its object, as written by ImageJ, napari, Cellpose and StarDist.

PNG of 8 or 16 bits, BMP, GIF, TIFF of 8, 16 or 32 bits (also floating-point with integer values). Labels are in a
folder ``labels``, ``masks`` or ``label_images`` under the names of their images, or next to them with an ending such as
``_masks``, or in a folder of labels beside one of images. Subfolders, ``labels/nucleus/``, are classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.images import SUFFIXES, open_image
from a2fpn.data.importers.base import Importer, ImportOptions, register_importer
from a2fpn.data.importers.files import LABEL_FOLDERS, ImageIndex
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.mask_files import mask_units
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog, folder_name, split_name
from a2fpn.errors import DataError
from a2fpn.masks.rle import Rle

_ENDINGS = re.compile(r"[_-](cp_masks|masks?|labels?|instances?|gt|seg)$", re.IGNORECASE)
_IMAGE_ENDINGS = re.compile(r"[_-](image|img|raw|rgb)$", re.IGNORECASE)
_TRIED = 20
_LABEL_SUFFIXES = (".bmp", ".gif", ".png", ".tif", ".tiff")


@register_importer("labels")
class LabelImageImporter(Importer):
    """Reads one label image per image."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        if folder.file is not None or any(folder.by_suffix.get(suffix) for suffix in (".xml", ".yaml", ".yml")):
            return ""
        pairs = _pairs(folder)
        if not pairs or mask_units(folder.root):
            return ""
        tried = pairs[:_TRIED]
        return f"{len(pairs)} label images" if all(_may_be_labels(path) for path in tried) else ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.labels = _pairs(folder)
        several = len(self.categories) > 1
        self.class_folders = {folder_name(info.name) for info in self.categories if several}
        self.images = ImageIndex(self.root, LABEL_FOLDERS)
        taken = set(self.labels)
        self.images.files = [path for path in self.images.files if path not in taken]
        self.keys = self._keys()
        self.image_folders = {path.parent for path in self.images.files}
        self.siblings: dict[tuple[Path, str], list[Path]] = {}
        label_folders = {path.parent for path in self.labels}
        for path in self.images.files:
            if path.parent not in label_folders:
                self.siblings.setdefault((path.parent.parent, path.stem.lower()), []).append(path)
        self.total = len(self.images.files)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        if not self.labels:
            raise DataError(
                f"{self.root}: no label images found; expected them in labels/ or masks/, named like the images."
            )
        by_image: dict[Path, list[tuple[str, Path]]] = {}
        for path in self.labels:
            category, found = self._match(path)
            if found is None:
                self.log.add("missing-image", path, "no image with this name; its labels are lost")
            elif any(category == other for other, _ in by_image.get(found, ())):
                self.log.add("duplicate-stem", path, f"{found.name} has another label image too; skipped")
            else:
                by_image.setdefault(found, []).append((category, path))
        objects: list[int] = []
        for image in self.images.files:
            if image in by_image:
                labeled = self._image(image, by_image[image])
                if labeled is not None:
                    objects.append(len(labeled.objects))
                    yield labeled
        if max(objects, default=0) == 1:
            single = sum(objects)
            self.log.note(
                "images with a single label, no image with more: if it marks all objects, number them", single
            )
        yield from self.unlabeled(set(by_image))

    def _keys(self) -> dict[tuple[str | None, str], Path]:
        """Images by split and stem, and the first of each stem with None as the split.

        An image ``a/images/b_rgb`` is also found as ``a/b``, as its labels may be ``a/labels/b_label``, unless there
        is ``a/images/b_img``, too.
        """
        keys: dict[tuple[str | None, str], Path] = {}
        beside: dict[tuple[str | None, str], set[Path]] = {}
        for path in self.images.files:
            name, split = self.images.name_and_split(path)
            key = str(Path(name).with_suffix("")).lower()
            if (split, key) in keys:
                self.log.add("duplicate-stem", path, f"{keys[split, key].name} has the same stem; skipped")
                continue
            keys[split, key] = path
            keys.setdefault((None, key), path)
            short = _without_image_folders(key)
            for other in (short, _IMAGE_ENDINGS.sub("", short)):
                beside.setdefault((split, other), set()).add(path)
                beside.setdefault((None, other), set()).add(path)
        return {key: paths.pop() for key, paths in beside.items() if len(paths) == 1} | keys

    def _match(self, path: Path) -> tuple[str, Path | None]:
        """Class and image of a label image."""
        split = ""
        parts: list[str] = []
        above, inside = 0, False  # parts above the folder of labels
        for part in path.relative_to(self.root).parts[:-1]:
            # Only the first may be a split: "train" may also be a class.
            if not parts and not split and split_name(part):
                split = split_name(part)
                continue
            aside = part.lower() in LABEL_FOLDERS or (part.lower() == "images" and not parts)
            if aside and not (inside and part in self.class_folders):
                above, inside = len(parts), True
            else:
                parts.append(part)
        readings = [("", parts)]
        for place in dict.fromkeys((above, 0)):
            if place < len(parts):
                readings.append((parts[place], [*parts[:place], *parts[place + 1 :]]))
        # Folders of known classes first; others may belong to the paths of images.
        readings.sort(key=lambda reading: (reading[0] not in self.class_folders, reading[0] != ""))
        for stem in (path.stem, _ENDINGS.sub("", path.stem)):
            for class_folder, folders in readings:
                key = "/".join((*folders, stem)).lower()
                key = key if (None, key) in self.keys else _without_image_folders(key)
                found = self.keys.get((split, key)) or self.keys.get(("", key))
                found = found or (None if split else self.keys.get((None, key)))
                if found is not None:
                    return self.class_of(class_folder), found
        return self.class_of(""), self._in_sibling(path)

    def _in_sibling(self, path: Path) -> Path | None:
        """Image of a label image in a folder of labels only, whose sibling holds only images."""
        if path.parent in self.image_folders:
            return None
        for stem in (path.stem, _ENDINGS.sub("", path.stem)):
            found = self.siblings.get((path.parent.parent, stem.lower()), [])
            if len(found) == 1:
                return found[0]
        return None

    def _image(self, path: Path, labels: list[tuple[str, Path]]) -> LabeledImage | None:
        size = self.images.size(path, self.log)
        if size is None:
            return None
        self.begin_image()
        objects = []
        for category, label_path in labels:
            try:
                values = read_label_image(label_path)
            except (OSError, SyntaxError, ValueError) as error:
                self.log.add("unreadable-labels", label_path, f"not a label image ({error}); skipped")
                continue
            if values.shape != size:
                detail = f"{values.shape[1]} x {values.shape[0]} pixels, its image has {size[1]} x {size[0]}; skipped"
                self.log.add("size-mismatch", label_path, detail)
                continue
            rles = encode_labels(values)
            objects += [LabeledObject(category, None, rle, line=f"label {number}") for number, rle in rles.items()]
        name, split = self.images.name_and_split(path)
        return LabeledImage(path, name, *size, objects, split, str(labels[0][1]))


def read_label_image(path: Path) -> NDArray[np.int64]:
    """Read the numbers of a label image.

    Raises:
        OSError: If there is no such image.
        ValueError: If its pixels are not object numbers.
    """
    with open_image(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            raise ValueError(f"it has {pages} pages; export one slice per file")
        if image.mode not in ("1", "L", "P", "F") and not image.mode.startswith("I"):
            raise ValueError(f"expected a single channel, got mode {image.mode}")
        values = np.asarray(image)
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise ValueError("its floating-point values are not integers")
    if values.ndim != 2:
        raise ValueError(f"expected a single channel, got shape {values.shape}")
    whole = values.astype(np.int64)
    if whole.size and whole.min() < 0:
        raise ValueError(f"it has the negative value {whole.min()}")
    return whole


def encode_labels(values: NDArray[np.int64]) -> dict[int, Rle]:
    """Encode each object of a label image, in the order of the numbers.

    Example:
        >>> encode_labels(np.array([[0, 7], [7, 9]]))
        {7: {'size': [2, 2], 'counts': '121'}, 9: {'size': [2, 2], 'counts': '31'}}
    """
    height, width = values.shape
    flat = values.ravel(order="F")
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    labels = flat[starts]
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    result: dict[int, Rle] = {}
    for label in np.unique(labels).tolist():
        if label == 0:
            continue
        rows = order[np.searchsorted(ordered, label) : np.searchsorted(ordered, label, side="right")]
        edges = np.stack([starts[rows], ends[rows]], 1).ravel()
        runs = np.diff(edges, prepend=0, append=flat.size)
        runs = runs[:-1] if runs[-1] == 0 else runs
        rle = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        result[label] = Rle(size=[height, width], counts=rle["counts"].decode("ascii"))
    return result


def _pairs(folder: Folder) -> list[Path]:
    """Candidates for label images: files in a folder for them, or with an ending for them."""
    inside: list[Path] = []
    beside: list[Path] = []
    for suffix in _LABEL_SUFFIXES:
        for path in folder.of_type(suffix):
            folders = {part.lower() for part in path.relative_to(folder.root).parts[:-1]}
            if folders & LABEL_FOLDERS:
                inside.append(path)
            elif _ENDINGS.search(path.stem):
                beside.append(path)
    labeled = {path.stem for path in inside}  # an image may have such an ending itself
    return sorted([*inside, *(path for path in beside if path.stem not in labeled)])


def _without_image_folders(key: str) -> str:
    """Return the path of an image without folders called "images".

    Example:
        >>> _without_image_folders("site 1/images/a")
        'site 1/a'
    """
    *folders, stem = key.split("/")
    return "/".join([*(folder for folder in folders if folder != "images"), stem])


def _may_be_labels(path: Path) -> bool:
    """Return whether an image has a single channel."""
    try:
        with open_image(path) as image:
            return image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
    except Exception:  # PIL raises almost anything; reading reports the error
        return path.suffix.lower() in SUFFIXES
