"""Common parts of the importers: the registry, the folder, options."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from a2fpn._registry import Registry
from a2fpn.data.importers.files import IMAGE_SUFFIXES, ImageIndex, read_json, read_text
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LossLog, folder_name
from a2fpn.errors import DataError

_HEAD = 4096  # bytes of a file that tell what it is

CATEGORIES_FILE = "categories.json"
"""Beside any format: the ``categories`` of a COCO file, which keep ids, keypoints and skeletons."""

REPORT_FILE = "import_report.json"
"""Report that an import or a conversion leaves in its output."""

IDS_FILE = "image_ids.json"
"""Beside any format: the ids of images in the COCO file that it was made of, by name."""

OWN_FILES = frozenset((CATEGORIES_FILE, IDS_FILE, REPORT_FILE))


@dataclass(frozen=True)
class ImportOptions:
    """Choices of an import that formats leave open.

    Args:
        categories: The classes in their order, where the source doesn't list them or under other ids.
        unlabeled: Whether images without labels are backgrounds (``"keep"``) or not looked at yet (``"skip"``);
            ``"auto"`` keeps them for YOLO, where that is the rule, and skips them elsewhere.
        category: The class of objects in formats that hold masks and no classes; empty takes the only class that is
            listed, or "object".
    """

    categories: tuple[CategoryInfo, ...] = ()
    unlabeled: Literal["auto", "keep", "skip"] = "auto"
    category: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder as the detection of formats sees it.

    Args:
        root: The folder, or the folder of the file that was named.
        file: The file that was named, if it was one.
    """

    root: Path
    file: Path | None = None
    _heads: dict[Path, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path) -> Folder:
        """Look at a folder, or at a file of a format.

        Raises:
            DataError: If there is none.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path)
        if path.is_file():
            return cls(path.parent, path)
        raise DataError(f"{path}: no such file or folder.")

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Files below the folder, sorted by their names."""
        if self.file is not None:
            return (self.file,)
        found = (
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.root)
            for name in names
            if not name.startswith(".") and name not in OWN_FILES
        )
        return tuple(map(Path, sorted(found)))

    @cached_property
    def by_suffix(self) -> Mapping[str, tuple[Path, ...]]:
        """Files by lower-case suffix."""
        groups: dict[str, list[Path]] = {}
        for path in self.files:
            groups.setdefault(path.suffix.lower(), []).append(path)
        return {suffix: tuple(paths) for suffix, paths in groups.items()}

    def of_type(self, suffix: str) -> tuple[Path, ...]:
        """Return the files with a suffix."""
        return self.by_suffix.get(suffix, ())

    def head(self, path: Path) -> bytes:
        """Return the first 4 KB of a file; nothing if it can't be read."""
        if path not in self._heads:
            try:
                with path.open("rb") as file:
                    self._heads[path] = file.read(_HEAD)
            except OSError:
                self._heads[path] = b""
        return self._heads[path]

    def has_images(self) -> bool:
        """Return whether any image lies in the folder."""
        return any(suffix in IMAGE_SUFFIXES for suffix in self.by_suffix)


class Importer(ABC):
    """Reads one format; a new one is a subclass with ``@register_importer``.

    Args:
        folder: The data set.
        log: Where losses are noted.
        options: Choices.

    Attributes:
        categories: The classes that the source lists, in their order; complete when all is read.
        total: Images to come, for progress.
    """

    name = ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        self.folder = folder
        self.root = folder.root
        self.log = log
        self.options = options
        self.categories: list[CategoryInfo] = list(options.categories)
        self.total = 0
        path = self.root / CATEGORIES_FILE
        if not self.categories and path.is_file():
            self.categories = read_categories(path)

    @classmethod
    @abstractmethod
    def detect(cls, folder: Folder) -> str:
        """Return the sign by which a folder is of this format; empty if it isn't."""

    @abstractmethod
    def read(self) -> Iterator[LabeledImage]:
        """Yield the images one by one; what can't be used goes to the log.

        Raises:
            DataError: If the source as a whole can't be used.
        """

    @cached_property
    def images(self) -> ImageIndex:
        """The image files of the folder."""
        return ImageIndex(self.root)

    @cached_property
    def image_ids(self) -> Mapping[str, int]:
        """Ids of images by name, as a conversion left them."""
        path = self.folder.root / IDS_FILE
        data = read_json(path) if path.is_file() else {}
        if not isinstance(data, Mapping) or not all(type(value) is int for value in data.values()):
            raise DataError(f"{path}: expected an object of whole-number ids by image name; remove it to number anew.")
        return data

    def class_of(self, folder: str) -> str:
        """Return the class that a folder of masks stands for; the default for an empty name."""
        if folder:
            return next((info.name for info in self.categories if folder_name(info.name) == folder), folder)
        only = self.categories[0].name if len(self.categories) == 1 else "object"
        return self.options.category or only

    def declare(self, names: Sequence[str]) -> None:
        """Add classes that the source lists."""
        known = {category.name for category in self.categories}
        self.categories += [CategoryInfo(name) for name in dict.fromkeys(names) if name not in known]

    def keypoint_names(self, category: str) -> tuple[str, ...]:
        """Names of the keypoints of a class, if they are known."""
        return next((known.keypoints for known in self.categories if known.name == category), ())

    def declare_keypoints(self, category: str, names: Sequence[str]) -> None:
        """Say which keypoints a class has."""
        self.declare([category])
        self.categories = [
            CategoryInfo(c.name, c.id, c.supercategory, tuple(names), c.skeleton) if c.name == category else c
            for c in self.categories
        ]

    def unlabeled(self, used: set[Path], *, keep: bool = False, under: Path | None = None) -> Iterator[LabeledImage]:
        """Yield the images that no label file belongs to, or count them.

        Args:
            used: Those that have labels.
            keep: What ``"auto"`` means here.
            under: The folder that images lie in; None for the root.
        """
        rest = [path for path in self.images.files if path not in used and (under is None or under in path.parents)]
        if not rest:
            return
        if self.options.unlabeled == "skip" or (self.options.unlabeled == "auto" and not keep):
            self.log.note("images without labels, left out (--unlabeled keep takes them as backgrounds)", len(rest))
            return
        self.log.note("images without labels, kept as backgrounds", len(rest))
        for path in rest:
            size = self.images.size(path, self.log)
            if size is not None:
                name, split = self.images.name_and_split(path)
                yield LabeledImage(path, name, *size, split=split, source=str(path))


IMPORTERS: Registry[type[Importer]] = Registry("data format")


def register_importer(name: str) -> Callable[[type[Importer]], type[Importer]]:
    """Return a decorator that registers an :class:`Importer` under the name of its format."""

    def decorator(cls: type[Importer]) -> type[Importer]:
        cls.name = name
        return IMPORTERS.register(name)(cls)

    return decorator


def detect(path: str | Path) -> str:
    """Return the format of a data set.

    Args:
        path: Its folder, or a file of it such as ``data.yaml``.

    Raises:
        DataError: If it is none of the known ones, or could be several.
    """
    folder = Folder.of(path)
    signs = {name: sign for name in IMPORTERS if (sign := IMPORTERS[name].detect(folder))}
    if len(signs) > 1:
        raise DataError(
            f"{path} could be {' or '.join(f'{n} ({s})' for n, s in signs.items())}; say which with --from."
        )
    if not signs:
        seen = ", ".join(f"{len(paths)} {suffix or 'without suffix'}" for suffix, paths in folder.by_suffix.items())
        raise DataError(
            f"{path}: no known format; expected one of {', '.join(IMPORTERS)}, found {seen or 'no file'}. "
            "Name it with --from."
        )
    return next(iter(signs))


def read_categories(path: str | Path) -> list[CategoryInfo]:
    """Read classes from a ``categories.json``, a COCO file, or a text file with one name a line.

    Raises:
        DataError: If it is none of them.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        names = [line.strip() for line in read_text(path).splitlines()]
        names = [name for name in names if name and name not in ("__ignore__", "_background_")]
        if not names:
            raise DataError(f"{path}: no class; expected one name a line.")
        return [CategoryInfo(name) for name in names]
    data = read_json(path)
    entries = data.get("categories") if isinstance(data, Mapping) else data
    try:
        return [CategoryInfo.from_coco(raw) for raw in entries or ()]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: no list of categories; each needs a whole-number id and a name.") from None
