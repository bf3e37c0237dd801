"""Every rule with a threshold, on values that lie exactly on it and on the next ones of either side."""

import numpy as np
import pytest
import torch
from torch import Tensor

from a2fpn.heads import (
    BoxPairs,
    ChunkedMatcher,
    PostprocessConfig,
    StrideRoIAlign,
    match_locations,
    matching,
    soft_nms,
    suppress,
)
from a2fpn.heads.dense import LevelOutputs, dense_detections
from a2fpn.heads.postprocess import box_detections
from a2fpn.inference.tiling import SAME, TileDetections, merge_tiles

SQUARE, HALF = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]  # IoU of exactly 0.5
JUST = 1e-5  # far above rounding of the numbers here, far below what a rule is about


@pytest.mark.parametrize("pairs_at_once", [1, 10**6])
@pytest.mark.parametrize(
    ("high", "low", "match"),
    [
        (0.5, 0.5, 0),
        (0.5, 0.3, 0),
        (0.5 + JUST, 0.5, -2),
        (0.5 + JUST, 0.5 + JUST, -1),
        (0.5 - JUST, 0.3, 0),
        (0.7, 0.5 - JUST, -2),
    ],
)
def test_a_match_begins_at_the_high_threshold_and_background_ends_at_the_low_one(
    pairs_at_once: int, high: float, low: float, match: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    pairs = BoxPairs(torch.tensor([SQUARE]), torch.tensor([HALF, [50.0, 50.0, 60.0, 60.0]]))
    assert ChunkedMatcher(high, low)(pairs).tolist() == [match, -1]


@pytest.mark.parametrize("pairs_at_once", [1, 10**6])
@pytest.mark.parametrize(
    ("side", "found"),
    [(8.0, [0, -1]), (64.0 - JUST, [0, -1]), (64.0, [-1, -1]), (64.0 + JUST, [-1, 0]), (500.0, [-1, 0])],
)
def test_a_location_is_matched_strictly_between_four_and_eight_strides(
    pairs_at_once: int, side: float, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the strides 8 and 16: the finest level has no lower end, the coarsest no upper one."""
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    anchors = torch.tensor([[-4.0, -4.0, 4.0, 4.0], [-8.0, -8.0, 8.0, 8.0]])
    objects = torch.tensor([[-side, -1.0, side, 1.0]])
    assert match_locations(objects, anchors, per_level=[1, 1], radius=1.5).tolist() == found


@pytest.mark.parametrize(("offset", "found"), [(12.0 - JUST, 0), (12.0, -1), (12.0 + JUST, -1)])
def test_a_location_is_matched_within_the_radius(offset: float, found: int) -> None:
    objects = torch.tensor([[offset - 20, -20.0, offset + 20, 20.0]])
    anchors = torch.tensor([[-4.0, -4.0, 4.0, 4.0]])
    assert match_locations(objects, anchors, per_level=[1], radius=1.5).tolist() == [found]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [None, "linear", "gaussian"])
@pytest.mark.parametrize("head", ["two-stage", "one-stage"])
def test_a_score_on_the_threshold_is_dropped(
    head: str, kind: str | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: ahead)
    rule = PostprocessConfig(score_threshold=0.25, soft_nms=kind)
    above = float(torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)))
    boxes = torch.arange(3.0)[:, None] * 20 + torch.tensor(SQUARE)
    scores = torch.tensor([[0.25], [above], [0.125]])
    if head == "two-stage":
        both = torch.cat([1 - scores, scores], 1)
        images = torch.zeros(3, dtype=torch.int64)
        detections = box_detections(boxes[:, None].repeat(1, 2, 1), both, images, [(99, 99)], rule, count=1)
    else:
        level = LevelOutputs(scores[None], torch.zeros(1, 3, 4), boxes.__getitem__)
        detections = dense_detections([level], lambda _, own: own, [(99, 99)], rule=rule, candidates_per_level=9)
    assert detections["scores"].tolist() == [above]
    assert detections["boxes"].tolist() == [boxes[1].tolist()]


def overlapping() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([SQUARE, HALF]), torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("threshold", "scores"), [(0.5 - JUST, [1.0]), (0.5, [1.0, 0.5]), (0.5 + JUST, [1.0, 0.5])])
def test_nms_removes_above_its_threshold(threshold: float, scores: list[float]) -> None:
    assert suppress(*overlapping(), PostprocessConfig(nms_threshold=threshold))[1].tolist() == scores


@pytest.mark.parametrize(
    ("threshold", "scores"), [(0.5 - JUST, [1.0, 0.25]), (0.5, [1.0, 0.25]), (0.5 + JUST, [1.0, 0.5])]
)
def test_linear_soft_nms_lowers_from_its_threshold_on(threshold: float, scores: list[float]) -> None:
    assert soft_nms(*overlapping(), kind="linear", iou_threshold=threshold)[1].tolist() == scores


@pytest.mark.parametrize(("least", "number"), [(0.25 - JUST, 2), (0.25, 1)])
def test_a_score_lowered_to_the_threshold_is_dropped(least: float, number: int) -> None:
    rule = PostprocessConfig(score_threshold=least, soft_nms="linear")
    assert len(suppress(*overlapping(), rule)[1]) == number


@pytest.mark.parametrize(
    ("side", "stride"),
    [
        (112, 8),
        (223.9995, 8),  # log2 lower by 3e-6
        (223.99995, 16),  # by 3e-7, less than the constant of 1e-6 adds: what rounding may take off a box of 224
        (223.99998, 16),
        (224, 16),
        (224.00002, 16),
        (447.999, 16),
        (447.9999, 32),
        (448, 32),
    ],
)
def test_the_level_of_a_box_at_the_canonical_size(side: float, stride: int) -> None:
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    (level,) = StrideRoIAlign(strides, 7).assign_levels(torch.tensor([[0.0, 0.0, side, side]])).tolist()
    assert list(strides.values())[level] == stride


@pytest.mark.parametrize(("height", "number"), [(10 + JUST, 1), (10.0, 1), (10 - 1e-4, 2)])
def test_detections_of_two_tiles_are_one_object_from_half_on(height: float, number: int) -> None:
    """Two whole boxes, 12 wide, of which one is 20 high and covers the other: their IoU is ``height / 20``."""
    tiles = [
        TileDetections(window, np.array([box], dtype=np.float32), np.float32([score]), np.array([0]))
        for window, box, score in (
            ((0, 0, 100, 100), [84, 10, 96, 30], 0.6),
            ((80, 0, 180, 100), [84, 10, 96, 10 + height], 0.7),
        )
    ]
    assert SAME == 0.5
    assert len(merge_tiles(tiles, (100, 180)).scores) == number
