"""torchvision's detectors turned into ours: same weights, same detections.

torchvision and timm name the tensors of a ResNet alike, and the heads are torchvision's own; what has to be translated
is the pyramid's names, MobileNet's names, and the names that the older files use. What a state dict does not hold is in
the configuration: the epsilon of the frozen batch norm, the rule that places anchors, the rule that pastes masks, the
kind of the box loss.

torchvision's COCO detectors have 91 outputs: background, 80 categories, and ten ids that COCO left out. Ours have the
80 categories as labels 0 to 79, with COCO's ids. In the R-CNN heads the ten outputs stay, since they take part in the
softmax (``unused_outputs``); RetinaNet's and FCOS's outputs do not see each other, and the ten are dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_builder
from torchvision.ops import FrozenBatchNorm2d

from a2fpn._registry import did_you_mean
from a2fpn.backbones import TimmBackbone
from a2fpn.convert.torchvision_config import torchvision_config
from a2fpn.convert.torchvision_state import torchvision_state
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import ConfigError
from a2fpn.necks import create_neck
from a2fpn.pretrained.catalog import PRETRAINED, TorchvisionWeights
from a2fpn.pretrained.checkpoint import load_weights


def from_torchvision(module: nn.Module, *, categories: Sequence[str] | None = None) -> Detector:
    """Turn a torchvision detector into one of ours that gives the same detections.

    Labels then start at 0 without background. Sizes whose resize torchvision's floating point makes a pixel smaller
    (97 to 799 instead of 800) are the exception.

    Args:
        module: A ``FasterRCNN``, ``MaskRCNN``, ``KeypointRCNN``, ``RetinaNet`` or ``FCOS`` of torchvision on a ResNet
            with FPN, or a ``FasterRCNN`` on MobileNetV3-Large with FPN; not changed, and nothing is shared with it.
        categories: Names of its outputs, as in ``weights.meta["categories"]``; those called ``"N/A"`` or
            ``"__background__"`` are no categories. None takes COCO's names if it has as many outputs as COCO's
            detectors, an empty list none.

    Returns:
        The detector, on the same device and in the same mode.

    Raises:
        ValueError: If it has parts that ours lack.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
        >>> source = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
        >>> model = from_torchvision(source, categories=["__background__", "cat", "dog"])
        >>> model.config.architecture, [category.name for category in model.config.categories]
        ('fasterrcnn_fpn_mobilenetv3_large_100', ['cat', 'dog'])
    """
    config = torchvision_config(module, categories=categories)
    backbone = TimmBackbone(config.backbone, strides=config.backbone.strides)
    neck = create_neck(config.neck.name, backbone.out_spec, **config.neck.args)
    model = DETECTORS[config.detector](config, backbone, neck)
    load_weights(model, torchvision_state(module.state_dict(), config))
    return model.to(next(module.parameters())).train(module.training)


def load_torchvision(
    state: Mapping[str, Tensor], builder: str, *, norm_eps: float | None = None, **options: Any
) -> nn.Module:
    """Build the torchvision detector that a state dict belongs to, for :func:`from_torchvision`.

    Args:
        state: Its tensors; numbers of classes and keypoints are read from them.
        builder: The function of ``torchvision.models.detection`` that made it, such as ``fasterrcnn_resnet50_fpn``.
        norm_eps: Epsilon of the backbone's batch norm, which no file says. torchvision has 0 where training began with
            the older COCO weights of a ResNet-50, and 1e-5 elsewhere; where both can be, it must be given.
        **options: Other arguments that the builder was called with, ``min_size`` and so on.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: For an unknown builder, tensors of another detector, or a ``norm_eps`` that is missing.
    """
    known = {w.builder: w for w in PRETRAINED.values() if isinstance(w, TorchvisionWeights)}
    if builder not in known:
        raise ConfigError(f"torchvision's {builder!r} cannot be converted. {did_you_mean(builder, known)}")
    if norm_eps is None:
        if known[builder].frozen_eps == 0:
            raise ConfigError(
                f"Give norm_eps: what {builder} computes depends on it, and the file does not say. It is 0.0 if this is"
                " torchvision's COCO file, or training began with it (weights='DEFAULT'), and 1e-5 if it began with"
                " weights_backbone= or from nothing."
            )
        norm_eps = 1e-5
    module: nn.Module = get_model_builder(builder)(
        weights=None, weights_backbone=None, **{**_numbers(state), **options}
    ).eval()
    arguments = inspect.signature(type(module)).parameters
    for name in options:
        # torchvision itself swallows any.
        if name not in arguments:
            raise ConfigError(f"{builder} has no argument {name!r}. {did_you_mean(name, arguments)}")
    body = module.get_submodule("backbone.body")
    tracked = any(".body." in key and key.endswith("num_batches_tracked") for key in state)
    for name, norm in [(name, m) for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.eps = norm_eps
        if not tracked:
            owner, _, attribute = name.rpartition(".")
            setattr(body.get_submodule(owner), attribute, FrozenBatchNorm2d(norm.num_features, eps=norm_eps))
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ConfigError(
            f"The state dict is not that of torchvision's {builder}: {str(error).strip()[:500]}"
        ) from error
    return module


def _numbers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Infer arguments of a torchvision detector's builder from its tensors."""
    rows = {key.removesuffix(".weight"): x.shape for key, x in state.items() if key.endswith(".weight")}
    found = {}
    if shape := rows.get("roi_heads.box_predictor.cls_score"):
        found["num_classes"] = shape[0]
    if shape := rows.get("roi_heads.keypoint_predictor.kps_score_lowres"):
        found["num_keypoints"] = shape[1]
    logits, boxes = rows.get("head.classification_head.cls_logits"), rows.get("head.regression_head.bbox_reg")
    if logits and boxes:
        found["num_classes"] = 4 * logits[0] // boxes[0]
    return found
