"""The Triton kernels of NMS: on a CUDA device where there is one, and on the CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from tests.test_reassemble_triton import DEVICE, INTERPRETED, marked, on_device, only_cuda


def kept_of(boxes: Tensor, threshold: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    from a2fpn.heads.nms_triton import nms_of_groups

    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    return nms_of_groups(boxes, threshold).cpu()


def expected(boxes: Tensor, threshold: float) -> Tensor:
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    order = torch.arange(boxes.shape[1], 0, -1).float()
    for group, of_group in zip(kept, boxes.cpu(), strict=True):
        group[nms(of_group, order, threshold)] = True
    return kept


def crowded(groups: int, n: int) -> Tensor:
    corner, size = torch.rand(groups, n, 2) * 40, torch.rand(groups, n, 2) * 25
    return torch.cat([corner, corner + size], 2)


# In the interpreter a case takes seconds: every number of boxes at one threshold, every threshold at some.
COUNTS = [1, 2, 31, 32, 33, 64, 65, 130]
CASES = [(n, x) for x in (0.0, 0.3, 0.7, 1.0) for n in COUNTS if not INTERPRETED or x == 0.7 or n in (1, 33)]


@marked(on_device)
@pytest.mark.parametrize(("n", "threshold"), CASES)
def test_keeps_what_torchvision_keeps(n: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = crowded(3, n)
    assert torch.equal(kept_of(boxes.to(DEVICE), threshold, monkeypatch), expected(boxes, threshold))


@marked(on_device)
def test_an_overlap_of_exactly_the_threshold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 4.0, 3.0]]])
    assert float(box_iou(boxes[0, :1], boxes[0, 1:2])) == 0.5
    assert kept_of(boxes.to(DEVICE), 0.5, monkeypatch).tolist() == [[True, True, False]]


@marked(on_device)
def test_empty_boxes_suppress_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]]])
    assert kept_of(boxes.to(DEVICE), 0.5, monkeypatch).tolist() == [[True, True, True, False]]


@marked(on_device)
def test_a_suppressed_box_suppresses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 1.0], [3.0, 0.0, 13.0, 1.0], [6.0, 0.0, 16.0, 1.0]]])
    assert kept_of(boxes.to(DEVICE), 0.4, monkeypatch).tolist() == [[True, False, True]]


@marked(only_cuda)
def test_groups_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = crowded(20, 2000) * torch.tensor([20.0, 20.0, 20.0, 20.0])
    assert torch.equal(kept_of(boxes.to(DEVICE), 0.7, monkeypatch), expected(boxes, 0.7))
