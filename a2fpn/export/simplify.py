"""Simplification of a traced program, in place, without a change of its results.

Each operator costs the converter to ONNX milliseconds: it runs the program several times with symbolic sizes.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Node

_TO_END = 2**63 - 1
"""End of a slice without an end."""


def drop_noops(program: torch.export.ExportedProgram) -> None:
    """Remove assertions, and conversions and slices that change nothing.

    Assertions about sizes are assumptions of the tracer: smaller images work as well.
    """
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target in (aten._assert_scalar.default, aten._assert_tensor_metadata.default):
            program.graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    _finish(program)


def drop_in_place(program: torch.export.ExportedProgram) -> None:
    """Replace operators in place by those that return a new tensor, which the converter handles several times as fast.

    Only what changes a tensor that nothing else reads is replaced.
    """
    for node in program.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable and _is_own(node):
            name, _, overload = str(node.target).removeprefix("aten.").partition("_.")
            if name == "hardtanh" and len(node.args) == 3:
                name = "clamp"  # by which torch defines ReLU6, more slowly
            node.target = getattr(getattr(torch.ops.aten, name, None), overload, node.target)
    _finish(program)


def _is_identity(node: Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.to.dtype and len(node.args) == 2:
        return bool(node.args[0].meta["val"].dtype == node.args[1])  # type: ignore[union-attr]
    return node.target is aten.slice.Tensor and node.args[2:] == (0, _TO_END)


def _is_own(node: Node) -> bool:
    """Return if a node changes another operator's result, neither a view nor read elsewhere, by values of its dtype."""
    source = node.args[0]
    if not isinstance(source, Node) or len(source.users) > 1 or not isinstance(source.target, OpOverload):
        return False
    values = [x.meta["val"] for x in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return len(dtypes) == 1 and all(value.alias_info is None for value in source.target._schema.returns)


def _finish(program: torch.export.ExportedProgram) -> None:
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
