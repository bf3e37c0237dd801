"""YOLO: one text file per image, each line a class and normalized coordinates.

A line is ``class x y width height`` (boxes), ``class x y x y x y ...`` (segmentation), or, if ``data.yaml`` has
``kpt_shape: [K, 2 or 3]``, a box followed by keypoints (pose). It follows the documentation of Ultralytics' data
sets; Darknet's folders with ``obj.names`` are supported too.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from a2fpn._registry import natural_key
from a2fpn.data.images import SUFFIXES, is_image
from a2fpn.data.importers.base import Importer, ImportOptions, register_importer
from a2fpn.data.importers.files import clean_path, image_size, name_and_split, read_text, walk
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.yolo_files import (
    CLASS_FILES,
    LabelFiles,
    below,
    by_class,
    check_text,
    darknet_lists,
    find_yaml,
    image_stem,
    images_below,
    is_class_number,
    is_list,
    is_number,
    is_text_file,
    labels_above,
    read_class_list,
    read_yaml,
)
from a2fpn.data.labeled import Box, LabeledImage, LabeledObject, LossLog, split_name
from a2fpn.errors import DataError

_SLACK = 0.01  # tolerance of coordinates over the edge by rounding
_DECIMALS = 3  # of coordinates in pixels; removes rounding noise of the normalization
_PLAIN = b"-.0123456789eE \n"  # characters of lines of numbers
_SURE = ("classes.txt", "obj.names")  # no other format has these
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
        listed = [path for path in folder.of_type(".txt") if path.name not in CLASS_FILES]
        if listed and (
            names := next((p for s in (".txt", ".names") for p in folder.of_type(s) if p.name in _SURE), None)
        ):
            return f"{names.name} with classes"
        for path in listed:
            first = folder.head(path).removeprefix(codecs.BOM_UTF8).partition(b"\n")[0].split()
            if len(first) >= 5 and all(map(is_number, first)):
                return f"{path.name} with numbers"
        return ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        path = folder.file or find_yaml(folder)
        self.yaml: Mapping[str, Any] = {}
        self.yaml_path = self.root
        if path is not None and path.suffix.lower() in (".yaml", ".yml"):
            self.yaml, self.yaml_path = read_yaml(path), path
            base = self.yaml.get("path")
            if isinstance(base, str) and (named := Path(self.root, base.replace("\\", "/"))).is_dir():
                self.root = named
        self.names = self._class_names()
        self.declare(self.names)
        if merged := len(self.names) - len(set(self.names)):
            self.log.note("classes with the name of another, merged with it", merged)
        self.num_keypoints, self.dims = self._keypoint_shape()
        points = {category.name: len(category.keypoints) for category in self.categories}
        self.points = [points[name] for name in self.names]
        self.jobs = self._jobs()
        self.total = len(self.jobs)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        if not self.jobs:
            raise DataError(
                f"{self.root}: no images found; expected images/ next to labels/, or train, val in data.yaml."
            )
        used: set[str] = set()
        labels = LabelFiles()
        missing, root = 0, os.path.join(self.root, "")
        for path, split in self.jobs:
            inside = path.startswith(root)
            relative = path[len(root) :] if inside else os.path.relpath(path, self.root).replace(f"..{os.sep}", "")
            label = labels.find(path)
            name, named = name_and_split(relative.replace(os.sep, "/"))
            if label in used:
                detail = f"{os.path.basename(label)} belongs to another image of the same stem; skipped"
                self.log.add("duplicate-stem", path, detail)
                continue
            if not label and self.options.unlabeled == "skip":
                missing += 1
                continue
            if label:
                used.add(label)
            size = self.images_size(path)
            if size is None:
                continue
            missing += not label
            self.begin_image()
            objects = self._objects(label, *size) if label else ()
            yield LabeledImage(Path(path), name, *size, objects, split or named, source=label or path)
        left = "skipped" if self.options.unlabeled == "skip" else "kept as background"
        if missing:
            self.log.note(f"images without a label file, {left}", missing)
        self._orphans(used, labels.folders)

    def images_size(self, path: str) -> tuple[int, int] | None:
        """Return height and width, or None with a loss."""
        try:
            return image_size(path)
        except FileNotFoundError:
            self.log.add("missing-image", path, "no such file; skipped")
        except Exception as error:  # PIL raises almost anything on a corrupt file
            self.log.add("unreadable-image", path, f"not a readable image ({error}); skipped")
        return None

    def _orphans(self, used: set[str], folders: Iterable[str]) -> None:
        """Log label files that no image used."""
        listed = {os.path.splitext(path)[0] for path, _ in self.jobs}
        beside = {os.path.dirname(stem) for stem in listed}
        tops = {folder if folder in beside else labels_above(folder) for folder in folders}
        if not used:  # the labels may be anywhere
            tops = {str(self.root)}
        seen = set(used)
        other = 0
        for top in sorted(tops):
            for folder, _, names in walk(top):
                for name in sorted(names):
                    path = os.path.join(folder, name)
                    if not is_text_file(name) or path in seen or name in CLASS_FILES or is_list(path):
                        continue
                    seen.add(path)
                    stems = {image_stem(path), os.path.splitext(path)[0]}
                    if stems & listed:
                        self.log.add("duplicate-stem", path, "its image has another label file; skipped")
                    elif any(os.path.isfile(stem + suffix) for stem in stems for suffix in SUFFIXES):
                        other += 1
                    else:
                        self.log.add("missing-image", path, "no image with this name; its labels are lost")
        if other:
            self.log.note("label files of images that no split lists", other)

    def _class_names(self) -> list[str]:
        names = self.yaml.get("names")
        if isinstance(names, str):
            named = self.root / names
            if named.is_file():
                return read_class_list(named)
        elif names:
            listed = by_class(names, self.yaml_path, "names")
            check_text(listed.values(), self.yaml_path, "a class name")
            return [listed.get(number, str(number)) for number in range(max(listed) + 1)]
        for below_root in ("", "labels", "images", "train", "labels/train"):
            folder = self.root / below_root
            for name in CLASS_FILES:
                if (folder / name).is_file():
                    return read_class_list(folder / name)
        if self.categories:
            return [category.name for category in self.categories]
        raise DataError(
            f"{self.yaml_path}: no list of classes; expected names in data.yaml or a file "
            f"{' or '.join(CLASS_FILES[:2])}. Give one with --categories FILE."
        )

    def _keypoint_shape(self) -> tuple[int, int]:
        """Return the number of keypoints of a line and their numbers of values, and name those of the classes."""
        shape = self.yaml.get("kpt_shape")
        if shape is None:
            return 0, 0
        match shape:
            case [str(count), ("2" | "3") as dims] if is_class_number(count) and int(count):
                self._name_keypoints(int(count))
                return int(count), int(dims)
        raise DataError(f"{self.yaml_path}: kpt_shape must be [number, 2 or 3], such as [17, 3].")

    def _name_keypoints(self, count: int) -> None:
        """Name the keypoints of the classes: as in ``kpt_names``, where a class may have fewer, else by numbers."""
        listed = self.yaml.get("kpt_names", {})
        same = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        named = dict.fromkeys(range(len(self.names)), listed) if same else by_class(listed, self.yaml_path, "kpt_names")
        for names in named.values():
            if not isinstance(names, list) or len(names) > count:
                raise DataError(f"{self.yaml_path}: kpt_names must be lists of up to {count} names, as in kpt_shape.")
            check_text(names, self.yaml_path, "a name of a keypoint")
        for number, name in enumerate(self.names):
            if not self.keypoint_names(name):
                self.declare_keypoints(name, named.get(number, [f"point {i + 1}" for i in range(count)]))

    def _jobs(self) -> list[tuple[str, str]]:
        """List the image files with their splits, each once."""
        jobs: dict[str, str] = {}
        others = (key for key, value in self.yaml.items() if value == f"images/{key}" and key not in _SPLITS)
        keys = [key for key in (*_SPLITS, *others) if self.yaml.get(key)]
        listed = [(key, path) for key in keys for path in self._entries(key)]
        if not keys:
            listed = [(key, path) for key, file in darknet_lists(self.root).items() for path in self._listed(file)]
        for key, path in listed:
            path = os.path.normpath(path)
            if path in jobs and jobs[path] != (split_name(key) or key):
                self.log.note(f"images listed in {jobs[path]} and {key}, kept in {jobs[path]}")
            jobs.setdefault(path, split_name(key) or key)
        if keys or listed:
            return list(jobs.items())
        return [(path, "") for path in images_below(str(self.root))]

    def _entries(self, key: str) -> Iterator[str]:
        """Yield the images of a split of ``data.yaml``."""
        values = self.yaml[key] if isinstance(self.yaml[key], list) else [self.yaml[key]]
        check_text(values, self.yaml_path, f"a path of {key}")
        for value in values:
            yield from self._resolve(value, key)

    def _resolve(self, value: str, key: str) -> list[str]:
        """List the images of an entry of ``data.yaml``: a folder, a list, or a pattern."""
        text = value.replace("\\", "/")
        for base in (self.root, self.yaml_path.parent):
            path = os.path.join(base, text)
            if glob.has_magic(path):
                found = [name for name in glob.glob(path, recursive=True) if is_image(name)]
                if found:
                    return sorted(found, key=natural_key)
            for candidate in (path, *below(str(base), text)):
                if os.path.isdir(candidate):
                    return images_below(candidate)
                if os.path.isfile(candidate):
                    return self._listed(candidate)
        if key == "test":  # often listed but missing
            self.log.note(f"split {key}: {value} not found")
            return []
        raise DataError(
            f"{self.yaml_path}: {key}: {value} is neither an image folder nor a list of images below {self.root}; "
            "correct it, or path."
        )

    def _listed(self, path: str) -> list[str]:
        """Read a list of images, one path per line."""
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
                *below(str(self.root), clean_path(name)),
                *below(base, clean_path(name)),
            )
            match = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
            if match is None:
                self.log.add("missing-image", path, f"{name} not found", place=f"line {number}")
            else:
                found.append(match)
        return found

    def _objects(self, path: str, height: int, width: int) -> list[LabeledObject]:
        """Read the objects of a label file."""
        try:
            text = read_text(Path(path))
        except DataError as error:
            self.log.add_error("unreadable-labels", Path(path), error)
            return []
        lines = text.splitlines()
        found = None if self.num_keypoints else self._polygons(lines, height, width)
        if found is not None:
            return found
        objects = []
        seen: set[str] = set()
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            if line in seen:
                self.log.add("duplicate-line", path, "duplicate of an earlier line; skipped", place=f"line {number}")
                continue
            seen.add(line)
            try:
                objects.append(self._object(fields, height, width, path, number))
            except ValueError as error:
                self.log.add("bad-line", path, f"{error}; skipped", place=f"line {number}")
        return objects

    def _polygons(self, lines: Sequence[str], height: int, width: int) -> list[LabeledObject] | None:
        """Parse all lines at once as polygons; None if one is invalid, which is then found line by line."""
        text = "\n".join([line.strip() for line in lines])
        if not lines or len(set(lines)) < len(lines) or text.encode().translate(None, _PLAIN):
            return None
        try:  # numbers are read ten times as fast as by float()
            rows = orjson.loads(f"[[{text}]]".replace("\n", "],[").replace(" ", ","))
        except orjson.JSONDecodeError:
            return None
        lengths = list(map(len, rows))
        classes = range(len(self.names))
        if not all(length > 6 and length % 2 for length in lengths) or any(row[0] not in classes for row in rows):
            return None
        names = [self.names[int(row.pop(0))] for row in rows]
        points = np.fromiter(itertools.chain.from_iterable(rows), np.float64)
        if not (points.min() >= -_SLACK and points.max() <= 1 + _SLACK):
            return None
        points = points.clip(0, 1)
        points[::2] *= width
        points[1::2] *= height
        flat, start, found = points.round(_DECIMALS).tolist(), 0, []
        for number, (name, row) in enumerate(zip(names, rows, strict=True), 1):
            end = start + len(row)
            found.append(LabeledObject(name, None, [flat[start:end]], line=f"line {number}"))
            start = end
        return found

    def _object(self, fields: Sequence[str], height: int, width: int, path: str, line: int) -> LabeledObject:
        """Parse the object of a line.

        Raises:
            ValueError: If the line is invalid.
        """
        try:
            values = list(map(float, fields))
        except ValueError:
            raise ValueError(f"expected numbers, got {' '.join(fields)[:60]!r}") from None
        index = int(values[0]) if math.isfinite(values[0]) else -1
        if index != values[0] or not 0 <= index < len(self.names):
            raise ValueError(f"class {fields[0]} is not among the {len(self.names)} classes 0 to {len(self.names) - 1}")
        name, place = self.names[index], f"line {line}"
        numbers = values[1:]
        expected = 4 + self.num_keypoints * self.dims
        if self.num_keypoints:
            if len(numbers) != expected:
                detail = f"a box and {self.num_keypoints} keypoints of {self.dims}"
                raise ValueError(f"expected {expected} numbers ({detail}) after the class, got {len(numbers)}")
            keypoints = _keypoints(np.array(numbers[4:]).reshape(-1, self.dims), height, width)
            box, end = _box(numbers[:4], height, width), 3 * self.points[index]
            if any(keypoints[end:]):
                self.log.add("keypoints", path, f"{name} has {end // 3} keypoints; the others are skipped", place=place)
            return LabeledObject(name, box, keypoints=keypoints[:end], line=place)
        if len(numbers) == 4:
            return LabeledObject(name, _box(numbers, height, width), line=place)
        if len(numbers) == 5:
            raise ValueError("6 numbers: a box with a score, or an incomplete polygon; expected 5, or 7 or more")
        if len(numbers) < 4 or len(numbers) % 2:
            raise ValueError(f"{len(numbers)} coordinates; expected a box of 4, or a polygon of pairs x y")
        _check_range(numbers)
        points = np.array(numbers)
        if min(numbers) < 0 or max(numbers) > 1:
            points = points.clip(0, 1)
        points[::2] *= width
        points[1::2] *= height
        return LabeledObject(name, None, [points.round(_DECIMALS).tolist()], line=place)


def _check_range(numbers: Sequence[float]) -> None:
    # A sum with NaN is NaN, and comparisons with it are false.
    if not (min(numbers) >= -_SLACK and max(numbers) <= 1 + _SLACK and math.isfinite(sum(numbers))):
        bad = next(value for value in numbers if not -_SLACK <= value <= 1 + _SLACK)
        pixels = "; are these pixels?" if bad > 2 else ""
        raise ValueError(f"the coordinate {bad:g} must be in [0, 1], relative to the image size{pixels}")


def _box(numbers: Sequence[float], height: int, width: int) -> Box:
    _check_range(numbers)
    x, y, w, h = numbers[0] * width, numbers[1] * height, numbers[2] * width, numbers[3] * height
    left, top = max(x - w / 2, 0), max(y - h / 2, 0)
    right, bottom = min(x + w / 2, width), min(y + h / 2, height)
    return tuple(round(side, _DECIMALS) for side in (left, top, right - left, bottom - top))  # type: ignore[return-value]


def _keypoints(points: np.ndarray[Any, np.dtype[np.float64]], height: int, width: int) -> tuple[float, ...]:
    """Keypoints in pixels; without visibility, a point at 0, 0 is not labeled."""
    _check_range(points[:, :2].ravel().tolist())
    xy = (points[:, :2] * (width, height)).round(_DECIMALS)
    seen = points[:, 2].round() if points.shape[1] == 3 else np.where(points.any(1), 2, 0)
    xy[seen == 0] = 0
    return tuple(np.concatenate([xy, seen[:, None]], axis=1).ravel().tolist())
