"""Whether a run still learns: losses, gradients and weights are looked at before they do harm."""

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
    """Euclidean norm of all values of floating tensors, on their device; one pass and nothing written."""
    found = [x.detach() for x in tensors if x.is_floating_point()]
    if not found:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([x.float() for x in torch._foreach_norm(found)]))


def check_weights_to_save(tensors: Mapping[str, Tensor], *, before: float, step: int) -> float:
    """Look at everything that is about to be saved.

    Args:
        tensors: Weights, averages and the state of the optimizer, by name.
        before: The norm that this returned last; 0 if there is none.
        step: For the message.

    Returns:
        Norm of all of them.

    Raises:
        DivergedError: If a value is not finite, or they grew beyond all measure.
    """
    norm = float(total_norm(tensors.values()))
    if not norm < float("inf"):
        names = [name for name, x in tensors.items() if x.is_floating_point() and not bool(torch.isfinite(x).all())]
        where = f"{len(names)} tensors hold NaN or infinity, {', '.join(names[:3])}" if names else f"their norm is {norm}"
        raise DivergedError(f"The weights after step {step} are not saved: {where}.")
    if before and norm > MOST_GROWTH * before:
        raise DivergedError(
            f"The weights after step {step} are not saved: their norm grew from {before:.4g} to {norm:.4g} since the "
            "checkpoint before."
        )
    return norm
