"""Visualization of a data check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from a2fpn.data import ImageError, read_image
from a2fpn.data.images import image_path
from a2fpn.errors import ConfigError
from a2fpn.inference.draw import draw_grid

if TYPE_CHECKING:
    from a2fpn.data import DataReport


def draw_report(report: DataReport, images: str | Path) -> Image.Image:
    """Draw the examples of a data check, with the codes of their problems.

    Annotations of unreadable images are drawn on gray.

    Args:
        report: Report of :func:`a2fpn.data.check_data` with ``examples``.
        images: The image folder.

    Returns:
        See :func:`draw_grid`.

    Raises:
        ValueError: If the report has no examples.
    """
    from a2fpn.inference import Result

    if not report.examples:
        raise ConfigError(f"{report.name}: no images to draw.")
    # As in the report, with escaped control characters.
    classes = [replace(count.category, name=repr(count.category.name)[1:-1]) for count in report.classes]
    categories = (*classes, *(replace(category, name=f"{category.name} (crowd)") for category in classes))
    results = []
    for example in report.examples:
        try:
            path = image_path(Path(images), example.file_name)
            pixels = np.asarray(read_image(path, size=example.size)).transpose(1, 2, 0)
        except (ImageError, OSError):  # OSError for invalid file names
            pixels = np.full((*example.size, 3), 200, dtype=np.uint8)
        results.append(
            Result(
                boxes=example.boxes,
                scores=np.ones(len(example.boxes), dtype=np.float32),
                labels=example.labels + len(classes) * example.crowds,
                size=example.size,
                categories=categories,
                rles=example.rles,
                image=pixels,
                path=repr(example.file_name)[1:-1],
            )
        )
    return draw_grid(results, [f"image {x.image_id}: {', '.join(x.codes)}" if x.codes else "" for x in report.examples])
