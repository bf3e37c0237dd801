"""Scenes of many nuclei for benchmarks: packaged images, or a COCO folder, side by side in one image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.cli.demo import DEMO_DATA
from a2fpn.data import read_coco, read_image
from a2fpn.masks.rle import Rle, decode_window, encode_window


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its annotated objects.

    Args:
        pixels: (3, H, W) uint8.
        rles: A mask per object, of the image's size.
    """

    pixels: Tensor
    rles: list[Rle]

    @property
    def array(self) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        return np.ascontiguousarray(self.pixels.permute(1, 2, 0).numpy())


def load_scenes(data: Path | None = None, *, split: str = "val") -> list[Scene]:
    """Annotated images of a COCO folder; without one the images of nuclei inside the package."""
    images = DEMO_DATA / "images" if data is None else data / "images"
    coco = read_coco(
        DEMO_DATA / "annotations.json" if data is None else data / "annotations" / f"instances_{split}.json"
    )
    scenes = []
    for entry in coco.images.values():
        pixels = read_image(images / entry.file_name)
        masks = [
            mask if isinstance(mask, dict) else mask.to_rle()
            for mask in (x.mask for x in coco.annotations[entry.id] if not x.iscrowd)
            if mask is not None
        ]
        scenes.append(Scene(pixels, masks))
    return scenes


def crop(scene: Scene, side: int) -> Scene:
    """The upper left square of a scene, filled up with its mirror image; objects that lose half are left out."""
    height, width = scene.pixels.shape[1:]
    down, right = max(0, side - height), max(0, side - width)
    array = np.pad(scene.array, ((0, down), (0, right), (0, 0)), mode="symmetric")[:side, :side]
    kept = []
    for rle in scene.rles:
        window, (left, top, _, _) = decode_window(rle)
        part = window[: max(0, side - top), : max(0, side - left)]
        if part.sum() > window.sum() / 2:
            kept.append(encode_window(part > 0, top, left, (side, side)))
    return Scene(torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1), kept)


def mosaic(scenes: list[Scene], across: int, side: int) -> Scene:
    """Scenes side by side, ``across`` x ``across`` squares; they repeat where there are too few."""
    cells = [crop(scenes[number % len(scenes)], side) for number in range(across**2)]
    size = (across * side, across * side)
    rows = [torch.cat([cell.pixels for cell in cells[row * across : (row + 1) * across]], 2) for row in range(across)]
    rles = []
    for number, cell in enumerate(cells):
        row, column = divmod(number, across)
        for rle in cell.rles:
            window, (left, top, _, _) = decode_window(rle)
            rles.append(encode_window(window > 0, top + row * side, left + column * side, size))
    return Scene(torch.cat(rows, 1), rles)


def overlaps(first: list[Rle], second: list[Rle]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU (n, m), and the intersection as a share of the smaller of the two."""
    if not first or not second:
        empty = np.zeros((len(first), len(second)))
        return empty, empty
    iou = np.asarray(mask_utils.iou(first, second, [False] * len(second)))
    of_first = np.asarray(mask_utils.iou(first, second, [True] * len(second)))
    of_second = np.asarray(mask_utils.iou(second, first, [True] * len(first))).T
    return iou, np.maximum(of_first, of_second)


def found_objects(found: list[Rle], truth: list[Rle], *, iou: float = 0.5) -> int:
    """Objects of the truth that are matched one to one, the better detection first, at an IoU."""
    free = overlaps(found, truth)[0]
    count = 0
    for row in free:
        if row.size and row.max() >= iou:
            count += 1
            free[:, int(row.argmax())] = -1
    return count


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of the logarithm of times over that of sizes: 1 where time grows linearly."""
    x, y = (np.log(np.array(values)) for values in (sizes, seconds))
    return float(np.polyfit(x, y, 1)[0]) if len(sizes) > 1 else math.nan
