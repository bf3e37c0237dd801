"""Masks kept small: polygons and run lengths in, COCO run lengths (RLE) out, without full-size canvases.

Shape shorthand: ``N`` objects, ``H`` x ``W`` image pixels, ``M`` x ``M`` mask cells inside a box. An RLE
holds the mask of one object; its runs go down the columns, as in the COCO format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.heads.paste import PasteRule, mask_windows

_COORDINATE_LIMIT = 1e6  # pycocotools counts polygon steps in 32-bit integers and allocates one per pixel walked


class Rle(TypedDict):
    """One mask in COCO's compressed form.

    Attributes:
        size: ``[H, W]``.
        counts: The compressed run lengths, ASCII; JSON-able.
    """

    size: list[int]
    counts: str


@dataclass(frozen=True, eq=False)
class Polygons:
    """One mask as polygons, which together are the object.

    Args:
        points: Each ``(K, 2)`` float64, x and y in pixels; at least 3 points.
        size: (H, W) of the image.
    """

    points: tuple[NDArray[np.float64], ...]
    size: tuple[int, int]

    def to_rle(self) -> Rle:
        """The pixels that pycocotools finds inside."""
        flat = [points.reshape(-1) for points in self.points]
        return _as_text([mask_utils.merge(mask_utils.frPyObjects(flat, *self.size))])[0]


def encode_masks(masks: Tensor | NDArray[Any]) -> list[Rle]:
    """Encodes full-size masks.

    Args:
        masks: (N, H, W), bool or numbers; every value but 0 belongs to the object.

    Returns:
        N run-length encodings.

    Raises:
        ValueError: If ``masks`` has not three dimensions.

    Example:
        >>> encode_masks(np.eye(3)[None])
        [{'size': [3, 3], 'counts': '013000'}]
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must have the shape (N, H, W), got {tuple(masks.shape)}.")
    array = np.asarray(masks.detach().cpu() if isinstance(masks, Tensor) else masks)
    return _as_text(mask_utils.encode(np.asfortranarray((array != 0).transpose(1, 2, 0), dtype=np.uint8)))


def decode_rle(rles: Sequence[Rle], *, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """Decodes masks of one image.

    Args:
        rles: N encodings of one size.
        size: (H, W) of the result where ``rles`` is empty; (0, 0) if not given.

    Returns:
        (N, H, W) bool. The memory runs down the columns; ``np.ascontiguousarray`` makes rows contiguous.

    Example:
        >>> decode_rle(encode_masks(np.eye(3)[None]))[0].astype(int)
        array([[1, 0, 0],
               [0, 1, 0],
               [0, 0, 1]])
        >>> decode_rle([], size=(480, 640)).shape
        (0, 480, 640)
    """
    height, width = rles[0]["size"] if rles else size or (0, 0)
    columns = np.zeros((len(rles), width * height), dtype=np.bool_)
    for mask, rle in zip(columns, rles, strict=True):
        # Only from the first to the last pixel: the rest of the memory is never touched, which makes hundreds
        # of small objects in a large image tens of times faster than pycocotools' decode.
        start, body = _body(rle)
        mask[start : start + len(body)] = body
    masks: NDArray[np.bool_] = columns.reshape(len(rles), width, height).transpose(0, 2, 1)
    return masks


def decode_window(rle: Rle) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Decodes a mask in the smallest window around it.

    Returns:
        (h, w) uint8 in {0, 1}, and the window's left, top, right and bottom, the last two behind its pixels.

    Example:
        >>> decode_window(encode_masks(np.eye(4)[None, :3])[0])
        (array([[1, 0, 0],
               [0, 1, 0],
               [0, 0, 1]], dtype=uint8), (0, 0, 3, 3))
    """
    height = rle["size"][0]
    start, body = _body(rle)
    if not len(body):
        return np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
    left, right = start // height, -(-(start + len(body)) // height)
    columns = np.zeros((right - left, height), np.uint8)
    columns.reshape(-1)[start - left * height :][: len(body)] = body
    rows = np.flatnonzero(columns.any(0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return columns.T[top:bottom], (left, top, right, bottom)


def _body(rle: Rle) -> tuple[int, NDArray[np.bool_]]:
    """The first pixel of a mask, counted down the columns, and the values from there to the last."""
    runs = _run_lengths(rle["counts"].encode())  # of 0, 1, 0, 1, ...
    body = runs[1 : -1 if len(runs) % 2 else None]
    return int(runs[0]), np.repeat(np.arange(len(body)) % 2 == 0, body)


def segmentation_to_rle(segmentation: object, height: int, width: int) -> Rle:
    """Turns a COCO ``segmentation`` into one RLE, after checks that pycocotools leaves out.

    pycocotools reads stray memory, or never returns, on run lengths that don't fill the image, and takes
    a list of four numbers for a box. Both are errors here.

    Args:
        segmentation: Polygons ``[[x0, y0, x1, y1, x2, y2, ...], ...]`` in pixels (all of them together are
            one object), or ``{"size": [H, W], "counts": ...}`` with compressed (text) or uncompressed
            (list of integers) run lengths.
        height: Image height, pixels.
        width: Image width, pixels.

    Raises:
        ValueError: If the value is none of these or doesn't fit the image.

    Example:
        >>> square = [[1, 1, 3, 1, 3, 3, 1, 3]]
        >>> decode_rle([segmentation_to_rle(square, 4, 4)])[0].astype(int)
        array([[0, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]])
        >>> segmentation_to_rle({"size": [4, 4], "counts": [5, 2]}, 4, 4)
        Traceback (most recent call last):
        ...
        ValueError: the run lengths of the mask add up to 7 pixels, the image has 4 x 4 = 16
    """
    mask = parse_segmentation(segmentation, height, width)
    return mask.to_rle() if isinstance(mask, Polygons) else mask


def parse_segmentation(segmentation: object, height: int, width: int) -> Polygons | Rle:
    """Checks a COCO ``segmentation`` as :func:`segmentation_to_rle` does, and leaves polygons what they are.

    Raises:
        ValueError: As there.
    """
    if isinstance(segmentation, Mapping):
        return _checked_rle(segmentation, height, width)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not segmentation:
        raise ValueError(f"a segmentation is a list of polygons or an RLE, got {_shorten(segmentation)}")
    return Polygons(tuple(_checked_polygon(polygon) for polygon in segmentation), (height, width))


def encode_box_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5, rule: PasteRule = "exact"
) -> list[Rle]:
    """Encodes masks predicted inside boxes, bit for bit as pasting them into the image and encoding that.

    The same result as ``paste_masks``, ``> threshold`` and pycocotools' ``encode``, in time and memory of the boxes,
    not of N images. A box outside the image gives an empty mask.

    Args:
        masks: (N, 1, M, M) float probabilities inside each box, any device.
        boxes: (N, 4) float xyxy, image pixels.
        size: (H, W) of the image, pixels.
        threshold: A pixel belongs to the object if its probability is above this, in [0, 1).
        rule: How mask cells become pixels, see :func:`a2fpn.heads.mask_windows`.

    Returns:
        N encodings of the image's size.

    Raises:
        ValueError: For a threshold or rule out of range, or shapes that don't fit each other.

    Example:
        >>> import torch
        >>> probabilities, boxes = torch.ones(2, 1, 28, 28), torch.tensor([[10.0, 20.0, 50.0, 60.0]] * 2)
        >>> rles = encode_box_masks(probabilities, boxes, (480, 640))
        >>> decode_rle(rles).shape, int(decode_rle(rles)[0].sum())
        ((2, 480, 640), 1600)
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}.")
    windows = mask_windows(masks.detach().float().cpu(), boxes.detach().float().cpu(), size, rule=rule)
    runs = [
        {"size": list(size), "counts": _window_runs((window > threshold).numpy(), top, left, *size)}
        for window, top, left in windows
    ]
    return _as_text(mask_utils.frPyObjects(runs, *size)) if runs else []


def _window_runs(window: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> NDArray[np.int64]:
    """Returns the run lengths of a mask that is empty but for an (h, w) window."""
    # One empty row under the window ends every run within its column, so that each run has a start and an end.
    rows = window.shape[0] + 1
    columns = np.zeros((window.shape[1], rows), dtype=np.int8)
    columns[:, :-1] = window.T
    column, row = np.divmod(np.flatnonzero(np.diff(columns.ravel(), prepend=np.int8(0))), rows)
    edges = (column + left) * height + row + top
    # Where the window is as high as the image, a run may go on at the top of the next column: join the two.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate((joined, joined + 1)))
    runs = np.diff(edges, prepend=0, append=height * width)
    return runs[:-1] if len(edges) and runs[-1] == 0 else runs


def _checked_polygon(polygon: object) -> NDArray[np.float64]:
    try:
        points: NDArray[np.float64] = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.empty(0)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon is a list of at least 3 points x, y, x, y, ..., got {_shorten(polygon)}")
    if not (np.abs(points) < _COORDINATE_LIMIT).all():  # also true for NaN
        raise ValueError(f"a polygon has a coordinate that is no pixel position: {_shorten(polygon)}")
    return points.reshape(-1, 2)


def _checked_rle(segmentation: Mapping[str, Any], height: int, width: int) -> Rle:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"the mask's size is {size!r}, the image's [height, width] is {[height, width]}")
    if isinstance(counts, (str, bytes)):
        text = counts if isinstance(counts, bytes) else counts.encode()
        total = int(_run_lengths(text).sum())
        rle = Rle(size=[height, width], counts=text.decode("ascii"))
    elif isinstance(counts, Sequence) and all(isinstance(run, int) and run >= 0 for run in counts):
        total = sum(counts)
        rle = None
    else:
        raise ValueError(f"the counts of an RLE are text or a list of run lengths, got {_shorten(counts)}")
    if total != height * width:
        raise ValueError(
            f"the run lengths of the mask add up to {total} pixels, the image has {height} x {width} = {height * width}"
        )
    return (
        rle or _as_text([mask_utils.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)])[0]
    )


def _run_lengths(counts: bytes) -> NDArray[np.int64]:
    """Returns the runs in COCO's compressed text, which nothing in pycocotools tells.

    Each number is written in base 32, lowest digit first, one character per digit from ``chr(48)`` on, bit
    5 set on all but the last digit, whose bit 4 is the sign. From the fourth number on it is the
    difference to the number before the last.

    Raises:
        ValueError: If ``counts`` is no such text or holds a negative run.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    if not len(digits) or digits.min() < 0 or digits.max() >= 64 or not last[-1]:
        raise ValueError(f"the counts {_shorten(counts)} are no compressed RLE")
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    if place.max() > 6:  # 35 bits: more than any run of a mask
        raise ValueError(f"the counts {_shorten(counts)} are no compressed RLE")
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= ((digits[ends] & 16) != 0) * (np.int64(1) << (5 * lengths))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0:
        raise ValueError(f"the counts {_shorten(counts)} hold a negative run length")
    return values


def _as_text(rles: Sequence[Mapping[str, Any]]) -> list[Rle]:
    return [Rle(size=[int(side) for side in rle["size"]], counts=rle["counts"].decode("ascii")) for rle in rles]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
