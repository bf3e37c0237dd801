"""Conversion of torchvision detectors' state dicts to our names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from torch import Tensor
from torchvision.models import mobilenet_v3_large

from a2fpn.backbones import TimmBackbone
from a2fpn.config import BackboneConfig, ModelConfig, RCNNConfig, RetinaNetConfig
from a2fpn.detectors import DETECTORS
from a2fpn.device import without_values
from a2fpn.pyramid import level_names


def torchvision_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert the state dict of a torchvision detector to that of ours.

    Args:
        state: State dict of any version of torchvision; not modified, unchanged tensors are shared.
        config: The configuration, from :func:`torchvision_config`.

    Returns:
        The state dict. Unknown tensors are kept, to be reported by a strict load.
    """
    rename = _renaming(config)
    tracked = "num_batches_tracked"
    frozen = config.backbone.norm == "frozen"
    levels = level_names("p", _strides(config.backbone))

    def named(key: str) -> str:
        return re.sub(r"^neck\.(lateral|output)\.(\d+)", lambda match: f"neck.{match[1]}.{levels[int(match[2])]}", key)

    renamed = {named(rename(key)): x for key, x in state.items() if not (frozen and tracked in key and ".body." in key)}
    return {key: _select(key, x, config) for key, x in renamed.items()}


def _strides(config: BackboneConfig) -> tuple[int, ...]:
    """Strides of a backbone's maps, measured for taps."""
    if not config.taps:
        return config.strides
    with without_values():
        return TimmBackbone(config).out_spec.strides


# State dicts
def _renaming(config: ModelConfig) -> Callable[[str], str]:
    """Return the function that maps torchvision's tensor names, of any version, to ours."""
    rules = [
        (r"backbone\.body\.(.*)", r"backbone.body.\1"),
        (r"backbone\.fpn\.extra_blocks\.(.*)", r"top.\1"),
        (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.lateral.\1.conv.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.output.\1.conv.\2"),
        (r"backbone\.fpn\.inner_blocks\.(\d+)\.1\.(\w+)", r"neck.lateral.\1.norm.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d+)\.1\.(\w+)", r"neck.output.\1.norm.\2"),
        (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    ]
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    body = _mobilenet_names(config.backbone) if config.backbone.taps else {}

    def rename(key: str) -> str:
        key = body.get(key, key)
        for pattern, replacement in patterns:
            if match := pattern.fullmatch(key):
                return match.expand(replacement)
        if match := re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)", key):
            return f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
        if config.detector == "retinanet" and (match := re.fullmatch(r"(head\.\w+\.conv)\.(\d+)\.(weight|bias)", key)):
            # Older files count activations as layers.
            return f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}"
        return key

    return rename


def _mobilenet_names(config: BackboneConfig) -> dict[str, str]:
    """Map torchvision's names of MobileNetV3's tensors to timm's, as both have the same layers in the same order."""
    with without_values():
        ours = TimmBackbone(dataclasses.replace(config, norm="bn")).body.state_dict()
        theirs = mobilenet_v3_large(weights=None).features.state_dict()
    return {f"backbone.body.{their}": f"backbone.body.{our}" for their, our in zip(theirs, ours, strict=True)}


def _select(key: str, x: Tensor, config: ModelConfig) -> Tensor:
    """Select the outputs of a class-dependent tensor in the order of our labels."""
    ids = [category.id for category in config.categories]
    if not ids or not key.startswith(DETECTORS[config.detector].class_dependent):
        return x
    heads = config.heads
    groups = (
        len((heads.anchor_sizes or [()])[0]) * len(heads.anchor_ratios) if isinstance(heads, RetinaNetConfig) else 1
    )
    numbers = 4 if ".bbox_pred." in key else 1
    outputs = len(x) // groups // numbers
    if isinstance(heads, RCNNConfig):
        ids = [0, *ids]
        ids += [i for i in range(outputs) if i not in ids]
    if len(x) != groups * outputs * numbers or outputs <= max(ids):
        return x  # of another model, which a strict load reports
    rest = x.shape[1:]
    return x.reshape(groups, outputs, numbers, *rest)[:, ids].reshape(-1, *rest)
