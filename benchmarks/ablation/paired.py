"""Differences of runs that share a seed, with the confidence interval of their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences.

    Args:
        mean: The mean, in the unit of the values.
        half: Half the width of its 95 % interval; infinite for a single pair.
        pairs: Number of pairs.
    """

    mean: float
    half: float
    pairs: int

    @property
    def includes_zero(self) -> bool:
        """Return whether the interval holds zero."""
        return abs(self.mean) <= self.half

    def __str__(self) -> str:
        if not self.pairs:
            return "no pair"
        if math.isinf(self.half):
            return f"{self.mean:+.2f} (n = 1, no interval)"
        return f"{self.mean:+.2f} ({self.mean - self.half:+.2f} to {self.mean + self.half:+.2f}, n = {self.pairs})"


def difference(values: Mapping[int, float], control: Mapping[int, float]) -> Difference:
    """Return the mean difference of what shares a seed, with its 95 % interval by Student's t.

    Args:
        values: By seed.
        control: By seed; seeds that only one side has are left out.

    Example:
        >>> str(difference({0: 3.0, 1: 5.0, 2: 4.0, 9: 7.0}, {0: 2.0, 1: 3.0, 2: 1.0}))
        '+2.00 (-0.48 to +4.48, n = 3)'
    """
    differences = [values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())]
    if not differences:
        return Difference(math.nan, math.nan, 0)
    mean, pairs = statistics.fmean(differences), len(differences)
    if pairs == 1:
        return Difference(mean, math.inf, 1)
    return Difference(mean, t_quantile(pairs - 1) * statistics.stdev(differences) / math.sqrt(pairs), pairs)


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """Two-sided quantile of Student's t distribution.

    Args:
        degrees: Degrees of freedom, at least 1.
        confidence: Probability between minus and plus the quantile.

    Example:
        >>> [round(t_quantile(degrees), 3) for degrees in (1, 2, 4, 30)]
        [12.706, 4.303, 2.776, 2.042]
    """
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """Probability of [-t, t] (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    squared = math.cos(angle) ** 2
    odd = degrees % 2
    terms, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1 + odd, degrees, 2):
        terms += term
        term *= squared * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * terms) if odd else math.sin(angle) * terms


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as text.

    Example:
        >>> spread([1.0, 3.0]), spread([2.0])
        ('2.0 ± 1.4', '2.0')
    """
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
