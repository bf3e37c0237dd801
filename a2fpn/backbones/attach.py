"""Architectures that can serve as a backbone, from the table or probed."""

from __future__ import annotations

import difflib
import functools

import timm

from a2fpn._registry import match_names
from a2fpn.backbones.info import PYRAMID, BackboneInfo, UnsupportedBackboneError, read_table
from a2fpn.backbones.names import resolve_backbone_name
from a2fpn.backbones.probe import probe


def list_backbones(pattern: str = "", *, pyramid: bool = False) -> list[str]:
    """Architectures of timm that can serve as a backbone, each with any of its weight tags.

    Args:
        pattern: A wildcard pattern, or a part of the name.
        pyramid: Whether to list only those with native maps of stride 4, 8, 16 and 32. For the others missing levels
            are resampled from the nearest stride, as in a simple feature pyramid.

    Example:
        >>> list_backbones("resnet18*")
        ['resnet18', 'resnet18d']
        >>> list_backbones("test_vit", pyramid=True)
        []
    """
    known = set(timm.list_models())
    names = [
        name
        for name, found in read_table().items()
        if name in known and not found.reason and (not pyramid or set(PYRAMID) <= set(found.strides))
    ]
    return match_names(names, pattern)


@functools.cache
def find_backbone_info(architecture: str) -> BackboneInfo:
    """Look up the adaptation of an architecture; it is probed if the table is of another version of timm.

    Raises:
        UnsupportedBackboneError: If it can't be adapted, with the reason and three similar architectures that work.

    Example:
        >>> find_backbone_info("test_vit").adaptations, find_backbone_info("test_vit").strides
        ('simple_fpn', (16,))
    """
    found = read_table().get(architecture)
    if found is None:
        resolve_backbone_name(architecture)
    if found is None or found.timm != timm.__version__:
        found = probe(architecture)
    if found.reason:
        near = difflib.get_close_matches(architecture, set(list_backbones()) - {architecture}, n=3, cutoff=0)
        raise UnsupportedBackboneError(
            f"Backbone {architecture!r} can't be attached: {found.reason} Supported backbones with similar names: "
            f"{', '.join(near)}."
        )
    return found
