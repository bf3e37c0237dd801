"""Hybrid Task Cascade: Chen et al., CVPR 2019.

Box and mask branches are interleaved, mask features flow from stage to stage, and an optional semantic branch adds
context to the features of the box and mask heads. Layers are those of mmdetection's HTC.

Shape shorthand: ``B`` images, ``R`` RoIs of the batch, ``C`` pyramid channels, ``S`` side of a pooled RoI.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import Conv2dNormActivation

from a2fpn.heads.batched import Sizes
from a2fpn.heads.cascade import CascadeRoIHeads, CascadeRules, Targets
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.heads.roi_pool import StrideRoIAlign
from a2fpn.layers import LevelModules
from a2fpn.masks import InstanceMasks, nearest_pixels
from a2fpn.pyramid import Features, level_size

SEMANTIC = "semantic"
"""Key of the semantic embedding among the pyramid's maps."""
IGNORE = 255
"""Label of pixels that the semantic loss ignores."""


class SemanticBranch(nn.Module):
    """Fuses the pyramid at one level into a semantic embedding and class logits.

    Args:
        channels: Channels ``C`` of the pyramid, and of the embedding.
        levels: Names of the levels of the pyramid.
        level: Index of the level at whose size the branch runs.
        width: Channels inside the branch.
        layers: Number of 3x3 convolutions.
        classes: Number of classes of the map.
    """

    def __init__(
        self, channels: int, levels: Sequence[str], *, level: int, width: int, layers: int, classes: int
    ) -> None:
        super().__init__()
        self.level = level
        self.lateral = LevelModules(levels, (_conv(channels, channels, 1) for _ in levels))
        self.convs = nn.Sequential(*(_conv(channels if i == 0 else width, width, 3) for i in range(layers)))
        width = width if layers else channels
        self.embedding = _conv(width, channels, 1)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Maps the pyramid to an embedding ``(B, C, H, W)`` and float32 logits ``(B, classes, H, W)``."""
        maps = list(features.values())
        size = maps[self.level].shape[-2:]
        laterals = [
            lateral(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
            for lateral, x in zip(self.lateral, maps, strict=True)
        ]
        x = self.convs(torch.stack(laterals).sum(0))
        return self.embedding(x), self.logits(x).float()


class SemanticRoIPool(nn.Module):
    """RoI pooling of the pyramid plus the semantic embedding.

    The embedding is always pooled at mask resolution and then average-pooled, as in mmdetection.

    Args:
        pyramid: Pooling of the pyramid.
        stride: Stride of the embedding.
        size: Side of the pooled embedding.
    """

    def __init__(self, pyramid: StrideRoIAlign, *, stride: int, size: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.semantic = StrideRoIAlign(
            {SEMANTIC: stride}, size, sampling_ratio=pyramid.sampling_ratio, aligned=pyramid.aligned
        )
        # torchvision's heads read the output size.
        self.output_size = pyramid.output_size

    def forward(self, features: Features, boxes: Sequence[Tensor] | Tensor, sizes: Sizes | None = None) -> Tensor:
        """Pool boxes into ``(R, C, S, S)``; see :meth:`a2fpn.heads.StrideRoIAlign.forward`."""
        context = F.adaptive_avg_pool2d(self.semantic(features, boxes), self.output_size)
        pooled: Tensor = self.pyramid(features, boxes) + context
        return pooled


class HTCRoIHeads(CascadeRoIHeads):
    """Cascade with interleaved execution, mask information flow and an optional semantic branch.

    Args:
        stages: As in :class:`~a2fpn.heads.cascade.CascadeRoIHeads`, all with mask heads.
        rules: Choices in which implementations differ.
        pooled_channels: Channels of pooled RoI features.
        mask_channels: Output channels of the mask heads.
        semantic: The semantic branch, or None.
        semantic_stride: Input pixels per pixel of its map.
        semantic_loss_weight: Weight of its loss.
        things: Whether its target is built from the instance masks (class 0 is background) instead of the target's
            ``semantic`` map.
    """

    interleaved = True

    def __init__(
        self,
        stages: Sequence[RoIHeads],
        *,
        rules: CascadeRules,
        pooled_channels: int,
        mask_channels: int,
        semantic: SemanticBranch | None = None,
        semantic_stride: int = 8,
        semantic_loss_weight: float = 0.2,
        things: bool = False,
    ) -> None:
        super().__init__(stages, rules=rules)
        self.mask_flow = nn.ModuleList(_conv(mask_channels, pooled_channels, 1) for _ in stages[1:])
        self.semantic = semantic
        self.semantic_stride = semantic_stride
        self.semantic_loss_weight = semantic_loss_weight
        self.things = things

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: Sizes,
        targets: Targets | None = None,
        *,
        rule: PostprocessConfig | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See :meth:`CascadeRoIHeads.forward`; with a semantic branch there is also ``loss_semantic``."""
        if self.semantic is None or targets is None:
            return super().forward(features, proposals, image_sizes, targets, rule=rule)
        embedding, logits = self.semantic(features)
        levels = {**features, SEMANTIC: embedding}
        _, losses = super().forward(levels, proposals, image_sizes, targets, rule=rule)
        losses["loss_semantic"] = self.semantic_loss_weight * self._semantic_loss(logits, targets, image_sizes)
        return [], losses

    def objects(
        self, features: Features, rois: Tensor, sizes: Sizes, rule: PostprocessConfig | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`CascadeRoIHeads.objects`."""
        if self.semantic is not None:
            features = {**features, SEMANTIC: self.semantic(features)[0]}
        return super().objects(features, rois, sizes, rule)

    def mask_features(self, index: int, x: Tensor, previous: Tensor | None) -> Tensor:
        """Add the mask features of the previous stage; see :meth:`CascadeRoIHeads.mask_features`."""
        if previous is not None:
            x = x + self.mask_flow[index - 1](previous)
        return super().mask_features(index, x, None)

    def training_mask_features(self, index: int, x: Tensor) -> Tensor:
        """Run the mask heads of all stages up to this one over the same RoIs."""
        y = self.mask_features(0, x, None)
        for i in range(1, index + 1):
            y = self.mask_features(i, x, y)
        return y

    def _semantic_loss(self, logits: Tensor, targets: Targets, image_sizes: Sizes) -> Tensor:
        """Mean cross-entropy over the labeled pixels; zero if there are none."""
        wanted = torch.full((len(logits), *logits.shape[2:]), IGNORE, dtype=torch.long, device=logits.device)
        for canvas, target, size in zip(wanted, targets, image_sizes, strict=True):
            height, width = level_size(size, self.semantic_stride)
            if self.things:
                semantic = things_map(target["masks"].resize((height, width)), target["labels"])
                if "has_mask" in target:
                    ignore_boxes(semantic, target["boxes"][~target["has_mask"]] / self.semantic_stride)
            else:
                rows, columns = (
                    nearest_pixels(new, old, device=logits.device)
                    for new, old in zip((height, width), target[SEMANTIC].shape, strict=True)
                )
                semantic = target[SEMANTIC][rows[:, None], columns]
            canvas[:height, :width] = semantic
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
        labeled = int((wanted != IGNORE).sum())
        normalized: Tensor = self.normalizer(loss / max(1, labeled), labeled)
        return normalized


def things_map(masks: InstanceMasks, labels: Tensor) -> Tensor:
    """Build a semantic map from instance masks; where instances overlap, the smaller one is on top.

    Args:
        masks: N masks.
        labels: ``(N,)`` from 1.

    Returns:
        ``(H, W)`` with the label of the instance at each pixel, 0 for background.

    Example:
        >>> masks = InstanceMasks.from_dense(torch.tensor([[[0, 1, 1]], [[1, 1, 1]]]))
        >>> things_map(masks, torch.tensor([1, 2])).tolist()
        [[2, 1, 1]]
    """
    canvas = torch.zeros(masks.size, dtype=torch.long, device=labels.device)
    crops, windows = masks.crops(), masks.windows.tolist()
    for index in masks.areas().argsort(descending=True).tolist():
        left, top, right, bottom = windows[index]
        canvas[top:bottom, left:right][crops[index] > 0] = labels[index]
    return canvas


def ignore_boxes(semantic: Tensor, boxes: Tensor) -> None:
    """Set background inside the boxes of objects without a mask to ignored, since its true label is unknown.

    Args:
        semantic: ``(H, W)`` labels; modified in place.
        boxes: ``(N, 4)`` xyxy in its pixels.
    """
    for left, top, right, bottom in torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).long().tolist():
        region = semantic[top:bottom, left:right]
        region[region == 0] = IGNORE


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    return Conv2dNormActivation(in_channels, out_channels, kernel_size, norm_layer=None, inplace=False)  # type: ignore[no-any-return]
