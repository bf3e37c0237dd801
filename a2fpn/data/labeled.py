"""Format-independent labeled images: the output of importers and input of exporters.

COCO is one format among others; every conversion goes through :class:`LabeledImage`.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2fpn.data.document import is_whole
from a2fpn.errors import DataError
from a2fpn.masks.rle import Rle

Segmentation = list[list[float]] | Rle
Box = tuple[float, float, float, float]

_REMEMBERED = 10_000  # losses that are kept in detail; all are counted
_SHOWN = 3  # examples of a kind in the summary
_LONGEST_FOLDER = 200  # bytes; file systems permit 255
_YEAR = re.compile(r"[_-]?(19|20)\d\d\Z")
_NO_FOLDER = re.compile(r'^\.*\Z|[%/\\:*?"<>|\x00-\x1f]')


@dataclass(frozen=True)
class CategoryInfo:
    """A class with its metadata.

    Args:
        name: Its name.
        id: Its id in a COCO file; None to assign one.
        supercategory: As in a COCO file.
        keypoints: Names of its keypoints, in their order.
        skeleton: Pairs of keypoints, counted from 1, joined by an edge.

    Example:
        >>> CategoryInfo("nucleus", 7).to_coco(7)
        {'id': 7, 'name': 'nucleus'}
    """

    name: str
    id: int | None = None
    supercategory: str = ""
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_coco(cls, raw: Mapping[str, Any]) -> CategoryInfo:
        """Read an entry of ``categories``.

        Raises:
            TypeError, ValueError, KeyError, OverflowError: If it is invalid.
        """
        skeleton = tuple((int(a), int(b)) for a, b in raw.get("skeleton") or ())
        if not all(is_whole(end) for edge in skeleton for end in edge):
            raise ValueError("its skeleton has a number too large for a keypoint")
        return cls(
            str(raw["name"]),
            int(raw["id"]),
            str(raw.get("supercategory") or ""),
            tuple(map(str, raw.get("keypoints") or ())),
            skeleton,
        )

    def to_coco(self, category_id: int) -> dict[str, Any]:
        """Return an entry of ``categories``."""
        entry: dict[str, Any] = {"id": category_id, "name": self.name}
        if self.supercategory:
            entry["supercategory"] = self.supercategory
        if self.keypoints:
            entry |= {"keypoints": list(self.keypoints), "skeleton": [list(pair) for pair in self.skeleton]}
        return entry


@dataclass(frozen=True, slots=True)
class LabeledObject:
    """One object of an image; it has a box, a mask, or both.

    Args:
        category: The name of its class.
        bbox: x, y, width, height in pixels; None for the mask's.
        segmentation: Polygons ``[[x, y, x, y, ...], ...]`` in pixels, whose union is the object, or an RLE of the
            image's size; None for an object with a box only. Holes require an RLE.
        iscrowd: Whether it marks a group.
        keypoints: x, y in pixels and visibility (0: not labeled, 1: hidden, 2: visible) of each; empty for none.
        score: Score of a prediction.
        line: Its line in the file, for messages.
    """

    category: str
    bbox: Box | None = None
    segmentation: Segmentation | None = None
    iscrowd: bool = False
    keypoints: tuple[float, ...] = ()
    score: float | None = None
    line: str = ""


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """An image file with its objects.

    Args:
        path: The file; None if it is embedded in the labels, or only its name is known.
        name: Its name in a data set: a relative path with forward slashes.
        height: Pixels.
        width: Pixels.
        objects: In the order of the source.
        split: ``"train"``, ``"val"``, ``"test"`` or another name; empty if the source has no splits.
        source: The file with its labels, for messages.
        id: Its id in a COCO file; None to assign one.
        content: The file's content if it is embedded in the labels.
    """

    path: Path | None
    name: str
    height: int
    width: int
    objects: Sequence[LabeledObject] = ()
    split: str = ""
    source: str = ""
    id: int | None = None
    content: bytes | None = None

    @property
    def file(self) -> Path | bytes | None:
        """The file or its content; None if only its name is known."""
        return self.content if self.path is None else self.path


@dataclass(frozen=True)
class Loss:
    """Something of a source that was lost in conversion.

    Args:
        kind: A stable name, such as ``"unknown-class"``.
        file: The file.
        place: The position in it, such as ``"line 3"``; may be empty.
        detail: The loss and its reason.
    """

    kind: str
    file: str
    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}{', ' if self.place else ''}{self.place}: {self.detail}"


class LossLog:
    """Collects losses; all are counted, the first 10,000 kept in detail.

    Args:
        strict: Whether the first loss is an error.

    Example:
        >>> log = LossLog()
        >>> log.add("unknown-class", "a.txt", "class 7 of 2", place="line 3")
        >>> print(log.summary())
        1 unknown-class: a.txt, line 3: class 7 of 2
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.losses: list[Loss] = []
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.files: dict[str, Counter[str]] = {}

    @property
    def total(self) -> int:
        """Number of losses of all kinds."""
        return sum(self.counts.values())

    def add(self, kind: str, file: str | Path, detail: str, *, place: str = "") -> None:
        """Record a loss.

        Raises:
            DataError: If ``strict``.
        """
        # Names of files may have bytes that are not UTF-8; they could not be printed.
        file, detail = (text.encode(errors="backslashreplace").decode() for text in (str(file), detail))
        loss = Loss(kind, file, place, detail)
        if self.strict:
            raise DataError(str(loss))
        self.counts[kind] += 1
        self.files.setdefault(file, Counter())[kind] += 1
        if len(self.losses) < _REMEMBERED:
            self.losses.append(loss)

    def add_error(self, kind: str, file: Path, error: Exception) -> None:
        """Record an error from reading a file, which names the file and perhaps a line."""
        text = str(error).removeprefix(str(file)).lstrip(",: ")
        place, colon, detail = text.partition(": ")
        if colon and place.startswith("line "):
            self.add(kind, file, detail, place=place)
        else:
            self.add(kind, file, text)

    def note(self, what: str, count: int = 1) -> None:
        """Count something noteworthy that is not a loss."""
        self.notes[what] += count

    def summary(self) -> str:
        """Return one line for each kind of loss, with its first examples."""
        lines = []
        for kind, count in self.counts.most_common():
            examples = list(itertools.islice((str(loss) for loss in self.losses if loss.kind == kind), _SHOWN))
            more = f"; and {count - len(examples):,} more" if count > len(examples) else ""
            lines.append(f"{count:,} {kind}: {'; '.join(examples)}{more}")
        return "\n".join(lines)


def split_name(name: str) -> str:
    """Return the canonical name of a split, or an empty text for any other name.

    Example:
        >>> split_name("valid"), split_name("train2017"), split_name("test1")
        ('val', 'train', '')
    """
    lowered = _YEAR.sub("", name.lower())
    return {
        "train": "train",
        "training": "train",
        "val": "val",
        "valid": "val",
        "validation": "val",
        "dev": "val",
        "test": "test",
        "testing": "test",
    }.get(lowered, "")


def split_in(name: str) -> str:
    """Return the split named by the words of a file's name; empty for none, and for several.

    Example:
        >>> split_in("instances_val2017"), split_in("livecell_coco_train"), split_in("train_val")
        ('val', 'train', '')
    """
    found = {split_name(word) for word in re.findall(r"[^\W\d_]+", name)} - {""}
    return found.pop() if len(found) == 1 else ""


def folder_name(category: str) -> str:
    """Return a class as the name of a folder, different for each class; long names end in a digest.

    Example:
        >>> folder_name("stop sign"), folder_name("a/b"), folder_name("..")
        ('stop sign', 'a%2Fb', '%2E%2E')
    """
    name = _NO_FOLDER.sub(lambda found: "".join(f"%{ord(c):02X}" for c in found[0]) or "%", category)
    if len(name.encode()) <= _LONGEST_FOLDER:
        return name
    start = name.encode()[: _LONGEST_FOLDER - 17].decode(errors="ignore")
    return f"{start}%{hashlib.sha256(category.encode()).hexdigest()[:16]}"


def polygon_box(polygons: Sequence[Sequence[float]]) -> Box:
    """Return x, y, width and height of polygons.

    Example:
        >>> polygon_box([[1, 1, 3, 1, 3, 4]])
        (1, 1, 2, 3)
    """
    xs = [x for polygon in polygons for x in polygon[::2]] if len(polygons) > 1 else polygons[0][::2]
    ys = [y for polygon in polygons for y in polygon[1::2]] if len(polygons) > 1 else polygons[0][1::2]
    left, top = min(xs), min(ys)
    return left, top, max(xs) - left, max(ys) - top


def polygon_area(polygons: Sequence[Sequence[float]]) -> float:
    """Return the area of polygons in pixels, each by the shoelace formula, as in COCO's own files.

    Example:
        >>> polygon_area([[1, 1, 3, 1, 3, 4]])
        3.0
    """
    total = 0.0
    for polygon in polygons:
        xs, ys = polygon[::2], polygon[1::2]
        forward = sum(map(operator.mul, xs, ys[1:]), xs[-1] * ys[0])
        total += abs(forward - sum(map(operator.mul, ys, xs[1:]), ys[-1] * xs[0])) / 2
    return total


def grouped(objects: Sequence[tuple[object, LabeledObject]]) -> Iterator[LabeledObject]:
    """Merge shapes of the same group and class into objects.

    Polygons become the parts of one object; a box, a mask and keypoints its properties.

    Args:
        objects: Each with the key of its group; None for a separate shape.
    """
    members: dict[tuple[object, str], list[LabeledObject]] = {}
    order: list[LabeledObject | tuple[object, str]] = []
    for group, shape in objects:
        if group is None:
            order.append(shape)
            continue
        key = (group, shape.category)
        if key not in members:
            order.append(key)
        members.setdefault(key, []).append(shape)
    for entry in order:
        if isinstance(entry, LabeledObject):
            yield entry
        else:
            yield from _joined(members[entry])


def _joined(shapes: Sequence[LabeledObject]) -> Iterator[LabeledObject]:
    polygons = [s for s in shapes if isinstance(s.segmentation, list)]
    masks = [s for s in shapes if s.segmentation is not None and not isinstance(s.segmentation, list)]
    boxes = [s for s in shapes if s.segmentation is None and s.bbox is not None]
    points = [s for s in shapes if s.segmentation is None and s.bbox is None]
    # A group of several boxes, masks or sets of points is a group of objects, not one object.
    if len(boxes) > 1 or len(masks) > 1 or len(points) > 1 or (masks and polygons):
        yield from shapes
        return
    parts = [polygon for s in polygons for polygon in s.segmentation or [] if isinstance(polygon, list)]
    first = shapes[0]
    yield LabeledObject(
        first.category,
        boxes[0].bbox if boxes else None,
        parts or (masks[0].segmentation if masks else None),
        any(s.iscrowd for s in shapes),
        next((s.keypoints for s in shapes if s.keypoints), ()),
        next((s.score for s in shapes if s.score is not None), None),
        first.line,
    )
