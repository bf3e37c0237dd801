"""Construction of timm networks."""

from __future__ import annotations

import contextlib
from typing import Any

import timm
import torch
from torch import nn

from a2fpn.device import without_values


def create_network(name: str, **options: Any) -> nn.Module:
    """Build a timm network; on the meta device, initialization is skipped.

    Args:
        name: timm's name.
        **options: Arguments of ``timm.create_model``.

    Example:
        >>> with torch.device("meta"):
        ...     network = create_network("test_resnet")
        >>> network.conv1[0].weight.shape, network.conv1[0].weight.is_meta
        (torch.Size([16, 3, 3, 3]), True)
    """
    on_meta = torch.empty(0).is_meta
    with without_values() if on_meta else contextlib.nullcontext():
        network: nn.Module = timm.create_model(name, **options)
    return network
