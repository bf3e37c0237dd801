"""Tiled prediction: tiles are read ahead and batched, and detections are in pixels of the image."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from torch import Tensor

from a2fpn.data.slides import Slide, Window
from a2fpn.errors import ConfigError
from a2fpn.inference.tiling import TileDetections

Item = TypeVar("Item")
Value = TypeVar("Value")


class MemorySlide(Slide):
    """A tensor (C, H, W) with the interface of a slide."""

    def __init__(self, pixels: Tensor) -> None:
        if pixels.ndim < 2:
            raise ConfigError(f"Expected an image (C, H, W) with H, W >= 1, got {tuple(pixels.shape)}.")
        self.name = "an image in memory"
        self._pixels = pixels
        self.size = (int(pixels.shape[-2]), int(pixels.shape[-1]))

    def read(self, window: Window) -> Tensor:
        """See :meth:`~a2fpn.data.slides.Slide.read`."""
        x0, y0, x1, y1 = window
        return self._pixels[..., y0:y1, x0:x1]


def read_ahead(read: Callable[[Item], Value], items: Iterable[Item], workers: int) -> Iterator[Value]:
    """Yield ``read(item)`` for each item in order, read ahead by threads.

    Args:
        read: Called from several threads.
        items: Items, read ahead by as many as there are threads.
        workers: Number of threads; 0 reads on demand.

    Example:
        >>> list(read_ahead(lambda x: x * x, range(5), workers=2))
        [0, 1, 4, 9, 16]
    """
    if not workers:
        yield from map(read, items)
        return
    left = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="a2fpn-read")
    try:
        waiting: deque[Future[Value]] = deque(pool.submit(read, item) for item in itertools.islice(left, workers))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(read, item) for item in itertools.islice(left, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def detect_tiles(
    detect: Callable[[Sequence[Tensor]], Sequence[Mapping[str, Tensor]]],
    encode: Callable[[Mapping[str, Tensor], tuple[int, int]], TileDetections],
    slide: Slide,
    windows: Mapping[int, Window],
    *,
    batch: int,
    workers: int,
) -> Iterator[tuple[int, TileDetections]]:
    """Yield the index and the detections of each tile.

    Args:
        detect: Returns the detections of images.
        encode: Converts a tile's detections, given its (height, width), to the stored form, in pixels of the tile.
        slide: The image.
        windows: Tiles by index, read in this order.
        batch: Tiles passed to ``detect`` at once.
        workers: Threads that read ahead.

    Raises:
        ConfigError: If there are keypoints and several tiles.
    """
    numbers = list(windows)
    groups = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    for group, images in zip(
        groups,
        read_ahead(lambda group: [slide.read(windows[number]) for number in group], groups, workers),
        strict=True,
    ):
        for number, image, output in zip(group, images, detect(images), strict=True):
            x0, y0, x1, y1 = windows[number]
            if "keypoints" in output and (y1 - y0, x1 - x0) != slide.size:
                raise ConfigError("Keypoints of several tiles can't be merged; predict without tile.")
            found = encode(output, (int(image.shape[-2]), int(image.shape[-1])))
            boxes = found.boxes + np.array([x0, y0, x0, y0], dtype=np.float32)
            yield number, TileDetections(windows[number], boxes, found.scores, found.labels, found.rles)
