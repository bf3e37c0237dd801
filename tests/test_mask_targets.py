"""Mask targets made of the pixels around each object are those of torchvision's full-size planes."""

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import maskrcnn_loss, project_masks_on_boxes

from a2fpn.masks import InstanceMasks
from a2fpn.masks.targets import at_edge, mask_loss, mask_targets

ROUNDING = 1e-3  # stated by mask_targets for images of up to 4096 pixels


def blobs(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W) with ragged edges, some of them at the image's border, and the boxes around them."""
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    boxes = []
    for mask in masks:
        h, w = (int(torch.randint(1, n + 1, ())) for n in (height, width))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        part = mask[top : top + h, left : left + w]
        part.copy_(torch.rand(h, w) < 0.7)
        part[0, 0] = part[-1, -1] = 1
        boxes.append([left, top, left + w, top + h])
    return masks, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def proposals(boxes: Tensor, objects: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes near the objects', clipped to the image as proposals are, some of them the objects' own."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes[objects] + (torch.rand(len(objects), 4) - 0.5) * sides[objects] * (torch.rand(len(objects), 1) < 0.8)
    return torchvision.ops.clip_boxes_to_image(moved, size)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    count=st.integers(1, 4),
    boxes=st.integers(0, 9),
    cells=st.sampled_from([1, 7, 14, 28]),
)
@example(seed=0, size=(1, 1), count=1, boxes=1, cells=28)
def test_targets_are_torchvisions(seed: int, size: tuple[int, int], count: int, boxes: int, cells: int) -> None:
    torch.manual_seed(seed)
    masks, around = blobs(count, *size)
    objects = torch.randint(count, (boxes,))
    rois = proposals(around, objects, size)
    small = InstanceMasks.from_dense(masks)
    got = mask_targets(small, rois, objects, cells)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, project_masks_on_boxes(masks, rois, objects, cells), rtol=0, atol=1e-4)
    indexed = torch.cat([objects[:, None].float(), rois], 1)
    aligned = torchvision.ops.roi_align(masks[:, None].float(), indexed, cells, aligned=True)[:, 0]
    torch.testing.assert_close(mask_targets(small, rois, objects, cells, aligned=True), aligned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False])
def test_targets_are_torchvisions_far_from_the_corner_of_a_large_image(aligned: bool) -> None:
    torch.manual_seed(0)
    part, around = blobs(3, 300, 250)
    masks = torch.nn.functional.pad(part, (3800, 40, 3700, 0))
    objects = torch.arange(60) % 3
    rois = proposals(around + torch.tensor([3800.0, 3700, 3800, 3700]), objects, (4000, 4090))
    indexed = torch.cat([objects[:, None].float(), rois], 1)
    expected = torchvision.ops.roi_align(masks[:, None].float(), indexed, 28, aligned=aligned)[:, 0]
    got = mask_targets(InstanceMasks.from_dense(masks), rois, objects, 28, aligned=aligned)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    assert expected.std() > 0.1


def test_the_loss_is_torchvisions() -> None:
    torch.manual_seed(0)
    masks, boxes, objects, labels = [], [], [], []
    for count in (3, 1):
        planes, around = blobs(count, 70, 95)
        masks.append(planes)
        objects.append(torch.arange(2 * count) % count)
        boxes.append(proposals(around, objects[-1], (70, 95)))
        labels.append(torch.arange(count) % 3 + 1)
    logits = torch.randn(8, 4, 28, 28)
    small = [InstanceMasks.from_dense(planes) for planes in masks]
    own = [classes[index] for classes, index in zip(labels, objects, strict=True)]
    expected = maskrcnn_loss(logits, boxes, masks, labels, objects)
    torch.testing.assert_close(mask_loss(logits, small, boxes, objects, own), expected, rtol=1e-5, atol=0)
    assert mask_loss(logits, small, boxes, objects, own, binary=True) != expected


def test_the_loss_without_boxes_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(0, 4, 28, 28, requires_grad=True)
    none = InstanceMasks.from_dense(torch.zeros(0, 9, 9))
    loss = mask_loss(logits, [none], [torch.zeros(0, 4)], [torch.zeros(0).long()], [torch.zeros(0).long()])
    loss.backward()
    assert loss == 0


def test_aligned_targets_lie_where_the_features_lie() -> None:
    planes = torch.zeros(2, 16, 16, dtype=torch.uint8)
    planes[1, 4:12, 4:12] = 1
    masks = InstanceMasks.from_dense(planes)
    box, objects = torch.tensor([[2.0, 2, 14, 14]]), torch.tensor([1])
    assert torch.equal(mask_targets(masks, box, objects, 12, aligned=True)[0], planes[1, 2:14, 2:14].float())
    assert not torch.equal(mask_targets(masks, box, objects, 12)[0], planes[1, 2:14, 2:14].float())
    assert mask_targets(masks, box[:0], objects[:0], 12).shape == (0, 12, 12)


@pytest.mark.parametrize("aligned", [True, False])
def test_targets_of_objects_of_very_different_sizes_are_those_of_each_alone(aligned: bool) -> None:
    torch.manual_seed(0)
    size = (600, 500)
    planes = torch.zeros(6, *size, dtype=torch.uint8)
    places = [(0, 0, 3), (590, 490, 10), (1, 2, 400), (300, 470, 30), (5, 5, 1)]
    for plane, (top, left, side) in zip(planes[:5], places, strict=True):
        plane[top : top + side, left : left + side] = torch.rand(side, side) < 0.7
        plane[top, left] = 1
    masks = InstanceMasks.from_dense(planes)
    objects = torch.arange(60) % 5  # the sixth has no pixels and no box
    rois = proposals(masks.windows.float(), objects, size)
    got = mask_targets(masks, rois, objects, 28, aligned=aligned)
    indexed = torch.cat([objects[:, None].float(), rois], 1)
    expected = torchvision.ops.roi_align(planes[:, None].float(), indexed, 28, aligned=aligned)[:, 0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert expected.flatten(1).amax(1).unique().numel() > 1


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_boundary_weight_is_a_weighted_mean_over_cells(weight: float) -> None:
    torch.manual_seed(0)
    planes = torch.zeros(1, 20, 20, dtype=torch.uint8)
    planes[0, 5:15, 5:15] = 1
    box, zero, one = torch.tensor([[0.0, 0, 20, 20]]), torch.zeros(1).long(), torch.ones(1).long()
    logits = torch.randn(1, 2, 20, 20, requires_grad=True)
    masks = [InstanceMasks.from_dense(planes)]
    loss = mask_loss(logits, masks, [box], [zero], [one], aligned=True, boundary_weight=weight)
    cells = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 1], planes[0].float(), reduction="none")
    # The square's rim of one cell inside and one outside.
    rim = torch.zeros(20, 20, dtype=torch.bool)
    rim[4:16, 4:16], rim[6:14, 6:14] = True, False
    weights = torch.where(rim, weight, 1.0)
    torch.testing.assert_close(loss, (cells * weights).sum() / weights.sum())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[0, 1] != 0).all()
    assert not gradient[0, 0].any()


def test_at_edge_of_masks_without_an_edge_is_empty_and_of_a_checkerboard_everything() -> None:
    assert not at_edge(torch.zeros(2, 5, 5)).any()
    assert not at_edge(torch.ones(2, 5, 5)).any()
    assert at_edge((torch.arange(25).view(1, 5, 5) % 2).float()).all()
    assert at_edge(torch.zeros(0, 5, 5)).shape == (0, 5, 5)
