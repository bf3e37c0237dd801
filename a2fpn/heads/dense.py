"""Heads of the one-stage detectors: torchvision's, with float32 outputs, and what turns their outputs into boxes.

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
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from a2fpn.heads.loss_normalizer import GlobalLossNormalizer
from a2fpn.heads.postprocess import PostprocessConfig, suppress

_SMALLEST = 1e-2  # pixels, as in the R-CNN heads
_GROUPS = 32
"""Groups of the heads' group norm, where the channels allow it."""


class TopLevels(nn.ModuleDict):
    """Coarser levels by 3x3 convolutions of stride 2 (Lin et al., "Focal Loss", ICCV 2017).

    The first is made from a given map, each other from the one before, behind a ReLU.

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
        """The levels by name, from a map ``(B, C, H, W)``."""
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
        group_norm: Whether group norm follows the convolutions.
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
        # Not torchvision's constructor: it takes 32 groups whatever the channels.
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
    # A group of one channel has no variance on a map of one pixel.
    return functools.partial(nn.GroupNorm, max(1, groups // 2) if groups == channels else groups)


def _float32(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in outputs.items()}


class LevelOutputs(NamedTuple):
    """Outputs of the head for one image on one level of ``n`` anchors.

    Args:
        scores: ``(n, K)`` in [0, 1].
        deltas: ``(n, 4)``.
        anchors: ``(n, 4)`` xyxy.
    """

    scores: Tensor
    deltas: Tensor
    anchors: Tensor


def dense_detections(
    levels: Sequence[LevelOutputs],
    decode: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, int],
    *,
    rule: PostprocessConfig,
    candidates_per_level: int,
) -> dict[str, Tensor]:
    """Detections of an image from a one-stage head.

    torchvision's rule, but that what lies beyond the image (on padding) is dropped, not clipped to a line.

    Args:
        levels: The head's outputs.
        decode: ``(deltas, anchors) -> boxes``, all ``(n, 4)``.
        size: Height and width of the image without padding, pixels; boxes are clipped to it.
        rule: What makes a detection of a candidate.
        candidates_per_level: Most candidates of a level.

    Returns:
        ``boxes`` (n, 4) xyxy, ``scores`` (n,) descending and ``labels`` (n,) from 0.
    """
    boxes, scores, labels = [], [], []
    for level in levels:
        classes = level.scores.shape[1]
        flat = level.scores.flatten()
        kept = torch.where(flat > rule.score_threshold)[0]
        best, order = flat[kept].topk(min(candidates_per_level, len(kept)))
        kept = kept[order]
        anchors = kept // classes
        boxes.append(clip_boxes_to_image(decode(level.deltas[anchors], level.anchors[anchors]), size))
        scores.append(best)
        labels.append(kept % classes)
    all_boxes, all_scores, all_labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    kept = remove_small_boxes(all_boxes, min_size=_SMALLEST)
    all_boxes, all_scores, all_labels = all_boxes[kept], all_scores[kept], all_labels[kept]
    kept, best = suppress(all_boxes, all_scores, all_labels, rule)
    return {"boxes": all_boxes[kept], "scores": best, "labels": all_labels[kept]}
