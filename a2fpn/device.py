"""Properties of devices on which the form of a computation depends."""

from __future__ import annotations

from torch import Tensor


def runs_ahead(x: Tensor) -> bool:
    """Return whether a tensor's device runs asynchronously, so that reading values makes the host wait.

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
