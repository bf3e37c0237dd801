"""State dicts of detectron2's Faster, Mask, Cascade and Cascade Mask R-CNN with an FPN -> ours.

Names and conventions are those of https://github.com/facebookresearch/detectron2 (Apache-2.0).
``python -m benchmarks.parity --source detectron2`` compares both sides if detectron2 is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from a2fpn.config import ModelConfig
from a2fpn.convert._common import POOLING, Layout, Pixels, convert
from a2fpn.errors import ConfigError

_DETECTORS = ("fasterrcnn_", "maskrcnn_", "cascadercnn_", "cascademaskrcnn_")

_RULES = (
    (r"backbone\.body\.(conv1|bn1)", r"backbone.bottom_up.stem.\1"),
    (r"backbone\.body\.layer1\.", "backbone.bottom_up.res2."),
    (r"backbone\.body\.layer2\.", "backbone.bottom_up.res3."),
    (r"backbone\.body\.layer3\.", "backbone.bottom_up.res4."),
    (r"backbone\.body\.layer4\.", "backbone.bottom_up.res5."),
    (r"(bottom_up.*\.)bn(\d)\.", r"\1conv\2.norm."),
    (r"(bottom_up.*\.)downsample\.0\.", r"\1shortcut."),
    (r"(bottom_up.*\.)downsample\.1\.", r"\1shortcut.norm."),
    (r"rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    # A single mask head for any number of stages.
    (r"roi_heads\.stages\.0\.(mask_\w+\.)", r"roi_heads.\1"),
    (r"roi_heads\.stages\.(\d+)\.(\w+)\.", r"roi_heads.\2.\1."),
    (r"box_head\.(.*)fc6\.", r"box_head.\1fc1."),
    (r"box_head\.(.*)fc7\.", r"box_head.\1fc2."),
    (r"mask_predictor\.conv5_mask\.", "mask_head.deconv."),
    (r"mask_predictor\.mask_fcn_logits\.", "mask_head.predictor."),
)


def from_detectron2(
    state: Mapping[str, Tensor],
    name: str,
    *,
    stride_in_1x1: bool = True,
    input_format: Literal["BGR", "RGB"] = "BGR",
    pixel_mean: tuple[float, ...] = (103.53, 116.28, 123.675),
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0),
    **overrides: Any,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert a state dict of detectron2 to one of ours.

    The defaults are those of detectron2's configurations. Color channels are swapped in the first convolution, and the
    statistics converted in the configuration, so that the network computes the same.

    Args:
        state: The tensors of ``model.state_dict()`` or
            :func:`~a2fpn.convert.read_state_dict`; not modified.
        name: The model to build: ``fasterrcnn_fpn_r50``, ``maskrcnn_fpn_r101``, ``cascademaskrcnn_fpn_r50``, ...
        stride_in_1x1: ``MODEL.RESNETS.STRIDE_IN_1X1``, which the state dict does not contain.
        input_format: ``INPUT.FORMAT``.
        pixel_mean: ``MODEL.PIXEL_MEAN``, in the order of ``input_format``; ignored if the state dict has its own.
        pixel_std: ``MODEL.PIXEL_STD``, likewise.
        **overrides: As in :func:`a2fpn.create_model` (``categories``, ``min_size``, ...).

    Returns:
        Configuration and state dict.

    Raises:
        ValueError: For another kind of detector, or missing, unexpected or mismatched tensors, with detectron2's names.
    """
    if not name.startswith(_DETECTORS):
        raise ConfigError(f"{name!r} has no counterpart in detectron2; use a name that begins with {_DETECTORS}.")
    mean, std = (
        tuple(state[key].flatten().tolist()) if key in state else default
        for key, default in (("pixel_mean", tuple(pixel_mean)), ("pixel_std", tuple(pixel_std)))
    )
    pixels = Pixels(mean, std, bgr=input_format == "BGR")
    ignored = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")
    rules: dict[str, Any] = {**POOLING, "stride_in_1x1": stride_in_1x1, "rpn_post_nms_top_n_train": 1000}
    if name.startswith("cascade"):
        rules |= {
            "rpn_post_nms_top_n_train": 2000,
            "stage_loss_weights": (1.0, 1.0, 1.0),
            "stage_masks": "first",
            "stage_resampling": False,
            "scale_gradients": True,
            "box_loss_beta": 0.0,
        }
    return convert(state, name, Layout("detectron2", _rename, ignored), pixels, {**rules, **overrides})


def _rename(key: str) -> str:
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    if key.startswith("neck."):
        _, kind, level, _, tensor = key.split(".")
        return f"backbone.fpn_{kind}{int(level) + 2}.{tensor}"
    # Convolutions of the mask head are numbered from 1.
    return re.sub(r"mask_head\.(\d+)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", key)
