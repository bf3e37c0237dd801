"""Augmentation for training: random scale, crop, flips, rotations and colors, from torch's random numbers.

Shape shorthand: ``N`` objects, ``H`` x ``W`` pixels. Every transform takes and returns ``(image, target)`` of
:class:`a2fpn.data.CocoDataset`, with masks as outlines or as pixels, and supports N = 0. Evaluation uses none of them:
the model itself resizes and normalizes.
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

from a2fpn.errors import ConfigError
from a2fpn.masks import nearest_pixels
from a2fpn.masks.outlines import Outlines

Target = dict[str, Any]
_PER_OBJECT = {"boxes", "labels", "masks", "has_mask", "keypoints", "iscrowd"}
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_CASE_CHANGE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def train_transforms(
    target_size: Callable[..., tuple[int, int]],
    *,
    min_sizes: Sequence[int] = (),
    scale_range: tuple[float, float] = (0.75, 1.33),
    large_scale_jitter: tuple[float, float] | None = None,
    crop_range: tuple[float, float] = (1.0, 1.0),
    crop_size: int | None = 384,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    rotate90: float = 0.0,
    color_jitter: float = 0.0,
    min_box_size: float = 1.0,
    keypoint_names: Sequence[str] | None = (),
) -> Callable[..., Any]:
    """Return the training augmentation for a model.

    An image is cropped, resized to the model's own size times a random factor, cropped again, color-jittered (before
    resizing if that is cheaper), flipped and rotated; it is never padded, which the model does. If there are masks,
    boxes are refitted to the remaining masks, and objects with too little left are dropped; so an image may end up
    without objects. Train on the result with ``model(images, targets, resize=False)``: images already have the
    network's input size.

    Args:
        target_size: ``(H, W) -> (H, W)``, the model's input size of an image: its
            ``model.preprocess.target_size``. It must accept ``min_size=`` if ``min_sizes`` are given.
        min_sizes: Multi-scale training: short sides in pixels, one of which is drawn instead of the model's
            own; the model's ``max_size`` is kept. Empty for the model's own.
        scale_range: Minimum and maximum factor on that size, drawn log-uniformly.
        large_scale_jitter: Minimum and maximum factor of large-scale jitter (Ghiasi et al., CVPR 2021: 0.1 and
            2): the longest side becomes ``crop_size`` times a uniformly drawn factor, instead of the model's
            size and ``scale_range``. None is off.
        crop_range: Minimum and maximum share of each side kept by the first random crop, drawn uniformly for
            each side.
        crop_size: Longest side of the second random crop, pixels after resizing; smaller images are not padded.
            None for no crop.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a rotation by 90, 180 or 270 degrees.
        color_jitter: Brightness, contrast and saturation change by a factor of at most 1 +- this, the hue
            by at most a tenth of this times 360 degrees; in [0, 1].
        min_box_size: Minimum width and height of objects, pixels after resizing; others are dropped.
        keypoint_names: Names of the keypoints, usually the data set's ``coco.keypoint_names``; a flip swaps
            left and right, see :func:`mirrored_keypoints`. Images with keypoints are never flipped if the names don't
            define the pairs. None drops keypoints.

    Returns:
        A callable ``(image, target) -> (image, target)``; picklable if ``target_size`` is.

    Raises:
        ValueError: For an argument out of range.

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
        "color_jitter": color_jitter,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {share}.")
    for name, factors in {"scale_range": scale_range, "large_scale_jitter": large_scale_jitter or (1, 1)}.items():
        if not 0 < factors[0] <= factors[1]:
            raise ConfigError(f"{name} must be (lowest, highest) with 0 < lowest <= highest, got {factors}.")
    if not 0 < crop_range[0] <= crop_range[1] <= 1:
        raise ConfigError(f"crop_range must be (lowest, highest) with 0 < lowest <= highest <= 1, got {crop_range}.")
    if min(min_sizes, default=1) < 1:
        raise ConfigError(f"min_sizes must be at least 1 pixel each, got {list(min_sizes)}.")
    if crop_size is not None and crop_size < 1:
        raise ConfigError(f"crop_size must be at least 1 pixel, or None for no crop, got {crop_size}.")
    if large_scale_jitter and crop_size is None:
        raise ConfigError("large_scale_jitter needs a crop_size: its factors are those of the crop's side.")
    if large_scale_jitter and min_sizes:
        raise ConfigError("large_scale_jitter and min_sizes both decide the size; give one of them.")
    mirrored = mirrored_keypoints(keypoint_names or ())
    jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 10)
    scale = (
        _LargeScaleJitter(large_scale_jitter, crop_size)
        if large_scale_jitter and crop_size
        else _ModelScale(target_size, tuple(min_sizes), scale_range)
    )
    steps: list[Callable[..., Any]] = [
        *([_drop_keypoints] if keypoint_names is None else []),
        _RandomScaleCrop(scale, crop_range, crop_size, jitter if color_jitter else None),
        _RandomFlip(0, horizontal_flip, mirrored),
        _RandomFlip(1, vertical_flip, mirrored),
        _RandomRotate90(rotate90),
        FitObjects(min_box_size),
    ]
    composed: Callable[..., Any] = v2.Compose(steps)
    return composed


@dataclass(frozen=True)
class _ModelScale:
    """Draws the size of an image around the model's own."""

    target_size: Callable[..., tuple[int, int]]
    min_sizes: tuple[int, ...]
    scale_range: tuple[float, float]

    def __call__(self, height: int, width: int) -> list[float]:
        options = {}
        if self.min_sizes:
            options["min_size"] = self.min_sizes[int(torch.randint(len(self.min_sizes), ()))]
        low, high = (math.log(factor) for factor in self.scale_range)
        scale = math.exp(_uniform(low, high))
        return [side * scale for side in self.target_size(height, width, **options)]


@dataclass(frozen=True)
class _LargeScaleJitter:
    """Draws the size of an image relative to a canvas filled by its longest side."""

    factors: tuple[float, float]
    canvas: int

    def __call__(self, height: int, width: int) -> list[float]:
        scale = _uniform(*self.factors) * self.canvas / max(height, width)
        return [height * scale, width * scale]


def _uniform(low: float, high: float) -> float:
    return torch.empty((), dtype=torch.float64).uniform_(low, high).item() if low < high else low


@dataclass(frozen=True)
class _RandomScaleCrop:
    """Crops, resizes and crops; both crops are applied first, so that only the final region is resized.

    Color jitter is applied at the smaller of the two sizes, since for a per-pixel operation the order hardly matters.
    """

    scale: Callable[[int, int], Sequence[float]]
    crop_range: tuple[float, float]
    crop_size: int | None
    recolor: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        full = (image.shape[-2], image.shape[-1])
        size = [max(1, round(side * _uniform(*self.crop_range))) for side in full]
        corner = [int(torch.randint(n - s + 1, ())) for n, s in zip(full, size, strict=True)]
        scaled = [max(1, round(side)) for side in self.scale(*size)]
        crop = [min(side, self.crop_size or side) for side in scaled]
        # The window in native pixels of the final crop, rounded, so that the scale is off by less than a pixel.
        window = [max(1, round(n * c / s)) for n, c, s in zip(size, crop, scaled, strict=True)]
        top, left = (
            start + int(torch.randint(n - w + 1, ())) for start, n, w in zip(corner, size, window, strict=True)
        )
        image, enlarged = F.crop(image, top, left, *window), math.prod(window) < math.prod(crop)
        if self.recolor and enlarged:
            image = self.recolor(image)
        image = F.resize(image, crop, antialias=True)
        if self.recolor and not enlarged:
            image = self.recolor(image)
        return image, cut(target, (top, left, window[0], window[1]), (crop[0], crop[1]))


def cut(target: Target, window: tuple[int, int, int, int], size: tuple[int, int]) -> Target:
    """Crop a target to a window of its image and resize it; objects with boxes outside are dropped.

    Args:
        target: The target.
        window: Top, left, height and width, pixels.
        size: (H, W) of the resized window.
    """
    top, left, height, width = window
    factor = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    limit = torch.tensor([size[1], size[0]])
    boxes = (target["boxes"].as_subclass(Tensor) - torch.tensor([left, top, left, top])) * factor
    boxes = torch.minimum(boxes.clamp(min=0), limit.repeat(2))
    target = {**target, "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)}
    if "keypoints" in target:
        xy = (target["keypoints"][..., :2] - torch.tensor([left, top])) * factor[:2]
        inside = ((xy >= 0) & (xy < limit)).all(-1, keepdim=True)
        target["keypoints"] = torch.cat([xy, target["keypoints"][..., 2:]], -1) * inside
    if "masks" in target:
        target["masks"] = target["masks"].crop(*window).resize(size)
    if "semantic" in target:
        part = target["semantic"].as_subclass(Tensor)[top : top + height, left : left + width]
        rows, columns = (nearest_pixels(new, old) for new, old in zip(size, (height, width), strict=True))
        target["semantic"] = tv_tensors.Mask(part.index_select(0, rows).index_select(1, columns))
    return select(target, (boxes[:, 2:] > boxes[:, :2]).all(1))


@dataclass(frozen=True)
class _RandomFlip:
    """Flips the image along an axis (0 is x) and swaps keypoints; no flip if the keypoint pairs are unknown."""

    axis: int
    probability: float
    mirrored: tuple[int, ...] | None

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if torch.rand(1) >= self.probability or ("keypoints" in target and self.mirrored is None):
            return image, target
        flip = (F.horizontal_flip, F.vertical_flip)[self.axis]
        flipped = {key: flip(x) if isinstance(x, tv_tensors.TVTensor) else x for key, x in target.items()}
        if "masks" in target:
            flipped["masks"] = target["masks"].flip(self.axis)
        if "keypoints" in target:
            keypoints = target["keypoints"].clone()
            keypoints[..., self.axis] = image.shape[-1 - self.axis] - keypoints[..., self.axis]
            flipped["keypoints"] = _hide(keypoints[:, list(self.mirrored or ())])
        return flip(image), flipped


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...] | None:
    """Index of each keypoint's mirror image; None if the names don't define it.

    Two names are a pair if they differ only in the words left and right, or l and r, in any case and position. Names
    with left or right need a partner.

    Example:
        >>> mirrored_keypoints(["Nose", "LeftEye", "RightEye"]), mirrored_keypoints(["left_eye", "brightness"])
        ((0, 2, 1), None)
    """
    words = [tuple(re.findall(r"[^\W_]+", _CASE_CHANGE.sub(" ", name).lower())) for name in names]
    index = {own: position for position, own in enumerate(words)}
    places = []
    for position, own in enumerate(words):
        partner = index.get(tuple(_OTHER_SIDE.get(word, word) for word in own))
        if partner is None and {"left", "right"} & set(own):
            return None
        places.append(position if partner is None else partner)
    return tuple(places) if places != [*range(len(places))] else None


def _drop_keypoints(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    return image, {key: value for key, value in target.items() if key != "keypoints"}


def _hide(keypoints: Tensor) -> Tensor:
    """Set keypoints (N, K, 3) that are not labeled to zero, as in COCO."""
    return keypoints * (keypoints[..., 2:] > 0)


@dataclass(frozen=True)
class _RandomRotate90:
    """Rotates by 90, 180 or 270 degrees without interpolation."""

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
            if "masks" in target:
                target["masks"] = target["masks"].rotate90()
            if "semantic" in target:
                target["semantic"] = tv_tensors.Mask(target["semantic"].as_subclass(Tensor).rot90())
            if "keypoints" in target:
                x, y, visibility = target["keypoints"].unbind(-1)
                target["keypoints"] = _hide(torch.stack((y, width - x, visibility), dim=-1))
        return image, target


@dataclass(frozen=True)
class FitObjects:
    """Rasterizes the masks, refits the boxes to them and drops objects with too little left.

    Args:
        min_box_size: Minimum width and height of a box, pixels.
    """

    min_box_size: float

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Return the image unchanged, and the target with rasterized masks."""
        if "masks" in target:
            masks = target["masks"]
            masks = masks.to_pixels() if isinstance(masks, Outlines) else masks.tight()
            boxes = masks.windows.float()
            if "has_mask" in target:
                boxes = torch.where(target["has_mask"][:, None], boxes, target["boxes"].as_subclass(Tensor))
            boxes = tv_tensors.wrap(boxes, like=target["boxes"])
            target = {**target, "masks": masks, "boxes": boxes}
        boxes = target["boxes"].as_subclass(Tensor)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        return image, select(target, (sides >= self.min_box_size) & (sides > 0))


def select(target: Target, keep: Tensor) -> Target:
    """Select objects of a target.

    Args:
        target: Target with N objects.
        keep: ``(N,)`` bool.
    """
    if keep.all():
        return target
    selected = dict(target)
    for key in _PER_OBJECT & target.keys():
        value = target[key]
        if isinstance(value, tv_tensors.TVTensor):
            selected[key] = tv_tensors.wrap(value.as_subclass(Tensor)[keep], like=value)
        else:
            selected[key] = value[keep]
    return selected
