"""Activation checkpointing in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def maybe_checkpoint(module: nn.Module, step: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run a step of a module, under activation checkpointing in training.

    Without it, normalized pixels, queries, kernels and reassembled maps take several times the memory of the pyramid.

    Args:
        module: Checkpointing is used if it is in training mode.
        step: Deterministic function of tensors.
        *inputs: Its arguments.

    Returns:
        Output of the step.
    """
    # A compiler decides on recomputation itself.
    if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return step(*inputs)
    result: Tensor = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
