"""Simple copy-paste: Ghiasi et al., CVPR 2021."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from a2fpn.data.coco import Sample
from a2fpn.data.transforms import FitObjects, Target, cut, select
from a2fpn.errors import ConfigError
from a2fpn.masks import InstanceMasks


class CopyPaste(Dataset[Sample]):
    """Pastes objects of a random other sample onto a sample, both after their own transforms.

    Each object with a mask that is not a crowd is selected with probability 0.5 and pasted at its own position; parts
    outside the image are lost. Pasted objects occlude the masks below, whose boxes shrink accordingly. Random numbers
    are torch's.

    Args:
        dataset: Samples with masks, augmented, e.g. a :class:`CocoDataset` with :func:`train_transforms`.
        probability: Probability that objects are pasted onto a sample.
        min_visible: Objects with a smaller visible share of their pixels are dropped; in [0, 1].
        min_box_size: Minimum width and height of pasted and occluded objects, pixels; others are dropped.

    Raises:
        ValueError: For an argument out of range, or samples without masks.
    """

    def __init__(
        self, dataset: Any, *, probability: float = 0.5, min_visible: float = 0.1, min_box_size: float = 1.0
    ) -> None:
        for name, share in {"probability": probability, "min_visible": min_visible}.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {share}.")
        if "masks" not in dataset.target_keys:
            raise ConfigError(f"Copy-paste needs masks, the samples have {', '.join(dataset.target_keys)}.")
        self.dataset = dataset
        self.probability = probability
        self.min_visible = min_visible
        self.min_box_size = min_box_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.dataset[index]
        if torch.rand(()) >= self.probability:
            return sample
        source: Sample = self.dataset[int(torch.randint(len(self), ()))]
        chosen = torch.rand(len(source[1]["labels"])) < 0.5
        if "iscrowd" in source[1]:
            chosen &= source[1]["iscrowd"] == 0
        image, target = source
        return paste(
            sample, (image, select(target, chosen)), min_visible=self.min_visible, min_box_size=self.min_box_size
        )


def paste(sample: Sample, source: Sample, *, min_visible: float = 0.1, min_box_size: float = 1.0) -> Sample:
    """Paste all objects with masks of one sample onto another, see :class:`CopyPaste`."""
    (image, target), (other, pasted) = sample, source
    height, width = (min(a, b) for a, b in zip(image.shape[-2:], other.shape[-2:], strict=True))
    size = (image.shape[-2], image.shape[-1])
    pasted = select(pasted, _has_mask(pasted))
    _, pasted = FitObjects(min_box_size)(other, cut(pasted, (0, 0, height, width), (height, width)))
    if not len(pasted["labels"]):
        return sample
    pasted = {**pasted, "masks": replace(pasted["masks"], size=size)}

    covered = _union(pasted["masks"])
    part = covered[:height, :width]
    image = image.clone()
    image[:, :height, :width] = torch.where(part, other[:, :height, :width], image[:, :height, :width])
    target = _uncovered(target, covered, min_visible=min_visible, min_box_size=min_box_size)
    joined = {**target, "masks": target["masks"] + pasted["masks"]}
    if "has_mask" in target:
        joined["has_mask"] = torch.cat([target["has_mask"], torch.ones(len(pasted["labels"]), dtype=torch.bool)])
    for key in {"labels", "boxes", "keypoints", "iscrowd"} & target.keys():
        joined[key] = torch.cat([x[key].as_subclass(Tensor) for x in (target, pasted)])
    joined["boxes"] = tv_tensors.wrap(joined["boxes"], like=target["boxes"])
    if "semantic" in target:
        joined["semantic"] = target["semantic"].clone()
        joined["semantic"][:height, :width][part] = pasted["semantic"][part]
    return image, joined


def _has_mask(target: Target) -> Tensor:
    """(N,) bool."""
    has_mask: Tensor = target.get("has_mask", torch.ones(len(target["labels"]), dtype=torch.bool))
    return has_mask


def _union(masks: InstanceMasks) -> Tensor:
    """Return the union of the objects' masks, (H, W) bool."""
    plane = torch.zeros(masks.size, dtype=torch.bool)
    for crop, (left, top, right, bottom) in zip(masks.crops(), masks.windows.tolist(), strict=True):
        plane[top:bottom, left:right] |= crop > 0
    return plane


def _uncovered(target: Target, covered: Tensor, *, min_visible: float, min_box_size: float) -> Target:
    """Remove covered pixels (H, W) bool from the objects; boxes of occluded objects are refitted."""
    masks: InstanceMasks = target["masks"]
    free = (~covered).to(torch.uint8)
    crops = [
        crop * free[top:bottom, left:right]
        for crop, (left, top, right, bottom) in zip(masks.crops(), masks.windows.tolist(), strict=True)
    ]
    left_over = InstanceMasks.from_crops(crops, masks.windows, masks.size).tight()
    before, after = masks.areas(), left_over.areas()
    boxes = target["boxes"].as_subclass(Tensor)
    boxes = torch.where((after < before)[:, None], left_over.windows.to(boxes), boxes)
    sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
    target = {**target, "masks": left_over, "boxes": tv_tensors.wrap(boxes, like=target["boxes"])}
    if "keypoints" in target:
        target["keypoints"] = _hidden(target["keypoints"], covered)
    if "has_mask" in target:  # for the others the box replaces the mask
        bare = ~target["has_mask"]
        before, after = before.double(), after.double()
        before[bare], after[bare] = _box_pixels(boxes[bare], free)
    touched = (after < before) & ((after == 0) | (after < min_visible * before) | (sides < min_box_size))
    return select(target, ~touched)


def _box_pixels(boxes: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel counts of boxes (N, 4), in total and free by the map (H, W) of {0, 1}; float64."""
    windows = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).long().tolist()
    parts = [free[top:bottom, left:right] for left, top, right, bottom in windows]
    counts = [(part.numel(), int(part.sum())) for part in parts]
    pixels = torch.tensor(counts, dtype=torch.float64).reshape(-1, 2)
    return pixels[:, 0], pixels[:, 1]


def _hidden(keypoints: Tensor, covered: Tensor) -> Tensor:
    """Mark keypoints (N, K, 3) on covered pixels as hidden: visibility 1 instead of 2."""
    limit = torch.tensor([covered.shape[1], covered.shape[0]]) - 1
    x, y = torch.minimum(keypoints[..., :2].long().clamp(min=0), limit).unbind(-1)
    visibility = torch.where(covered[y, x], keypoints[..., 2].clamp(max=1), keypoints[..., 2])
    return torch.cat([keypoints[..., :2], visibility[..., None]], -1)
