"""Anchors from declared strides.

torchvision computes strides as ``image size // grid size``; on sizes that are not a multiple of the coarsest stride its
anchor centers drift by up to tens of pixels, and under bf16 autocast its anchors are computed in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from a2fpn import device
from a2fpn.errors import ConfigError

_KEPT = 8
"""Image sizes whose anchors a module caches on an asynchronous device."""


class StrideAnchors(AnchorGenerator):  # type: ignore[misc]
    """Float32 anchors for a pyramid of known strides.

    Args:
        sizes: Per level the anchor sizes in pixels.
        aspect_ratios: Height / width, the same on every level.
        strides: Per level the stride in pixels.
        rounded: Whether sides are rounded so that corners lie on whole pixels, as in torchvision.
        legacy: Whether to use torchvision's computed strides, for a detector that was trained with them.

    Raises:
        ValueError: If the size tuples do not match the levels in number, or differ in length.

    Example:
        >>> anchors = StrideAnchors([(8,), (16,)], (1.0,), (4, 8))
        >>> image = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
        >>> anchors(image, [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)])[0][[0, 1, 4]]
        tensor([[-4., -4.,  4.,  4.],
                [ 0., -4.,  8.,  4.],
                [-8., -8.,  8.,  8.]])
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        aspect_ratios: Sequence[float],
        strides: Sequence[int],
        *,
        rounded: bool = True,
        legacy: bool = False,
    ) -> None:
        if len(sizes) != len(strides):
            raise ConfigError(
                f"anchor_sizes must have one tuple per pyramid level: {len(strides)} levels of strides "
                f"{list(strides)}, got {len(sizes)} tuples {[tuple(s) for s in sizes]}."
            )
        if len({len(s) for s in sizes}) > 1:
            raise ConfigError(f"Every level needs the same number of anchor sizes, got {[tuple(s) for s in sizes]}.")
        # The base class computes its anchors in its constructor.
        self.rounded = rounded
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)
        self.legacy = legacy
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """Anchors around the origin, ``(A, 4)``, ordered by ratio."""
        if self.rounded:
            rounded: Tensor = super().generate_anchors(scales, aspect_ratios, dtype, device)
            return rounded
        heights = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        half = torch.stack([(sizes / heights[:, None]).flatten(), (heights[:, None] * sizes).flatten()], 1) / 2
        return torch.cat([-half, half], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, ``(A, 4)`` xyxy float32 in pixels of the batch, ordered by level."""
        place = feature_maps[0].device
        grids = [tuple(x.shape[-2:]) for x in feature_maps]
        if not device.runs_ahead(feature_maps[0]) or device.is_traced():
            return [self._make(grids, image_list, place)] * len(image_list.image_sizes)
        key = (place, *grids, *(image_list.tensors.shape[-2:] if self.legacy else ()))
        made = self._made.get(key)
        if made is None:
            # Cached anchors may be reused in a training step.
            with torch.inference_mode(False):
                made = self._make(grids, image_list, place)
            # Replaced instead of modified, since other threads may read it.
            self._made = {**dict(list(self._made.items())[1 - _KEPT :]), key: made}
        return [made] * len(image_list.image_sizes)

    def picker(self, image_list: ImageList, feature_maps: list[Tensor]) -> Callable[[int, Tensor], Tensor]:
        """Return a function that computes selected anchors only, which are the same for every image.

        It takes the index of a level and anchor indices of that level, of any shape, and returns these anchors,
        ``(*shape, 4)``.
        """
        if device.runs_ahead(feature_maps[0]) and not device.is_traced():
            each = self.num_anchors_per_location()
            counts = [x.shape[-2] * x.shape[-1] * count for x, count in zip(feature_maps, each, strict=True)]
            levels = self(image_list, feature_maps)[0].split(counts)
            return lambda level, rows: levels[level][rows]

        def pick(level: int, rows: Tensor) -> Tensor:
            cell = self.cell_anchors[level].to(rows.device, torch.float32)
            grid = feature_maps[level].shape[-2:]
            down, across = self._strides(level, grid, image_list.tensors.shape[-2:])
            pixel = rows // len(cell)
            row = pixel // grid[1]
            x, y = (pixel - row * grid[1]) * across, row * down
            anchors: Tensor = torch.stack([x, y, x, y], -1) + cell[rows % len(cell)]
            return anchors

        return pick

    def _strides(self, level: int, grid: Sequence[int], image_size: Sequence[int]) -> tuple[int, int]:
        if self.legacy:
            return image_size[0] // grid[0], image_size[1] // grid[1]
        return self.strides[level], self.strides[level]

    def _make(self, grids: Sequence[tuple[int, ...]], image_list: ImageList, place: torch.device) -> Tensor:
        levels = []
        for level, ((rows, columns), cell) in enumerate(zip(grids, self.cell_anchors, strict=True)):
            down, across = self._strides(level, (rows, columns), image_list.tensors.shape[-2:])
            y = (torch.arange(rows, device=place) * down)[:, None].expand(rows, columns)
            x = (torch.arange(columns, device=place) * across).expand(rows, columns)
            shifts = torch.stack([x, y, x, y], 2)[:, :, None]
            levels.append((shifts + cell.to(place, torch.float32)).flatten(0, 2))
        return torch.cat(levels)
