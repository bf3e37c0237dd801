"""Hybrid Task Cascade: interleaving, mask information flow, the semantic branch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import a2fpn
from a2fpn.detectors import RCNN
from a2fpn.heads.htc import SEMANTIC, things_map
from a2fpn.masks import InstanceMasks
from tests.helpers import random_target, tiny_model, with_zero_gradient, without_gradient

SIZE = (64, 96)
BOXES = [[8.0, 8.0, 40.0, 50.0], [30.0, 20.0, 90.0, 60.0]]
SEMANTIC_OPTIONS = {"semantic_channels": 8, "semantic_layers": 2, "semantic_classes": 7}


def htc(semantic: str | bool, **options: object) -> RCNN:
    return tiny_model("htc_fpn", semantic=semantic, **SEMANTIC_OPTIONS, **options)


def target(boxes: list[list[float]], semantic: Tensor | None = None) -> dict[str, Tensor]:
    extra = {} if semantic is None else {"semantic": semantic}
    return random_target(boxes, SIZE) | extra


@pytest.mark.parametrize("boxes", [BOXES, []], ids=["objects", "empty"])
@pytest.mark.parametrize("semantic", ["things", "stuff"])
def test_the_semantic_branch_has_a_loss_and_reaches_every_parameter(semantic: str, boxes: list[list[float]]) -> None:
    model = htc(semantic)
    targets = [target(boxes, torch.full(SIZE, 255, dtype=torch.uint8))] * 2
    losses = model([torch.rand(3, *SIZE)] * 2, targets)
    assert "loss_semantic" in losses
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_semantic"] == 0) == (semantic == "stuff")  # every pixel of the map is ignored
    sum(losses.values()).backward()
    assert without_gradient(model) == []


def test_by_default_there_is_no_semantic_branch() -> None:
    model = tiny_model("htc_fpn")
    assert model.config.heads.semantic is False
    assert model.roi_heads.semantic is None
    assert "loss_semantic" not in model([torch.rand(3, *SIZE)], [target(BOXES)])


def test_the_semantic_target_is_the_nearest_pixel_at_stride_8() -> None:
    model = htc("stuff", semantic_loss_weight=0.5)
    semantic = torch.randint(0, 7, (61, 90), dtype=torch.uint8)
    logits = torch.randn(1, 7, 8, 12)
    wanted = torch.full((1, 8, 12), 255)
    for row in range(8):
        for column in range(12):
            y, x = int((row + 0.5) * 61 / 8), int((column + 0.5) * 90 / 12)
            wanted[0, row, column] = semantic[y, x]
    loss = model.roi_heads._semantic_loss(logits, [{SEMANTIC: semantic}], [(61, 90)])
    assert loss.item() == pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-5)
    # Padding is not learned from: of the second image only 3 x 4 pixels count.
    two = model.roi_heads._semantic_loss(
        torch.cat([logits, logits]), [{SEMANTIC: semantic}, {SEMANTIC: semantic[:24, :32]}], [(61, 90), (24, 32)]
    )
    cut = torch.full((1, 8, 12), 255)
    cut[0, :3, :4] = semantic[4:24:8, 4:32:8]
    both = F.cross_entropy(torch.cat([logits, logits]), torch.cat([wanted, cut]), ignore_index=255)
    assert two.item() == pytest.approx(both.item(), rel=1e-5)


def test_things_are_painted_small_over_large() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    masks[0, 1:3, 1:3], masks[1], masks[2, 1, 1] = 1, 1, 1
    painted = things_map(InstanceMasks.from_dense(masks), torch.tensor([5, 1, 3]))
    assert painted.tolist() == [[1, 1, 1, 1], [1, 3, 5, 1], [1, 5, 5, 1], [1, 1, 1, 1]]
    assert things_map(InstanceMasks.from_dense(masks[:0]), torch.zeros(0, dtype=torch.long)).tolist() == [[0] * 4] * 4


def test_mask_features_flow_from_stage_to_stage_for_the_same_boxes() -> None:
    heads = tiny_model("htc_fpn").roi_heads
    x = torch.randn(2, 16, 14, 14)
    first, second, third = (stage.mask_head for stage in heads.stages)
    flow = [module[0] for module in heads.mask_flow]
    one = first(x)
    two = second(x + flow[0](one).relu())
    three = third(x + flow[1](two).relu())
    assert [module.kernel_size for module in flow] == [(1, 1), (1, 1)]
    for index, expected in enumerate((one, two, three)):
        torch.testing.assert_close(heads.training_mask_features(index, x), expected)


@pytest.mark.parametrize(("name", "shift"), [("cascademaskrcnn", 0.0), ("htc", 0.2)])
def test_a_stage_of_htc_trains_its_mask_head_on_the_boxes_it_refined(
    name: str, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(f"{name}_fpn")
    stage = model.roi_heads.stages[0]
    stage.proposal_matcher.high_threshold = stage.proposal_matcher.low_threshold = 0.0  # every box is positive
    stage.fg_bg_sampler.positive_fraction = 1.0
    with torch.no_grad():
        stage.box_predictor.bbox_pred.weight.zero_()
        stage.box_predictor.bbox_pred.bias.copy_(torch.tensor([2.0, 0, 0, 0]))  # a fifth of a box's width
    seen: list[Tensor] = []
    monkeypatch.setattr(
        model.roi_heads,
        "_mask_loss",
        lambda index, _, positives, *__: seen.append(positives.boxes[0]) or torch.zeros(()),
    )
    batch = model.preprocess([torch.rand(3, *SIZE)])
    inner = target(BOXES)
    proposals = torch.tensor([[10.0, 10, 30, 30], [40, 20, 60, 50]])
    model.roi_heads.losses(model.features(batch), [proposals], [SIZE], [inner | {"labels": inner["labels"] + 1}])
    expected = proposals + shift * (proposals[:, 2:3] - proposals[:, :1]) * torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(seen[0], torch.cat([expected, inner["boxes"]]))


@pytest.mark.parametrize("kind", ["box_roi_pool", "mask_roi_pool"])
def test_semantic_features_are_added_to_those_of_the_pyramid(kind: str) -> None:
    model = htc("things").eval()
    batch = model.preprocess([torch.rand(3, *SIZE)])
    boxes = [torch.tensor(BOXES)]
    pool = getattr(model.roi_heads.stages[1], kind)
    with torch.no_grad():
        features = model.features(batch)
        embedding, logits = model.roi_heads.semantic(features)
        pooled = pool({**features, SEMANTIC: embedding}, boxes)
        context = pool.semantic({SEMANTIC: embedding}, boxes)
    assert embedding.shape == (1, 16, 8, 12)
    assert logits.shape == (1, 4, 8, 12)
    if kind == "box_roi_pool":
        context = F.avg_pool2d(context, 2)
    torch.testing.assert_close(pooled, pool.pyramid(features, boxes) + context)
    assert context.any()


def test_every_part_of_the_flow_and_the_branch_learns() -> None:
    model = htc("stuff")
    semantic = torch.randint(0, 7, SIZE, dtype=torch.uint8)
    sum(model([torch.rand(3, *SIZE)], [target(BOXES, semantic)]).values()).backward()
    assert with_zero_gradient(model.roi_heads.mask_flow) == []
    assert with_zero_gradient(model.roi_heads.semantic) == []


@pytest.mark.parametrize("semantic", ["things", "stuff"])
def test_a_checkpoint_with_a_semantic_branch(semantic: str, tmp_path: Path) -> None:
    model = htc(semantic).eval()
    again = a2fpn.from_pretrained(a2fpn.save_pretrained(model, tmp_path))
    assert again.config == model.config
    image = torch.rand(3, *SIZE)
    with torch.no_grad():
        (a,), (b,) = model([image]), again([image])
    assert all(torch.equal(a[key], b[key]) for key in a)
    wider = a2fpn.from_pretrained(tmp_path, num_classes=5).roi_heads.semantic.logits.out_channels
    assert wider == (6 if semantic == "things" else 7)


@pytest.mark.parametrize(
    ("semantic", "message"),
    [
        (None, r"image_id 4: htc with semantic='stuff' trains on a map semantic .* got none\. .*'things' or False"),
        (torch.zeros(3, 3, dtype=torch.uint8), r"semantic \(H, W\) = \(64, 96\), got \(3, 3\)"),
        (
            torch.full(SIZE, 7, dtype=torch.uint8),
            r"image_id 4: semantic has the classes \[7\], expected 0\.\.6 and 255",
        ),
    ],
)
def test_a_stuff_map_that_does_not_fit_is_an_error(semantic: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        htc("stuff")([torch.rand(3, *SIZE)], [target(BOXES, semantic) | {"image_id": 4}])


def test_an_unknown_kind_of_map_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of False, 'things', 'stuff', got 'all'"):
        htc("all")


def test_scores_are_averages_of_logits_as_in_its_own_code() -> None:
    assert tiny_model("htc_fpn").roi_heads.rules.average == "logits"
    assert tiny_model("cascademaskrcnn_fpn").roi_heads.rules.average == "probabilities"


@pytest.mark.parametrize("option", [{"stage_masks": "first"}, {"stage_resampling": False}])
def test_every_stage_samples_anew_and_has_a_mask_head(option: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match="HTC resamples proposals and has a mask head in every stage: expected stage_masks='all'"
    ):
        tiny_model("htc_fpn", **option)
