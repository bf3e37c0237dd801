"""Results as the types of supervision, an extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle

if TYPE_CHECKING:
    import supervision


class Found(Protocol):
    """The parts of a :class:`a2fpn.Result` that supervision takes."""

    @property
    def boxes(self) -> NDArray[np.float32]: ...
    @property
    def scores(self) -> NDArray[np.float32]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def masks(self) -> NDArray[np.bool_] | None: ...
    @property
    def rles(self) -> tuple[Rle, ...] | None: ...
    @property
    def keypoints(self) -> NDArray[np.float32] | None: ...
    def __len__(self) -> int: ...


def detections(result: Found) -> supervision.Detections:
    """Return supervision's ``Detections``; see :meth:`a2fpn.Result.to_supervision`."""
    library = _library()
    points = {} if result.keypoints is None else {"keypoints": result.keypoints}
    found: supervision.Detections = library.Detections(
        xyxy=result.boxes,
        mask=_compact_masks(result, library),
        confidence=result.scores,
        class_id=result.labels,
        data={"class_name": np.array(result.names, dtype=np.str_), **points},
    )
    return found


def keypoints(result: Found) -> supervision.KeyPoints:
    """Return supervision's ``KeyPoints``.

    Raises:
        ValueError: If the model gives no keypoints.
    """
    if result.keypoints is None:
        raise ConfigError("This result has no keypoints; they come from detectors such as keypointrcnn.")
    library = _library()
    found: supervision.KeyPoints
    if len(result):
        names = {"class_name": np.array(result.names, dtype=np.str_)}
        found = library.KeyPoints(xy=result.keypoints[..., :2], class_id=result.labels, data=names)
    else:
        found = library.KeyPoints.empty()  # versions before 0.29 refuse arrays of no object
    return found


def _compact_masks(result: Found, library: Any) -> Any:
    """Masks as supervision keeps them: run lengths inside boxes, whose last pixels are in them; else dense ones."""
    if result.rles is None or not hasattr(getattr(library, "CompactMask", None), "from_coco_rle"):
        return result.masks
    height, width = result.size
    first, last = np.floor(result.boxes[:, :2]), np.ceil(result.boxes[:, 2:]) - 1
    corners = np.concatenate([first, np.maximum(last, first)], 1)
    inside = np.clip(corners, 0, [width - 1, height - 1, width - 1, height - 1])
    return library.CompactMask.from_coco_rle(result.rles, inside, image_shape=result.size)


def _library() -> Any:
    """The library.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ConfigError('supervision is not installed: pip install "a2fpn[supervision]".') from error
    return supervision
