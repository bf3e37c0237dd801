"""Regions without autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from a2fpn.device import is_exported


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context manager that disables autocast on the device of ``x``; a no-op where autocast is unavailable.

    Also a no-op during export, where each such region would become a separate subgraph.

    Args:
        x: A tensor on that device.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), autocast_off(x):
        ...     (x @ x).dtype
        torch.float32
    """
    kind = x.device.type
    if is_exported():
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
