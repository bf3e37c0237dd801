"""COCO run-length encodings (RLE) of masks, without full-size canvases.

Shape shorthand: ``N`` objects, ``H`` x ``W`` image pixels, ``M`` x ``M`` mask cells inside a box. An RLE
holds the mask of one object in column-major order, as in the COCO format.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.masks.paste import PasteRule, mask_windows

_PASS = 1 << 16  # characters decoded at once, in a few MB


class Rle(TypedDict):
    """One mask in COCO's compressed form.

    Attributes:
        size: ``[H, W]``.
        counts: The compressed run lengths, ASCII text.
    """

    size: list[int]
    counts: str


def encode_masks(masks: Tensor | NDArray[Any]) -> list[Rle]:
    """Encode full-size masks.

    Args:
        masks: (N, H, W), bool or numbers; nonzero is foreground.

    Returns:
        N run-length encodings.

    Raises:
        ValueError: If ``masks`` does not have three dimensions.

    Example:
        >>> encode_masks(np.eye(3)[None])
        [{'size': [3, 3], 'counts': '013000'}]
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must have the shape (N, H, W), got {tuple(masks.shape)}.")
    array = np.asarray(masks.detach().cpu() if isinstance(masks, Tensor) else masks)
    return as_text(mask_utils.encode(np.asfortranarray((array != 0).transpose(1, 2, 0), dtype=np.uint8)))


def decode_rle(rles: Sequence[Rle], *, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """Decode masks of one image.

    Args:
        rles: N encodings of one size.
        size: (H, W) of the result if ``rles`` is empty; (0, 0) if not given.

    Returns:
        (N, H, W) bool, each mask column-major in memory; ``np.ascontiguousarray`` makes it row-major.

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
    for mask, runs in zip(columns, _decoded(rles), strict=True):
        # Writes only from the first to the last pixel of the object, which for hundreds of small objects in a large
        # image is tens of times faster than pycocotools' decode.
        start, body = _body(runs)
        mask[start : start + len(body)] = body
    masks: NDArray[np.bool_] = columns.reshape(len(rles), width, height).transpose(0, 2, 1)
    return masks


def decode_window(rle: Rle) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Decode a mask to its tight window.

    Returns:
        (h, w) uint8 in {0, 1}, and the window's left, top, right and bottom, the last two exclusive.

    Example:
        >>> decode_window(encode_masks(np.eye(4)[None, :3])[0])
        (array([[1, 0, 0],
               [0, 1, 0],
               [0, 0, 1]], dtype=uint8), (0, 0, 3, 3))
    """
    return next(decode_windows([rle]))


def decode_windows(rles: Sequence[Rle]) -> Iterator[tuple[NDArray[np.uint8], tuple[int, int, int, int]]]:
    """Decode many masks like :func:`decode_window`, in a fraction of the time."""
    for rle, runs in zip(rles, _decoded(rles), strict=True):
        height = rle["size"][0]
        edges = runs.cumsum()
        starts, stops = edges[: len(edges) // 2 * 2 : 2], edges[1::2]
        if (starts == stops).any():
            starts, stops = starts[starts < stops], stops[starts < stops]
        if not len(starts):
            yield np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
            continue
        column, row = np.divmod(starts, height)
        last_column, last_row = np.divmod(stops - 1, height)
        left, right = int(column[0]), int(last_column[-1]) + 1
        # A run that continues in the next column covers both the last and the first row.
        tall = bool((column < last_column).any())
        top, bottom = (0, height) if tall else (int(row.min()), int(last_row.max()) + 1)
        rows = bottom - top
        steps = np.zeros((right - left) * rows + 1, np.int8)
        steps[(column - left) * rows + row - top] = 1
        steps[(last_column - left) * rows + last_row - top + 1] -= 1
        window = steps[:-1].cumsum(dtype=np.int8).view(np.uint8).reshape(right - left, rows).T
        yield window, (left, top, right, bottom)


def _body(runs: NDArray[np.int64]) -> tuple[int, NDArray[np.bool_]]:
    """Column-major index of the first pixel of a mask, and the values from there to its last pixel."""
    body = runs[1 : -1 if len(runs) % 2 else None]  # of 1, 0, 1, ...
    return int(runs[0]), np.repeat(np.arange(len(body)) % 2 == 0, body)


def encode_box_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5, rule: PasteRule = "exact"
) -> list[Rle]:
    """Encode masks predicted inside boxes without pasting them into the image.

    The result is identical to ``paste_masks``, ``> threshold`` and pycocotools' ``encode``, in time and memory of the
    boxes, not of N images. A box outside the image gives an empty mask.

    Args:
        masks: (N, 1, M, M) float probabilities inside each box, any device.
        boxes: (N, 4) float xyxy, image pixels.
        size: (H, W) of the image, pixels.
        threshold: Probability above which a pixel is foreground, in [0, 1).
        rule: The pasting method, see :func:`a2fpn.heads.mask_windows`.

    Returns:
        N encodings of the image's size.

    Raises:
        ValueError: For a threshold out of range, an unknown rule, or shapes that don't match.

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
    return as_text(mask_utils.frPyObjects(runs, *size)) if runs else []


def encode_window(window: NDArray[np.bool_], top: int, left: int, size: tuple[int, int]) -> Rle:
    """Encode a mask that is empty outside a window, in time and memory of the window.

    Args:
        window: (h, w) bool.
        top: First row of the window.
        left: First column of the window.
        size: (H, W) of the image, pixels, which contains the window.

    Example:
        >>> decode_window(encode_window(np.ones((1, 2), np.bool_), 1, 2, (4, 5)))
        (array([[1, 1]], dtype=uint8), (2, 1, 4, 2))
    """
    runs = {"size": list(size), "counts": _window_runs(window, top, left, *size)}
    return as_text(mask_utils.frPyObjects([runs], *size))[0]


def _window_runs(window: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> NDArray[np.int64]:
    """Return the run lengths of a mask that is empty outside an (h, w) window."""
    # An empty row below the window ends every run within its column.
    rows = window.shape[0] + 1
    pixels = np.zeros(1 + window.shape[1] * rows, np.bool_)
    pixels[1:].reshape(-1, rows)[:, :-1] = window.T
    column, row = np.divmod((pixels[1:] != pixels[:-1]).nonzero()[0], rows)
    edges = np.zeros(len(row) + 2, np.int64)
    edges[1:-1] = (column + left) * height + row + top
    edges[-1] = height * width
    if window.shape[0] == height:  # a run may continue at the top of the next column: join the two
        joined = np.flatnonzero(edges[2:-2:2] == edges[3:-1:2]) * 2 + 2
        edges = np.delete(edges, np.concatenate((joined, joined + 1)))
    runs = edges[1:] - edges[:-1]
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def _decoded(rles: Sequence[Rle]) -> Iterator[NDArray[np.int64]]:
    """Yield the run lengths of each mask, of 0, 1, 0, 1, ...

    Raises:
        ValueError: For invalid counts.
    """
    texts = [rle["counts"].encode() for rle in rles]
    for part in passes(texts):
        runs, firsts, problems = run_lengths(texts[part])
        if problems:
            raise ValueError(next(iter(problems.values())))
        for start, end in itertools.pairwise([*firsts.tolist(), len(runs)]):
            yield runs[start:end]


def passes(texts: Sequence[bytes]) -> Iterator[slice]:
    """Split texts into chunks of about ``_PASS`` characters, or of one longer text."""
    start = characters = 0
    for end, text in enumerate(texts):
        if characters + len(text) > _PASS and end > start:
            yield slice(start, end)
            start, characters = end, 0
        characters += len(text)
    if texts:
        yield slice(start, len(texts))


def run_lengths(texts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, str]]:
    """Decode COCO's compressed counts to run lengths, which pycocotools does not expose.

    Each number is written in base 32, lowest digit first, one character per digit from ``chr(48)`` on, bit
    5 set on all but the last digit, whose bit 4 is the sign. From the fourth number on it is the
    difference to the number two before it.

    Args:
        texts: At least one.

    Returns:
        The run lengths of all texts concatenated, at least one of each; the start of each text's; and an error message
        by index of each text that is malformed or has a negative run length.
    """
    lengths = np.array([len(text) or 1 for text in texts])
    text_ends = lengths.cumsum() - 1
    text_starts = text_ends - lengths + 1
    # In uint8, characters before chr(48) wrap around to large values, as does the "/" in place of an empty text.
    digits = np.frombuffer(b"".join(text or b"/" for text in texts), dtype=np.uint8) - np.uint8(48)
    last = digits < 32
    damaged = (np.maximum.reduceat(digits, text_starts) >= 64) | ~last[text_ends]
    last[text_ends] = True  # so that no number extends into the next text
    ends = last.nonzero()[0]
    digits_of = ends + 1
    digits_of[1:] -= digits_of[:-1].copy()
    firsts = ends.searchsorted(text_starts)
    damaged |= np.maximum.reduceat(digits_of, firsts) > 7  # 35 bits: more than any run of a mask
    values = ((digits[ends] & 31) ^ 16).astype(np.int64) - 16
    for place in range(1, min(int(digits_of.max()), 7)):
        longer = (digits_of > place).nonzero()[0]
        values[longer] = (values[longer] << 5) | (digits[ends[longer] - place] & 31)

    # Cumulative sums of every other number, except the first of a text: over all texts, minus the sum before each text.
    first_values = values[firsts]
    values[firsts] = 0
    for part in (values[0::2], values[1::2]):
        part.cumsum(out=part)
    if len(texts) > 1:
        counts = np.diff(firsts, append=len(values))
        odd = (np.arange(len(values)) - firsts.repeat(counts)) & 1
        before_odd = np.where(firsts > 0, values[firsts - 1], 0)
        values -= np.where(odd, before_odd.repeat(counts), values[firsts].repeat(counts))
    values[firsts] = first_values

    negative = np.minimum.reduceat(values, firsts) < 0
    problems = {}
    for number in (damaged | negative).nonzero()[0].tolist():
        problem = "are not a compressed RLE" if damaged[number] else "hold a negative run length"
        problems[number] = f"the counts {shorten(texts[number])} {problem}"
    return values, firsts, problems


def as_text(rles: Sequence[Mapping[str, Any]]) -> list[Rle]:
    """Convert pycocotools' encodings to JSON-serializable ones."""
    return [Rle(size=[int(side) for side in rle["size"]], counts=rle["counts"].decode("ascii")) for rle in rles]


def shorten(value: object) -> str:
    """Return a value shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shrunk_masks(rles: Sequence[Rle], side: int, size: tuple[int, int]) -> Iterator[Rle]:
    """Downscale masks by ``side``: sets cells with at least half foreground, or the fullest if there are none."""
    for window, (left, top, right, bottom) in decode_windows(rles):
        first, last = (top // side, left // side), (-(-bottom // side), -(-right // side))
        squares = np.zeros(((last[0] - first[0]) * side, (last[1] - first[1]) * side), np.float32)
        squares[top - first[0] * side :, left - first[1] * side :][: window.shape[0], : window.shape[1]] = window
        share = squares.reshape(last[0] - first[0], side, last[1] - first[1], side).mean((1, 3))
        yield encode_window(share >= min(0.5, share.max(initial=0.0)), *first, size)
