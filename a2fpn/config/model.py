"""Configuration of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from a2fpn.config.bounds import MOST_CHANNELS, check_range
from a2fpn.config.heads import HeadsConfig
from a2fpn.config.one_stage import FCOSConfig, RetinaNetConfig
from a2fpn.config.parts import BackboneConfig, Category, NeckConfig, PreprocessConfig
from a2fpn.config.two_stage import CascadeConfig, HTCConfig, KeypointRCNNConfig, RCNNConfig
from a2fpn.errors import ConfigError, ConfigTypeError

FORMAT_VERSION = 2
"""Version 2 has level names in state dicts (``neck.lateral.p3``), version 1 positions (``neck.lateral.1``)."""

HEADS: dict[str, type[HeadsConfig]] = {
    "cascadercnn": CascadeConfig,
    "cascademaskrcnn": CascadeConfig,
    "fcos": FCOSConfig,
    "htc": HTCConfig,
    "keypointrcnn": KeypointRCNNConfig,
    "retinanet": RetinaNetConfig,
}
"""Detectors whose heads are not configured by :class:`RCNNConfig`."""


def heads_type(detector: object) -> type[HeadsConfig]:
    """Configuration class of a detector's heads.

    Example:
        >>> heads_type("htc").__name__, heads_type("maskrcnn").__name__
        ('HTCConfig', 'RCNNConfig')
    """
    return HEADS.get(str(detector), RCNNConfig)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a detector.

    Args:
        architecture: The name the model was created with, e.g. ``maskrcnn_a2fpn_r50``.
        detector: A registered detector name, e.g. ``maskrcnn``.
        backbone: The backbone.
        neck: The neck.
        num_classes: Number of object classes, without a background class.
        preprocess: Resizing and normalization.
        heads: Anchors, thresholds and sizes of the heads; an instance of :func:`heads_type` of the detector.
        categories: Ids and names of the classes in the order of the labels; empty if unknown.

    Raises:
        TypeError: If ``heads`` is the configuration of another kind of detector.
        ValueError: If the numbers of classes and categories, or of channels and statistics, differ.
    """

    architecture: str
    detector: str
    backbone: BackboneConfig
    neck: NeckConfig
    num_classes: int = 80
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    heads: HeadsConfig = field(default_factory=RCNNConfig)
    categories: tuple[Category, ...] = ()

    def __post_init__(self) -> None:
        expected = heads_type(self.detector)
        if type(self.heads) is not expected:
            raise ConfigTypeError(
                f"The heads of {self.detector!r} are described by {expected.__name__}, got "
                f"{type(self.heads).__name__}. Pass heads={expected.__name__}(...)."
            )
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1 (there is no background class), got {self.num_classes}.")
        check_range(1, MOST_CHANNELS, num_classes=self.num_classes)
        if self.categories and len(self.categories) != self.num_classes:
            raise ConfigError(f"{len(self.categories)} categories were given for num_classes={self.num_classes}.")
        channels, statistics = self.backbone.in_chans, self.preprocess
        if not len(statistics.mean) == len(statistics.std) == channels:
            raise ConfigError(
                f"in_chans={channels} needs mean and std with {channels} values each, "
                f"got {len(statistics.mean)} and {len(statistics.std)}."
            )

    @classmethod
    def field_types(cls, data: Mapping[str, Any]) -> dict[str, type]:
        """Type of ``heads`` for a configuration's detector."""
        return {"heads": heads_type(data.get("detector"))}

    @property
    def labeled_categories(self) -> tuple[Category, ...]:
        """The categories, or ``Category(label + 1, "class <label>")`` if the model has none."""
        return self.categories or tuple(Category(label + 1, f"class {label}") for label in range(self.num_classes))
