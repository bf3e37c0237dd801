"""Output of comparisons and galleries: PNG, PDF, and a page with a slider between two models."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from PIL import Image

from a2fpn._text import shorten
from a2fpn._version import __version__
from a2fpn.data import read_image
from a2fpn.errors import ConfigError
from a2fpn.report.compare import Cell, Column, Comparison
from a2fpn.report.outlines import data_uri, rings_of, svg_path
from a2fpn.report.page import environment

_DPI = 150
_WIDTH = 1500.0  # all lengths in pixels of the PNG
_MARGIN, _GAP, _CAPTION, _NAME = 44.0, 8.0, 26.0, 24.0
_MOST_TEXTS = 12  # objects of an image; with more, none are labeled
_TALLEST = 520.0


def save_comparison(comparison: Comparison, output: str | Path, *, columns: int = 4) -> list[Path]:
    """Write a comparison as PNG, PDF and HTML.

    Args:
        comparison: The comparison.
        output: Path of the files, with or without one of their suffixes; missing folders are created.
        columns: Images side by side.

    Returns:
        The three files.
    """
    stem = _stem(output)
    figure = draw_sheet(comparison, columns=columns)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf", "html")]
    figure.savefig(files[0], dpi=_DPI)
    figure.savefig(files[1], dpi=_DPI, metadata={"CreationDate": None})
    files[2].write_text(slider_page(comparison), encoding="utf-8")
    return files


def save_gallery(comparison: Comparison, output: str | Path, *, columns: int = 4) -> list[Path]:
    """Write one model's results as PNG and PDF; see :func:`save_comparison`."""
    stem = _stem(output)
    figure = draw_sheet(comparison, columns=columns, names=False)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    figure.savefig(files[0], dpi=_DPI)
    figure.savefig(files[1], dpi=_DPI, metadata={"CreationDate": None})
    return files


def draw_sheet(comparison: Comparison, *, columns: int = 4, names: bool = True) -> Figure:
    """Draw columns of images, one row per model; further columns continue below.

    Args:
        comparison: The comparison.
        columns: Images side by side, at least 1.
        names: Whether the rows are labeled in the margin.

    Raises:
        ConfigError: For fewer than one column.
    """
    if columns < 1:
        raise ConfigError(f"columns must be at least 1, got {columns}.")
    margin = _MARGIN if names else _GAP
    blocks = [comparison.columns[start : start + columns] for start in range(0, len(comparison.columns), columns)]
    heights = [_row_height(block, columns, _WIDTH - margin - _GAP) for block in blocks]
    lines = textwrap.wrap(comparison.note, 190)
    per_block = [_NAME + (height + _CAPTION) * len(comparison.rows) + 2 * _GAP for height in heights]
    total = sum(per_block) + 22.0 * len(lines) + 2 * _GAP
    figure = Figure(figsize=(_WIDTH / _DPI, total / _DPI), facecolor="white")
    top = _GAP

    def write(x: float, y: float, text: str, **style: object) -> None:
        figure.text(x / _WIDTH, 1 - y / total, text, parse_math=False, **style)  # type: ignore[arg-type]

    for block, height, used in zip(blocks, heights, per_block, strict=True):
        x = margin
        for column in block:
            width = height * column.size[1] / column.size[0]
            write(x, top + _NAME - 7, _fit(column.path.name, width), size=6, color="#555555")
            pixels = _pixels(column)
            for row, cell in enumerate(column.cells):
                y = top + _NAME + row * (height + _CAPTION)
                area = (x / _WIDTH, 1 - (y + height) / total, width / _WIDTH, height / total)
                _draw_cell(figure.add_axes(area), pixels, column, cell)
                write(x, y + height + 18, cell.remark, size=6, color="#222222")
            x += width + _GAP
        for row, name in enumerate(comparison.rows if names else ()):
            y = top + _NAME + row * (height + _CAPTION) + height / 2
            text = _fit(name, height * 1.1)
            write(_MARGIN / 2, y, text, rotation=90, ha="center", va="center", size=8, weight="bold")
        top += used
    for number, line in enumerate(lines):
        write(margin, top + 22.0 * (number + 0.7), line, size=6.5, color="#444444")
    return figure


def slider_page(comparison: Comparison) -> str:
    """Build a self-contained HTML page with a slider between two rows of the comparison."""
    shown = (
        [0, len(comparison.rows) - 1]
        if len(comparison.rows) < 3
        else [len(comparison.rows) - 2, len(comparison.rows) - 1]
    )
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            rows=comparison.rows,
            note=comparison.note,
            version=__version__,
            left=shown[0],
            right=shown[1],
            columns=[
                {
                    "name": column.path.name,
                    "height": column.size[0],
                    "width": column.size[1],
                    "uri": data_uri(_pixels(column), longest=1000),
                    "cells": [
                        (
                            [
                                (Markup(svg_path(rings_of(cell.boxes, cell.rles, row))), cell.colors[row], text)
                                for row, text in enumerate(cell.texts or [""] * len(cell))
                            ],
                            cell.remark,
                        )
                        for cell in column.cells
                    ],
                }
                for column in comparison.columns
            ],
        )
    )


def _row_height(block: Sequence[Column], columns: int, width: float) -> float:
    """Height at which the images of a block fill the width; an incomplete block is treated as full."""
    aspects = [column.size[1] / column.size[0] for column in block]
    full = sum(aspects) * columns / len(aspects)
    return min((width - _GAP * (columns - 1)) / full, _TALLEST)


def _draw_cell(axes: Axes, pixels: NDArray[np.uint8], column: Column, cell: Cell) -> None:
    height, width = column.size
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="antialiased")
    axes.set_axis_off()
    areas = cell.boxes[:, 2] * cell.boxes[:, 3]
    for row in np.argsort(-areas, kind="stable").tolist():  # small objects are drawn on top
        outline = _outline(cell, row)
        color = cell.colors[row]
        axes.add_collection(
            PathCollection([outline], facecolors=[to_rgba(color, 0.35)], edgecolors=[color], linewidths=0.7),
            autolim=False,
        )
    for row, text in enumerate(cell.texts if len(cell) <= _MOST_TEXTS else ()):
        x, y = cell.boxes[row, :2]
        axes.text(
            *(max(x, 0.01 * width), max(y, 0.03 * height), text),
            size=4.5,
            color="black",
            va="bottom",
            clip_on=True,
            parse_math=False,
            bbox={"facecolor": cell.colors[row], "edgecolor": "none", "pad": 0.8, "alpha": 0.9},
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _outline(cell: Cell, row: int) -> Outline:
    rings = rings_of(cell.boxes, cell.rles, row)
    if not rings:
        return Outline(np.empty((0, 2)))
    return Outline.make_compound_path(*(Outline(ring, closed=True) for ring in rings))


def _pixels(column: Column) -> NDArray[np.uint8]:
    """Load the image, shrunk to the resolution of a figure."""
    picture = Image.fromarray(read_image(column.path).permute(1, 2, 0).numpy())
    picture.thumbnail((1000, 1000))
    return np.asarray(picture)


def _fit(text: str, room: float) -> str:
    """Truncate a text to about ``room`` pixels at the size of the captions."""
    return shorten(text, max(6, int(room / 8)))


def _stem(output: str | Path) -> Path:
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix("") if path.suffix in (".png", ".pdf", ".html") else path
