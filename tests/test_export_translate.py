"""Operators that are written in ONNX in our own way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from a2fpn.export.trace import quiet
from a2fpn.export.translate import translations
from tests.helpers import torch_from

pytestmark = torch_from(2, 11, "the oldest whose exporter has been tried")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_bicubic_resizing(tmp_path: Path) -> None:
    """It is written as sums of four rows: larger, smaller, and of single pixels."""

    class Resize(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = (x.shape[-2] * 3, x.shape[-1] // 2 + 1)
            return torch.nn.functional.interpolate(x, size=size, mode="bicubic", align_corners=False)

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Resize(), (torch.rand(1, 2, 40, 50),), dynamic_shapes={"x": {2: dynamic, 3: dynamic}}, strict=False
    )
    with quiet():
        converted: Any = torch.onnx.export(
            program, dynamo=True, opset_version=18, verbose=False, custom_translation_table=translations()
        )
    converted.save(tmp_path / "resize.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "resize.onnx", providers=["CPUExecutionProvider"])
    assert "Resize" not in {node.op_type for node in onnx.load(tmp_path / "resize.onnx").graph.node}
    for size in ((40, 50), (7, 1), (1, 1), (31, 97)):
        x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, Resize()(x).numpy(), atol=1e-5)
