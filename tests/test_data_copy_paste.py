"""Copy-paste: what is pasted is seen, what lies under it is gone, and both targets agree with the pixels."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from a2fpn.data import CocoDataset, CopyPaste, InstanceMasks, collate, train_transforms
from a2fpn.data.copy_paste import paste
from tests.coco_data import write_coco


def sample(size, boxes, *, value=200, **more):
    """An image with a rectangle of one value for each box, on a ground of a hundredth of that, and its target."""
    image = torch.full((3, *size), value // 100, dtype=torch.uint8)
    planes = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for plane, (x0, y0, x1, y1) in zip(planes, boxes, strict=True):
        plane[y0:y1, x0:x1] = 1
        image[:, y0:y1, x0:x1] = value
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        "image_id": value,
        "boxes": tv_tensors.BoundingBoxes(edges, format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
        "masks": InstanceMasks.from_dense(planes),
        **more,
    }
    return tv_tensors.Image(image), target


def test_what_is_pasted_covers_what_was_there():
    below, above = sample((20, 30), [(2, 2, 12, 10), (20, 2, 28, 6)]), sample((20, 30), [(7, 0, 15, 12)], value=100)
    image, target = paste(below, above)
    assert isinstance(image, tv_tensors.Image)
    assert target["image_id"] == 200
    assert target["boxes"].tolist() == [[2, 2, 7, 10], [20, 2, 28, 6], [7, 0, 15, 12]]
    assert target["boxes"].canvas_size == (20, 30)
    assert target["labels"].tolist() == [0, 1, 0]
    assert target["masks"].areas().tolist() == [5 * 8, 8 * 4, 8 * 12]
    assert (image[:, 0:12, 7:15] == 100).all()  # nothing of the other image's ground
    assert (image[:, 2:10, 2:7] == 200).all()
    assert (image[:, 12:, 7:15] == 2).all()
    assert (below[0][:, 2:10, 2:12] == 200).all()  # the sample itself is left alone
    assert below[1]["masks"].areas().tolist() == [80, 32]


@pytest.mark.parametrize(("min_visible", "left"), [(0.0, [0, 1]), (0.2, [0, 1]), (0.21, [1])])
def test_objects_of_which_too_little_is_left_are_dropped(min_visible, left):
    below, above = sample((20, 30), [(0, 0, 10, 10), (20, 0, 30, 10)]), sample((20, 30), [(2, 0, 12, 15)])
    _, target = paste(below, above, min_visible=min_visible)
    assert target["labels"].tolist() == [*left, 0]


def test_objects_that_are_covered_whole_or_to_a_sliver_are_dropped():
    below, above = sample((20, 30), [(1, 1, 10, 10), (12, 0, 16, 9)]), sample((20, 30), [(0, 0, 14, 15)])
    assert paste(below, above, min_visible=0)[1]["labels"].tolist() == [1, 0]
    assert paste(below, above, min_visible=0, min_box_size=3)[1]["labels"].tolist() == [0]


def test_boxes_that_nothing_covers_stay_what_they_are():
    below, above = sample((20, 30), [(1, 1, 10, 10)]), sample((20, 30), [(20, 10, 25, 15)])
    below[1]["boxes"][0] += 0.5
    assert paste(below, above)[1]["boxes"].tolist() == [[1.5, 1.5, 10.5, 10.5], [20, 10, 25, 15]]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.tuples(st.integers(5, 40), st.integers(5, 40))] * 2),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 10**6),
)
def test_samples_of_any_two_sizes_agree_with_their_pixels(sizes, counts, seed):
    torch.manual_seed(seed)
    two = []
    for (height, width), count, value in zip(sizes, counts, (200, 100), strict=True):
        x0, y0 = torch.randint(width - 2, (count,)), torch.randint(height - 2, (count,))
        boxes = torch.stack([x0, y0, (x0 + torch.randint(2, 15, (count,))).clamp(max=width), y0 + 2], 1)
        two.append(sample((height, width), boxes.tolist(), value=value))
    image, target = paste(*two)
    assert image.shape == two[0][0].shape
    assert target["masks"].size == tuple(image.shape[1:])
    assert len(target["masks"]) == len(target["boxes"]) == len(target["labels"])
    planes = target["masks"].dense().bool()
    tight = target["masks"].tight().windows.float()
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), tight)
    pasted = int((image[0] == 100).sum())
    assert planes.any(0).sum() >= pasted
    ours = planes[len(planes) - sum(int((image[0][plane] == 100).all()) for plane in planes) :]
    assert torch.equal(ours.any(0) if len(ours) else torch.zeros_like(image[0], dtype=torch.bool), image[0] == 100)
    for plane in planes:
        assert len(image[0][plane].unique()) == 1


def test_keypoints_crowds_and_semantic_maps_come_along():
    points = torch.tensor([[[3.0, 3.0, 2.0], [9.0, 3.0, 2.0], [9.5, 4.5, 1.0], [0, 0, 0]]])
    above_points = torch.tensor([[[8.0, 1.0, 2.0], [35.0, 1.0, 2.0], [9.0, 2.0, 1.0], [0, 0, 0]]])
    below = sample(
        (20, 30),
        [(2, 2, 12, 10)],
        keypoints=points,
        iscrowd=torch.tensor([1]),
        semantic=tv_tensors.Mask(torch.full((20, 30), 3, dtype=torch.uint8)),
    )
    above = sample(
        (10, 40),
        [(7, 0, 15, 6)],
        keypoints=above_points,
        iscrowd=torch.tensor([0]),
        semantic=tv_tensors.Mask(torch.full((10, 40), 7, dtype=torch.uint8)),
    )
    _, target = paste(below, above)
    assert target["keypoints"].tolist() == [
        [[3, 3, 2], [9, 3, 1], [9.5, 4.5, 1], [0, 0, 0]],
        [[8, 1, 2], [0, 0, 0], [9, 2, 1], [0, 0, 0]],
    ]
    assert target["iscrowd"].tolist() == [1, 0]
    assert isinstance(target["semantic"], tv_tensors.Mask)
    assert (target["semantic"] == 7).nonzero().amax(0).tolist() == [5, 14]
    assert (target["semantic"] == 7).sum() == 6 * 8
    assert (below[1]["semantic"] == 3).all()


def test_a_data_set_is_wrapped(tmp_path):
    augment = train_transforms(lambda h, w: (h, w), scale_range=(0.8, 1.2), crop_size=60)
    dataset = CocoDataset(*write_coco(tmp_path), transforms=augment, keep_crowd=True)
    always = CopyPaste(dataset, probability=1)
    assert len(always) == len(dataset)
    counts = []
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = always[3]  # which has no objects of its own
        assert target["image_id"] == dataset.image_ids[3]
        assert not target["iscrowd"].any()
        counts.append(len(target["labels"]))
        torch.manual_seed(seed)
        again = always[3]
        assert torch.equal(again[0], image)
        assert torch.equal(again[1]["masks"].pixels, target["masks"].pixels)
    assert 0 < sum(counts) / len(counts) < 3  # half of what the others have, and one of four has none
    torch.manual_seed(0)
    never = CopyPaste(dataset, probability=0)[0]
    torch.manual_seed(0)
    assert torch.equal(never[0], dataset[0][0])


def test_works_in_loader_workers(tmp_path):
    dataset = pickle.loads(pickle.dumps(CopyPaste(CocoDataset(*write_coco(tmp_path)), probability=1)))
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1)
    targets = [target for _, targets in loader for target in targets]
    assert [target["image_id"] for target in targets] == dataset.dataset.image_ids
    assert all(len(target["masks"]) == len(target["labels"]) for target in targets)


def test_wrong_arguments(tmp_path):
    folder, path = write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 2"):
        CopyPaste(CocoDataset(folder, path), probability=2)
    with pytest.raises(ValueError, match=r"min_visible must lie in \[0, 1\], got -0\.5"):
        CopyPaste(CocoDataset(folder, path), min_visible=-0.5)
    without = {"images": [], "annotations": [{"id": 1}], "categories": []}
    with pytest.raises(ValueError, match="Copy-paste needs masks, the samples have image_id, boxes, labels"):
        CopyPaste(CocoDataset(folder, without))
