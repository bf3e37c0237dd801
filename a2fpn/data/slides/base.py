"""Common parts of the slide readers: windows to 8-bit tensors.

Shape shorthand: an image of H x W pixels, C channels of a model, S channels of a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from a2fpn.errors import ConfigError, ImageError

Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels of the image, ends exclusive."""


@dataclass(frozen=True)
class SlideOptions:
    """Options of reading.

    Args:
        channels: Channels of the file passed to the model, counted from 0, or a single one used as gray; None for all,
            if the model has as many.
        in_channels: Channels of the model.
        intensity: Values scaled to 0 and 255, the same in all windows. ``"auto"`` uses the 0.1th and the 99.9th
            percentile of each channel. None uses the full range of 8 and 16 bits, regardless of the image's values.
        max_pixels: Maximum number of pixels of an image that has to be decoded whole; None for no limit.
        gray_bits: Bits used by 16-bit values, see :func:`a2fpn.data.read_image`.
        whole: Whether to decode the file whole, by :func:`a2fpn.data.read_image`, regardless of its format.

    Raises:
        ValueError: For an intensity range without a width.
    """

    channels: tuple[int, ...] | None = None
    in_channels: int = 3
    intensity: tuple[float, float] | Literal["auto"] | None = None
    max_pixels: int | None = None
    gray_bits: int = 16
    whole: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.intensity, tuple) and not self.intensity[0] < self.intensity[1]:
            raise ConfigError(f"intensity must be a low and a higher value, got {self.intensity}.")


class Thumbnail(NamedTuple):
    """A downscaled image.

    Args:
        pixels: (h, w, C) uint8.
        side: The integer downscaling factor.
    """

    pixels: NDArray[np.uint8]
    side: int


class Slide(ABC):
    """An image of any size whose windows can be read; a context manager that closes the file.

    Threads may read at the same time.

    Attributes:
        name: The file, for messages.
        size: Height and width, pixels.
        microns_per_pixel: Pixel size stated by the file; None if it states none.
    """

    name: str
    size: tuple[int, int]
    microns_per_pixel: float | None = None

    @abstractmethod
    def read(self, window: Window) -> Tensor:
        """Read a window inside the image, uint8 (C, h, w).

        Raises:
            ImageError: If the file is damaged there.
        """

    def close(self) -> None:
        """Close the file, if it is open."""
        return None

    def thumbnail(self, longest: int = 4096) -> Thumbnail:
        """Return the image downscaled by an integer factor, by averaging.

        Args:
            longest: Maximum long side, pixels.
        """
        height, width = self.size
        side = -(-max(height, width) // longest)
        rows = []
        step = max(1, 1024 // side) * side
        for top in range(0, height, step):
            band = [
                _shrunk(self.read((left, top, min(width, left + step), min(height, top + step))), side)
                for left in range(0, width, step)
            ]
            rows.append(np.concatenate(band, axis=1))
        return Thumbnail(np.concatenate(rows), side)

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shrunk(pixels: Tensor, side: int) -> NDArray[np.uint8]:
    """Average over squares of pixels, (h, w, C); those at the ends may be smaller."""
    mean = torch.nn.functional.avg_pool2d(pixels[None].float(), side, ceil_mode=True, count_include_pad=False)[0]
    return np.asarray(mean.round().to(torch.uint8).permute(1, 2, 0))


def to_8_bit(
    values: NDArray[np.generic], limits: Sequence[tuple[float, float]] | None, name: str, *, bits: int = 16
) -> NDArray[np.uint8]:
    """Convert values (h, w, S) to 8 bits.

    Args:
        values: Values of any dtype.
        limits: Per channel the values scaled to 0 and 255; None for the full range of 8 and 16 bits.
        name: The image, for messages.
        bits: Bits used by 16-bit values.

    Raises:
        ImageError: For values that exceed the bits, or, without limits, for a dtype without a defined range.
    """
    if limits is not None:
        low, high = np.array(limits, dtype=np.float64).T
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.asarray(np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8))
    if values.dtype == np.uint8:
        return values.astype(np.uint8)
    if values.dtype == np.uint16:
        wide, most = values.astype(np.int32), 2**bits - 1
        if wide.max(initial=0) > most:
            raise ImageError(f"{name}: a value of {wide.max()} doesn't fit gray_bits={bits} (--gray-bits).")
        return np.asarray(((2 * 255 * wide + most) // (2 * most)).astype(np.uint8))  # as in read_image
    raise ImageError(
        f"{name}: {values.dtype} values have no standard range; give the values that become black and white, "
        "intensity=(low, high) (--intensity LOW,HIGH), or auto."
    )
