"""Configurations of backbone, neck and preprocessing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from a2fpn._serialize import plain
from a2fpn.config.bounds import (
    LARGEST_DIVISOR,
    LARGEST_IMAGE,
    LARGEST_STRIDE,
    LONGEST_IMAGE,
    MOST_CHANNELS,
    check_choices,
    check_range,
)
from a2fpn.errors import ConfigError, ConfigTypeError

STAGES = 5
"""Stages of a backbone, of stride 2 to 32: a ResNet's stem and its four layers."""


@dataclass(frozen=True)
class Category:
    """One class of objects.

    Args:
        id: The id in the annotations; any integer, not necessarily contiguous.
        name: The display name.
    """

    id: int
    name: str


@dataclass(frozen=True)
class BackboneConfig:
    """Configuration of the backbone, a timm network.

    Args:
        name: Full timm name with a pinned weight tag, e.g. ``resnet50.tv_in1k``.
        in_chans: Channels of the input image.
        norm: ``"bn"`` trains batch norm, ``"frozen"`` freezes its statistics and weights, ``"sync"`` synchronizes its
            statistics between processes, ``"gn"`` replaces it by group norm.
        stride_in_1x1: Whether a ResNet's bottlenecks have their strides in the first 1x1 convolution (Caffe's and
            detectron2's MSRA weights) instead of in the 3x3 convolution.
        strides: Strides of the maps passed to the neck, increasing.
        trainable_layers: Number of trained stages out of five, counted from the deepest as in torchvision,
            independently of the levels used: 3 trains the stages that end at strides 8, 16 and 32 (``layer2`` to
            ``layer4`` of a ResNet), 4 also that of stride 4, 5 and None all, 0 none. Networks without one stage per
            stride train the last ``trainable_layers / 5`` of their layers. Layers added for missing strides are always
            trained.
        norm_eps: Epsilon of every batch norm, 0 or more; None keeps timm's. torchvision's older COCO detectors were
            trained with 0; another value changes their detections.
        taps: Modules whose outputs are the maps, in network order, instead of the deepest map of each stride. Several
            may have the same stride.
        image_size: Side of the square image that a network of fixed size is built for; None for the size of its
            weights. Most networks accept any size.
        grad_checkpointing: Whether the backbone uses activation checkpointing in training.
        license: License of the weights that training started from, as stated by timm; None for random weights.

    Raises:
        ValueError: If ``norm_eps`` is negative, ``trainable_layers`` not in 0..5, or ``image_size`` not in 1..8192.
    """

    name: str
    in_chans: int = 3
    norm: Literal["bn", "frozen", "sync", "gn"] = "bn"
    stride_in_1x1: bool = False
    strides: tuple[int, ...] = (4, 8, 16, 32)
    trainable_layers: int | None = None
    norm_eps: float | None = None
    taps: tuple[str, ...] = ()
    image_size: int | None = None
    grad_checkpointing: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_range(1, LARGEST_IMAGE, image_size=self.image_size)
        if self.trainable_layers is not None:
            check_range(0, STAGES, trainable_layers=self.trainable_layers)
        # The negation also rejects NaN.
        if self.norm_eps is not None and not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps must be 0 or more, got {self.norm_eps}.")
        check_choices(self)
        check_range(1, MOST_CHANNELS, in_chans=self.in_chans)
        for stride in self.strides:
            check_range(1, LARGEST_STRIDE, strides=stride)


@dataclass(frozen=True)
class NeckConfig:
    """Configuration of the neck, which turns backbone features into a pyramid.

    Args:
        name: A registered neck name, see :func:`a2fpn.list_necks`.
        args: Keyword arguments of the neck's constructor (JSON values only).

    Raises:
        TypeError: If an argument can't be saved as JSON.
        ValueError: If a number is larger than any neck could use and would exhaust the memory.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.args.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ConfigTypeError(
                    f"The neck argument {key!r} must be a JSON value, it is saved with the model; got {value!r}."
                ) from None
            if isinstance(value, (int, float)):
                check_range(-MOST_CHANNELS, MOST_CHANNELS, **{key: value})
        # Tuples become lists, so that a config equals the one read back from its file.
        object.__setattr__(self, "args", plain(self.args))


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing of images; the same in training, evaluation and prediction.

    Args:
        resize: ``"shortest_edge"`` resizes the short side to ``min_size`` unless the long side would exceed
            ``max_size`` (torchvision's and detectron2's rule). ``"at_least"`` only enlarges small images
            and only shrinks those whose long side exceeds ``max_size``. ``"none"`` keeps the size.
        min_size: Target of the short side, pixels.
        max_size: Limit of the long side, pixels.
        mean: Per-channel mean of the input, for images in [0, 1].
        std: Per-channel standard deviation of the input, for images in [0, 1].
        size_divisor: The padded size is a multiple of this; None for the model's coarsest RoI stride.
        interpolation: Interpolation mode of resizing.

    Raises:
        ValueError: If a size is out of range, mean and std differ in length, or a std is not positive.
    """

    resize: Literal["shortest_edge", "at_least", "none"] = "shortest_edge"
    min_size: int = 800
    max_size: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size_divisor: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 <= self.min_size <= self.max_size:
            raise ConfigError(f"Expected 1 <= min_size <= max_size, got {self.min_size} and {self.max_size}.")
        check_range(1, LARGEST_IMAGE, min_size=self.min_size)
        check_range(1, LONGEST_IMAGE, max_size=self.max_size)
        if self.size_divisor is not None:
            check_range(1, LARGEST_DIVISOR, size_divisor=self.size_divisor)
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise ConfigError(f"mean {self.mean} and std {self.std} must have one positive std per channel.")
