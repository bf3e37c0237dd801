from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from a2fpn.detectors import DETECTORS
from a2fpn.heads import BoxPairs, ChunkedMatcher, DetectionRoIHeads, match_locations, matching
from tests.helpers import random_target, tiny_model

KINDS = list(DETECTORS)


def random_boxes(count: int, *, largest: float = 40.0, whole: bool = False) -> Tensor:
    """Boxes in an image of 100 x 100; of whole pixels, so that many IoUs are equal, or not."""
    corners, sides = torch.rand(count, 2) * 80, torch.rand(count, 2) * largest + 1
    boxes = torch.cat([corners, corners + sides], 1)
    return boxes.round() + torch.tensor([0, 0, 1, 1]) if whole else boxes


def torchvisions(objects: Tensor, boxes: Tensor, low_quality: bool) -> Tensor:
    matches: Tensor = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)(box_iou(objects, boxes))
    return matches


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("pairs_at_once", [1, 7, 100, 999, 10**6])
@pytest.mark.parametrize("whole", [False, True])
def test_chunks_match_like_the_whole(
    low_quality: bool, pairs_at_once: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, boxes = random_boxes(9, whole=whole), random_boxes(300, largest=30.0, whole=whole)
    # Objects that are there twice, boxes that are there twice, and boxes that are objects.
    objects, boxes = torch.cat([objects, objects[:3]]), torch.cat([boxes, boxes[:50], objects[4:6]])
    wanted = torchvisions(objects, boxes, low_quality)
    assert len(wanted.unique()) > 5
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    got = ChunkedMatcher(0.5, 0.4, allow_low_quality_matches=low_quality)(BoxPairs(objects, boxes))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("pairs_at_once", [5, 10**6])
def test_low_quality_matches_are_kept(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties across chunks, and torchvision's treatment of an object that nothing overlaps."""
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    matcher = ChunkedMatcher(0.5, 0.4, allow_low_quality_matches=True)
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    # The best for the first object, at the two ends; only a second box overlaps the second object.
    boxes = torch.tensor([[5.0, 0.0, 15.0, 10.0], *[[55.0, 50.0, 65.0, 60.0]] * 6, [0.0, 5.0, 10.0, 15.0]])
    assert matcher(BoxPairs(objects, boxes)).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    for one in (objects, torch.tensor([[0.0, 0.0, 10.0, 10.0], [90.0, 90.0, 99.0, 99.0]])):
        assert torch.equal(matcher(BoxPairs(one, boxes)), torchvisions(one, boxes, True))


@pytest.mark.parametrize(("objects", "boxes"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_match_is_background(objects: int, boxes: int) -> None:
    pairs = BoxPairs(random_boxes(objects), random_boxes(boxes))
    assert ChunkedMatcher(0.5, 0.4)(pairs).tolist() == [-1] * boxes
    assert match_locations(*pairs, per_level=[boxes], radius=1.5).tolist() == [-1] * boxes


@pytest.mark.parametrize("pairs_at_once", [50, 10**6])
def test_proposals_get_the_labels_that_torchvision_gives(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    arguments = (None, None, None, 0.6, 0.3, 16, 0.5, None, 0.0, 0.5, 10)
    objects = [random_boxes(5), random_boxes(0)]
    near = objects[0].repeat(40, 1) + torch.randn(200, 4)
    proposals = [torch.cat([near, random_boxes(50)]), random_boxes(30)]
    labels = [torch.tensor([3, 1, 4, 1, 5]), torch.zeros(0, dtype=torch.int64)]
    ours, theirs = (
        heads(*arguments).assign_targets_to_proposals(proposals, objects, labels)
        for heads in (DetectionRoIHeads, RoIHeads)
    )
    assert len(theirs[1][0].unique()) > 3
    for got, wanted in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert torch.equal(got, wanted)


def grid(strides: tuple[int, ...], side: int) -> tuple[Tensor, list[int]]:
    """The squares of FCOS on an image of so many pixels a side, and how many each level has."""
    levels = []
    for stride in strides:
        xs = torch.arange(0, side, stride, dtype=torch.float32)
        centers = torch.cartesian_prod(xs, xs).flip(1)
        levels.append(torch.cat([centers - stride / 2, centers + stride / 2], 1))
    return torch.cat(levels), [len(level) for level in levels]


@pytest.mark.parametrize("pairs_at_once", [10, 1000, 10**6])
def test_locations_match_like_torchvisions(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Spy:
        center_sampling_radius = 1.5

        @property
        def head(self) -> "Spy":
            return self

        def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matches: list[Tensor]) -> None:
            seen.extend(matches)

    anchors, counts = grid((8, 16, 32), 128)
    # Overlapping objects of all sizes, whose areas are far apart for float32 as torchvision compares them.
    corners, sides = torch.rand(12, 2) * 60, torch.arange(12)[:, None] * 9.0 + torch.tensor([8.0, 11.0])
    objects = torch.cat([corners, corners + sides], 1)
    detection.FCOS.compute_loss(Spy(), [{"boxes": objects}], {}, [anchors], counts)
    assert len(seen[0].unique()) > 6
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    assert torch.equal(match_locations(objects, anchors, per_level=counts, radius=1.5), seen[0])


def test_a_location_takes_the_smallest_of_its_objects() -> None:
    anchors = torch.tensor([[46.0, 46.0, 54.0, 54.0]])
    # Of areas that float32 cannot tell apart next to 1e8.
    objects = torch.tensor([[40.0, 40.0, 60.0, 60.1], [40.0, 40.0, 60.0, 60.0], [40.0, 40.0, 60.0, 60.2]])
    assert match_locations(objects, anchors, per_level=[1], radius=1.5).tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_detector_learns_the_same_from_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(f"{kind}_fpn")
    target = random_target([[5.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 30.0], [20.0, 20.0, 30.0, 60.5]], (64, 96))
    image = torch.rand(3, 64, 96)
    losses = []
    for pairs_at_once in (10**9, 40):
        monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
        torch.manual_seed(1)
        with torch.no_grad():
            # Batch norm computes with the batch alone; only its running statistics move.
            losses.append(model([image], [target]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["ious", "locations"])
def test_memory_does_not_grow_with_the_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 2**16)
    objects, (anchors, counts) = random_boxes(500), grid((1, 2, 4), 100)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Watch():
        if kind == "ious":
            ChunkedMatcher(0.7, 0.3, allow_low_quality_matches=True)(BoxPairs(objects, anchors))
        else:
            match_locations(objects, anchors, per_level=counts, radius=1.5)
    product = 4 * len(objects) * len(anchors)
    assert largest < product / 20
