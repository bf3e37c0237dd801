"""Finds what is wrong with a COCO data set before a model is trained on it.

A COCO file can be valid JSON and still teach nothing: every object a crowd, boxes given as corners, ids that the
model doesn't know. :func:`check_data` looks at the JSON as it is, at what :func:`a2fpn.data.read_coco` makes of it,
and at the image files, and names what it finds with ids and what to do.

Shape shorthand: N annotations, one row each, in the order of the file. Boxes are float64, in pixels.
"""

from __future__ import annotations

import gc
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.config import Category
from a2fpn.data.check_files import file_findings
from a2fpn.data.check_sizes import median_size, size_findings
from a2fpn.data.coco import CocoImage, DataError
from a2fpn.data.masks import Rle, segmentation_to_rle
from a2fpn.data.report import (
    PICTURED,
    SHOWN,
    AnnotatedImage,
    ClassCount,
    DataReport,
    Finding,
    Severity,
    Track,
    count_of,
    few,
    shorten,
)

Source = str | Path | Mapping[str, Any]
Rows = NDArray[np.bool_]
T = TypeVar("T")

_UNKNOWN, _NO_ID = -1, -2  # in the place of an index: an id that the file lacks; no whole number
_NO_BOX = (np.nan,) * 4
_LEAST_SIDE = 0.01  # pixels inside the image; the reader leaves out boxes with less
_LARGEST_SIDE = 10**6  # pixels
_LARGEST_MASK = 2**31  # pixels; pycocotools counts them in 32 bits
_LARGEST_PICTURE = 2**27  # pixels; larger images are not drawn
_LARGEST_COORDINATE = 1e6  # the reader's limit for polygons
_EDGE = 1.0  # pixels that a box may reach over the edge by rounding
_MASK_SLACK, _MASK_SLACK_SHARE = 3.0, 0.1  # pixels, and share of the box's longer side


def check_data(
    images: str | Path | None,
    annotations: Source,
    *,
    against: Source | None = None,
    categories: Sequence[Category] = (),
    target_size: Callable[[int, int], tuple[int, int]] | None = None,
    anchor_sizes: Sequence[Sequence[float]] = (),
    anchor_ratios: Sequence[float] = (1.0,),
    sample: int | None = None,
    decode: bool = False,
    examples: int = 0,
    track: Track | None = None,
) -> DataReport:
    """Checks a COCO data set; whatever the file holds, the answer is a report.

    Args:
        images: The image folder; None checks the JSON alone.
        annotations: The JSON file or its content.
        against: What a model trained on ``annotations`` will be measured on; its categories must be the same.
        categories: The model's classes, if the data must fit them.
        target_size: Size (height, width) in which the network sees an image of a size, usually
            ``model.preprocess.target_size``. With it the sizes of objects are judged.
        anchor_sizes: Per level the model's anchor sizes in pixels of its input; empty for a model without anchors.
        anchor_ratios: Height / width of the anchors.
        sample: How many image files are opened, evenly spread over the list; None opens all.
        decode: Whether the pixels of opened files are decoded, which finds truncated files. Otherwise only the
            headers are read, many times faster.
        examples: How many images to pick for drawing, see :class:`DataReport`.
        track: Called as ``track(items, description, total)`` around the long loops.

    Raises:
        DataError: If the folder or a JSON file can't be opened.
        ValueError: If ``sample`` or ``examples`` is negative.

    Example:
        >>> report = check_data(None, {
        ...     "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 5, "category_id": 7, "bbox": [70, 10, 20, 20]}],
        ... })
        >>> report.fatal[0].code, report.fatal[0].message
        ('no-usable-objects', 'None of 1 annotation can be used (box-outside: 1).')
    """
    root = None if images is None else Path(images)
    if root is not None and not root.is_dir():
        raise DataError(f"{root}: no such folder of images.")
    for name, value in {"sample": sample, "examples": examples}.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}.")
    track = track or _untracked
    file, findings = _read(annotations, track)
    if file is None:
        return DataReport(_name(annotations), 0, 0, 0, (), tuple(findings))
    table = _Table.of(file, track)
    if categories:
        findings += _compare_with_model({category.id: category.name for category in categories}, file, table)
    if against is not None:
        other, problems = _read(against, track)
        findings += problems
        findings += [] if other is None else _compare_with_other(file, table, other, _Table.of(other, track))

    problems_of_rows = [
        problem
        for problem in itertools.chain(
            _reference_problems(table),
            _id_problems(table),
            _box_problems(table),
            _mask_problems(table, track),
            _keypoint_problems(file, table),
        )
        if problem.rows.any()
    ]
    findings += (problem.finding(file, table) for problem in problems_of_rows)
    left_out = [problem for problem in problems_of_rows if problem.left_out]
    usable = np.ones(len(table), dtype=np.bool_)
    for problem in left_out:
        usable &= ~problem.rows
    findings += _box_format(table)
    findings += _use_findings(file, table, usable, left_out)

    objects = np.flatnonzero(usable & ~table.crowd)
    sides = table.inside[objects]
    resized = None if target_size is None else sides * _scales(file.images, target_size)[table.image[objects]]
    if resized is not None and len(objects):
        findings += size_findings(sides, resized, anchor_sizes, anchor_ratios)
    opened = [] if root is None else _spread(file.images, sample)
    if root is not None:
        findings += file_findings(root, opened, track, decode=decode)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    return DataReport(
        file.name,
        len(file.images),
        len(table),
        len(opened),
        _class_counts(file, table, usable, sides, resized),
        tuple(findings),
        tuple(_annotated_image(file, table, index, findings) for index in _choose(file, table, findings, examples)),
    )


@dataclass(frozen=True)
class _File:
    """The parts of a COCO file that can be used.

    Args:
        name: For messages.
        images: Valid entries.
        index: Position in ``images`` by id, the first of each id.
        categories: Name by id, sorted by id.
        entries: The annotations as they are.
        num_keypoints: Keypoints that the first category with such names has; None if none has.
    """

    name: str
    images: Sequence[CocoImage]
    index: Mapping[int, int]
    categories: Mapping[int, str]
    entries: Sequence[Any]
    num_keypoints: int | None


@dataclass(frozen=True, eq=False)
class _Table:
    """The annotations as columns.

    Args:
        entries: As in the file; empty in the place of what is no object.
        image: (N,) index of the image, ``_UNKNOWN`` or ``_NO_ID``.
        category: (N,) index of the category, ``_UNKNOWN`` or ``_NO_ID``.
        crowd: (N,).
        box: (N, 4) x, y, width, height; NaN where these are not four finite numbers.
        limits: (N, 2) width and height of the image; NaN where it is unknown.
        has_masks: Whether any annotation has a segmentation, so that all need one.
    """

    entries: Sequence[Mapping[str, Any]]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    crowd: Rows
    box: NDArray[np.float64]
    limits: NDArray[np.float64]
    has_masks: bool

    @classmethod
    def of(cls, file: _File, track: Track) -> _Table:
        """Makes the table of a file."""
        categories = {category_id: index for index, category_id in enumerate(file.categories)}
        entries = [raw if isinstance(raw, Mapping) else {} for raw in file.entries]
        boxes = array("d")
        image: list[int] = []
        category: list[int] = []
        for raw in track(entries, "reading annotations", len(entries)):
            image_id, category_id, box = raw.get("image_id"), raw.get("category_id"), raw.get("bbox")
            image.append(file.index.get(image_id, _UNKNOWN) if _is_whole(image_id) else _NO_ID)
            category.append(categories.get(category_id, _UNKNOWN) if _is_whole(category_id) else _NO_ID)
            end = len(boxes)
            try:
                boxes.extend(box if isinstance(box, list) and len(box) == 4 else _NO_BOX)
            except (TypeError, OverflowError):  # no numbers, or an integer that no float holds
                del boxes[end:]
                boxes.extend(_NO_BOX)
        box = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        box[~np.isfinite(box).all(1)] = np.nan
        sides = np.array([*((entry.width, entry.height) for entry in file.images), (np.nan, np.nan)])
        index = np.array(image, dtype=np.int64)
        return cls(
            entries,
            index,
            np.array(category, dtype=np.int64),
            np.array([bool(raw.get("iscrowd", 0)) for raw in entries], dtype=np.bool_),
            box,
            sides[np.where(index >= 0, index, -1)],
            any(raw.get("segmentation") for raw in entries),
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def corners(self) -> NDArray[np.float64]:
        """(N, 4) boxes as xyxy, cut off at the image's border."""
        low, sides = self.box[:, :2], self.box[:, 2:]
        return np.concatenate([np.maximum(low, 0), np.minimum(low + sides, self.limits)], axis=1)

    @property
    def inside(self) -> NDArray[np.float64]:
        """(N, 2) width and height of the boxes inside the image; negative outside."""
        corners = self.corners
        inside: NDArray[np.float64] = corners[:, 2:] - corners[:, :2]
        return inside

    def used(self, file: _File) -> frozenset[int]:
        """Ids of the file's categories that annotations have."""
        ids = list(file.categories)
        return frozenset(ids[index] for index in np.unique(self.category[self.category >= 0]).tolist())


@dataclass(frozen=True, eq=False)
class _Problem:
    """The annotations that have one problem.

    Args:
        severity: As in :class:`Finding`.
        code: As in :class:`Finding`.
        rows: (N,) which annotations.
        statement: What is the matter, to be followed by "in 3 of 100 annotations".
        advice: As in :class:`Finding`.
        left_out: Whether the reader leaves such annotations out.
    """

    severity: Severity
    code: str
    rows: Rows
    statement: str
    advice: str
    left_out: bool = False

    def finding(self, file: _File, table: _Table) -> Finding:
        """The problem as people see it."""
        rows = np.flatnonzero(self.rows).tolist()
        names = [_annotation_name(table.entries[row], row) for row in rows[:SHOWN]]
        images = dict.fromkeys(file.images[index].id for index in table.image[self.rows].tolist() if index >= 0)
        total = count_of(len(table), "annotation")
        message = f"{self.statement} in {len(rows):,} of {total}: {few(names, len(rows))}."
        lost = " The reader leaves them out." if self.left_out else ""
        return Finding(
            self.severity, self.code, message, self.advice + lost, len(rows), tuple(itertools.islice(images, PICTURED))
        )


def _any(cells: NDArray[np.bool_]) -> Rows:
    """Which rows of (N, C) hold a true value."""
    rows: Rows = np.logical_or.reduce(cells, axis=1)
    return rows


def _untracked(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    return items


def _name(source: Source) -> str:
    return "the given mapping" if isinstance(source, Mapping) else str(source)


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value can be an id or a side: a whole number of 64 bits, and not true or false."""
    return type(value) is int and -(2**63) <= value < 2**63


def _annotation_name(raw: Mapping[str, Any], row: int) -> str:
    """The id of an annotation, or its position where it has none."""
    annotation_id = raw.get("id")
    return str(annotation_id) if _is_whole(annotation_id) else f"the one at position {row}"


def _spread(items: Sequence[T], count: int | None) -> Sequence[T]:
    """So many items, evenly spread; None gives all."""
    if count is None or count >= len(items):
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, count).astype(int).tolist()]


def _read(source: Source, track: Track) -> tuple[_File | None, list[Finding]]:
    """What of a COCO file can be used, and what is wrong with its images and categories.

    Raises:
        DataError: If there is no such file.
    """
    name = _name(source)
    data: Any = source
    if not isinstance(source, Mapping):
        for path in track([Path(source)], "reading JSON", 1):
            try:
                data = _load(path)
            except OSError as error:
                raise DataError(f"{path}: the file can't be read ({error.strerror}).") from None
            except (ValueError, RecursionError) as error:
                return None, [_no_coco(name, f"is no readable JSON ({shorten(str(error), 100)})")]
    if not isinstance(data, Mapping):
        return None, [_no_coco(name, f"holds a {type(data).__name__}, no object")]
    lacking = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if lacking:
        return None, [_no_coco(name, f"has no list {', '.join(lacking)}")]
    images = [_parse_image(raw) for raw in data["images"]]
    categories = [_parse_category(raw) for raw in data["categories"]]
    valid = [entry for entry in images if entry is not None]
    findings = [
        *_entry_findings(name, "image", images, "a whole-number id, a file_name, and height and width in pixels"),
        *_entry_findings(name, "category", categories, "a whole-number id and a name"),
        *_duplicate_files(name, valid),
    ]
    if not images:
        findings.append(Finding("error", "no-images", f"{name} lists no image.", "Look at the export.", 0, fatal=True))
    index = {entry.id: position for position, entry in reversed([*enumerate(valid)])}
    names = {entry.id: entry.name for entry in reversed(categories) if entry is not None}
    keypoints = (raw.get("keypoints") for raw in data["categories"] if isinstance(raw, Mapping))
    num_keypoints = next((len(points) for points in keypoints if isinstance(points, list)), None)
    ordered = dict(sorted(names.items()))
    return _File(name, valid, index, ordered, data["annotations"], num_keypoints), findings


def _load(path: Path) -> Any:
    """Reads JSON; without the garbage collector, which looks for cycles in vain, in nearly half the time.

    Raises:
        OSError: If the file can't be opened.
        ValueError: If it is no JSON.
        RecursionError: If it is nested too deep.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(path.read_bytes())
    finally:
        if collects:
            gc.enable()


def _no_coco(name: str, what: str) -> Finding:
    advice = "A COCO file is a JSON object with the lists images, annotations and categories."
    return Finding("error", "no-coco", f"{name} {what}.", advice, 1, fatal=True)


def _parse_image(raw: Any) -> CocoImage | None:
    match raw:
        case {"id": image_id, "file_name": str(file_name), "height": height, "width": width}:
            if _is_whole(image_id) and all(_is_whole(side) and 0 < side <= _LARGEST_SIDE for side in (height, width)):
                return CocoImage(image_id, file_name, height, width)
    return None


def _parse_category(raw: Any) -> Category | None:
    match raw:
        case {"id": category_id, "name": str(name)} if _is_whole(category_id):
            return Category(category_id, name)
    return None


def _entry_findings(
    name: str, kind: str, entries: Sequence[CocoImage | Category | None], needed: str
) -> Iterator[Finding]:
    """Images or categories for which the reader refuses the whole file."""
    bad = [position for position, entry in enumerate(entries) if entry is None]
    if bad:
        message = f"{name}: {len(bad)} of {len(entries)} entries are no {kind}, at position {few(bad, len(bad))}."
        advice = f"An entry needs {needed}; the reader refuses the file."
        yield Finding("error", f"bad-{kind}", message, advice, len(bad), fatal=True)
    uses = Counter(entry.id for entry in entries if entry is not None)
    twice = [entry_id for entry_id, count in uses.items() if count > 1]
    if twice:
        message = f"{name}: several entries have the same {kind} id: {few(twice, len(twice))}."
        advice = "Give each entry an id of its own; the reader refuses the file."
        pictured = tuple(twice[:PICTURED]) if kind == "image" else ()
        yield Finding("error", f"duplicate-{kind}-id", message, advice, len(twice), pictured, fatal=True)


def _duplicate_files(name: str, images: Sequence[CocoImage]) -> Iterator[Finding]:
    uses = Counter(entry.file_name for entry in images)
    twice = [file_name for file_name, count in uses.items() if count > 1]
    if twice:
        shown = few((shorten(repr(file_name), 60) for file_name in twice), len(twice))
        message = f"{name}: several images have the same file: {shown}."
        advice = "Merge them into one: for each of them the objects of the others are background."
        pictured = [entry.id for entry in images if uses[entry.file_name] > 1][:PICTURED]
        yield Finding("warning", "duplicate-file-name", message, advice, len(twice), tuple(pictured))


def _compare_with_model(model: Mapping[int, str], file: _File, table: _Table) -> Iterator[Finding]:
    """Whether the data means by its categories what a model means by them."""
    yield from _compare("the model", model, file.name, file.categories, table.used(file))
    unseen = model.keys() - file.categories.keys()
    if unseen and len(unseen) < len(model):
        message = f"{count_of(len(unseen), 'class')} of the model not in {file.name}: {_named(model, unseen)}."
        yield Finding("note", "class-not-in-data", message, "On this data they can only be false alarms.", len(unseen))


def _compare_with_other(file: _File, table: _Table, other: _File, other_table: _Table) -> Iterator[Finding]:
    """Whether two files mean the same by their categories and hold objects of the same classes."""
    used, other_used = table.used(file), other_table.used(other)
    yield from _compare(file.name, file.categories, other.name, other.categories, other_used)
    shared = file.categories.keys() & other.categories.keys()
    for code, here, there, missing in (
        ("class-not-learned", other, file, (other_used - used) & shared),
        ("class-not-measured", file, other, used - other_used),
    ):
        if missing and shared:
            names = _named(here.categories, missing)
            message = (
                f"{count_of(len(missing), 'class')} with objects in {here.name} and none in {there.name}: {names}."
            )
            yield Finding(
                "warning", code, message, "Split the images so that both files hold each class.", len(missing)
            )


def _compare(
    source: str, known: Mapping[int, str], target: str, categories: Mapping[int, str], used: frozenset[int]
) -> Iterator[Finding]:
    """Whether the categories of ``target`` are among those that ``source`` knows, under the same names."""
    advice = "Give both the same ids and names."
    if source == "the model":
        advice += " To train on other classes anew, check against the architecture without its weights' tag."
    others = {key: name for key, name in categories.items() if known.get(key, name).casefold() != name.casefold()}
    if others and known:
        pairs = (f"{key} is {known[key]!r} for {source} and {others[key]!r} in {target}" for key in others)
        message = f"Ids that mean different classes, {len(others)} of {len(categories)}: {few(pairs, len(others))}."
        yield Finding("error", "category-names", message + _shift(known, categories), advice, len(others))
    if known and categories and not known.keys() & categories.keys():
        message = f"{target} has no category id in common with {source}: {few(categories, len(categories))} against "
        message += f"{few(known, len(known))}.{_shift(known, categories)}"
        yield Finding("error", "no-common-category", message, advice, len(categories), fatal=True)
    elif unknown := used - known.keys():
        message = f"{target} has objects of {count_of(len(unknown), 'class')} that {source} doesn't know: "
        message += f"{_named(categories, unknown)}.{_shift(known, categories)}"
        yield Finding("error", "unknown-class", message, advice, len(unknown), fatal=True)


def _shift(known: Mapping[int, str], categories: Mapping[int, str]) -> str:
    """What to think of ids that would agree if they were counted from elsewhere."""
    ids = {name.casefold(): key for key, name in known.items()}
    shifts = Counter(key - ids[name.casefold()] for key, name in categories.items() if name.casefold() in ids)
    shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
    return f" {count} of the names agree with ids {abs(shift)} {'higher' if shift > 0 else 'lower'}." if shift else ""


def _named(categories: Mapping[int, str], ids: Iterable[int]) -> str:
    ordered = sorted(ids)
    return few((f"{key} ({shorten(repr(categories[key]), 40)})" for key in ordered), len(ordered))


def _reference_problems(table: _Table) -> Iterator[_Problem]:
    """Annotations without an image or a category."""
    no_ids = (table.image == _NO_ID) | (table.category == _NO_ID)
    advice = "Write image_id and category_id as whole numbers, not as text."
    yield _Problem("warning", "bad-ids", no_ids, "An image_id or category_id that is no whole number", advice, True)
    advice = "List the image, or remove what belonged to it."
    unknown = (table.image == _UNKNOWN) & ~no_ids
    yield _Problem("warning", "unknown-image", unknown, "An image_id that the file doesn't list", advice, True)
    advice = "List the category; without a name it can't be learned."
    unknown = (table.category == _UNKNOWN) & ~no_ids
    yield _Problem("warning", "unknown-category", unknown, "A category_id that the file doesn't list", advice, True)


def _id_problems(table: _Table) -> Iterator[_Problem]:
    """Ids of annotations; the reader doesn't need them, other tools do."""
    ids = [raw.get("id") for raw in table.entries]
    whole = [_is_whole(value) for value in ids]
    uses = Counter(value for value, good in zip(ids, whole, strict=True) if good)
    zero, duplicate = (
        np.array([good and test(value) for value, good in zip(ids, whole, strict=True)], dtype=np.bool_)
        for test in (lambda value: value == 0, lambda value: uses[value] > 1)
    )
    advice = "Nothing here depends on it, but pycocotools takes an object that matches id 0 for missed; count from 1."
    yield _Problem("note", "annotation-id-zero", zero, "The id 0", advice)
    advice = "Nothing here depends on ids, but pycocotools keeps one annotation of each; look for a file merged twice."
    yield _Problem("warning", "duplicate-annotation-id", duplicate, "An id that others have too", advice)
    missing = ~np.array(whole, dtype=np.bool_)
    advice = "Nothing here depends on it, but pycocotools needs whole-number ids."
    yield _Problem("note", "no-annotation-id", missing, "No whole-number id", advice)


def _box_problems(table: _Table) -> Iterator[_Problem]:
    """Boxes that hold nothing, or lie elsewhere."""
    bad = _any(np.isnan(table.box))
    advice = "A bbox is [x, y, width, height] in pixels."
    yield _Problem("warning", "bad-box", bad, "A bbox that is not four finite numbers", advice, True)
    empty = _any(table.box[:, 2:] < _LEAST_SIDE)
    advice = "Remove them, or compute the box from the mask."
    yield _Problem("warning", "empty-box", empty, "A box without width or height", advice, True)
    outside = ~empty & _any(table.inside < _LEAST_SIDE)
    advice = "Compare with the size of the image: was it cropped, resized or turned after annotating?"
    yield _Problem("warning", "box-outside", outside, "A box outside its image", advice, True)
    low, high = table.box[:, :2], table.box[:, :2] + table.box[:, 2:]
    over = ~empty & ~outside & (_any(low < -_EDGE) | _any(high > table.limits + _EDGE))
    yield _Problem(
        "note", "box-over-edge", over, "A box that reaches over the edge of its image", "It is cut off there."
    )


def _box_format(table: _Table) -> Iterator[Finding]:
    """Boxes that make sense only if they are read in another way."""
    known = ~_any(np.isnan(table.box)) & ~_any(np.isnan(table.limits))
    box, limits = table.box[known], table.limits[known]
    if not len(box):
        return
    low, last = box[:, :2], box[:, 2:]
    over = _any(low + last > limits + _EDGE).mean()
    corners = ((last > low) & (last <= limits + _EDGE)).all(1).mean()
    if over > 1 / 3 and corners > 0.99:
        message = f"{over:.0%} of the boxes reach over the edge, but all fit if they are read as [x0, y0, x1, y1]."
        yield Finding("error", "box-corners", message, "A bbox is [x, y, width, height]: convert them.", len(box))
    if ((box >= 0) & (box <= 1)).all() and (limits > 8).all():
        message = f"All {count_of(len(box), 'box')} lie between 0 and 1: they seem to be shares of the image's sides."
        yield Finding("error", "box-shares", message, "Multiply them by width and height.", len(box), fatal=True)


def _mask_problems(table: _Table, track: Track) -> Iterator[_Problem]:
    """Masks that can't be read, are empty, or lie elsewhere than their boxes."""
    if not table.has_masks:
        return
    none, polygon, rle = (np.zeros(len(table), dtype=np.bool_) for _ in range(3))
    extents = np.full((len(table), 4), np.nan)  # xyxy
    points, ends, drawn = array("d"), [0], []
    rles: list[Rle] = []
    encoded: list[int] = []
    known = np.flatnonzero(table.image >= 0).tolist()
    for row in track(known, "checking masks", len(known)):
        segmentation = table.entries[row].get("segmentation")
        if not segmentation:
            none[row] = True
        elif isinstance(segmentation, list):
            try:
                _extend_points(points, segmentation)
            except (TypeError, ValueError, OverflowError):
                del points[ends[-1] :]
                polygon[row] = True
            else:
                ends.append(len(points))
                drawn.append(row)
        else:
            width, height = (int(side) for side in table.limits[row])
            try:
                rles.append(segmentation_to_rle(segmentation, height, width))
                encoded.append(row)
            except (TypeError, ValueError, OverflowError):
                rle[row] = True
    if drawn:
        xy = np.array(points, dtype=np.float64).reshape(-1, 2)
        starts = np.array(ends[:-1]) // 2
        low, high = (reduce.reduceat(xy, starts) for reduce in (np.minimum, np.maximum))
        extents[drawn] = np.concatenate([low, high], axis=1)
        far = np.array(drawn)[_any(~(np.abs(extents[drawn]) < _LARGEST_COORDINATE))]  # or NaN
        polygon[far] = True
        extents[far] = np.nan
    if encoded:
        boxes = np.asarray(mask_utils.toBbox(rles), dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        extents[encoded] = np.where(table.limits[encoded].prod(1)[:, None] < _LARGEST_MASK, boxes, np.nan)

    advice = "Give every object of a file with masks a mask, or none."
    yield _Problem("warning", "no-segmentation", none, "No segmentation", advice, True)
    advice = "A polygon is a list of at least 3 points: x, y, x, y, ... in pixels."
    yield _Problem("warning", "bad-polygon", polygon, "A polygon with too few points or bad coordinates", advice, True)
    advice = "The run lengths must fill the image, and size be [height, width]; was the image resized?"
    yield _Problem("warning", "bad-mask", rle, "A run-length encoding that can't be read", advice, True)
    empty = _any(extents[:, 2:] <= extents[:, :2])
    yield _Problem("warning", "empty-mask", empty, "A mask without area", "Remove them, or draw them again.")
    low, high = np.maximum(extents[:, :2], 0), np.minimum(extents[:, 2:], table.limits)
    difference = np.abs(np.concatenate([low, high], axis=1) - table.corners).max(1)
    slack = np.maximum(_MASK_SLACK, _MASK_SLACK_SHARE * table.box[:, 2:].max(1))
    apart = ~empty & ~_any(table.inside < _LEAST_SIDE) & ~_any(np.isnan(table.inside)) & (difference > slack)
    advice = "Compute the boxes from the masks; were the masks made for another version of the images?"
    yield _Problem("warning", "mask-box-mismatch", apart, "A mask that doesn't fill its box", advice)


def _keypoint_problems(file: _File, table: _Table) -> Iterator[_Problem]:
    """Keypoints that are not three numbers for each of those that the file has."""
    lists = [raw.get("keypoints") for raw in table.entries]
    first = next((points for points in lists if isinstance(points, list) and points), None)
    if first is None:
        return
    count = len(first) // 3 if file.num_keypoints is None else file.num_keypoints
    if count:
        bad = np.array([points not in (None, []) and not _are_numbers(points, 3 * count) for points in lists])
        statement = f"Keypoints that are not {count} times x, y, visibility"
        advice = "Every object needs all keypoints of its category; visibility is 0 for those that are not labelled."
        yield _Problem("warning", "bad-keypoints", bad, statement, advice, True)


def _are_numbers(values: object, count: int) -> bool:
    """Whether a JSON value is a list of so many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    try:
        return bool(np.isfinite(array("d", values)).all())
    except (TypeError, OverflowError):
        return False


def _extend_points(points: array[float], polygons: Sequence[Any]) -> None:
    """Appends the coordinates of an object's polygons.

    Raises:
        TypeError: If a coordinate is no number.
        ValueError: If a polygon has fewer than three points.
        OverflowError: If a coordinate is an integer that no float holds.
    """
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError
        points.extend(polygon)


def _use_findings(file: _File, table: _Table, usable: Rows, left_out: Sequence[_Problem]) -> Iterator[Finding]:
    """What there is to learn from: objects, crowds, classes and images without."""
    total, crowds = count_of(len(table), "annotation"), int((usable & table.crowd).sum())
    if not len(table):
        yield Finding(
            "error", "no-annotations", f"{file.name} has no annotation.", "Look at the export.", 0, fatal=True
        )
        return
    if not usable.any():
        reasons = ", ".join(f"{problem.code}: {problem.rows.sum():,}" for problem in left_out)
        message = f"None of {total} can be used ({reasons})."
        yield Finding("error", "no-usable-objects", message, "See these findings.", len(table), fatal=True)
        return
    learn = "Crowds teach nothing. Where each is one object, as in exports that mark every RLE, set iscrowd to 0."
    if crowds == usable.sum():
        message = f"Every one of the {count_of(crowds, 'usable object')} is a crowd (iscrowd = 1)."
        yield Finding("error", "all-crowd", message, learn, crowds, fatal=True)
    elif crowds:
        share = crowds / int(usable.sum())
        message = f"{share:.1%} of the usable annotations are crowds ({crowds:,})."
        yield Finding("warning" if share > 0.5 else "note", "crowds", message, learn, crowds)
    ids = list(file.categories)
    objects, crowded = (
        np.bincount(table.category[usable & rows], minlength=len(ids)) for rows in (~table.crowd, table.crowd)
    )
    only = [category_id for category_id, n, c in zip(ids, objects, crowded, strict=True) if c and not n]
    if only and len(only) < len(ids):
        message = f"All objects are crowds in {len(only)} of {count_of(len(ids), 'class')}: "
        yield Finding("error", "class-all-crowd", f"{message}{_named(file.categories, only)}.", learn, len(only))
    without = [category_id for category_id, n, c in zip(ids, objects, crowded, strict=True) if not c and not n]
    if without:
        message = f"No usable object in {len(without)} of {count_of(len(ids), 'class')}: "
        message += f"{_named(file.categories, without)}."
        yield Finding(
            "warning", "class-without-object", message, "Remove the class, or add images of it.", len(without)
        )
    annotated = np.bincount(table.image[table.image >= 0], minlength=len(file.images))
    images = [file.images[index] for index in np.flatnonzero(annotated == 0).tolist()]
    if images:
        message = f"No annotation in {len(images):,} of {count_of(len(file.images), 'image')}: "
        message += f"{few((entry.id for entry in images), len(images))}."
        advice = "They are trained on as background; leave out those that nobody annotated."
        pictured = tuple(entry.id for entry in images[:PICTURED])
        yield Finding("note", "image-without-annotation", message, advice, len(images), pictured)


def _scales(images: Sequence[CocoImage], target_size: Callable[[int, int], tuple[int, int]]) -> NDArray[np.float64]:
    """(I, 2) factors of width and height by which each image is resized."""
    sizes = {(entry.height, entry.width) for entry in images}
    factors = {}
    for height, width in sizes:
        new_height, new_width = target_size(height, width)
        factors[height, width] = (new_width / width, new_height / height)
    return np.array([factors[entry.height, entry.width] for entry in images]).reshape(-1, 2)


def _class_counts(
    file: _File, table: _Table, usable: Rows, sides: NDArray[np.float64], resized: NDArray[np.float64] | None
) -> tuple[ClassCount, ...]:
    """What there is of each class; ``sides`` and ``resized`` are those of the usable objects."""
    objects = usable & ~table.crowd
    category, image = table.category[objects], table.image[objects]
    crowds = np.bincount(table.category[usable & table.crowd], minlength=len(file.categories)).tolist()
    order = np.argsort(category, kind="stable")
    bounds = np.searchsorted(category[order], np.arange(len(file.categories) + 1))
    counts = []
    for index, (category_id, name) in enumerate(file.categories.items()):
        rows = order[bounds[index] : bounds[index + 1]]
        median_resized = None if resized is None else median_size(resized[rows])
        images = len(np.unique(image[rows]))
        counts.append(
            ClassCount(
                Category(category_id, name), len(rows), images, crowds[index], median_size(sides[rows]), median_resized
            )
        )
    return tuple(counts)


def _choose(file: _File, table: _Table, findings: Sequence[Finding], count: int) -> list[int]:
    """Indices of images to draw: one of each finding, the next of each finding, ..., then others with objects."""
    rounds = itertools.zip_longest(*(finding.image_ids for finding in findings))
    named = (file.index[image_id] for ids in rounds for image_id in ids if image_id is not None)
    annotated = _spread(np.unique(table.image[table.image >= 0]).tolist(), count)
    indices = dict.fromkeys(itertools.chain(named, annotated))
    drawable = (i for i in indices if file.images[i].height * file.images[i].width <= _LARGEST_PICTURE)
    return list(itertools.islice(drawable, count))


def _annotated_image(file: _File, table: _Table, index: int, findings: Sequence[Finding]) -> AnnotatedImage:
    entry = file.images[index]
    drawable = (table.image == index) & (table.category >= 0) & ~_any(np.isnan(table.box))
    rows = np.flatnonzero(drawable).tolist()
    boxes = table.box[rows]
    boxes[:, 2:] += boxes[:, :2]
    sides = np.array([entry.width, entry.height] * 2)
    boxes = np.clip(boxes, -sides, 2 * sides)  # what lies farther outside is not seen, and may not fit float32
    rles = tuple(_mask_or_none(table.entries[row].get("segmentation"), entry) for row in rows)
    codes = tuple(finding.code for finding in findings if entry.id in finding.image_ids)
    return AnnotatedImage(
        entry.id,
        entry.file_name,
        (entry.height, entry.width),
        boxes.astype(np.float32),
        table.category[rows],
        table.crowd[rows],
        rles if table.has_masks else None,
        codes,
    )


def _mask_or_none(segmentation: object, entry: CocoImage) -> Rle:
    """A mask, empty if it can't be read."""
    try:
        return segmentation_to_rle(segmentation, entry.height, entry.width)
    except (TypeError, ValueError, OverflowError):
        nothing = {"size": [entry.height, entry.width], "counts": [entry.height * entry.width]}
        return segmentation_to_rle(nothing, entry.height, entry.width)
