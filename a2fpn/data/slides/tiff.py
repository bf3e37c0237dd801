"""Plain, tiled, pyramidal and OME-TIFF by tifffile: only tiles, strips or rows that overlap a window are decoded.

Shape shorthand: a window of h x w pixels, S channels of the file.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from a2fpn.data.slides.base import Slide, SlideOptions, Window, to_8_bit
from a2fpn.data.slides.scale import microns_per_pixel
from a2fpn.errors import A2FPNError, ConfigError, ImageError

if TYPE_CHECKING:
    import tifffile

_CACHED = 2**28  # bytes of cached tiles and strips: a row of tiles of a slide
_WHOLE = 2**29  # bytes of one strip above which reading by windows is pointless
_SAMPLED = 2**22  # pixels sampled for the intensity range
_TAILS = (0.1, 99.9)  # percentiles scaled to 0 and 255
_SHADES = ("minisblack", "miniswhite", "rgb", "ycbcr")
_logger = logging.getLogger(__name__)


class _Plane(NamedTuple):
    """A part of the file with some of the channels.

    Args:
        page: Its page; None if the values are contiguous.
        first: Index of the page's planar sample, or the offset in bytes of contiguous values.
        samples: Number of interleaved channels.
    """

    page: Any
    first: int
    samples: int


class UnreadableTiffError(Exception):
    """A TIFF that can't be read window by window, but perhaps whole."""


class TiffSlide(Slide):
    """The first image of a TIFF file, at its full resolution.

    Args:
        path: The file.
        options: Options of reading.

    Raises:
        UnreadableTiffError: If its values are not gray, channels or RGB of 8, 16 or more bits, are in one compressed
            strip that is too large, or the image is rotated by EXIF.
        ImageError: If it can't be read at all.
        ConfigError: If tifffile is not installed, or the file's channels don't match the model's.
    """

    def __init__(self, path: Path, options: SlideOptions) -> None:
        self.name, self._options = str(path), options
        self._file = _open(path)
        try:
            self._describe()
        except (A2FPNError, UnreadableTiffError):
            self._file.close()
            raise
        except Exception as error:  # damaged tags raise almost anything
            self._file.close()
            raise _unreadable(path, error) from error
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._held = 0
        self._limits = None if options.intensity is None else self._intensity()

    def close(self) -> None:
        """See :meth:`Slide.close`."""
        self._file.close()

    def read(self, window: Window) -> Tensor:
        """See :meth:`Slide.read`."""
        values = self._values(window)
        pixels = to_8_bit(values, self._limits, self.name, bits=self._options.gray_bits)
        alpha = pixels[..., -1:].astype(np.float32) / 255
        pixels = pixels[..., :-1] if self._alpha else pixels
        if self._inverted:
            pixels = 255 - pixels
        if self._alpha:
            seen = pixels if self._multiplied else pixels * alpha
            pixels = (seen + 255 * (1 - alpha)).round().clip(0, 255).astype(np.uint8)
        if pixels.shape[2] == 1:
            pixels = np.repeat(pixels, self._options.in_channels, axis=2)
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))

    def _describe(self) -> None:
        """Find the planes of the first image, its size and its scale."""
        if not self._file.series:
            raise ImageError(f"{self.name}: not a readable TIFF (it contains no image).")
        series = self._file.series[0]
        page = series.keyframe
        shade = getattr(page.photometric, "name", "another color").lower()
        if shade not in _SHADES or page.bitspersample % 8 or page.dtype is None:
            raise UnreadableTiffError(f"{shade} of {page.bitspersample} bits")
        turned = page.tags.get("Orientation")
        if turned is not None and turned.value != 1:
            raise UnreadableTiffError("rotated by its EXIF orientation")
        names = series.axes
        if "C" not in names and self._options.channels is not None:
            names = names.replace("Q", "C").replace("I", "C")  # pages with unspecified meaning
        axes = dict(zip(names, series.shape, strict=True))
        if axes.get("Y", 0) < 1 or axes.get("X", 0) < 1:
            raise ImageError(f"{self.name}: its first image has the axes {names}, expected height and width.")
        self.size = (axes["Y"], axes["X"])
        others = {axis: count for axis, count in axes.items() if axis not in "YXSC" and count > 1}
        if others:
            what = ", ".join(f"{count} along {axis}" for axis, count in others.items())
            _logger.warning("%s: %s; only the first is read.", self.name, what)
        self._dtype = np.dtype(page.dtype).newbyteorder(self._file.byteorder)
        planes = list(self._planes(series, axes))
        count = sum(plane.samples for plane in planes)
        extra = [getattr(kind, "name", str(kind)) for kind in page.extrasamples]
        self._alpha = bool(extra) and "ALPHA" in extra[-1] and self._options.channels is None
        self._multiplied = self._alpha and extra[-1].startswith("ASSOC")  # premultiplied alpha, which PIL undoes
        self._inverted = shade == "miniswhite"
        self._chosen_planes = self._choose(planes, count, self._alpha)
        self.microns_per_pixel = microns_per_pixel(self._file)

    def _planes(self, series: tifffile.TiffPageSeries, axes: dict[str, int]) -> Iterator[_Plane]:
        """Yield the planes of the file in the order of its channels."""
        page = series.keyframe
        samples, separate = page.samplesperpixel, page.planarconfig == 2
        outer = [axis for axis in axes if axis not in "YXS"]
        steps = {axis: math.prod(axes[later] for later in outer[number + 1 :]) for number, axis in enumerate(outer)}
        numbers = [number * steps["C"] for number in range(axes["C"])] if "C" in steps else [0]
        per_page = samples if separate else 1
        for number in numbers:
            if series.dataoffset is not None and page.is_contiguous:  # including ImageJ's, which list a single page
                size = math.prod(self.size) * self._dtype.itemsize * (1 if separate else samples)
                for plane in range(per_page):
                    offset = series.dataoffset + (number * per_page + plane) * size
                    yield _Plane(None, offset, 1 if separate else samples)
                continue
            own = series.pages[number]
            if own is None:
                raise ImageError(f"{self.name}: page {number} is missing.")
            for plane in range(per_page):
                yield _Plane(own, plane, 1 if separate else samples)
            largest = math.prod(page.chunks) * self._dtype.itemsize
            if largest > _WHOLE and not page.is_contiguous:
                raise UnreadableTiffError(f"one strip of {largest} bytes")

    def _choose(self, planes: list[_Plane], count: int, alpha: bool) -> list[tuple[_Plane, list[int]]]:
        """Select planes with the channels to read, in the requested order."""
        wanted, model = self._options.channels, self._options.in_channels
        if wanted is None:
            if count - alpha not in (1, model):
                raise ConfigError(
                    f"{self.name} has {count} channels, the model {model}; set channels=(...) (--channels) to {model} "
                    f"numbers from 0 to {count - 1}, or to one, which is used as gray."
                )
            wanted = tuple(range(count))
        elif len(wanted) not in (1, model) or not all(0 <= channel < count for channel in wanted):
            raise ConfigError(
                f"channels must be {model} numbers from 0 to {count - 1}, or one of them, for {self.name}, got "
                f"{wanted}."
            )
        owners = [(plane, sample) for plane in planes for sample in range(plane.samples)]
        chosen: list[tuple[_Plane, list[int]]] = []
        for channel in wanted:
            plane, sample = owners[channel]
            if chosen and chosen[-1][0] is plane:
                chosen[-1][1].append(sample)
            else:
                chosen.append((plane, [sample]))
        return chosen

    def _values(self, window: Window) -> NDArray[Any]:
        """Read raw values of a window, (h, w, S)."""
        parts = []
        for plane, samples in self._chosen_planes:
            read = self._rows(plane, window) if plane.page is None else self._segments(plane, window)
            parts.append(read if samples == list(range(plane.samples)) else read[..., samples])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def _rows(self, plane: _Plane, window: Window) -> NDArray[Any]:
        """Read a window of contiguous values row by row."""
        x0, y0, x1, y1 = window
        pixel = plane.samples * self._dtype.itemsize
        values = np.empty((y1 - y0, x1 - x0, plane.samples), self._dtype)
        handle = self._file.filehandle
        with self._lock:
            for row, line in zip(range(y0, y1), values, strict=True):
                handle.seek(plane.first + (row * self.size[1] + x0) * pixel)
                data = handle.read((x1 - x0) * pixel)
                if len(data) < (x1 - x0) * pixel:
                    raise ImageError(f"{self.name}: the file ends within row {row}.")
                line[:] = np.frombuffer(data, self._dtype).reshape(line.shape)
        return values.astype(self._dtype.newbyteorder("="))

    def _segments(self, plane: _Plane, window: Window) -> NDArray[Any]:
        """Read a window from the tiles or strips that overlap it."""
        x0, y0, x1, y1 = window
        page = plane.page.keyframe
        height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        if not height or not width:
            raise ImageError(f"{self.name}: its tiles or strips have no size.")
        down, across = -(-self.size[0] // height), -(-self.size[1] // width)
        values = np.full((y1 - y0, x1 - x0, plane.samples), page.nodata, self._dtype.newbyteorder("="))
        for row in range(y0 // height, min(down, -(-y1 // height))):
            for column in range(x0 // width, min(across, -(-x1 // width))):
                segment = self._segment(plane.page, (plane.first * down + row) * across + column)
                if segment is None:
                    continue
                top, left = row * height, column * width
                low, right = min(y1, top + segment.shape[0]), min(x1, left + segment.shape[1])
                if low > max(y0, top) and right > max(x0, left):
                    part = segment[max(y0, top) - top : low - top, max(x0, left) - left : right - left]
                    values[max(y0, top) - y0 : low - y0, max(x0, left) - x0 : right - x0] = part
        return values

    def _segment(self, page: Any, index: int) -> NDArray[Any] | None:
        """Decode a tile or strip, (h, w, s); None if it is not stored."""
        key = (page.index if isinstance(page.index, int) else hash(page.index), index)
        with self._lock:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
            if index >= min(len(page.databytecounts), len(page.dataoffsets)):
                raise ImageError(f"{self.name}: part {index} is missing.")
            if not page.databytecounts[index]:
                return None
            handle = self._file.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
        try:
            decoded, _, _ = page.keyframe.decode(
                data, index, jpegtables=page.jpegtables, jpegheader=getattr(page, "jpegheader", None)
            )
        except Exception as error:  # codecs raise almost anything on damaged data
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ImageError(f"{self.name}: part {index} can't be decoded ({reason}).") from error
        if decoded is None:
            return None
        segment: NDArray[Any] = np.asarray(decoded)[0]
        with self._lock:
            self._decoded[key] = segment
            self._held += segment.nbytes
            while self._held > _CACHED and len(self._decoded) > 1:
                self._held -= self._decoded.popitem(last=False)[1].nbytes
        return segment

    def _intensity(self) -> list[tuple[float, float]]:
        """Values scaled to 0 and 255, per channel."""
        count = sum(len(samples) for _, samples in self._chosen_planes)
        if isinstance(self._options.intensity, tuple):
            return [self._options.intensity] * count
        height, width = self.size
        side = 256
        places = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        step = -(-len(places) * side * side // _SAMPLED)
        parts = [
            self._values((x, y, min(width, x + side), min(height, y + side))).reshape(-1, count)
            for x, y in places[::step]
        ]
        low, high = np.percentile(np.concatenate(parts), _TAILS, axis=0)
        return [(float(a), float(b) if b > a else float(a) + 1) for a, b in zip(low, high, strict=True)]


def _open(path: Path) -> tifffile.TiffFile:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ConfigError(f'{path}: TIFF files are read in tiles by tifffile: pip install "a2fpn[slides]".') from error
    try:
        return tifffile.TiffFile(path)
    except Exception as error:  # a damaged header raises almost anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ImageError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return ImageError(f"{path}: not a readable TIFF ({reason}).")
