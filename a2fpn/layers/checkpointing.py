"""Activation checkpointing in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def set_checkpointing(module: nn.Module, enabled: bool | None) -> None:
    """Choose whether the parts of a module that can checkpoint their activations do so in training.

    Args:
        module: A neck, or any module.
        enabled: True, False, or None for the default: yes, but not when compiled, where the compiler decides what to
            recompute.

    Example:
        >>> from a2fpn.layers import GACARAFE
        >>> set_checkpointing(GACARAFE(16), False)
    """
    for part in module.modules():
        part._checkpointing = enabled  # type: ignore[assignment]


def maybe_checkpoint(module: nn.Module, step: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run a step of a module, by default under activation checkpointing in training.

    Without it, normalized pixels, queries, kernels and reassembled maps take several times the memory of the pyramid.

    Args:
        module: Checkpointing is used if it is in training mode and :func:`set_checkpointing` allows it.
        step: Deterministic function of tensors.
        *inputs: Its arguments.

    Returns:
        Output of the step.
    """
    enabled = getattr(module, "_checkpointing", None)
    if enabled is None:
        enabled = not torch.compiler.is_compiling()
    if not (enabled and module.training and torch.is_grad_enabled()):
        return step(*inputs)
    result: Tensor = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
