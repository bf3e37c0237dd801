import pickle

import pytest
import torch
from coco_data import write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from a2fpn.data import CocoDataset, InstanceMasks, collate, train_transforms


def double(height, width):
    return 2 * height, 2 * width


def same(height, width):
    return height, width


STILL = {"scale_range": (1, 1), "crop_size": None, "horizontal_flip": 0}


def sample(height, width, boxes, *, masks=True):
    """Returns a dark image with bright rectangles, one per box, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    planes = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for plane, (x0, y0, x1, y1) in zip(planes, boxes, strict=True):
        plane[y0:y1, x0:x1] = 1
        image[:, y0:y1, x0:x1] = 200
    target = {
        "image_id": 5,
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(len(boxes)),
    }
    if masks:
        target["masks"] = InstanceMasks.from_dense(planes)
    return tv_tensors.Image(image), target


rectangles = st.lists(
    st.tuples(st.integers(0, 29), st.integers(0, 19), st.integers(1, 12), st.integers(1, 12)).map(
        lambda b: (b[0], b[1], min(b[0] + b[2], 30), min(b[1] + b[3], 20))
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(boxes=rectangles, seed=st.integers(0, 10**6), crop=st.sampled_from([None, 1, 16, 100]), masks=st.booleans())
def test_whatever_comes_out_is_a_consistent_sample(boxes, seed, crop, masks):
    torch.manual_seed(seed)
    augment = train_transforms(double, crop_size=crop, vertical_flip=0.5, rotate90=0.5, colour_jitter=0.3)
    image, target = augment(*sample(20, 30, boxes, masks=masks))
    height, width = image.shape[1:]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8
    assert max(height, width) <= (crop or 80)
    assert min(height, width) >= min(crop or 30, 30)  # 0.75 x 2 x 20
    assert target["image_id"] == 5
    assert len(target["labels"]) == len(target["boxes"])
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    assert ((x1 - x0 >= 1) & (y1 - y0 >= 1)).all()
    assert ((x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)).all()
    assert target["boxes"].canvas_size == (height, width)
    assert ("masks" in target) == masks
    if masks:
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        for box, mask in zip(target["boxes"].tolist(), target["masks"].dense(), strict=True):
            ys, xs = mask.nonzero().unbind(1)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), masks=st.booleans())
def test_image_masks_and_boxes_move_together(seed, masks):
    torch.manual_seed(seed)
    augment = train_transforms(double, crop_size=50, horizontal_flip=0.5, vertical_flip=0.5, rotate90=0.5)
    image, target = augment(*sample(40, 50, [(12, 8, 31, 27)], masks=masks))
    ys, xs = (image[0] > 100).nonzero().unbind(1)
    if len(ys) == 0:
        return
    seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert (target["boxes"][0] - seen).abs().max() <= 1.01
    if masks:
        mask = target["masks"].dense()[0].bool()
        assert mask[image[0] > 130].all()
        assert not mask[image[0] < 40].any()


def test_switched_off_it_is_the_models_own_size_and_nothing_else():
    image, target = sample(20, 30, [(3, 4, 10, 12), (5, 5, 6, 20)])
    new_image, new_target = train_transforms(same, **STILL)(image, target)
    assert torch.equal(new_image, image)
    assert torch.equal(new_target["masks"].dense(), target["masks"].dense())
    assert torch.equal(new_target["boxes"], target["boxes"])
    doubled, doubled_target = train_transforms(double, **STILL)(image, target)
    assert doubled.shape == (3, 40, 60)
    assert torch.equal(doubled_target["boxes"], 2 * target["boxes"])


def test_masks_are_resized_about_pixel_centres():
    # 4 -> 2 pixels: each new pixel covers two old ones, its centre rounds up to the second
    image, target = sample(4, 4, [(1, 1, 2, 2), (2, 2, 3, 3)])
    _, target = train_transforms(lambda h, w: (2, 2), **STILL)(image, target)
    assert target["labels"].tolist() == [0]
    assert target["masks"].dense()[0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("option", "expected"), [("horizontal_flip", (20, 2, 29, 6)), ("vertical_flip", (1, 14, 10, 18))]
)
@pytest.mark.parametrize("masks", [True, False])
def test_flips(option, expected, masks):
    _, target = train_transforms(same, **(STILL | {option: 1}))(*sample(20, 30, [(1, 2, 10, 6)], masks=masks))
    assert target["boxes"].tolist() == [list(expected)]


@pytest.mark.parametrize("masks", [True, False])
def test_turns_reach_all_three_directions(masks):
    seen = set()
    augment = train_transforms(same, **STILL, rotate90=1)
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = augment(*sample(20, 30, [(1, 2, 10, 6)], masks=masks))
        seen.add((tuple(image.shape[1:]), tuple(map(int, target["boxes"][0]))))
    assert seen == {((30, 20), (2, 20, 6, 29)), ((20, 30), (20, 14, 29, 18)), ((30, 20), (14, 1, 18, 10))}


def test_colours_change_only_when_asked():
    image, target = sample(20, 30, [(1, 2, 10, 6)])
    image[0] = 90
    changed, _ = train_transforms(same, **STILL, colour_jitter=0.5)(image, target)
    assert not torch.equal(changed, image)


def test_boxes_fit_the_masks_and_small_rests_are_dropped():
    image, target = sample(20, 30, [(1, 2, 10, 6), (3, 3, 5, 12), (0, 0, 9, 9)])
    planes = target["masks"].dense()
    planes[2] = 0
    target["masks"] = InstanceMasks.from_dense(planes)
    target["boxes"] += 0.4
    _, fitted = train_transforms(same, **STILL)(image, target)
    assert fitted["boxes"].tolist() == [[1, 2, 10, 6], [3, 3, 5, 12]]
    _, large = train_transforms(same, **STILL, min_box_size=3)(image, target)
    assert large["labels"].tolist() == [0]


def test_other_entries_per_object_are_kept_in_step():
    image, target = sample(20, 30, [(1, 2, 10, 6), (3, 3, 4, 12)])
    target["iscrowd"] = torch.tensor([1, 0])
    _, target = train_transforms(same, **STILL, min_box_size=2)(image, target)
    assert target["iscrowd"].tolist() == [1]


@pytest.mark.parametrize("size", [(1, 1), (3000, 5), (5, 3000)])
def test_extreme_sizes(size):
    image, target = sample(*size, [(0, 0, 1, 1)])
    image, target = train_transforms(double, crop_size=64)(image, target)
    assert max(image.shape[1:]) <= 64
    assert min(image.shape[1:]) >= 1


def test_the_input_is_left_alone_and_the_seed_decides():
    image, target = sample(20, 30, [(1, 2, 10, 6)])
    before = (image.clone(), target["boxes"].clone(), target["masks"].dense())
    augment = train_transforms(double, crop_size=20, rotate90=0.5, colour_jitter=0.2)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(augment(image, target)[0])
    assert torch.equal(*results)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (image, target["boxes"], target["masks"].dense()), strict=True)
    )


def test_works_in_a_loader_and_survives_pickling(tmp_path):
    augment = pickle.loads(pickle.dumps(train_transforms(double, crop_size=32)))
    dataset = CocoDataset(*write_coco(tmp_path), transforms=augment)
    images = [image for batch, _ in DataLoader(dataset, batch_size=2, collate_fn=collate) for image in batch]
    assert [tuple(image.shape) for image in images] == [(3, 32, 32)] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip must lie in \[0, 1\], got 1.5"),
        ({"rotate90": -1}, "rotate90 must lie in"),
        ({"colour_jitter": 2}, "colour_jitter must lie in"),
        ({"scale_range": (1.3, 0.7)}, r"0 < lowest <= highest, got \(1.3, 0.7\)"),
        ({"scale_range": (0, 1)}, "0 < lowest"),
        ({"crop_size": 0}, "crop_size must be at least 1 pixel, or None for no crop, got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        train_transforms(same, **options)
