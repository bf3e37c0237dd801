"""Conversion of detections to supervision's types, an extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle, decode_rle

if TYPE_CHECKING:
    import supervision


def to_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    names: Sequence[str],
    size: tuple[int, int],
    rles: Sequence[Rle] | None,
    keypoints: NDArray[np.float32] | None,
) -> supervision.Detections:
    """Convert the fields of a :class:`a2fpn.Result` to supervision's ``Detections``."""
    library = _library()
    points = {} if keypoints is None else {"keypoints": keypoints}
    found: supervision.Detections = library.Detections(
        xyxy=boxes,
        mask=None if rles is None else _masks(library, rles, boxes, size),
        confidence=scores,
        class_id=labels,
        data={"class_name": np.array(names, dtype=np.str_), **points},
    )
    return found


def to_keypoints(
    keypoints: NDArray[np.float32], labels: NDArray[np.int64], *, names: Sequence[str]
) -> supervision.KeyPoints:
    """Convert the fields of a :class:`a2fpn.Result` to supervision's ``KeyPoints``."""
    library = _library()
    found: supervision.KeyPoints
    if len(labels):
        data = {"class_name": np.array(names, dtype=np.str_)}
        found = library.KeyPoints(xy=keypoints[..., :2], class_id=labels, data=data)
    else:
        found = library.KeyPoints.empty()  # versions before 0.29 refuse empty arrays
    return found


def _masks(library: Any, rles: Sequence[Rle], boxes: NDArray[np.float32], size: tuple[int, int]) -> Any:
    """Convert masks to supervision's compact form, run lengths inside boxes with inclusive ends, or else to dense."""
    if not hasattr(getattr(library, "CompactMask", None), "from_coco_rle"):
        return decode_rle(rles, size=size)
    height, width = size
    first, last = np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:]) - 1
    corners = np.concatenate([first, np.maximum(last, first)], 1)
    inside = np.clip(corners, 0, [width - 1, height - 1, width - 1, height - 1])
    return library.CompactMask.from_coco_rle(rles, inside, image_shape=size)


def _library() -> Any:
    """Import the library.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ConfigError('supervision is not installed: pip install "a2fpn[supervision]".') from error
    return supervision
