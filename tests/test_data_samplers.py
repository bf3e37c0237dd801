"""The order of an epoch: every image as often as it should be, batches of one group, nothing but the arguments."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2fpn.data import CocoDataset, aspect_ratio_groups, epoch_order, repeat_factors
from tests.processes import run_python

quick = settings(deadline=None, max_examples=80)
order = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "epoch": st.integers(0, 300),
        "num_samples": st.integers(0, 40),
        "batch_size": st.integers(1, 9),
    }
)


@quick
@given(order, st.data())
def test_every_index_is_there_once_and_batches_are_of_one_group(arguments, data):
    groups = [data.draw(st.integers(0, 2)) for _ in range(arguments["num_samples"])]
    batches = epoch_order(**arguments, groups=groups, drop_last=False)
    assert sorted(itertools.chain(*batches)) == list(range(arguments["num_samples"]))
    assert all(len({groups[index] for index in batch}) == 1 for batch in batches)
    size = arguments["batch_size"]
    full = [batch for batch in batches if len(batch) == size]
    assert batches[: len(full)] == full  # the others come last, one for each group at most
    rest = [groups[batch[0]] for batch in batches[len(full) :]]
    assert len(set(rest)) == len(rest)
    assert epoch_order(**arguments, groups=groups) == full
    assert len(full) == sum(count // size for count in Counter(groups).values())


@quick
@given(order, st.data())
def test_repeats_are_rounded_up_or_down(arguments, data):
    repeats = torch.tensor([data.draw(st.floats(0, 4)) for _ in range(arguments["num_samples"])]).double()
    counts = Counter(itertools.chain(*epoch_order(**arguments, repeats=repeats, drop_last=False)))
    for index, repeat in enumerate(repeats.tolist()):
        assert math.floor(repeat) <= counts[index] <= math.ceil(repeat)


def test_fractions_of_repeats_are_probabilities_drawn_anew_in_each_epoch():
    options = {"seed": 1, "num_samples": 4, "batch_size": 1, "repeats": torch.tensor([1.0, 1.25, 2.5, 0.1])}
    epochs = [Counter(itertools.chain(*epoch_order(epoch=epoch, **options))) for epoch in range(2000)]
    means = [sum(counts[index] for counts in epochs) / len(epochs) for index in range(4)]
    assert means == pytest.approx([1, 1.25, 2.5, 0.1], abs=0.04)
    assert {counts[0] for counts in epochs} == {1}
    assert {counts[2] for counts in epochs} == {2, 3}


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    options = {"num_samples": 30, "batch_size": 3, "repeats": torch.full((30,), 1.5)}
    torch.manual_seed(0)
    one = epoch_order(seed=3, epoch=4, **options)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert epoch_order(seed=3, epoch=4, **options) == one
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # it draws nothing from the global generator
    others = [epoch_order(seed=s, epoch=e, **options) for s, e in ((4, 3), (3, 5), (4, 4), (34, 4), (3, 44))]
    assert all(other != one for other in others)


def test_the_order_is_the_same_in_another_process_and_in_later_versions():
    code = "from a2fpn.data import epoch_order; print(epoch_order(seed=7, epoch=2, num_samples=9, batch_size=4))"
    assert run_python(code).stdout.strip() == "[[2, 1, 8, 6], [7, 5, 3, 0]]"


def test_images_come_in_random_places():
    orders = [epoch_order(seed=0, epoch=e, num_samples=10, batch_size=1) for e in range(1000)]
    first = Counter(batches[0][0] for batches in orders)
    assert all(60 <= first[index] <= 145 for index in range(10))  # 100 expected, 9.5 is the standard deviation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"groups": [0]}, "groups must have one entry for each of the 3 samples, got 1"),
        ({"repeats": torch.ones(4)}, "repeats must have one entry for each of the 3 samples, got 4"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        epoch_order(**({"seed": 0, "epoch": 0, "num_samples": 3, "batch_size": 2} | options))


def dataset(folder, sizes, objects):
    """A data set without image files: (height, width) of each image, and (image, category, is crowd) of each object."""
    return CocoDataset(
        folder,
        {
            "images": [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
            "categories": [{"id": 10 * i, "name": f"class {i}"} for i in range(1, 4)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": 10 * label, "bbox": [0, 0, 2, 2], "iscrowd": int(crowd)}
                for i, (image, label, crowd) in enumerate(objects)
            ],
        },
    )


def test_upright_images_are_a_group(tmp_path):
    assert aspect_ratio_groups(dataset(tmp_path, [(4, 5), (5, 4), (4, 4), (9, 2)], [])) == [0, 1, 0, 1]


def test_repeat_factors_are_those_of_the_rarest_class(tmp_path):
    # Class 1 is on all of the 4 images that have objects, twice on one; class 2 on one; class 3 as a crowd only.
    objects = [*((image, 1, False) for image in (0, 1, 2, 3, 3)), (2, 2, False), (1, 3, True)]
    data = dataset(tmp_path, [(4, 4)] * 5, objects)
    assert repeat_factors(data, threshold=0.45).tolist() == pytest.approx([1, 1, (0.45 / 0.2) ** 0.5, 1, 1])
    assert repeat_factors(data, threshold=1).tolist() == pytest.approx([1.25**0.5] * 2 + [5**0.5, 1.25**0.5, 1])
    assert repeat_factors(data, threshold=0.1).tolist() == [1] * 5
    assert repeat_factors(data, threshold=0.1).dtype == torch.float64


@pytest.mark.parametrize("threshold", [0, -1, 1.5, math.nan])
def test_a_threshold_is_a_share(tmp_path, threshold):
    with pytest.raises(ValueError, match=f"threshold must be above 0 and at most 1, got {threshold}"):
        repeat_factors(dataset(tmp_path, [(4, 4)], []), threshold=threshold)


def test_an_empty_data_set_has_no_factors(tmp_path):
    assert repeat_factors(dataset(tmp_path, [], []), threshold=0.5).shape == (0,)
