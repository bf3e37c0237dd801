"""Lenient parsing of a COCO file: valid images and categories, and the faults of the others.

The reader refuses a file with such faults, the checker reports them all; both use this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from a2fpn.config import Category
from a2fpn.data.text_files import UnreadableTextError, read_json
from a2fpn.errors import DataError

Source = str | Path | Mapping[str, Any]
LISTS = ("images", "annotations", "categories")
_LARGEST_SIDE = 10**6  # pixels


class NotCocoError(DataError):
    """Input that is not a COCO file.

    Args:
        message: The error.
        what: Predicate that follows the file's name in a message.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


@dataclass(frozen=True)
class CocoImage:
    """One entry of ``images``.

    Args:
        id: The image's id.
        file_name: Path relative to the image folder.
        height: Pixels.
        width: Pixels.
    """

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class EntryFaults:
    """Faults of the entries of one list.

    Args:
        kind: ``"image"`` or ``"category"``.
        bad: Positions of invalid entries.
        repeated: Ids shared by several entries.
        count: Number of entries.
        first: Entry that the first message is about.
    """

    kind: Literal["image", "category"]
    bad: tuple[int, ...]
    repeated: tuple[int, ...]
    count: int
    first: object = None

    def message(self) -> str:
        """Message of the first fault; empty if there is none."""
        if self.bad:
            return f"{_NEEDED[self.kind]}, got {self.first}"
        return f"{self.kind} {self.repeated[0]} is listed twice; ids must be unique" if self.repeated else ""


_NEEDED = {
    "image": "an image needs a whole-number id, file_name, height and width (pixels, > 0)",
    "category": "a category needs a whole-number id and a name",
}


@dataclass(frozen=True, eq=False)
class CocoDocument:
    """A COCO file.

    Args:
        name: For messages.
        images: Valid entries, in the file's order.
        index: Position in ``images`` by id, the first of each id.
        categories: Valid entries by id, sorted by id; the first of each id.
        entries: The annotations, unchanged.
        num_keypoints: Keypoints of every object; 0 if no annotation has any.
        keypoint_names: Their names, if the categories have them.
        info: As in the file; empty if it is not a JSON object.
        licenses: As in the file, those that are JSON objects.
        faults: Faults of images and of categories.
        content: The whole content, as in the file.
    """

    name: str
    images: Sequence[CocoImage]
    index: Mapping[int, int]
    categories: Mapping[int, Category]
    entries: Sequence[Any]
    num_keypoints: int
    keypoint_names: tuple[str, ...]
    info: Mapping[str, Any]
    licenses: Sequence[Mapping[str, Any]]
    faults: tuple[EntryFaults, EntryFaults]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, source: Source) -> CocoDocument:
        """Parse a file or its content.

        Raises:
            DataError: If there is no such file.
            NotCocoError: If it is not a COCO file.
        """
        name = source_name(source)
        data: Any = source
        if not isinstance(source, Mapping):
            try:
                data = read_json(Path(source))
            except UnreadableTextError as error:
                detail = str(error).removeprefix(name).lstrip(",: ").rstrip(".")
                raise NotCocoError(str(error), f"is not valid JSON ({detail})") from error
        what = ""
        if not isinstance(data, Mapping):
            what = f"holds a {type(data).__name__}, not an object"
        elif lacking := [key for key in LISTS if not isinstance(data.get(key), list)]:
            what = f"has no list {', '.join(lacking)}"
        if what:
            expected = "not a COCO file; expected an object with the lists images, annotations and categories"
            raise NotCocoError(f"{name}: {expected}, but it {what}.", what)
        images, image_faults = _entries("image", data["images"], _parse_image)
        classes, category_faults = _entries("category", data["categories"], _parse_category)
        num_keypoints, names = _keypoints(data["categories"], data["annotations"])
        info, licenses = data.get("info"), data.get("licenses")
        by_id = {category.id: category for category in reversed(classes)}
        return cls(
            name,
            images,
            {entry.id: position for position, entry in reversed([*enumerate(images)])},
            dict(sorted(by_id.items())),
            data["annotations"],
            num_keypoints,
            names,
            info if isinstance(info, Mapping) else {},
            [entry for entry in licenses if isinstance(entry, Mapping)] if isinstance(licenses, list) else [],
            (image_faults, category_faults),
            data,
        )


def source_name(source: Source) -> str:
    """Name of a COCO file in messages."""
    return "the given mapping" if isinstance(source, Mapping) else str(source)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a valid id or size: a 64-bit integer that is not a bool."""
    return (type(value) is int and -(2**63) <= value < 2**63) or isinstance(value, np.integer)


def _entries(kind: Any, raws: Sequence[Any], parse: Any) -> tuple[list[Any], EntryFaults]:
    parsed = [parse(raw) for raw in raws]
    bad = tuple(position for position, entry in enumerate(parsed) if entry is None)
    usable = [entry for entry in parsed if entry is not None]
    uses = Counter(entry.id for entry in usable)
    repeated = tuple(entry_id for entry_id, count in uses.items() if count > 1)
    return usable, EntryFaults(kind, bad, repeated, len(raws), raws[bad[0]] if bad else None)


def _parse_image(raw: Any) -> CocoImage | None:
    match raw:
        case {"id": image_id, "file_name": str(file_name), "height": height, "width": width}:
            if is_whole(image_id) and all(is_whole(side) and 0 < side <= _LARGEST_SIDE for side in (height, width)):
                return CocoImage(int(image_id), file_name, int(height), int(width))
    return None


def _parse_category(raw: Any) -> Category | None:
    match raw:
        case {"id": category_id, "name": str(name)} if is_whole(category_id):
            return Category(int(category_id), name)
    return None


def _keypoints(categories: Iterable[Any], annotations: Iterable[Any]) -> tuple[int, tuple[str, ...]]:
    """Return the most frequent number of keypoints among the annotations, and their names.

    If categories name keypoints, only their numbers are candidates.
    """
    names_of = {
        raw["id"]: tuple(map(str, raw["keypoints"]))
        for raw in categories
        if isinstance(raw, Mapping) and is_whole(raw.get("id")) and isinstance(raw.get("keypoints"), list)
    }
    numbers: Counter[int] = Counter()
    names: Counter[tuple[str, ...]] = Counter(filter(None, names_of.values()))
    for raw in annotations:
        if isinstance(raw, Mapping) and isinstance(raw.get("keypoints"), list) and raw["keypoints"]:
            numbers[len(raw["keypoints"]) // 3] += 1
            category_id = raw.get("category_id")
            names[names_of.get(category_id, ()) if is_whole(category_id) else ()] += len(names_of)
    if not numbers:
        return 0, ()
    named = [kind for kind in names if kind]
    number = max({len(kind) for kind in named} or numbers, key=lambda count: (numbers[count], count))
    fitting = [kind for kind in named if len(kind) == number]
    return number, max(fitting, key=lambda kind: (names[kind], kind), default=())
