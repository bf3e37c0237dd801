"""Equality of the batched paths of a GPU and the CPU's, which go one by one."""

import copy

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_coding
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from a2fpn.heads import StrideAnchors
from a2fpn.heads.box_coder import BoxCoder
from a2fpn.heads.cascade import Samples
from a2fpn.heads.proposals import ProposalNetwork
from a2fpn.heads.roi_heads import _box_losses_at_once
from a2fpn.heads.sampling import draw, draw_rows
from a2fpn.masks import InstanceMasks
from a2fpn.masks.paste import PASTE_RULES, paste_masks
from a2fpn.masks.targets import mask_targets
from tests.helpers import random_features, randomize, tiny_model

SIZE = (90, 120)
ALL = {"rpn_batch_size": 10**6, "rpn_positive_fraction": 1.0}


def boxes_in(size: tuple[int, int], number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    corner = torch.rand(number, 2, generator=generator) * limit * 0.8
    return torch.cat([corner, torch.minimum(corner + torch.rand(number, 2, generator=generator) * limit + 1, limit)], 1)


@pytest.mark.parametrize("rule", PASTE_RULES)
@pytest.mark.parametrize("number", [0, 1, 37])
@pytest.mark.parametrize("at_once", [2**26, 4 * 70 * 90, 1])
def test_pasted_masks(rule: str, number: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2fpn.masks.paste._PIXELS_AT_ONCE", at_once)
    size = (70, 90)
    masks, boxes = torch.rand(number, 1, 14, 14), boxes_in(size, number)
    boxes[::3] += 30  # partly, or wholly, outside
    boxes[1::5] -= 25
    boxes[2::7, 2:] = boxes[2::7, :2]  # of no size
    expected = paste_masks(masks, boxes, size, rule=rule)
    monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: True)
    torch.testing.assert_close(paste_masks(masks, boxes, size, rule=rule), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="Unknown rule"):
        paste_masks(masks, boxes, size, rule="paint")


def some_masks() -> InstanceMasks:
    """Discs, of which some touch the border, and one object without pixels."""
    rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    discs = [(rows - y) ** 2 + (columns - x) ** 2 < r**2 for x, y, r in [(20, 30, 15), (0, 0, 30), (119, 80, 25)]]
    return InstanceMasks.from_dense(torch.stack([*discs, torch.zeros(SIZE, dtype=torch.bool)]))


def test_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = some_masks()
    none = masks[torch.zeros(0, dtype=torch.int64)]
    expected = masks.dense(), none.dense()
    monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: True)
    assert torch.equal(masks.dense(), expected[0])
    assert torch.equal(none.dense(), expected[1])


@pytest.mark.parametrize("aligned", [False, True])
def test_mask_targets(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, objects = boxes_in(SIZE, 50), torch.arange(50) % 4
    boxes[0] = torch.tensor([0.0, 0, 120, 90])
    expected = mask_targets(some_masks(), boxes, objects, 28, aligned=aligned)
    monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: True)
    got = mask_targets(some_masks(), boxes, objects, 28, aligned=aligned)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def network(**overrides: object) -> tuple[ProposalNetwork, dict[str, Tensor], ImageList]:
    """Proposals of a small detector, a pyramid, and images of two sizes."""
    model = tiny_model("fasterrcnn_fpn", **(ALL | {"rpn_score_threshold": 0.0} | overrides))
    randomize(model.rpn, std=0.3)
    features = random_features(model.spec, (96, 128))
    return model.rpn, features, ImageList(torch.zeros(2, 3, 96, 128), [(96, 100), (80, 128)])


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_proposals(training: bool, threshold: float) -> None:
    rpn, features, images = network(rpn_score_threshold=threshold)
    rpn.train(training)
    rpn.min_size = 3.0  # some are too small
    targets = [{"boxes": boxes_in((80, 100), count).round()} for count in (5, 0)]
    expected, losses = rpn(images, features, targets)
    found, own = rpn.forward_at_once(images, features, targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert own.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(own[name], loss, msg=name)


def test_gradients_of_the_proposal_losses() -> None:
    rpn, features, images = network()
    twin = copy.deepcopy(rpn).train()
    targets = [{"boxes": boxes_in((80, 100), count).round()} for count in (5, 0)]
    sum(rpn.train()(images, features, targets)[1].values()).backward()
    sum(twin.forward_at_once(images, features, targets)[1].values()).backward()
    for (name, ours), theirs in zip(twin.named_parameters(), rpn.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_training_without_targets_is_an_error() -> None:
    rpn, features, images = network()
    with pytest.raises(ValueError, match="targets must be given"):
        rpn.train().forward_at_once(images, features)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (30.0, 30.0, 15.0, 15.0)])
def test_boxes_are_coded_as_torchvision_codes_them(weights: tuple[float, ...]) -> None:
    boxes, anchors = boxes_in(SIZE, 50), boxes_in(SIZE, 50, seed=1)
    ours, theirs = BoxCoder(weights), torchvision_coding.BoxCoder(weights)
    deltas = theirs.encode_single(boxes, anchors)
    assert torch.equal(ours.encode_single(boxes, anchors), deltas)
    several = torch.cat([deltas, torch.randn(50, 8) * 20], 1)
    assert torch.equal(ours.decode_single(several, anchors), theirs.decode_single(several, anchors))
    assert ours.decode_single(several[:0], anchors[:0]).shape == (0, 12)


def test_anchors_are_kept_where_making_them_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = StrideAnchors([(8,), (16,)], (1.0,), (4, 8))
    image = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
    maps = [torch.zeros(1, 1, side, side) for side in (4, 2)]
    (expected,) = anchors(image, maps)
    monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: True)
    with torch.inference_mode():
        (first,) = anchors(image, maps)
    assert torch.equal(first, expected)
    assert not first.is_inference()
    assert anchors(image, maps)[0] is first
    for side in range(2, 20):
        assert len(anchors(image, [torch.zeros(1, 1, side, side)] * 2)[0]) == 2 * side**2
    assert len(anchors._made) == 8


def test_losses_of_the_box_head() -> None:
    labels = [torch.tensor([1, 0, 2, 0]), torch.tensor([0, 0])]
    deltas = [torch.randn(4, 4), torch.full((2, 4), torch.nan)]  # against no object at all
    samples = Samples([], [], labels, deltas)
    logits, outputs = torch.randn(6, 3), torch.randn(6, 12, requires_grad=True)
    expected = fastrcnn_loss(logits, outputs, labels, deltas)
    (theirs,) = torch.autograd.grad(expected[1], outputs)
    got = _box_losses_at_once(logits, outputs, samples)
    (ours,) = torch.autograd.grad(got[1], outputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("positives", "negatives", "taken"), [(3, 50, (3, 13)), (20, 50, (4, 12)), (20, 5, (4, 5)), (0, 0, (0, 0))]
)
def test_as_many_are_drawn_as_torchvision_draws(positives: int, negatives: int, taken: tuple[int, int]) -> None:
    labels = torch.cat([torch.ones(positives), torch.zeros(negatives), torch.full((7,), -1.0)])
    labels = labels[torch.randperm(len(labels))]
    (rows,) = draw(labels[None], size=16, positive_fraction=0.25).rows()
    assert len(set(rows.tolist())) == len(rows)
    assert ((labels[rows] == 1).sum(), (labels[rows] == 0).sum()) == taken
    assert (labels[rows].diff() <= 0).all()


def test_every_candidate_is_as_likely_as_any_other() -> None:
    labels = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).expand(4000, -1)
    drawn = draw(labels, size=4, positive_fraction=0.5)
    for index, among, each in (
        (drawn.positive, range(4), 0.5),
        (drawn.negative[drawn.is_negative], range(4, 10), 1 / 3),
    ):
        shares = torch.bincount(index.flatten(), minlength=10) / 4000
        assert all(abs(float(shares[i]) - each) < 0.04 for i in among)


def test_images_may_have_different_numbers_of_candidates() -> None:
    rows = draw_rows(
        [torch.tensor([0, 1, 1]), torch.tensor([0]), torch.tensor([], dtype=torch.int64)], size=8, positive_fraction=0.5
    )
    assert [sorted(own.tolist()) for own in rows] == [[0, 1, 2], [0], []]
