"""Conversion of images in memory: PIL images, arrays, tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn.data.images import to_rgb
from a2fpn.errors import ConfigError, ConfigTypeError

ImageInMemory = Image.Image | NDArray[np.uint8] | Tensor | bytes


def to_tensor(image: ImageInMemory) -> Tensor:
    """Convert an image to a tensor (3, H, W), uint8 or float in [0, 1]."""
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
