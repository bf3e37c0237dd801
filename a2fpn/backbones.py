"""Any timm network as a backbone: maps chosen by stride, NCHW, frozen parts that stay frozen.

The only module that calls :func:`timm.create_model`.
"""

from __future__ import annotations

import typing
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import freeze_batch_norm_2d
from timm.models import FeatureInfo, load_state_dict
from torch import Tensor, nn

from a2fpn._registry import did_you_mean
from a2fpn.config import BackboneConfig
from a2fpn.pyramid import Features, LevelSpec, PyramidSpec, level_name

ALIASES = {
    "r18": "resnet18.tv_in1k",
    "r34": "resnet34.tv_in1k",
    "r50": "resnet50.tv_in1k",
    "r101": "resnet101.tv_in1k",
    "convnext_tiny": "convnext_tiny.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "mobilenetv2_100": "mobilenetv2_100.ra_in1k",
    "lite0": "tf_efficientnet_lite0.in1k",
}
"""Short names of backbones, each with its weights tag pinned: the tag alone moves AP by points."""

# Window models that take any image size once they are told not to insist on the one they were trained at.
_FREE_SIZE = {"swin": {"strict_img_size": False}}


def resolve_backbone_name(name: str) -> str:
    """Full timm name for an alias or a timm name.

    Raises:
        ValueError: If neither knows it, with the closest names.

    Example:
        >>> resolve_backbone_name("r50")
        'resnet50.tv_in1k'
        >>> resolve_backbone_name("resnet5O")
        Traceback (most recent call last):
        ...
        ValueError: Unknown backbone 'resnet5O'. Did you mean 'resnet50' or 'resnet51q' or 'resnet50t'?
    """
    full = ALIASES.get(name, name)
    architecture, _, tag = full.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"Unknown backbone {name!r}. {did_you_mean(name, [*ALIASES, *timm.list_models()])}")
    known = [model.partition(".")[2] for model in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in known:
        raise ValueError(f"Backbone {architecture!r} has no weights {tag!r}. {did_you_mean(tag, known)}")
    return full


class TimmBackbone(nn.Module):
    """Features of a timm network at given strides.

    Args:
        config: Which network, and what of it is trained.
        pretrained: Whether to load ImageNet weights through timm.
        weights: A local weights file that timm's loader reads instead of downloading.
        strides: The strides wanted, increasing.

    Attributes:
        out_spec: Names, channels and strides of the maps.

    Raises:
        ValueError: If the network has no map of a wanted stride, or the weights are those of another network.
        FileNotFoundError: If there is no such weights file.

    Example:
        >>> backbone = TimmBackbone(BackboneConfig("test_resnet"))
        >>> backbone.out_spec.strides
        (4, 8, 16, 32)
        >>> {name: tuple(x.shape[2:]) for name, x in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'c2': (16, 24), 'c3': (8, 12), 'c4': (4, 6), 'c5': (2, 3)}
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        pretrained: bool = False,
        weights: str | Path | None = None,
        strides: tuple[int, ...] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        self.config = config
        name = resolve_backbone_name(config.name)
        options: dict[str, Any] = dict(next((o for family, o in _FREE_SIZE.items() if name.startswith(family)), {}))
        with torch.device("meta"):
            reductions = _feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise ValueError(f"Backbone {name!r} has maps of stride {reductions}, none of stride {missing}.")
        # The deepest map of each stride; ascending, since timm returns maps in network order whatever was asked.
        indices = [max(i for i, r in enumerate(reductions) if r == stride) for stride in strides]
        options |= {"features_only": True, "out_indices": indices, "in_chans": config.in_chans}
        self.body = (
            timm.create_model(name, pretrained=pretrained, **options)
            if weights is None
            else _create_with_weights(name, Path(weights), options)
        )
        channels = _feature_info(self.body).channels()
        self.out_spec = PyramidSpec(
            {level_name("c", s): LevelSpec(c, s) for s, c in zip(strides, channels, strict=True)}
        )
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        if config.norm == "frozen":
            self.body = freeze_batch_norm_2d(self.body)  # type: ignore[no-untyped-call]
        self._frozen: list[nn.Module] = []
        if config.trainable_layers is not None:
            self._freeze(len(strides) - config.trainable_layers)

    def _freeze(self, levels: int) -> None:
        """Freezes everything up to and including the first ``levels`` maps."""
        if not 0 <= levels <= len(self.out_spec):
            raise ValueError(
                f"trainable_layers must be between 0 and {len(self.out_spec)}, got {self.config.trainable_layers}."
            )
        if levels == 0:
            return
        names = [str(info["module"]) for info in _feature_info(self.body).get_dicts()]
        last = names[levels - 1].replace(".", "_")
        for name, child in self.body.named_children():
            self._frozen.append(child)
            child.requires_grad_(False)
            if name == last:
                return
        raise ValueError(
            f"trainable_layers={self.config.trainable_layers} is not supported for {self.config.name!r}: its stages "
            "are not direct children. Leave trainable_layers at None."
        )

    def train(self, mode: bool = True) -> TimmBackbone:
        """Sets training mode everywhere but in the frozen part."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> Features:
        """Maps images ``(B, in_chans, H, W)`` to features named as in ``out_spec``."""
        maps = self.body(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return dict(zip(self.out_spec.names, maps, strict=True))


def _create_with_weights(name: str, weights: Path, options: dict[str, Any]) -> nn.Module:
    """Builds a network with the weights of a local file, and makes sure that they arrived.

    timm loads feature extractors without looking at what is missing, since the classifier always is. Its loaders may
    also rename and reshape. So what is compared is what the tensors hold, not what they are called.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"Backbone weights {str(weights)!r} do not exist.")
    try:
        body: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **options
        )
        stored = {_content(x) for x in load_state_dict(str(weights)).values()}
    except (RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{str(weights)!r} holds no weights of {name!r}: {str(error).strip()}") from error
    kernels = [x for x in body.parameters() if x.ndim > 1]
    if 2 * sum(_content(x) in stored for x in kernels) < len(kernels):
        raise ValueError(f"{str(weights)!r} holds no weights of {name!r}; are they those of another backbone?")
    return body


def _content(x: Tensor) -> tuple[int, float]:
    return x.numel(), x.detach().flatten().double().sum().item()


def _feature_info(body: nn.Module) -> FeatureInfo:
    """What timm declares of a network's maps, with the type that ``nn.Module`` hides."""
    return typing.cast(FeatureInfo, body.feature_info)


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the input that a network's weights expect, in the unit range.

    Example:
        >>> pretrained_statistics("lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    config = timm.get_pretrained_cfg(resolve_backbone_name(name))
    if config is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return tuple(config.mean), tuple(config.std)
