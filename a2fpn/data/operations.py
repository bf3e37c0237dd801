"""Operations on COCO files: split, merge, subset and rename, with every other field kept.

All functions take the content of a file, or its path, and return new content; inputs are not modified.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from a2fpn._registry import did_you_mean
from a2fpn._text import count_of
from a2fpn.data.document import is_whole
from a2fpn.data.importers.files import read_json
from a2fpn.data.splits import assign_splits
from a2fpn.errors import DataError

logger = logging.getLogger(__name__)
Coco = Mapping[str, Any]
Source = str | Path | Coco

_LISTS = ("images", "annotations", "categories")
_REFERENCES = {"image_id": "images", "category_id": "categories"}


def load_coco(source: Source) -> dict[str, Any]:
    """Load the content of a COCO file, without annotations of images or classes that it doesn't list.

    Raises:
        DataError: If it is not a COCO file, or an id is missing, repeated or not an integer.
    """
    name = "the given mapping" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else read_json(Path(source))
    if not isinstance(data, Mapping) or not all(isinstance(data.get(key), list) for key in _LISTS):
        raise DataError(
            f"{name}: not a COCO file; expected an object with the lists images, annotations and categories."
        )
    for key, needed in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        for raw in data[key]:
            if not isinstance(raw, Mapping) or any(field not in raw for field in needed) or not is_whole(raw["id"]):
                given = str(raw)[:80]
                raise DataError(f"{name}: an entry of {key} needs an integer id and {needed[1]}, got {given}.")
        repeated = [value for value, count in Counter(raw["id"] for raw in data[key]).items() if count > 1]
        if repeated:
            raise DataError(f"{name}: the id {repeated[0]} is listed twice in {key}; ids must be unique.")
    listed = {field: {raw["id"] for raw in data[key]} for field, key in _REFERENCES.items()}
    for raw in data["annotations"]:
        if not isinstance(raw, Mapping) or not all(is_whole(raw.get(field)) for field in listed):
            raise DataError(f"{name}: an annotation needs integers image_id and category_id, got {str(raw)[:80]}.")
    for field, ids in listed.items():
        unknown = [raw for raw in data["annotations"] if raw[field] not in ids]
        if unknown:
            logger.warning(
                "%s: left out %s whose %s is not in %s, the first with %s %s",
                name,
                count_of(len(unknown), "annotation"),
                field,
                _REFERENCES[field],
                field,
                unknown[0][field],
            )
            data = {**data, "annotations": [raw for raw in data["annotations"] if raw[field] in ids]}
    return dict(data)


def save_coco(data: Coco, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a COCO file, creating folders.

    Raises:
        DataError: If the file exists and ``overwrite`` is off.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists; choose another file, or overwrite it (--overwrite).")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def split_coco(
    source: Source, *, val: float = 0.2, test: float = 0.0, group_by: str = "", seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Split a COCO file by images; every part keeps all categories.

    Args:
        source: The file or its content.
        val: Share of images for validation.
        test: Share for testing.
        group_by: A regular expression that finds the group in an image's name, see
            :func:`a2fpn.data.splits.assign_splits`.
        seed: Seed of the split.

    Returns:
        The content of each part by name: ``"train"``, ``"val"`` and, if requested, ``"test"``.

    Example:
        >>> images = [{"id": i, "file_name": f"{i}.png", "height": 4, "width": 4} for i in range(10)]
        >>> parts = split_coco({"images": images, "annotations": [], "categories": []}, val=0.3)
        >>> {name: len(part["images"]) for name, part in parts.items()}
        {'train': 7, 'val': 3}
    """
    data = load_coco(source)
    names = [str(raw["file_name"]) for raw in data["images"]]
    splits = assign_splits(names, val=val, test=test, group_by=group_by, seed=seed)
    of_image = {raw["id"]: split for raw, split in zip(data["images"], splits, strict=True)}
    return {
        split: _only(data, lambda raw, split=split: of_image[raw["id"]] == split)  # type: ignore[misc]
        for split in ("train", "val", "test")
        if split in set(splits)
    }


def merge_coco(
    sources: Sequence[Source], *, rename: Mapping[str, str] | None = None, prefixes: Sequence[str] = ()
) -> dict[str, Any]:
    """Merge COCO files: classes with the same name are merged, and conflicting image and annotation ids renumbered.

    Args:
        sources: Two or more files.
        rename: New names of classes by their old ones, applied before classes are compared.
        prefixes: Prefixes of the file names of each source, such as its folder; none by default.

    Returns:
        The merged content; ids of the first file are kept.

    Raises:
        DataError: If two images have the same file name, or classes with the same name have different keypoints.

    Example:
        >>> def one_image(name, category):
        ...     images, categories = [{"id": 1, "file_name": name}], [{"id": category, "name": "cat"}]
        ...     return {"images": images, "annotations": [], "categories": categories}
        >>> merged = merge_coco([one_image("a.png", 1), one_image("b.png", 5)])
        >>> [raw["id"] for raw in merged["images"]], [raw["id"] for raw in merged["categories"]]
        ([1, 2], [1])
    """
    if len(sources) < 2:
        raise DataError(f"merging needs two or more files, got {len(sources)}.")
    if prefixes and len(prefixes) != len(sources):
        raise DataError(f"expected one prefix per file, got {len(prefixes)} for {len(sources)} files.")
    result: dict[str, Any] = {key: [] for key in _LISTS}
    by_name: dict[str, dict[str, Any]] = {}
    files: dict[str, int] = {}
    for number, source in enumerate(sources):
        data = rename_categories(source, rename or {}, missing_ok=True)
        if number == 0:
            result = {**data, **result}
        categories = {raw["id"]: _merged_category(raw, by_name, result["categories"]) for raw in data["categories"]}
        taken = {raw["id"] for raw in result["images"]}
        following = max(taken, default=0) + 1
        ids = {}
        licenses = _merged_licenses(data, result) if number else {}
        for raw in data["images"]:
            file_name = f"{prefixes[number] if prefixes else ''}{raw['file_name']}"
            if file_name in files:
                where = f"files {files[file_name] + 1} and {number + 1}"
                raise DataError(
                    f"the image {file_name!r} is in {where}; give the files prefixes, or remove one of them."
                )
            files[file_name] = number
            new = raw["id"]
            if new in taken:
                new, following = following, following + 1
            taken.add(new)
            following = max(following, new + 1)
            ids[raw["id"]] = new
            changed = {"id": new, "file_name": file_name}
            if is_whole(raw.get("license")) and raw["license"] in licenses:
                changed["license"] = licenses[raw["license"]]
            result["images"].append({**raw, **changed})
        start = max((raw["id"] for raw in result["annotations"] if isinstance(raw.get("id"), int)), default=0) + 1
        for offset, raw in enumerate(data["annotations"]):
            own = {} if number == 0 else {"id": start + offset}
            changed = {"image_id": ids[raw["image_id"]], "category_id": categories[raw["category_id"]]}
            result["annotations"].append({**raw, **own, **changed})
    return result


def subset_coco(
    source: Source,
    *,
    categories: Iterable[str] | None = None,
    images: Iterable[str] | None = None,
    number: int | None = None,
    seed: int = 0,
    min_size: float = 0.0,
    drop_empty: bool = False,
) -> dict[str, Any]:
    """Select a part of a COCO file.

    Args:
        source: The file or its content.
        categories: Names of the classes to keep; None for all.
        images: File names, or patterns such as ``"site_1/*"``, of the images to keep; None for all.
        number: Number of images, chosen by the hash of their names, so that a subset of 50 contains that of 25.
        seed: Seed of the choice.
        min_size: Minimum square root of a box's area, pixels.
        drop_empty: Whether to drop images without objects.

    Raises:
        DataError: For a class or an image that is not in the file, or more images than it has.
    """
    data = load_coco(source)
    if categories is not None:
        known = [raw["name"] for raw in data["categories"]]
        wanted = list(categories)
        for name in wanted:
            if name not in known:
                raise DataError(f"the file has no class {name!r}. {did_you_mean(name, known)}")
        data["categories"] = [raw for raw in data["categories"] if raw["name"] in wanted]
        ids = {raw["id"] for raw in data["categories"]}
        data["annotations"] = [raw for raw in data["annotations"] if raw["category_id"] in ids]
    if min_size > 0:
        data["annotations"] = [raw for raw in data["annotations"] if box_size(raw) >= min_size]
    if images is not None:
        patterns = list(images)
        names = [str(raw["file_name"]) for raw in data["images"]]
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise DataError(f"the file has no image {pattern!r}. {did_you_mean(pattern, names)}")
        data = _only(data, lambda raw: any(_matches(str(raw["file_name"]), pattern) for pattern in patterns))
    if drop_empty:
        used = {raw["image_id"] for raw in data["annotations"]}
        data = _only(data, lambda raw: raw["id"] in used)
    if number is not None:
        if not 0 < number <= len(data["images"]):
            raise DataError(f"number must be between 1 and {len(data['images'])}, the number of images, got {number}.")
        ranked = sorted(data["images"], key=lambda raw: _hash(f"{seed}\0{raw['file_name']}"))
        kept = {raw["id"] for raw in ranked[:number]}
        data = _only(data, lambda raw: raw["id"] in kept)
    return data


def rename_categories(source: Source, names: Mapping[str, str], *, missing_ok: bool = False) -> dict[str, Any]:
    """Rename classes; classes that get the same name are merged under the first one's id.

    Args:
        source: The file or its content.
        names: New names by old ones.
        missing_ok: Whether an old name may be missing.

    Raises:
        DataError: For an old name that is not in the file.

    Example:
        >>> data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}]}
        >>> rename_categories(data, {"van": "car"})["categories"]
        [{'id': 1, 'name': 'car'}]
    """
    data = load_coco(source)
    known = [raw["name"] for raw in data["categories"]]
    for name in names:
        if name not in known and not missing_ok:
            raise DataError(f"the file has no class {name!r}. {did_you_mean(name, known)}")
    by_name: dict[str, dict[str, Any]] = {}
    categories: list[dict[str, Any]] = []
    ids = {}
    for raw in data["categories"]:
        renamed = {**raw, "name": names.get(raw["name"], raw["name"])}
        ids[raw["id"]] = _merged_category(renamed, by_name, categories)
    annotations = [{**raw, "category_id": ids[raw["category_id"]]} for raw in data["annotations"]]
    return {**data, "categories": categories, "annotations": annotations}


def _only(data: Coco, keep: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """Select the images for which ``keep`` holds, with their annotations."""
    images = [raw for raw in data["images"] if keep(raw)]
    ids = {raw["id"] for raw in images}
    annotations = [raw for raw in data["annotations"] if raw["image_id"] in ids]
    return {**data, "images": images, "annotations": annotations}


def _merged_category(raw: Mapping[str, Any], by_name: dict[str, dict[str, Any]], listed: list[dict[str, Any]]) -> int:
    """Return the id of a class among those listed, adding it if necessary."""
    known = by_name.get(raw["name"])
    if known is None:
        taken = {other["id"] for other in listed}
        fresh = {**raw, "id": raw["id"] if raw["id"] not in taken else max(taken) + 1}
        by_name[raw["name"]] = fresh
        listed.append(fresh)
        return int(fresh["id"])
    if raw.get("keypoints") and known.get("keypoints") and raw["keypoints"] != known["keypoints"]:
        raise DataError(
            f"the class {raw['name']!r} has different keypoints in two files: {known['keypoints']} and "
            f"{raw['keypoints']}; rename one of them."
        )
    known.update({key: raw[key] for key in ("keypoints", "skeleton") if raw.get(key) and not known.get(key)})
    return int(known["id"])


def _merged_licenses(data: Coco, result: dict[str, Any]) -> dict[int, int]:
    """Add the licenses of a file to those of the merged one, and return their ids there by their own."""
    listed, ids = _licenses(result), {}
    for raw in _licenses(data):
        taken = {other["id"] for other in listed}
        same = next((other["id"] for other in listed if {**other, "id": raw["id"]} == raw), None)
        ids[raw["id"]] = same if same is not None else raw["id"] if raw["id"] not in taken else max(taken) + 1
        if same is None:
            listed.append({**raw, "id": ids[raw["id"]]})
    if ids:
        result["licenses"] = listed
    return ids


def _licenses(data: Coco) -> list[Mapping[str, Any]]:
    given = data.get("licenses")
    entries = given if isinstance(given, list) else []
    return [raw for raw in entries if isinstance(raw, Mapping) and is_whole(raw.get("id"))]


def _matches(name: str, pattern: str) -> bool:
    """Return whether a name is the pattern or matches it: ``a[1].png`` is a name as well."""
    return name == pattern or fnmatchcase(name, pattern)


def box_size(raw: Mapping[str, Any]) -> float:
    """Square root of the area of an annotation's box, pixels; 0 without a box."""
    box = raw.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        return 0.0
    return math.sqrt(max(box[2], 0) * max(box[3], 0))


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()
