"""Memory for time in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def maybe_checkpoint(module: nn.Module, step: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Runs a step of a module; in training it keeps only its inputs and runs again in the backward pass.

    Normalized pixels, queries, kernels and reassembled maps would take several times the memory of the pyramid.

    Args:
        module: Says whether this is training.
        step: What to run, a function of tensors without randomness.
        *inputs: Its arguments.

    Returns:
        What the step returns.
    """
    if not (module.training and torch.is_grad_enabled()):
        return step(*inputs)
    result: Tensor = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
