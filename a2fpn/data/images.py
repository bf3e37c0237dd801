"""Image files and their content as 8-bit RGB tensors."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from a2fpn.config import MAX_PIXELS
from a2fpn.errors import ImageError

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files; AVIF and HEIC are read where their decoders are installed."""
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "HEIF")
"""PIL's names of the formats that are read: PIL knows others, of which some start programs."""
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS, _PNG_KEYS = (b"iTXt", b"zTXt", b"tEXt"), (b"XML:com.adobe.xmp", b"Raw profile type exif")
_DARK = 2**12  # values that 12 bits hold
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # tags of a TIFF
_INVERTED = "a2fpn inverted"  # of an opened image, beside what PIL says of it: 0 is white
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_logger = logging.getLogger(__name__)


def open_image(file: Path | BinaryIO, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Open an image of one of :data:`FORMATS` without decoding it.

    Args:
        file: The file, or what reads from it, which stays the caller's to close.
        max_pixels: Most pixels it may have; None sets no limit. PIL's own limit, of the whole process, does not count.

    Raises:
        ValueError: If it is of no such format, or too large.
        OSError: If it can't be read.
    """
    Image.init()
    if isinstance(file, Path):
        with file.open("rb") as opened:
            head = opened.read(16)
    else:
        head = file.read(16)
        file.seek(0)
    reason = ""
    for decoder in filter(None, map(_decoder, FORMATS)):
        accepted = decoder.accept(head)
        if isinstance(accepted, str):  # the right format, without its library
            reason = accepted
        elif accepted:
            return _opened_by(decoder, file, max_pixels)
    raise ValueError(reason or f"it is none of {', '.join(name for name in FORMATS if _decoder(name))}")


def _opened_by(decoder: _Decoder, file: Path | BinaryIO, max_pixels: int | None) -> Image.Image:
    try:
        # Not Image.open, which looks at a limit that all threads and libraries share.
        image: Image.Image = decoder.factory(str(file) if isinstance(file, Path) else file)
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        if str(error) == "unknown pixel mode":  # a TIFF as whole as any other
            raise OSError("its kind of pixels is not read; convert it to 8 bits of gray or RGB") from error
        raise OSError(f"damaged: {error}") from error
    if max_pixels is not None and math.prod(image.size) > max_pixels:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} = {math.prod(image.size)} pixels are more than the limit of {max_pixels}; "
            "raise max_pixels (--max-pixels) if the file can be trusted"
        )
    return image


class _Decoder(NamedTuple):
    factory: Any
    accept: Any


def _decoder(name: str) -> _Decoder | None:
    """Return the decoder of a format and its test of the first 16 bytes; None where no decoder is installed."""
    if name in Image.OPEN:
        return _Decoder(*Image.OPEN[name])
    if name == "HEIF" and importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        return _Decoder(pillow_heif.HeifImageFile, pillow_heif.is_supported)
    return None


def image_path(folder: Path, file_name: str) -> Path:
    """The file of an image of a data set.

    Args:
        folder: The image folder.
        file_name: What the annotations say: a path relative to the folder, or an absolute one that leads into it.

    Raises:
        ImageError: If the path leaves the folder, by its words; links inside the folder are its owner's choice. Or if
            its folders are parted by backslashes, and a file lies where slashes would lead.
    """
    path = folder / file_name
    if ".." in path.parts or os.path.isabs(file_name):
        inner = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
        if Path(inner).parts[:1] == ("..",) or os.path.isabs(inner):
            raise ImageError(
                f"{file_name!r} leads out of the image folder {folder}; a file name must be a path inside it."
            )
        path = folder / inner
    other = folder / file_name.replace("\\", "/")
    if other != path and os.path.isfile(other) and not os.path.exists(path):
        raise ImageError(
            f"{path}: no such file, but {other} is there; write the name with slashes (a2fpn check-data --fix does)."
        )
    return path


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1, as stored, where there is none or a broken one."""
    try:
        # PIL decodes a PNG to look for tags behind its pixels.
        plain = image.format == "PNG" and not _has_tags_behind_pixels(image)
        exif = Image.Image.getexif(image) if plain else image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever PIL raises on a broken tag
        return 1
    return value if value in range(1, 9) else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image's pixels as they are stored; PIL says the turned ones of a TIFF."""
    width, height = getattr(image, "_tile_size", image.size)
    return height, width


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image as its EXIF orientation shows it."""
    height, width = stored_size(image)
    return (width, height) if orientation(image) in _TURNED else (height, width)


def _has_tags_behind_pixels(png: Any) -> bool:
    """Return whether chunks that may hold an orientation follow the pixels of an opened PNG, which stays undecoded."""
    file = png.fp
    place, behind = file.tell(), False
    try:
        file.seek(len(_PNG_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            following = file.tell() + length + 4  # behind the checksum
            behind |= kind == b"IDAT"
            if behind and (kind == b"eXIf" or (kind in _PNG_TEXTS and file.read(21).startswith(_PNG_KEYS))):
                return True
            file.seek(following)
    finally:
        file.seek(place)
    return False


def read_image(
    source: str | Path | bytes,
    *,
    size: tuple[int, int] | None = None,
    name: str = "the given bytes",
    max_pixels: int | None = MAX_PIXELS,
    gray_bits: int = 16,
) -> tv_tensors.Image:
    """Read a PNG, JPEG, WebP, TIFF, BMP or GIF as 8-bit RGB; AVIF and HEIC where their decoders are installed.

    - EXIF orientation: applied, in training and evaluation as in prediction. With ``size``, a picture that has this
      size only as stored is an error, since the annotations then fit another picture than people are shown.
    - 16-bit gray: the full range 0..65535 becomes 0..255, by division by 257 and rounding, whatever range
      the image uses; one that stays below 4096 is nearly black then, and a warning names ``gray_bits``. So does 32-bit
      integer gray, if its values lie in that range. Floating-point images have no agreed range and are an error.
    - 16-bit color, and gray with transparency: the higher byte of each value; ``gray_bits`` is an error then.
    - Transparency: composed over white.
    - Gray, palette, CMYK and the other color spaces: PIL's conversion.
    - Animations and multi-page files: the first frame, and a warning in the log.

    Args:
        source: The image file, or its content.
        size: (H, W) that the image must have, pixels.
        name: What messages call an image given by its content.
        max_pixels: Most pixels that are decoded; None sets no limit.
        gray_bits: Bits that gray values of more than 8 bits use, 9 to 16: the full range of so many becomes 0..255.
            12 for a camera whose 12-bit values stand in a 16-bit file.

    Returns:
        uint8 (3, H, W) in [0, 255].

    Raises:
        ImageError: If the file is missing, no image of these formats, corrupt, too large, or not of the size.

    Example:
        >>> read_image("missing.png")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ImageError: missing.png: no such file.
    """
    name, file = _opened(source, name)
    content = bytearray(file.read_bytes() if isinstance(file, Path) else file.getbuffer())
    try:
        with open_image(io.BytesIO(content), max_pixels=max_pixels) as opened:  # reads the header alone
            _check_size(opened, size, name)
            pixels = _decode_plain_jpeg(opened, content)
            if pixels is not None:
                return tv_tensors.Image(pixels)
            _mark_values(opened, gray_bits=gray_bits, name=name)
            if opened.format != "MPO" and getattr(opened, "is_animated", False):
                frames = getattr(opened, "n_frames", "several")
                _logger.warning("%s: %s frames or pages, of which the first is read.", name, frames)
            if hasattr(opened, "_tile_size"):  # a TIFF, before whose allocation PIL looks at its own limit once more
                opened.im = Image.core.new(  # type: ignore[attr-defined]
                    opened.mode, opened._tile_size
                )
            return tv_tensors.Image(F.to_image(to_rgb(ImageOps.exif_transpose(opened), gray_bits=gray_bits, name=name)))
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on a corrupt file
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ImageError(f"{name}: no readable image ({reason}).") from error


def _mark_values(image: Image.Image, *, gray_bits: int, name: str) -> None:
    """Note beside an opened image what PIL does not make of its values: shades upside down, a key of 16 bits.

    Raises:
        ValueError: If the values have no agreed range, or are not those that ``gray_bits`` is about.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("L", "RGB") and 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("signed values of 8 bits have no agreed range; convert it to unsigned ones")
    if image.mode.startswith("I"):
        image.info[_INVERTED] = tags.get(_PHOTOMETRIC) == 0
        return
    if not any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return
    if gray_bits != 16:
        raise ValueError(
            f"gray_bits={gray_bits} is for gray without transparency, and this has {len(image.getbands())} channels of "
            "16 bits; convert it to 8 bits"
        )
    if image.mode == "RGB" and "transparency" in image.info:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    values = np.asarray(image)[..., [band != "A" for band in image.getbands()]]
    if 0 < values.max() < _DARK >> 8:
        _logger.warning("%s: values of 16 bits that stay below %d, so it is nearly black; convert it.", name, _DARK)


def _check_size(image: Image.Image, size: tuple[int, int] | None, name: str) -> None:
    """Compare an opened image, as its EXIF orientation shows it, with the (H, W) of its annotations."""
    shown = shown_size(image)
    if size is None or shown == size:
        return
    got, wanted = (f"{width} x {height}" for height, width in (shown, size))
    if stored_size(image) == size:
        raise ImageError(
            f"{name}: the annotations say {wanted}, which fits the picture as stored, but its EXIF orientation turns "
            "it, as every viewer and prediction show it. Remove the tag (`exiftool -Orientation= FILE`) or annotate "
            "the turned picture."
        )
    raise ImageError(f"{name}: the image is {got} pixels wide and high, the annotations say {wanted}.")


def _decode_plain_jpeg(opened: Image.Image, content: bytearray) -> Tensor | None:
    """Decode a JPEG in 0.7 of PIL's time, where the pixels are the same; None elsewhere.

    That is a gray or three-channel image that no EXIF turns.
    """
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    if orientation(opened) != 1:
        return None
    try:
        # torchvision's operator; its function warns from 0.29 on that both will go one day.
        pixels: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), _RGB, False)
    except (AttributeError, RuntimeError):  # no operator, or PIL says better what is wrong
        return None
    return pixels if tuple(pixels.shape[:0:-1]) == opened.size else None


def _opened(source: str | Path | bytes, name: str, hint: str = "") -> tuple[str, Path | io.BytesIO]:
    """Return the name of an image in messages, and what PIL can open.

    Raises:
        ImageError: If there is no such file.
    """
    if isinstance(source, bytes):
        return name, io.BytesIO(source)
    path = Path(source)
    if not path.is_file():
        raise ImageError(f"{path}: no such file{hint}.")
    return str(path), path


def read_labels(source: str | Path | bytes, size: tuple[int, int], *, name: str) -> Tensor:
    """Read a map of classes.

    Args:
        source: An 8-bit palette or gray image, the file or its content.
        size: (H, W) that it must have, pixels.
        name: The image's name, for messages about content.

    Returns:
        uint8 (H, W).

    Raises:
        ImageError: If the file is missing, no such map, or not of the size.
    """
    name, file = _opened(source, f"the semantic map of {name}", "; every image needs a semantic map of its name")
    try:
        with open_image(file, max_pixels=None) as image:
            if image.mode not in ("L", "P"):
                raise ImageError(f"{name}: a semantic map must be an 8-bit palette or gray image, got {image.mode!r}.")
            labels = np.array(image, dtype=np.uint8)
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name}: no readable image ({error}).") from error
    if labels.shape != size:
        raise ImageError(f"{name}: the map is {labels.shape[::-1]} pixels wide and high, its image {size[::-1]}.")
    return torch.from_numpy(labels)


def to_rgb(image: Image.Image, *, gray_bits: int = 16, name: str = "the image") -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as :func:`read_image` documents.

    Args:
        image: The image.
        gray_bits: Bits that gray values of more than 8 bits use.
        name: Of the image, in messages.

    Raises:
        ValueError: If its values have no agreed range, or don't fit ``gray_bits``.
    """
    if image.mode.startswith("I"):
        values, most = np.asarray(image).astype(np.int64), 2**gray_bits - 1
        if values.min() < 0 or values.max() > most:
            raise ValueError(
                f"gray values of {values.min()} to {values.max()} don't fit {gray_bits} bits; convert it to 8 bits"
            )
        if gray_bits == 16 and 0 < values.max() < _DARK:
            _logger.warning(
                "%s: gray values reach %d of 65535, so it is nearly black; gray_bits=12 (--gray-bits 12) is for 12-bit "
                "values.",
                name,
                values.max(),
            )
        scaled = ((2 * 255 * values + most) // (2 * most)).astype(np.uint8)
        scaled = 255 - scaled if image.info.get(_INVERTED) else scaled
        if "transparency" in image.info:
            scaled[values == image.info["transparency"]] = 255
        image = Image.fromarray(scaled)
    elif image.mode == "F":
        raise ValueError("floating-point gray values have no agreed range; convert it to 8 bits")
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
