"""Images as people have them: files of a folder, PIL images, arrays, tensors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn.data.images import SUFFIXES, to_rgb
from a2fpn.errors import ConfigError, ConfigTypeError

ImageInMemory = Image.Image | NDArray[np.uint8] | Tensor
ImagePath = str | os.PathLike[str]


def list_images(folder: ImagePath) -> list[Path]:
    """Return the image files of a folder in order of their names, without those of sub-folders.

    Raises:
        ValueError: If there are none.
        OSError: If there is no such folder.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not paths:
        raise ConfigError(
            f"No image lies in the folder {os.fspath(folder)} itself; expected names that end in "
            f"{', '.join(SUFFIXES)} (sub-folders are not searched)."
        )
    return paths


def to_tensor(image: ImageInMemory) -> Tensor:
    """(3, H, W) tensor of an image, uint8 or float in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            raise ConfigError(
                f"Expected an image as a uint8 array (H, W, 3) in RGB order or (H, W) in gray, got {image.dtype} of "
                f"shape {image.shape}. Convert it, or pass a PIL image or the path of the file."
            )
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    if isinstance(image, Tensor):
        return image
    raise ConfigTypeError(
        f"Expected an image as a path, PIL image, uint8 array or tensor, or a folder or list of images, "
        f"got {type(image).__name__}."
    )
