"""Shorter ONNX translations than those of torch's exporter, and its optimizer's passes that pay.

The exporter computes shapes from sums and products of sizes, and writes attention and indexing in their most general
forms, which would account for two of three nodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

_UNKNOWN = re.compile(r"\bu\d")
"""Names of data-dependent sizes in torch."""
_CUBIC = [[-0.75, 1.25, -1.25, 0.75], [1.5, -2.25, 1.5, -0.75], [-0.75, 0.0, 0.75, 0.0]]
"""Cubic weights of the four nearest pixels, by the third, second and first power of the distance from the second."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return functions that translate torch operators, for ``torch.onnx.export(custom_translation_table=)``."""
    import onnx_ir as ir
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops import core, nn

    op: Any = opset18

    def index(x: Any, indices: Sequence[Any]) -> Any:
        if None in indices or any(len(i.shape) != 1 for i in indices[1:]):
            return core.aten_index(x, indices)
        if len(indices) == 1:
            return op.Gather(x, indices[0], axis=0)
        return op.GatherND(x, op.Concat(*(op.Unsqueeze(i, [1]) for i in indices), axis=1))

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if is_causal or enable_gqa or scale is None:
            return nn.aten_scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            logits = op.Where(attn_mask, logits, torch.finfo(torch.float32).min)
        return op.MatMul(op.Softmax(logits, axis=-1), value)

    def item(x: Any) -> Any:
        return op.Identity(x)

    def quotient(a: Any, b: Any) -> Any:
        # Integers are indices and sizes, which are never negative.
        return op.Div(a, b) if a.dtype.is_integer() else core.aten_floor_divide(a, b)

    def roi_align(
        x: Any, rois: Any, scale: float, height: int, width: int, sampling_ratio: int = -1, aligned: bool = False
    ) -> Any:
        return op.RoiAlign(
            x,
            op.Slice(rois, [1], [5], [1]),
            op.Cast(op.Gather(rois, 0, axis=1), to=ir.DataType.INT64),
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            spatial_scale=scale,
            output_height=height,
            output_width=width,
            sampling_ratio=max(sampling_ratio, 0),
        )

    def bicubic(x: Any, size: Sequence[Any], *_: Any) -> Any:
        # ONNX Runtime's cubic Resize takes over ten times as long.
        for wanted in size:  # resizes the rows, then transposes, so that columns are next
            x = op.Transpose(weighted_rows(x, wanted), perm=[0, 1, 3, 2])
        return x

    def weighted_rows(x: Any, wanted: Any) -> Any:
        count = op.Cast(wanted, to=ir.DataType.FLOAT)
        before = op.Shape(x, start=2, end=3)
        scale = op.Div(op.Cast(before, to=ir.DataType.FLOAT), count)
        place = op.Sub(op.Mul(op.Add(op.Range(0.0, count, 1.0), 0.5), scale), 0.5)
        first = op.Floor(place)
        powers = op.Pow(op.Unsqueeze(op.Sub(place, first), [1]), [3.0, 2.0, 1.0])
        weights = op.Unsqueeze(
            op.Gemm(powers, op.Constant(value=ir.tensor(_CUBIC, dtype=ir.DataType.FLOAT)), [0.0, 1.0, 0.0, 0.0]), [1]
        )
        around = op.Cast(op.Add(op.Unsqueeze(first, [1]), [-1.0, 0.0, 1.0, 2.0]), to=ir.DataType.INT64)
        rows = op.Clip(around, 0, op.Squeeze(op.Sub(before, [1])))
        return op.Squeeze(op.MatMul(weights, op.Gather(x, rows, axis=2)), [3])

    aten = torch.ops.aten
    return {
        aten.upsample_bicubic2d.vec: bicubic,
        aten._local_scalar_dense.default: item,
        aten.floor_divide.default: quotient,
        torch.ops.torchvision.roi_align.default: roi_align,
        aten.index.Tensor: index,
        aten.scaled_dot_product_attention.default: attention,
    }


def optimize(model: Any) -> None:
    """Fold constants and shapes of a model, and merge and deduplicate its nodes.

    Of the exporter's rewrite rules three shorten detectors; matching all of them takes ten times as long.

    Args:
        model: An ``onnx_ir.Model``; modified in place.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import (
        fuse_pad_into_conv_rule,
        reshape_reshape_rule,
        unsqueeze_unsqueeze_rule,
    )

    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    rewriter.rewrite(model, [fuse_pad_into_conv_rule, reshape_reshape_rule, unsqueeze_unsqueeze_rule])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _fold_shapes(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def _fold_shapes(model: Any) -> None:
    """Make the shapes of reshapes constant if at most one size is neither known nor copied."""
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        old, new = node.inputs[0].shape, node.outputs[0].shape
        if old is None or new is None:
            continue
        sizes = [_size(side, old[i] if i < len(old) else None) for i, side in enumerate(new)]
        # If the number of objects is 0, Reshape can't infer another size.
        may_be_empty = any(size == 0 and _UNKNOWN.search(str(side)) for size, side in zip(sizes, new, strict=True))
        if sizes.count(-1) > (0 if may_be_empty else 1):
            continue
        shape = ir.Value(name=f"{node.outputs[0].name}_shape")
        shape.const_value = ir.tensor(sizes, dtype=ir.DataType.INT64, name=shape.name)
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)  # 0 means to copy the input's size


def _size(new: Any, old: Any) -> int:
    """Return a size for Reshape: a number, 0 for that of the input, -1 to infer it."""
    if isinstance(new, int):
        return new
    return 0 if old is not None and not isinstance(old, int) and str(new) == str(old) and new.value is not None else -1
