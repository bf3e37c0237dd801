"""Building of modules from configurations: :class:`~a2fpn.config.ModelConfig` to detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2fpn._serialize import from_dict
from a2fpn.backbones import (
    TimmBackbone,
    find_backbone_info,
    weights_license,
)
from a2fpn.config import BackboneConfig, ModelConfig
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import ConfigError
from a2fpn.necks import create_neck


def create_backbone(
    name: str,
    *,
    levels: Sequence[int] = (4, 8, 16, 32),
    pretrained: bool = False,
    weights: str | Path | None = None,
    **options: Any,
) -> TimmBackbone:
    """Build a backbone.

    Args:
        name: An alias or a timm name, with or without a tag; see :func:`a2fpn.list_backbones`.
        levels: Strides of the maps, increasing powers of two. Strides that the network lacks are resampled from its
            nearest map.
        pretrained: Whether to load timm's weights; batch norm is then frozen unless ``norm`` says otherwise.
        weights: A local file of weights to load instead.
        **options: Fields of :class:`a2fpn.config.BackboneConfig`.

    Raises:
        ValueError: For an unknown name or option, a network that can't be attached, or weights that don't fit.

    Example:
        >>> backbone = create_backbone("test_resnet", levels=(8, 16))
        >>> list(backbone.out_spec.items())
        [('c3', LevelSpec(channels=48, stride=8)), ('c4', LevelSpec(channels=192, stride=16))]
    """
    if pretrained or weights is not None:
        options = trained_backbone_fields(name) | options
    config = from_dict(BackboneConfig, {"name": name, "strides": levels, **options}, where="create_backbone")
    return TimmBackbone(config, pretrained=pretrained, weights=weights)


def trained_backbone_fields(backbone: str) -> dict[str, Any]:
    """Default fields of a backbone with pretrained weights, for those that are not set."""
    return {"norm": "frozen", "license": weights_license(backbone)}


def build_model(
    config: ModelConfig, *, pretrained_backbone: bool = False, backbone_weights: str | Path | None = None
) -> Detector:
    """Build the detector of a configuration.

    Args:
        config: Configuration of the detector.
        pretrained_backbone: Whether to load timm's weights of the backbone.
        backbone_weights: A local file of backbone weights to load instead.
    """
    _check_sizes(config)
    backbone = TimmBackbone(config.backbone, pretrained=pretrained_backbone, weights=backbone_weights)
    neck = create_neck(config.neck.name, backbone.out_spec, **config.neck.args)
    return DETECTORS[config.detector](config, backbone, neck)


def _check_sizes(config: ModelConfig) -> None:
    """Refuse a resize rule whose images are larger than a backbone of fixed size accepts.

    Raises:
        ValueError: With the sizes that are possible.
    """
    name, rule = config.backbone.name, config.preprocess
    found = find_backbone_info(name.partition(".")[0])
    side = config.backbone.image_size or found.size
    if found.size is None or side is None or rule.resize == "none" or rule.max_size <= side:
        return
    if found.resizable:
        raise ConfigError(
            f"Backbone {name!r} is built for images of {side} x {side}, and max_size={rule.max_size} allows larger "
            f"ones; set image_size={rule.max_size}."
        )
    raise ConfigError(
        f"Backbone {name!r} supports images of {side} x {side} only, and max_size={rule.max_size} allows larger ones. "
        f"Omit the sizes and predict in tiles of {side} pixels, or use one of list_backbones(pyramid=True)."
    )
