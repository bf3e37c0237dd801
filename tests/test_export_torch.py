"""Whole detectors as programs of torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor

import a2fpn
from a2fpn.export import verify
from a2fpn.inference.exported import ExportedDetector
from tests.exports import detector, noise
from tests.helpers import torch_from

pytestmark = torch_from(2, 11, "the oldest whose exporter has been tried")


@pytest.mark.parametrize("size", [(64, 96), pytest.param(None, marks=pytest.mark.slow)], ids=["fixed", "free"])
def test_a_program_of_torch(tmp_path: Path, size: tuple[int, int] | None) -> None:
    model = detector("fasterrcnn_fpn", score_threshold=0.05)
    file = a2fpn.export_model(model, tmp_path / "model.pt2", dtype="float32", size=size)
    images = [(str(each), noise(each)) for each in ([size] if size else [(64, 96), (1, 1)])]
    results = list(verify(model, ExportedDetector(file), images))
    assert [result for result in results if not result.equal] == []
    assert sum(result.found for result in results) > 0
    code = "import sys, torch, torchvision; print(*torch.export.load(sys.argv[1]).module()(torch.rand(1, 3, 64, 96)))"
    text = subprocess.run([sys.executable, "-c", code, file], check=True, capture_output=True, text=True).stdout
    assert text.split() == ["image_index", "boxes", "scores", "labels"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_fpn", "fcos_fpn"])
def test_a_program_is_compiled_ahead_of_time(tmp_path: Path, name: str) -> None:
    model = detector(name, score_threshold=0.05)
    file = a2fpn.export_model(model, tmp_path / "model.pt2", size=(64, 96))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(file), package_path=str(tmp_path / "ahead.pt2"), inductor_configs={"scalar_asserts": False}
    )
    results = list(verify(model, Compiled(package), [("noise", noise((64, 96)))]))
    assert [result for result in results if not result.equal] == []
    assert sum(result.found for result in results) > 0


class Compiled:
    def __init__(self, package: str) -> None:
        self.run = torch._inductor.aoti_load_package(package)
