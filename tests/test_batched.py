"""Batches in one table, and what tracers record: the same as image by image and as the ways that eager takes."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

from a2fpn.backbones.same_padding import SamePaddedConv, pad_in_whole_numbers
from a2fpn.config import PreprocessConfig
from a2fpn.heads import StrideAnchors
from a2fpn.heads.batched import clip, first_of_each, nms_of_each, split_images
from a2fpn.layers.reassemble import _reassemble_by_tiles, reassemble
from a2fpn.layers.resample import average
from a2fpn.preprocess import Preprocess


def crowd(number: int, side: float = 60.0) -> Tensor:
    corner = torch.rand(number, 2) * side
    return torch.cat([corner, corner + 1 + torch.rand(number, 2) * side / 2], 1)


@pytest.mark.parametrize("sizes", [[(40, 50)], [(40, 50), (30, 60), (50, 20)], [(40, 50)] * 3])
def test_boxes_are_clipped_to_their_images(sizes: list[tuple[int, int]]) -> None:
    boxes, images = crowd(50) - 10, torch.arange(50) % 3
    expected = [clip_boxes_to_image(boxes[i], sizes[int(image) % len(sizes)]) for i, image in enumerate(images)]
    assert torch.equal(clip(boxes, images, sizes), torch.stack(expected))
    assert clip(boxes[:0], images[:0], sizes).shape == (0, 4)


@pytest.mark.parametrize("classes", [1, 9, 10, 80])
@pytest.mark.parametrize("number", [0, 1, 400])
def test_nms_on_a_grid_is_nms_of_each_class_and_image(
    classes: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, scores = clip(crowd(number), torch.zeros(number, dtype=torch.int64), [(60, 60)]), torch.rand(number)
    labels, images = torch.randint(classes, (number,)), torch.randint(3, (number,))
    expected = batched_nms(boxes, scores, images * classes + labels, 0.4)
    grids: list[int] = []
    monkeypatch.setattr("a2fpn.heads.batched.nms", lambda boxes, *rest: grids.append(len(boxes)) or nms(boxes, *rest))
    for ahead, together in ((False, 400), (True, 400), (True, 399)):
        monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _, ahead=ahead: ahead)
        monkeypatch.setattr("a2fpn.heads.batched._TOGETHER", together)
        kept = nms_of_each(boxes, scores, labels, images, 0.4, classes=classes, size=(60, 60))
        assert torch.equal(kept, expected)
    assert grids == ([number] if number == 400 else [number, number])


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_the_first_of_each_image(limit: int) -> None:
    images = torch.randint(3, (60,))
    images[images == 1] = 3  # an image without objects
    expected = [rows[:limit] for image in range(4) if len(rows := torch.where(images == image)[0]) or image]
    assert torch.equal(first_of_each(images, 4, limit), torch.cat(expected))
    assert len(first_of_each(images[:0], 4, limit)) == 0


def test_a_table_is_split_into_images() -> None:
    parts = split_images({"images": torch.tensor([0, 2, 2]), "scores": torch.tensor([0.5, 0.4, 0.3])}, 4)
    assert [part["scores"].tolist() for part in parts] == [[0.5], [], pytest.approx([0.4, 0.3]), []]
    assert list(parts[0]) == ["scores"]


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (2, 17)])
def test_reassembly_by_tiles(size: tuple[int, int], k: int, padding: str) -> None:
    double = (2 * size[0], 2 * size[1])
    for old, new, way in ((size, double, (2, 1)), (double, size, (1, 2))):
        x, kernels = torch.randn(2, 6, *old), torch.rand(2, k * k, *new)
        if padding == "zeros":
            kernels[:, :k] = 0
        torch.testing.assert_close(_reassemble_by_tiles(x, kernels, k, *way), reassemble(x, kernels, new))


def test_an_average_over_a_coarser_level_is_adaptive_pooling() -> None:
    x = torch.randn(2, 3, 10, 14)
    for size in ((5, 7), (5, 5), (3, 7), (10, 14)):
        torch.testing.assert_close(average(x, size), F.adaptive_avg_pool2d(x, size))


@pytest.mark.parametrize("size", [(32, 32), (33, 31), (1, 1), (7, 64)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1), (4, 3, 1)])
def test_same_padding_in_whole_numbers(size: tuple[int, int], kernel: int, stride: int, dilation: int) -> None:
    conv = Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    x = torch.randn(1, 2, *size)
    expected = conv(x)
    pad_in_whole_numbers(nn.Sequential(conv))
    assert type(conv) is SamePaddedConv
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_picked_anchors_are_those_of_all(legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = StrideAnchors([(8, 11), (16, 23)], (0.5, 1.0, 2.0), (4, 8), legacy=legacy)
    image, maps = ImageList(torch.zeros(1, 3, 37, 50), [(37, 50)]), [torch.zeros(1, 1, 9, 12), torch.zeros(1, 1, 4, 6)]
    counts = [x.shape[2] * x.shape[3] * 6 for x in maps]
    (every,) = anchors(image, maps)
    for ahead in (False, True):
        monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _, ahead=ahead: ahead)
        pick = anchors.picker(image, maps)
        for level, (count, own) in enumerate(zip(counts, every.split(counts), strict=True)):
            rows = torch.randperm(count).view(2, -1)
            assert torch.equal(pick(level, rows), own[rows])


@pytest.mark.parametrize("resize", ["shortest_edge", "at_least", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 70), (1, 1), (200, 3), (64, 64)])
def test_a_stack_is_prepared_as_images_are(resize: str, interpolation: str, size: tuple[int, int]) -> None:
    config = PreprocessConfig(resize=resize, interpolation=interpolation, min_size=48, max_size=100)
    preprocess = Preprocess(config, divisor=32)
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    expected, stack = preprocess(list(images)), preprocess.stack(images)
    torch.testing.assert_close(stack.tensor, expected.tensor)
    assert stack.sizes * 2 == expected.sizes
    assert stack.original_sizes * 2 == expected.original_sizes
