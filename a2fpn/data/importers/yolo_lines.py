"""Lines of YOLO's label files: a class and numbers between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2fpn.data.labeled import Box, LabeledObject

_SLACK = 0.01  # how far over the edge a coordinate may lie by rounding
_DECIMALS = 3  # of coordinates in pixels; removes the noise of the division by the image's size


@dataclass(frozen=True)
class YoloLines:
    """Reader of lines.

    A line is ``class x y width height`` (boxes), ``class x y x y x y ...`` (segmentation), or, where ``data.yaml`` has
    ``kpt_shape: [K, 2 or 3]``, a box followed by keypoints (pose).

    Args:
        names: The classes.
        num_keypoints: Keypoints of an object, 0 for none.
        dims: Numbers of a keypoint.
    """

    names: Sequence[str]
    num_keypoints: int
    dims: int

    def read(self, fields: Sequence[str], height: int, width: int, line: int) -> LabeledObject:
        """The object of a line.

        Raises:
            ValueError: If it is none.
        """
        try:
            values = list(map(float, fields))
        except ValueError:
            raise ValueError(f"expected numbers, got {' '.join(fields)[:60]!r}") from None
        index = int(values[0]) if math.isfinite(values[0]) else -1
        if index != values[0] or not 0 <= index < len(self.names):
            raise ValueError(f"class {fields[0]} is not among the {len(self.names)} classes 0 to {len(self.names) - 1}")
        name, place = self.names[index], f"line {line}"
        numbers = values[1:]
        expected = 4 + self.num_keypoints * self.dims
        if self.num_keypoints:
            if len(numbers) != expected:
                detail = f"a box and {self.num_keypoints} keypoints of {self.dims}"
                raise ValueError(f"expected {expected} numbers ({detail}) behind the class, got {len(numbers)}")
            keypoints = _keypoints(np.array(numbers[4:]).reshape(-1, self.dims), height, width)
            return LabeledObject(name, _box(numbers[:4], height, width), keypoints=keypoints, line=place)
        if len(numbers) == 4:
            return LabeledObject(name, _box(numbers, height, width), line=place)
        if len(numbers) == 5:
            raise ValueError("6 numbers: a box with a score, or half a polygon; expected 5, or 7 and more")
        if len(numbers) < 4 or len(numbers) % 2:
            raise ValueError(f"{len(numbers)} coordinates; expected a box of 4, or a polygon of pairs x y")
        _check_range(numbers)
        points = np.array(numbers)
        if min(numbers) < 0 or max(numbers) > 1:
            points = points.clip(0, 1)
        points[::2] *= width
        points[1::2] *= height
        return LabeledObject(name, None, [points.round(_DECIMALS).tolist()], line=place)


def _check_range(numbers: Sequence[float]) -> None:
    # The sum of what holds NaN is NaN; comparisons with it are false.
    if not (min(numbers) >= -_SLACK and max(numbers) <= 1 + _SLACK and math.isfinite(sum(numbers))):
        bad = next(value for value in numbers if not -_SLACK <= value <= 1 + _SLACK)
        pixels = "; are these pixels?" if bad > 2 else ""
        raise ValueError(f"the coordinate {bad:g} lies outside 0 to 1, shares of the image's sides{pixels}")


def _box(numbers: Sequence[float], height: int, width: int) -> Box:
    _check_range(numbers)
    x, y, w, h = numbers[0] * width, numbers[1] * height, numbers[2] * width, numbers[3] * height
    left, top = max(x - w / 2, 0), max(y - h / 2, 0)
    right, bottom = min(x + w / 2, width), min(y + h / 2, height)
    return tuple(round(side, _DECIMALS) for side in (left, top, right - left, bottom - top))  # type: ignore[return-value]


def _keypoints(points: np.ndarray[Any, np.dtype[np.float64]], height: int, width: int) -> tuple[float, ...]:
    """Keypoints in pixels; without visibility, a point at 0, 0 is not labeled."""
    _check_range(points[:, :2].ravel().tolist())
    xy = (points[:, :2] * (width, height)).round(_DECIMALS)
    seen = points[:, 2].round() if points.shape[1] == 3 else np.where(points.any(1), 2, 0)
    xy[seen == 0] = 0
    return tuple(np.concatenate([xy, seen[:, None]], axis=1).ravel().tolist())
