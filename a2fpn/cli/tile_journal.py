"""Tiles of an image that are done, kept on the disk until all are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2fpn._atomic import append_line, write_text
from a2fpn.data.slides import Window
from a2fpn.inference.tiling import TileDetections

_LINE = {"tile", "boxes", "scores", "labels", "masks"}


class TileJournal:
    """File with a line of JSON for each tile of an image that is done.

    A first line says which image and which tiles are meant; a file about others is started anew. A line that a kill
    has cut off does not count.

    Args:
        path: The file.
        image: The image file, of which size and time of change are noted.
        windows: All tiles.

    Attributes:
        tiles: Detections of the tiles that are done, by their numbers.
    """

    def __init__(self, path: Path, image: Path, windows: Sequence[Window]) -> None:
        self.path = path
        about = image.stat()
        head = {"bytes": about.st_size, "changed": about.st_mtime_ns, "tiles": [list(window) for window in windows]}
        lines = list(whole_lines(path))
        known = [line for line in lines[1:] if line.keys() == _LINE] if lines and lines[0] == head else []
        self.tiles = {line["tile"]: _from_line(line, windows[line["tile"]]) for line in known}
        # Anew, without what a kill has cut off; replacing a link instead of following it.
        write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *known)))

    def add(self, number: int, found: TileDetections) -> None:
        """Keep the detections of a tile."""
        record = {
            "tile": number,
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "labels": found.labels.tolist(),
            "masks": None if found.rles is None else [rle["counts"] for rle in found.rles],
        }
        append_line(self.path, json.dumps(record))
        self.tiles[number] = found


def done_tiles(path: Path) -> int:
    """Number of tiles that a file of :class:`TileJournal` holds."""
    return max(0, sum(1 for _ in whole_lines(path)) - 1)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file as far as they are whole objects of JSON."""
    if not path.is_file() or path.is_symlink():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # cut off
                return
            if not isinstance(line, dict):
                return
            yield line


def _from_line(line: Mapping[str, Any], window: Window) -> TileDetections:
    size = [window[3] - window[1], window[2] - window[0]]
    return TileDetections(
        window,
        np.array(line["boxes"], dtype=np.float32).reshape(-1, 4),
        np.array(line["scores"], dtype=np.float32),
        np.array(line["labels"], dtype=np.int64),
        None if line["masks"] is None else tuple({"size": size, "counts": counts} for counts in line["masks"]),
    )
