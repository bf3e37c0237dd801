"""Simplification of traced programs: fewer operators, equal results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from a2fpn.export.simplify import drop_in_place, drop_noops


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def trace(function: Callable[[Tensor], Tensor]) -> ExportedProgram:
    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return torch.export.export(Function(function), (_input(),), dynamic_shapes=shapes, strict=False)


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def _input() -> Tensor:
    return torch.arange(-6, 6.0).reshape(3, 4)


def _seen_twice(x: Tensor) -> Tensor:
    y = x * 2
    first = y + 1
    return y.relu_() + first + y


def _seen_through_its_base(x: Tensor) -> Tensor:
    y = x * 2
    y.flatten().relu_()
    return y


def _of_another_dtype(x: Tensor) -> Tensor:
    return (x * 2).add_(x.double() * 1e-9)


def _in_a_row(x: Tensor) -> Tensor:
    return nn.functional.hardtanh_((x * 2).add_(x), 0, 6)


@pytest.mark.parametrize(
    ("function", "in_place"),
    [
        (lambda x: (x * 2).relu_(), []),
        (lambda x: nn.functional.silu(x * 2, inplace=True), []),
        (_in_a_row, []),
        (lambda x: nn.functional.hardtanh_(x * 2), []),
        (lambda x: (x * 0).bernoulli_(0.0), ["aten.bernoulli_.float"]),  # has no such form
        (_seen_twice, ["aten.relu_.default"]),
        (_seen_through_its_base, ["aten.relu_.default"]),
        (_of_another_dtype, ["aten.add_.Tensor"]),
    ],
)
def test_only_tensors_that_nothing_else_reads_are_no_longer_changed_in_place(
    function: Callable[[Tensor], Tensor], in_place: list[str]
) -> None:
    program, expected = trace(function), function(_input())
    drop_in_place(program)
    assert [name for name in operators(program) if "_." in name] == in_place
    found = program.module()(_input())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_conversions_and_slices_that_change_nothing_are_removed() -> None:
    def function(x: Tensor) -> Tensor:
        return x.to(torch.float32)[:, :].to(torch.float64)[1:, :-1]

    program = trace(function)
    assert operators(program).count("aten.slice.Tensor") == 4
    drop_noops(program)
    names = operators(program)
    assert names.count("aten.slice.Tensor") == 2
    assert names.count("aten.to.dtype") == 1
    assert not any("assert" in name for name in names)
    assert torch.equal(program.module()(_input()), function(_input()))


def test_a_program_works_on_sizes_that_its_tracer_excluded() -> None:
    def function(x: Tensor) -> Tensor:
        rows = x.sum(1).nonzero()[:, 0]
        torch._check(rows.numel() >= 2)
        return x[rows]

    program = trace(function)
    small = torch.ones(1, 4)
    with pytest.raises(RuntimeError):
        program.module(check_guards=False)(small)
    drop_noops(program)
    assert torch.equal(program.module(check_guards=False)(small), small)
