"""Masks before rasterization: augmentation transforms polygons, which scale without loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.masks import InstanceMasks
from a2fpn.masks.rle import Rle, decode_window
from a2fpn.masks.segmentation import Polygons

_Window = tuple[NDArray[np.uint8], tuple[int, int, int, int]]
_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
_NOTHING: _Window = (np.zeros((0, 0), np.uint8), (0, 0, 0, 0))


@dataclass(frozen=True, eq=False)
class Outlines:
    """Masks of one image's objects as polygons if available, else as pixels.

    Has the transforms of :class:`~a2fpn.masks.InstanceMasks`, and is rasterized to them at the final size.

    Args:
        polygons: Polygons of each of N objects, each ``(K, 2)`` x, y; none for an object given as pixels.
        pixels: Masks of the latter, in the transformed image.
        matrix: Affine matrix from the polygons' points to pixels of the transformed image, a row for each of x and y.

    Example:
        >>> square = Polygons((np.array([[1.0, 1], [3, 1], [3, 3], [1, 3]]),), size=(4, 4))
        >>> outlines = Outlines.of([square], (4, 4)).resize((8, 8)).crop(0, 0, 4, 5)
        >>> outlines.to_pixels().dense()[0].tolist()
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    """

    polygons: tuple[tuple[NDArray[np.float64], ...], ...]
    pixels: InstanceMasks
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]] = _IDENTITY

    @classmethod
    def of(cls, masks: Sequence[Polygons | Rle | None], size: tuple[int, int]) -> Outlines:
        """Build from masks of a COCO file.

        Args:
            masks: N masks of the image; None for an empty mask.
            size: (H, W) of the image, pixels.
        """
        polygons = tuple(mask.points if isinstance(mask, Polygons) else () for mask in masks)
        return cls(polygons, _join([_window(mask) for mask in masks if not isinstance(mask, Polygons)], size))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the transformed image."""
        return self.pixels.size

    def __len__(self) -> int:
        return len(self.polygons)

    def __getitem__(self, index: Tensor) -> Outlines:
        """Select objects, see :meth:`InstanceMasks.__getitem__`."""
        rows = (torch.where(index)[0] if index.dtype == torch.bool else index).tolist()
        place = np.cumsum([not polygons for polygons in self.polygons]) - 1
        given = torch.tensor([place[row] for row in rows if not self.polygons[row]], dtype=torch.int64)
        return replace(self, polygons=tuple(self.polygons[row] for row in rows), pixels=self.pixels[given])

    def crop(self, top: int, left: int, height: int, width: int) -> Outlines:
        """See :meth:`InstanceMasks.crop`."""
        return self._moved(self.pixels.crop(top, left, height, width), ((1, 0, -left), (0, 1, -top)))

    def resize(self, size: tuple[int, int]) -> Outlines:
        """See :meth:`InstanceMasks.resize`."""
        y, x = (new / old for new, old in zip(size, self.size, strict=True))
        return self._moved(self.pixels.resize(size), ((x, 0, 0), (0, y, 0)))

    def flip(self, axis: int) -> Outlines:
        """See :meth:`InstanceMasks.flip`."""
        height, width = self.size
        mirror = ((-1, 0, width), (0, 1, 0)) if axis == 0 else ((1, 0, 0), (0, -1, height))
        return self._moved(self.pixels.flip(axis), mirror)

    def rotate90(self) -> Outlines:
        """See :meth:`InstanceMasks.rotate90`."""
        return self._moved(self.pixels.rotate90(), ((0, 1, 0), (-1, 0, self.size[1])))

    def _moved(self, pixels: InstanceMasks, step: tuple[tuple[float, float, float], ...]) -> Outlines:
        (a, b, c), (d, e, f) = self.matrix
        x, y = ((p * a + q * d, p * b + q * e, p * c + q * f + r) for p, q, r in step)
        return Outlines(self.polygons, pixels, (x, y))

    def to_pixels(self) -> InstanceMasks:
        """Rasterize the masks in the transformed image by pycocotools, in tight windows."""
        matrix, pixels = np.array(self.matrix), self.pixels.tight()
        given = zip((crop.numpy() for crop in pixels.crops()), pixels.windows.tolist(), strict=True)
        windows = [
            fill([points @ matrix[:, :2].T + matrix[:, 2] for points in polygons], *self.size)
            if polygons
            else next(given)
            for polygons in self.polygons
        ]
        return _join(windows, self.size)


def _window(mask: Rle | None) -> _Window:
    return _NOTHING if mask is None else decode_window(mask)


def _join(windows: Sequence[_Window], size: tuple[int, int]) -> InstanceMasks:
    ends = np.cumsum([0, *(crop.size for crop, _ in windows)])
    pixels = np.empty(ends[-1], np.uint8)
    for (crop, _), start, end in zip(windows, ends[:-1], ends[1:], strict=True):
        pixels[start:end].reshape(crop.shape)[:] = crop
    edges = torch.tensor([window for _, window in windows], dtype=torch.int64).reshape(-1, 4)
    return InstanceMasks(torch.from_numpy(pixels), edges, size)


def fill(
    polygons: Sequence[NDArray[np.float64]], height: int, width: int
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Rasterize one object in its bounding rectangle, with the same pixels as in the whole image.

    Args:
        polygons: Each (K, 2) x, y in pixels.
        height: Height of the image, pixels.
        width: Width of the image, pixels.

    Returns:
        The pixels in a tight window, and the window's left, top, right and bottom.
    """
    # pycocotools rounds coordinates to fifths of a pixel, which shifts by whole pixels do not affect. It rounds
    # negative ones differently, but with any of them the rectangle starts at 0.
    points = np.concatenate(polygons)
    left, top = (min(max(math.floor(v), 0), n) for v, n in zip(points.min(0), (width, height), strict=True))
    right, bottom = (min(math.ceil(v) + 1, n) for v, n in zip(points.max(0), (width, height), strict=True))
    if right <= left or bottom <= top:
        return _NOTHING
    flat = [(points - (left, top)).reshape(-1) for points in polygons]
    rle = mask_utils.merge(mask_utils.frPyObjects(flat, bottom - top, right - left))
    x, y, w, h = (int(v) for v in mask_utils.toBbox(rle))
    if not w:
        return _NOTHING
    return mask_utils.decode(rle)[y : y + h, x : x + w], (left + x, top + y, left + x + w, top + y + h)
