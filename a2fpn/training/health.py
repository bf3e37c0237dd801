"""Checks for non-finite losses and gradients, and diverged weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from a2fpn.errors import RunError

MOST_SKIPPED = 10
"""Maximum number of consecutive skipped steps before a run stops."""
MOST_GROWTH = 100.0
"""Growth of the norm of all weights between checkpoints above which a run has diverged."""


class NonFiniteLossError(RunError):
    """A loss or gradient that is infinite or NaN."""


class DivergedError(RunError):
    """Diverged weights or optimizer state, which are not saved."""


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all values of floating-point tensors, on their device, in one pass without copies.

    Example:
        >>> float(total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]]), torch.tensor([7])]))
        5.0
    """
    found = [x.detach() for x in tensors if x.is_floating_point()]
    if not found:
        return torch.zeros(())
    norms = [x.to(found[0].device, torch.float32) for x in torch._foreach_norm(found)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def check_before_saving(
    weights: Mapping[str, Tensor], others: Mapping[str, Tensor], *, before: float, step: int
) -> float:
    """Check all tensors of a checkpoint.

    Args:
        weights: The trained weights, by name.
        others: Averages, and the state of the optimizer.
        before: Previous return value; 0 if there is none.
        step: Step for the message.

    Returns:
        Norm of the weights.

    Raises:
        DivergedError: If a value is not finite, or the norm grew by more than the factor :data:`MOST_GROWTH`.
    """
    norm = float(total_norm(weights.values()))
    if not norm + float(total_norm(others.values())) < float("inf"):
        tensors = {**others, **weights}
        names = [name for name, x in tensors.items() if not float(total_norm([x])) < float("inf")]
        raise DivergedError(
            f"The weights after step {step} are not saved: {len(names)} tensors hold NaN, infinity or values whose "
            f"norm overflows: {', '.join(names[:3])}."
        )
    if before and norm > MOST_GROWTH * before:
        raise DivergedError(
            f"The weights after step {step} are not saved: their norm grew from {before:.4g} to {norm:.4g} since the "
            "checkpoint before."
        )
    return norm
