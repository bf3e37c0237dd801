"""Cascade R-CNN and Cascade Mask R-CNN."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

import a2fpn
from a2fpn._serialize import from_dict, to_dict
from a2fpn.config import CascadeConfig, ModelConfig, RCNNConfig, heads_type
from a2fpn.heads.cascade import CascadeRoIHeads, _box_losses, _label, _refine_samples
from a2fpn.heads.roi_heads import Samples
from tests.helpers import random_target, tiny_model, without_gradient

NAMES = ["cascadercnn", "cascademaskrcnn", "htc"]
BOX_LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SIZE = (64, 96)
BOXES = [[8.0, 8.0, 40.0, 50.0], [30.0, 20.0, 90.0, 60.0]]


def losses_of(model: a2fpn.detectors.RCNN, boxes: list[list[float]]) -> dict[str, torch.Tensor]:
    return model([torch.rand(3, *SIZE)] * 2, [random_target(boxes, SIZE), random_target([], SIZE)])


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_as_published(name: str) -> None:
    model = tiny_model(f"{name}_fpn")
    stages = model.roi_heads.stages
    assert [s.proposal_matcher.high_threshold for s in stages] == [0.5, 0.6, 0.7]
    assert [s.proposal_matcher.low_threshold for s in stages] == [0.5, 0.6, 0.7]
    assert [s.box_coder.weights for s in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert model.roi_heads.rules.loss_weights == (1, 0.5, 0.25)
    assert all(s.box_roi_pool.aligned for s in stages)
    assert {s.box_predictor.bbox_pred.out_features for s in stages} == {4}
    assert {s.box_predictor.cls_score.out_features for s in stages} == {4}
    pointers = [p.data_ptr() for p in model.roi_heads.parameters()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("boxes", [BOXES, []], ids=["objects", "empty"])
def test_losses_have_one_set_of_keys_and_reach_every_parameter(name: str, boxes: list[list[float]]) -> None:
    model = tiny_model(f"{name}_fpn")
    losses = losses_of(model, boxes)
    assert set(losses) == (BOX_LOSSES | {"loss_mask"} if model.has_masks else BOX_LOSSES)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_last_stage_without_positives_changes_nothing_of_the_contract(name: str) -> None:
    model = tiny_model(f"{name}_fpn")
    stage = model.roi_heads.stages[-1]
    stage.proposal_matcher.high_threshold = stage.proposal_matcher.low_threshold = 1.5
    losses = losses_of(model, BOXES)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert not stage.box_predictor.bbox_pred.weight.grad.any()


def test_no_sample_at_all_gives_zero_losses() -> None:
    logits, deltas = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    empty = torch.zeros(0, 4)
    losses = _box_losses(
        logits, deltas, Samples([empty], [empty[:, 0].long()], [empty[:, 0].long()], [empty]), beta=1.0
    )
    assert {name: loss.item() for name, loss in losses.items()} == {"loss_classifier": 0, "loss_box_reg": 0}


def test_training_boxes_are_refined_without_gradient_objects_and_degenerate_boxes() -> None:
    stage = tiny_model("cascadercnn_fpn").roi_heads.stages[0]
    boxes = torch.tensor([[0.0, 0, 20, 20], [4, 4, 24, 24], [40, 40, 60, 60], [10, 10, 30, 30]])
    deltas = torch.zeros(4, 4, requires_grad=True)
    with torch.no_grad():
        deltas[0, 0] = 10 * 0.5  # the box coder's factor times half a width
        deltas[2, 0] = 10 * 10.0  # moved out of the image
    samples = Samples(
        [boxes],
        [torch.tensor([0, 0, 0, 0])],
        [torch.tensor([0, 1, 0, 1])],
        [torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])],
    )
    (refined,) = _refine_samples(stage, deltas, samples, [(64, 64)], objects=False)
    assert refined.tolist() == [[10, 0, 30, 20], [10, 10, 30, 30]]
    assert not refined.requires_grad


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_scores_and_masks_are_averaged_over_the_stages(average: str) -> None:
    model = tiny_model("cascademaskrcnn_fpn", stage_average=average).eval()
    heads = model.roi_heads
    batch = model.preprocess([torch.rand(3, *SIZE)])
    with torch.no_grad():
        for stage in heads.stages:
            stage.box_predictor.cls_score.weight.mul_(20)
        features = model.features(batch)
        proposals, _ = model.rpn(ImageList(batch.tensor, batch.sizes), features)
        (found,) = heads.detect(features, proposals, batch.sizes)
        boxes, scores, masks = proposals, [], []
        for stage in heads.stages:
            logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes)))
            scores.append(logits.softmax(1) if average == "probabilities" else logits)
            used, boxes = boxes, [stage.box_coder.decode(deltas, boxes)[:, 0]]
            boxes = [torch.stack([boxes[0][:, i].clamp(0, SIZE[1 - i % 2]) for i in range(4)], 1)]
            x = stage.mask_head(stage.mask_roi_pool(features, [found["boxes"]]))
            masks.append(stage.mask_predictor(x)[range(len(x)), found["labels"]].sigmoid())
    assert used[0].shape == proposals[0].shape
    mean = sum(scores) / 3
    mean = mean if average == "probabilities" else mean.softmax(1)
    assert found["scores"][0] == pytest.approx(mean[:, 1:].max().item(), abs=1e-6)
    assert found["masks"].shape[1:] == (1, 28, 28)
    torch.testing.assert_close(found["masks"][:, 0], sum(masks) / 3)
    # Every box found is one that the last stage gave.
    distance = (found["boxes"][:, None] - boxes[0][None]).abs().amax(-1).amin(1)
    assert distance.max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_results_keep_the_contract(name: str) -> None:
    model = tiny_model(f"{name}_fpn").eval()
    with torch.no_grad():
        (result,) = model([torch.rand(3, 50, 70)])
    count = len(result["boxes"])
    assert count
    assert set(result) == {"boxes", "scores", "labels"} | ({"masks"} if model.has_masks else set())
    assert 0 <= result["labels"].min() <= result["labels"].max() <= 2
    assert (result["scores"].diff() <= 0).all()
    if model.has_masks:
        assert result["masks"].shape == (count, 1, 50, 70)


@pytest.mark.parametrize("name", NAMES)
def test_no_proposal_gives_no_detection(name: str) -> None:
    model = tiny_model(f"{name}_fpn", rpn_score_threshold=1.0).eval()
    with torch.no_grad():
        (result,) = model([torch.rand(3, *SIZE)])
    assert result["boxes"].shape == (0, 4)
    if model.has_masks:
        assert result["masks"].shape == (0, 1, *SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same_detections(name: str, tmp_path: Path) -> None:
    model = tiny_model(f"{name}_fpn").eval()
    again = a2fpn.from_pretrained(a2fpn.save_pretrained(model, tmp_path))
    assert again.config == model.config
    assert isinstance(again.config.heads, heads_type(name))
    image = torch.rand(3, *SIZE)
    with torch.no_grad():
        (a,), (b,) = model([image]), again([image])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_number_of_classes_renews_only_what_depends_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = a2fpn.save_pretrained(tiny_model("cascademaskrcnn_fpn"), tmp_path)
    model = a2fpn.from_pretrained(folder, num_classes=5)
    assert model.roi_heads.stages[2].box_predictor.cls_score.out_features == 6
    renewed = re.findall(r"roi_heads\S+weight", caplog.text)
    assert len(renewed) == 6
    assert not any("bbox_pred" in name for name in renewed)


@pytest.mark.parametrize(("name", "instead"), [("cascademaskrcnn", "cascadercnn"), ("htc", "cascadercnn")])
def test_missing_masks_are_an_error_that_names_the_box_detector(name: str, instead: str) -> None:
    target = random_target(BOXES, SIZE)
    del target["masks"]
    with pytest.raises(ValueError, match=rf"{name} trains on masks .* got none. Without masks use {instead}\."):
        tiny_model(f"{name}_fpn")([torch.rand(3, *SIZE)], [target])


def test_anchors_and_heads_are_float32_under_autocast() -> None:
    model = tiny_model("cascademaskrcnn_fpn").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (result,) = model([torch.rand(3, *SIZE)])
    assert {x.dtype for key, x in result.items() if key != "labels"} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_ious": (0.5, 0.6)}, "Every stage needs an IoU"),
        ({"stage_ious": (), "stage_box_weights": (), "stage_loss_weights": ()}, "Every stage needs an IoU"),
        ({"stage_box_weights": ((10.0,),) * 3}, "stage_box_weights must be four numbers"),
        ({"box_fg_iou": 0.4}, r"box_fg_iou=0\.4 is unused by a cascade; set stage_ious"),
        ({"box_loss_beta": -1.0}, r"box_loss_beta must be 0 or more, got -1\.0"),
        ({"box_loss_beta": math.nan}, r"box_loss_beta must be 0 or more, got nan"),
        ({"stage_average": "scores"}, r"expected one of 'probabilities', 'logits', got 'scores'"),
    ],
)
def test_stages_that_do_not_fit_are_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model("cascadercnn_fpn", **options)


def test_one_stage_is_possible() -> None:
    options = {"stage_ious": [0.5], "stage_box_weights": [[10, 10, 5, 5]], "stage_loss_weights": [1]}
    losses = losses_of(tiny_model("cascademaskrcnn_fpn", **options), BOXES)
    assert all(loss.isfinite() for loss in losses.values())


def test_heads_of_another_detector_are_an_error() -> None:
    config = tiny_model("cascadercnn_fpn").config
    with pytest.raises(TypeError, match=r"heads of 'cascadercnn' are described by CascadeConfig, got RCNNConfig"):
        dataclasses.replace(config, heads=RCNNConfig())
    with pytest.raises(ValueError, match="unknown key 'stage_ious' for RCNNConfig"):
        from_dict(ModelConfig, to_dict(config) | {"detector": "fasterrcnn"})
    with pytest.raises(ValueError, match="Unknown argument 'stage_ious'"):
        tiny_model("fasterrcnn_fpn", stage_ious=[0.5])
    assert isinstance(config.heads, CascadeConfig)


def test_losses_are_weighted_sums_over_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("cascadercnn_fpn")
    monkeypatch.setattr(
        "a2fpn.heads.cascade._box_losses",
        lambda *_, **__: {"loss_classifier": torch.tensor(4.0), "loss_box_reg": torch.tensor(8.0)},
    )
    losses = losses_of(model, BOXES)
    assert isinstance(model.roi_heads, CascadeRoIHeads)
    assert losses["loss_classifier"] == 4 * 1.75
    assert losses["loss_box_reg"] == 8 * 1.75


def test_one_mask_head_serves_all_stages() -> None:
    model = tiny_model("cascademaskrcnn_fpn", stage_masks="first")
    assert [stage.has_mask() for stage in model.roi_heads.stages] == [True, False, False]
    assert not [name for name in model.state_dict() if re.search(r"stages\.[12]\.mask", name)]
    losses = losses_of(model, BOXES)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    heads = model.eval().roi_heads
    with torch.no_grad():
        batch = model.preprocess([torch.rand(3, *SIZE)])
        features = model.features(batch)
        proposals, _ = model.rpn(ImageList(batch.tensor, batch.sizes), features)
        (found,) = heads.detect(features, proposals, batch.sizes)
        stage = heads.stages[0]
        masks = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, [found["boxes"]]))).sigmoid()
    torch.testing.assert_close(found["masks"][:, 0], masks[range(len(masks)), found["labels"]])


@pytest.mark.parametrize("resample", [True, False])
def test_later_stages_sample_anew_or_keep_the_first_sample(resample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("cascadercnn_fpn", stage_resampling=resample, box_positive_fraction=1.0)
    heads = model.roi_heads
    seen: list[torch.Tensor] = []
    for stage in heads.stages:
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        pool = stage.box_roi_pool.forward
        monkeypatch.setattr(
            stage.box_roi_pool, "forward", lambda x, boxes, sizes, pool=pool: seen.append(boxes[0]) or pool(x, boxes)
        )
    with torch.no_grad():
        heads.stages[0].box_predictor.bbox_pred.bias.copy_(torch.tensor([1.0, 0, 0, 0]))  # a tenth of a width
        heads.stages[1].box_predictor.bbox_pred.bias.zero_()
    proposals = torch.tensor([[4.0, 4, 24, 24], [10, 10, 40, 30], [40, 20, 60, 50]])
    target = random_target(BOXES, SIZE)
    target["labels"] += 1
    features = model.features(model.preprocess([torch.rand(3, *SIZE)]))
    losses = heads.losses(features, [proposals], [SIZE], [target])
    assert all(loss.isfinite() for loss in losses.values())
    moved = torch.cat([proposals, target["boxes"]])
    moved[:, ::2] += (moved[:, 2:3] - moved[:, :1]) / 10
    moved[:, ::2].clamp_(max=SIZE[1])
    if resample:
        moved[-len(BOXES) :] = target["boxes"]
    torch.testing.assert_close(seen[1], moved)
    torch.testing.assert_close(seen[2], moved)


def test_boxes_are_labeled_by_the_stages_own_iou() -> None:
    stages = tiny_model("cascadercnn_fpn").roi_heads.stages
    target = {"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([2])}
    boxes = torch.tensor([[0.0, 0, 20, 13], [0, 0, 20, 15], [50, 50, 60, 60]])  # IoU 0.65, 0.75, 0
    labels = [_label(stage, [boxes], [target]).labels[0].tolist() for stage in stages]
    assert labels == [[2, 2, 0], [2, 2, 0], [0, 2, 0]]
    empty = _label(stages[0], [boxes], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}])
    assert empty.labels[0].tolist() == [0, 0, 0]
    assert _label(stages[1], [boxes], [target]).deltas[0][1, 3].item() == pytest.approx(10 * math.log(20 / 15))


def test_gradients_into_the_pyramid_are_divided_by_the_number_of_stages() -> None:
    model = tiny_model("cascadercnn_fpn")
    target = random_target(BOXES, SIZE)
    target["labels"] += 1
    batch = model.preprocess([torch.rand(3, *SIZE)])
    gradients, totals = [], []
    for scale in (False, True):
        heads = tiny_model("cascadercnn_fpn", scale_gradients=scale).roi_heads
        heads.load_state_dict(model.roi_heads.state_dict())
        features = {name: x.detach().requires_grad_() for name, x in model.features(batch).items()}
        torch.manual_seed(0)
        total = sum(heads.losses(features, [target["boxes"] + 1], [SIZE], [target]).values())
        total.backward()
        totals.append(total.item())
        gradients.append((features["p2"].grad, heads.stages[2].box_head.fc6.weight.grad))
    assert totals[0] == totals[1]
    assert gradients[0][0].any()
    torch.testing.assert_close(gradients[1][0], gradients[0][0] / 3)
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


def test_with_beta_0_the_box_loss_is_plain_l1() -> None:
    deltas, wanted = torch.randn(5, 4), torch.randn(5, 4)
    samples = Samples([deltas], [torch.zeros(5).long()], [torch.tensor([1, 0, 2, 0, 1])], [wanted])
    losses = {beta: _box_losses(torch.randn(5, 4), deltas, samples, beta=beta)["loss_box_reg"] for beta in (0.0, 1.0)}
    assert losses[0.0].item() == pytest.approx((deltas - wanted)[[0, 2, 4]].abs().sum().item() / 5)
    assert losses[1.0] < losses[0.0]
