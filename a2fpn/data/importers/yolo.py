"""YOLO: one text file an image, each line a class and numbers between 0 and 1.

Written after the documentation of Ultralytics' data sets; Darknet's folders with ``obj.names`` are read too.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from a2fpn._registry import natural_key
from a2fpn.data.importers.base import Folder, Importer, ImportOptions, register_importer
from a2fpn.data.importers.files import IMAGE_SUFFIXES, clean_path, image_size, name_and_split, read_text
from a2fpn.data.importers.yolo_lines import YoloLines
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog, split_name
from a2fpn.errors import DataError

_CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "labels.txt", "predefined_classes.txt")
_SPLITS = ("train", "val", "valid", "test")


@register_importer("yolo")
class YoloImporter(Importer):
    """Reads folders with ``data.yaml``, or with a list of classes, images and labels."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        for suffix in (".yaml", ".yml"):
            for path in folder.of_type(suffix):
                if b"names" in folder.head(path):
                    return f"{path.name} with names"
        if not folder.has_images():
            return ""
        for path in folder.of_type(".txt"):
            first = folder.head(path).partition(b"\n")[0].split()
            if len(first) >= 5 and path.name not in _CLASS_FILES and all(map(_is_number, first)):
                return f"{path.name} with numbers"
        return ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        path = folder.file or _find_yaml(folder)
        self.yaml: Mapping[str, Any] = {}
        self.yaml_path = self.root
        if path is not None and path.suffix.lower() in (".yaml", ".yml"):
            self.yaml, self.yaml_path = _read_yaml(path), path
            base = self.yaml.get("path")
            if isinstance(base, str) and (named := Path(self.root, base.replace("\\", "/"))).is_dir():
                self.root = named
        self.names = self._class_names()
        self.declare(self.names)
        self.lines = YoloLines(self.names, *self._keypoint_shape())
        self.jobs = self._jobs()
        self.total = len(self.jobs)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        if not self.jobs:
            raise DataError(f"{self.root}: no image; expected images/ beside labels/, or train, val in data.yaml.")
        used: set[str] = set()
        lists: dict[str, set[str]] = {}
        missing = 0
        for path, split in self.jobs:
            relative = os.path.relpath(path, self.root).replace(os.sep, "/")
            label = _label_file(path)
            folder = os.path.dirname(label)
            if folder not in lists:
                lists[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            name, named = name_and_split(relative.lstrip("./"))
            has_label = os.path.basename(label) in lists[folder]
            if has_label and label in used:
                detail = f"{os.path.basename(label)} belongs to another image of the same stem too; left out"
                self.log.add("duplicate-stem", path, detail)
                continue
            if not has_label and self.options.unlabeled == "skip":
                missing += 1
                continue
            size = self.images_size(path)
            if size is None:
                continue
            objects: Sequence[LabeledObject] = ()
            if has_label:
                used.add(label)
                objects = self._objects(label, *size)
            else:
                missing += 1
            yield LabeledImage(Path(path), name, *size, objects, split or named, source=label)
        left = "left out" if self.options.unlabeled == "skip" else "kept as backgrounds"
        if missing:
            self.log.note(f"images without a label file, {left}", missing)
        self._orphans(used, lists)

    def images_size(self, path: str) -> tuple[int, int] | None:
        """Return height and width, or None with a loss."""
        try:
            return image_size(Path(path))
        except FileNotFoundError:
            self.log.add("missing-image", path, "no such file; left out")
        except Exception as error:  # PIL raises almost anything on a corrupt file
            self.log.add("unreadable-image", path, f"no readable image ({error}); left out")
        return None

    def _orphans(self, used: set[str], lists: Mapping[str, set[str]]) -> None:
        """Label files that no image belongs to."""
        tops = {folder.rpartition(f"{os.sep}labels")[0] or folder for folder in lists}
        listed = {os.path.splitext(path)[0] for path, _ in self.jobs}
        other = 0
        for top in sorted(tops):
            labels = os.path.join(top, "labels")
            for folder, _, names in os.walk(labels if os.path.isdir(labels) else top):
                for name in sorted(names):
                    path = os.path.join(folder, name)
                    if not name.endswith(".txt") or path in used or name in _CLASS_FILES or _is_list(path):
                        continue
                    stem = _image_stem(path)
                    if stem in listed:
                        continue
                    if any(os.path.isfile(stem + suffix) for suffix in IMAGE_SUFFIXES):
                        other += 1
                    else:
                        self.log.add("missing-image", path, "no image of this name; its labels are lost")
        if other:
            self.log.note("label files of images that no split lists", other)

    def _class_names(self) -> list[str]:
        names = self.yaml.get("names")
        if isinstance(names, Mapping):
            try:
                numbers = sorted(int(key) for key in names)
            except (TypeError, ValueError):
                raise DataError(f"{self.yaml_path}: the keys of names must be class numbers, got {names}.") from None
            return [str(names.get(number, names.get(str(number), number))) for number in range(max(numbers) + 1)]
        if isinstance(names, list) and names:
            return [str(name) for name in names]
        if isinstance(names, str):
            named = self.root / names
            if named.is_file():
                return _lines(named)
        for folder in (self.root, self.root / "labels", self.root / "train", self.root / "labels" / "train"):
            for name in _CLASS_FILES:
                if (folder / name).is_file():
                    return _lines(folder / name)
        if self.categories:
            return [category.name for category in self.categories]
        raise DataError(
            f"{self.yaml_path}: no list of classes; expected names in data.yaml or a file "
            f"{' or '.join(_CLASS_FILES[:2])}. Give one with --categories FILE."
        )

    def _keypoint_shape(self) -> tuple[int, int]:
        shape = self.yaml.get("kpt_shape")
        if shape is None:
            return 0, 0
        if not (isinstance(shape, list) and len(shape) == 2 and shape[0] > 0 and shape[1] in (2, 3)):
            raise DataError(f"{self.yaml_path}: kpt_shape must be [number, 2 or 3], got {shape}.")
        named = self.yaml.get("kpt_names")
        for number, name in enumerate(self.names):
            points = named.get(number) if isinstance(named, Mapping) else None
            if not self.keypoint_names(name):
                self.declare_keypoints(name, points or [f"point {i + 1}" for i in range(shape[0])])
        return shape[0], shape[1]

    def _jobs(self) -> list[tuple[str, str]]:
        """The image files with their splits, each once."""
        jobs: dict[str, str] = {}
        keys = [key for key in _SPLITS if self.yaml.get(key)]
        for key in keys:
            values = self.yaml[key]
            for value in values if isinstance(values, list) else [values]:
                for path in self._resolve(str(value), key):
                    path = os.path.normpath(path)
                    if path in jobs and jobs[path] != (split_name(key) or key):
                        self.log.add("duplicate-image", self.yaml_path, f"{path} is in {jobs[path]} and {key}")
                    jobs.setdefault(path, split_name(key) or key)
        if keys:
            return list(jobs.items())
        return [(path, "") for path in _images_below(str(self.root))]

    def _resolve(self, value: str, key: str) -> list[str]:
        """The images that an entry of ``data.yaml`` names: a folder, a list, or a pattern."""
        text = value.replace("\\", "/")
        for base in (self.root, self.yaml_path.parent):
            path = os.path.join(base, text)
            if glob.has_magic(path):
                found = [name for name in glob.glob(path, recursive=True) if _is_image(name)]
                if found:
                    return sorted(found, key=natural_key)
            for candidate in (path, *_below(str(base), text)):
                if os.path.isdir(candidate):
                    return _images_below(candidate)
                if os.path.isfile(candidate):
                    return self._listed(candidate)
        if key == "test":  # often named and not delivered
            self.log.note(f"split {key}: {value} is not there")
            return []
        raise DataError(
            f"{self.yaml_path}: {key}: {value} is no folder of images and no list of them below {self.root}; "
            "correct it, or path."
        )

    def _listed(self, path: str) -> list[str]:
        """The images of a list, one path a line."""
        base = os.path.dirname(path)
        found = []
        for number, line in enumerate(read_text(Path(path)).splitlines(), 1):
            name = line.strip()
            if not name:
                continue
            text = name.replace("\\", "/")
            candidates = (
                os.path.join(base, text),
                os.path.join(self.root, text),
                *_below(str(self.root), clean_path(name)),
                *_below(base, clean_path(name)),
            )
            match = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
            if match is None:
                self.log.add("missing-image", path, f"{name} is not there", place=f"line {number}")
            else:
                found.append(match)
        return found

    def _objects(self, path: str, height: int, width: int) -> list[LabeledObject]:
        """The objects of a label file."""
        try:
            text = read_text(Path(path))
        except DataError as error:
            self.log.add_error("unreadable-labels", Path(path), error)
            return []
        objects = []
        seen: set[str] = set()
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            if line in seen:
                self.log.add("duplicate-line", path, "the same as a line before; left out", place=f"line {number}")
                continue
            seen.add(line)
            try:
                objects.append(self.lines.read(fields, height, width, number))
            except ValueError as error:
                self.log.add("bad-line", path, f"{error}; left out", place=f"line {number}")
        return objects


def _find_yaml(folder: Folder) -> Path | None:
    found = [path for suffix in (".yaml", ".yml") for path in folder.of_type(suffix) if b"names" in folder.head(path)]
    return min(found, key=lambda path: (len(path.parts), path.name not in ("data.yaml", "dataset.yaml")), default=None)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise DataError(f"{path}{line}: no YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: expected keys such as train, val and names, got {type(data).__name__}.")
    return data


def _lines(path: Path) -> list[str]:
    names = [line.strip() for line in read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{path}: no class; expected one name a line.")
    return names


def _label_file(image: str) -> str:
    """Return the label file of an image: its last folder "images" replaced by "labels", or beside it."""
    stem = os.path.splitext(image)[0]
    head, found, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    return (f"{head}{os.sep}labels{os.sep}{tail}" if found else stem) + ".txt"


def _image_stem(label: str) -> str:
    """Return the path of a label file's image, without its suffix; the inverse of :func:`_label_file`."""
    stem = os.path.splitext(label)[0]
    head, found, tail = stem.rpartition(f"{os.sep}labels{os.sep}")
    return f"{head}{os.sep}images{os.sep}{tail}" if found else stem


def _is_list(path: str) -> bool:
    """Return whether a text file holds something else than labels, such as a list of images."""
    with open(path, "rb") as file:
        first = file.readline().split()
    return bool(first) and not _is_number(first[0].lstrip(b"\xef\xbb\xbf"))


def _below(base: str, path: str) -> Iterator[str]:
    """Interpret a path below a folder, if its first parts are of another machine."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield os.path.join(base, *parts[start:])


def _images_below(folder: str) -> list[str]:
    found = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if _is_image(name)]
    return sorted(found, key=natural_key)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
