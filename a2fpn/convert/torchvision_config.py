"""Configurations of torchvision's detectors, read from the modules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from a2fpn.backbones import ALIASES
from a2fpn.config import STAGES, BackboneConfig, Category, ModelConfig, NeckConfig, PreprocessConfig, heads_type
from a2fpn.detectors import DETECTORS
from a2fpn.device import without_values
from a2fpn.errors import ConfigError
from a2fpn.pretrained.catalog import TorchvisionWeights

# Number of blocks, channels and group width of the first block's second convolution, and its number of convolutions.
_RESNETS = {
    (8, 64, 64, 2): "resnet18",
    (16, 64, 64, 2): "resnet34",
    (16, 64, 64, 3): "resnet50",
    (33, 64, 64, 3): "resnet101",
    (50, 64, 64, 3): "resnet152",
    (16, 128, 4, 3): "resnext50_32x4d",
    (33, 256, 8, 3): "resnext101_32x8d",
    (16, 128, 128, 3): "wide_resnet50_2",
    (33, 128, 128, 3): "wide_resnet101_2",
}
_MOBILENET = "mobilenetv3_large_100"
# Two maps of stride 32: after the first block of the last stage, and after the last convolution.
_MOBILENET_TAPS = {("13", "16"): ("blocks.5.0", "blocks.6")}
_MOBILENET_STAGES = (0, 2, 4, 7, 13, 17)  # first layers of strides 2, 4, 8, 16 and 32, and the end
_ONE_STAGE = ("retinanet", "fcos")
_UNNAMED = ("N/A", "__background__")


def torchvision_config(module: nn.Module, *, categories: Sequence[str] | None = None) -> ModelConfig:
    """Configuration of the detector built by :func:`from_torchvision`.

    Args:
        module: See :func:`from_torchvision`; may be on the meta device.
        categories: See :func:`from_torchvision`.

    Raises:
        ValueError: See :func:`from_torchvision`.
    """
    kinds = {
        FasterRCNN: ("fasterrcnn", _rcnn),
        MaskRCNN: ("maskrcnn", _mask_rcnn),
        KeypointRCNN: ("keypointrcnn", _keypoint_rcnn),
        RetinaNet: ("retinanet", _retinanet),
        FCOS: ("fcos", _fcos),
    }
    # Not isinstance: a subclass may compute anything.
    if type(module) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"A {type(module).__name__} cannot be converted, but torchvision's {known} can.")
    detector, read = kinds[type(module)]
    if not isinstance(module.backbone, BackboneWithFPN):
        raise ConfigError(
            f"The backbone is a {type(module.backbone).__name__}; only one with torchvision's FPN can be converted."
        )
    backbone = backbone_config(module.backbone.body)
    one_stage = detector in _ONE_STAGE
    extra = module.backbone.fpn.extra_blocks
    if not isinstance(extra, LastLevelP6P7 if one_stage else LastLevelMaxPool):
        raise _other(
            "extra_blocks of the FPN", type(extra).__name__, "LastLevelP6P7" if one_stage else "LastLevelMaxPool"
        )
    options = read(module)
    outputs = _num_outputs(module)
    found = _categories(detector, outputs, categories)
    num_classes = len(found) or (outputs if one_stage else outputs - 1)
    if not one_stage:
        options["unused_outputs"] = outputs - 1 - num_classes
    if detector == "keypointrcnn" and found and categories is None:  # which identifies COCO's classes
        published = _published(detector)["keypoint_names"]
        options["keypoint_names"] = tuple(published) if len(published) == options["num_keypoints"] else ()
    short = next((alias for alias, full in ALIASES.items() if full == backbone.name), backbone.name)
    return ModelConfig(
        architecture=f"{detector}_fpn_{short.partition('.')[0]}",
        detector=detector,
        backbone=backbone,
        neck=NeckConfig("fpn", {**DETECTORS[detector].neck_args, **_neck_args(module.backbone.fpn)}),
        num_classes=num_classes,
        preprocess=_preprocess(module.transform),
        heads=heads_type(detector)(legacy_anchors=True, **options),
        categories=found,
    )


def published_config(weights: TorchvisionWeights) -> ModelConfig:
    """Configuration of a detector with published torchvision weights, without network access.

    Example:
        >>> config = published_config(TorchvisionWeights("maskrcnn_resnet50_fpn", frozen_eps=0.0))
        >>> config.architecture, config.num_classes, config.backbone.norm, config.backbone.norm_eps
        ('maskrcnn_fpn_r50', 80, 'frozen', 0.0)
    """
    with without_values():
        module = get_model_builder(weights.builder)(weights=None, weights_backbone=None)
    config = torchvision_config(module)
    # torchvision sets these only if weights are given.
    changes: dict[str, Any] = {}
    if weights.frozen_eps is not None:
        changes |= {"norm": "frozen", "norm_eps": weights.frozen_eps}
    # torchvision trains three of MobileNet's stages too, the last of which is a single layer.
    changes["trainable_layers"] = 2 if config.backbone.taps else 3
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, **changes))


# Configurations
def _other(what: str, got: object, expected: object) -> ConfigError:
    return ConfigError(f"This detector cannot be converted: its {what} is {got!r}, only {expected!r} can be.")


def backbone_config(body: IntermediateLayerGetter) -> BackboneConfig:
    """Configuration of a ResNet or MobileNetV3."""
    norms = [m for m in body.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    frozen = {isinstance(m, FrozenBatchNorm2d) for m in norms}
    eps = {m.eps for m in norms}
    if len(frozen) != 1 or len(eps) != 1:
        raise _other("backbone's norm", sorted({(type(m).__name__, m.eps) for m in norms}), "batch norm of one kind")
    levels = tuple(body.return_layers)
    options: dict[str, Any] = {"norm": "frozen" if frozen == {True} else "bn", "norm_eps": eps.pop()}
    if "layer1" not in dict(body.named_children()):
        if levels not in _MOBILENET_TAPS or len(list(body.children())) != 17:
            raise _other("backbone", f"{type(body).__name__} with maps {list(levels)}", "ResNet or MobileNetV3-Large")
        layers = list(body.children())
        parts = [layers[start:end] for start, end in itertools.pairwise(_MOBILENET_STAGES)]
        options["trainable_layers"] = _trained([nn.Sequential(*part) for part in parts])
        return BackboneConfig(_MOBILENET, taps=_MOBILENET_TAPS[levels], **options)
    stages = [getattr(body, f"layer{i}") for i in range(1, 5) if hasattr(body, f"layer{i}")]
    first = stages[0][0]
    width, group = first.conv2.weight.shape[:2]
    signature = (sum(map(len, stages)), width, group, 3 if hasattr(first, "conv3") else 2)
    if signature not in _RESNETS:
        raise _other("backbone", f"a ResNet of {signature[0]} blocks, {width} wide", list(_RESNETS.values()))
    strides = tuple(2 << int(level.removeprefix("layer")) for level in levels)
    options["trainable_layers"] = _trained([body.conv1, *stages])
    return BackboneConfig(f"{_RESNETS[signature]}.tv_in1k", strides=strides, **options)


def _trained(stages: Sequence[nn.Module]) -> int | None:
    """Return the number of trained stages, counted from the deepest; None for all."""
    frozen = itertools.takewhile(lambda stage: not any(p.requires_grad for p in stage.parameters()), stages)
    trained = STAGES - len(list(frozen))
    return None if trained == STAGES else trained


def _neck_args(fpn: FeaturePyramidNetwork) -> dict[str, Any]:
    first = fpn.inner_blocks[0]
    args: dict[str, Any] = {}
    if first[0].out_channels != 256:
        args["out_channels"] = first[0].out_channels
    if len(first) > 1:
        if type(first[1]) is not nn.BatchNorm2d:
            raise _other("FPN's norm", type(first[1]).__name__, "BatchNorm2d")
        args["norm_layer"] = "batchnorm2d"
    return args


def _preprocess(transform: GeneralizedRCNNTransform) -> PreprocessConfig:
    if transform.fixed_size is not None:
        raise _other("fixed_size", transform.fixed_size, None)
    return PreprocessConfig(
        min_size=transform.min_size[-1],
        max_size=transform.max_size,
        mean=tuple(transform.image_mean),
        std=tuple(transform.image_std),
        size_divisor=transform.size_divisible,
    )


def _rcnn(module: FasterRCNN) -> dict[str, Any]:
    rpn, roi = module.rpn, module.roi_heads
    ratios = set(rpn.anchor_generator.aspect_ratios)
    if len(ratios) != 1:
        raise _other("aspect_ratios", rpn.anchor_generator.aspect_ratios, "the same on every level")
    matcher = roi.proposal_matcher
    if matcher.low_threshold != matcher.high_threshold:
        raise _other("box_bg_iou_thresh", matcher.low_threshold, matcher.high_threshold)
    if tuple(roi.box_coder.weights) != (10.0, 10.0, 5.0, 5.0):
        raise _other("bbox_reg_weights", roi.box_coder.weights, (10.0, 10.0, 5.0, 5.0))
    if type(roi.box_predictor) is not FastRCNNPredictor:
        raise _other("box_predictor", type(roi.box_predictor).__name__, "FastRCNNPredictor")
    pre, post, pool = rpn._pre_nms_top_n, rpn._post_nms_top_n, roi.box_roi_pool
    return {
        **_box_head(roi.box_head),
        "anchor_sizes": tuple(map(tuple, rpn.anchor_generator.sizes)),
        "anchor_ratios": tuple(map(float, ratios.pop())),
        "rpn_pre_nms_top_n_train": pre["training"],
        "rpn_pre_nms_top_n_test": pre["testing"],
        "rpn_post_nms_top_n_train": post["training"],
        "rpn_post_nms_top_n_test": post["testing"],
        "rpn_nms_threshold": rpn.nms_thresh,
        "rpn_fg_iou": rpn.proposal_matcher.high_threshold,
        "rpn_bg_iou": rpn.proposal_matcher.low_threshold,
        "rpn_batch_size": rpn.fg_bg_sampler.batch_size_per_image,
        "rpn_positive_fraction": rpn.fg_bg_sampler.positive_fraction,
        "rpn_score_threshold": rpn.score_thresh,
        "rpn_layers": len(rpn.head.conv),
        "box_pool_size": pool.output_size[0],
        "box_fg_iou": matcher.high_threshold,
        "box_batch_size": roi.fg_bg_sampler.batch_size_per_image,
        "box_positive_fraction": roi.fg_bg_sampler.positive_fraction,
        "roi_sampling_ratio": pool.sampling_ratio,
        "roi_aligned": False,
        "score_threshold": roi.score_thresh,
        "nms_threshold": roi.nms_thresh,
        "detections_per_image": roi.detections_per_img,
    }


def _box_head(head: TwoMLPHead | FastRCNNConvFCHead) -> dict[str, Any]:
    if type(head) is TwoMLPHead:
        return {"box_channels": head.fc7.out_features}
    blocks = list(head.children()) if type(head) is FastRCNNConvFCHead else []
    linear = [block for block in blocks if isinstance(block, nn.Linear)]
    convs = [block for block in blocks if isinstance(block, nn.Sequential)]
    if len(linear) != 1 or not convs:
        raise _other("box_head", type(head).__name__, "TwoMLPHead, or FastRCNNConvFCHead with one linear layer")
    return {"box_layers": len(convs), "box_channels": linear[0].out_features, **_head_norm(convs)}


def _head_norm(convs: Iterable[nn.Module]) -> dict[str, Any]:
    """Return the ``head_norm`` override of a head with batch norm after its convolutions, else nothing."""
    return {"head_norm": "bn"} if any(isinstance(m, nn.BatchNorm2d) for conv in convs for m in conv.modules()) else {}


def _mask_rcnn(module: MaskRCNN) -> dict[str, Any]:
    options, roi = _rcnn(module), module.roi_heads
    norm = _head_norm(roi.mask_head)
    if "box_layers" in options and norm.get("head_norm") != options.get("head_norm"):
        raise _other("norm of the mask head", norm.get("head_norm"), options.get("head_norm"))
    return {
        **options,
        **norm,
        "mask_channels": roi.mask_predictor.conv5_mask.out_channels,
        "mask_layers": len(roi.mask_head),
        "mask_pool_size": roi.mask_roi_pool.output_size[0],
        "mask_paste": "torchvision",
    }


def _keypoint_rcnn(module: KeypointRCNN) -> dict[str, Any]:
    roi = module.roi_heads
    return {
        **_rcnn(module),
        "num_keypoints": roi.keypoint_predictor.kps_score_lowres.out_channels,
        "keypoint_channels": roi.keypoint_predictor.kps_score_lowres.in_channels,
        "keypoint_layers": sum(isinstance(m, nn.Conv2d) for m in roi.keypoint_head),
        "keypoint_pool_size": roi.keypoint_roi_pool.output_size[0],
    }


def _one_stage(module: RetinaNet | FCOS) -> dict[str, Any]:
    top = module.backbone.fpn.extra_blocks
    return {
        "top_source": "neck" if top.use_P5 else "backbone",
        "candidates_per_level": module.topk_candidates,
        "score_threshold": module.score_thresh,
        "nms_threshold": module.nms_thresh,
        "detections_per_image": module.detections_per_img,
    }


def _retinanet(module: RetinaNet) -> dict[str, Any]:
    anchors, matcher = module.anchor_generator, module.proposal_matcher
    ratios = set(anchors.aspect_ratios)
    if len(ratios) != 1:
        raise _other("aspect_ratios", anchors.aspect_ratios, "the same on every level")
    norms = {type(m) for m in module.head.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))}
    if norms - {nn.GroupNorm}:
        raise _other("head's norm", "BatchNorm2d", "GroupNorm")
    return {
        **_one_stage(module),
        "anchor_sizes": tuple(map(tuple, anchors.sizes)),
        "anchor_ratios": tuple(map(float, ratios.pop())),
        "fg_iou": matcher.high_threshold,
        "bg_iou": matcher.low_threshold,
        "head_norm": "gn" if norms else "none",
        "box_loss": module.head.regression_head._loss_type,
    }


def _fcos(module: FCOS) -> dict[str, Any]:
    anchors = module.anchor_generator
    if set(anchors.aspect_ratios) != {(1.0,)} or anchors.sizes != ((8,), (16,), (32,), (64,), (128,)):
        raise _other(
            "anchor_generator", f"one of sizes {anchors.sizes}", "one square per level, as large as its stride"
        )
    return {
        **_one_stage(module),
        "center_radius": module.center_sampling_radius,
        "head_layers": sum(isinstance(m, nn.Conv2d) for m in module.head.classification_head.conv),
    }


def _num_outputs(module: FasterRCNN | RetinaNet | FCOS) -> int:
    if isinstance(module, FasterRCNN):
        return int(module.roi_heads.box_predictor.cls_score.out_features)
    return int(module.head.classification_head.num_classes)


def _published(detector: str) -> Mapping[str, Any]:
    """Return torchvision's metadata of its own weights."""
    meta: Mapping[str, Any] = get_model_weights(f"{detector}_resnet50_fpn")["COCO_V1"].meta
    return meta


def _categories(detector: str, outputs: int, names: Sequence[str] | None) -> tuple[Category, ...]:
    """Categories of the outputs; the index of an output is the category's id, as in COCO."""
    if names is None:
        published = _published(detector)["categories"]
        names = published if len(published) == outputs else []
    if names and len(names) != outputs:
        raise ConfigError(f"{len(names)} categories were given for a detector with {outputs} outputs.")
    first = 0 if detector in _ONE_STAGE else 1  # after the background
    return tuple(Category(i, name) for i, name in enumerate(names) if i >= first and name not in _UNNAMED)
