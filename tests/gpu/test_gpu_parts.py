"""Pooling, reassembly, matching, NMS, pasting and run lengths on the device."""

import pytest
import torch
import torchvision
from torch import Tensor

from a2fpn.data import encode_box_masks
from a2fpn.heads import StrideRoIAlign, soft_nms, suppress
from a2fpn.heads.matching import BoxPairs, ChunkedMatcher, match_locations
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.heads.roi_pool import _gather_roi_align, roi_align
from a2fpn.layers.reassemble import reassemble
from a2fpn.masks import InstanceMasks
from a2fpn.masks.paste import PASTE_RULES, paste_masks
from a2fpn.masks.targets import mask_targets
from tests.gpu.gpu_cases import error

pytestmark = pytest.mark.gpu


def random_boxes(number: int, size: tuple[float, float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    corner = torch.rand(number, 2, generator=generator) * limit * 0.8
    side = torch.rand(number, 2, generator=generator) * limit * 0.5 + 1
    return torch.cat([corner, torch.minimum(corner + side, limit)], 1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_torchvisions_and_that_of_float64(ratio: int, aligned: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 40, 50, generator=generator)
    rois = torch.cat([torch.arange(30.0)[:, None] % 2, random_boxes(30, (160, 200))], 1)
    options = {"output_size": 7, "stride": 4, "sampling_ratio": ratio, "aligned": aligned}
    reference = x.double().requires_grad_()
    expected = torchvision.ops.roi_align(reference, rois.double(), 7, 0.25, ratio, aligned)
    grad = torch.randn(expected.shape, generator=generator)
    (expected_grad,) = torch.autograd.grad(expected, reference, grad.double())
    ours = x.to(device).to(memory_format=torch.channels_last).requires_grad_()
    pooled = roi_align(ours, rois.to(device), **options)
    (own_grad,) = torch.autograd.grad(pooled, ours, grad.to(device))
    assert error([pooled, own_grad], [expected, expected_grad]) < 1e-5
    kernel = torchvision.ops.roi_align(x.to(device), rois.to(device), 7, 0.25, ratio, aligned)
    assert error([pooled], [kernel]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weighted_gather_runs_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 16, 20, 25).to(device, dtype).requires_grad_()
    rois = torch.cat([torch.arange(9.0)[:, None] % 2, random_boxes(9, (80, 100))], 1).to(device)
    pooled = _gather_roi_align(x, rois, 7, 0.25, (2, 2), True)
    expected = torchvision.ops.roi_align(x.detach().double(), rois.double(), 7, 0.25, 2, True)
    assert error([pooled], [expected]) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    pooled.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_pooling_over_levels_keeps_the_order_of_the_boxes(device: torch.device) -> None:
    torch.manual_seed(0)
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    features = {name: torch.randn(2, 8, 512 // stride, 640 // stride) for name, stride in strides.items()}
    boxes = [random_boxes(40, (512, 640)), random_boxes(0, (512, 640)).reshape(-1, 4)]
    pool = StrideRoIAlign(strides, 7)
    expected = pool({name: x.double() for name, x in features.items()}, [b.double() for b in boxes])
    on_device = {name: x.to(device).to(memory_format=torch.channels_last) for name, x in features.items()}
    assert error([pool(on_device, [b.to(device) for b in boxes])], [expected]) < 1e-5


@pytest.mark.parametrize("size", [(12, 14), (24, 28), (23, 31), (9, 40)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reassembly_is_that_of_float64(dtype: torch.dtype, k: int, size: tuple[int, int], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 12, 14, generator=generator).to(dtype)
    kernels = torch.randn(2, k * k, *size, generator=generator).softmax(1).to(dtype)
    grad = torch.randn(2, 16, *size, generator=generator).to(dtype)
    results = []
    for place, kind in (("cpu", torch.float64), (device, dtype)):
        a, b = (t.to(place, kind).requires_grad_() for t in (x, kernels))
        out = reassemble(a, b, size)
        results.append([out, *torch.autograd.grad(out, (a, b), grad.to(place, kind))])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, expected in zip(results[1], results[0], strict=True):
        assert got.dtype == dtype
        assert error([got], [expected]) < tolerance


@pytest.mark.parametrize("objects", [0, 1, 30])
@pytest.mark.parametrize("low_quality", [False, True])
def test_matches_are_those_of_the_cpu(objects: int, low_quality: bool, device: torch.device) -> None:
    # Whole numbers: no device rounds an IoU differently from the other.
    pairs = BoxPairs(random_boxes(objects, (400, 500)).round(), random_boxes(3000, (400, 500), seed=1).round())
    matcher = ChunkedMatcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    assert torch.equal(matcher(BoxPairs(*(x.to(device) for x in pairs))).cpu(), matcher(pairs))
    anchors = torch.stack([torch.arange(200) * 8.0] * 4, 1) + torch.tensor([-4.0, -4, 4, 4])
    expected = match_locations(pairs.objects, anchors, per_level=[150, 50], radius=1.5)
    got = match_locations(pairs.objects.to(device), anchors.to(device), per_level=[150, 50], radius=1.5)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("kind", [None, "linear", "gaussian"])
def test_suppression_is_that_of_the_cpu(kind: str | None, device: torch.device) -> None:
    boxes = random_boxes(400, (100, 120))
    scores = torch.randperm(400, generator=torch.Generator().manual_seed(0)).add(1) / 401
    labels = torch.arange(400) % 3
    rule = PostprocessConfig(0.05, 0.5, 60, kind)
    expected = suppress(boxes, scores, labels, rule)
    rows, best = suppress(boxes.to(device), scores.to(device), labels.to(device), rule)
    assert rows.device.type == best.device.type == device.type
    assert torch.equal(rows.cpu(), expected[0])
    torch.testing.assert_close(best.cpu(), expected[1])
    if kind:
        taken, _ = soft_nms(boxes.to(device), scores.to(device), labels.to(device), kind=kind)
        assert taken.device.type == device.type


@pytest.mark.parametrize("number", [0, 1, 40])
@pytest.mark.parametrize("rule", PASTE_RULES)
def test_pasted_masks_are_those_of_the_cpu(rule: str, number: int, device: torch.device) -> None:
    masks = torch.rand(number, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    size = (70, 90)
    boxes = random_boxes(number, size)
    boxes[::3] += 30  # partly, or wholly, outside
    boxes[1::5] -= 25
    expected = paste_masks(masks, boxes, size, rule=rule)
    pasted = paste_masks(masks.to(device), boxes.to(device), size, rule=rule)
    assert pasted.shape == (number, 1, *size)
    torch.testing.assert_close(pasted.cpu(), expected, rtol=0, atol=1e-4)
    assert encode_box_masks(masks.to(device), boxes.to(device), size, rule=rule) == encode_box_masks(
        masks, boxes, size, rule=rule
    )


@pytest.mark.parametrize("aligned", [False, True])
def test_mask_targets_are_those_of_the_cpu(aligned: bool, device: torch.device) -> None:
    size = (90, 120)
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    planes = [((rows - y) ** 2 + (columns - x) ** 2 < r**2) for x, y, r in [(20, 30, 15), (0, 0, 30), (110, 80, 25)]]
    masks = InstanceMasks.from_dense(torch.stack([*planes, torch.zeros(size, dtype=torch.bool)]))
    boxes, objects = random_boxes(50, size), torch.arange(50) % 4
    boxes[0] = torch.tensor([0.0, 0, 120, 90])
    expected = mask_targets(masks, boxes, objects, 28, aligned=aligned)
    got = mask_targets(masks.to(device), boxes.to(device), objects.to(device), 28, aligned=aligned)
    assert got.device.type == device.type
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-3)
    none = mask_targets(masks.to(device), boxes[:0].to(device), objects[:0].to(device), 28)
    assert none.shape == (0, 28, 28)
