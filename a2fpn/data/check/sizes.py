"""Checks of object sizes against the network's input size and anchors.

Shape shorthand: K objects; sides are (K, 2) float64, width and height in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.check.report import Finding, Severity

Sides = NDArray[np.float64]
_COVERED = 0.5  # minimum IoU of an anchor's shape that fits an object
_GAIN = 0.1  # minimum additional share of objects that other anchors must fit to be suggested
_MEASURED = 20_000  # maximum number of objects compared with anchors
_SMALL, _LARGE = 16.0, 256.0  # pixels of the network's input


def size_findings(
    sides: Sides,
    resized: Sides,
    classes: NDArray[np.int64],
    anchor_sizes: Sequence[Sequence[float]],
    anchor_ratios: Sequence[float],
) -> Iterator[Finding]:
    """Report objects too small for the network, and an input size or anchors that do not fit.

    Args:
        sides: (K, 2) of the boxes.
        resized: (K, 2) in the network's input.
        classes: (K,) numbers of their classes.
        anchor_sizes: Sizes of the anchors of each level; empty without anchors.
        anchor_ratios: Their ratios of height to width.
    """
    before, (low, median, high) = median_size(sides), np.quantile(np.sqrt(resized.prod(1)), (0.05, 0.5, 0.95))
    message = f"The median object measures {before:.1f} pixels, and {median:.1f} in the network's input, where 90 % "
    message += f"measure {low:.1f} to {high:.1f} (square root of the box's area)."
    advice = "That suits the input size."
    severity: Severity = "note"
    if median < _SMALL:
        severity = "warning"
        advice = (
            f"That is small: enlarge the input {2 * _SMALL / median:.1f} times (min_size, max_size), or train on tiles."
        )
    elif median > _LARGE:
        advice = f"That is large: on an input {_LARGE / median:.2f} times the size they would measure {_LARGE:.0f}."
    yield Finding(severity, "object-size", message, advice, len(sides))
    if not anchor_sizes:
        return
    missed = round((1 - covered(resized[:: -(-len(resized) // _MEASURED)], anchor_sizes, anchor_ratios)) * len(sides))
    shown = resized[each_class_alike(resized.prod(1), classes, _MEASURED)]
    now = covered(shown, anchor_sizes, anchor_ratios)
    ratios = sorted({*anchor_ratios, min(anchor_ratios) / 2, max(anchor_ratios) * 2})
    options = [
        ([[round(size * factor) for size in level] for level in anchor_sizes], ratio)
        for ratio in (list(anchor_ratios), ratios)
        for factor in (0.25, 0.5, 1, 2)
    ]
    shares = [covered(shown, *option) for option in options]
    # More ratios cost more: they must fit clearly more than the best sizes alone.
    best = int(np.argmax(shares[:4]))
    best = int(np.argmax(shares)) if max(shares) > shares[best] + _GAIN else best
    alike = ", each class counted alike" if len(np.unique(classes)) > 1 else ""
    message = f"The model's anchors have about the shape of {now:.0%} of the objects{alike} (IoU {_COVERED} or more)."
    if shares[best] > now + _GAIN:
        sizes, fitting = options[best]
        advice = f"anchor_sizes={sizes}, anchor_ratios={fitting} fit {shares[best]:.0%}; anchors are set in the model."
        yield Finding("warning", "anchors", message, advice, missed)
    else:
        advice = "No multiple of these sizes and no wider range of ratios fits clearly more."
        yield Finding("note", "anchors", message, advice, missed)


def each_class_alike(sizes: NDArray[np.float64], classes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Indices of about ``number`` objects, as many of each class and evenly by size, since AP is the mean over classes.

    Args:
        sizes: (K,).
        classes: (K,) numbers of their classes.
        number: Number of indices; those of small classes are repeated.
    """
    order = np.argsort(sizes, kind="stable")
    members = [order[classes[order] == category] for category in np.unique(classes)]
    each = -(-number // len(members))
    return np.concatenate([found[np.arange(each) * len(found) // each] for found in members])


def covered(sides: Sides, sizes: Sequence[Sequence[float]], ratios: Sequence[float], *, iou: float = _COVERED) -> float:
    """Share of boxes, (K, 2), for which a concentric anchor has an IoU of at least ``iou``."""
    best = np.zeros(len(sides))
    for size, ratio in itertools.product(itertools.chain.from_iterable(sizes), ratios):
        anchor = np.array([size / ratio**0.5, size * ratio**0.5])
        shared = np.minimum(sides, anchor).prod(1)
        best = np.maximum(best, shared / (sides.prod(1) + anchor.prod() - shared))
    return float((best >= iou).mean())


def median_size(sides: Sides) -> float | None:
    """Median size of boxes (K, 2); None without boxes."""
    return float(np.median(np.sqrt(sides.prod(1)))) if len(sides) else None
