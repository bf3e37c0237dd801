"""Activation checkpointing in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def maybe_checkpoint(module: nn.Module, step: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run a step of a module, in training under activation checkpointing.

    Stored normalized pixels, queries, kernels and reassembled maps would take several times the memory of the pyramid.

    Args:
        module: Its ``training`` flag decides.
        step: Deterministic function of tensors.
        *inputs: Its arguments.

    Returns:
        What the step returns.
    """
    # A compiler decides itself what to compute again.
    if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return step(*inputs)
    result: Tensor = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
