"""Masks before they become pixels: polygons, which scale without loss, move through the augmentation as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.data.masks import Polygons, Rle, decode_window
from a2fpn.masks import InstanceMasks

_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True, eq=False)
class Outlines:
    """Masks of one image's objects as polygons where there are polygons, and as pixels elsewhere.

    It moves as :class:`~a2fpn.masks.InstanceMasks` does, and becomes that at the size that is wanted in the end.

    Args:
        polygons: Of N objects the polygons, each ``(K, 2)`` x, y; none for an object that is given as pixels.
        pixels: The N masks of the others, in the image as it is now; empty for an object with polygons.
        matrix: What makes pixels of the image as it is now of the polygons' points: x and y are each a sum of x, y
            and 1 times these.

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
    def of(cls, masks: Sequence[Polygons | Rle], size: tuple[int, int]) -> Outlines:
        """The masks of a COCO file.

        Args:
            masks: N masks of the image.
            size: (H, W) of the image, pixels.
        """
        nothing = (np.zeros((0, 0), np.uint8), (0, 0, 0, 0))
        windows = [nothing if isinstance(mask, Polygons) else decode_window(mask) for mask in masks]
        return cls(
            tuple(mask.points if isinstance(mask, Polygons) else () for mask in masks), _from_windows(windows, size)
        )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image as it is now."""
        return self.pixels.size

    def __len__(self) -> int:
        return len(self.polygons)

    def __getitem__(self, index: Tensor) -> Outlines:
        """Some of the objects, see :meth:`InstanceMasks.__getitem__`."""
        rows = torch.where(index)[0] if index.dtype == torch.bool else index
        return replace(self, polygons=tuple(self.polygons[row] for row in rows.tolist()), pixels=self.pixels[index])

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
        """The masks as pixels of the image as it is now, in the smallest windows; pycocotools decides which pixels."""
        matrix = np.array(self.matrix)
        windows = [
            _fill([points @ matrix[:, :2].T + matrix[:, 2] for points in polygons], *self.size)
            if polygons
            else (crop.numpy(), (x0, y0, x1, y1))
            for polygons, crop, (x0, y0, x1, y1) in zip(
                self.polygons, self.pixels.crops(), self.pixels.windows.tolist(), strict=True
            )
        ]
        return _from_windows(windows, self.size).tight()


def _from_windows(
    windows: Sequence[tuple[NDArray[np.uint8], tuple[int, int, int, int]]], size: tuple[int, int]
) -> InstanceMasks:
    crops = [np.empty(0, np.uint8), *(crop.reshape(-1) for crop, _ in windows)]
    edges = torch.tensor([window for _, window in windows], dtype=torch.int64).reshape(-1, 4)
    return InstanceMasks(torch.from_numpy(np.concatenate(crops)), edges, size)


def _fill(
    polygons: Sequence[NDArray[np.float64]], height: int, width: int
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Rasterises one object in the rectangle around it; the same pixels as in the whole image.

    pycocotools rounds coordinates at fifths of a pixel, which moves by whole pixels don't change. It rounds negative
    ones differently; but the rectangle begins at 0 where there are any.
    """
    low = np.floor(np.min([points.min(0) for points in polygons], 0))
    high = np.ceil(np.max([points.max(0) for points in polygons], 0)) + 1
    left, top = (int(v) for v in np.clip(low, 0, (width, height)))
    right, bottom = (int(v) for v in np.clip(high, 0, (width, height)))
    sides = (bottom - top, right - left)
    if min(sides) < 1:
        return np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
    shapes = mask_utils.frPyObjects([(points - (left, top)).reshape(-1) for points in polygons], *sides)
    return mask_utils.decode(mask_utils.merge(shapes)), (left, top, right, bottom)
