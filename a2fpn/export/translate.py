"""ONNX operators in the place of longer translations by torch's exporter, and shapes that need no computing.

The exporter writes shapes as sums and products of sizes, and attention and indexing in their most general forms: two
nodes of three would be about nothing but that.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

_UNKNOWN = re.compile(r"\bu\d")
"""Sizes that values decide, by the names that torch gives them."""
_CUBIC = [[-0.75, 1.25, -1.25, 0.75], [1.5, -2.25, 1.5, -0.75], [-0.75, 0.0, 0.75, 0.0]]
"""Weights of the four pixels around a place, by the third, second and first power of how far it is from the second."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Functions that write an operator of torch in ONNX, for ``torch.onnx.export(custom_translation_table=)``."""
    from onnxscript import ir, opset18
    from onnxscript.function_libs.torch_lib.ops import core, nn

    op: Any = opset18

    def at_most(a: Any, b: Any) -> Any:
        # torch's limits for sums of sizes that it doesn't know pass the largest integer there is.
        return op.LessOrEqual(a, min(b, 2**63 - 1) if isinstance(b, int) else b)

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
        # Of indices and sizes, which are not negative.
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
        # ONNX Runtime takes over ten times as long for a Resize of this kind.
        for wanted in size:  # of the rows; then the map is turned, so that columns are
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
        operator.le: at_most,
        aten.index.Tensor: index,
        aten.scaled_dot_product_attention.default: attention,
    }


def fold_shapes(model: Any) -> None:
    """Give reshapes of a model constant shapes where one size at most is not known or copied.

    Args:
        model: An ``onnxscript.ir.Model``; changed.
    """
    from onnxscript import ir
    from onnxscript.ir.passes import common

    for node in list(model.graph.all_nodes()):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        old, new = node.inputs[0].shape, node.outputs[0].shape
        if old is None or new is None:
            continue
        sizes = [_size(side, old[i] if i < len(old) else None) for i, side in enumerate(new)]
        # Beside the number of objects, which may be none, nothing can be inferred.
        may_be_empty = any(size == 0 and _UNKNOWN.search(str(side)) for size, side in zip(sizes, new, strict=True))
        if sizes.count(-1) > (0 if may_be_empty else 1):
            continue
        shape = ir.Value(name=f"{node.outputs[0].name}_shape")
        shape.const_value = ir.tensor(sizes, dtype=ir.DataType.INT64, name=shape.name)
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)  # 0 is to mean "as it is"
    for clean in (common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass()):
        clean(model)


def _size(new: Any, old: Any) -> int:
    """A size as Reshape takes it: a number, 0 for that of the input, -1 for the rest."""
    if isinstance(new, int):
        return new
    return 0 if old is not None and not isinstance(old, int) and str(new) == str(old) and new.value is not None else -1
