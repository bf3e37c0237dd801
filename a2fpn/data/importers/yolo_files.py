"""Files of YOLO's folders: paths of labels, lists of images and of classes, ``data.yaml``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from a2fpn._registry import natural_key
from a2fpn.data.importers.files import IMAGE_SUFFIXES, read_text
from a2fpn.data.importers.folder import Folder
from a2fpn.errors import DataError

CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "labels.txt", "predefined_classes.txt")


def find_yaml(folder: Folder) -> Path | None:
    """Return the file with the class names closest to the folder's root; None if there is none."""
    found = [path for suffix in (".yaml", ".yml") for path in folder.of_type(suffix) if b"names" in folder.head(path)]
    return min(found, key=lambda path: (len(path.parts), path.name not in ("data.yaml", "dataset.yaml")), default=None)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read ``data.yaml``.

    Raises:
        DataError: If it has no keys.
    """
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise DataError(f"{path}{line}: invalid YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: expected keys such as train, val and names, got {type(data).__name__}.")
    return data


def read_class_list(path: Path) -> list[str]:
    """Read a list of classes, one per line, in the order of their numbers.

    Raises:
        DataError: If it is empty.
    """
    names = [line.strip() for line in read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{path}: no classes; expected one name per line.")
    return names


def label_file(image: str) -> str:
    """Return the label file of an image: its last folder "images" replaced by "labels", or next to it."""
    stem = os.path.splitext(image)[0]
    head, found, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    return (f"{head}{os.sep}labels{os.sep}{tail}" if found else stem) + ".txt"


def image_stem(label: str) -> str:
    """Return the path of a label file's image, without its suffix; the inverse of :func:`label_file`."""
    stem = os.path.splitext(label)[0]
    head, found, tail = stem.rpartition(f"{os.sep}labels{os.sep}")
    return f"{head}{os.sep}images{os.sep}{tail}" if found else stem


def is_list(path: str) -> bool:
    """Return whether a text file is not a label file, such as a list of images."""
    with open(path, "rb") as file:
        first = file.readline().split()
    return bool(first) and not is_number(first[0].lstrip(b"\xef\xbb\xbf"))


def below(base: str, path: str) -> Iterator[str]:
    """Yield candidates for a path below a folder, whose first parts may be from another machine."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield os.path.join(base, *parts[start:])


def images_below(folder: str) -> list[str]:
    """Return the image files of a folder and its subfolders, by name."""
    found = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if is_image(name)]
    return sorted(found, key=natural_key)


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_number(text: bytes) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
