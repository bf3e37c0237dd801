"""The score from which objects are counted, chosen on annotated images instead of guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from a2fpn.errors import ConfigError


@dataclass(frozen=True)
class CountCalibration:
    """Score threshold with the least count error, and that error.

    Args:
        threshold: The score from which objects count, in [0, 1].
        mae: Mean absolute difference between found and true counts, of all images and classes.
        bias: Mean of found minus true counts.
        mae_at_half: ``mae`` from a score of 0.5 on.
        bias_at_half: ``bias`` from a score of 0.5 on.
        counts: How many counts were compared.
    """

    threshold: float
    mae: float
    bias: float
    mae_at_half: float
    bias_at_half: float
    counts: int


def calibrate_counts(scores: Sequence[Sequence[float]], counts: Sequence[int]) -> CountCalibration:
    """Find the score threshold with the least mean absolute count error.

    Where several steps from score to score are equally good, it is in the middle of the widest.

    Args:
        scores: For each image (or image and class) the scores of what was found, in [0, 1].
        counts: For each how many objects there are.

    Raises:
        ValueError: Without an image, for other numbers of scores and counts, or a score outside [0, 1].

    Example:
        >>> calibrate_counts([[0.9, 0.8, 0.3], [0.95, 0.2]], [2, 1]).threshold
        0.55
    """
    if len(scores) != len(counts) or not len(counts):
        raise ConfigError(f"Expected scores and a count for one or more images, got {len(scores)} and {len(counts)}.")
    ascending = [np.sort(np.asarray(own, np.float64)) for own in scores]
    every = np.unique(np.concatenate(ascending))
    if not ((every >= 0) & (every <= 1)).all():
        raise ConfigError("Scores must lie in [0, 1].")
    # The threshold of a score counts its object; all thresholds down to the next score below count the same.
    edges = every if len(every) and every[-1] == 1 else np.append(every, 1.0)
    errors = _errors(ascending, counts, edges)
    mae = np.abs(errors).mean(0)
    lower = np.insert(edges[:-1], 0, 0.0)
    widths = np.where(mae <= mae.min() + 1e-12, edges - lower, -1.0)
    best = int(widths.argmax())
    threshold = float((lower[best] + edges[best]) / 2)
    found, half = (_errors(ascending, counts, np.array([at]))[:, 0] for at in (threshold, 0.5))
    return CountCalibration(
        threshold,
        mae=float(np.abs(found).mean()),
        bias=float(found.mean()),
        mae_at_half=float(np.abs(half).mean()),
        bias_at_half=float(half.mean()),
        counts=len(counts),
    )


def _errors(
    ascending: Sequence[NDArray[np.float64]], counts: Sequence[int], thresholds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Found minus true counts, (images, thresholds)."""
    return np.array(
        [
            len(own) - np.searchsorted(own, thresholds, side="left") - count
            for own, count in zip(ascending, counts, strict=True)
        ],
        np.float64,
    )
