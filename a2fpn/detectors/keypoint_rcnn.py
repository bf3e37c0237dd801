"""Keypoint R-CNN: He et al., "Mask R-CNN", ICCV 2017, Section 5."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads

from a2fpn.config import KeypointRCNNConfig
from a2fpn.detectors.detector import Detection, place, register_detector
from a2fpn.detectors.rcnn import RCNN
from a2fpn.errors import ConfigError
from a2fpn.heads.keypoints import Float32KeypointPredictor, find_keypoints


@register_detector("keypointrcnn")
class KeypointRCNN(RCNN):
    """Faster R-CNN with a keypoint branch; torchvision's heads on any neck.

    A target also has ``keypoints`` (N, K, 3) float: x, y in pixels and visibility, where 0 means not labeled. Results
    have ``keypoints`` (N, K, 3) float32, x, y in pixels and 1, and ``keypoint_scores`` (N, K), the logits of the
    heatmap maxima.
    """

    target_keys: tuple[str, ...] = ("boxes", "labels", "keypoints")

    @property
    def keypoint(self) -> KeypointRCNNConfig:
        """The heads' configuration."""
        return typing.cast(KeypointRCNNConfig, self.config.heads)

    def branches(self, pooled: Mapping[str, int]) -> dict[str, nn.Module]:
        """RoI pooling, convolutions and predictor of the keypoint branch."""
        heads, channels = self.keypoint, self.neck.out_channels
        return {
            "keypoint_roi_pool": self.roi_pool(pooled, heads.keypoint_pool_size),
            "keypoint_head": KeypointRCNNHeads(channels, (heads.keypoint_channels,) * heads.keypoint_layers),
            "keypoint_predictor": Float32KeypointPredictor(
                heads.keypoint_channels if heads.keypoint_layers else channels, heads.num_keypoints
            ),
        }

    def _check_targets(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        super()._check_targets(images, targets)
        for index, target in enumerate(targets):
            wanted = (len(target["boxes"]), self.keypoint.num_keypoints, 3)
            got = tuple(target["keypoints"].shape) if "keypoints" in target else "none"
            if got != wanted:
                raise ConfigError(
                    f"{place(target, index)}: {self.config.detector} trains on keypoints (N, K, 3) = {wanted}, got "
                    f"{got}. {self._instead('keypoints')}"
                )

    def _inner_target(self, target: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
        keypoints = resize_keypoints(target["keypoints"].float(), old, new)
        return {**super()._inner_target(target, old, new), "keypoints": keypoints}

    def _result(self, raw: Detection, size: tuple[int, int], original: tuple[int, int], paste: bool) -> Detection:
        result = super()._result(raw, size, original, paste)
        keypoints, result["keypoint_scores"] = find_keypoints(result.pop("heatmaps"), raw["boxes"])
        result["keypoints"] = resize_keypoints(keypoints, size, original)
        return result


def resize_keypoints(keypoints: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale keypoints ``(N, K, 3)`` x, y, visibility from an image of one size (height, width) to another.

    Example:
        >>> resize_keypoints(torch.tensor([[[1.0, 2.0, 2.0]]]), (10, 10), (20, 10))
        tensor([[[1., 4., 2.]]])
    """
    x, y, visibility = keypoints.unbind(2)
    return torch.stack([x * (new[1] / old[1]), y * (new[0] / old[0]), visibility], 2)
