"""State dicts of mmdetection's Faster, Mask, Cascade and Cascade Mask R-CNN and HTC -> ours, with FPN or FPN_CARAFE.

Names and conventions are those of https://github.com/open-mmlab/mmdetection (Apache-2.0), version 2 and newer.
``python -m benchmarks.parity --source mmdet`` compares both sides if mmdetection is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from a2fpn.config import ModelConfig
from a2fpn.convert._common import POOLING, Layout, Pixels, convert
from a2fpn.errors import ConfigError

_DETECTORS = ("fasterrcnn_", "maskrcnn_", "cascadercnn_", "cascademaskrcnn_", "htc_")

_RULES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^neck\.lateral\.", "neck.lateral_convs."),
    (r"^neck\.output\.", "neck.fpn_convs."),
    (r"^neck\.top_down\.", "neck.upsample_modules."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.stages\.(\d+)\.(\w+)\.", r"roi_heads.\2.\1."),
    (r"^roi_heads\.semantic\.lateral\.(\d+)\.0\.", r"roi_head.semantic_head.lateral_convs.\1.conv."),
    (r"^roi_heads\.semantic\.convs\.(\d+)\.0\.", r"roi_head.semantic_head.convs.\1.conv."),
    (r"^roi_heads\.semantic\.embedding\.0\.", "roi_head.semantic_head.conv_embedding.conv."),
    (r"^roi_heads\.semantic\.logits\.", "roi_head.semantic_head.conv_logits."),
    (r"^roi_heads\.", "roi_head."),
    (r"\.box_head\.(.*)fc6\.", r".bbox_head.\1shared_fcs.0."),
    (r"\.box_head\.(.*)fc7\.", r".bbox_head.\1shared_fcs.1."),
    (r"\.box_predictor\.(.*)cls_score\.", r".bbox_head.\1fc_cls."),
    (r"\.box_predictor\.(.*)bbox_pred\.", r".bbox_head.\1fc_reg."),
    (r"\.mask_head\.(\d+\.)?(\d+)\.0\.", r".mask_head.\1convs.\2.conv."),
    (r"\.mask_predictor\.(.*)(?:conv5_mask|upsample)\.", r".mask_head.\1upsample."),
    (r"\.mask_predictor\.(.*)mask_fcn_logits\.", r".mask_head.\1conv_logits."),
    (r"^(.*upsample.*)\.compress\.", r"\1.channel_compressor."),
    (r"^(.*upsample.*)\.kernels\.conv\.", r"\1.content_encoder."),
)


def from_mmdet(
    state: Mapping[str, Tensor],
    name: str,
    *,
    style: Literal["pytorch", "caffe"] = "pytorch",
    bgr_to_rgb: bool = True,
    mean: tuple[float, ...] = (123.675, 116.28, 103.53),
    std: tuple[float, ...] = (58.395, 57.12, 57.375),
    **overrides: Any,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert a state dict of mmdetection to one of ours.

    The defaults are those of mmdetection's configurations ``*_r50_fpn_*``. Color channels are swapped in the first
    convolution if necessary, and the statistics converted in the configuration.

    Args:
        state: The tensors of ``model.state_dict()`` or :func:`~a2fpn.convert.read_state_dict`; not modified.
        name: The model to build: ``fasterrcnn_fpn_r50``, ``maskrcnn_fpn_r101``, ``cascademaskrcnn_fpn_r50``,
            ``htc_fpn_r50``, ...; ``maskrcnn_carafe_fpn_r50`` for ``mask_rcnn_r50_fpn_carafe_1x_coco``.
        style: ``style`` of the source's ResNet, which the state dict does not contain.
        bgr_to_rgb: ``bgr_to_rgb`` of its data preprocessor.
        mean: Its ``mean``, in the order of the network's input.
        std: Its ``std``, likewise.
        **overrides: As in :func:`a2fpn.create_model` (``categories``, ``min_size``, ...).

    Returns:
        Configuration and state dict.

    Raises:
        ValueError: For another kind of detector, or missing, unexpected or mismatched tensors, with mmdetection's
            names.
    """
    if not name.startswith(_DETECTORS):
        raise ConfigError(f"{name!r} has no counterpart in mmdetection; use a name that begins with {_DETECTORS}.")
    pixels = Pixels(tuple(mean), tuple(std), bgr=not bgr_to_rgb)
    rules: dict[str, Any] = {**POOLING, "stride_in_1x1": style == "caffe", "rpn_post_nms_top_n_train": 1000}
    if name.startswith(("cascade", "htc")):
        rules |= {
            "rpn_post_nms_top_n_train": 2000,
            "stage_average": "logits",
            "stage_box_weights": tuple((1 / xy, 1 / xy, 1 / wh, 1 / wh) for xy, wh in _STAGE_STDS),
        }
    if "_carafe_fpn" in name:
        rules["size_divisor"] = 64
    if name.startswith("htc"):
        rules["score_threshold"] = 0.001
    return convert(
        state, name, Layout("mmdetection", _rename, necks=("fpn", "carafe_fpn")), pixels, {**rules, **overrides}
    )


_STAGE_STDS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
"""``target_stds`` of a box's center and size, per stage."""


def _rename(key: str) -> str:
    flow = re.fullmatch(r"roi_heads\.mask_flow\.(\d+)\.0\.(\w+)", key)
    if flow:
        return f"roi_head.mask_head.{int(flow[1]) + 1}.conv_res.conv.{flow[2]}"
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return key
