"""A single detected object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from a2fpn.masks.rle import Rle, decode_rle


@dataclass(frozen=True, eq=False, repr=False)
class FoundObject:
    """One object of a :class:`Result`.

    Args:
        box: (4,) float32, x0 y0 x1 y1 in pixels of the image.
        score: In [0, 1].
        label: Index into the categories of the result.
        name: Name of its class.
        size: Height and width of the image.
        rle: COCO run-length encoding; None if the model predicts no masks.
        keypoints: (K, 3) float32, x and y in pixels of the image and 1 for visible; None if it predicts none.
    """

    box: NDArray[np.float32]
    score: float
    label: int
    name: str
    size: tuple[int, int]
    rle: Rle | None = None
    keypoints: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"<{self.name} {self.score:.2f} at {[round(side) for side in self.box.tolist()]}>"

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(H, W) bool, decoded on each access; None if the model predicts no masks."""
        return None if self.rle is None else decode_rle((self.rle,), size=self.size)[0]
