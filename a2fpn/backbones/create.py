"""Networks by timm; on the meta device, where no tensor has values, none are drawn."""

from __future__ import annotations

import contextlib
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_METHODS = ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
_INITIALIZERS = frozenset(
    [getattr(Tensor, name) for name in _METHODS]
    + [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
)
"""What fills a tensor, or scales what fills it, and leaves its shape alone."""


def create_network(name: str, **options: Any) -> nn.Module:
    """Build a network of timm.

    On the meta device torch computes shapes in Python for each of an initializer's operations: for many networks most
    of the time of their construction.

    Args:
        name: As timm knows it.
        **options: Of ``timm.create_model``.

    Example:
        >>> with torch.device("meta"):
        ...     network = create_network("test_resnet")
        >>> network.conv1[0].weight.shape, network.conv1[0].weight.is_meta
        (torch.Size([16, 3, 3, 3]), True)
    """
    on_meta = torch.empty(0).is_meta
    with _WithoutInitialization() if on_meta else contextlib.nullcontext():
        network: nn.Module = timm.create_model(name, **options)
    return network


class _WithoutInitialization(TorchFunctionMode):
    """Within it no operation fills a tensor on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALIZERS:
            filled = args[0] if args else kwargs["tensor"]  # as torch.nn.init hands it on
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)
