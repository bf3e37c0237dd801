"""Histograms of a data set: classes, object sizes, objects per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from a2fpn.data.stats import DataStats
from a2fpn.errors import DataError

_CLASSES = 30
_BINS = 40


def draw_stats(stats: DataStats, path: str | Path, *, title: str = "") -> None:
    """Draw the histograms of a data set.

    Args:
        stats: Its statistics.
        path: The output file; its suffix, such as ``.png`` or ``.svg``, selects the format.
        title: Title of the figure.

    Raises:
        DataError: If the suffix is not a known format.
    """
    figure = Figure(figsize=(15, 5), layout="constrained")
    classes, sizes, densities = figure.subplots(1, 3)
    shown = list(stats.classes.items())[:_CLASSES]
    classes.barh([name for name, _ in reversed(shown)], [count for _, count in reversed(shown)])
    more = f", {_CLASSES} of {len(stats.classes)}" if len(stats.classes) > _CLASSES else ""
    classes.set(title=f"objects of each class{more}", xlabel="objects")
    positive = np.array([size for size in stats.sizes if size > 0])
    if len(positive):
        low, high = positive.min(), positive.max()
        edges = np.geomspace(low, high, _BINS) if high > low else 1
        sizes.hist(positive, bins=edges)
        sizes.set_xscale("log")
    for edge in (32, 96):  # COCO's limits of small, medium and large
        sizes.axvline(edge, color="black", linestyle=":", linewidth=1)
    sizes.set(title="sizes of objects", xlabel="square root of the box's area, pixels (dotted: 32 and 96)")
    if stats.densities:
        densities.hist(stats.densities, bins=min(_BINS, max(stats.densities) + 1))
    densities.set(title="objects in an image", xlabel="objects", ylabel="images")
    if title:
        figure.suptitle(title)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise DataError(f"{path}: the image format is not supported ({error}).") from None
