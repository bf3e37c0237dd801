"""Model configuration as plain data: frozen, typed, JSON-able dataclasses, validated key by key.

A :class:`ModelConfig` travels with every checkpoint in ``config.json`` and is enough to rebuild the
model. Unknown keys, wrong types and unsupported format versions are errors, never warnings.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from a2fpn._serialize import plain
from a2fpn.errors import ConfigError, ConfigTypeError

FORMAT_VERSION = 2
"""In 2, levels in state dicts have names (``neck.lateral.p3``), where 1 had positions (``neck.lateral.1``)."""
STAGES = 5
"""Stages of a backbone, of stride 2 to 32: as a ResNet's stem and its four layers."""


_MOST_LAYERS = 100
MAX_PIXELS = 2**28
"""Pixels above which a file is not decoded unless asked for: in RGB these take 805 MB."""

_LARGEST_IMAGE = 8192
_LONGEST_IMAGE = 32_768
_LARGEST_POOL = 128
_LARGEST_WEIGHT = 1000
_LARGEST_STRIDE = 1024
_LARGEST_DIVISOR = 1024
_MOST_BOXES = 1_000_000
_MOST_CHANNELS = 65_536
_MOST_SAMPLES = 64
_MOST_TOP_LEVELS = 8


@dataclass(frozen=True)
class Category:
    """One class of objects.

    Args:
        id: The id that the annotations use; any integer, need not be contiguous.
        name: The name shown to people.
    """

    id: int
    name: str


@dataclass(frozen=True)
class BackboneConfig:
    """The timm model that extracts features.

    Args:
        name: Full timm name with the weights tag pinned, e.g. ``resnet50.tv_in1k``.
        in_chans: Channels of the input image.
        norm: ``"bn"`` trains batch norm, ``"frozen"`` turns it into a fixed affine map, ``"sync"`` shares its
            statistics between processes, ``"gn"`` puts group norm in its place.
        stride_in_1x1: Whether a ResNet's bottlenecks have their strides in the first 1x1 convolution (Caffe's and
            detectron2's MSRA weights) instead of in the 3x3 convolution.
        strides: Strides of the maps that the neck gets, increasing.
        trainable_layers: How many of the five stages, counted from the deepest, are trained, as torchvision counts
            them, whatever levels are taken: 3 trains the stages that end at strides 8, 16 and 32 (``layer2`` to
            ``layer4`` of a ResNet), 4 also that of stride 4, 5 and None all, 0 none. Networks without one stage per
            stride train the last ``trainable_layers / 5`` of their layers. Layers added for missing strides are always
            trained.
        norm_eps: Epsilon of every batch norm, 0 or more; None keeps timm's. torchvision's older COCO detectors were
            trained with 0: with another value their detections are others.
        taps: Modules whose outputs are the maps, in network order, in place of the deepest map of each stride. Several
            may have one stride.
        image_size: Side of the square image that a network of fixed size is built for; None takes the size of its
            weights. Most networks take any size.
        grad_checkpointing: Whether the backbone uses activation checkpointing in training.
        license: License of the weights that training began with, as timm states it; None if it began with none.

    Raises:
        ValueError: If ``norm_eps`` is negative, ``trainable_layers`` out of 0..5, or ``image_size`` out of 1..8192.
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
        if self.image_size is not None and not 1 <= self.image_size <= _LARGEST_IMAGE:
            raise ConfigError(f"image_size must be between 1 and {_LARGEST_IMAGE}, got {self.image_size}.")
        if self.trainable_layers is not None and not 0 <= self.trainable_layers <= STAGES:
            raise ConfigError(f"trainable_layers must be between 0 and {STAGES}, got {self.trainable_layers}.")
        # Written so that NaN is bad as well.
        if self.norm_eps is not None and not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps must be 0 or more, got {self.norm_eps}.")
        _check_choices(self)
        _check_range(1, _MOST_CHANNELS, in_chans=self.in_chans)
        for stride in self.strides:
            _check_range(1, _LARGEST_STRIDE, strides=stride)


@dataclass(frozen=True)
class NeckConfig:
    """The neck that turns backbone features into a pyramid.

    Args:
        name: A registered neck name, see :func:`a2fpn.list_necks`.
        args: Keyword arguments of the neck's constructor (JSON values only).

    Raises:
        TypeError: If an argument could not be saved as JSON.
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
        # Lists where tuples were given: a config equals the one that comes back from its file.
        object.__setattr__(self, "args", plain(self.args))


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing of images; the same in training, evaluation and prediction.

    Args:
        resize: ``"shortest_edge"`` brings the short side to ``min_size`` unless the long side would pass
            ``max_size`` (torchvision's and detectron2's rule). ``"at_least"`` only enlarges small images
            and only shrinks those whose long side passes ``max_size``. ``"none"`` keeps the size.
        min_size: Target of the short side, pixels.
        max_size: Limit of the long side, pixels.
        mean: Per-channel mean of the input in the unit range.
        std: Per-channel standard deviation of the input in the unit range.
        size_divisor: The padded size is a multiple of this; None takes the model's coarsest RoI stride.
        interpolation: How pixels between pixels are found in resizing.

    Raises:
        ValueError: If a size is out of range, or mean and std are not one positive std per channel.
    """

    resize: Literal["shortest_edge", "at_least", "none"] = "shortest_edge"
    min_size: int = 800
    max_size: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size_divisor: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        _check_choices(self)
        if not 1 <= self.min_size <= self.max_size:
            raise ConfigError(f"Expected 1 <= min_size <= max_size, got {self.min_size} and {self.max_size}.")
        _check_range(1, _LARGEST_IMAGE, min_size=self.min_size)
        _check_range(1, _LONGEST_IMAGE, max_size=self.max_size)
        if self.size_divisor is not None:
            _check_range(1, _LARGEST_DIVISOR, size_divisor=self.size_divisor)
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise ConfigError(f"mean {self.mean} and std {self.std} must have one positive std per channel.")


@dataclass(frozen=True)
class HeadsConfig:
    """Fields that the heads of all detectors have in common.

    Args:
        legacy_anchors: Whether anchors lie as in torchvision, which takes ``image size // grid size`` for the stride
            of a level; on sizes that are no multiple of it they drift. For detectors that were trained so.
        score_threshold: Detections below this score are dropped.
        nms_threshold: IoU above which the per-class NMS removes a detection.
        detections_per_image: Most detections returned for an image.
    """

    legacy_anchors: bool = False
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(0, 1, score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        _check_range(1, _MOST_BOXES, detections_per_image=self.detections_per_image)


@dataclass(frozen=True)
class RCNNConfig(HeadsConfig):
    """Heads of the two-stage detectors; the defaults are torchvision's Faster and Mask R-CNN.

    The fields of :class:`HeadsConfig`, and:

    Args:
        anchor_sizes: One tuple of anchor sizes in pixels per pyramid level; None derives 8 x stride.
        anchor_ratios: Height / width of the anchors, the same on every level.
        anchor_rounding: Whether anchors are rounded to whole pixels, as torchvision's are; detectron2's and
            mmdetection's are not.
        rpn_pre_nms_top_n_train: Proposals kept per level before NMS in training.
        rpn_pre_nms_top_n_test: The same in evaluation.
        rpn_post_nms_top_n_train: Proposals kept per image after NMS in training.
        rpn_post_nms_top_n_test: The same in evaluation.
        rpn_nms_threshold: IoU above which the RPN's NMS removes a proposal.
        rpn_fg_iou: IoU from which an anchor is positive.
        rpn_bg_iou: IoU under which an anchor is negative.
        rpn_batch_size: Anchors sampled per image for the RPN loss.
        rpn_positive_fraction: Share of positives among them.
        rpn_score_threshold: Proposals below this objectness are dropped.
        rpn_layers: Number of the RPN's 3x3 convolutions; torchvision's second version of the detectors has 2.
        box_channels: Width of the box head's fully connected layers.
        box_layers: Number of 3x3 convolutions of the box head, one fully connected layer follows; 0 gives two
            fully connected layers. torchvision's second version has 4.
        box_pool_size: Output size of the box head's RoI pooling.
        box_fg_iou: IoU from which a proposal is positive.
        box_batch_size: Proposals sampled per image for the box loss.
        box_positive_fraction: Share of positives among them.
        mask_upsample: How the mask head doubles its maps: by a ``"deconvolution"``, or by ``"carafe"`` as in
            mmdetection's published CARAFE detectors.
        mask_channels: Width of the mask head's convolutions.
        mask_layers: Number of the mask head's convolutions.
        mask_pool_size: Output size of the mask head's RoI pooling; masks have twice this size. 28 gives masks of
            56 x 56, at four times the mask branch's cost.
        mask_boundary_weight: Weight of the mask loss at the edge of an object relative to the rest, see
            :func:`a2fpn.masks.targets.mask_loss`; 1 is the plain mean.
        head_norm: ``"bn"`` puts batch norm behind the convolutions of the box and mask heads, as torchvision's second
            version does.
        mask_paste: ``"exact"`` samples masks at pixel centers; ``"torchvision"`` rounds boxes to whole pixels first,
            for the same pixels as torchvision's detectors.
        roi_sampling_ratio: Samples per bin side in RoI pooling; 0 takes one per map pixel (detectron2, mmdetection).
        roi_aligned: Whether RoI pooling, of features and of mask targets, shifts by half a pixel (detectron2's
            ``aligned=True``).
        unused_outputs: Outputs of the box predictor without a class. They take part in the softmax and in
            post-processing, and their detections are dropped. torchvision's COCO detectors have ten, for the ids that
            COCO does not use: without them scores would differ.

    Raises:
        ValueError: For a size or weight out of its range.
    """

    anchor_sizes: tuple[tuple[int, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_rounding: bool = True
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_threshold: float = 0.7
    rpn_fg_iou: float = 0.7
    rpn_bg_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_threshold: float = 0.0
    rpn_layers: int = 1
    box_channels: int = 1024
    box_layers: int = 0
    box_pool_size: int = 7
    box_fg_iou: float = 0.5
    box_batch_size: int = 512
    box_positive_fraction: float = 0.25
    mask_upsample: Literal["deconvolution", "carafe"] = "deconvolution"
    mask_channels: int = 256
    mask_layers: int = 4
    mask_pool_size: int = 14
    mask_boundary_weight: float = 1.0
    mask_paste: Literal["exact", "torchvision"] = "exact"
    head_norm: Literal["none", "bn"] = "none"
    roi_sampling_ratio: int = 2
    roi_aligned: bool = False
    unused_outputs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_anchors(self.anchor_sizes, self.anchor_ratios)
        shares = ("rpn_nms_threshold", "rpn_fg_iou", "rpn_bg_iou", "rpn_positive_fraction", "rpn_score_threshold")
        _check_range(0, 1, **{name: getattr(self, name) for name in (*shares, "box_fg_iou", "box_positive_fraction")})
        tops = [f"rpn_{when}_nms_top_n_{phase}" for when in ("pre", "post") for phase in ("train", "test")]
        tops.remove("rpn_post_nms_top_n_train")  # with 0 the box heads train on the objects' own boxes
        _check_range(0, _MOST_BOXES, rpn_post_nms_top_n_train=self.rpn_post_nms_top_n_train)
        _check_range(1, _MOST_BOXES, **{name: getattr(self, name) for name in tops})
        _check_range(1, _MOST_BOXES, rpn_batch_size=self.rpn_batch_size, box_batch_size=self.box_batch_size)
        _check_range(1, _MOST_CHANNELS, box_channels=self.box_channels, mask_channels=self.mask_channels)
        _check_range(1, _LARGEST_POOL, box_pool_size=self.box_pool_size)
        _check_range(0, _MOST_SAMPLES, roi_sampling_ratio=self.roi_sampling_ratio)
        _check_layers(rpn_layers=self.rpn_layers, least=1)
        _check_layers(box_layers=self.box_layers, mask_layers=self.mask_layers)
        if not 1 <= self.mask_pool_size <= _LARGEST_POOL:
            raise ConfigError(f"mask_pool_size must be between 1 and {_LARGEST_POOL}, got {self.mask_pool_size}.")
        # Written so that NaN is bad as well.
        if not 1 <= self.mask_boundary_weight <= _LARGEST_WEIGHT:
            raise ConfigError(
                f"mask_boundary_weight must be between 1 and {_LARGEST_WEIGHT}, got {self.mask_boundary_weight}."
            )
        _check_range(0, _MOST_CHANNELS, unused_outputs=self.unused_outputs)


@dataclass(frozen=True)
class CascadeConfig(RCNNConfig):
    """Heads of Cascade R-CNN and Cascade Mask R-CNN: one box head (and mask head) per stage.

    Args:
        roi_aligned: Whether RoI pooling shifts by half a pixel, as in the published cascades.
        stage_ious: Per stage the IoU from which a box is positive; takes the place of ``box_fg_iou``.
        stage_box_weights: Per stage the factors of a box's dx, dy, dw, dh as regression targets.
        stage_loss_weights: Per stage the factor of its losses.
        stage_average: What is averaged over the stages for the scores: ``"probabilities"`` (the paper's code,
            detectron2) or ``"logits"`` (mmdetection).
        stage_masks: ``"all"`` gives every stage a mask head and averages the masks (mmdetection). ``"first"`` gives
            one to the first alone, trained on the proposals and used for all (detectron2).
        stage_resampling: Whether every stage samples anew from the boxes it gets and the objects; False keeps the
            sample of the first (detectron2).
        scale_gradients: Whether the box heads' gradients into the pyramid are divided by the number of stages
            (detectron2, where the loss weights are 1).
        box_loss_beta: Where the box loss turns from L2 to L1, in regression targets; 0 is plain L1 (detectron2).

    Raises:
        ValueError: If the three don't name the same stages, a box weight has not four values, ``box_loss_beta`` is
            negative, or ``box_fg_iou`` is set, which a cascade doesn't read.
    """

    roi_aligned: bool = True
    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    stage_box_weights: tuple[tuple[float, ...], ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    stage_loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    stage_average: Literal["probabilities", "logits"] = "probabilities"
    stage_masks: Literal["all", "first"] = "all"
    stage_resampling: bool = True
    scale_gradients: bool = False
    box_loss_beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {
            "stage_ious": len(self.stage_ious),
            "stage_box_weights": len(self.stage_box_weights),
            "stage_loss_weights": len(self.stage_loss_weights),
        }
        if len(set(counts.values())) > 1 or not self.stage_ious:
            raise ConfigError(f"Every stage needs an IoU, box weights and a loss weight, got {counts}.")
        if any(len(weights) != 4 for weights in self.stage_box_weights):
            raise ConfigError(f"stage_box_weights must be four numbers per stage, got {self.stage_box_weights}.")
        if self.box_fg_iou != RCNNConfig.box_fg_iou:
            raise ConfigError(f"box_fg_iou={self.box_fg_iou} has no use in a cascade; set stage_ious.")
        # Written so that NaN is bad as well.
        if not self.box_loss_beta >= 0:
            raise ConfigError(f"box_loss_beta must be 0 or more, got {self.box_loss_beta}.")


@dataclass(frozen=True)
class HTCConfig(CascadeConfig):
    """Heads of Hybrid Task Cascade.

    Args:
        stage_average: See :class:`CascadeConfig`; HTC's own code averages logits.
        semantic: False leaves the semantic branch out. ``"things"`` trains it on a map made of the instance masks,
            ``"stuff"`` on the target's own map ``semantic`` (H, W).
        semantic_classes: Classes of the map with ``semantic="stuff"``; 255 in a map is ignored.
        semantic_channels: Width of the semantic branch.
        semantic_layers: Number of its 3x3 convolutions.
        semantic_loss_weight: Factor of its loss.

    Raises:
        ValueError: See :class:`CascadeConfig`; also if not every stage samples anew and has a mask head.
    """

    stage_average: Literal["probabilities", "logits"] = "logits"
    semantic: Literal[False, "things", "stuff"] = False
    semantic_classes: int = 183
    semantic_channels: int = 256
    semantic_layers: int = 4
    semantic_loss_weight: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(semantic_layers=self.semantic_layers)
        _check_range(1, _MOST_CHANNELS, semantic_channels=self.semantic_channels)
        _check_range(1, 255, semantic_classes=self.semantic_classes)
        _check_range(0, _LARGEST_WEIGHT, semantic_loss_weight=self.semantic_loss_weight)
        if self.stage_masks != "all" or not self.stage_resampling:
            raise ConfigError(
                "In HTC every stage samples anew and has a mask head: stage_masks='all', stage_resampling=True, got "
                f"{self.stage_masks!r}, {self.stage_resampling}."
            )


@dataclass(frozen=True)
class KeypointRCNNConfig(RCNNConfig):
    """Heads of Keypoint R-CNN; the defaults are torchvision's.

    The fields of :class:`RCNNConfig`, and:

    Args:
        num_keypoints: Keypoints of every object.
        keypoint_names: Their names; empty when unknown.
        keypoint_channels: Width of the keypoint head's convolutions.
        keypoint_layers: Number of the keypoint head's 3x3 convolutions.
        keypoint_pool_size: Output size of the keypoint head's RoI pooling; heatmaps have four times this size.

    Raises:
        ValueError: For a count that makes no head, or another number of names.
    """

    num_keypoints: int = 17
    keypoint_names: tuple[str, ...] = ()
    keypoint_channels: int = 512
    keypoint_layers: int = 8
    keypoint_pool_size: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_keypoints < 1:
            raise ConfigError(f"num_keypoints must be at least 1, got {self.num_keypoints}.")
        _check_range(1, _MOST_CHANNELS, num_keypoints=self.num_keypoints, keypoint_channels=self.keypoint_channels)
        _check_range(1, _LARGEST_POOL, keypoint_pool_size=self.keypoint_pool_size)
        if len(self.keypoint_names) not in (0, self.num_keypoints):
            raise ConfigError(
                f"num_keypoints is {self.num_keypoints} and keypoint_names has {len(self.keypoint_names)} names; give "
                "one name per keypoint, or none."
            )
        _check_layers(keypoint_layers=self.keypoint_layers)


@dataclass(frozen=True)
class OneStageConfig(HeadsConfig):
    """Fields common to the heads of one-stage detectors, besides those of :class:`HeadsConfig`.

    Args:
        top_levels: Coarser levels made from the pyramid by strided convolutions, p6 and p7 on a pyramid that ends at
            p5.
        top_source: What the first of them is made from: the neck's coarsest level, or the backbone's.
        candidates_per_level: Most detections of a level that take part in the NMS.

    Raises:
        ValueError: For a negative number of levels.
    """

    top_levels: int = 2
    top_source: Literal["neck", "backbone"] = "neck"
    candidates_per_level: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, _MOST_TOP_LEVELS, top_levels=self.top_levels)
        _check_range(1, _MOST_BOXES, candidates_per_level=self.candidates_per_level)


@dataclass(frozen=True)
class RetinaNetConfig(OneStageConfig):
    """Head of RetinaNet; the defaults are torchvision's.

    Its second version has ``top_source="backbone"``, ``head_norm="gn"`` and ``box_loss="giou"``. The fields of
    :class:`OneStageConfig`, and:

    Args:
        anchor_sizes: One tuple of anchor sizes in pixels per pyramid level; None derives 4 x stride times 1,
            ``2**(1/3)`` and ``2**(2/3)``, in whole pixels.
        anchor_ratios: Height / width of the anchors, the same on every level.
        fg_iou: IoU from which an anchor is positive.
        bg_iou: IoU under which an anchor is negative.
        head_norm: ``"gn"`` puts group norm behind the head's convolutions.
        box_loss: Kind of the box loss.
    """

    anchor_sizes: tuple[tuple[int, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    fg_iou: float = 0.5
    bg_iou: float = 0.4
    detections_per_image: int = 300
    head_norm: Literal["none", "gn"] = "none"
    box_loss: Literal["l1", "smooth_l1", "giou", "diou", "ciou"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_anchors(self.anchor_sizes, self.anchor_ratios)
        _check_range(0, 1, fg_iou=self.fg_iou, bg_iou=self.bg_iou)


@dataclass(frozen=True)
class FCOSConfig(OneStageConfig):
    """Head of FCOS; the defaults are torchvision's.

    The fields of :class:`OneStageConfig`, and:

    Args:
        center_radius: A location is positive up to this many strides from the center of an object.
        head_layers: Number of 3x3 convolutions of each branch.
    """

    center_radius: float = 1.5
    head_layers: int = 4
    score_threshold: float = 0.2
    nms_threshold: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(head_layers=self.head_layers)
        _check_range(0, _LARGEST_WEIGHT, center_radius=self.center_radius)


def _check_layers(*, least: int = 0, **counts: int) -> None:
    """Counts that a constructor loops over; a config may come from anyone."""
    for name, count in counts.items():
        if not least <= count <= _MOST_LAYERS:
            raise ConfigError(f"{name} must be between {least} and {_MOST_LAYERS}, got {count}.")


def _check_range(least: float, most: float, **values: float) -> None:
    """Numbers that would hurt only at the first image; a config may come from anyone."""
    for name, value in values.items():
        # Written so that NaN is bad as well.
        if not least <= value <= most:
            raise ConfigError(f"{name} must be between {least} and {most}, got {value}.")


def _check_anchors(sizes: tuple[tuple[int, ...], ...] | None, ratios: tuple[float, ...]) -> None:
    for level in sizes or ():
        for size in level:
            _check_range(1, _LARGEST_IMAGE, anchor_sizes=size)
    for ratio in ratios:
        _check_range(0.01, 100, anchor_ratios=ratio)


def _check_choices(config: Any) -> None:
    """Fields of named choices, which Python itself does not look at."""
    for name, choices in _choices(config.__class__).items():
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


@functools.cache
def _choices(config: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(config).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}


HEADS: dict[str, type[HeadsConfig]] = {
    "cascadercnn": CascadeConfig,
    "cascademaskrcnn": CascadeConfig,
    "fcos": FCOSConfig,
    "htc": HTCConfig,
    "keypointrcnn": KeypointRCNNConfig,
    "retinanet": RetinaNetConfig,
}
"""Detectors whose heads are described by something else than :class:`RCNNConfig`."""


def heads_type(detector: object) -> type[HeadsConfig]:
    """The class that describes a detector's heads.

    Example:
        >>> heads_type("htc").__name__, heads_type("maskrcnn").__name__
        ('HTCConfig', 'RCNNConfig')
    """
    return HEADS.get(str(detector), RCNNConfig)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a detector.

    Args:
        architecture: The name the model was created under, e.g. ``maskrcnn_a2fpn_r50``.
        detector: A registered detector name, e.g. ``maskrcnn``.
        backbone: The feature extractor.
        neck: The pyramid.
        num_classes: Number of object classes, without a background class.
        preprocess: Resizing and normalization.
        heads: Anchors, thresholds and the heads' sizes; of the class that :func:`heads_type` gives for the detector.
        categories: Ids and names of the classes in the order of the labels; empty when unknown.

    Raises:
        TypeError: If ``heads`` is the configuration of another kind of detector.
        ValueError: If the numbers of classes and categories, or of channels and statistics, disagree.
    """

    architecture: str
    detector: str
    backbone: BackboneConfig
    neck: NeckConfig
    num_classes: int = 80
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    heads: HeadsConfig = field(default_factory=RCNNConfig)
    categories: tuple[Category, ...] = ()

    def __post_init__(self) -> None:
        expected = heads_type(self.detector)
        if type(self.heads) is not expected:
            raise ConfigTypeError(
                f"The heads of {self.detector!r} are described by {expected.__name__}, got "
                f"{type(self.heads).__name__}. Pass heads={expected.__name__}(...)."
            )
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1 (there is no background class), got {self.num_classes}.")
        _check_range(1, _MOST_CHANNELS, num_classes=self.num_classes)
        if self.categories and len(self.categories) != self.num_classes:
            raise ConfigError(f"{len(self.categories)} categories were given for num_classes={self.num_classes}.")
        channels, statistics = self.backbone.in_chans, self.preprocess
        if not len(statistics.mean) == len(statistics.std) == channels:
            raise ConfigError(
                f"in_chans={channels} needs mean and std with {channels} values each, "
                f"got {len(statistics.mean)} and {len(statistics.std)}."
            )

    @classmethod
    def field_types(cls, data: Mapping[str, Any]) -> dict[str, type]:
        """The class of the heads that a configuration's detector has."""
        return {"heads": heads_type(data.get("detector"))}

    @property
    def labeled_categories(self) -> tuple[Category, ...]:
        """The categories, or ``Category(label + 1, "class <label>")`` where the model has none."""
        return self.categories or tuple(Category(label + 1, f"class {label}") for label in range(self.num_classes))
