"""Checks of losses, gradients and weights before they do harm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from a2fpn.errors import RunError

MOST_SKIPPED = 10
"""Steps in a row that may be left out before a run stops."""
MOST_GROWTH = 100.0
"""Factor on the norm of all weights, from one checkpoint to the next, above which a run has diverged."""


class NonFiniteLossError(RunError):
    """A loss or a gradient became infinite or not a number."""


class DivergedError(RunError):
    """The weights, or the state of the optimizer, are no longer worth saving."""


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all values of floating tensors, on their device; one pass, and nothing is written.

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
    """Look at everything that is about to be saved.

    Args:
        weights: The trained weights, by name.
        others: Averages, and the state of the optimizer.
        before: The norm of the weights that this returned last; 0 if there is none.
        step: For the message.

    Returns:
        Norm of the weights.

    Raises:
        DivergedError: If a value is not finite, or the weights grew beyond all measure.
    """
    norm = float(total_norm(weights.values()))
    if not norm + float(total_norm(others.values())) < float("inf"):
        tensors = {**others, **weights}
        names = [name for name, x in tensors.items() if not float(total_norm([x])) < float("inf")]
        raise DivergedError(
            f"The weights after step {step} are not saved: {len(names)} tensors hold NaN, infinity or what is about as "
            f"large: {', '.join(names[:3])}."
        )
    if before and norm > MOST_GROWTH * before:
        raise DivergedError(
            f"The weights after step {step} are not saved: their norm grew from {before:.4g} to {norm:.4g} since the "
            "checkpoint before."
        )
    return norm
