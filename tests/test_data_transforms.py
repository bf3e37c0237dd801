import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from a2fpn.config import PreprocessConfig
from a2fpn.data import CocoDataset, InstanceMasks, collate, train_transforms
from a2fpn.preprocess import Preprocess
from tests.coco_data import write_coco


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
    augment = train_transforms(double, crop_size=crop, vertical_flip=0.5, rotate90=0.5, color_jitter=0.3)
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


def test_masks_are_resized_about_pixel_centers():
    # 4 -> 2 pixels: each new pixel covers two old ones, its center rounds up to the second
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


def test_colors_change_only_when_asked():
    image, target = sample(20, 30, [(1, 2, 10, 6)])
    image[0] = 90
    changed, _ = train_transforms(same, **STILL, color_jitter=0.5)(image, target)
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
    augment = train_transforms(double, crop_size=20, rotate90=0.5, color_jitter=0.2)
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


class Sizes:
    """The size rule of a model; it keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, height, width, *, min_size=None):
        self.asked.append(min_size)
        scale = min((min_size or 40) / min(height, width), 100 / max(height, width))
        return round(height * scale), round(width * scale)


def test_multi_scale_draws_one_of_the_short_sides_and_keeps_the_longest():
    rule = Sizes()
    augment = train_transforms(rule, **STILL, min_sizes=(30, 60, 90))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = augment(*sample(20, 30, [(0, 0, 30, 20)]))
        seen.add(tuple(image.shape[1:]))
        assert target["boxes"].tolist() == [[0, 0, image.shape[2], image.shape[1]]]
    assert seen == {(30, 45), (60, 90), (67, 100)}
    assert set(rule.asked) == {30, 60, 90}
    assert augment.transforms[0].scale(20, 30) in ([30, 45], [60, 90], [67, 100])
    train_transforms(rule, **STILL)(*sample(20, 30, []))
    assert rule.asked[-1] is None  # the model's own


def test_multi_scale_takes_the_models_rule():
    rule = Preprocess(PreprocessConfig(min_size=80, max_size=120), divisor=32)
    assert rule.target_size(20, 30) == (80, 120)
    assert rule.target_size(20, 30, min_size=50) == (50, 75)
    assert rule.target_size(20, 60, min_size=50) == (40, 120)
    image, _ = train_transforms(rule.target_size, **STILL, min_sizes=[50])(*sample(20, 60, []))
    assert image.shape == (3, 40, 120)


def test_large_scale_jitter_is_about_the_crop_and_uniform():
    augment = train_transforms(double, large_scale_jitter=(0.1, 2.0), crop_size=100, horizontal_flip=0)
    longest, sizes = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        image, _ = augment(*sample(20, 30, []))
        longest.append(max(image.shape[1:]))
        sizes.append(tuple(image.shape[1:]))
    assert 10 <= min(longest) < 20
    assert max(longest) == 100
    assert max(height for height, _ in sizes) == 100  # of twice the crop's side the short one is 133
    assert 0.42 < sum(side < 100 for side in longest) / 400 < 0.53  # 0.9 of 1.9
    assert 0.2 < sum(side < 57 for side in longest) / 400 < 0.3  # a quarter of the range


def test_the_first_crop_keeps_a_share_of_each_side():
    augment = train_transforms(same, **STILL, crop_range=(0.5, 1.0))
    sizes = []
    for seed in range(200):
        torch.manual_seed(seed)
        image, target = augment(*sample(20, 30, [(0, 0, 30, 20)]))
        sizes.append(tuple(image.shape[1:]))
        assert target["boxes"].tolist() == [[0, 0, *sizes[-1][::-1]]]
        assert (image == 200).all()
    assert {height for height, _ in sizes} == set(range(10, 21))
    assert {width for _, width in sizes} == set(range(15, 31))
    # Each side is drawn for itself.
    assert {(height > 15, width > 22) for height, width in sizes} == {(a, b) for a in (0, 1) for b in (0, 1)}


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    count=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    options=st.sampled_from(
        [{"min_sizes": (7, 31), "crop_size": None}, {"large_scale_jitter": (0.1, 2.0), "crop_size": 33}]
    ),
)
def test_everything_at_once_on_odd_sizes(size, count, seed, options):
    torch.manual_seed(seed)
    boxes = [(0, 0, size[1], size[0]), (size[1] // 2, 0, size[1] // 2 + 1, 1), (0, size[0] - 1, 1, size[0])][:count]
    image, target = sample(*size, boxes)
    target["semantic"] = tv_tensors.Mask(image[0].clone())
    target["keypoints"] = torch.tensor([[[box[0] + 0.5, box[1] + 0.5, 2.0]] for box in boxes]).reshape(-1, 1, 3)
    augment = train_transforms(Sizes(), crop_range=(0.3, 1), vertical_flip=0.5, rotate90=0.5, **options)
    image, target = augment(image, target)
    height, width = image.shape[1:]
    assert target["semantic"].shape == (height, width)
    assert target["masks"].size == (height, width)
    assert target["boxes"].canvas_size == (height, width)
    number = len(target["boxes"])
    assert len(target["labels"]) == len(target["masks"]) == number
    assert target["keypoints"].shape == (number, 1, 3)
    assert torch.equal(target["masks"].tight().windows.float(), target["boxes"].as_subclass(torch.Tensor))
    # Bright where the map is: both were made of the same rectangles.
    covered = target["masks"].dense().bool().any(0)
    assert (target["semantic"][covered] == 200).all()
    for box, (x, y, visible) in zip(target["boxes"].tolist(), target["keypoints"][:, 0].tolist(), strict=True):
        assert not visible or (0 <= x <= width and 0 <= y <= height)
        assert not visible or (box[0] - 2 <= x <= box[2] + 2 and box[1] - 2 <= y <= box[3] + 2) or min(size) < 5


def test_outlines_and_pixels_give_the_same_objects(tmp_path):
    """From polygons and run lengths, or from the pixels they stand for at the file's size."""
    folder, path = write_coco(tmp_path, size=(128, 160))
    augment = train_transforms(double, crop_size=120, vertical_flip=0.5, rotate90=0.5)
    outlines, plain = CocoDataset(folder, path, transforms=augment), CocoDataset(folder, path)
    agreement = []
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = outlines[seed % 3]
        torch.manual_seed(seed)
        other_image, other = augment(*plain[seed % 3])
        assert torch.equal(image, other_image)
        assert target["labels"].tolist() == other["labels"].tolist()
        a, b = target["masks"].dense().bool(), other["masks"].dense().bool()
        agreement += ((a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)).tolist()
        assert ((target["boxes"] - other["boxes"]).abs() <= 1).all()
    assert min(agreement) > 0.9
    assert len(agreement) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip must lie in \[0, 1\], got 1.5"),
        ({"rotate90": -1}, "rotate90 must lie in"),
        ({"color_jitter": 2}, "color_jitter must lie in"),
        ({"scale_range": (1.3, 0.7)}, r"0 < lowest <= highest, got \(1.3, 0.7\)"),
        ({"scale_range": (0, 1)}, "0 < lowest"),
        ({"crop_size": 0}, "crop_size must be at least 1 pixel, or None for no crop, got 0"),
        ({"min_sizes": (800, 0)}, r"min_sizes must be at least 1 pixel each, got \[800, 0\]"),
        ({"crop_range": (0.5, 1.5)}, r"crop_range must be .* 0 < lowest <= highest <= 1, got \(0.5, 1.5\)"),
        ({"crop_range": (0, 1)}, "crop_range must be"),
        ({"large_scale_jitter": (2, 0.1)}, r"large_scale_jitter must be .* got \(2, 0.1\)"),
        ({"large_scale_jitter": (0.1, 2), "crop_size": None}, "large_scale_jitter needs a crop_size"),
        ({"large_scale_jitter": (0.1, 2), "min_sizes": [800]}, "both decide the size"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        train_transforms(same, **options)
