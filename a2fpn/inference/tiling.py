"""Large images in tiles that overlap: where they lie, and how what they show becomes one result.

Shape shorthand: ``n`` detections. A window is ``(x0, y0, x1, y1)`` in whole pixels of the image, ends excluded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle

Window = tuple[int, int, int, int]
SAME = 0.5
"""Share of overlap from which two detections of different tiles are one object."""

_COVERED = 0.9  # share of a part without an equal from which it belongs to the one that covers it
_MARGIN = 1 / 128  # of a tile: a box that ends this close to its border may go on behind it


@dataclass(frozen=True, eq=False)
class TileDetections:
    """Detections of one tile, in pixels of the image.

    Args:
        window: The tile.
        boxes: ``(n, 4)`` float32 xyxy.
        scores: ``(n,)`` float32.
        labels: ``(n,)`` int64.
        rles: A mask of the image's size per detection, or None without masks.
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
        tile: Side of a tile, pixels; smaller sides of the image are covered by one.
        overlap: Least share of a tile that the next one shows too. Objects up to this size are whole in some tile.

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
    """Detections of all tiles as those of one image, without duplicates, best first.

    Two detections of one class from two tiles are compared in the part of the image that both tiles show, by their
    masks, or by their boxes where there are none. They are the same object if their IoU is at least :data:`SAME`. One
    that is cut off by its tile's border is also the same as a whole one that covers that share of it, and as a cut one
    that covers nearly all of it, if nothing resembles it more. Of the same object the best whole detection stays.
    Where there is none, since the object is larger than the overlap, its parts become one: the union of boxes and
    masks, with the best score.

    Args:
        tiles: The detections of every tile.
        size: Height and width of the image, pixels.

    Returns:
        The detections, with the whole image as their window.
    """
    whole = np.concatenate([~_is_cut(tile, size) for tile in tiles])
    merged = TileDetections(
        (0, 0, size[1], size[0]),
        np.concatenate([tile.boxes for tile in tiles]),
        np.concatenate([tile.scores for tile in tiles]),
        np.concatenate([tile.labels for tile in tiles]),
        None if tiles[0].rles is None else tuple(rle for tile in tiles for rle in tile.rles or ()),
    )
    offsets = np.cumsum([0, *(len(tile.scores) for tile in tiles)])
    same: dict[int, set[int]] = {row: set() for row in range(len(merged.scores))}
    for (a, first), (b, second) in itertools.combinations(enumerate(tiles), 2):
        for i, j in _same_objects(first, second, whole[offsets[a] :], whole[offsets[b] :], size):
            same[offsets[a] + i].add(offsets[b] + j)
            same[offsets[b] + j].add(offsets[a] + i)
    boxes, scores, labels, rles = [], [], [], []
    for group in _groups(same):
        for part in _one_of_each(group, whole, merged.scores, same):
            boxes.append(np.concatenate([merged.boxes[part, :2].min(0), merged.boxes[part, 2:].max(0)]))
            scores.append(merged.scores[part].max())
            labels.append(merged.labels[part[0]])
            if merged.rles is not None:
                rles.append(_union([merged.rles[row] for row in part]))
    order = np.argsort(-np.array(scores, dtype=np.float32), kind="stable")
    return TileDetections(
        merged.window,
        np.array(boxes, dtype=np.float32).reshape(-1, 4)[order],
        np.array(scores, dtype=np.float32)[order],
        np.array(labels, dtype=np.int64)[order],
        None if merged.rles is None else tuple(rles[row] for row in order),
    )


def _is_cut(tile: TileDetections, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which boxes touch a border of the tile that is not the image's."""
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
    size: tuple[int, int],
) -> Iterator[tuple[int, int]]:
    """Rows of detections of two tiles that are the same object."""
    common = (
        *(max(a, b) for a, b in zip(first.window[:2], second.window[:2], strict=True)),
        *(min(a, b) for a, b in zip(first.window[2:], second.window[2:], strict=True)),
    )
    if common[0] >= common[2] or common[1] >= common[3]:
        return
    rows, columns = (_inside(tile.boxes, common) for tile in (first, second))
    if not len(rows) or not len(columns):
        return
    a, b = (_cut_out(tile, kept, common, size) for tile, kept in ((first, rows), (second, columns)))
    iou = np.asarray(mask_utils.iou(a, b, [False] * len(b)))
    of_first = np.asarray(mask_utils.iou(a, b, [True] * len(b)))  # a crowd's IoU: intersection over the first's area
    of_second = np.asarray(mask_utils.iou(b, a, [True] * len(a))).T
    whole_a, whole_b = first_whole[rows][:, None], second_whole[columns][None]
    share = np.where(whole_a == whole_b, iou, np.where(whole_a, of_second, of_first))
    one_class = first.labels[rows][:, None] == second.labels[columns][None]
    same = (share >= SAME) & one_class
    covered = (of_first >= _COVERED) & ~same.any(1)[:, None] | (of_second >= _COVERED) & ~same.any(0)[None]
    same |= covered & one_class & ~whole_a & ~whole_b
    yield from ((int(rows[i]), int(columns[j])) for i, j in np.argwhere(same))


def _inside(boxes: NDArray[np.float32], window: Sequence[int]) -> NDArray[np.intp]:
    """Rows of the boxes that have a part inside a window."""
    x0, y0, x1, y1 = window
    return np.flatnonzero((boxes[:, 0] < x1) & (boxes[:, 1] < y1) & (boxes[:, 2] > x0) & (boxes[:, 3] > y0))


def _cut_out(
    tile: TileDetections, rows: NDArray[np.intp], window: Sequence[int], size: tuple[int, int]
) -> list[Rle] | NDArray[np.float64]:
    """The parts of masks, or of boxes (x, y, width, height), inside a window."""
    x0, y0, x1, y1 = map(float, window)
    if tile.rles is None:
        low = np.maximum(tile.boxes[rows, :2], [x0, y0])
        high = np.minimum(tile.boxes[rows, 2:], [x1, y1])
        return np.concatenate([low, high - low], 1).astype(np.float64)
    (frame,) = mask_utils.frPyObjects([[x0, y0, x1, y0, x1, y1, x0, y1]], *size)
    return [mask_utils.merge([tile.rles[row], frame], intersect=True) for row in rows]


def _groups(same: dict[int, set[int]]) -> Iterator[list[int]]:
    """Detections that are the same object, directly or through others."""
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
    """The rows that make up each object of a group: the best whole ones, or all parts together."""
    kept: list[int] = []
    for row in sorted((row for row in group if whole[row]), key=lambda row: (-scores[row], row)):
        # A part may have joined two objects, each of which is whole in another tile.
        if not same[row] & set(kept):
            kept.append(row)
    yield from ([row] for row in kept) if kept else [group]


def _union(rles: Sequence[Rle]) -> Rle:
    if len(rles) == 1:
        return rles[0]
    union = mask_utils.merge(list(rles))
    return Rle(size=[int(side) for side in union["size"]], counts=union["counts"].decode("ascii"))
