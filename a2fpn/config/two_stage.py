"""Configurations of the heads of two-stage detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from a2fpn.config.bounds import (
    LARGEST_POOL,
    LARGEST_WEIGHT,
    MOST_BOXES,
    MOST_CHANNELS,
    MOST_SAMPLES,
    check_anchors,
    check_layers,
    check_range,
    check_thresholds,
)
from a2fpn.config.heads import HeadsConfig
from a2fpn.errors import ConfigError


@dataclass(frozen=True)
class RCNNConfig(HeadsConfig):
    """Heads of the two-stage detectors; the defaults are torchvision's Faster and Mask R-CNN.

    The fields of :class:`HeadsConfig`, and:

    Args:
        anchor_sizes: One tuple of anchor sizes in pixels per pyramid level; None for 8 x stride.
        anchor_ratios: Height / width of the anchors, the same on every level.
        anchor_rounding: Whether anchors are rounded to whole pixels, as torchvision's are; detectron2's and
            mmdetection's are not.
        rpn_pre_nms_top_n_train: Proposals kept per level before NMS in training.
        rpn_pre_nms_top_n_test: The same in evaluation.
        rpn_post_nms_top_n_train: Proposals kept per image after NMS in training.
        rpn_post_nms_top_n_test: The same in evaluation.
        rpn_nms_threshold: IoU threshold of the RPN's NMS.
        rpn_fg_iou: Minimum IoU of positive anchors.
        rpn_bg_iou: IoU below which an anchor is negative.
        rpn_batch_size: Anchors sampled per image for the RPN loss.
        rpn_positive_fraction: Share of positives among them.
        rpn_score_threshold: Proposals below this objectness are dropped.
        rpn_layers: Number of the RPN's 3x3 convolutions; torchvision's second version of the detectors has 2.
        box_channels: Width of the box head's fully connected layers.
        box_layers: Number of 3x3 convolutions of the box head, followed by one fully connected layer; 0 for two
            fully connected layers. torchvision's second version has 4.
        box_pool_size: Output size of the box head's RoI pooling.
        box_fg_iou: Minimum IoU of positive proposals.
        box_batch_size: Proposals sampled per image for the box loss.
        box_positive_fraction: Share of positives among them.
        mask_upsample: Upsampling of the mask head: ``"deconvolution"``, or ``"carafe"`` as in mmdetection's published
            CARAFE detectors.
        mask_channels: Width of the mask head's convolutions.
        mask_layers: Number of the mask head's convolutions.
        mask_pool_size: Output size of the mask head's RoI pooling; masks have twice this size. 28 gives masks of
            56 x 56, at four times the mask branch's cost.
        mask_boundary_weight: Weight of the mask loss at the edge of an object relative to the rest, see
            :func:`a2fpn.masks.targets.mask_loss`; 1 is the plain mean.
        head_norm: ``"bn"`` adds batch norm after the convolutions of the box and mask heads, as in torchvision's second
            version.
        mask_paste: ``"exact"`` samples masks at pixel centers; ``"torchvision"`` rounds boxes to whole pixels first,
            for the same pixels as torchvision's detectors.
        roi_sampling_ratio: Samples per bin side in RoI pooling; 0 for one per map pixel (detectron2, mmdetection).
        roi_aligned: Whether RoI pooling, of features and of mask targets, shifts by half a pixel (detectron2's
            ``aligned=True``).
        unused_outputs: Outputs of the box predictor without a class. They take part in the softmax and in
            post-processing, and their detections are dropped. torchvision's COCO detectors have ten, for ids that COCO
            does not use; without them scores would differ.

    Raises:
        ValueError: For a size or weight out of range.
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
        check_anchors(self.anchor_sizes, self.anchor_ratios)
        check_thresholds(rpn_=(self.rpn_fg_iou, self.rpn_bg_iou))
        shares = ("rpn_nms_threshold", "rpn_positive_fraction", "rpn_score_threshold")
        check_range(0, 1, **{name: getattr(self, name) for name in (*shares, "box_fg_iou", "box_positive_fraction")})
        tops = [f"rpn_{when}_nms_top_n_{phase}" for when in ("pre", "post") for phase in ("train", "test")]
        tops.remove("rpn_post_nms_top_n_train")  # with 0 the box heads train on the ground-truth boxes
        check_range(0, MOST_BOXES, rpn_post_nms_top_n_train=self.rpn_post_nms_top_n_train)
        check_range(1, MOST_BOXES, **{name: getattr(self, name) for name in tops})
        check_range(1, MOST_BOXES, rpn_batch_size=self.rpn_batch_size, box_batch_size=self.box_batch_size)
        check_range(1, MOST_CHANNELS, box_channels=self.box_channels, mask_channels=self.mask_channels)
        check_range(1, LARGEST_POOL, box_pool_size=self.box_pool_size, mask_pool_size=self.mask_pool_size)
        check_range(0, MOST_SAMPLES, roi_sampling_ratio=self.roi_sampling_ratio)
        check_layers(rpn_layers=self.rpn_layers, least=1)
        check_layers(box_layers=self.box_layers, mask_layers=self.mask_layers)
        check_range(1, LARGEST_WEIGHT, mask_boundary_weight=self.mask_boundary_weight)
        check_range(0, MOST_CHANNELS, unused_outputs=self.unused_outputs)


@dataclass(frozen=True)
class CascadeConfig(RCNNConfig):
    """Heads of Cascade R-CNN and Cascade Mask R-CNN: one box head (and mask head) per stage.

    Args:
        roi_aligned: Whether RoI pooling shifts by half a pixel, as in the published cascades.
        stage_ious: Minimum IoU of positives per stage; replaces ``box_fg_iou``.
        stage_box_weights: Weights of dx, dy, dw, dh as regression targets, per stage.
        stage_loss_weights: Loss weight per stage.
        stage_average: Quantity averaged over the stages for the scores: ``"probabilities"`` (the paper's code,
            detectron2) or ``"logits"`` (mmdetection).
        stage_masks: ``"all"`` gives every stage a mask head and averages the masks (mmdetection). ``"first"`` gives
            only the first stage one, trained on the proposals and used for all (detectron2).
        stage_resampling: Whether every stage resamples from its input boxes and the ground truth; False keeps the
            samples of the first stage (detectron2).
        scale_gradients: Whether the box heads' gradients into the pyramid are divided by the number of stages
            (detectron2, where the loss weights are 1).
        box_loss_beta: Beta of the smooth L1 box loss, in regression targets; 0 is plain L1 (detectron2).

    Raises:
        ValueError: If the three don't have the same number of stages, a box weight does not have four values,
            ``box_loss_beta`` is negative, or ``box_fg_iou`` is set, which a cascade doesn't use.
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
            raise ConfigError(f"box_fg_iou={self.box_fg_iou} is unused by a cascade; set stage_ious.")
        # The negation also rejects NaN.
        if not self.box_loss_beta >= 0:
            raise ConfigError(f"box_loss_beta must be 0 or more, got {self.box_loss_beta}.")


@dataclass(frozen=True)
class HTCConfig(CascadeConfig):
    """Heads of Hybrid Task Cascade.

    Args:
        stage_average: See :class:`CascadeConfig`; HTC's own code averages logits.
        semantic: False for no semantic branch. ``"things"`` trains it on a map built from the instance masks,
            ``"stuff"`` on the target's own map ``semantic`` (H, W).
        semantic_classes: Classes of the map with ``semantic="stuff"``; 255 in a map is ignored.
        semantic_channels: Width of the semantic branch.
        semantic_layers: Number of its 3x3 convolutions.
        semantic_loss_weight: Weight of its loss.

    Raises:
        ValueError: See :class:`CascadeConfig`; also unless every stage resamples and has a mask head.
    """

    stage_average: Literal["probabilities", "logits"] = "logits"
    semantic: Literal[False, "things", "stuff"] = False
    semantic_classes: int = 183
    semantic_channels: int = 256
    semantic_layers: int = 4
    semantic_loss_weight: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(semantic_layers=self.semantic_layers)
        check_range(1, MOST_CHANNELS, semantic_channels=self.semantic_channels)
        check_range(1, 255, semantic_classes=self.semantic_classes)
        check_range(0, LARGEST_WEIGHT, semantic_loss_weight=self.semantic_loss_weight)
        if self.stage_masks != "all" or not self.stage_resampling:
            raise ConfigError(
                "HTC resamples proposals and has a mask head in every stage: expected stage_masks='all', "
                "stage_resampling=True, got "
                f"{self.stage_masks!r}, {self.stage_resampling}."
            )


@dataclass(frozen=True)
class KeypointRCNNConfig(RCNNConfig):
    """Heads of Keypoint R-CNN; the defaults are torchvision's.

    The fields of :class:`RCNNConfig`, and:

    Args:
        num_keypoints: Keypoints of every object.
        keypoint_names: Their names; empty if unknown.
        keypoint_channels: Width of the keypoint head's convolutions.
        keypoint_layers: Number of the keypoint head's 3x3 convolutions.
        keypoint_pool_size: Output size of the keypoint head's RoI pooling; heatmaps have four times this size.

    Raises:
        ValueError: For an invalid count, or a different number of names.
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
        check_range(1, MOST_CHANNELS, num_keypoints=self.num_keypoints, keypoint_channels=self.keypoint_channels)
        check_range(1, LARGEST_POOL, keypoint_pool_size=self.keypoint_pool_size)
        if len(self.keypoint_names) not in (0, self.num_keypoints):
            raise ConfigError(
                f"num_keypoints is {self.num_keypoints} and keypoint_names has {len(self.keypoint_names)} names; give "
                "one name per keypoint, or none."
            )
        check_layers(keypoint_layers=self.keypoint_layers)
