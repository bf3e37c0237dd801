"""Files of YOLO's folders: paths of labels, lists of images and of classes, ``data.yaml``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from a2fpn._registry import natural_key
from a2fpn.data.images import is_image
from a2fpn.data.importers.files import read_text, walk
from a2fpn.data.importers.folder import Folder
from a2fpn.data.labeled import split_name
from a2fpn.errors import DataError
from a2fpn.masks.rle import shorten

CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "labels.txt", "predefined_classes.txt")
_CLASS_NUMBER = re.compile("[0-9]{1,5}")


def find_yaml(folder: Folder) -> Path | None:
    """Return the file with the class names closest to the folder's root; None if there is none."""
    found = [path for suffix in (".yaml", ".yml") for path in folder.of_type(suffix) if b"names" in folder.head(path)]
    return min(found, key=lambda path: (len(path.parts), path.name not in ("data.yaml", "dataset.yaml")), default=None)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read ``data.yaml``, with all scalars as text: the class ``no`` is not false, and ``01`` is not 1.

    Raises:
        DataError: If it has no keys.
    """
    text = read_text(path)
    try:
        data = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ArithmeticError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise DataError(f"{path}{line}: invalid YAML ({problem}).") from None
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: expected keys such as train, val and names, got {type(data).__name__}.")
    return {key: value for key, value in data.items() if value not in ("", "~", "null", "Null", "NULL")}


def by_class(entries: object, path: Path, what: str) -> dict[int, Any]:
    """Return the entries of a list or a mapping of ``data.yaml`` by their class numbers.

    Raises:
        DataError: If a key is not a class number.
    """
    if isinstance(entries, list):
        return dict(enumerate(entries))
    if not isinstance(entries, Mapping) or (bad := [key for key in entries if not is_class_number(key)]):
        got = f"{bad[0]!r:.60}" if isinstance(entries, Mapping) else type(entries).__name__
        raise DataError(f"{path}: {what} needs class numbers from 0 to 99999 as keys, got {got}.")
    return {int(key): value for key, value in entries.items()}


def check_text(values: Iterable[object], path: Path, what: str) -> None:
    """Check that values of ``data.yaml`` are text.

    Raises:
        DataError: If one is a list, a mapping, or half of a surrogate pair.
    """
    for value in values:
        if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
            shown = shorten(value) if isinstance(value, str) else f"a {type(value).__name__}"
            raise DataError(f"{path}: {what} must be text, got {shown}.")


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


class LabelFiles:
    """Finds the label files of images, whose folders it lists once.

    Attributes:
        folders: Label files by path without suffix, by folder.
    """

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, str]] = {}

    def find(self, image: str) -> str:
        """Return the label file of an image: at :func:`label_stem`, or next to it; empty if there is none."""
        return self._at(label_stem(image)) or self._at(os.path.splitext(image)[0])

    def _at(self, stem: str) -> str:
        folder = os.path.dirname(stem)
        if folder not in self.folders:
            # Sorted, so that of a.TXT and a.txt the latter counts.
            names = sorted(os.listdir(folder or os.curdir)) if os.path.isdir(folder or os.curdir) else []
            paths = [os.path.join(folder, name) for name in names if is_text_file(name)]
            self.folders[folder] = {os.path.splitext(path)[0]: path for path in paths}
        return self.folders[folder].get(stem, "")


def label_stem(image: str) -> str:
    """Return an image's path without suffix, its last folder "images" replaced by "labels"."""
    return _moved(image, "images", "labels")


def image_stem(label: str) -> str:
    """Return a label file's path without suffix, its last folder "labels" replaced by "images"."""
    return _moved(label, "labels", "images")


def labels_above(folder: str) -> str:
    """Return the last folder "labels" of a path."""
    head, found, _ = f"{os.sep}{folder}{os.sep}".rpartition(f"{os.sep}labels{os.sep}")
    return f"{head}{found}"[1:-1] if found else folder


def _moved(path: str, old: str, new: str) -> str:
    """Return a path without its suffix and with its last folder of one name replaced by another."""
    # A relative path may begin with the folder.
    head, found, tail = f"{os.sep}{os.path.splitext(path)[0]}".rpartition(f"{os.sep}{old}{os.sep}")
    return (f"{head}{os.sep}{new}{os.sep}{tail}" if found else tail)[1:]


def is_text_file(name: str) -> bool:
    """Return whether a file has the suffix of label files."""
    return name[-4:].lower() == ".txt"


def is_list(path: str) -> bool:
    """Return whether a text file is not a label file, such as a list of images."""
    try:
        with open(path, "rb") as file:
            first = file.readline().split()
    except OSError:  # such as a broken link
        return False
    return bool(first) and not is_number(first[0].lstrip(b"\xef\xbb\xbf"))


def below(base: str, path: str) -> Iterator[str]:
    """Yield candidates for a path below a folder, whose first parts may be from another machine."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield os.path.join(base, *parts[start:])


def images_below(folder: str) -> list[str]:
    """Return the image files of a folder and its subfolders, by name."""
    found = [os.path.join(where, name) for where, _, names in walk(folder) for name in names if is_image(name)]
    return sorted(found, key=natural_key)


def darknet_lists(root: Path) -> dict[str, str]:
    """Return the lists of images of a Darknet folder by split: those of ``obj.data``, or ``train.txt`` and so on."""
    found: dict[str, str] = {}
    for path in sorted(root.glob("*.data")):
        for line in read_text(path).splitlines():
            key, _, value = line.partition("=")
            files = [file for file in below(str(root), value.strip().replace("\\", "/")) if os.path.isfile(file)]
            if split_name(key.strip()) and files:
                found.setdefault(split_name(key.strip()), files[0])
    for path in sorted(root.glob("*.txt")):
        if split_name(path.stem) and is_list(str(path)):
            found.setdefault(split_name(path.stem), str(path))
    return found


def is_class_number(text: str) -> bool:
    """Return whether a text is the number of a class; its limit keeps a typing error from filling the memory."""
    return _CLASS_NUMBER.fullmatch(text) is not None


def is_number(text: bytes) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
