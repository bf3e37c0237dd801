"""Test-time augmentation: prediction at several sizes and flipped, and fusion of the views.

Shape shorthand: ``N`` detections of all views, ``M`` side of a predicted mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from a2fpn.errors import ConfigError
from a2fpn.heads.postprocess import PostprocessConfig

Detection = dict[str, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Views of an image, and the fusion of their detections.

    Args:
        scales: Scale factors relative to the model's own size.
        horizontal_flip: Whether to add a horizontally flipped view of each.
        vertical_flip: Whether to add a vertically flipped view of each, for images without orientation, such as
            microscopy.
        iou: Minimum IoU of detections of one class that are the same object.

    Raises:
        ValueError: Without scales, for one outside [0.1, 10], or an IoU outside [0, 1].
    """

    scales: tuple[float, ...] = (0.8, 1.0, 1.25)
    horizontal_flip: bool = True
    vertical_flip: bool = False
    iou: float = 0.55

    def __post_init__(self) -> None:
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise ConfigError(f"scales must be one or more numbers between 0.1 and 10, got {self.scales}.")
        if not 0 <= self.iou <= 1:
            raise ConfigError(f"iou must be between 0 and 1, got {self.iou}.")

    def views(self) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Yield every scale with its flipped dimensions (-1 columns, -2 rows)."""
        flips = itertools.product((False, True)[: 1 + self.vertical_flip], (False, True)[: 1 + self.horizontal_flip])
        for scale, (rows, columns) in itertools.product(self.scales, list(flips)):
            yield scale, ((-2,) if rows else ()) + ((-1,) if columns else ())


def detect_resized(
    detect: Callable[[Sequence[Tensor]], Sequence[Detection]],
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    interpolation: str = "bilinear",
) -> list[Detection]:
    """Detect objects in images at given sizes instead of the model's own, in pixels of the images.

    Args:
        detect: A detector without resizing, with masks relative to their boxes.
        images: ``(C, H, W)``, float in [0, 1] or uint8.
        sizes: Height and width to which each is resized.
        interpolation: The model's interpolation mode.
    """
    views = [_resized(image, size, interpolation) for image, size in zip(images, sizes, strict=True)]
    found = []
    for image, size, detection in zip(images, sizes, detect(views), strict=True):
        moved = _moved_back(detection, (), size, (int(image.shape[1]), int(image.shape[2])))
        if "keypoints" in moved:
            factor = moved["keypoints"].new_tensor([image.shape[2] / size[1], image.shape[1] / size[0], 1.0])
            moved["keypoints"] = moved["keypoints"] * factor
        found.append(moved)
    return found


def detect_augmented(
    detect: Callable[[Tensor], Detection],
    image: Tensor,
    size: tuple[int, int],
    augmentation: Augmentation,
    rule: PostprocessConfig,
    *,
    interpolation: str = "bilinear",
) -> Detection:
    """Detect objects in all views of an image and fuse them.

    Args:
        detect: A detector without resizing, with masks relative to their boxes.
        image: ``(C, H, W)``, float in [0, 1] or uint8.
        size: Height and width to which the model itself would resize it.
        augmentation: The views.
        rule: The post-processing; its score threshold and maximum number of detections also apply after fusion.
        interpolation: The model's interpolation mode.

    Returns:
        Boxes in pixels of the image, scores, labels and, if there are any, masks (n, 1, M, M).

    Raises:
        ValueError: If the detector predicts keypoints, whose left-right pairs are unknown.
    """
    found = []
    for scale, flips in augmentation.views():
        height, width = (max(1, round(side * scale)) for side in size)
        view = _resized(image, (height, width), interpolation)
        detection = detect(view.flip(flips))
        if "keypoints" in detection:
            raise ConfigError("Test-time augmentation can't flip keypoints; use a detector of boxes or masks.")
        found.append(_moved_back(detection, flips, (height, width), (int(image.shape[1]), int(image.shape[2]))))
    fused = fuse(found, iou=augmentation.iou)
    kept = torch.where(fused["scores"] > rule.score_threshold)[0][: rule.detections_per_image]
    return {name: x[kept] for name, x in fused.items()}


def _resized(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize an image in floating point."""
    pixels = image.float().div(255) if image.dtype == torch.uint8 else image.float()
    return F.interpolate(pixels[None], size=size, mode=interpolation, align_corners=False)[0]


def _moved_back(
    detection: Detection, flips: tuple[int, ...], view: tuple[int, int], original: tuple[int, int]
) -> Detection:
    """Map a view's detections back to pixels of the image."""
    x0, y0, x1, y1 = detection["boxes"].unbind(1)
    if -1 in flips:
        x0, x1 = view[1] - x1, view[1] - x0
    if -2 in flips:
        y0, y1 = view[0] - y1, view[0] - y0
    factor = x0.new_tensor([original[1] / view[1], original[0] / view[0]]).repeat(2)
    moved = {**detection, "boxes": torch.stack([x0, y0, x1, y1], 1) * factor}
    if "masks" in detection:
        moved["masks"] = detection["masks"].flip(flips)
    return moved


def fuse(views: Sequence[Detection], *, iou: float = 0.55) -> Detection:
    """Weighted boxes fusion (Solovyev et al., "Weighted boxes fusion", Image and Vision Computing 2021), with masks.

    Overlapping boxes of one class are fused to their mean weighted by the scores. The fused score is their mean,
    lowered if the object was not detected in every view. Masks are resampled to the fused box and averaged likewise.

    Args:
        views: Detections of every view, in pixels of one image.
        iou: Minimum IoU of a box with a fused one.

    Returns:
        The fused detections, by descending score.

    Example:
        >>> def view(box, score):
        ...     return {
        ...         "boxes": torch.tensor([box]), "scores": torch.tensor([score]), "labels": torch.tensor([0])
        ...     }
        >>> fused = fuse([view([0.0, 0.0, 8.0, 8.0], 0.8), view([0.0, 0.0, 10.0, 8.0], 0.8)])
        >>> fused["boxes"].tolist(), fused["scores"].tolist()
        ([[0.0, 0.0, 9.0, 8.0]], [0.800000011920929])
    """
    every = {name: torch.cat([view[name] for view in views]) for name in views[0]}
    order = every["scores"].argsort(descending=True, stable=True)
    every = {name: x[order] for name, x in every.items()}
    boxes, scores, labels = every["boxes"], every["scores"], every["labels"]
    member, fused, first = _clusters(boxes, scores, labels, iou)
    count = len(fused)
    weights = scores.new_zeros(count).index_add(0, member, scores)
    seen = torch.bincount(member, minlength=count)
    score = weights / seen * (seen.clamp(max=len(views)) / len(views))
    result = {"boxes": fused, "scores": score, "labels": labels[first]}
    if "masks" in every:
        moved = move_masks(every["masks"], boxes, fused[member]) * scores[:, None, None, None]
        total = moved.new_zeros(count, *moved.shape[1:]).index_add(0, member, moved)
        result["masks"] = total / weights.clamp(min=torch.finfo(weights.dtype).tiny)[:, None, None, None]
    best = score.argsort(descending=True, stable=True)
    return {name: x[best] for name, x in result.items()}


def _clusters(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cluster of each box, by descending score, the fused boxes, and the first member of each."""
    sums = boxes.new_zeros(len(boxes), 4)
    weights = scores.new_zeros(len(boxes))
    fused = torch.zeros_like(boxes)
    first: list[int] = []
    member: list[int] = []
    kinds = torch.full_like(labels, -1)
    for row, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        count = len(first)
        target = count
        if count:
            overlap = box_iou(box[None], fused[:count])[0] * (kinds[:count] == label)
            best = int(overlap.argmax())
            if overlap[best] > iou:
                target = best
        if target == count:
            first.append(row)
            kinds[target] = label
        member.append(target)
        sums[target] += box * score
        weights[target] += score
        fused[target] = sums[target] / weights[target]
    index = {"dtype": torch.int64, "device": boxes.device}
    return torch.tensor(member, **index), fused[: len(first)], torch.tensor(first, **index)  # type: ignore[arg-type]


def move_masks(masks: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Resample masks predicted inside boxes to other boxes, zero outside the old ones.

    Args:
        masks: ``(N, 1, M, M)`` probabilities.
        old: ``(N, 4)`` xyxy, the boxes they were predicted in.
        new: ``(N, 4)`` xyxy.

    Returns:
        ``(N, 1, M, M)``.

    Example:
        >>> mask = torch.ones(1, 1, 2, 2)
        >>> move_masks(mask, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[2.0, 0.0, 6.0, 4.0]]))[0, 0]
        tensor([[1., 0.],
                [1., 0.]])
    """
    side = masks.shape[-1]
    centers = (torch.arange(side, dtype=old.dtype, device=old.device) + 0.5) / side
    places = new[:, None, :2] + centers[:, None] * (new[:, None, 2:] - new[:, None, :2])
    # Relative to the old box, (N, M, 2): x and y.
    places = (places - old[:, None, :2]) / (old[:, None, 2:] - old[:, None, :2])
    inside = ((places >= 0) & (places <= 1)).to(masks.dtype)
    x, y = places.unbind(2)
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], 3) * 2 - 1
    moved = F.grid_sample(masks, grid.to(masks.dtype), padding_mode="border", align_corners=False)
    return moved * (inside[:, None, None, :, 0] * inside[:, None, :, None, 1])
