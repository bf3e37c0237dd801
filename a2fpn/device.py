"""What decides how a computation is written: whether the host runs ahead of the device."""

from __future__ import annotations

from torch import Tensor


def runs_ahead(x: Tensor) -> bool:
    """Whether a tensor's device works through what the host has given it, and is best not asked for values.

    Every value that the host wants stops both, and every operation takes the host as long as a large one: code for
    such a device has shapes that no value decides and few, large operations. On the CPU small ones cost nothing.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> runs_ahead(torch.zeros(1))
        False
    """
    return x.device.type != "cpu"
