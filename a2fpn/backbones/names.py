"""Names of backbones: short aliases, and timm's own."""

from __future__ import annotations

import functools

import timm

from a2fpn._plugins import load_plugins
from a2fpn._registry import did_you_mean
from a2fpn.errors import ConfigError

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
"""Short names of backbones, each with a pinned weight tag: the tag alone changes AP by points."""


@functools.cache
def resolve_backbone_name(name: str) -> str:
    """Full timm name for an alias or a timm name.

    Raises:
        ValueError: For an unknown name, with the closest known ones.

    Example:
        >>> resolve_backbone_name("r50")
        'resnet50.tv_in1k'
        >>> resolve_backbone_name("resnet5O")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: Unknown backbone 'resnet5O'. Did you mean 'resnet50' or 'resnet51q' or 'resnet50t'?
    """
    full = ALIASES.get(name, name)
    architecture, _, tag = full.partition(".")
    if not timm.is_model(architecture) and not (load_plugins() and timm.is_model(architecture)):
        raise ConfigError(f"Unknown backbone {name!r}. {did_you_mean(name, [*ALIASES, *timm.list_models()])}")
    known = [model.partition(".")[2] for model in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in known:
        raise ConfigError(f"Backbone {architecture!r} has no weights {tag!r}. {did_you_mean(tag, known)}")
    return full


def backbone_module(name: str) -> str:
    """Name of the module that defines a network, ``timm.models.resnet`` for ``resnet50.tv_in1k``."""
    module: str = timm.model_entrypoint(name.partition(".")[0]).__module__
    return module
