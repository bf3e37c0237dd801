"""Drawing of detections or annotations on an image: masks, boxes, scores, and a legend outside the picture.

Everything is drawn by matplotlib's anti-aliased Agg canvas, in pixels of the output. Small images are first enlarged
by an integer factor, and text is only written where it covers neither objects nor other text, so that a
photograph with three objects and a micrograph with four hundred both stay readable.

Shape shorthand: N objects, K colors, an image of H x W pixels. Boxes are (N, 4), xyxy; colors (N, 3) in [0, 1].
"""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from PIL import Image

from a2fpn._text import shorten
from a2fpn.errors import ConfigError
from a2fpn.inference.canvas import BLACK, RED, WHITE, Canvas, Colors, Entry
from a2fpn.inference.labels import box_areas, place_labels
from a2fpn.inference.shapes import PALETTE, mask_rings, neighbor_colors, smooth_points

if TYPE_CHECKING:
    from a2fpn.config import Category
    from a2fpn.data import Rle


class Drawable(Protocol):
    """Protocol of results that can be drawn, with the fields of :class:`a2fpn.Result`."""

    @property
    def boxes(self) -> NDArray[np.float32]: ...
    @property
    def scores(self) -> NDArray[np.float32]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def categories(self) -> tuple[Category, ...]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def rles(self) -> tuple[Rle, ...] | None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def keypoints(self) -> NDArray[np.float32] | None: ...
    @property
    def keypoint_scores(self) -> NDArray[np.float32] | None: ...
    @property
    def keypoint_names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def load_image(self) -> NDArray[np.uint8]: ...


_COLORS: Colors = to_rgba_array(PALETTE)[:, :3]
_MIN_SIDE = 768  # minimum long side of the picture, pixels
_MIN_OBJECT = 16  # minimum side of a typical object, pixels, unless the picture would exceed _MAX_ENLARGED
_MAX_ENLARGED = 2560
_MAX_SIDE, _MAX_AREA = 2**15, 2**26  # larger pictures are shrunk; Agg's own limit is 2**16 per side
_MIN_WIDTH = 480  # pixels the legend needs to be readable
_MAX_LABELED = 40  # objects; with more, scores are clutter, and the legend gives their range
_INSET = 0.7  # white left of the legend in letter sizes
_LINE = 1.9  # distance of the legend's lines in letter sizes
_LIMBS = (
    ("left_shoulder right_shoulder", "left_shoulder left_hip", "right_shoulder right_hip", "left_hip right_hip")
    + ("left_shoulder left_elbow", "left_elbow left_wrist", "right_shoulder right_elbow", "right_elbow right_wrist")
    + ("left_hip left_knee", "left_knee left_ankle", "right_hip right_knee", "right_knee right_ankle")
    + ("nose left_eye", "nose right_eye", "left_eye left_ear", "right_eye right_ear")
)
"""Edges of the skeleton, by COCO's keypoint names."""

_CELL = (640, 480)  # maximum size of an image in a grid, pixels
_CAPTION, _GAP = 14, 24  # pixels: letters under an image of a grid, white around it


def draw(
    result: Drawable,
    image: NDArray[np.uint8],
    *,
    boxes: bool | None = None,
    labels: bool | None = None,
    legend: bool = True,
    scores: bool = True,
    fit: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw a result on its image; usually called through :meth:`a2fpn.Result.plot`.

    With one class, neighboring objects have different colors; with more, each class has its own color, the same in
    every picture as far as the palette suffices. An image whose long side is under 768 pixels, or whose
    typical object is smaller than 16 pixels, is enlarged by an integer factor; one of more than 64 megapixels is
    shrunk.

    Args:
        result: The detections, all of which are drawn.
        image: (H, W, 3) uint8, RGB.
        boxes: Whether to draw boxes; None draws them unless there are masks and more than 40 objects.
        labels: Whether to write class and score next to objects that have room for it; None does for up to
            40 objects, if they differ in either.
        legend: Whether to add a strip with the classes, their counts and score ranges: below the picture, or
            beside it if it is narrow.
        scores: Whether labels and legend show scores; annotations have none.
        fit: Width and height in pixels that the picture, without its legend, is scaled to fit into; None enlarges
            small images as described above.

    Returns:
        An RGB image, at least 480 pixels wide if it has a legend.

    Raises:
        ValueError: If the image's type is wrong or its size differs from the result's.
    """
    if image.dtype != np.uint8 or image.shape != (*result.size, 3):
        raise ConfigError(
            f"Expected the RGB image of the result, uint8 of shape {(*result.size, 3)}, "
            f"got {image.dtype} of shape {image.shape}."
        )
    few = len(result) <= _MAX_LABELED
    boxes = few or result.rles is None if boxes is None else boxes
    colors, one_class = _object_colors(result)
    labels = few and (scores or not one_class) if labels is None else labels
    room = () if fit is None else zip(fit, result.size[::-1], strict=True)
    scale = min((most / side for most, side in room), default=_scale(result))
    width, height = (max(1, round(side * scale)) for side in result.size[::-1])
    unit = min(max(math.sqrt(width * height) / 1024, 1.0), 2.5)  # lines and letters scale with the picture

    rows: list[list[tuple[float, Entry]]] = []
    left = top = 0.0
    shape = (width, height)
    if legend:
        rows = _wrap(_legend(result, colors, scores=scores), max(width, _MIN_WIDTH), 14 * unit)
        strip = math.ceil(_LINE * 14 * unit * len(rows))
        if width < _MIN_WIDTH:
            left, shape = width, (width + _MIN_WIDTH, max(height, strip))
        else:
            top, shape = height, (width, height + strip)
    canvas = Canvas(*shape)
    resampling = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    canvas.paste(Image.fromarray(image).resize((width, height), resampling))

    order = np.argsort(-box_areas(result.boxes), kind="stable")  # small objects are drawn on top
    if result.rles is not None:
        outlines = [_mask_outline(result.rles[index]) for index in order]
        halo = WHITE if image.mean() > 128 else BLACK
        canvas.outline(outlines, halo, scale=scale, line=3 * unit, opacity=0.6)
        canvas.outline(outlines, colors[order], scale=scale, line=1.5 * unit, fill=0.3)
    if boxes:
        outlines = [_box_outline(result.boxes[index]) for index in order]
        canvas.outline(outlines, colors[order], scale=scale, line=unit)
    if result.keypoints is not None:
        radius = 2.5 * unit / scale
        drawn = [_skeleton(result, index, radius) for index in order]
        limbs, joints = ([outlines[part] for outlines in drawn] for part in range(2))
        canvas.outline(limbs, BLACK, scale=scale, line=3.5 * unit, opacity=0.6)
        canvas.outline(limbs, colors[order], scale=scale, line=2 * unit)
        canvas.outline(joints, WHITE, scale=scale, line=2 * unit)
        canvas.outline(joints, colors[order], scale=scale, line=0, fill=1)
    if labels:
        texts = [f"{score:.2f}" if scores else "" for score in result.scores.tolist()]
        if not (scores and one_class):
            texts = [f"{shorten(name, 32)} {text}".rstrip() for name, text in zip(result.names, texts, strict=True)]
        places = place_labels(texts, result.boxes * scale, (width, height), 11.5 * unit)
        for text, place, color in zip(texts, places, colors, strict=True):
            if place is not None:
                canvas.label(place, text, 11.5 * unit, color)
    for row, pieces in enumerate(rows):
        for x, entry in pieces:
            canvas.entry(left + x, top + _LINE * 14 * unit * (row + 0.7), entry, 14 * unit)
    return canvas.image()


def draw_grid(results: Sequence[Drawable], notes: Sequence[str], *, columns: int = 3) -> Image.Image:
    """Draw a grid of annotated images, each with its name, a remark and its classes below, without scores.

    Args:
        results: The images with their objects.
        notes: A remark on each image, such as its problems; may be empty.
        columns: Images per row.

    Returns:
        An RGB picture; its cells are 640 pixels wide and hold images of up to 640 x 480 pixels.

    Raises:
        ValueError: If there is no image, or not one remark per image.
    """
    line, inset = _LINE * _CAPTION, _INSET * _CAPTION
    if not results or len(notes) != len(results):
        raise ConfigError(f"Expected one note per image and at least one image, got {len(notes)} for {len(results)}.")
    cells = []
    for result, note in zip(results, notes, strict=True):
        picture = draw(result, result.load_image(), legend=False, scores=False, fit=_CELL)
        title, *classes = _wrap(_legend(result, _object_colors(result)[0], scores=False), _CELL[0], _CAPTION)
        cells.append((picture, title, textwrap.wrap(note, _CELL[0] // 8, break_on_hyphens=False), classes))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    pictured = [max(picture.height for picture, *_ in row) for row in rows]
    captioned = [math.ceil(max(1 + len(x) + len(y) for *_, x, y in row) * line) for row in rows]
    width = min(columns, len(cells)) * (_CELL[0] + _GAP) + _GAP
    canvas = Canvas(width, sum(pictured) + sum(captioned) + (2 * len(rows) + 1) * _GAP)
    top = _GAP
    for row, height, caption in zip(rows, pictured, captioned, strict=True):
        for left, (picture, title, remark, classes) in zip(itertools.count(_GAP, _CELL[0] + _GAP), row, strict=False):
            canvas.paste(picture, left, top + height - picture.height)
            y = top + height + line
            for x, entry in title:
                canvas.entry(left + x - inset, y, entry, _CAPTION)
            for text in remark:
                y += line
                canvas.text(left, y, text, _CAPTION, RED)
            for pieces in classes:
                y += line
                for x, entry in pieces:
                    canvas.entry(left + x - inset, y, entry, _CAPTION)
        top += height + caption + 2 * _GAP
    return canvas.image()


def _scale(result: Drawable) -> float:
    """Output pixels per image pixel: an integer, above 1 for small images or objects, or below 1 for huge images."""
    height, width = result.size
    side = max(height, width)
    scale = -(-_MIN_SIDE // side)
    if len(result):
        wanted = math.ceil(_MIN_OBJECT / max(1.0, float(np.median(np.sqrt(box_areas(result.boxes))))))
        scale = max(scale, min(wanted, _MAX_ENLARGED // side))
    return min(scale, _MAX_SIDE / side, math.sqrt(_MAX_AREA / (height * width)))


def _class_colors(labels: NDArray[np.int64]) -> dict[int, Colors]:
    """Color of each class: its own in the palette, or the next free one if that is taken."""
    free = list(range(len(_COLORS)))
    colors = {}
    for label in np.unique(labels).tolist():
        free = free or list(range(len(_COLORS)))
        index = min(free, key=lambda index: (index - label) % len(_COLORS))
        free.remove(index)
        colors[label] = _COLORS[index]
    return colors


def _mask_outline(rle: Rle) -> Outline:
    """Outline of a mask, slightly smoothed."""
    rings = [smooth_points(ring) for ring in mask_rings(rle)]
    return _together([Outline(np.vstack([ring, ring[:1]]), closed=True) for ring in rings])


def _box_outline(box: NDArray[np.float32]) -> Outline:
    """Outline of a box."""
    x0, y0, x1, y1 = box
    return Outline([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], closed=True)


def _skeleton(result: Drawable, index: int, radius: float) -> tuple[Outline, Outline]:
    """Skeleton edges between an object's keypoints, if their names are COCO's, and a circle for each keypoint.

    Keypoints that are not labeled or not confident are omitted.
    """
    assert result.keypoints is not None
    sure = result.keypoints[index, :, 2] > 0
    if result.keypoint_scores is not None:
        sure &= result.keypoint_scores[index] > 0
    places = result.keypoints[index, :, :2]
    known = {name: places[point] for point, name in enumerate(result.keypoint_names) if sure[point]}
    ends = [limb.split() for limb in _LIMBS]
    limbs = [Outline([known[start], known[end]]) for start, end in ends if start in known and end in known]
    return _together(limbs), _together([Outline.circle(place, radius) for place in places[sure]])


def _together(outlines: list[Outline]) -> Outline:
    """Concatenate outlines, possibly none."""
    return Outline.make_compound_path(*outlines) if outlines else Outline(np.empty((0, 2)))


def _object_colors(result: Drawable) -> tuple[Colors, bool]:
    """Color of each object, and whether all objects are of one class."""
    by_class = _class_colors(result.labels)
    if len(by_class) <= 1:
        return _COLORS[neighbor_colors(result.boxes)], True
    return np.array([by_class[label] for label in result.labels.tolist()]), False


def _legend(result: Drawable, colors: Colors, *, scores: bool = True) -> list[Entry]:
    """Return the lines of the legend: the picture's name and size, then each class."""
    height, width = result.size
    # Bytes that are not UTF-8 can't be drawn.
    title = os.fsencode(Path(result.path).name).decode("utf-8", "replace") if result.path else ""
    objects = f"{len(result)} object{'' if len(result) == 1 else 's'}"
    entries = [Entry(np.empty((0, 3)), shorten(title, 32), f"{width} × {height} px, {objects}")]
    for label in np.unique(result.labels).tolist():
        chosen = result.labels == label
        low, high = (f"{score:.2f}" for score in (result.scores[chosen].min(), result.scores[chosen].max()))
        swatches = np.array(list(dict.fromkeys(map(tuple, colors[chosen])))[:4])
        note = f"{chosen.sum()}"
        if scores:
            note += f", score {low if low == high else f'{low}–{high}'}"
        entries.append(Entry(swatches, shorten(result.categories[label].name, 32), note))
    return entries


def _wrap(entries: list[Entry], width: int, size: float) -> list[list[tuple[float, Entry]]]:
    """Wrap entries into rows of at most ``width``, the first on its own row, each with its x."""
    rows: list[list[tuple[float, Entry]]] = []
    x = math.inf
    for index, entry in enumerate(entries):
        if index <= 1 or x + entry.width(size) > width:
            rows.append([])
            x = _INSET * size
        rows[-1].append((x, entry))
        x += entry.width(size)
    return rows
