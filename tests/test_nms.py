"""Thresholds, NMS and soft-NMS, and that every detector takes them from one place."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms

from a2fpn.detectors import DETECTORS
from a2fpn.heads import DetectionRoIHeads, PostprocessConfig, soft_nms, suppress
from a2fpn.heads.postprocess import box_detections
from a2fpn.heads.roi_pool import join_rois
from tests.helpers import randomize, tiny_model


def candidates(number: int, seed: int = 0, *, classes: int = 2, side: float = 40.0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap a lot, different scores, labels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * side
    boxes = torch.cat([corner, corner + 5 + torch.rand(number, 2, generator=generator) * side], 1)
    scores = torch.randperm(number, generator=generator).add(1) / (number + 1)
    return boxes, scores, torch.randint(classes, (number,), generator=generator)


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def by_the_paper(
    boxes: Tensor, scores: Tensor, labels: Tensor, kind: str, threshold: float, sigma: float, least: float
) -> list[tuple[int, float]]:
    """Figure 2 of Bodla et al., class by class, in plain Python."""
    taken = []
    for label in set(labels.tolist()):
        left = {i: float(scores[i]) for i in torch.where(labels == label)[0].tolist()}
        while left:
            best = max(left, key=lambda i: left[i])
            taken.append((best, left.pop(best)))
            for i in left:
                iou = overlap(boxes[best].tolist(), boxes[i].tolist())
                if kind == "gaussian":
                    left[i] *= math.exp(-(iou**2) / sigma)
                elif iou >= threshold:
                    left[i] *= 1 - iou
    return sorted((pair for pair in taken if pair[1] > least), key=lambda pair: -pair[1])


@settings(deadline=None, max_examples=40)
@given(
    number=st.integers(0, 30),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["linear", "gaussian"]),
    threshold=st.sampled_from([0.0, 0.3, 0.7]),
    sigma=st.sampled_from([0.1, 0.5]),
    least=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_soft_nms_is_that_of_the_paper(
    number: int, seed: int, kind: str, threshold: float, sigma: float, least: float
) -> None:
    boxes, scores, labels = candidates(number, seed)
    expected = by_the_paper(boxes, scores, labels, kind, threshold, sigma, least)
    kept, lowered = soft_nms(
        boxes, scores, labels, kind=kind, iou_threshold=threshold, sigma=sigma, score_threshold=least
    )
    torch.testing.assert_close(lowered, torch.tensor([score for _, score in expected]), rtol=1e-4, atol=1e-5)
    assert set(kept.tolist()) == {row for row, _ in expected}
    assert (lowered.diff() <= 0).all()
    assert lowered.dtype == scores.dtype


def test_the_limit_takes_the_best() -> None:
    every, lowered = soft_nms(*candidates(40), kind="gaussian")
    kept, best = soft_nms(*candidates(40), kind="gaussian", limit=7)
    assert torch.equal(kept, every[:7])
    assert torch.equal(best, lowered[:7])


def test_soft_nms_changes_no_input() -> None:
    boxes, scores, labels = candidates(10)
    before = scores.clone()
    soft_nms(boxes, scores, labels, kind="linear")
    assert torch.equal(scores, before)


@pytest.mark.parametrize("limit", [3, 100])
def test_without_soft_nms_it_is_the_nms_of_torchvision(limit: int) -> None:
    boxes, scores, labels = candidates(60)
    rule = PostprocessConfig(nms_threshold=0.4, detections_per_image=limit)
    kept, best = suppress(boxes, scores, labels, rule)
    expected = batched_nms(boxes, scores, labels, 0.4)[:limit]
    assert torch.equal(kept, expected)
    assert torch.equal(best, scores[expected])


def test_soft_nms_keeps_what_nms_removes_with_a_lower_score() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert len(suppress(boxes, scores, labels, PostprocessConfig())[0]) == 1
    for kind, expected in (("linear", 0.8 * 0.2), ("gaussian", 0.8 * math.exp(-(0.8**2) / 0.5))):
        kept, lowered = suppress(boxes, scores, labels, PostprocessConfig(soft_nms=kind))
        assert kept.tolist() == [0, 1]
        torch.testing.assert_close(lowered, torch.tensor([0.9, expected]))
    # Another class is none of its business.
    assert (
        suppress(boxes, scores, torch.tensor([0, 1]), PostprocessConfig(soft_nms="linear"))[1].tolist()
        == scores.tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, r"score_threshold must be between 0 and 1, got 1\.5"),
        ({"nms_threshold": float("nan")}, "nms_threshold must be between 0 and 1, got nan"),
        ({"detections_per_image": 0}, "detections_per_image must be at least 1, got 0"),
        ({"soft_nms": "soft"}, "soft_nms must be one of linear, gaussian or None, got 'soft'"),
        ({"soft_nms_sigma": 0.0}, r"soft_nms_sigma must be above 0, got 0\.0"),
    ],
)
def test_values_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostprocessConfig(**options)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_the_heads_post_process_as_torchvision_does(threshold: float) -> None:
    heads = tiny_model("fasterrcnn_fpn", score_threshold=threshold).roi_heads
    assert isinstance(heads, DetectionRoIHeads)
    proposals = [candidates(20, seed)[0] for seed in (1, 2)]
    arguments = (torch.randn(40, 4), torch.randn(40, 16), proposals, [(60, 50), (70, 80)])
    logits, deltas, _, sizes = arguments
    rois = join_rois(proposals)
    boxes = heads.box_coder.decode_single(deltas, rois[:, 1:]).view(40, 4, 4)
    found = box_detections(boxes, logits.softmax(1), rois[:, 0].long(), sizes, heads.rule, count=2)
    expected = RoIHeads.postprocess_detections(heads, *arguments)
    for name, column in zip(("boxes", "scores", "labels"), expected, strict=True):
        assert torch.equal(found[name], torch.cat(column))
    assert found["images"].bincount().tolist() == [len(own) for own in expected[0]]


def detect(model: torch.nn.Module, **changes: object) -> dict[str, Tensor]:
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model([image], paste_masks=False, rule=dataclasses.replace(model.rule, **changes))[0]


@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_detector_takes_the_rule(name: str) -> None:
    torch.manual_seed(0)
    one_stage = name in ("retinanet", "fcos")
    overrides = {"neck_args": {"extra_levels": 0}} if one_stage else {}
    if name != "fcos":
        overrides["anchor_sizes"] = [[s] * (3 if name == "retinanet" else 1) for s in (8, 16, 32, 64, 128)]
    model = tiny_model(f"{name}_fpn", **overrides).eval()
    randomize(model)  # fresh one-stage heads give boxes that hardly overlap, all with one score
    plain = detect(model)
    assert len(plain["scores"]) == 10
    assert len(detect(model, detections_per_image=4)["scores"]) == 4
    middle = float(plain["scores"].median())
    assert len(detect(model, score_threshold=middle)["scores"]) == int((plain["scores"] > middle).sum())
    everything = {"nms_threshold": 1.0, "detections_per_image": 10_000}
    assert len(detect(model, **everything)["scores"]) > len(
        detect(model, **{**everything, "nms_threshold": 0.1})["scores"]
    )
    soft = detect(model, soft_nms="gaussian", detections_per_image=10)
    assert not torch.equal(soft["scores"], plain["scores"])
    assert (soft["scores"].diff() <= 0).all()
    # The model is as it was.
    assert torch.equal(detect(model)["scores"], plain["scores"])


def test_thresholds_set_on_the_heads_count_as_with_torchvision() -> None:
    model = tiny_model("fasterrcnn_fpn").eval()
    model.roi_heads.score_thresh = 0.75
    assert model.rule.score_threshold == 0.75
    cascade = tiny_model("cascadercnn_fpn").eval()
    cascade.roi_heads.stages[-1].nms_thresh = 0.25
    assert cascade.rule.nms_threshold == 0.25
