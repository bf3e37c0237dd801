"""Properties of devices and tracers that decide how something is computed, and networks on the meta device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def runs_ahead(x: Tensor) -> bool:
    """Return whether a tensor's device runs asynchronously, so that reading a value synchronizes with the host.

    Every read stalls both, and launching a small operation costs the host as much as a large one. Code for such a
    device has static shapes and few, large operations; on the CPU small ones are cheap. While a model is traced there
    are no values on any device, so the same code serves.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> runs_ahead(torch.zeros(1))
        False
    """
    return is_on_accelerator(x) or is_traced()


def is_on_accelerator(x: Tensor) -> bool:
    """Return whether a tensor is on a GPU or another accelerator, traced or not.

    For code that picks an implementation by comparing sizes, which a tracer's symbolic sizes do not allow.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> is_on_accelerator(torch.zeros(1))
        False
    """
    return x.device.type != "cpu"


def is_traced() -> bool:
    """Return whether a tracer is recording, with symbolic sizes."""
    return torch.compiler.is_compiling()


def is_exported() -> bool:
    """Return whether torch.export is recording, for runtimes that support standard operators only."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return exporting is not None and bool(exporting())


def new_size(size: int, most: int | None = None) -> int:
    """Return a size; a tracer's symbolic expression becomes a new symbol, which keeps later expressions short.

    Args:
        size: At least 1. A tracer assumes 8 or more, so that no level is specialized to a single pixel.
        most: Its upper bound.
    """
    if isinstance(size, int):
        return size
    unknown: Any = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(unknown >= 8)
    if most is not None:
        torch._check(unknown <= most)
    size = unknown
    return size


def is_known(condition: bool) -> bool:
    """Return whether a comparison of sizes holds; of symbolic sizes, whether it holds for all their values.

    Args:
        condition: The comparison, a bool or symbolic.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


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


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Create tensors on the meta device, with a shape but no values, and skip their initialization.

    On the meta device torch computes shapes in Python for each of an initializer's operations, which takes most of the
    construction time of many networks.

    Example:
        >>> with without_values():
        ...     layer = nn.Linear(2, 3)
        >>> layer.weight.shape, layer.weight.is_meta
        (torch.Size([3, 2]), True)
    """
    with torch.device("meta"), _WithoutFilling():
        yield


_FILLING = frozenset(
    getattr(Tensor, name)
    for name in ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
) | frozenset(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))
"""Functions that change a tensor's values in place and keep its shape."""


class _WithoutFilling(TorchFunctionMode):
    """Context in which in-place initialization of meta tensors is a no-op."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            given: list[Any] = [*args, *kwargs.values()]  # torch.nn.init passes the tensor by keyword
            filled, *others = given
            # With another tensor involved the result depends on it, and its gradient is needed.
            if filled.is_meta and not any(isinstance(x, Tensor) for x in others):
                return filled
        return func(*args, **kwargs)
