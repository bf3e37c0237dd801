"""Views of a model in evaluation mode that share its tensors but not its flags."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

from timm.models._features import FeatureHooks
from torch import Tensor, nn

from a2fpn.backbones import TimmBackbone

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def eval_view(model: ModuleT) -> ModuleT:
    """Create a view of a model in evaluation mode that shares every parameter and buffer.

    Args:
        model: The model; its training flags are not changed.

    Returns:
        The model itself if it is in evaluation mode and calls leave no state in it; otherwise a copy of its modules
        with the same tensors.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(2)).train()
        >>> view = eval_view(model)
        >>> model.training, view.training, view[0].running_mean is model[0].running_mean
        (True, False, True)
    """
    if not any(module.training or _keeps_maps(module) for module in model.modules()):
        return model
    shared = {id(x): x for x in _kept(model)}
    return copy.deepcopy(model, shared).eval()


class EvalViews:
    """Pool of views of a model; each is lent to one call at a time.

    A view is built if none is free, or if the model has changed since: another module, tensor or hook, another value of
    a module's attribute. So threads share no view, and sequential calls build only one.
    """

    def __init__(self) -> None:
        self._free: list[tuple[list[Any], nn.Module]] = []

    @contextlib.contextmanager
    def lend(self, model: ModuleT) -> Iterator[ModuleT]:
        """Lend an :func:`eval_view` of a model for the duration of a ``with`` statement."""
        parts = _parts(model)
        view = self._taken(parts) or eval_view(model)
        yield view
        if parts:  # not after an error, which may leave feature maps in the view
            self._free.append((parts, view))

    def _taken(self, parts: list[Any]) -> Any:
        """Return a free view of a model with these parts, or None; views of other models are dropped."""
        while self._free:
            try:
                known, view = self._free.pop()
            except IndexError:  # another thread took it
                break
            if len(known) == len(parts) and all(a is b for a, b in zip(known, parts, strict=True)):
                return view
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": []}


def _parts(model: nn.Module) -> list[Any]:
    """Attributes of all modules of a model except their training flags; empty if it needs no view."""
    modules = list(model.modules())
    if not any(module.training or _keeps_maps(module) for module in modules):
        return []
    parts: list[Any] = []
    for module in modules:
        for name, value in vars(module).items():
            if name != "training":
                parts.append(value)
                parts += value.values() if isinstance(value, dict) else ()
                parts += value if isinstance(value, (list, tuple)) else ()
    return parts


def _keeps_maps(module: nn.Module) -> bool:
    """Check whether a backbone collects its maps by hooks in an object shared by all calls."""
    taps = isinstance(module, TimmBackbone) and bool(module.config.taps)
    return taps or any(map(_is_timms, module._forward_hooks.values()))


def _is_timms(hook: Any) -> bool:
    owner = getattr(hook.func, "__self__", None) if isinstance(hook, functools.partial) else None
    return isinstance(owner, FeatureHooks)


def _kept(model: nn.Module) -> Iterator[Any]:
    """Yield the objects that a view shares with its model: all tensors, and hooks that are not part of the network."""
    for module in model.modules():
        yield from module._parameters.values()
        yield from module._buffers.values()
        yield from (x for x in vars(module).values() if isinstance(x, Tensor))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            yield from (hook for hook in hooks.values() if not _is_timms(hook))
