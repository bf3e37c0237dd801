"""Properties of devices on which the form of a computation depends, and networks on the one without values."""

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
    """Return whether a tensor's device runs asynchronously, so that reading values makes the host wait.

    Every value that the host wants stops both, and every operation takes the host as long as a large one: code for
    such a device has shapes that no value decides and few, large operations. On the CPU small ones cost nothing.
    While a model is traced for export there are no values at all, whatever the device, and the same code serves.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> runs_ahead(torch.zeros(1))
        False
    """
    return is_on_accelerator(x) or is_traced()


def is_on_accelerator(x: Tensor) -> bool:
    """Return whether a tensor lies on a GPU or the like, whatever is recorded.

    A form of computation that a comparison of sizes chooses asks this: a tracer's sizes have no value to compare.

    Args:
        x: Any tensor.

    Example:
        >>> import torch
        >>> is_on_accelerator(torch.zeros(1))
        False
    """
    return x.device.type != "cpu"


def is_traced() -> bool:
    """Return whether a tracer records what runs, with sizes that stand for many."""
    return torch.compiler.is_compiling()


def is_exported() -> bool:
    """Return whether what runs is recorded as a program that leaves torch, where an operator is what others know."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return exporting is not None and bool(exporting())


def new_size(size: int, most: int | None = None) -> int:
    """Return a size; a tracer's, which is a formula of others, as a new unknown, so that what follows has short ones.

    Args:
        size: At least 1. A tracer takes it for 8 or more, so that no level is taken for the single pixel that behaves
            in its own way.
        most: What it does not pass.
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
    """Return whether a comparison of sizes holds; of a tracer's, whether it does for all that they stand for.

    Args:
        condition: The comparison, not yet asked for its value.
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
    """Make tensors on the meta device, where they have a shape alone, and leave out what would fill them.

    There torch computes shapes in Python for each of an initializer's operations: most of the time that the
    construction of many networks takes.

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
"""Functions that fill a tensor, or scale its values, and leave its shape alone."""


class _WithoutFilling(TorchFunctionMode):
    """Within it numbers are not written to tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            given: list[Any] = [*args, *kwargs.values()]  # torch.nn.init hands on what it fills by name
            filled, *others = given
            # Of another tensor the result would depend, and a gradient has to reach it.
            if filled.is_meta and not any(isinstance(x, Tensor) for x in others):
                return filled
        return func(*args, **kwargs)
