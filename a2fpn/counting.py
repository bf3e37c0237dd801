"""Calibration of the score threshold for counting, on annotated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from a2fpn.errors import ConfigError


@dataclass(frozen=True)
class CountCalibration:
    """Score threshold with the smallest count error, and that error.

    Args:
        threshold: Minimum score of counted objects, in [0, 1].
        mae: Mean absolute difference between predicted and true counts, over all images and classes.
        bias: Mean of predicted minus true counts.
        mae_at_half: ``mae`` at a threshold of 0.5.
        bias_at_half: ``bias`` at a threshold of 0.5.
        counts: Number of counts compared.
    """

    threshold: float
    mae: float
    bias: float
    mae_at_half: float
    bias_at_half: float
    counts: int


def calibrate_counts(scores: Sequence[Sequence[float]], counts: Sequence[int]) -> CountCalibration:
    """Find the score threshold with the smallest mean absolute count error.

    If several intervals between neighboring scores are equally good, it is the midpoint of the widest.

    Args:
        scores: Scores of the detections in [0, 1], per image (or image and class).
        counts: True number of objects for each.

    Raises:
        ValueError: Without an image, if scores and counts differ in number, or for a score outside [0, 1].

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
    # A threshold equal to a score counts its object, as do all thresholds down to the next lower score.
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
    """Return predicted minus true counts, (images, thresholds)."""
    return np.array(
        [
            len(own) - np.searchsorted(own, thresholds, side="left") - count
            for own, count in zip(ascending, counts, strict=True)
        ],
        np.float64,
    )
