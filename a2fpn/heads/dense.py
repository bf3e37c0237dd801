"""Heads of the one-stage detectors, torchvision's with float32 outputs, and the decoding of their outputs.

Shape shorthand: ``B`` images, ``N`` anchors of all levels, ``K`` classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead

from a2fpn.heads.batched import Sizes, clip, first_of_each
from a2fpn.heads.loss_normalizer import GlobalLossNormalizer
from a2fpn.heads.postprocess import PostprocessConfig, is_large, suppress_each

_GROUPS = 32
"""Groups of the heads' group norm, if they divide the channels."""


class TopLevels(nn.ModuleDict):
    """Coarser levels by 3x3 convolutions of stride 2 (Lin et al., "Focal Loss", ICCV 2017).

    The first is computed from a given map, each other from the previous level after a ReLU.

    Args:
        in_channels: Channels of the given map.
        out_channels: Channels of the levels.
        names: Names of the levels.

    Example:
        >>> levels = TopLevels(8, 4, ["p6", "p7"])(torch.zeros(1, 8, 5, 4))
        >>> {name: tuple(x.shape) for name, x in levels.items()}
        {'p6': (1, 4, 3, 2), 'p7': (1, 4, 2, 1)}
    """

    def __init__(self, in_channels: int, out_channels: int, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self[name] = conv
            in_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the levels, by name, from a map ``(B, C, H, W)``."""
        levels: dict[str, Tensor] = {}
        for name, conv in self.items():
            x = conv(F.relu(x) if levels else x)
            levels[name] = x
        return levels


class Float32RetinaNetHead(RetinaNetHead):  # type: ignore[misc]
    """RetinaNet's head with float32 outputs under autocast.

    Args:
        in_channels: Channels of the pyramid.
        num_anchors: Anchors per location.
        num_classes: Classes; there is no background class.
        group_norm: Whether the convolutions are followed by group norm.
        box_loss: ``"l1"``, ``"smooth_l1"``, ``"giou"``, ``"diou"`` or ``"ciou"``.
    """

    def __init__(
        self, in_channels: int, num_anchors: int, num_classes: int, *, group_norm: bool = False, box_loss: str = "l1"
    ) -> None:
        norm = _group_norm(in_channels) if group_norm else None
        super().__init__(in_channels, num_anchors, num_classes, norm_layer=norm)
        self.regression_head._loss_type = box_loss

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Logits ``cls_logits`` (B, N, K) and deltas ``bbox_regression`` (B, N, 4), float32."""
        return _float32(super().forward(x))


class Float32FCOSHead(FCOSHead):  # type: ignore[misc]
    """FCOS's head with float32 outputs under autocast.

    Args:
        in_channels: Channels of the pyramid.
        num_classes: Classes; there is no background class.
        num_layers: Convolutions per branch.
    """

    def __init__(self, in_channels: int, num_classes: int, *, num_layers: int = 4) -> None:
        # Skips torchvision's constructor, which hard-codes 32 groups.
        nn.Module.__init__(self)
        norm = _group_norm(in_channels)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(in_channels, 1, num_classes, num_layers, norm_layer=norm)
        self.regression_head = FCOSRegressionHead(in_channels, 1, num_layers, norm_layer=norm)
        self.normalizer = GlobalLossNormalizer()

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``cls_logits`` (B, N, K), ``bbox_regression`` (B, N, 4) and ``bbox_ctrness`` (B, N, 1), float32."""
        return _float32(super().forward(x))


def _group_norm(channels: int) -> Callable[..., nn.Module]:
    groups = math.gcd(_GROUPS, channels)
    # With one channel per group, the variance on a single-pixel map would be zero.
    return functools.partial(nn.GroupNorm, max(1, groups // 2) if groups == channels else groups)


def _float32(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in outputs.items()}


class LevelOutputs(NamedTuple):
    """Outputs of the head on one level of ``n`` anchors.

    Args:
        scores: ``(B, n, K)`` in [0, 1].
        deltas: ``(B, n, 4)``.
        anchors: Function from indices ``(N,)`` to anchors ``(N, 4)`` xyxy.
    """

    scores: Tensor
    deltas: Tensor
    anchors: Callable[[Tensor], Tensor]


def dense_detections(
    levels: Sequence[LevelOutputs],
    decode: Callable[[Tensor, Tensor], Tensor],
    sizes: Sizes,
    *,
    rule: PostprocessConfig,
    candidates_per_level: int,
) -> dict[str, Tensor]:
    """Detections of a batch from a one-stage head, grouped by image, by descending score.

    Post-processing as in torchvision, except that boxes outside the image (on padding) are dropped instead of clipped
    to zero area.

    Args:
        levels: The head's outputs.
        decode: ``(deltas, anchors) -> boxes``, all ``(N, 4)``.
        sizes: Height and width of the images without padding, pixels; boxes are clipped to them.
        rule: The post-processing.
        candidates_per_level: Maximum number of candidates per level and image.

    Returns:
        ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) from 0 and ``images`` (N,).
    """
    parts = []
    batch, _, classes = levels[0].scores.shape
    for level in levels:
        image, anchor, label = (level.scores > rule.score_threshold).nonzero().unbind(1)
        scores = level.scores[image, anchor, label]
        order = scores.argsort(descending=True)
        order = order[first_of_each(image[order], batch, candidates_per_level)]
        image, anchor, label = image[order], anchor[order], label[order]
        boxes = clip(decode(level.deltas[image, anchor], level.anchors(anchor)), image, sizes)
        parts.append({"boxes": boxes, "scores": scores[order], "labels": label, "images": image})
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    large = is_large(found["boxes"]).nonzero()[:, 0]
    candidates = {name: x[large] for name, x in found.items()}
    return suppress_each(candidates, rule, classes=classes, count=batch, sizes=sizes)
