"""PNG of any size, decoded in bands from top to bottom.

PIL decodes a PNG whole. But its rows are one compressed stream in which a row depends only on the row above. So a band
of rows, preceded by the last decoded row, is a valid PNG, which PIL can decode.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn.data.images import open_image, orientation, to_rgb
from a2fpn.data.slides.base import Slide, Window
from a2fpn.data.slides.scale import of_dots
from a2fpn.errors import ImageError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by color type
_STAND_INS = {1: 0, 2: 4, 3: 2, 4: 6}
"""8-bit color type by bytes per pixel, with which PIL returns the raw bytes, since filters operate on bytes."""
_COLORS = (b"PLTE", b"tRNS")
_READ = 2**20  # bytes read at once
_ROWS = 256  # rows decoded at once


class UnreadablePngError(Exception):
    """A PNG that can't be read in bands, but perhaps whole."""


class PngSlide(Slide):
    """A PNG read in bands; windows should be read from top to bottom, otherwise decoding restarts.

    Args:
        path: The file.
        gray_bits: See :func:`a2fpn.data.read_image`.

    Raises:
        UnreadablePngError: If it is interlaced, has more than 4 bytes per pixel, or is rotated by EXIF.
        ImageError: If it is not a PNG.
    """

    def __init__(self, path: Path, *, gray_bits: int = 16) -> None:
        self.name, self._gray_bits = str(path), gray_bits
        try:
            with open_image(path, max_pixels=None) as image:
                turned = orientation(image) != 1
                dots = image.info.get("dpi")
        except (OSError, ValueError) as error:
            raise ImageError(f"{path}: not a readable image ({error}).") from error
        self._file: BinaryIO = path.open("rb")
        self._lock = threading.Lock()
        self._header, self._colors = self._read_head()
        width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", self._header)
        self.size = (height, width)
        self._row_bytes = -(-width * bits * _SAMPLES[kind] // 8)
        self._pixel = max(1, bits * _SAMPLES[kind] // 8)
        if interlaced or turned or self._pixel not in _STAND_INS:
            self._file.close()
            raise UnreadablePngError("interlaced, rotated, or 16-bit with several channels")
        self.microns_per_pixel = of_dots(dots)
        self._rows: NDArray[np.uint8]
        self._restart()

    def close(self) -> None:
        """See :meth:`Slide.close`."""
        self._file.close()

    def read(self, window: Window) -> Tensor:
        """See :meth:`Slide.read`."""
        x0, y0, x1, y1 = window
        with self._lock:
            if y0 < self._first:
                self._restart()
            while self._first + len(self._rows) < y1:
                kept = self._rows[max(0, y0 - self._first) :]
                self._first += len(self._rows) - len(kept)
                self._rows = np.concatenate([kept, self._band()])
            rows = self._rows[y0 - self._first : y1 - self._first]
            if self._header[8] == 8 or self._header[8] == 16:  # whole bytes: crop the columns
                rows, x0, x1 = rows[:, x0 * self._pixel : x1 * self._pixel], 0, x1 - x0
            rows = np.ascontiguousarray(rows)
        width = x1 if rows.shape[1] < self._row_bytes else self.size[1]
        pixels = np.asarray(to_rgb(self._as_image(rows, width), gray_bits=self._gray_bits, name=self.name))[:, x0:x1]
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))

    def _restart(self) -> None:
        self._first = 0
        self._rows = np.zeros((0, self._row_bytes), np.uint8)
        self._last = np.zeros((1, self._row_bytes), np.uint8)
        self._next = 0
        self._stream = self._inflated()

    def _band(self) -> NDArray[np.uint8]:
        """Decode the next rows, (n, bytes of a row)."""
        count = min(_ROWS, self.size[0] - self._next)
        filtered = next(self._stream)
        # Preceded by the last decoded row, with filter 0.
        data = b"\0" + self._last.tobytes() + filtered
        width, kind = self._row_bytes // self._pixel, _STAND_INS[self._pixel]
        header = struct.pack(">IIBBBBB", width, count + 1, 8, kind, 0, 0, 0)
        try:
            with open_image(io.BytesIO(_png(header, data)), max_pixels=None) as image:
                rows = np.asarray(image).reshape(count + 1, self._row_bytes)[1:]
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"{self.name}: damaged around row {self._next} ({error}).") from error
        self._next += count
        self._last = rows[-1:].copy()
        return rows

    def _inflated(self) -> Iterator[bytes]:
        """Yield the filtered bytes of up to :data:`_ROWS` rows at a time."""
        inflate, pending = zlib.decompressobj(), b""
        parts = self._compressed()
        for start in range(0, self.size[0], _ROWS):
            wanted = min(_ROWS, self.size[0] - start) * (self._row_bytes + 1)
            filtered = bytearray()
            while len(filtered) < wanted:
                try:
                    pending = pending or next(parts)
                    filtered += inflate.decompress(pending, wanted - len(filtered))
                except (StopIteration, zlib.error) as error:
                    reason = str(error) or "the file is truncated"
                    raise ImageError(f"{self.name}: damaged around row {start} ({reason}).") from error
                pending = inflate.unconsumed_tail
            yield bytes(filtered)

    def _compressed(self) -> Iterator[bytes]:
        """Yield the compressed bytes in pieces."""
        self._file.seek(len(_SIGNATURE))
        for kind, length in self._chunks():
            while kind == b"IDAT" and length:
                data = self._file.read(min(length, _READ))
                if not data:
                    return
                length -= len(data)
                yield data

    def _read_head(self) -> tuple[bytes, bytes]:
        """Read the header, and the chunks that map values to colors."""
        header, colors = b"", b""
        self._file.seek(len(_SIGNATURE))
        for kind, length in self._chunks():
            if kind == b"IDAT":
                break
            if kind == b"IHDR":
                header = self._file.read(length)
            elif kind in _COLORS:
                colors += _chunk(kind, self._file.read(length))
        return header, colors

    def _chunks(self) -> Iterator[tuple[bytes, int]]:
        """Yield kind and length of each chunk, with the file positioned at its content."""
        while True:
            head = self._file.read(8)
            if len(head) < 8:
                return
            length, kind = struct.unpack(">I4s", head)
            start = self._file.tell()
            yield kind, length
            self._file.seek(start + length + 4)  # after the checksum

    def _as_image(self, rows: NDArray[np.uint8], width: int) -> Image.Image:
        """Build an image from rows of decoded bytes."""
        header = struct.pack(">II", width, len(rows)) + self._header[8:]
        data = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1).tobytes()
        return open_image(io.BytesIO(_png(header, data, self._colors)), max_pixels=None)


def _png(header: bytes, data: bytes, colors: bytes = b"") -> bytes:
    body = zlib.compress(data, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + colors + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
