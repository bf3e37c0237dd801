"""Masks of one image's objects, stored as a crop per object instead of N full-size planes.

Shape shorthand: ``N`` objects, ``H`` x ``W`` image pixels, ``P`` pixels of all windows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a2fpn import device


@dataclass(frozen=True, eq=False)
class InstanceMasks:
    """Masks of one image's objects, each cropped to a window around it.

    Two tensors for any number of objects are cheap to send between processes. Only :meth:`dense` depends on the size
    of the image.

    Args:
        pixels: ``(P,)`` uint8 in {0, 1}; the windows concatenated, each row-major.
        windows: ``(N, 4)`` int64, left, top, right, bottom of each window in pixels, inside the image; right and
            bottom are the first pixels outside. All of an object's pixels lie in its window, which may be empty.
        size: (H, W) of the image, pixels.

    Example:
        >>> masks = InstanceMasks.from_dense(torch.eye(4)[None])
        >>> masks.shape, masks.windows.tolist()
        ((1, 4, 4), [[0, 0, 4, 4]])
        >>> masks.crop(0, 2, 4, 2).dense().tolist()
        [[[0, 0], [0, 0], [1, 0], [0, 1]]]
    """

    pixels: Tensor
    windows: Tensor
    size: tuple[int, int]

    @classmethod
    def from_crops(cls, crops: Sequence[Tensor], windows: Tensor, size: tuple[int, int]) -> InstanceMasks:
        """Build from one crop per window.

        Args:
            crops: N crops ``(h, w)`` uint8 in {0, 1}.
            windows: ``(N, 4)`` int64.
            size: (H, W) of the image.
        """
        none = torch.zeros(0, dtype=torch.uint8, device=windows.device)
        return cls(torch.cat([none, *(crop.reshape(-1) for crop in crops)]), windows, size)

    @classmethod
    def from_dense(cls, masks: Tensor) -> InstanceMasks:
        """Build from full-size planes.

        Args:
            masks: ``(N, H, W)``, bool or numbers; nonzero is foreground.

        Raises:
            ValueError: If ``masks`` does not have three dimensions.
        """
        if masks.ndim != 3:
            raise ValueError(f"masks must have the shape (N, H, W), got {tuple(masks.shape)}.")
        height, width = masks.shape[1:]
        filled = masks.as_subclass(Tensor) != 0
        windows = _tight(filled.any(1), filled.any(2))
        crops = [
            plane[top:bottom, left:right].to(torch.uint8)
            for plane, (left, top, right, bottom) in zip(filled, windows.tolist(), strict=True)
        ]
        return cls.from_crops(crops, windows, (height, width))

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the planes, (N, H, W)."""
        return (len(self), *self.size)

    def crops(self) -> list[Tensor]:
        """Pixels of the windows, N views ``(h, w)``."""
        sides = self.windows[:, 2:] - self.windows[:, :2]
        flat = torch.split(self.pixels, sides.prod(1).tolist())
        return [x.view(height, width) for x, (width, height) in zip(flat, sides.tolist(), strict=True)]

    def dense(self) -> Tensor:
        """Full-size planes, ``(N, H, W)`` uint8 in {0, 1}."""
        if device.runs_ahead(self.pixels):
            return self._dense_at_once()
        planes = self.pixels.new_zeros(self.shape)
        for plane, crop, (left, top, right, bottom) in zip(planes, self.crops(), self.windows.tolist(), strict=True):
            plane[top:bottom, left:right] = crop
        return planes

    def _dense_at_once(self) -> Tensor:
        """Compute :meth:`dense` in a few operations without synchronizing with the device."""
        count, height, width = self.shape
        corners = self.windows[:, :2]
        sides = self.windows[:, 2:] - corners
        areas = sides.prod(1)
        objects = torch.arange(count, device=areas.device).repeat_interleave(areas, output_size=len(self.pixels))
        place = torch.arange(len(self.pixels), device=areas.device) - (areas.cumsum(0) - areas)[objects]
        across = sides[objects, 0]
        rows, columns = corners[objects, 1] + place // across, corners[objects, 0] + place % across
        planes = self.pixels.new_zeros(count * height * width)
        planes[(objects * height + rows) * width + columns] = self.pixels
        return planes.view(self.shape)

    def areas(self) -> Tensor:
        """Area of each object in pixels, ``(N,)`` int64."""
        sums = [crop.sum() for crop in self.crops()]
        return torch.stack(sums) if sums else self.windows.new_zeros(0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> InstanceMasks:
        """Copy to another device."""
        pixels, windows = (x.to(device, non_blocking=non_blocking) for x in (self.pixels, self.windows))
        return InstanceMasks(pixels, windows, self.size)

    def pin_memory(self) -> InstanceMasks:
        """Copy to pinned memory; called by data loaders."""
        return InstanceMasks(self.pixels.pin_memory(), self.windows.pin_memory(), self.size)

    def __getitem__(self, index: Tensor) -> InstanceMasks:
        """Select objects.

        Args:
            index: ``(N,)`` bool, or int64 indices.
        """
        rows = (torch.where(index)[0] if index.dtype == torch.bool else index).to(self.windows.device)
        crops = self.crops()
        return self.from_crops([crops[row] for row in rows.tolist()], self.windows[rows], self.size)

    def crop(self, top: int, left: int, height: int, width: int) -> InstanceMasks:
        """Crop the image to a rectangle."""
        corner = self.windows.new_tensor([left, top] * 2)
        limit = self.windows.new_tensor([width, height] * 2)
        windows = torch.minimum((self.windows - corner).clamp(min=0), limit)
        within = windows + corner - self.windows[:, :2].repeat(1, 2)
        crops = [
            crop[y0:y1, x0:x1]
            for crop, (x0, y0, x1, y1) in zip(self.crops(), within.clamp(min=0).tolist(), strict=True)
        ]
        return self.from_crops(crops, windows, (height, width))

    def resize(self, size: tuple[int, int], *, at: float = 0.5) -> InstanceMasks:
        """Resize to another image size by nearest neighbor.

        Args:
            size: (H, W).
            at: Sampling position within a new pixel, see :func:`nearest_pixels`.
        """
        if size == self.size:
            return self
        rows, columns = (
            nearest_pixels(new, old, at=at, device=self.windows.device)
            for new, old in zip(size, self.size, strict=True)
        )
        edges = self.windows.T.contiguous()
        windows = torch.stack(
            [torch.searchsorted(pixels, edge) for pixels, edge in zip((columns, rows) * 2, edges, strict=True)], 1
        )
        crops = [
            crop.index_select(0, rows[top:bottom] - y0).index_select(1, columns[left:right] - x0)
            for crop, (x0, y0, _, _), (left, top, right, bottom) in zip(
                self.crops(), self.windows.tolist(), windows.tolist(), strict=True
            )
        ]
        return self.from_crops(crops, windows, size)

    def flip(self, axis: int) -> InstanceMasks:
        """Flip along an axis; 0 is x."""
        windows = self.windows.clone()
        windows[:, [axis, axis + 2]] = self.size[1 - axis] - self.windows[:, [axis + 2, axis]]
        return self.from_crops([crop.flip(1 - axis) for crop in self.crops()], windows, self.size)

    def rotate90(self) -> InstanceMasks:
        """Rotate by 90 degrees counter-clockwise."""
        height, width = self.size
        x0, y0, x1, y1 = self.windows.unbind(1)
        windows = torch.stack((y0, width - x1, y1, width - x0), 1)
        return self.from_crops([crop.rot90() for crop in self.crops()], windows, (width, height))

    def tight(self) -> InstanceMasks:
        """Shrink the windows to the objects; those of objects without pixels are empty."""
        corners, crops = self.windows[:, :2].repeat(1, 2), self.crops()
        inner = [_tight(crop.any(0)[None], crop.any(1)[None]) for crop in crops]
        boxes = torch.cat([self.windows[:0], *inner])
        return self.from_crops(
            [crop[y0:y1, x0:x1] for crop, (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True)],
            boxes + corners * boxes.any(1, keepdim=True),
            self.size,
        )

    def __add__(self, other: InstanceMasks) -> InstanceMasks:
        """Concatenate the objects of two images of the same size."""
        if other.size != self.size:
            raise ValueError(f"Masks of images of {self.size} and {other.size} pixels can't be joined.")
        return InstanceMasks(
            torch.cat((self.pixels, other.pixels)), torch.cat((self.windows, other.windows)), self.size
        )


def nearest_pixels(new: int, old: int, *, at: float = 0.5, device: torch.device | None = None) -> Tensor:
    """Nearest-neighbor source index of each pixel after resizing an axis from ``old`` to ``new``, ``(new,)`` int64.

    Args:
        new: Number of new pixels.
        old: Number of old pixels.
        at: Sampling position in a new pixel: 0.5 is the center, 0 its start, as in ``interpolate(mode="nearest")``.
        device: Device of the result.

    Example:
        >>> nearest_pixels(2, 4).tolist(), nearest_pixels(4, 2).tolist(), nearest_pixels(2, 4, at=0).tolist()
        ([1, 3], [0, 0, 1, 1], [0, 2])
    """
    return ((torch.arange(new, device=device) + at) * (old / new)).long()


def _tight(columns: Tensor, rows: Tensor) -> Tensor:
    """Windows ``(N, 4)`` int64 around the columns ``(N, W)`` and rows ``(N, H)`` that are not empty."""
    edges = []
    for filled in (columns, rows):
        if not filled.shape[1]:
            edges.append(torch.zeros(2, len(filled), dtype=torch.int64, device=filled.device))
            continue
        filled = filled.to(torch.uint8)
        first, after_last = filled.argmax(1), filled.shape[1] - filled.flip(1).argmax(1)
        edges.append(torch.stack((first, after_last)) * filled.amax(1).long())
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), 1)
