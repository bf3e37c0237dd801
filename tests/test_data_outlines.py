"""Polygons become the pixels that pycocotools finds in the whole image, only inside their own rectangle."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from torch import Tensor

from a2fpn.data import Outlines, encode_masks
from a2fpn.masks.rle import decode_window
from a2fpn.masks.segmentation import Polygons, parse_segmentation

quick = settings(deadline=None, max_examples=60)
SIZE = (37, 52)

coordinate = st.floats(-15, 70)
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=7).map(lambda p: [v for xy in p for v in xy])
objects = st.lists(st.lists(polygon, min_size=1, max_size=3), max_size=4)


def outlines(segmentations: list[list[list[float]]]) -> Outlines:
    return Outlines.of([parse_segmentation(polygons, *SIZE) for polygons in segmentations], SIZE)


def filled(segmentations: list[list[list[float]]], size: tuple[int, int]) -> Tensor:
    """The planes (N, H, W) of pycocotools."""
    planes = [mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(p, *size))) for p in segmentations]
    return torch.from_numpy(np.stack(planes)) if planes else torch.zeros(0, *size, dtype=torch.uint8)


@quick
@given(objects)
def test_pixels_are_those_of_the_whole_image(segmentations: list[list[list[float]]]) -> None:
    masks = outlines(segmentations).to_pixels()
    assert masks.size == SIZE
    assert torch.equal(masks.dense(), filled(segmentations, SIZE))
    assert torch.equal(masks.tight().windows, masks.windows)


@quick
@given(objects, st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_resized_polygons_are_filled_at_the_new_size(
    segmentations: list[list[list[float]]], size: tuple[int, int]
) -> None:
    y, x = size[0] / SIZE[0], size[1] / SIZE[1]
    scaled = [[[v * (y if i % 2 else x) for i, v in enumerate(p)] for p in polygons] for polygons in segmentations]
    assert torch.equal(outlines(segmentations).resize(size).to_pixels().dense(), filled(scaled, size))


@quick
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 9)] * 2), max_size=4), st.data())
def test_whole_pixels_move_as_masks_do(boxes: list[tuple[int, int, int, int]], data: st.DataObject) -> None:
    """Rectangles of whole pixels, as polygons and as run lengths in turns, against small masks of the same planes."""
    planes = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    masks = []
    for index, (plane, (x, y, w, h)) in enumerate(zip(planes, boxes, strict=True)):
        plane[y : y + h, x : x + w] = 1
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], dtype=np.float64)
        masks.append(Polygons((corners,), SIZE) if index % 2 else encode_masks(plane[None])[0])
    moved, expected = Outlines.of(masks, SIZE), planes
    for _ in range(data.draw(st.integers(0, 5))):
        height, width = moved.size
        match data.draw(st.sampled_from(["crop", "double", "flip", "rotate90", "choose"])):
            case "crop":
                top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
                moved, expected = moved.crop(top, left, height - top, width - left), expected[:, top:, left:]
            case "double":
                moved = moved.resize((2 * height, 2 * width))
                expected = expected.repeat_interleave(2, 1).repeat_interleave(2, 2)
            case "flip":
                axis = data.draw(st.integers(0, 1))
                moved, expected = moved.flip(axis), expected.flip(2 - axis)
            case "rotate90":
                moved, expected = moved.rotate90(), expected.rot90(dims=(1, 2))
            case "choose":
                keep = torch.tensor([data.draw(st.booleans()) for _ in range(len(moved))], dtype=torch.bool)
                moved, expected = moved[keep], expected[keep]
        assert (len(moved), *moved.size) == tuple(expected.shape)
    assert torch.equal(moved.to_pixels().dense(), expected)


@quick
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3))
def test_run_lengths_are_decoded_in_the_smallest_window(values: list[list[bool]]) -> None:
    planes = np.array(values).reshape(-1, 3, 4)
    for plane, rle in zip(planes, encode_masks(planes), strict=True):
        crop, (left, top, right, bottom) = decode_window(rle)
        canvas = np.zeros((3, 4), np.uint8)
        canvas[top:bottom, left:right] = crop
        assert (canvas == plane).all()
        assert crop.shape == (bottom - top, right - left)
        assert not plane.any() or (crop.any(0)[[0, -1]].all() and crop.any(1)[[0, -1]].all())


def test_many_small_objects_in_a_large_image_take_little_memory() -> None:
    square = np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])
    size = (6000, 8000)
    masks = Outlines.of([Polygons((square + 15 * i,), size) for i in range(390)], size).flip(0).to_pixels()
    assert len(pickle.dumps(masks)) < 390 * (20 * 20 + 32) + 1500
    assert masks.areas().unique().tolist() == [400]


def test_an_object_outside_the_image_has_no_pixels() -> None:
    far = [[[100.0, 100, 110, 100, 110, 110]], [[-9.0, 3, -2, 3, -2, 9]]]
    masks = outlines(far).to_pixels()
    assert masks.areas().tolist() == [0, 0]
    assert masks.windows.tolist() == [[0, 0, 0, 0]] * 2


@pytest.mark.parametrize("kind", [list, tuple])
def test_polygons_may_come_as_any_sequence(kind: type) -> None:
    mask = parse_segmentation(kind([kind([1, 1, 3, 1, 3, 3, 1, 3])]), 4, 4)
    assert isinstance(mask, Polygons)
    assert mask.points[0].tolist() == [[1, 1], [3, 1], [3, 3], [1, 3]]
