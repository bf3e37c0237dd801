"""Properties of devices on which the form of a computation depends."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch
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


def has_triton(x: Tensor) -> bool:
    """Return whether Triton kernels run on a tensor's device: an NVIDIA GPU with TF32 and bfloat16, and a C compiler.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> has_triton(torch.zeros(1))
        False
    """
    return x.is_cuda and _runs_triton(x.device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    )
