"""Writer of COCO folders from labeled images: ``images/`` and ``annotations/instances_{train,val,test}.json``."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from a2fpn._registry import natural_key
from a2fpn.data.check.report import Track
from a2fpn.data.importers.annotation import encode, usable, with_box_mask, with_keypoints
from a2fpn.data.importers.base import UNREAD
from a2fpn.data.importers.placing import ImagePlacer
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog
from a2fpn.data.splits import assign_splits
from a2fpn.errors import DataError

_ID_LIMIT = 2**53  # above it, readers of JSON that use floats take different ids for one
_LONGEST = 48  # characters of a split, up to 4 bytes each in a name of up to 255
_SURROGATES = re.compile("[\ud800-\udfff]")  # bytes of a file's name that are not UTF-8


@dataclass(frozen=True)
class SplitRule:
    """Rule for splitting a source without splits.

    Args:
        val: Share of images for validation; 0 for none.
        test: Share for testing.
        group_by: See :func:`a2fpn.data.splits.assign_splits`.
        seed: Likewise.
    """

    val: float = 0.0
    test: float = 0.0
    group_by: str = ""
    seed: int = 0


@dataclass(slots=True)
class _Entry:
    """An image with its annotations as JSON text without ids, 20 times smaller than as objects."""

    name: str
    height: int
    width: int
    split: str
    id: int | None
    annotations: list[tuple[str, str, bool]] = field(default_factory=list)  # category, text, whether it has a mask


@dataclass(frozen=True)
class SplitCount:
    """Numbers of images and objects in a split of the written data set.

    Args:
        images: Total number of images.
        annotations: Total number of annotations.
        empty: Images without objects.
        masks: Annotations with a mask.
        crowds: Annotations of groups.
    """

    images: int
    annotations: int
    empty: int
    masks: int
    crowds: int


class CocoWriter:
    """Collects labeled images and writes a COCO folder.

    Args:
        output: The folder; created if necessary.
        log: Log of losses.
        images: Places the images.
        box_masks: Whether boxes are converted to masks if other objects have masks.
        splits: Rule for splitting a source without splits.
    """

    def __init__(
        self,
        output: Path,
        log: LossLog,
        *,
        images: ImagePlacer,
        box_masks: bool = False,
        splits: SplitRule | None = None,
    ) -> None:
        self.output = output
        self.log = log
        self.images = images
        self.box_masks = box_masks
        self.splits = splits or SplitRule()
        self._entries: dict[str, _Entry] = {}
        self._folded: dict[str, _Entry] = {}  # by name in lower case
        self._used: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, image: LabeledImage) -> None:
        """Add an image; objects that the reader would drop are logged."""
        if os.path.isabs(image.name) or ".." in image.name.split("/"):
            self.log.add("unsafe-name", image.source, f"{image.name} is outside the image folder; skipped")
            return
        if _SURROGATES.search(image.name):
            self.log.add("unsafe-name", image.source, f"the name {image.name} is not valid UTF-8; skipped")
            return
        split = _file_part(image.split)
        if split != image.split:
            self.log.note(f"images of the split {image.split!r}, called {split or 'train'!r}")
        name = image.name
        other = self._other(name)
        if other is not None and other.split != (split or "train"):
            name = f"{split or 'train'}/{image.name}"  # images with the same name in two splits
            other = self._other(name)
        if other is not None:
            same = "is listed twice"
            if other.name != name:
                same = f"is one file with {other.name} on the output's file system, which ignores case"
            self.log.add("duplicate-image", image.source, f"{name} {same}; the first is kept")
            return
        entry = _Entry(name, image.height, image.width, split, image.id)
        for labeled in image.objects:
            text = self._annotation(labeled, image)
            if text is not None:
                self._used.add(labeled.category)
                entry.annotations.append((labeled.category, text, '"segmentation":' in text))
        if image.objects and not entry.annotations:
            self.log.note(UNREAD)
            return
        self._entries[name] = self._folded[name.lower()] = entry
        if image.file is not None:
            self.images.add(image.file, name)

    def _other(self, name: str) -> _Entry | None:
        """Return the image whose file a new one would overwrite."""
        other = self._entries.get(name) or self._folded.get(name.lower())
        return other if other is not None and (other.name == name or self._folds_case) else None

    @cached_property
    def _folds_case(self) -> bool:
        """Indifference of the output's file system to case."""
        self.output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="case", dir=self.output) as probe:
            return self.output.joinpath(Path(probe.name).name.swapcase()).exists()

    def close(self, categories: Sequence[CategoryInfo], track: Track) -> tuple[dict[str, SplitCount], dict[int, str]]:
        """Write everything.

        Args:
            categories: Categories listed by the source; others that occur in objects are added.
            track: Shows the progress.

        Returns:
            Statistics of each split, and the categories.

        Raises:
            DataError: If there are no images, or the requested splits are not possible.
        """
        if not self._entries:
            raise no_image(self.log)
        infos = self._classes(categories)
        entries = sorted(self._entries.values(), key=lambda entry: natural_key(entry.name))
        _number(entries)
        self._split(entries)
        has_masks = any(mask for entry in entries for *_, mask in entry.annotations)
        self.images.close(track)
        (self.output / "annotations").mkdir(parents=True, exist_ok=True)
        ids = {info.name: category_id for category_id, info in infos.items()}
        counts = {}
        first = 1
        for split in dict.fromkeys(sorted((e.split for e in entries), key=_split_order)):
            members = [entry for entry in entries if entry.split == split]
            path = self.output / "annotations" / f"instances_{split}.json"
            counts[split] = self._write(path, members, infos, ids, first, has_masks=has_masks)
            first += counts[split].annotations
        return counts, {category_id: info.name for category_id, info in infos.items()}

    def _classes(self, categories: Sequence[CategoryInfo]) -> dict[int, CategoryInfo]:
        """Number the listed classes and those of objects; of several with one name, the first is kept."""
        unique: dict[str, CategoryInfo] = {}
        for info in [*categories, *(CategoryInfo(name) for name in _unlisted(categories, self._used))]:
            if unique.setdefault(info.name, info) is not info:
                self.log.note("classes with the name of another, merged with it")
        infos = _numbered(list(unique.values()))
        if renumbered := sum(info.id not in (None, key) for key, info in infos.items()):
            self.log.note("classes whose id is taken or too large, with a new one", renumbered)
        return infos

    def _annotation(self, labeled: LabeledObject, image: LabeledImage) -> str | None:
        """Format an annotation as JSON text without its ids."""
        found = usable(labeled, image.height, image.width, self.log, image.source)
        if found is None:
            return None
        labeled, box, area = found
        record: dict[str, Any] = {"bbox": box, "area": area, "iscrowd": int(labeled.iscrowd)}
        if labeled.segmentation is not None:
            record["segmentation"] = labeled.segmentation
        if labeled.keypoints:
            record |= {"keypoints": labeled.keypoints, "num_keypoints": sum(v > 0 for v in labeled.keypoints[2::3])}
        if labeled.score is not None:
            record["score"] = labeled.score
        return encode(record)[1:]

    def _split(self, entries: Sequence[_Entry]) -> None:
        named = {entry.split for entry in entries} - {""}
        rule = self.splits
        if rule.val or rule.test:
            if named - {"train"}:
                raise DataError(
                    f"the source has the splits {', '.join(sorted(named))}; omit val and test (--val, --test) "
                    "to keep them, or import each of its folders separately."
                )
            names = [entry.name for entry in entries]
            new = assign_splits(names, val=rule.val, test=rule.test, group_by=rule.group_by, seed=rule.seed)
            for entry, split in zip(entries, new, strict=True):
                entry.split = split
        for entry in entries:
            entry.split = entry.split or "train"

    def _write(
        self,
        path: Path,
        entries: Sequence[_Entry],
        infos: Mapping[int, CategoryInfo],
        ids: Mapping[str, int],
        first: int,
        *,
        has_masks: bool,
    ) -> SplitCount:
        """Write one file, annotation by annotation."""
        annotations = empty = masks = crowds = boxes = 0
        lengths = {info.name: len(info.keypoints) for info in infos.values()}
        with path.open("w", encoding="utf-8") as file:
            images = (encode({"id": e.id, "file_name": e.name, "height": e.height, "width": e.width}) for e in entries)
            file.write('{"images":[\n' + ",\n".join(images) + '\n],\n"annotations":[')
            separator = "\n"
            for entry in entries:
                empty += not entry.annotations
                for category, text, mask in entry.annotations:
                    if lengths[category] and '"keypoints":' in text:
                        text = with_keypoints(text, 3 * lengths[category])
                    if has_masks and not mask:
                        boxes += 1
                        if self.box_masks:
                            text = with_box_mask(text)
                            mask = True
                    number = first + annotations
                    file.write(f'{separator}{{"id":{number},"image_id":{entry.id},"category_id":{ids[category]},{text}')
                    separator = ",\n"
                    annotations += 1
                    masks += mask
                    crowds += '"iscrowd":1' in text
            listed = ",\n".join(encode(info.to_coco(category_id)) for category_id, info in infos.items())
            file.write(f'\n],\n"categories":[\n{listed}\n]}}\n')
        if boxes and self.box_masks:
            self.log.note("boxes converted to rectangular masks", boxes)
        elif boxes:
            self.log.note("objects without a mask among objects with masks, used for boxes only", boxes)
        return SplitCount(len(entries), annotations, empty, masks, crowds)


def no_image(log: LossLog) -> DataError:
    """Return the error of a source of which no image was read."""
    noted = [f"{count:,} {what}" for what, count in log.notes.items()]
    message = "; ".join(filter(None, ["no image was read", log.summary(), *noted])) + "."
    if log.counts["missing-image"]:
        message += " Images are searched for in the given folder, or in that of the given file."
    return DataError(message)


def _unlisted(categories: Sequence[CategoryInfo], used: set[str]) -> list[str]:
    return sorted(used - {category.name for category in categories}, key=natural_key)


def _numbered(categories: Sequence[CategoryInfo]) -> dict[int, CategoryInfo]:
    """Assign category ids: as given, but only once; others count up from the highest."""
    taken = {category.id for category in categories if category.id is not None and abs(category.id) < _ID_LIMIT}
    following = max(taken, default=0) + 1
    infos: dict[int, CategoryInfo] = {}
    for category in categories:
        category_id = category.id
        if category_id is None or category_id not in taken or category_id in infos:
            category_id, following = following, following + 1
        infos[category_id] = category
    return infos


def _number(entries: Sequence[_Entry]) -> None:
    """Assign image ids: as given, else the file names if they are distinct numbers, else 1, 2, ..."""
    given = [entry.id for entry in entries if entry.id is not None]
    if given and len(set(given)) == len(given) and max(map(abs, given)) < _ID_LIMIT:
        following = itertools.count(max(given) + 1)
        for entry in entries:
            entry.id = next(following) if entry.id is None else entry.id
        return
    stems = [Path(entry.name).stem for entry in entries]
    numeric = all(stem.isascii() and stem.isdecimal() and len(stem) < 18 for stem in stems)
    numbers = [int(stem) for stem in stems] if numeric else []
    if len(set(numbers)) < len(entries):
        numbers = list(range(1, len(entries) + 1))
    for entry, number in zip(entries, numbers, strict=True):
        entry.id = number


def _file_part(split: str) -> str:
    """Return a split as a part of a file name, which may come from any text.

    Example:
        >>> _file_part("site/1"), _file_part("../x"), _file_part("..")
        ('site_1', '_x', '')
    """
    return re.sub(r"[^\w .-]", "_", split)[:_LONGEST].strip(" .")


def _split_order(split: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return (order.index(split), "") if split in order else (len(order), split)
