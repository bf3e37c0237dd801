"""Conversion of torchvision's detectors to ours, with the same weights and detections.

torchvision and timm use the same names for the tensors of a ResNet, and the heads are torchvision's own. The names of
the pyramid, of MobileNet, and of older files are mapped. The configuration has everything that a state dict lacks: the
epsilon of the frozen batch norm, the anchor placement, the mask pasting method, the kind of box loss.

torchvision's COCO detectors have 91 outputs: background, 80 categories, and ten ids that COCO does not use. Ours have
the 80 categories as labels 0 to 79, with COCO's ids. The R-CNN heads keep the ten outputs, since they take part in the
softmax (``unused_outputs``); the outputs of RetinaNet and FCOS are independent, and the ten are dropped.
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
    """Convert a torchvision detector to one of ours with the same detections.

    Labels then start at 0 without background. Detections differ only for image sizes that torchvision resizes to one
    pixel less because of floating-point rounding (97 to 799 instead of 800).

    Args:
        module: A ``FasterRCNN``, ``MaskRCNN``, ``KeypointRCNN``, ``RetinaNet`` or ``FCOS`` of torchvision on a ResNet
            with FPN, or a ``FasterRCNN`` on MobileNetV3-Large with FPN; not modified, and nothing is shared with it.
        categories: Names of its outputs, as in ``weights.meta["categories"]``; ``"N/A"`` and ``"__background__"`` are
            not categories. None for COCO's names if it has as many outputs as COCO's detectors, an empty list for no
            names.

    Returns:
        The detector, on the same device and in the same mode.

    Raises:
        ValueError: If it has unsupported parts.

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
    """Build the torchvision detector of a state dict, for :func:`from_torchvision`.

    Args:
        state: Its tensors; the numbers of classes and keypoints are inferred from them.
        builder: The function of ``torchvision.models.detection`` that built it, such as ``fasterrcnn_resnet50_fpn``.
        norm_eps: Epsilon of the backbone's batch norm, which files do not contain. torchvision uses 0 if training
            started from the older COCO weights of a ResNet-50, otherwise 1e-5; required if both are possible.
        **options: Other arguments of the builder, such as ``min_size``.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: For an unknown builder, tensors of another detector, or a missing ``norm_eps``.
    """
    known = {w.builder: w for w in PRETRAINED.values() if isinstance(w, TorchvisionWeights)}
    if builder not in known:
        raise ConfigError(f"torchvision's {builder!r} cannot be converted. {did_you_mean(builder, known)}")
    if norm_eps is None:
        if known[builder].frozen_eps == 0:
            raise ConfigError(
                f"Give norm_eps: the outputs of {builder} depend on it, and the file does not store it. It is 0.0 if "
                "this is"
                " torchvision's COCO file, or training began with it (weights='DEFAULT'), and 1e-5 if it began with"
                " weights_backbone= or from scratch."
            )
        norm_eps = 1e-5
    module: nn.Module = get_model_builder(builder)(
        weights=None, weights_backbone=None, **{**_numbers(state), **options}
    ).eval()
    arguments = inspect.signature(type(module)).parameters
    for name in options:
        # torchvision itself accepts any name.
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
