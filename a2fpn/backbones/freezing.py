"""Freezing of parts of a network, and removal of parameters that do not affect its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal

import torch
from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from a2fpn.layers.frozen_norm import fuse_frozen_norms

Norm = Literal["bn", "frozen", "sync", "gn"]


def convert_norms(body: nn.Module, norm: Norm) -> nn.Module:
    """Convert the batch norms of a network to another kind.

    Uses timm's converters, since torch's drop the activations inside timm's norms. Other norms are kept.

    Args:
        body: The network; it is modified.
        norm: ``"bn"`` changes nothing. ``"frozen"`` turns 2-D batch norms into frozen ones. ``"sync"`` synchronizes
            statistics between processes (trains on an accelerator only). ``"gn"`` converts to group norms of at most
            32 groups that keep the affine weights (Wu and He, "Group Normalization", ECCV 2018).

    Returns:
        The network.
    """
    if norm == "bn":
        return body
    # timm collects some maps by hooks on norms, which conversion would lose.
    hooked = {name: module for name, module in body.named_modules() if isinstance(module, _BatchNorm)}
    if norm == "frozen":
        body = fuse_frozen_norms(freeze_batch_norm_2d(body))  # type: ignore[no-untyped-call]
    elif norm == "sync":
        body = convert_sync_batchnorm(body)  # type: ignore[no-untyped-call]
    else:
        _to_group_norm(body)
    for name, old in hooked.items():
        new = body.get_submodule(name)
        new._forward_hooks.update(old._forward_hooks)
        new._forward_pre_hooks.update(old._forward_pre_hooks)
    return body


def _to_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _to_group_norm(child)
            continue
        groups, device = math.gcd(child.num_features, 32), next((x.device for x in child.buffers()), None)
        if isinstance(child, BatchNormAct2d):
            norm: nn.GroupNorm = GroupNormAct(
                child.num_features, num_groups=groups, eps=child.eps, apply_act=False, device=device
            )
            norm.act, norm.drop = child.act, child.drop
        else:
            norm = nn.GroupNorm(groups, child.num_features, eps=child.eps, device=device)
        if child.affine:
            norm.weight, norm.bias = child.weight, child.bias
        module.add_module(name, norm)


def contributors(maps: Sequence[Tensor]) -> list[set[nn.Parameter]]:
    """Find the parameters that each map depends on, by walking the autograd graph.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> x = first(torch.zeros(1, 2))
        >>> [len(found) for found in contributors([x, second(x)])]
        [2, 4]
    """
    return [_leaves(x) for x in maps]


def _leaves(x: Tensor) -> set[nn.Parameter]:
    leaves: set[nn.Parameter] = set()
    seen = {x.grad_fn}
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        following = {after for after, _ in node.next_functions} - seen
        seen |= following
        waiting += following
    return leaves


def freeze_parameters(module: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[nn.Module]:
    """Freeze parameters.

    Args:
        module: Module that contains them.
        parameters: The parameters to freeze.

    Yields:
        The largest modules that are completely frozen; they have to stay in evaluation mode.
    """
    own = list(module.parameters())
    if own and all(parameter in parameters for parameter in own):
        module.requires_grad_(False)
        yield module
        return
    for parameter in module.parameters(recurse=False):
        if parameter in parameters:
            parameter.requires_grad_(False)
    for child in module.children():
        yield from freeze_parameters(child, parameters)


def drop_unused(body: nn.Module, run: Callable[[], list[Tensor]]) -> tuple[str, ...]:
    """Remove parameters that do not affect a network's maps, mostly heads and final norms.

    Modules that are completely unused are removed. If the network can't run without one, its parameters are frozen
    instead, like single unused parameters.

    Args:
        body: The network; it is modified.
        run: Runs it in evaluation mode with gradients and returns its maps.

    Returns:
        Names of the removed modules and of the frozen parameters, for :func:`drop_modules`.
    """
    maps = run()
    alive = set().union(*contributors(maps))
    unused = {parameter for parameter in body.parameters() if parameter.requires_grad} - alive
    shapes = [x.shape for x in maps]
    removed = []
    # In reverse order, since later modules expect the channels of removed ones.
    for name in reversed(list(_unused_modules(body, unused))):
        parent, _, child = name.rpartition(".")
        holder = body.get_submodule(parent)
        module = getattr(holder, child)
        setattr(holder, child, nn.Identity())
        if _runs(run, shapes):
            removed.append(name)
        else:
            setattr(holder, child, module)
    names = (*removed, *(name for name, parameter in body.named_parameters() if parameter in unused))
    drop_modules(body, names)
    return names


def drop_modules(body: nn.Module, names: Iterable[str]) -> None:
    """Remove modules from a network, and freeze parameters.

    Args:
        body: The network; it is modified.
        names: Names of modules and parameters.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> drop_modules(body, ["1", "0.bias"])
        >>> body[1], body[0].bias.requires_grad
        (Identity(), False)
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = body.get_submodule(parent)
        part = getattr(holder, child)
        if isinstance(part, nn.Module):
            setattr(holder, child, nn.Identity())
        else:
            part.requires_grad_(False)


def _unused_modules(module: nn.Module, unused: Collection[nn.Parameter], prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        own = list(child.parameters())
        if own and all(parameter in unused for parameter in own):
            yield prefix + name
        elif own:
            yield from _unused_modules(child, unused, f"{prefix}{name}.")


def _runs(run: Callable[[], list[Tensor]], shapes: list[torch.Size]) -> bool:
    # A network with a missing part may raise any exception.
    try:
        return [x.shape for x in run()] == shapes
    except Exception:
        return False
