"""Augmentation for training: random scale, crop, flips, rotations and colours, from torch's random numbers.

Shape shorthand: ``N`` objects, ``H`` x ``W`` pixels. Every transform takes and returns ``(image, target)`` as
:class:`a2fpn.data.CocoDataset` gives them and works for N = 0. Evaluation uses none of them: the model
itself resizes and normalises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Target = dict[str, Any]

_MAPS = {"masks", "semantic"}
_PER_OBJECT = ("boxes", "labels", "masks", "keypoints", "iscrowd")


def train_transforms(
    target_size: Callable[[int, int], tuple[int, int]],
    *,
    scale_range: tuple[float, float] = (0.75, 1.33),
    crop_size: int | None = 384,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    rotate90: float = 0.0,
    colour_jitter: float = 0.0,
    min_box_size: float = 1.0,
    keypoint_names: Sequence[str] = (),
) -> Callable[..., Any]:
    """Returns the training augmentation for a model.

    An image is resized to the model's own size for it times a random factor, cropped, flipped, turned and
    recoloured. The boxes are then those of what is left of the masks, if there are masks, and objects of
    which too little is left are dropped; so an image may end up without objects. Train on the result with
    ``model(images, targets, resize=False)``: the sizes are already the network's.

    Args:
        target_size: ``(H, W) -> (H, W)``, the size at which the model sees an image: its
            ``model.preprocess.target_size``.
        scale_range: The lowest and highest factor on that size, drawn uniformly on a logarithmic scale.
        crop_size: Longest side of the random crop, pixels after resizing; smaller images are not padded.
            None doesn't crop.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a turn by 90, 180 or 270 degrees.
        colour_jitter: Brightness, contrast and saturation change by a factor of at most 1 +- this, the hue
            by at most a tenth of this times 360 degrees; in [0, 1].
        min_box_size: Objects whose box is less wide or high are dropped, pixels after resizing.
        keypoint_names: Names of the keypoints, usually the data set's ``coco.keypoint_names``; a flip exchanges
            those that differ in ``left`` and ``right``.

    Returns:
        A callable ``(image, target) -> (image, target)``; it can be pickled if ``target_size`` can.

    Raises:
        ValueError: For an argument out of its range.

    Example:
        >>> augment = train_transforms(lambda height, width: (2 * height, 2 * width), crop_size=64)
        >>> target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> image, target = augment(tv_tensors.Image(torch.zeros(3, 50, 20, dtype=torch.uint8)), target)
        >>> image.shape[1], len(target["boxes"])
        (64, 0)
    """
    shares = {
        "horizontal_flip": horizontal_flip,
        "vertical_flip": vertical_flip,
        "rotate90": rotate90,
        "colour_jitter": colour_jitter,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}.")
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range must be (lowest, highest) with 0 < lowest <= highest, got {scale_range}.")
    if crop_size is not None and crop_size < 1:
        raise ValueError(f"crop_size must be at least 1 pixel, or None for no crop, got {crop_size}.")
    jitter = v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter, colour_jitter / 10)
    steps = [
        _RandomScaleCrop(target_size, scale_range, crop_size),
        _RandomFlip(0, horizontal_flip, _mirrored(keypoint_names)),
        _RandomFlip(1, vertical_flip, _mirrored(keypoint_names)),
        _RandomRotate90(rotate90),
        *([jitter] if colour_jitter else []),
        _FitObjects(min_box_size),
    ]
    composed: Callable[..., Any] = v2.Compose(steps)
    return composed


@dataclass(frozen=True)
class _RandomScaleCrop:
    """Resizes by a random factor and crops; crops first, so that only the crop is ever resized."""

    target_size: Callable[[int, int], tuple[int, int]]
    scale_range: tuple[float, float]
    crop_size: int | None

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        height, width = image.shape[-2:]
        low, high = self.scale_range
        scale = math.exp(torch.empty(()).uniform_(math.log(low), math.log(high)).item())
        scaled = [max(1, round(side * scale)) for side in self.target_size(height, width)]
        crop = [min(side, self.crop_size or side) for side in scaled]
        # The window of native pixels that becomes the crop; whole pixels, so the factor is off by < 1 pixel.
        window = [max(1, round(n * c / s)) for n, c, s in zip((height, width), crop, scaled, strict=True)]
        top, left = (int(torch.randint(n - w + 1, ())) for n, w in zip((height, width), window, strict=True))
        image = F.resize(F.crop(image, top, left, *window), crop, antialias=True)

        factor = torch.tensor([c / w for c, w in zip(crop, window, strict=True)]).flip(0).repeat(2)
        boxes = (target["boxes"].as_subclass(Tensor) - torch.tensor([left, top, left, top])) * factor
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor(crop).flip(0).repeat(2))
        target = {**target, "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(crop))}
        if "keypoints" in target:
            xy = (target["keypoints"][..., :2] - torch.tensor([left, top])) * factor[:2]
            inside = ((xy >= 0) & (xy < torch.tensor(crop).flip(0))).all(-1, keepdim=True)
            target["keypoints"] = torch.cat([xy, target["keypoints"][..., 2:]], -1) * inside
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        for key in _MAPS & target.keys():
            target[key] = target[key].as_subclass(Tensor)[..., top : top + window[0], left : left + window[1]]
        target = _select(target, visible)
        # The source pixel nearest to the centre of every pixel ("nearest-exact"), as the image is resized.
        rows, columns = (((torch.arange(c) + 0.5) * (w / c)).long() for c, w in zip(crop, window, strict=True))
        for key in _MAPS & target.keys():
            target[key] = tv_tensors.Mask(target[key].index_select(-1, columns).index_select(-2, rows))
        return image, target


@dataclass(frozen=True)
class _RandomFlip:
    """Mirrors the image along an axis (0 is x), and exchanges keypoints."""

    axis: int
    probability: float
    mirrored: tuple[int, ...]

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if torch.rand(1) >= self.probability:
            return image, target
        flip = (F.horizontal_flip, F.vertical_flip)[self.axis]
        flipped = {key: flip(x) if isinstance(x, tv_tensors.TVTensor) else x for key, x in target.items()}
        if "keypoints" in target:
            keypoints = target["keypoints"].clone()
            keypoints[..., self.axis] = image.shape[-1 - self.axis] - keypoints[..., self.axis]
            flipped["keypoints"] = _hide(keypoints[:, list(self.mirrored)] if self.mirrored else keypoints)
        return flip(image), flipped


def _mirrored(names: Sequence[str]) -> tuple[int, ...]:
    """For each keypoint the index of the one that is in its place in a mirror.

    Raises:
        ValueError: If one of a pair is missing.
    """
    swap = {"left": "right", "right": "left"}
    others = [re.sub("left|right", lambda side: swap[side[0]], name) for name in names]
    missing = sorted(set(others) - set(names))
    if missing:
        raise ValueError(f"keypoint_names need both sides of a pair, got {list(names)} without {missing}.")
    return tuple(list(names).index(other) for other in others)


def _hide(keypoints: Tensor) -> Tensor:
    """Keypoints (N, K, 3) with zeros for those that are not labelled, as COCO has them."""
    return keypoints * (keypoints[..., 2:] > 0)


@dataclass(frozen=True)
class _RandomRotate90:
    """Turns by 90, 180 or 270 degrees without interpolation."""

    probability: float

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if torch.rand(()) >= self.probability:
            return image, target
        for _ in range(int(torch.randint(1, 4, ()))):
            width = image.shape[-1]
            image = tv_tensors.Image(image.as_subclass(Tensor).rot90(dims=(-2, -1)))
            x0, y0, x1, y1 = target["boxes"].as_subclass(Tensor).unbind(1)
            boxes = torch.stack((y0, width - x1, y1, width - x0), dim=1)
            size = (image.shape[-2], image.shape[-1])
            target = {**target, "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)}
            for key in _MAPS & target.keys():
                target[key] = tv_tensors.Mask(target[key].as_subclass(Tensor).rot90(dims=(-2, -1)))
            if "keypoints" in target:
                x, y, visibility = target["keypoints"].unbind(-1)
                target["keypoints"] = _hide(torch.stack((y, width - x, visibility), dim=-1))
        return image, target


@dataclass(frozen=True)
class _FitObjects:
    """Fits the boxes to the masks and drops the objects of which too little is left."""

    min_box_size: float

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if "masks" in target:
            boxes = _tight_boxes(target["masks"].as_subclass(Tensor))
            target = {**target, "boxes": tv_tensors.wrap(boxes, like=target["boxes"])}
        boxes = target["boxes"].as_subclass(Tensor)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
        return image, _select(target, (sides >= self.min_box_size) & (sides > 0))


def _tight_boxes(masks: Tensor) -> Tensor:
    """Returns float32 (N, 4) xyxy around the pixels of (N, H, W) masks; zeros for an empty mask.

    The box ends after the last pixel, as COCO's; torchvision's ``masks_to_boxes`` ends at its index.
    """
    edges = []
    for filled in (masks.any(dim=1).float(), masks.any(dim=2).float()):
        first, after_last = filled.argmax(dim=1), filled.shape[1] - filled.flip(1).argmax(dim=1)
        edges.append(torch.stack((first, after_last)) * filled.amax(dim=1))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=1)


def _select(target: Target, keep: Tensor) -> Target:
    """Keeps some of the objects; (N,) bool."""
    if keep.all():
        return target
    selected = dict(target)
    for key in _PER_OBJECT:
        if key in target:
            value = target[key]
            rest = value.as_subclass(Tensor)[keep]
            selected[key] = tv_tensors.wrap(rest, like=value) if isinstance(value, tv_tensors.TVTensor) else rest
    return selected
