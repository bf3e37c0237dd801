"""Comparison of an exported file with its detector on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from a2fpn.detectors import Detector
from a2fpn.heads.batched import split_images
from a2fpn.masks.paste import mask_windows

BOX_TOLERANCE = 1e-2
"""Maximum difference of a box's edge, pixels."""
SCORE_TOLERANCE = 1e-4
"""Maximum difference of a score."""
MASK_IOU = 0.999
"""Minimum IoU of the masks of an image's objects, with their pixels pooled."""
_APART = 1.0
"""Difference of a box's edge from which it is that of another object, pixels."""


class Runs(Protocol):
    """Anything that is run like an exported file."""

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`~a2fpn.inference.exported.ExportedDetector.run`."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a file and its detector on one image.

    Args:
        name: The compared image.
        expected: Number of objects from the detector.
        found: Number of objects from the file.
        box: Maximum difference of a box's edge, pixels; infinite between objects of different categories.
        score: Maximum difference of a score.
        mask_iou: IoU of the masks, with the pixels of all objects pooled; None without masks or objects.
        apart: Number of the detector's objects for which the file has another one, of another category or with a box
            more than a pixel off.
    """

    name: str
    expected: int
    found: int
    box: float = 0.0
    score: float = 0.0
    mask_iou: float | None = None
    apart: int = 0

    @property
    def equal(self) -> bool:
        """True if both are equal up to rounding."""
        return (
            self.expected == self.found
            and self.box <= BOX_TOLERANCE
            and self.score <= SCORE_TOLERANCE
            and (self.mask_iou is None or self.mask_iou >= MASK_IOU)
        )


def verify(detector: Detector, exported: Runs, images: Iterable[tuple[str, Tensor]]) -> Iterator[Comparison]:
    """Compare a file with its detector: on each image alone, batched with its mirror image, and without any object.

    Args:
        detector: A detector in evaluation mode, on the CPU.
        exported: The file, an :class:`~a2fpn.inference.exported.ExportedDetector`.
        images: Names and ``(C, H, W)`` uint8 images.

    Yields:
        A comparison per image of every batch.
    """
    empty: Tensor | None = None
    for name, image in images:
        yield from _compare(detector, exported, {name: image})
        yield from _compare(detector, exported, {f"{name} and": image, f"{name} mirrored": image.flip(2)})
        empty = _ramp(image) if empty is None else empty
    if empty is not None:
        yield from _compare(detector, exported, {"an empty image": empty})


def _ramp(like: Tensor) -> Tensor:
    """Create an image that darkens from corner to corner, since on a uniform image scores would be equal."""
    rows, columns = (torch.linspace(0, 90, side) for side in like.shape[-2:])
    return (rows[:, None] + columns + 30).to(torch.uint8).expand_as(like)


@torch.inference_mode()
def _compare(detector: Detector, exported: Runs, images: Mapping[str, Tensor]) -> Iterator[Comparison]:
    got = exported.run(torch.stack(list(images.values())))
    got["images"] = got.pop("image_index")
    found = split_images(got, len(images))
    for (name, image), own in zip(images.items(), found, strict=True):
        expected = detector([image], paste_masks=False)[0]
        yield _differences(name, expected, own, (image.shape[-2], image.shape[-1]), detector)


def _differences(
    name: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], size: tuple[int, int], detector: Detector
) -> Comparison:
    counts = len(expected["scores"]), len(got["scores"])
    if counts[0] != counts[1] or not counts[0]:
        return Comparison(name, *counts)
    rows = _partners(expected, got)
    iou = None
    if "masks" in got:
        overlap = union = 0
        paste = detector.mask_paste
        ours = mask_windows(expected["masks"], expected["boxes"], size, rule=paste)
        theirs = mask_windows(got["masks"][rows, None], got["boxes"][rows], size, rule=paste)
        for a, b in zip(ours, theirs, strict=True):
            both, either = _areas(a, b)
            overlap, union = overlap + both, union + either
        iou = overlap / union if union else None
    off = (expected["boxes"] - got["boxes"][rows]).abs().amax(1)
    off = off.masked_fill(expected["labels"] != got["labels"][rows], torch.inf)
    score = float((expected["scores"] - got["scores"][rows]).abs().max())
    return Comparison(name, *counts, float(off.max()), score, iou, int((off > _APART).sum()))


def _partners(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Tensor:
    """Match the file's objects to the detector's, the most alike first, since equal scores may be in another order.

    In the order of the scores, an object that the file lacks would take the partner of another one.
    """
    distance = torch.cdist(expected["boxes"], got["boxes"], p=float("inf"))
    distance = distance + (expected["scores"][:, None] - got["scores"]).abs()
    distance = distance + (expected["labels"][:, None] != got["labels"]) * 1e6
    distance = distance.nan_to_num(nan=1e9, posinf=1e9)  # or no partner would be the nearest
    rows = torch.full((len(distance),), -1)
    while (rows < 0).any():
        nearest, back = distance.argmin(1), distance.argmin(0)
        mutual = (rows < 0) & (back[nearest] == torch.arange(len(rows)))
        rows[mutual] = nearest[mutual]
        distance[mutual] = torch.inf
        distance[:, nearest[mutual]] = torch.inf
    return rows


def _areas(a: tuple[Tensor, int, int], b: tuple[Tensor, int, int]) -> tuple[int, int]:
    """Intersection and union of two masks, each a window of probabilities with its first row and column."""
    (first, top, left), (second, above, before) = a, b
    rows = max(top + first.shape[0], above + second.shape[0]) - min(top, above)
    columns = max(left + first.shape[1], before + second.shape[1]) - min(left, before)
    planes = torch.zeros(2, max(rows, 0), max(columns, 0), dtype=torch.bool)
    for plane, (window, y, x) in zip(planes, (a, b), strict=True):
        y, x = y - min(top, above), x - min(left, before)
        plane[y : y + window.shape[0], x : x + window.shape[1]] = window > 0.5
    return int((planes[0] & planes[1]).sum()), int((planes[0] | planes[1]).sum())
