"""Canvas of matplotlib's anti-aliased Agg, in pixels of the output."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, Bbox, IdentityTransform
from numpy.typing import NDArray
from PIL import Image

Colors = NDArray[np.float64]
BLACK, DARK, GRAY, WHITE, RED = to_rgba_array(["black", "#222222", "#666666", "white", "#B00020"])[:, :3]
_DPI = 64  # a power of two, so that inches x dpi gives back whole pixels


class Entry(NamedTuple):
    """An entry of the legend: colored squares, a name, a remark in gray."""

    colors: Colors
    name: str
    note: str

    def width(self, size: float) -> float:
        """Width including the gap to the next entry, for letters of ``size`` pixels."""
        squares = (len(self.colors) * 0.8 + 0.5) * size if len(self.colors) else 0
        return squares + text_width(self.name, size, bold=True) + text_width(self.note, size) + 2.5 * size


class Canvas:
    """White figure with pixel coordinates, y pointing down.

    Args:
        width: Pixels.
        height: Pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self.clip = self.figure.bbox

    def paste(self, picture: Image.Image, left: int = 0, top: int = 0) -> None:
        """Paste a picture with its top left corner at (left, top); outlines are clipped to it."""
        bottom = self.height - top - picture.height
        self.figure.figimage(np.asarray(picture), xo=left, yo=bottom, origin="upper")
        self.clip = Bbox.from_extents(left, bottom, left + picture.width, bottom + picture.height)

    def outline(
        self,
        outlines: list[Outline],
        colors: Colors,
        *,
        scale: float,
        line: float,
        opacity: float = 1.0,
        fill: float = 0.0,
    ) -> None:
        """Stroke and fill outlines, given in pixels / ``scale``, with lines of ``line`` pixels.

        ``opacity`` is that of the lines, ``fill`` that of the areas.
        """
        self.figure.add_artist(
            PathCollection(
                outlines,
                facecolors=to_rgba_array(colors, fill) if fill else "none",
                edgecolors=to_rgba_array(colors, opacity),
                linewidths=line * 72 / _DPI,
                joinstyle="round",
                transform=Affine2D().scale(scale, -scale).translate(0, self.height),
                clip_box=self.clip,
            )
        )

    def rectangle(self, x: float, y: float, width: float, height: float, color: Colors) -> None:
        """Fill a rectangle whose top left corner is (x, y)."""
        corner = (x, self.height - y - height)
        self.figure.add_artist(Rectangle(corner, width, height, color=color, lw=0, transform=IdentityTransform()))

    def text(self, x: float, y: float, text: str, size: float, color: Colors, *, bold: bool = False) -> float:
        """Write text on the baseline y and return its width in pixels."""
        self.figure.add_artist(
            Text(
                x,
                self.height - y,
                text,
                color=tuple(color),
                fontproperties=_font(size, bold),
                parse_math=False,
                transform=IdentityTransform(),
            )
        )
        return text_width(text, size, bold=bold)

    def label(self, place: NDArray[np.float64], text: str, size: float, color: Colors) -> None:
        """Write a label on a colored rectangle, given as xyxy."""
        x0, y0, x1, y1 = place
        self.rectangle(x0, y0, x1 - x0, y1 - y0, color)
        dark_on_light = color @ (0.299, 0.587, 0.114) > 0.45
        self.text(x0 + 0.25 * size, y1 - 0.35 * size, text, size, DARK if dark_on_light else WHITE)

    def entry(self, x: float, y: float, entry: Entry, size: float) -> None:
        """Write an entry of the legend on the baseline y."""
        for color in entry.colors:
            self.rectangle(x, y - 0.75 * size, 0.8 * size, 0.8 * size, color)
            x += 0.8 * size
        x += 0.5 * size if len(entry.colors) else 0
        x += self.text(x, y, entry.name, size, DARK, bold=True) + 0.5 * size if entry.name else 0
        self.text(x, y, entry.note, size, GRAY)

    def image(self) -> Image.Image:
        """Render the picture."""
        canvas: Any = FigureCanvasAgg(self.figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _font(size: float, bold: bool) -> FontProperties:
    """The typeface, DejaVu Sans, which comes with matplotlib, at a size in pixels."""
    return FontProperties(family="DejaVu Sans", size=size * 72 / _DPI, weight="bold" if bold else "normal")


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a text in pixels."""
    return float(_renderer().get_text_width_height_descent(text, _font(size, bold), ismath=False)[0])


@functools.cache
def _renderer() -> Any:
    """Return a renderer for measuring text."""
    canvas: Any = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=_DPI))
    return canvas.get_renderer()
