"""Regions without autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which products run in the dtype of their inputs, on any device, also one without autocast.

    Args:
        x: Names the device.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), autocast_off(x):
        ...     (x @ x).dtype
        torch.float32
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
