"""Architectures that make a backbone, from the table or probed."""

from __future__ import annotations

import difflib
import functools

import timm

from a2fpn._registry import match_names
from a2fpn.backbones.info import PYRAMID, BackboneInfo, UnsupportedBackboneError, read_table
from a2fpn.backbones.names import resolve_backbone_name
from a2fpn.backbones.probe import probe


def list_backbones(pattern: str = "", *, pyramid: bool = False) -> list[str]:
    """Architectures of timm that make a backbone; each also with any of its weights tags.

    Args:
        pattern: A wildcard pattern, or a part of the name.
        pyramid: Whether to list only those with maps of stride 4, 8, 16 and 32 of their own. For the others some are
            made from the nearest stride, as a simple feature pyramid does.

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
    """Return how an architecture is adapted: from the table, or probed for another version of timm than the table's.

    Raises:
        UnsupportedBackboneError: If there is no way, with the reason and three near architectures that work.

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
            f"Backbone {architecture!r} can't be attached: {found.reason} Near ones that work: {', '.join(near)}."
        )
    return found
