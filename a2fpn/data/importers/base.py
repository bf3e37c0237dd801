"""Common parts of the importers: the registry, the folder, options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from a2fpn._registry import Registry
from a2fpn.data.importers.files import ImageIndex, read_json, read_text
from a2fpn.data.importers.folder import CATEGORIES_FILE, IDS_FILE, Folder
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LossLog, folder_name
from a2fpn.errors import DataError


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

    def claim(
        self,
        file: Path | None,
        used: set[Path],
        path: Path,
        *,
        named: str,
        place: str = "",
        own_file: bool = False,
        remark: str = "",
    ) -> tuple[int, int] | None:
        """Take an image for the labels of a file, once; why it can't be taken goes to the log.

        Args:
            file: The image; None if it was not found.
            used: The images that were taken; it is added.
            path: The file with its labels.
            named: How that names it.
            place: Where.
            own_file: Whether every image has a label file of its own.
            remark: Added where it was not found.

        Returns:
            Height and width; None if it can't be taken.
        """
        if file is None:
            self.log.add("missing-image", path, f"its image {named!r} is not there{remark}; left out", place=place)
            return None
        if file in used and own_file:
            self.log.add("duplicate-stem", path, f"its image {file.name} has another label file too; left out")
            return None
        if file in used:
            self.log.add("duplicate-image", path, f"{file.name} is listed twice; the first is kept", place=place)
            return None
        size = self.images.size(file, self.log)
        if size is not None:
            used.add(file)
        return size

    def agreed_size(
        self, said: tuple[Any, Any], size: tuple[int, int], path: Path, *, name: str, place: str = ""
    ) -> tuple[int, int] | None:
        """Compare the size that labels state with the image's.

        Args:
            said: Height and width; anything else than whole numbers above 0 states nothing.
            size: The image's, as shown.
            path: The file with the labels.
            name: The image's.
            place: Where.

        Returns:
            The size on which the labels were drawn: the image's, or that of its stored pixels where a tag turns them;
            None, and a line in the log, if it is neither.
        """
        if said == size or not all(isinstance(side, int) and side > 0 for side in said):
            return size
        if said == size[::-1]:
            return size[::-1]
        detail = f"it says {said[1]} x {said[0]} pixels, {name} has {size[1]} x {size[0]}; left out"
        self.log.add("size-mismatch", path, detail, place=place)
        return None

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


class JsonImporter(Importer):
    """Reads JSON files of which each holds the labels of many images.

    Attributes:
        sign: What such a file holds, for messages.
        paths: The files.
    """

    sign = ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = [folder.file] if folder.file else [p for p in folder.of_type(".json") if self.owns(folder, p)]
        if folder.file is not None and folder.root.name == "annotations":
            self.root = folder.root.parent
        self.total = len(self.images.files)

    @classmethod
    @abstractmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """Return whether a file of the folder is of this format."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        path = next((path for path in folder.of_type(".json") if cls.owns(folder, path)), None)
        return "" if path is None else f"{path.name} with {cls.sign}"


IMPORTERS: Registry[type[Importer]] = Registry("data format")


def register_importer(name: str) -> Callable[[type[Importer]], type[Importer]]:
    """Return a decorator that registers an :class:`Importer` under the name of its format."""

    def decorator(cls: type[Importer]) -> type[Importer]:
        cls.name = name
        return IMPORTERS.register(name)(cls)

    return decorator


def detect(path: str | Path | Folder) -> str:
    """Return the format of a data set.

    Args:
        path: Its folder, or a file of it such as ``data.yaml``.

    Raises:
        DataError: If it is none of the known ones, or could be several.
    """
    folder = path if isinstance(path, Folder) else Folder.of(path)
    path = folder.file or folder.root
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
