"""Label images: each pixel is the number of its object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from a2fpn._atomic import replaced_file
from a2fpn.errors import ConfigError
from a2fpn.inference.result import Result
from a2fpn.masks.rle import decode_windows
from a2fpn.writers.base import image_format

_TILE = 512
_MOST_16 = 2**16 - 1


@image_format("labels", suffix="_labels.tif")
def write_labels(result: Result, path: Path) -> None:
    """Write a tiled, compressed TIFF of 16 bits, or of 32 for more than 65,535 objects.

    0 is background, other values are the numbers of objects in the table of ``csv``: 1 is the best. Overlapping pixels
    belong to the object with the higher score, as in :func:`a2fpn.instance_metrics.label_image`.

    Raises:
        ConfigError: If there are no masks, or tifffile is not installed.
    """
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ConfigError('Label images are written by tifffile: pip install "a2fpn[slides]".') from error
    if result.rles is None and len(result):
        raise ConfigError("A label image needs masks, and this model predicts boxes only.")
    dtype = np.dtype(np.uint16 if len(result) <= _MOST_16 else np.uint32)
    scale = result.microns_per_pixel
    with replaced_file(path) as partial:
        tifffile.imwrite(
            partial,
            _tiles(result, dtype),
            shape=result.size,
            dtype=dtype,
            tile=(_TILE, _TILE),
            compression="zlib",
            photometric="minisblack",
            metadata=None,
            bigtiff=result.size[0] * result.size[1] * dtype.itemsize >= 2**31,
            resolution=(1e4 / scale, 1e4 / scale) if scale else None,
            resolutionunit="CENTIMETER" if scale else None,
        )


def _tiles(result: Result, dtype: np.dtype[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
    """Yield tiles row by row; those at the ends are padded with background."""
    height, width = result.size
    rles = result.rles or ()
    # Masks may extend beyond their boxes by a fraction of a pixel.
    tops, bottoms = np.floor(result.boxes[:, 1]) - 1, np.ceil(result.boxes[:, 3]) + 1
    across = -(-width // _TILE)
    for first in range(0, height, _TILE):
        band = np.zeros((_TILE, across * _TILE), dtype)
        rows = np.flatnonzero((tops < first + _TILE) & (bottoms > first))[::-1]  # the best is painted last
        for row, (window, (left, top, right, bottom)) in zip(
            rows, decode_windows([rles[i] for i in rows]), strict=True
        ):
            start, stop = max(top, first), min(bottom, first + _TILE)
            if start < stop:
                place = band[start - first : stop - first, left:right]
                place[window[start - top : stop - top] > 0] = row + 1
        yield from (band[:, column * _TILE : (column + 1) * _TILE] for column in range(across))
