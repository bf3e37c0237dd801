"""Batches depend on the seed and the step alone, not on processes or loader workers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2fpn.data import CocoDataset, train_transforms
from a2fpn.training.feed import FolderFeed
from tests.coco_data import write_coco


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """9 images, upright and wide in turn, with random crops and colors."""
    folder, annotations = write_coco(tmp_path_factory.mktemp("feed"), images=9)
    augment = train_transforms(lambda height, width: (height, width), crop_size=50, color_jitter=0.5)
    return CocoDataset(folder, annotations, transforms=augment)


def feed(dataset, **options) -> FolderFeed:
    return FolderFeed(dataset, dataset, **{"batch_size": 2, "seed": 5, **options})


def seen(batches) -> list[tuple[int, float]]:
    """Id and content of every image, in order."""
    return [
        (target["image_id"], float(image.double().sum()))
        for images, targets in batches
        for image, target in zip(images, targets, strict=True)
    ]


def test_an_epoch_has_every_image_at_most_once_and_leaves_out_less_than_a_step(dataset):
    one = feed(dataset, group_by_aspect=True)
    ids = [image_id for image_id, _ in seen(one.batches(0))]
    assert one.steps(0) == 4
    assert len(ids) == len(set(ids)) == 8


def test_epochs_differ_and_are_the_same_again(dataset):
    one = feed(dataset)
    first, second = seen(one.batches(0)), seen(one.batches(1))
    assert first != second
    assert sorted(first) != sorted(second)  # other crops and colors as well
    assert seen(one.batches(0)) == first
    assert seen(feed(dataset, seed=6).batches(0)) != first


def test_workers_change_nothing(dataset):
    alone = feed(dataset)
    expected = [seen(alone.batches(epoch)) for epoch in range(3)]
    helped = feed(dataset, workers=2)
    assert [seen(helped.batches(epoch)) for epoch in range(3)] == expected


@settings(deadline=None, max_examples=20)  # reads images
@given(start=st.integers(0, 4), epoch=st.integers(0, 3))
def test_starting_in_the_middle_gives_the_rest(dataset, start, epoch):
    one = feed(dataset)
    assert seen(one.batches(epoch, start=start)) == seen(one.batches(epoch))[start * 2 :]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "grad_accumulation"), [(2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2)]
)
def test_processes_and_accumulation_divide_the_same_steps(dataset, world_size, batch_size, grad_accumulation):
    whole = seen(feed(dataset, batch_size=4).batches(0))
    parts = [
        feed(
            dataset,
            batch_size=batch_size,
            grad_accumulation=grad_accumulation,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    shares = [seen(part.batches(0)) for part in parts]
    assert [part.steps(0) for part in parts] == [2] * world_size
    share = 4 // world_size
    for step in range(2):
        joined = [one for mine in shares for one in mine[step * share : (step + 1) * share]]
        assert joined == whole[step * 4 : (step + 1) * 4]


def test_less_images_than_a_step_takes_are_repeated(dataset):
    one = feed(dataset, batch_size=20)
    ids = [image_id for image_id, _ in seen(one.batches(0))]
    assert one.steps(0) == 1
    assert len(ids) == 20
    assert len(set(ids)) == 9


def test_images_of_a_group_that_is_too_small_for_a_step_are_not_lost(dataset):
    """5 wide and 4 upright images, 6 to a step."""
    one = feed(dataset, batch_size=6, group_by_aspect=True)
    ids = {image_id for epoch in range(8) for image_id, _ in seen(one.batches(epoch))}
    assert len(ids) == 9


def test_an_epoch_of_several_passes_is_several_epochs_with_other_augmentations(dataset):
    short, long = feed(dataset, batch_size=2), feed(dataset, batch_size=2, passes=3)
    assert long.steps(1) == sum(short.steps(epoch) for epoch in (3, 4, 5))
    ids = [image_id for image_id, _ in seen(long.batches(1))]
    assert ids == [image_id for epoch in (3, 4, 5) for image_id, _ in seen(short.batches(epoch))]
    pictures = [picture for _, picture in seen(long.batches(0))]
    assert len({str(picture) for picture in pictures}) == len(pictures)
    assert seen(long.batches(1, start=5)) == seen(long.batches(1))[10:]
    with pytest.raises(ValueError, match=r"data.passes must be at least 1, got 0"):
        feed(dataset, passes=0)


def test_rare_classes_are_repeated(dataset):
    """Images without objects keep their factor of 1."""
    one = feed(dataset, repeat_threshold=1.0, batch_size=1)
    assert sum(one.steps(epoch) for epoch in range(20)) > 20 * 9
    empty = [image_id for image_id, found in dataset.coco.annotations.items() if not found]
    for epoch in range(3):
        ids = [image_id for image_id, _ in seen(one.batches(epoch))]
        assert all(ids.count(image_id) == 1 for image_id in empty)


def test_the_loader_leaves_the_programs_random_numbers_alone(dataset):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for _ in feed(dataset, workers=1).batches(0):
        pass
    assert torch.equal(torch.get_rng_state(), state)
