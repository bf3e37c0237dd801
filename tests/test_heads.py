import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from a2fpn.heads import StrideAnchors, StrideRoIAlign, roi_align
from a2fpn.pyramid import Features, level_size

STRIDES = (4, 8, 16, 32, 64)
SIZES = tuple((8 * stride,) for stride in STRIDES)
RATIOS = (0.5, 1.0, 2.0)


def maps(size: tuple[int, int], *, strides: tuple[int, ...] = STRIDES, batch: int = 1, channels: int = 3) -> Features:
    return {
        f"p{stride.bit_length() - 1}": torch.randn(batch, channels, *level_size(size, stride)) for stride in strides
    }


def images(size: tuple[int, int], *, batch: int = 1) -> ImageList:
    return ImageList(torch.zeros(batch, 3, *size), [size] * batch)


# Anchors


@pytest.mark.parametrize("sizes", [SIZES, tuple((6 * s, 9 * s) for s in STRIDES)])
def test_anchors_are_those_of_torchvision_where_it_is_right(sizes: tuple[tuple[int, ...], ...]) -> None:
    size = (128, 192)
    features = list(maps(size).values())
    expected = AnchorGenerator(sizes, (RATIOS,) * 5)(images(size, batch=2), features)
    got = StrideAnchors(sizes, RATIOS, STRIDES)(images(size, batch=2), features)
    assert len(got) == 2
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(200, 333), (33, 47), (1, 1)])
def test_centers_lie_on_the_declared_strides_at_any_size(size: tuple[int, int]) -> None:
    features = maps(size)
    (anchors,) = StrideAnchors(SIZES, RATIOS, STRIDES)(images(size), list(features.values()))
    centers = [
        (column * stride, row * stride)
        for stride, x in zip(STRIDES, features.values(), strict=True)
        for row in range(x.shape[-2])
        for column in range(x.shape[-1])
        for _ in RATIOS
    ]
    torch.testing.assert_close((anchors[:, :2] + anchors[:, 2:]) / 2, torch.tensor(centers, dtype=torch.float32))


def test_anchors_have_their_sizes_and_ratios() -> None:
    generator = StrideAnchors([(32, 64)], RATIOS, (8,))
    (anchors,) = generator(images((8, 8)), [torch.zeros(1, 1, 1, 1)])
    assert generator.num_anchors_per_location() == [6]
    sides = anchors[:, 2:] - anchors[:, :2]
    # torchvision rounds corners to whole pixels.
    expected = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in RATIOS for size in (32, 64)]
    torch.testing.assert_close(sides, torch.tensor(expected), rtol=0, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchors_are_float32_whatever_the_maps_are(dtype: torch.dtype) -> None:
    generator = StrideAnchors(SIZES, RATIOS, STRIDES)
    features = list(maps((200, 333)).values())
    (expected,) = generator(images((200, 333)), features)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = generator(images((200, 333)), [x.to(dtype) for x in features])
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_one_tuple_of_sizes_per_level() -> None:
    with pytest.raises(
        ValueError,
        match=r"one tuple per pyramid level: 5 levels of strides \[4, 8, 16, 32, 64\], got 4 tuples \[\(32,\)",
    ):
        StrideAnchors(SIZES[:4], RATIOS, STRIDES)


def test_the_same_number_of_sizes_on_every_level() -> None:
    with pytest.raises(ValueError, match=r"same number of anchor sizes, got \[\(8,\), \(16, 20\)\]"):
        StrideAnchors([(8,), (16, 20)], RATIOS, (4, 8))


# RoIAlign of one level


def random_rois(number: int, size: tuple[int, int], *, batch: int = 2) -> Tensor:
    """Boxes of all sizes, many of them partly or wholly outside the image."""
    height, width = size
    center = (torch.rand(number, 2) * 1.6 - 0.3) * torch.tensor([width, height])
    extent = torch.rand(number, 2) ** 3 * torch.tensor([width, height])
    index = torch.randint(batch, (number, 1)).float()
    return torch.cat([index, center - extent / 2, center + extent / 2], 1)


SPECIAL_ROIS = torch.tensor(
    [
        [0, 0.0, 0.0, 52.0, 36.0],  # the whole image
        [1, 3.3, 4.4, 3.3, 4.4],  # a point
        [0, 10.0, 10.0, 10.01, 10.01],  # smaller than a pixel
        [1, 0.0, 5.0, 52.0, 5.5],  # a line
        [0, -500.0, -500.0, 500.0, 500.0],  # far larger than the image
        [1, 100.0, 100.0, 120.0, 120.0],  # outside
        [0, -4.0, -4.0, 0.0, 0.0],  # touches the corner
        [1, 48.0, 32.0, 56.0, 40.0],  # hangs over the other corner
    ]
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("output_size", "ratio"), [(7, 2), (1, 1), (14, 1), (3, 3), (7, 0), (1, 0), (2, 0)])
def test_roi_align_is_that_of_torchvision(output_size: int, ratio: int, aligned: bool) -> None:
    x = torch.randn(2, 3, 9, 13)
    rois = torch.cat([random_rois(60, (36, 52)), SPECIAL_ROIS])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got = roi_align(inputs[0], rois, output_size=output_size, stride=4, sampling_ratio=ratio, aligned=aligned)
    expected = torchvision.ops.roi_align(inputs[1], rois, output_size, 0.25, ratio, aligned)
    assert got.shape == (68, 3, output_size, output_size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    direction = torch.randn_like(got)
    gradients = [
        torch.autograd.grad(pooled, leaf, direction)[0] for pooled, leaf in zip((got, expected), inputs, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("most", [0, 1, 4, 10**6])
def test_a_sample_per_pixel_is_the_same_by_either_kernel(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2fpn.heads.roi_pool._MOST_SAMPLES", most)
    x, rois = torch.randn(2, 3, 40, 30), random_rois(80, (160, 120))
    got = roi_align(x, rois, output_size=3, stride=4, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(got, torchvision.ops.roi_align(x, rois, 3, 0.25, 0, True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1)])
def test_roi_align_on_maps_of_a_pixel_or_two(size: tuple[int, int]) -> None:
    x, rois = torch.randn(2, 3, *size), torch.cat([random_rois(40, (32, 32)), SPECIAL_ROIS])
    got = roi_align(x, rois, output_size=2, stride=32, sampling_ratio=2, aligned=False)
    torch.testing.assert_close(got, torchvision.ops.roi_align(x, rois, 2, 1 / 32, 2, False), rtol=0, atol=1e-5)


def test_roi_align_does_not_care_for_memory_format_or_rows() -> None:
    x, rois = torch.randn(2, 3, 9, 13), random_rois(10, (36, 52))
    options = {"output_size": 3, "stride": 4, "sampling_ratio": 2, "aligned": False}
    pooled = roi_align(x, rois, **options)
    torch.testing.assert_close(roi_align(x.contiguous(memory_format=torch.channels_last), rois, **options), pooled)
    assert torch.equal(roi_align(x, rois.flip(0), **options), pooled.flip(0))


def test_roi_align_of_bfloat16_maps_keeps_coordinates_in_float32() -> None:
    x, rois = torch.randn(2, 3, 90, 130), random_rois(20, (360, 520))
    options = {"output_size": 3, "stride": 4, "sampling_ratio": 2, "aligned": False}
    got = roi_align(x.bfloat16(), rois, **options)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), roi_align(x, rois, **options), rtol=0, atol=0.05)


# RoIAlign over a pyramid

POOLED = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def random_boxes(number: int, size: tuple[int, int]) -> Tensor:
    """Boxes inside the image, as likely small as large."""
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    extent = limit ** torch.rand(number, 2)
    corner = torch.rand(number, 2) * (limit - extent)
    return torch.cat([corner, corner + extent], 1)


def by_hand(features: Features, boxes: list[Tensor], output_size: int, aligned: bool) -> Tensor:
    """Box by box: the level by Eq. 1 of the FPN paper, torchvision's kernel with that level's own stride."""
    pooled = []
    for image, box in ((i, box) for i, rows in enumerate(boxes) for box in rows):
        x0, y0, x1, y1 = box.tolist()
        level = min(max(math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224)), 2), 5)
        roi = torch.cat([torch.tensor([float(image)]), box])[None]
        pooled.append(torchvision.ops.roi_align(features[f"p{level}"], roi, output_size, 0.5**level, 2, aligned))
    return torch.cat(pooled)


def test_pooling_is_that_of_torchvision_where_it_is_right() -> None:
    size = (512, 768)
    features, boxes = maps(size, batch=2), [random_boxes(40, size), random_boxes(30, size)]
    expected = MultiScaleRoIAlign(list(POOLED), 7, 2)(features, boxes, [size, size])
    got = StrideRoIAlign(POOLED, 7)(features, boxes, [size, size])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("image", "canvas"), [((683, 1024), (1024, 1024)), *(((height, 64), (64, 64)) for height in (33, 37, 45))]
)
def test_pooling_is_right_on_a_canvas_much_larger_than_the_image(
    image: tuple[int, int], canvas: tuple[int, int], aligned: bool
) -> None:
    # torchvision guesses each scale from the first image and is wrong by a factor of two here.
    features, boxes = maps(canvas, channels=2), [random_boxes(25, image)]
    got = StrideRoIAlign(POOLED, 3, aligned=aligned)(features, boxes, [image])
    torch.testing.assert_close(got, by_hand(features, boxes, 3, aligned), rtol=0, atol=1e-4)


def test_pooling_remembers_no_scale_from_an_earlier_batch() -> None:
    pool = StrideRoIAlign(POOLED, 3)
    pool(maps((64, 64)), [random_boxes(5, (40, 64))], [(40, 64)])
    features, boxes = maps((200, 333)), [random_boxes(20, (200, 333))]
    torch.testing.assert_close(pool(features, boxes), by_hand(features, boxes, 3, False), rtol=0, atol=1e-4)


def test_levels_that_are_not_pooled_are_ignored() -> None:
    features, boxes = maps((128, 192)), [random_boxes(20, (128, 192))]
    without = {name: x for name, x in features.items() if name in POOLED}
    assert torch.equal(StrideRoIAlign(POOLED, 3)(features, boxes), StrideRoIAlign(POOLED, 3)(without, boxes))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("counts", [(), (0,), (0, 0), (0, 5), (5, 0)])
def test_images_without_boxes(counts: tuple[int, ...], ratio: int) -> None:
    features = {name: x.requires_grad_() for name, x in maps((64, 96), batch=2).items()}
    boxes = [random_boxes(number, (64, 96)) for number in counts]
    pooled = StrideRoIAlign(POOLED, 3, sampling_ratio=ratio)(features, boxes)
    assert pooled.shape == (sum(counts), 3, 3, 3)
    if counts:
        theirs = MultiScaleRoIAlign(list(POOLED), 3, ratio)(features, boxes, [(64, 96)] * len(counts))
        torch.testing.assert_close(pooled, theirs)
    pooled.sum().backward()
    assert all(features[name].grad is not None for name in POOLED)


positive = st.floats(1, 4000, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20))
def test_levels_are_assigned_by_the_rule_of_the_paper(extents: list[tuple[float, float]]) -> None:
    boxes = torch.tensor([[0.0, 0.0, width, height] for width, height in extents])
    levels = StrideRoIAlign(POOLED, 7).assign_levels(boxes)
    assert torch.equal(levels, LevelMapper(2, 5)([boxes]))
    for level, (width, height) in zip(levels.tolist(), extents, strict=True):
        exact = 4 + math.log2(math.sqrt(width * height) / 224)
        assert level in {min(max(math.floor(exact + slack), 2), 5) - 2 for slack in (-1e-5, 1e-5)}


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(-500, 500), st.integers(-500, 500))
def test_levels_do_not_depend_on_place_and_rise_by_one_per_doubling(width: int, height: int, x: int, y: int) -> None:
    box = torch.tensor([[0.0, 0.0, width, height]])
    level, moved, doubled = StrideRoIAlign(POOLED, 7).assign_levels(
        torch.cat([box, box + torch.tensor([x, y, x, y]), 2 * box])
    )
    assert level == moved
    assert doubled == min(level + 1, 3) or (level == 0 and doubled == 0)


@pytest.mark.parametrize(("side", "stride"), [(1, 4), (111, 4), (112, 8), (223, 8), (224, 16), (448, 32), (2000, 32)])
def test_a_box_of_224_pixels_goes_to_stride_16(side: int, stride: int) -> None:
    pool = StrideRoIAlign(POOLED, 7)
    assert list(POOLED.values())[pool.assign_levels(torch.tensor([[5, 7, 5.0 + side, 7.0 + side]]))[0]] == stride


@pytest.mark.parametrize("strides", [{"p3": 8, "p4": 16, "p5": 32}, {"p2": 4}])
def test_pyramids_that_start_elsewhere(strides: dict[str, int]) -> None:
    levels = StrideRoIAlign(strides, 7).assign_levels(torch.tensor([[0, 0, s, s] for s in (10.0, 150.0, 224.0, 900.0)]))
    wanted = [min(max(level, min(strides.values())), max(strides.values())) for level in (4, 8, 16, 32)]
    assert [list(strides.values())[level] for level in levels] == wanted


def test_a_box_without_area_goes_to_the_finest_level() -> None:
    assert StrideRoIAlign(POOLED, 7).assign_levels(torch.tensor([[3.0, 3.0, 3.0, 9.0]])).tolist() == [0]


@pytest.mark.parametrize("strides", [(4, 16), (4, 8, 8), (8, 4)])
def test_strides_must_double(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Strides must double from level to level to assign boxes by size, got \["):
        StrideRoIAlign({str(i): stride for i, stride in enumerate(strides)}, 7)
