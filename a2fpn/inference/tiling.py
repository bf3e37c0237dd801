"""Overlapping tiles of large images: their positions, and merging of their detections.

Shape shorthand: ``n`` detections. A window is ``(x0, y0, x1, y1)`` in whole pixels of the image, ends exclusive.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.slides import Window
from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle, decode_windows, encode_window

SAME = 0.5
"""Minimum overlap of two detections of different tiles that are the same object."""

_COVERED = 0.9  # minimum share of an unmatched part that is covered by the detection it belongs to
_MARGIN = 1 / 128  # of a tile: a box that ends this close to its border may be truncated


@dataclass(frozen=True, eq=False)
class TileDetections:
    """Detections of one tile, in pixels of the image.

    Args:
        window: The tile.
        boxes: ``(n, 4)`` float32 xyxy.
        scores: ``(n,)`` float32.
        labels: ``(n,)`` int64.
        rles: A mask of the tile's size per detection, or None without masks.
    """

    window: Window
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    rles: tuple[Rle, ...] | None = None


def tile_windows(size: tuple[int, int], tile: int, overlap: float = 0.2) -> list[Window]:
    """Windows that cover an image, row by row, as evenly as possible.

    Args:
        size: Height and width of the image, pixels.
        tile: Side of a tile, pixels; smaller sides of the image are covered by one tile.
        overlap: Minimum share of a tile that overlaps the next. Objects up to this size are whole in some tile.

    Raises:
        ValueError: For a tile below 16 pixels or an overlap outside [0, 0.9].

    Example:
        >>> tile_windows((100, 180), 100, 0.2)
        [(0, 0, 100, 100), (80, 0, 180, 100)]
    """
    if tile < 16:
        raise ConfigError(f"tile must be at least 16 pixels, got {tile}.")
    if not 0 <= overlap <= 0.9:
        raise ConfigError(f"overlap must be between 0 and 0.9 of a tile, got {overlap}.")
    rows, columns = (_starts(side, tile, overlap) for side in size)
    height, width = (min(side, tile) for side in size)
    return [(x, y, x + width, y + height) for y, x in itertools.product(rows, columns)]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one side."""
    rest = max(0, side - tile)
    steps = -(-rest // max(1, int(tile * (1 - overlap))))
    return [round(rest * step / steps) for step in range(steps)] + [rest]


def merge_tiles(tiles: Sequence[TileDetections], size: tuple[int, int]) -> TileDetections:
    """Merge the detections of all tiles, without duplicates, by descending score.

    Two detections of one class from two tiles are compared in the overlap of the tiles, by their masks, or by their
    boxes without masks. They are the same object if their IoU is at least :data:`SAME`. A detection truncated by its
    tile's border is also the same as a whole one that covers that share of it, and as a truncated one that covers
    nearly all of it, if it has no other match. Of detections of the same object the best whole one is kept. If all are
    truncated, since the object is larger than the overlap, they are merged: the union of boxes and masks, with the
    best score.

    Args:
        tiles: The detections of every tile.
        size: Height and width of the image, pixels.

    Returns:
        The detections, with the whole image as their window.
    """
    offsets = np.cumsum([0, *(len(tile.scores) for tile in tiles)]).tolist()
    whole = np.concatenate([~_is_cut(tile, size) for tile in tiles])
    same: dict[int, set[int]] = {}
    for a, b in _neighbors([tile.window for tile in tiles]):
        for i, j in _same_objects(tiles[a], tiles[b], whole[offsets[a] :], whole[offsets[b] :]):
            same.setdefault(offsets[a] + i, set()).add(offsets[b] + j)
            same.setdefault(offsets[b] + j, set()).add(offsets[a] + i)
    scores = np.concatenate([tile.scores for tile in tiles])
    objects = [[row] for row in range(len(scores)) if row not in same]
    for group in _groups(same):
        objects += _one_of_each(group, whole, scores, same)
    best = np.array([scores[rows].max() for rows in objects], dtype=np.float32)
    objects = [objects[number] for number in np.argsort(-best, kind="stable")]
    boxes = np.concatenate([tile.boxes for tile in tiles])
    labels = np.concatenate([tile.labels for tile in tiles])
    ends = [(boxes[rows, :2].min(0), boxes[rows, 2:].max(0)) for rows in objects]
    return TileDetections(
        (0, 0, size[1], size[0]),
        np.array([np.concatenate(corners) for corners in ends], dtype=np.float32).reshape(-1, 4),
        -np.sort(-best),
        np.array([labels[rows[0]] for rows in objects], dtype=np.int64),
        None if any(tile.rles is None for tile in tiles) else _joined_masks(tiles, offsets, objects, size),
    )


def _neighbors(windows: Sequence[Window]) -> Iterator[tuple[int, int]]:
    """Yield pairs of windows that overlap."""
    order = sorted(range(len(windows)), key=lambda number: windows[number][1])
    for place, a in enumerate(order):
        for b in itertools.islice(order, place + 1, None):
            if windows[b][1] >= windows[a][3]:
                break
            if windows[a][0] < windows[b][2] and windows[b][0] < windows[a][2]:
                yield min(a, b), max(a, b)


def _is_cut(tile: TileDetections, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask of boxes that touch a border of the tile inside the image."""
    x0, y0, x1, y1 = tile.window
    margin = max(x1 - x0, y1 - y0) * _MARGIN
    inner = np.array([x0 > 0, y0 > 0, x1 < size[1], y1 < size[0]])
    distance = np.abs(tile.boxes - np.array(tile.window, dtype=np.float32))
    cut: NDArray[np.bool_] = ((distance <= margin) & inner).any(1)
    return cut


def _same_objects(
    first: TileDetections,
    second: TileDetections,
    first_whole: NDArray[np.bool_],
    second_whole: NDArray[np.bool_],
) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows of two tiles' detections that are the same object."""
    common = (
        *(max(a, b) for a, b in zip(first.window[:2], second.window[:2], strict=True)),
        *(min(a, b) for a, b in zip(first.window[2:], second.window[2:], strict=True)),
    )
    rows, columns = (_inside(tile.boxes, common) for tile in (first, second))
    if not len(rows) or not len(columns):
        return
    both, area_a, area_b = _overlaps(first, second, rows, columns, common)
    of_first, of_second = both / np.maximum(area_a, 1e-9)[:, None], both / np.maximum(area_b, 1e-9)[None]
    iou = both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-9)
    whole_a, whole_b = first_whole[rows][:, None], second_whole[columns][None]
    share = np.where(whole_a == whole_b, iou, np.where(whole_a, of_second, of_first))
    one_class = first.labels[rows][:, None] == second.labels[columns][None]
    same = (share >= SAME) & one_class
    covered = (of_first >= _COVERED) & ~same.any(1)[:, None] | (of_second >= _COVERED) & ~same.any(0)[None]
    same |= covered & one_class & ~whole_a & ~whole_b
    yield from ((int(rows[i]), int(columns[j])) for i, j in np.argwhere(same))


def _inside(boxes: NDArray[np.float32], window: Sequence[int]) -> NDArray[np.intp]:
    """Rows of the boxes that overlap a window."""
    x0, y0, x1, y1 = window
    return np.flatnonzero((boxes[:, 0] < x1) & (boxes[:, 1] < y1) & (boxes[:, 2] > x0) & (boxes[:, 3] > y0))


def _overlaps(
    first: TileDetections,
    second: TileDetections,
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    window: Sequence[int],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Intersections (n, m) and areas (n,), (m,) of the detections of two tiles inside a window."""
    x0, y0, x1, y1 = window
    a, b = (
        np.concatenate([np.maximum(boxes[:, :2], [x0, y0]), np.minimum(boxes[:, 2:], [x1, y1])], 1).astype(np.float64)
        for boxes in (first.boxes[rows], second.boxes[columns])
    )
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    both = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - low).clip(min=0).prod(2)
    if first.rles is None or second.rles is None:
        return both, (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    masks_a, masks_b = (_cut_out(tile, kept, window) for tile, kept in ((first, rows), (second, columns)))
    for i, j in np.argwhere(both > 0):
        both[i, j] = _common_pixels(masks_a[i], masks_b[j])
    return both, *(np.array([mask.pixels.sum() for mask in masks], np.float64) for masks in (masks_a, masks_b))


class _Mask(NamedTuple):
    """Pixels of an object, (h, w) in {0, 1}, with their first column and row in the image."""

    pixels: NDArray[np.uint8]
    left: int
    top: int


def _cut_out(tile: TileDetections, rows: NDArray[np.intp], window: Sequence[int]) -> list[_Mask]:
    """Crop masks to a window."""
    return [_crop(mask, window) for mask in _masks(tile, rows.tolist())]


def _masks(tile: TileDetections, rows: Sequence[int]) -> Iterator[_Mask]:
    x0, y0 = tile.window[:2]
    for pixels, (left, top, _, _) in decode_windows([(tile.rles or ())[row] for row in rows]):
        yield _Mask(pixels, x0 + left, y0 + top)


def _crop(mask: _Mask, window: Sequence[int]) -> _Mask:
    left, top = max(mask.left, window[0]), max(mask.top, window[1])
    part = mask.pixels[top - mask.top : max(0, window[3] - mask.top), left - mask.left : max(0, window[2] - mask.left)]
    return _Mask(part, left, top)


def _common_pixels(a: _Mask, b: _Mask) -> int:
    window = (b.left, b.top, b.left + b.pixels.shape[1], b.top + b.pixels.shape[0])
    part = _crop(a, window)
    if not part.pixels.size:
        return 0
    height, width = part.pixels.shape
    top, left = part.top - b.top, part.left - b.left
    return int((part.pixels & b.pixels[top : top + height, left : left + width]).sum())


def _joined_masks(
    tiles: Sequence[TileDetections], offsets: Sequence[int], objects: Sequence[Sequence[int]], size: tuple[int, int]
) -> tuple[Rle, ...]:
    """Masks of the image's size, each the union of an object's rows."""
    owner = {row: number for number, rows in enumerate(objects) for row in rows}
    parts: dict[int, list[_Mask]] = {}
    joined: list[Rle] = [Rle(size=list(size), counts="")] * len(objects)
    for tile, offset in zip(tiles, offsets[:-1], strict=True):
        kept = [row for row in range(len(tile.scores)) if offset + row in owner]
        for row, mask in zip(kept, _masks(tile, kept), strict=True):
            number = owner[offset + row]
            parts.setdefault(number, []).append(mask)
            if len(parts[number]) == len(objects[number]):
                joined[number] = _union(parts.pop(number), size)
    return tuple(joined)


def _union(masks: Sequence[_Mask], size: tuple[int, int]) -> Rle:
    shown = [mask for mask in masks if mask.pixels.size]
    if not shown:
        return encode_window(np.zeros((0, 0), np.bool_), 0, 0, size)
    if len(shown) == 1:
        return encode_window(shown[0].pixels > 0, shown[0].top, shown[0].left, size)
    left, top = min(mask.left for mask in shown), min(mask.top for mask in shown)
    right = max(mask.left + mask.pixels.shape[1] for mask in shown)
    bottom = max(mask.top + mask.pixels.shape[0] for mask in shown)
    canvas = np.zeros((bottom - top, right - left), np.bool_)
    for mask in shown:
        height, width = mask.pixels.shape
        canvas[mask.top - top : mask.top - top + height, mask.left - left : mask.left - left + width] |= mask.pixels > 0
    return encode_window(canvas, top, left, size)


def _groups(same: dict[int, set[int]]) -> Iterator[list[int]]:
    """Yield connected components of detections that are the same object."""
    seen: set[int] = set()
    for start in same:
        if start not in seen:
            group, waiting = [], [start]
            seen.add(start)
            while waiting:
                row = waiting.pop()
                group.append(row)
                waiting += same[row] - seen
                seen |= same[row]
            yield group


def _one_of_each(
    group: list[int], whole: NDArray[np.bool_], scores: NDArray[np.float32], same: dict[int, set[int]]
) -> Iterator[list[int]]:
    """Yield the rows of each object in a group: the best whole detections, or all truncated ones together."""
    kept: list[int] = []
    for row in sorted((row for row in group if whole[row]), key=lambda row: (-scores[row], row)):
        # A truncated detection may have connected two objects that are whole in other tiles.
        if not same[row] & set(kept):
            kept.append(row)
    yield from ([row] for row in kept) if kept else [group]
