"""Label Studio's JSON export: a list of tasks, shapes in percent of the image.

Brush masks are RGBA images, compressed by thi.ng/rle-pack, whose alpha channel is the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.importers.base import FAULTS, JsonImporter, group_of, list_of, register_importer
from a2fpn.data.importers.files import clean_path, read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import ellipse, turned
from a2fpn.data.labeled import LabeledImage, LabeledObject, grouped, split_name
from a2fpn.errors import DataError
from a2fpn.masks.rle import encode_masks

SERVED = "/data/local-files/?d="
"""Label Studio's address of files below the folder that it serves."""
_KINDS = ("rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels")


@register_importer("labelstudio")
class LabelStudioImporter(JsonImporter):
    """Reads a list of tasks with ``data`` and ``annotations``."""

    sign = "tasks"

    @classmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """See :meth:`JsonImporter.owns`."""
        head = folder.head(path)
        listed = head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
        return (listed and b'"data"' in head) or (b'"original_width"' in head and (listed or b'"result"' in head))

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            tasks = read_json(path)
            if not isinstance(tasks, list):
                raise DataError(f"{path}: not a Label Studio export; expected a list of tasks. Export as JSON.")
            yield from self.each(self._image, path, "tasks", tasks, used)
        yield from self.unlabeled(used)

    def _image(self, path: Path, task: Any, place: str, used: set[Path]) -> LabeledImage | None:
        if isinstance(task, Mapping) and "id" in task:
            place = f"task {task['id']}"
        data = task.get("data") if isinstance(task, Mapping) else None
        names = [value for value in data.values() if isinstance(value, str)] if isinstance(data, Mapping) else []
        if not names:
            detail = "it names no image in data; export as JSON, not as JSON-MIN; skipped"
            self.log.add("bad-item", path, detail, place=place)
            return None
        given = list_of(task.get("annotations"), "annotations")
        done = [a for a in given if not self.flag(a.get("was_cancelled"), "was_cancelled")]
        drawn_on = _drawn_on(done[-1]) if done else ""
        if isinstance(data, Mapping) and isinstance(data.get(drawn_on), str):
            names = [data[drawn_on]]
        file = next((found for name in names if (found := self._find(name)) is not None), None)
        if file is not None and not done:
            self.log.note("tasks without a submitted annotation: images without labels")
            return None
        size = self.claim(file, used, path, named=names[0], place=place)
        if file is None or size is None:
            return None
        if len(done) > 1:
            detail = f"{len(done)} annotations of one image; the last is used"
            self.log.add("several-annotations", path, detail, place=place)
        result = list_of(done[-1].get("result"), "result")
        name, split = self.images.name_and_split(file)
        split = split_name(str(data.get("split", ""))) or split if isinstance(data, Mapping) else split
        objects = self._objects(path, result, size, place)
        return LabeledImage(file, name, *size, objects, split, str(path))

    def _find(self, name: str) -> Path | None:
        """Find the image of a URL; uploads have a prefix of 8 letters and a dash."""
        if SERVED in name:  # always encoded
            name = unquote(name.partition(SERVED)[2])
        found = self.images.find(name)
        base = clean_path(name).rpartition("/")[2]
        if found is None and len(base) > 9 and base[8] == "-":
            found = self.images.find(base[9:])
        return found

    def _objects(self, path: Path, results: Sequence[Any], size: tuple[int, int], place: str) -> list[LabeledObject]:
        shapes: list[tuple[object, LabeledObject]] = []
        crowds = {str(r.get("id")) for r in results if isinstance(r, Mapping) and _choices(r) == ["iscrowd"]}
        for number, raw in enumerate(results):
            where = f"{place}, result[{number}]"
            kind = raw.get("type") if isinstance(raw, Mapping) else None
            if kind in ("choices", "textarea", "rating", "number"):
                continue
            if kind not in _KINDS:
                self.log.add("unsupported-shape", path, f"{kind} is not supported", place=where)
                continue
            try:
                group = group_of((raw.get("meta") or {}).get("group"))
                shapes.append((group, _shape(raw, size, where, crowd=str(raw.get("id")) in crowds)))
                labels = raw["value"][kind]
                if len(labels) > 1:
                    detail = f"it has the labels {', '.join(map(str, labels))}; the first is used"
                    self.log.add("several-labels", path, detail, place=where)
            except FAULTS as error:
                self.skip("bad-shape", path, error, where)
        return list(grouped(shapes))


def _drawn_on(annotation: Mapping[str, Any]) -> str:
    """Return the name of the image that an annotation was drawn on, by default its key in a task's data."""
    results = list_of(annotation.get("result"), "result")
    return next((str(raw["to_name"]) for raw in results if isinstance(raw, Mapping) and raw.get("to_name")), "")


def _choices(raw: Mapping[str, Any]) -> object:
    value = raw.get("value")
    return value.get("choices") if raw.get("type") == "choices" and isinstance(value, Mapping) else None


def _shape(raw: Mapping[str, Any], size: tuple[int, int], place: str, *, crowd: bool) -> LabeledObject:
    kind, value = raw["type"], raw["value"]
    labels = value.get(kind)
    if not isinstance(labels, list) or not labels or not isinstance(labels[0], str) or not labels[0]:
        raise ValueError(f"it has no label in {kind}")
    label = labels[0]
    said = (raw.get("original_height"), raw.get("original_width"))
    if None not in said and said != size:
        got, wanted = (f"{width} x {height}" for height, width in (said, size))
        raise ValueError(f"it was drawn on {got} pixels, the image has {wanted}")
    scale = (size[1] / 100, size[0] / 100)
    if kind == "brushlabels":
        return LabeledObject(label, None, encode_masks(_brush(value, size)[None])[0], crowd, line=place)
    if kind == "polygonlabels":
        points = np.array(value["points"], dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise ValueError(f"a polygon needs 3 or more points x, y, got the shape {points.shape}")
        return LabeledObject(label, None, [(points * scale).round(3).ravel().tolist()], crowd, line=place)
    x, y = float(value["x"]) * scale[0], float(value["y"]) * scale[1]
    angle = float(value.get("rotation") or 0)
    if kind == "ellipselabels":
        rx, ry = float(value["radiusX"]) * scale[0], float(value["radiusY"]) * scale[1]
        return LabeledObject(label, None, [ellipse((x, y), (rx, ry), angle)], crowd, line=place)
    width, height = float(value["width"]) * scale[0], float(value["height"]) * scale[1]
    if angle:  # around the upper left corner
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        return LabeledObject(label, None, [turned(corners, angle, (x, y))], crowd, line=place)
    box = (round(x, 3), round(y, 3), round(width, 3), round(height, 3))
    return LabeledObject(label, box, None, crowd, line=place)


def _brush(value: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode the mask of a brush, the alpha channel of its image."""
    if value.get("format") != "rle" or not isinstance(value.get("rle"), list):
        raise ValueError("a brush needs format rle and a list of bytes")
    try:
        content = np.array(value["rle"], dtype=np.uint8)
    except (OverflowError, ValueError):
        raise ValueError("the rle of a brush has values that are not bytes") from None
    values = unpack_runs(content, size[0] * size[1] * 4)
    return values.reshape(*size, 4)[:, :, 3] > 127


def unpack_runs(content: NDArray[np.uint8], expected: int) -> NDArray[np.uint8]:
    """Unpack the run lengths of thi.ng/rle-pack.

    The header has the number of values in 32 bits, their width - 1 in 5 bits, and the widths - 1 of run lengths in
    4 x 4 bits. Each block has a bit (1: one repeated value, 0: single values), 2 bits that select the width of its
    length - 1, and the value or values.

    Args:
        content: The bytes.
        expected: The expected number of values.

    Raises:
        ValueError: If the content is malformed.
    """
    bits = "".join(map("{:08b}".format, content.tolist()))
    if len(bits) < 53:
        raise ValueError("the rle of a brush is truncated")
    total = int(bits[:32], 2)
    if total != expected:
        raise ValueError(f"the rle of a brush holds {total} values, the image needs {expected}")
    word = int(bits[32:37], 2) + 1
    lengths = [int(bits[start : start + 4], 2) + 1 for start in range(37, 53, 4)]
    position = 53
    values = np.zeros(total, dtype=np.uint8)
    done = 0
    while done < total:
        repeated = bits[position : position + 1] == "1"
        width = lengths[int(bits[position + 1 : position + 3] or "0", 2)]
        position += 3
        if position + width > len(bits):
            raise ValueError("the rle of a brush is truncated")
        count = int(bits[position : position + width], 2) + 1
        position += width
        for _ in range(1 if repeated else count):
            value = int(bits[position : position + word] or "0", 2)
            position += word
            values[done : done + (count if repeated else 1)] = value
            done += count if repeated else 1
    if position > len(bits):
        raise ValueError("the rle of a brush is truncated")
    return values


def pack_runs(values: NDArray[np.uint8], repeats: int = 1) -> list[int]:
    """Pack values, the inverse of :func:`unpack_runs`.

    Args:
        values: The values.
        repeats: Repetitions of each value, such as 4 for the equal channels of an image.

    Returns:
        Bytes.

    Example:
        >>> values = np.repeat(np.array([0, 255, 0], np.uint8), [40, 8, 16])
        >>> bool((unpack_runs(np.array(pack_runs(values), np.uint8), 64) == values).all())
        True
    """
    widths = (3, 4, 8, 16)
    parts = [f"{len(values) * repeats:032b}", f"{7:05b}", *(f"{width - 1:04b}" for width in widths)]
    edges = np.concatenate([[0], 1 + np.flatnonzero(values[1:] != values[:-1])])
    lengths = np.diff(edges, append=len(values)) * repeats
    for start, length in zip(edges.tolist(), lengths.tolist(), strict=True):
        while length:
            count = min(length, 1 << 16)
            choice = next(index for index, width in enumerate(widths) if count <= 1 << width)
            parts.append(f"1{choice:02b}{count - 1:0{widths[choice]}b}{values[start]:08b}")
            length -= count
    text = "".join(parts)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]
