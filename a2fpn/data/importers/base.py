"""Common parts of the importers: registry, folder and options."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from a2fpn._registry import Registry
from a2fpn.data.annotation_table import crowd_flag
from a2fpn.data.importers.files import ImageIndex, common_folders, name_and_split, read_json, read_text
from a2fpn.data.importers.folder import CATEGORIES_FILE, IDS_FILE, Folder
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LossLog, folder_name
from a2fpn.errors import DataError

UNREAD = "images of which no label could be read, skipped: they are no backgrounds"
"""Note on images that lost all their labels."""
FAULTS = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""Errors of reading a record whose values have other types than expected; see :meth:`Importer.skip`."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import that formats leave open.

    Args:
        categories: The classes in their order, if the source doesn't list them or has other ids.
        unlabeled: Whether images without labels are backgrounds (``"keep"``) or not annotated yet (``"skip"``);
            ``"auto"`` keeps them for YOLO, whose convention it is, and skips them for other formats.
        category: The class of objects in formats with masks but no classes; empty for the only listed class, or
            "object".
    """

    categories: tuple[CategoryInfo, ...] = ()
    unlabeled: Literal["auto", "keep", "skip"] = "auto"
    category: str = ""


class Importer(ABC):
    """Base of the importers; a new format is a subclass with ``@register_importer``.

    Args:
        folder: The data set.
        log: Log of losses.
        options: The options.

    Attributes:
        categories: The classes listed by the source, in their order; complete when everything is read.
        paths: The files with labels, if the format has some.
        total: Number of images to read, for progress.
    """

    name = ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        self.folder = folder
        self.root = folder.root
        self.log = log
        self.options = options
        self.categories: list[CategoryInfo] = list(options.categories)
        self.paths: list[Path] = []
        self.total = 0
        self._begun = 0
        path = self.root / CATEGORIES_FILE
        if not self.categories and path.is_file():
            self.categories = read_categories(path)

    @classmethod
    @abstractmethod
    def detect(cls, folder: Folder) -> str:
        """Return the evidence that a folder has this format; empty if it doesn't."""

    @abstractmethod
    def read(self) -> Iterator[LabeledImage]:
        """Yield the images; losses are logged.

        Raises:
            DataError: If the whole source is invalid.
        """

    def begin_image(self, lost: int = 0) -> None:
        """Count the losses from here on as those of the next image.

        Args:
            lost: Number of its losses before.
        """
        self._begun = self.log.total - lost

    def read_labeled(self) -> Iterator[LabeledImage]:
        """Yield the images of :meth:`read` without those that lost all their labels, as these are no backgrounds."""
        for image in self.read():
            lost = self.log.total - self._begun
            if lost and not image.objects:
                self.log.note(UNREAD)
            else:
                yield image
            self.begin_image()  # for importers that don't say where an image begins

    @cached_property
    def images(self) -> ImageIndex:
        """Image files of the folder."""
        return ImageIndex(self.root)

    @cached_property
    def image_ids(self) -> Mapping[str, int]:
        """Ids of images by name, as stored by a conversion."""
        path = self.folder.root / IDS_FILE
        data = read_json(path) if path.is_file() else {}
        if not isinstance(data, Mapping) or not all(type(value) is int for value in data.values()):
            raise DataError(f"{path}: expected an object of integer ids by image name; delete it to assign new ids.")
        # Importers drop the folders of a name that stand for all images or a split.
        return {name_and_split(name)[0]: image_id for name, image_id in data.items()} | dict(data)

    def skip(self, kind: str, path: Path, error: Exception, place: str = "") -> None:
        """Log a record that can't be read.

        Args:
            kind: Kind of the loss.
            path: The file.
            error: One of :data:`FAULTS`; a :class:`DataError` is raised again, as it concerns more than the record.
            place: Position in the file.
        """
        if isinstance(error, DataError):
            raise error
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"it lacks {error.args[0]}"
        elif not isinstance(error, ValueError):
            reason = f"a value of the wrong type or size ({error})"
        self.log.add(kind, path, f"{reason}; skipped", place=place)

    def flag(self, value: object, name: str = "iscrowd") -> bool:
        """Parse a flag in any spelling; one that is neither yes nor no is noted, and means no."""
        if value is None:
            return False
        parsed = crowd_flag(value)
        if parsed is None:
            self.log.note(f"values of {name} that are neither yes nor no, used as no")
        return bool(parsed)

    def label(self, text: str) -> str:
        """Return a label without spaces around it, unless the source lists a class with them."""
        bare = text.strip()
        return text if bare != text and any(info.name == text for info in self.categories) else bare

    def class_of(self, folder: str) -> str:
        """Return the class of a folder of masks; the default for an empty name."""
        if folder:
            return next((info.name for info in self.categories if folder_name(info.name) == folder), folder)
        only = self.categories[0].name if len(self.categories) == 1 else "object"
        return self.options.category or only

    def declare(self, names: Sequence[str]) -> None:
        """Add classes listed by the source."""
        known = {category.name for category in self.categories}
        self.categories += [CategoryInfo(name) for name in dict.fromkeys(names) if name not in known]

    def keypoint_names(self, category: str) -> tuple[str, ...]:
        """Names of the keypoints of a class, if known."""
        return next((known.keypoints for known in self.categories if known.name == category), ())

    def declare_keypoints(self, category: str, names: Sequence[str]) -> None:
        """Set the keypoints of a class."""
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
    ) -> tuple[int, int] | None:
        """Assign an image to the labels of a file, only once; failures are logged.

        Args:
            file: The image; None if it was not found.
            used: The images already assigned, to which it is added.
            path: The file with its labels.
            named: The image's name in that file.
            place: Position in that file.
            own_file: Whether every image has its own label file.

        Returns:
            Height and width; None on failure.
        """
        if file is None or (own_file and self._has_other_labels(file, path)):
            self.log.add("missing-image", path, f"image {named!r} {self.images.reason(named)}; skipped", place=place)
            return None
        if file in used and own_file:
            self.log.add("duplicate-stem", path, f"image {file.name} has another label file; skipped")
            return None
        if file in used:
            self.log.add("duplicate-image", path, f"{file.name} is listed twice; the first is kept", place=place)
            return None
        size = self.images.size(file, self.log)
        if size is not None:
            used.add(file)
        self.begin_image()
        return size

    def _has_other_labels(self, file: Path, path: Path) -> bool:
        """Return whether a label file of an image's name is nearer to it than another one."""
        rivals = self._by_stem.get(file.stem.lower(), ())
        return any(common_folders(other, file) > common_folders(path, file) for other in rivals)

    @cached_property
    def _by_stem(self) -> Mapping[str, Sequence[Path]]:
        """Label files by stem, lower case."""
        found: dict[str, list[Path]] = {}
        for path in self.paths:
            found.setdefault(path.stem.lower(), []).append(path)
        return found

    def agreed_size(
        self, said: tuple[Any, Any], size: tuple[int, int], path: Path, *, name: str, place: str = ""
    ) -> tuple[int, int] | None:
        """Compare the size stated by labels with the image's.

        Args:
            said: Height and width; ignored unless they are positive integers.
            size: Size of the image, as displayed.
            path: The file with the labels.
            name: Name of the image.
            place: Position in the file.

        Returns:
            The size to which the labels refer: the image's, or that of its stored pixels if an EXIF tag rotates them;
            None, with a logged loss, if it is neither.
        """
        if said == size or not all(isinstance(side, int) and side > 0 for side in said):
            return size
        if said == size[::-1]:
            return size[::-1]
        detail = f"it gives {said[1]} x {said[0]} pixels, {name} has {size[1]} x {size[0]}; skipped"
        self.log.add("size-mismatch", path, detail, place=place)
        return None

    def unlabeled(self, used: set[Path], *, keep: bool = False, under: Path | None = None) -> Iterator[LabeledImage]:
        """Yield images without labels, or count them.

        Args:
            used: Images with labels.
            keep: Meaning of ``"auto"`` for this format.
            under: Folder of the images; None for the root.
        """
        rest = [path for path in self.images.files if path not in used and (under is None or under in path.parents)]
        if not rest:
            return
        if self.options.unlabeled == "skip" or (self.options.unlabeled == "auto" and not keep):
            self.log.note("images without labels, skipped (--unlabeled keep uses them as background)", len(rest))
            return
        self.log.note("images without labels, kept as background", len(rest))
        for path in rest:
            size = self.images.size(path, self.log)
            if size is not None:
                self.begin_image()
                name, split = self.images.name_and_split(path)
                yield LabeledImage(path, name, *size, split=split, source=str(path))


class JsonImporter(Importer):
    """Base of importers of JSON files with the labels of many images.

    Attributes:
        sign: Content of such a file, for messages.
        paths: The files.
    """

    sign = ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = [folder.file] if folder.file else [p for p in folder.of_type(".json") if self.owns(folder, p)]
        if folder.file is not None and folder.root.name == "annotations":
            self.root = folder.root.parent
        self.total = len(self.images.files)

    def each(
        self, read: Callable[..., LabeledImage | None], path: Path, name: str, records: Sequence[Any], *context: Any
    ) -> Iterator[LabeledImage]:
        """Yield the image of each record of a file; malformed records are logged.

        Args:
            read: Called with the file, the record, its place and the context.
            path: The file.
            name: Name of the list of records, for messages.
            records: The records.
            *context: Further arguments.
        """
        for number, record in enumerate(records):
            place = f"{name}[{number}]"
            try:
                image = read(path, record, place, *context)
            except FAULTS as error:
                self.skip("bad-item", path, error, place)
                continue
            if image is not None:
                yield image

    @classmethod
    @abstractmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """Return whether a file of the folder has this format."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        path = next((path for path in folder.of_type(".json") if cls.owns(folder, path)), None)
        return "" if path is None else f"{path.name} with {cls.sign}"


def number_of(text: str | None, key: str) -> float:
    """Parse a finite number.

    Raises:
        ValueError: If it is none.
    """
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{key} is {text!r}, expected a number")
    return value


def list_of(value: object, key: str) -> Sequence[Any]:
    """Return a list of a JSON file; empty if it is missing or null.

    Raises:
        ValueError: If it is something else.
    """
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{key} is {str(value)[:40]!r}, expected a list")
    return value or ()


def group_of(value: object) -> Hashable:
    """Return the key of a group of shapes, a number or text; None for no group.

    Raises:
        ValueError: If it is a list or an object.
    """
    if not isinstance(value, Hashable):
        raise ValueError(f"its group is {str(value)[:40]}, expected a number or text")
    return value


IMPORTERS: Registry[type[Importer]] = Registry("data format")


def register_importer(name: str) -> Callable[[type[Importer]], type[Importer]]:
    """Return a decorator that registers an :class:`Importer` under the name of its format."""

    def decorator(cls: type[Importer]) -> type[Importer]:
        cls.name = name
        return IMPORTERS.register(name)(cls)

    return decorator


def detect(path: str | Path | Folder) -> str:
    """Detect the format of a data set.

    Args:
        path: Its folder, or a file of it such as ``data.yaml``.

    Raises:
        DataError: If it is unknown or ambiguous.
    """
    folder = path if isinstance(path, Folder) else Folder.of(path)
    path = folder.file or folder.root
    if set(folder.by_suffix) == {".zip"}:
        raise DataError(f"{path}: an archive; unpack it and import the folder.")
    signs = {name: sign for name in IMPORTERS if (sign := IMPORTERS[name].detect(folder))}
    if len(signs) > 1:
        raise DataError(
            f"{path} matches several formats: {' or '.join(f'{n} ({s})' for n, s in signs.items())}; choose one with "
            "--from."
        )
    if not signs:
        seen = ", ".join(f"{len(paths)} {suffix or 'without suffix'}" for suffix, paths in folder.by_suffix.items())
        raise DataError(
            f"{path}: unknown format; expected one of {', '.join(IMPORTERS)}, found {seen or 'no file'}. "
            "Set it with --from."
        )
    return next(iter(signs))


def read_categories(path: str | Path) -> list[CategoryInfo]:
    """Read classes from a ``categories.json``, a COCO file, or a text file with one name per line.

    Raises:
        DataError: If it is none of them.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        names = [line.strip() for line in read_text(path).splitlines()]
        names = [name for name in names if name and name not in ("__ignore__", "_background_")]
        if not names:
            raise DataError(f"{path}: no classes; expected one name per line.")
        return [CategoryInfo(name) for name in names]
    data = read_json(path)
    entries = data.get("categories") if isinstance(data, Mapping) else data
    try:
        return [CategoryInfo.from_coco(raw) for raw in entries or ()]
    except FAULTS:
        needs = "an integer id, a name and a skeleton of pairs"
        raise DataError(f"{path}: no list of categories; each needs {needs}.") from None
