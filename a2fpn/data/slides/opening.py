"""Opening of an image by the reader that needs the least memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor

from a2fpn.data.images import open_image, read_image
from a2fpn.data.slides.base import Slide, SlideOptions, Window
from a2fpn.data.slides.png import PngSlide, UnreadablePngError
from a2fpn.data.slides.scale import of_dots
from a2fpn.data.slides.tiff import TiffSlide, UnreadableTiffError
from a2fpn.errors import ConfigError, ImageError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, in both byte orders
_PNG = b"\x89PNG"
_SMALL = 2**24  # pixels up to which a PNG is decoded whole


class WholeSlide(Slide):
    """An image that is decoded whole, by :func:`~a2fpn.data.read_image`.

    Args:
        path: The file.
        options: Options, including the limit of pixels.
    """

    def __init__(self, path: Path, options: SlideOptions) -> None:
        if options.channels is not None or options.intensity is not None:
            raise ConfigError(
                f"{path}: channels and intensity are supported only for TIFF files that are read in tiles."
            )
        self.name = str(path)
        self._pixels: Tensor = read_image(path, max_pixels=options.max_pixels, gray_bits=options.gray_bits)
        self.size = (int(self._pixels.shape[1]), int(self._pixels.shape[2]))
        with open_image(path, max_pixels=None) as image:
            self.microns_per_pixel = of_dots(image.info.get("dpi"))

    def read(self, window: Window) -> Tensor:
        """See :meth:`Slide.read`."""
        x0, y0, x1, y1 = window
        return self._pixels[:, y0:y1, x0:x1]


def open_slide(path: str | Path, options: SlideOptions | None = None) -> Slide:
    """Open an image for reading by windows.

    A TIFF is read tile by tile by tifffile (the extra ``slides``), a PNG in bands; both take memory for a row of tiles.
    Other formats, and TIFFs and PNGs that can't be read in parts, are decoded whole, within the limit of pixels.

    Args:
        path: The file.
        options: Options; by default all channels of a file that has as many as the model, and no limit of pixels.

    Raises:
        ImageError: If the file is missing, not an image, damaged or too large to be decoded whole.
        ConfigError: If its channels don't match the model's, or can't be chosen.
    """
    path, options = Path(path), options or SlideOptions()
    if options.whole:
        return WholeSlide(path, options)
    if not path.is_file():
        raise ImageError(f"{path}: no such file.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in _TIFF and importlib.util.find_spec("tifffile"):
        try:
            return TiffSlide(path, options)
        except UnreadableTiffError:
            return WholeSlide(path, options)
    if magic == _PNG and options.channels is None and options.intensity is None:
        try:
            with open_image(path, max_pixels=_SMALL):
                pass
        except (OSError, ValueError):  # large, or damaged, which the reader will report
            try:
                return PngSlide(path, gray_bits=options.gray_bits)
            except UnreadablePngError:
                pass
    try:
        return WholeSlide(path, options)
    except ImageError as error:
        if magic not in _TIFF:
            raise
        raise ImageError(
            f'{error} Large TIFF files are read in tiles by tifffile: pip install "a2fpn[slides]".'
        ) from error
