"""Hybrid Task Cascade: Chen et al., CVPR 2019."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from a2fpn.backbones import TimmBackbone
from a2fpn.config import HTCConfig, ModelConfig
from a2fpn.detectors.cascade_rcnn import CascadeMaskRCNN
from a2fpn.detectors.detector import place, register_detector
from a2fpn.errors import ConfigError
from a2fpn.heads import HTCRoIHeads, SemanticBranch, SemanticRoIPool, StrideRoIAlign
from a2fpn.heads.htc import IGNORE
from a2fpn.necks import Neck


@register_detector("htc")
class HTC(CascadeMaskRCNN):
    """Cascade Mask R-CNN with interleaved stages, mask information flow and an optional semantic branch.

    With ``semantic="stuff"`` a target also has ``semantic``, a map (H, W) of classes ``0..semantic_classes - 1``; 255
    is ignored.
    """

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__(config, backbone, neck)
        if self.cascade.semantic == "stuff":
            self.target_keys = (*self.target_keys, "semantic")
        elif self.cascade.semantic == "things":
            self.class_dependent += ("roi_heads.semantic.logits.",)

    @property
    def cascade(self) -> HTCConfig:
        """The heads' configuration."""
        return typing.cast(HTCConfig, self.config.heads)

    @property
    def semantic_level(self) -> int:
        """Index of the pyramid level at which the semantic branch runs: the second finest."""
        return min(1, len(self.neck.out_spec) - 1)

    def build_roi_heads(self, pooled: Mapping[str, int]) -> nn.Module:
        """Build the stages, their mask information flow, and the semantic branch."""
        heads, spec, channels = self.cascade, self.neck.out_spec, self.neck.out_channels
        branch = SemanticBranch(
            channels,
            spec.names,
            level=self.semantic_level,
            width=heads.semantic_channels,
            layers=heads.semantic_layers,
            classes=self.config.num_classes + 1 if heads.semantic == "things" else heads.semantic_classes,
        )
        return HTCRoIHeads(
            self.stages(pooled),
            rules=self.rules,
            pooled_channels=channels,
            mask_channels=heads.mask_channels if heads.mask_layers else channels,
            semantic=branch if heads.semantic else None,
            semantic_stride=spec.strides[self.semantic_level],
            semantic_loss_weight=heads.semantic_loss_weight,
            things=heads.semantic == "things",
        )

    def roi_pool(self, pooled: Mapping[str, int], output_size: int) -> nn.Module:
        """Build the RoI pooling of the pyramid and of the semantic embedding, if any."""
        pool = super().roi_pool(pooled, output_size)
        if not self.cascade.semantic or not isinstance(pool, StrideRoIAlign):
            return pool
        stride = self.neck.out_spec.strides[self.semantic_level]
        return SemanticRoIPool(pool, stride=stride, size=self.cascade.mask_pool_size)

    def _instead(self, key: str) -> str:
        if key != "semantic":
            return super()._instead(key)
        return "Without stuff maps use semantic='things' or False."

    def _check_targets(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        super()._check_targets(images, targets)
        if self.cascade.semantic != "stuff":
            return
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            got = tuple(target["semantic"].shape) if "semantic" in target else "none"
            if got != tuple(image.shape[1:]):
                raise ConfigError(
                    f"{place(target, index)}: htc with semantic='stuff' trains on a map semantic (H, W) = "
                    f"{tuple(image.shape[1:])}, got {got}. {self._instead('semantic')}"
                )
            wrong = [
                c for c in target["semantic"].unique().tolist() if c >= self.cascade.semantic_classes and c != IGNORE
            ]
            if wrong:
                raise ConfigError(
                    f"{place(target, index)}: semantic has the classes {wrong}, expected 0.."
                    f"{self.cascade.semantic_classes - 1} and {IGNORE} for pixels to ignore. Set semantic_classes."
                )
