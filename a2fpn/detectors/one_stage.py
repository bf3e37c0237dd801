"""Base class of one-stage detectors: levels added by strided convolutions, one dense head, one NMS.

Shape shorthand: ``B`` images, ``N`` anchors of all levels, ``K`` classes.
"""

from __future__ import annotations

import functools
import typing
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from a2fpn.backbones import TimmBackbone
from a2fpn.config import ModelConfig, OneStageConfig
from a2fpn.detectors.detector import Detection, Detector
from a2fpn.errors import ConfigError
from a2fpn.heads import StrideAnchors
from a2fpn.heads.dense import LevelOutputs, TopLevels, dense_detections
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.necks import Neck
from a2fpn.preprocess import Batch
from a2fpn.pyramid import Features, PyramidSpec


class OneStage(Detector):
    """Base of the one-stage detectors.

    By default the neck has strides 8, 16 and 32 and no extra level (stride 4 would have most of the anchors), and the
    detector adds p6 and p7. Both are settings: ``strides``, ``neck_args`` and ``top_levels``.

    Args:
        config: Configuration of the model, kept for saving.
        backbone: The backbone.
        neck: The neck.

    Raises:
        ValueError: If levels are to be computed from a backbone map that is not as coarse as the pyramid.
    """

    strides = (8, 16, 32)
    neck_args: typing.ClassVar = {"extra_levels": 0}

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__(config, backbone, neck)
        heads = self.one_stage
        coarsest, channels = neck.out_spec.strides[-1], neck.out_channels
        source = list((neck.out_spec if heads.top_source == "neck" else backbone.out_spec).values())[-1]
        if source.stride != coarsest:
            raise ConfigError(
                f"The levels beyond stride {coarsest} cannot be computed from the backbone's map of stride "
                f"{source.stride}; "
                "set top_source='neck' or neck_args={'extra_levels': 0}."
            )
        levels = [*neck.out_spec.strides, *(coarsest << (i + 1) for i in range(heads.top_levels))]
        self._spec = PyramidSpec.from_channels([channels] * len(levels), strides=levels, prefix="p")
        self.top = TopLevels(source.channels, channels, self._spec.names[len(neck.out_spec) :])
        self.anchor_generator = self.build_anchors()
        self.head = self.build_head()

    @abstractmethod
    def build_anchors(self) -> StrideAnchors:
        """Build the anchors of :attr:`spec`."""

    @abstractmethod
    def build_head(self) -> nn.Module:
        """Build the head, from a list of maps to a dict of float32 outputs ``(B, N, ...)``."""

    @abstractmethod
    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute class scores ``(B, N, K)`` in [0, 1] from the head's outputs."""

    @abstractmethod
    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Decode boxes ``(n, 4)`` from deltas and anchors ``(n, 4)``."""

    @property
    def one_stage(self) -> OneStageConfig:
        """The heads' configuration."""
        return typing.cast(OneStageConfig, self.config.heads)

    @property
    def spec(self) -> PyramidSpec:
        """See :attr:`Detector.spec`."""
        return self._spec

    @property
    def dense_head(self) -> nn.Module:
        """See :attr:`Detector.dense_head`."""
        return self.head

    def add_levels(self, maps: Features, pyramid: Features) -> Features:
        """See :meth:`Detector.add_levels`; adds the top levels."""
        source = pyramid if self.one_stage.top_source == "neck" else maps
        added: Features = self.top(list(source.values())[-1])
        return pyramid | added

    def objects(self, features: Features, batch: Batch, *, rule: PostprocessConfig) -> Detection:
        """See :meth:`Detector.objects`."""
        maps = list(features.values())
        outputs, counts = self.head(maps), self._counts(maps)
        scores, deltas = self.scores(outputs), outputs["bbox_regression"]
        parts = zip(torch.split(scores, counts, 1), torch.split(deltas, counts, 1), strict=True)
        anchors_of = self.anchor_generator.picker(ImageList(batch.tensor, batch.sizes), maps)
        levels = [LevelOutputs(*part, functools.partial(anchors_of, level)) for level, part in enumerate(parts)]
        return dense_detections(
            levels,
            self.decode,
            batch.sizes,
            rule=rule,
            candidates_per_level=max(self.one_stage.candidates_per_level, rule.candidates or 0),
        )

    def outputs(self, features: Features, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Return the head's outputs, the anchors of each image, ``(N, 4)``, and their number per level."""
        maps = list(features.values())
        anchors: list[Tensor] = self.anchor_generator(ImageList(batch.tensor, batch.sizes), maps)
        return self.head(maps), anchors, self._counts(maps)

    def _counts(self, maps: Sequence[Tensor]) -> list[int]:
        """Number of anchors per level."""
        (per_location,) = set(self.anchor_generator.num_anchors_per_location())
        return [x.shape[-2] * x.shape[-1] * per_location for x in maps]
