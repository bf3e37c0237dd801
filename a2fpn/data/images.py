"""Image files and their content as 8-bit RGB tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from a2fpn.errors import ImageError

_RGB = 3  # torchvision.io.ImageReadMode.RGB


def read_image(
    source: str | Path | bytes, *, size: tuple[int, int] | None = None, name: str = "the given bytes"
) -> tv_tensors.Image:
    """Reads any image PIL knows as 8-bit RGB.

    - EXIF orientation: applied. With ``size``, the stored pixels are taken as they are if they have that
      size, and only otherwise turned: labelling tools differ in whether they obey EXIF.
    - 16-bit gray: the full range 0..65535 becomes 0..255, by division by 257 and rounding, whatever range
      the image uses. So does 32-bit integer gray, if its values lie in that range. Floating-point images
      have no agreed range and are an error.
    - Transparency: composed over white.
    - Gray, palette, CMYK and the other color spaces: PIL's conversion.
    - Animations and multi-page files: the first frame.

    Args:
        source: The image file, or its content.
        size: (H, W) that the image must have, pixels.
        name: What messages call an image given by its content.

    Returns:
        uint8 (3, H, W) in [0, 255].

    Raises:
        ImageError: If the file is missing, no image, corrupt, or not of the size.

    Example:
        >>> read_image("missing.png")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ImageError: missing.png: no such file.
    """
    name, file = _opened(source, name)
    content = bytearray(file.read_bytes() if isinstance(file, Path) else file.getbuffer())
    try:
        with Image.open(io.BytesIO(content)) as opened:  # reads the header alone
            pixels = _decode_plain_jpeg(opened, content, size)
            if pixels is not None:
                return tv_tensors.Image(pixels)
            image: Image.Image = opened
            if size is None or image.size != size[::-1]:
                image = ImageOps.exif_transpose(image)
            if size is not None and image.size != size[::-1]:
                got, wanted = " x ".join(map(str, opened.size)), " x ".join(map(str, size[::-1]))
                raise ImageError(f"{name}: the image is {got} pixels wide and high, the annotations say {wanted}.")
            return tv_tensors.Image(F.to_image(to_rgb(image)))
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on a corrupt file
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ImageError(f"{name}: no readable image ({reason}).") from error


def _decode_plain_jpeg(opened: Image.Image, content: bytearray, size: tuple[int, int] | None) -> Tensor | None:
    """Decodes a JPEG in 0.7 of PIL's time, where the pixels are the same; None elsewhere.

    That is a gray or three-channel image of the wanted size, and, where no size is wanted, one without EXIF or XMP.
    """
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    if opened.size != size[::-1] if size is not None else {"exif", "xmp"} & opened.info.keys():
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
    """Reads a map of classes.

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
        with Image.open(file) as image:
            if image.mode not in ("L", "P"):
                raise ImageError(f"{name}: a semantic map must be an 8-bit palette or gray image, got {image.mode!r}.")
            labels = np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{name}: no readable image ({error}).") from error
    if labels.shape != size:
        raise ImageError(f"{name}: the map is {labels.shape[::-1]} pixels wide and high, its image {size[::-1]}.")
    return torch.from_numpy(labels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, as :func:`read_image` documents.

    Raises:
        ValueError: If its values have no agreed range.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"gray values of {values.min()} to {values.max()} don't fit 16 bits; convert it to 8 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point gray values have no agreed range; convert it to 8 bits")
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
