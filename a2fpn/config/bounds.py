"""Bounds of numbers in a configuration, which may be untrusted, and their checks."""

from __future__ import annotations

import functools
import typing
from typing import Any, Literal

from a2fpn.errors import ConfigError

MAX_PIXELS = 2**28
"""Default limit of pixels above which a file is not decoded: in RGB these take 805 MB."""

SCORE_THRESHOLD = 0.5
"""Default score threshold of a Predictor and of the commands."""

MOST_LAYERS = 100
LARGEST_IMAGE = 8192
LONGEST_IMAGE = 32_768
LARGEST_POOL = 128
LARGEST_WEIGHT = 1000
LARGEST_STRIDE = 1024
LARGEST_DIVISOR = 1024
MOST_BOXES = 1_000_000
MOST_CHANNELS = 65_536
MOST_SAMPLES = 64
MOST_TOP_LEVELS = 8


def check_layers(*, least: int = 0, **counts: int) -> None:
    """Check counts that a constructor loops over."""
    for name, count in counts.items():
        if not least <= count <= MOST_LAYERS:
            raise ConfigError(f"{name} must be between {least} and {MOST_LAYERS}, got {count}.")


def check_range(least: float, most: float, **values: float) -> None:
    """Check numbers that would otherwise fail only at the first image."""
    for name, value in values.items():
        # The negation also rejects NaN.
        if not least <= value <= most:
            raise ConfigError(f"{name} must be between {least} and {most}, got {value}.")


def check_thresholds(**names: tuple[float, float]) -> None:
    """Check that the IoU threshold of positives is not below that of negatives."""
    for name, (positive, negative) in names.items():
        check_range(0, 1, **{f"{name}fg_iou": positive, f"{name}bg_iou": negative})
        if negative > positive:
            raise ConfigError(f"{name}bg_iou={negative} must not be above {name}fg_iou={positive}.")


def check_anchors(sizes: tuple[tuple[int, ...], ...] | None, ratios: tuple[float, ...]) -> None:
    """Check sizes and ratios of anchors."""
    for level in sizes or ():
        for size in level:
            check_range(1, LARGEST_IMAGE, anchor_sizes=size)
    for ratio in ratios:
        check_range(0.01, 100, anchor_ratios=ratio)


def check_choices(config: Any) -> None:
    """Check ``Literal`` fields, which Python does not enforce."""
    for name, choices in _choices(config.__class__).items():
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


@functools.cache
def _choices(config: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(config).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}
