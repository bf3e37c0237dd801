"""Reading of image files as 8-bit RGB tensors."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import struct
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from a2fpn.config import MAX_PIXELS
from a2fpn.errors import ImageError

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif"),
    *(".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)
"""Suffixes of image files; AVIF and HEIC are read if their decoders are installed."""
FORMATS = MappingProxyType(
    {
        "JPEG": ".jpg",
        "PNG": ".png",
        "TIFF": ".tif",
        "WEBP": ".webp",
        "BMP": ".bmp",
        "GIF": ".gif",
        "AVIF": ".avif",
        "HEIF": ".heic",
    }
)
"""Usual suffixes of the allowed formats, by PIL's names: some of PIL's other formats start external programs."""
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS, _PNG_KEYS = (b"iTXt", b"zTXt", b"tEXt"), (b"XML:com.adobe.xmp", b"Raw profile type exif")
_DARK = 2**12  # number of 12-bit values
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # tags of a TIFF
_INVERTED = "a2fpn inverted"  # key in ``info`` of an opened image: 0 is white
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_logger = logging.getLogger(__name__)


def open_image(file: Path | BinaryIO, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Open an image of one of :data:`FORMATS` without decoding it.

    Args:
        file: The file, or a file object, which the caller closes.
        max_pixels: Maximum number of pixels; None for no limit. PIL's own process-wide limit is not used.

    Raises:
        ValueError: If the format is not allowed, or it is too large.
        OSError: If it can't be read.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            head = opened.read(16)
    else:
        head = file.read(16)
        file.seek(0)
    _, decoder, reason = _format_of(head)
    if decoder is None:
        raise ValueError(reason or f"expected one of {', '.join(name for name in FORMATS if _decoder(name))}")
    return _opened_by(decoder, file, max_pixels)


def _opened_by(decoder: _Decoder, file: Path | BinaryIO, max_pixels: int | None) -> Image.Image:
    try:
        # Not Image.open, which uses a process-wide limit.
        image: Image.Image = decoder.factory(str(file) if isinstance(file, Path) else file)
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        if str(error) == "unknown pixel mode":  # an intact TIFF in an unsupported mode
            raise OSError("its pixel format is not supported; convert it to 8-bit gray or RGB") from error
        raise OSError(f"damaged: {error}") from error
    if max_pixels is not None and math.prod(image.size) > max_pixels:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} = {math.prod(image.size)} pixels exceed the limit of {max_pixels}; "
            "raise max_pixels (--max-pixels) if you trust the file"
        )
    return image


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image; ``._a.jpg``, which macOS writes beside ``a.jpg``, is not."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith("._")


def suffix_of(source: Path | bytes) -> str:
    """Return the usual suffix of an image by its first bytes; empty if it is not one, or can't be read.

    Args:
        source: The file, or its content.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            head = file.read(16)
    except OSError:
        return ""
    name, *_ = _format_of(head)
    return FORMATS.get(name, "")


class _Decoder(NamedTuple):
    factory: Any
    accept: Any


def _format_of(head: bytes) -> tuple[str, _Decoder | None, str]:
    """Return the format of an image by its first bytes, and its decoder; or the reason why it has none, if known."""
    Image.init()
    reason = ""
    for name in FORMATS:
        decoder = _decoder(name)
        accepted = decoder is not None and decoder.accept(head)
        if isinstance(accepted, str):  # an allowed format whose library is missing
            reason = accepted
        elif accepted:
            return name, decoder, ""
    return "", None, reason


def _decoder(name: str) -> _Decoder | None:
    """Return the decoder of a format and its test of the first 16 bytes; None if no decoder is installed."""
    if name in Image.OPEN:
        return _Decoder(*Image.OPEN[name])
    if name == "HEIF" and importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        return _Decoder(pillow_heif.HeifImageFile, pillow_heif.is_supported)
    return None


def image_path(folder: Path, file_name: str) -> Path:
    """Return the path of an image of a data set.

    Args:
        folder: The image folder.
        file_name: Name in the annotations: a path relative to the folder, or an absolute one inside it.

    Raises:
        ImageError: If the path leads out of the folder, without resolving symlinks, which are the owner's choice. Or if
            it has backslashes, and the file exists under the path with slashes.
    """
    path = folder / file_name
    if ".." in path.parts or os.path.isabs(file_name):
        inner = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
        if Path(inner).parts[:1] == ("..",) or os.path.isabs(inner):
            raise ImageError(
                f"{file_name!r} is outside the image folder {folder}; a file name must be a path inside it."
            )
        path = folder / inner
    other = folder / file_name.replace("\\", "/")
    if other != path and os.path.isfile(other) and not os.path.exists(path):
        raise ImageError(
            f"{path}: no such file, but {other} exists; write the name with slashes (a2fpn check-data --fix does)."
        )
    return path


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1, as stored, if it is missing or invalid."""
    try:
        # PIL would decode a PNG to look for tags after its pixels.
        plain = image.format == "PNG" and not _has_tags_behind_pixels(image)
        exif = Image.Image.getexif(image) if plain else image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises almost anything on a broken tag
        return 1
    return value if value in range(1, 9) else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Stored height and width of an opened image; for a TIFF, PIL reports the rotated ones."""
    width, height = getattr(image, "_tile_size", image.size)
    return height, width


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image after applying its EXIF orientation."""
    height, width = stored_size(image)
    return (width, height) if orientation(image) in _TURNED else (height, width)


def _has_tags_behind_pixels(png: Any) -> bool:
    """Return whether an opened PNG has chunks with a possible orientation after its pixels, without decoding it."""
    file = png.fp
    place, behind = file.tell(), False
    try:
        file.seek(len(_PNG_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            following = file.tell() + length + 4  # after the checksum
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
    """Read a PNG, JPEG, WebP, TIFF, BMP or GIF as 8-bit RGB; AVIF and HEIC if their decoders are installed.

    - EXIF orientation: applied in training, evaluation and prediction alike. With ``size``, an image that has this
      size only as stored is an error, since the annotations then do not match the displayed image.
    - 16-bit gray: the full range 0..65535 is scaled to 0..255, by division by 257 and rounding, whatever range
      the image uses; one that stays below 4096 becomes nearly black, and a warning names ``gray_bits``. 32-bit
      integer gray in that range likewise. Floating-point images have no defined range and are an error.
    - 16-bit color, and gray with transparency: the high byte of each value; ``gray_bits`` is an error then.
    - Transparency: composed over white.
    - Gray, palette, CMYK and the other color spaces: PIL's conversion.
    - Animations and multi-page files: the first frame, and a warning in the log.

    Args:
        source: The image file, or its content.
        size: (H, W) that the image must have, pixels.
        name: Name in messages of an image given by its content.
        max_pixels: Maximum number of pixels; None for no limit.
        gray_bits: Bits used by gray values of more than 8 bits, 9 to 16, whose full range is scaled to 0..255.
            12 for a 12-bit camera that writes 16-bit files.

    Returns:
        uint8 (3, H, W) in [0, 255].

    Raises:
        ImageError: If the file is missing, not an image of these formats, corrupt, too large, or not of the size.

    Example:
        >>> read_image("missing.png")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ImageError: missing.png: no such file.
    """
    name, file = _opened(source, name)
    content = bytearray(file.read_bytes() if isinstance(file, Path) else file.getbuffer())
    try:
        with open_image(io.BytesIO(content), max_pixels=max_pixels) as opened:  # reads only the header
            _check_size(opened, size, name)
            pixels = _decode_plain_jpeg(opened, content)
            if pixels is not None:
                return tv_tensors.Image(pixels)
            _mark_values(opened, gray_bits=gray_bits, name=name)
            if opened.format != "MPO" and getattr(opened, "is_animated", False):
                frames = getattr(opened, "n_frames", "several")
                _logger.warning("%s: %s frames or pages; only the first is read.", name, frames)
            if hasattr(opened, "_tile_size"):  # a TIFF, for which PIL checks its own limit again before allocating
                opened.im = Image.core.new(  # type: ignore[attr-defined]
                    opened.mode, opened._tile_size
                )
            return tv_tensors.Image(F.to_image(to_rgb(ImageOps.exif_transpose(opened), gray_bits=gray_bits, name=name)))
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on a corrupt file
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ImageError(f"{name}: not a readable image ({reason}).") from error


def _mark_values(image: Image.Image, *, gray_bits: int, name: str) -> None:
    """Record or convert properties of values that PIL does not handle: inverted gray, 16-bit color keys.

    Raises:
        ValueError: If the values have no defined range, or ``gray_bits`` does not apply to them.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("L", "RGB") and 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("signed 8-bit values have no standard range; convert them to unsigned")
    if image.mode.startswith("I"):
        image.info[_INVERTED] = tags.get(_PHOTOMETRIC) == 0
        return
    if not any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return
    if gray_bits != 16:
        raise ValueError(
            f"gray_bits={gray_bits} supports gray without alpha only, got {len(image.getbands())} channels of 16 "
            "bits; convert it to 8 bits"
        )
    if image.mode == "RGB" and "transparency" in image.info:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    values = np.asarray(image)[..., [band != "A" for band in image.getbands()]]
    if 0 < values.max() < _DARK >> 8:
        _logger.warning("%s: all 16-bit values are below %d, so the image is nearly black; convert it.", name, _DARK)


def _check_size(image: Image.Image, size: tuple[int, int] | None, name: str) -> None:
    """Compare the oriented size of an opened image with the (H, W) of its annotations."""
    shown = shown_size(image)
    if size is None or shown == size:
        return
    got, wanted = (f"{width} x {height}" for height, width in (shown, size))
    if stored_size(image) == size:
        raise ImageError(
            f"{name}: the annotations give {wanted}, the size without its EXIF orientation, which viewers and "
            "predictions apply. Remove the tag (`exiftool -Orientation= FILE`) or annotate the rotated image."
        )
    raise ImageError(f"{name}: the image has {got} pixels (width x height), the annotations give {wanted}.")


def _decode_plain_jpeg(opened: Image.Image, content: bytearray) -> Tensor | None:
    """Decode a JPEG in 0.7 of PIL's time if the pixels are identical, else return None.

    They are for a gray or three-channel image without EXIF rotation.
    """
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    if orientation(opened) != 1:
        return None
    try:
        # torchvision's operator, since its function warns of deprecation from 0.29 on.
        pixels: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), _RGB, False)
    except (AttributeError, RuntimeError):  # no operator, or PIL reports the error better
        return None
    return pixels if tuple(pixels.shape[:0:-1]) == opened.size else None


def _opened(source: str | Path | bytes, name: str, hint: str = "") -> tuple[str, Path | io.BytesIO]:
    """Return the name of an image for messages, and an object that PIL can open.

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
        name: Name of the image in messages, for content.

    Returns:
        uint8 (H, W).

    Raises:
        ImageError: If the file is missing, not such a map, or not of the size.
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
        raise ImageError(f"{name}: not a readable image ({error}).") from error
    if labels.shape != size:
        raise ImageError(f"{name}: the map has size (width, height) {labels.shape[::-1]}, its image {size[::-1]}.")
    return torch.from_numpy(labels)


def to_rgb(image: Image.Image, *, gray_bits: int = 16, name: str = "the image") -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as :func:`read_image` documents.

    Args:
        image: The image.
        gray_bits: Bits used by gray values of more than 8 bits.
        name: Name of the image in messages.

    Raises:
        ValueError: If its values have no defined range, or don't fit ``gray_bits``.
    """
    if image.mode.startswith("I"):
        values, most = np.asarray(image).astype(np.int64), 2**gray_bits - 1
        if values.min() < 0 or values.max() > most:
            raise ValueError(
                f"gray values of {values.min()} to {values.max()} don't fit {gray_bits} bits; convert it to 8 bits"
            )
        if gray_bits == 16 and 0 < values.max() < _DARK:
            _logger.warning(
                "%s: the largest gray value is %d of 65535, so the image is nearly black; gray_bits=12 (--gray-bits "
                "12) is for 12-bit "
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
        raise ValueError("floating-point gray values have no standard range; convert it to 8 bits")
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
