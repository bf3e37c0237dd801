"""A model in evaluation mode beside the model itself: same tensors, other flags."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

from timm.models._features import FeatureHooks
from torch import Tensor, nn

from a2fpn.backbones import TimmBackbone

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def eval_view(model: ModuleT) -> ModuleT:
    """A view of a model in evaluation mode, which shares every parameter and buffer and moves none.

    Args:
        model: The model; its training flags stay as they are.

    Returns:
        The model itself where it is in evaluation mode and keeps nothing of a call; otherwise a copy of its modules
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


def _keeps_maps(module: nn.Module) -> bool:
    """Check whether a backbone collects its maps by hooks, into an object that all calls share."""
    taps = isinstance(module, TimmBackbone) and bool(module.config.taps)
    return taps or any(map(_is_timms, module._forward_hooks.values()))


def _is_timms(hook: Any) -> bool:
    owner = getattr(hook.func, "__self__", None) if isinstance(hook, functools.partial) else None
    return isinstance(owner, FeatureHooks)


def _kept(model: nn.Module) -> Iterator[Any]:
    """Yield what a view shares with its model: all tensors, and hooks that are not part of the network."""
    for module in model.modules():
        yield from module._parameters.values()
        yield from module._buffers.values()
        yield from (x for x in vars(module).values() if isinstance(x, Tensor))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            yield from (hook for hook in hooks.values() if not _is_timms(hook))
