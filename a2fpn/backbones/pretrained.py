"""Loading of timm's weights, and their preprocessing."""

from __future__ import annotations

import functools
import logging
import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from safetensors import SafetensorError
from timm.layers import resample_patch_embed
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.backbones.attach import find_backbone_info
from a2fpn.backbones.create import create_network
from a2fpn.backbones.info import PYRAMID, BackboneInfo
from a2fpn.backbones.names import resolve_backbone_name
from a2fpn.config import BackboneConfig
from a2fpn.errors import ConfigError, HubOfflineError, MissingFileError

_logger = logging.getLogger(__name__)

# Absolute position embeddings, bias tables by distance, and bias tables by offset along both axes or one.
_POSITIONS = re.compile(r"pos_embed\w*$|attention_biases$|relative_position_bias_table$|(height|width)_rel$")
_PERMISSIVE = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"}


def create_with_weights(name: str, weights: str | Path | None, options: dict[str, Any]) -> nn.Module:
    """Build a network with timm's weights, or those of a local file.

    timm adapts weights to other numbers of image channels and, for most families, to constructor switches; position
    embeddings, attention bias tables and patch embeddings that it does not adapt are resized here.

    Args:
        name: Full timm name.
        weights: A local file that timm's loader reads; None downloads those of the name.
        options: Arguments of the constructor.

    Raises:
        ValueError: If the weights don't fit.
        FileNotFoundError: If there is no such file.
    """
    if weights is not None:
        return _create_from_file(name, Path(weights), options)
    return _create(name, _downloaded(name), options)


def _downloaded(name: str) -> dict[str, Any]:
    """Locate timm's weights for a name: in the Hub's cache, or on the Hub if it is reachable.

    Checked first because timm retries every file, which takes half a minute without a network.

    Raises:
        HubOfflineError: If they are not in the cache and the Hub can't be reached.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}  # from a URL: timm reports errors in one line
    repo = config.hf_hub_id
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in names:
        path = try_to_load_from_cache(repo, file)
        if isinstance(path, str):
            return {"file": path}
    try:
        HfApi(library_name="a2fpn").model_info(repo, timeout=_CONNECT_SECONDS)
    except Exception as error:
        # Exception classes of the client's HTTP library, by name since the library has changed before.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & {"TransportError", "ConnectionError", "Timeout", "OfflineModeIsEnabled"}:
            return {}  # the Hub responds, and timm reports the error
        offline = constants.is_offline_mode()
        reason = "offline mode is on (HF_HUB_OFFLINE)" if offline else f"it cannot be reached ({error})"
        raise HubOfflineError(
            f"The weights of backbone {name!r} are not in the cache {constants.HF_HUB_CACHE}, and {reason}. With "
            f"network access, run: hf download {repo} {names[0]}. Or start from a file, backbone_weights=FILE, or "
            "without weights, pretrained_backbone=False."
        ) from error
    return {}


_CONNECT_SECONDS = 1.5


def _create(name: str, source: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    try:
        return _load(name, source, options)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
    # They fit timm's default network, whose parameter names do not depend on the file's format.
    native = _load(name, source, {"num_classes": 0}).state_dict()
    own = ("features_only", "out_indices", "in_chans")
    with torch.device("meta"):
        switched = create_network(name, **{key: x for key, x in options.items() if key not in own}).state_dict()
    try:
        resized = {key: _resized(key, x, switched[key].shape) for key, x in native.items() if key in switched}
    except ValueError as error:
        raise ConfigError(
            f"The weights of {name!r} do not match the network built with {options}: {error} Omit image_size to use "
            "the size of the weights."
        ) from error
    return _load(name, {"state_dict": resized}, options)


def _load(name: str, source: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    return create_network(name, pretrained=True, pretrained_cfg_overlay=source, **options)


def _resized(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    """Interpolate a parameter that holds one value per position.

    Positions are two axes, or one: a row-major grid after prefix tokens (class tokens), or a line.

    Raises:
        ValueError: For any other parameter.
    """
    if x.shape == shape:
        return x
    axes = [axis for axis, (old, new) in enumerate(zip(x.shape, shape, strict=True)) if old != new]
    if name.endswith("patch_embed.proj.weight"):
        patches: Tensor = resample_patch_embed(x, list(shape[2:]))
        return patches
    if not _POSITIONS.search(name) or len(axes) > 2:
        raise ConfigError(f"{name} is {tuple(x.shape)}, expected {tuple(shape)}.")
    last, size = list(range(-len(axes), 0)), [shape[axis] for axis in axes]
    moved = x.movedim(axes, last)
    if len(axes) == 2:
        moved = _interpolated(moved, size)
    elif name.endswith(("height_rel", "width_rel")):
        moved = _interpolated(moved.unsqueeze(-2), [1, *size]).squeeze(-2)
    else:
        side = math.isqrt(moved.shape[-1])
        others = moved.shape[-1] - side**2
        grid, size = moved[..., others:].reshape(*moved.shape[:-1], side, side), [math.isqrt(size[0] - others)] * 2
        # A bias table by distance starts with distance 0 in a corner, which must stay there.
        grid = _interpolated(grid, size, align_corners=name.endswith("attention_biases"))
        moved = torch.cat([moved[..., :others], grid.flatten(-2)], dim=-1)
    return moved.movedim(last, axes).contiguous()


def _interpolated(x: Tensor, size: list[int], *, align_corners: bool = False) -> Tensor:
    """Interpolate the last two axes to another size."""
    planes = x.reshape(1, -1, *x.shape[-2:])
    return F.interpolate(planes, size=size, mode="bicubic", align_corners=align_corners).reshape(*x.shape[:-2], *size)


def _create_from_file(name: str, weights: Path, options: dict[str, Any]) -> nn.Module:
    """Build a network from a weights file, and verify that the weights were loaded.

    timm loads feature extractors non-strictly, since the classifier is always missing, and may rename and reshape
    tensors. Tensors are therefore compared by their values, not by name.
    """
    if not weights.is_file():
        raise MissingFileError(f"Backbone weights {str(weights)!r} do not exist.")
    try:
        body = _create(name, {"file": str(weights)}, options)
        stored = {_content(x) for x in load_state_dict(str(weights)).values()}
    except (RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(f"{str(weights)!r} does not contain weights of {name!r}: {str(error).strip()}") from error
    kernels = [x for x in body.parameters() if x.ndim > 1]
    if 2 * sum(_content(x) in stored for x in kernels) < len(kernels):
        raise ConfigError(f"{str(weights)!r} does not contain weights of {name!r}; are they of another backbone?")
    return body


def _content(x: Tensor) -> tuple[int, float]:
    return x.numel(), x.detach().flatten().double().sum().item()


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the input of a network's weights, for images in [0, 1].

    Example:
        >>> pretrained_statistics("lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    config = timm.get_pretrained_cfg(resolve_backbone_name(name))
    if config is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return tuple(config.mean), tuple(config.std)


def preprocessing(config: BackboneConfig, *, info: BackboneInfo | None = None) -> dict[str, Any]:
    """Return the preprocessing of a backbone's weights, as fields of :class:`a2fpn.config.PreprocessConfig`.

    Statistics and interpolation are those of the weights; sizes are those that the network runs at.

    Args:
        config: The backbone.
        info: Its maps and adaptations; None looks them up.

    Example:
        >>> preprocessing(BackboneConfig("lite0"))
        {'interpolation': 'bicubic', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
        >>> preprocessing(BackboneConfig("mixer_b16_224"))["size_divisor"]
        224
    """
    name = resolve_backbone_name(config.name)
    weights, found = timm.get_pretrained_cfg(name), info or find_backbone_info(name.partition(".")[0])
    wanted: dict[str, Any] = {}
    if weights is not None and weights.interpolation in ("bilinear", "bicubic"):
        wanted["interpolation"] = weights.interpolation
    if config.in_chans == 3:
        wanted["mean"], wanted["std"] = pretrained_statistics(name)
    if found.size is not None:
        side = config.image_size or found.size
        wanted |= {"min_size": side, "max_size": side, "size_divisor": side}
    elif PYRAMID[-1] % found.divisor:
        wanted["size_divisor"] = math.lcm(PYRAMID[-1], found.divisor)
    return wanted


def weights_license(name: str) -> str | None:
    """License of a network's weights as stated by timm, or None; a restrictive license is logged once.

    Example:
        >>> weights_license("r50")
        'bsd-3-clause'
    """
    config = timm.get_pretrained_cfg(resolve_backbone_name(name))
    license = None if config is None else config.license
    if license not in _PERMISSIVE:
        _say_license(name, license)
    return license


@functools.cache
def _say_license(name: str, license: str | None) -> None:
    _logger.warning(
        "The weights of backbone %s are under %s: read it before you use or publish models derived from them.",
        name,
        f"the license {license!r}" if license else "no license known to timm",
    )
