import copy
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

import a2fpn
from a2fpn.detectors import DETECTORS, RCNN, Detector
from a2fpn.masks import InstanceMasks
from a2fpn.masks.paste import PASTE_RULES, paste_masks
from a2fpn.masks.targets import mask_loss
from tests.helpers import random_target, randomize, tiny_model, torchvision_names, without_gradient

MODELS = [f"{detector}_{neck}" for detector, neck in itertools.product(DETECTORS, ("fpn", "a2fpn"))]
models = pytest.mark.parametrize("name", MODELS)
every_detector = pytest.mark.parametrize("kind", list(DETECTORS))
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SIZE = (64, 96)
BOXES = [[5.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 30.0], [20.0, 20.0, 30.0, 60.5]]


def batch(*counts: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with so many objects each."""
    return [torch.rand(3, *SIZE) for _ in counts], [random_target(BOXES[:count], SIZE) for count in counts]


def lively(name: str, **overrides: Any) -> Detector:
    """A detector in evaluation mode whose detections are many and far from each other's scores."""
    torch.manual_seed(0)
    model = tiny_model(name, resize="shortest_edge", min_size=48, max_size=96, **overrides).eval()
    for part in (model.neck, *((model.rpn, model.roi_heads) if isinstance(model, RCNN) else (model.head,))):
        randomize(part)
    return model


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A lively Mask R-CNN."""
    return lively("maskrcnn_a2fpn")


def expected_losses(model: Detector) -> set[str]:
    """The losses that a detector documents, those of its neck included."""
    losses = LOSSES if isinstance(model, RCNN) else {"loss_classifier", "loss_box_reg"}
    branches = {
        "loss_mask": model.has_masks,
        "loss_keypoint": "keypoints" in model.target_keys,
        "loss_centerness": model.config.detector == "fcos",
        "loss_orthogonal": "a2fpn" in model.config.neck.name,
    }
    return losses | {loss for loss, present in branches.items() if present}


def expected_keys(model: Detector) -> set[str]:
    """The keys of a result that a detector documents."""
    keypoints = {"keypoints", "keypoint_scores"} if "keypoints" in model.target_keys else set()
    return {"boxes", "scores", "labels"} | ({"masks"} if model.has_masks else set()) | keypoints


# Training


@models
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0)])
def test_every_step_has_the_same_losses_and_reaches_every_parameter(name: str, counts: tuple[int, ...]) -> None:
    model = tiny_model(name)
    losses = model(*batch(*counts))
    assert set(losses) == expected_losses(model)
    assert all(loss.ndim == 0 and loss.isfinite() and loss >= 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("neck", [neck for neck in a2fpn.list_necks() if neck != "simple_fpn"])
@pytest.mark.parametrize("extra_levels", [0, 1, 2])
def test_any_neck_trains_and_detects(neck: str, extra_levels: int) -> None:
    sizes = [[8 * 2**level] for level in range(4 + extra_levels)]
    model = tiny_model(f"maskrcnn_{neck}", neck_args={"extra_levels": extra_levels}, anchor_sizes=sizes)
    sum(model(*batch(2)).values()).backward()
    assert without_gradient(model) == []
    (detection,) = model.eval()([torch.rand(3, 50, 70)])
    assert set(detection) == {"boxes", "scores", "labels", "masks"}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_mambaout"])
def test_any_backbone_trains_and_detects(backbone: str) -> None:
    model = tiny_model("maskrcnn_a2fpn_lite", backbone=backbone)
    sum(model(*batch(1, 0)).values()).backward()
    assert without_gradient(model) == []
    assert len(model.eval()([torch.rand(3, 50, 70), torch.rand(3, 33, 20)])) == 2


def test_other_than_three_channels() -> None:
    model = tiny_model("fasterrcnn_fpn", in_chans=4, mean=[0.5] * 4, std=[0.2] * 4)
    assert model.train()([torch.rand(4, *SIZE)], [random_target(BOXES, SIZE)])["loss_classifier"] > 0
    assert len(model.eval()([torch.rand(4, 50, 70)])) == 1


@models
def test_a_target_is_only_read(name: str) -> None:
    images, targets = batch(2, 0)
    copies = copy.deepcopy((images, targets))
    tiny_model(name, resize="shortest_edge", min_size=48, max_size=80)(images, targets)
    for got, before in zip([*images, *targets], [*copies[0], *copies[1]], strict=True):
        if isinstance(got, Tensor):
            assert torch.equal(got, before)
        else:
            assert got.keys() == before.keys()
            assert all(torch.equal(got[key], before[key]) for key in got)


def test_a_target_may_be_of_tv_tensors_and_hold_more() -> None:
    images, (target,) = batch(2)
    richer = {
        "image_id": 7,
        "area": torch.ones(2),
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=SIZE),
        "labels": target["labels"],
        "masks": tv_tensors.Mask(target["masks"]),
    }
    model = tiny_model()
    losses = []
    for given, one in (([tv_tensors.Image(images[0])], richer), (images, target)):
        torch.manual_seed(1)
        losses.append(model.train()(given, [one]))
    assert losses[0] == losses[1]
    assert all(type(loss) is Tensor for loss in losses[0].values())


@every_detector
@pytest.mark.parametrize("resize", [True, False])
def test_masks_may_be_planes_or_small(kind: str, resize: bool) -> None:
    images, targets = batch(2, 0)
    model = tiny_model(f"{kind}_fpn", resize="shortest_edge", min_size=48, max_size=80)
    small = [{**target, "masks": InstanceMasks.from_dense(target["masks"])} for target in targets]
    losses = []
    for given in (targets, small):
        torch.manual_seed(1)
        losses.append(model(images, given, resize=resize))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_labels_are_the_same_in_and_out(label: int) -> None:
    # Without proposals of the RPN the ground truth alone is classified.
    model = tiny_model("fasterrcnn_fpn", rpn_post_nms_top_n_train=0)
    predictor = model.roi_heads.box_predictor.cls_score
    torch.nn.init.zeros_(predictor.weight)
    torch.nn.init.zeros_(predictor.bias)
    with torch.no_grad():
        predictor.bias[label + 1] = 10
    images, (target,) = batch(1)
    losses = [
        model.train()(images, [{**target, "labels": torch.tensor([n])}])["loss_classifier"].item() for n in range(3)
    ]
    assert [loss < 0.01 for loss in losses] == [n == label for n in range(3)]
    (detection,) = model.eval()(images)
    assert len(detection["labels"]) > 0
    assert detection["scores"][0] > 0.99
    assert (detection["labels"][detection["scores"] > 0.5] == label).all()


def test_losses_follow_the_resized_target() -> None:
    """An image and its target enlarged by hand, and by the model, give the same losses."""
    images, targets = batch(2)
    rule = {"resize": "shortest_edge", "min_size": 128, "max_size": 192}
    model = tiny_model("maskrcnn_fpn", **rule)
    large = model.preprocess(images)
    assert large.sizes == [(128, 192)]
    by_hand = [
        {
            "boxes": t["boxes"] * 2,
            "labels": t["labels"],
            "masks": t["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2),
        }
        for t in targets
    ]
    mean, std = model.preprocess.mean, model.preprocess.std
    losses = []
    for given, target, resize in ((images, targets, True), ([large.tensor[0] * std + mean], by_hand, False)):
        torch.manual_seed(1)
        losses.append(model(given, target, resize=resize))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def broken(**changes: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, (target,) = batch(2)
    merged = {**target, "image_id": 42, **changes}
    return images, [{key: value for key, value in merged.items() if value is not None}]


BAD_TARGETS = {
    "label too large": (
        {"labels": torch.tensor([0, 3])},
        "image_id 42: label 3 is out of 0..2; labels are contiguous and there is no background class",
    ),
    "label negative": ({"labels": torch.tensor([-1, 0])}, "image_id 42: label -1 is out of 0..2"),
    "box without width": (
        {"boxes": torch.tensor([BOXES[0], [9.0, 9.0, 9.0, 20.0]])},
        "image_id 42: box 1 [9.0, 9.0, 9.0, 20.0] has no positive width and height",
    ),
    "box upside down": (
        {"boxes": torch.tensor([[9.0, 30.0, 19.0, 20.0], BOXES[0]])},
        "image_id 42: box 0 [9.0, 30.0, 19.0, 20.0] has no positive width and height",
    ),
    "box not finite": (
        {"boxes": torch.tensor([BOXES[0], [9.0, float("nan"), 19.0, 20.0]])},
        "image_id 42: box 1 [9.0, nan, 19.0, 20.0] has no positive width and height",
    ),
    "box without end": (
        {"boxes": torch.tensor([BOXES[0], [9.0, 9.0, float("inf"), 20.0]])},
        "image_id 42: box 1 [9.0, 9.0, inf, 20.0] has no positive width and height, or is not finite",
    ),
    "labels that are no numbers of classes": (
        {"labels": torch.tensor([0.0, 1.0])},
        "image_id 42: labels must be whole numbers (int64), got torch.float32",
    ),
    "labels in a column": (
        {"labels": torch.tensor([[0], [1]])},
        "image_id 42: expected boxes (N, 4) and labels (N,), got (2, 4), (2, 1)",
    ),
    "fewer labels than boxes": (
        {"labels": torch.tensor([0])},
        "image_id 42: expected boxes (N, 4) and labels (N,), got (2, 4), (1,)",
    ),
    "boxes of another shape": (
        {"boxes": torch.zeros(2, 5)},
        "image_id 42: expected boxes (N, 4) and labels (N,), got (2, 5), (2,)",
    ),
    "no labels": (
        {"labels": None},
        "image_id 42: a target needs boxes and labels, got boxes, image_id, keypoints, masks",
    ),
    "no masks": (
        {"masks": None},
        "image_id 42: maskrcnn trains on masks (N, H, W) = (2, 64, 96), got none. Without masks use fasterrcnn",
    ),
    "masks of another size": (
        {"masks": torch.zeros(2, 64, 64, dtype=torch.uint8)},
        "image_id 42: maskrcnn trains on masks (N, H, W) = (2, 64, 96), got (2, 64, 64)",
    ),
    "fewer masks than boxes": (
        {"masks": torch.zeros(1, *SIZE, dtype=torch.uint8)},
        "image_id 42: maskrcnn trains on masks (N, H, W) = (2, 64, 96), got (1, 64, 96)",
    ),
    "no image id": (
        {"image_id": None, "labels": torch.tensor([0, 3])},
        "image 0 of the batch: label 3 is out of 0..2",
    ),
    "image id in a tensor": ({"image_id": torch.tensor(42), "labels": torch.tensor([0, 3])}, "image_id 42: label 3"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_a_target_that_breaks_the_contract_is_an_error(
    detector: Detector, changes: dict[str, Any], message: str
) -> None:
    model = copy.deepcopy(detector).train()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        model(*broken(**changes))


@every_detector
@pytest.mark.parametrize("problem", ["label too large", "box not finite", "boxes of another shape", "no labels"])
def test_every_detector_names_the_image(kind: str, problem: str) -> None:
    changes, message = BAD_TARGETS[problem]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tiny_model(f"{kind}_fpn")(*broken(**changes))


@every_detector
def test_every_detector_says_what_it_trains_on(kind: str) -> None:
    model = tiny_model(f"{kind}_fpn")
    model.check_data("train.json", {"boxes", "labels", "masks", "keypoints", "image_id"})
    for key in set(model.target_keys) - {"boxes", "labels"}:
        message = rf"train\.json has no {key}, which {kind} trains on\. Without {key} use {model.box_only_variant}"
        with pytest.raises(ValueError, match=message):
            model.check_data("train.json", set(model.target_keys) - {key})
        # What it says to use does without.
        assert DETECTORS[model.box_only_variant].target_keys == ("boxes", "labels")
        with pytest.raises(ValueError, match=f"image_id 42: .*got none. Without {key} use {model.box_only_variant}"):
            model(*broken(**{key: None}))


def test_masks_are_not_asked_of_those_who_have_no_use_for_them() -> None:
    assert set(tiny_model("fasterrcnn_fpn")(*broken(masks=None))) == LOSSES


def test_images_and_targets_must_come_in_pairs() -> None:
    model = tiny_model("fasterrcnn_fpn")
    images, targets = batch(1, 2)
    with pytest.raises(ValueError, match="Expected one target per image, got 2 images and 1 targets"):
        model(images, targets[:1])
    with pytest.raises(ValueError, match=r"In training mode targets must be given; call model\.eval\(\) to detect"):
        model(images)
    with pytest.raises(ValueError, match="at least one image, got none"):
        model([], [])
    with pytest.raises(ValueError, match="at least one image, got none"):
        model.eval()([])


# Detection


@every_detector
@pytest.mark.parametrize("paste_masks", [True, False])
def test_detections_are_as_documented(kind: str, paste_masks: bool) -> None:
    detector = lively(f"{kind}_a2fpn")
    images = [torch.rand(3, *size) for size in ((64, 96), (33, 47), (200, 30))]
    results = detector(images, paste_masks=paste_masks)
    assert len(results) == 3
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[1:]
        count = len(result["scores"])
        assert 2 <= count <= 10
        assert set(result) == expected_keys(detector)
        assert result["boxes"].shape == (count, 4)
        assert {result[key].dtype for key in result.keys() - {"labels"}} == {torch.float32}
        assert result["labels"].dtype == torch.int64
        assert result["labels"].shape == (count,)
        assert ((result["labels"] >= 0) & (result["labels"] < 3)).all()
        assert (result["scores"].diff() <= 0).all()
        assert ((result["scores"] > 0) & (result["scores"] <= 1)).all()
        assert (result["boxes"] >= -1e-4).all()
        assert (result["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert (result["boxes"][:, 2:] > result["boxes"][:, :2]).all()
        if "masks" in result:
            assert result["masks"].shape == (count, 1, *((height, width) if paste_masks else (28, 28)))
            assert ((result["masks"] >= 0) & (result["masks"] <= 1)).all()
        if "keypoints" in result:
            assert result["keypoints"].shape == (count, 3, 3)
            assert result["keypoint_scores"].shape == (count, 3)


def test_boxes_only_where_there_are_no_masks() -> None:
    (result,) = tiny_model("fasterrcnn_fpn").eval()([torch.rand(3, 50, 70)])
    assert set(result) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("rule", PASTE_RULES)
def test_pasted_masks_are_the_others_pasted(rule: str) -> None:
    model, image = tiny_model("maskrcnn_fpn", mask_paste=rule).eval(), torch.rand(3, 50, 70)
    (pasted,), (inner,) = model([image]), model([image], paste_masks=False)
    assert torch.equal(pasted["boxes"], inner["boxes"])
    assert torch.equal(pasted["masks"], paste_masks(inner["masks"], inner["boxes"], (50, 70), rule=rule))


def test_boxes_are_in_the_images_own_pixels(detector: Detector) -> None:
    image = torch.rand(3, 24, 40)
    (resized,) = detector([image])
    batch = detector.preprocess([image])
    assert batch.sizes == [(48, 80)]
    ready = batch.tensor[0, :, :48, :80] * detector.preprocess.std + detector.preprocess.mean
    (given,) = detector([ready], resize=False)
    torch.testing.assert_close(resized["boxes"] * 2, given["boxes"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(resized["scores"], given["scores"], rtol=1e-4, atol=1e-5)


@every_detector
@pytest.mark.parametrize("paste_masks", [True, False])
def test_nothing_found_is_an_empty_result(kind: str, paste_masks: bool) -> None:
    model = tiny_model(f"{kind}_fpn", score_threshold=1.0).eval()
    (result,) = model([torch.rand(3, 50, 70)], paste_masks=paste_masks)
    shapes = {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 1, 50, 70) if paste_masks else (0, 1, 28, 28),
        "keypoints": (0, 3, 3),
        "keypoint_scores": (0, 3),
    }
    assert {key: tuple(x.shape) for key, x in result.items()} == {key: shapes[key] for key in expected_keys(model)}
    assert {result[key].dtype for key in result.keys() - {"labels"}} == {torch.float32}
    assert result["labels"].dtype == torch.int64


@every_detector
def test_limits_on_detections_are_obeyed(kind: str) -> None:
    image = torch.rand(3, 64, 96)
    scores = []
    for options in ({}, {"detections_per_image": 3}, {"nms_threshold": 0.0}):
        (result,) = lively(f"{kind}_fpn", **options)([image])
        scores.append(result["scores"])
    assert torch.equal(scores[1], scores[0][:3])
    # No two of a class overlap any more.
    overlaps = box_iou(result["boxes"], result["boxes"]) > 0.01
    assert not (overlaps & (result["labels"] == result["labels"][:, None])).fill_diagonal_(False).any()
    threshold = scores[0][2].item()
    (result,) = lively(f"{kind}_fpn", score_threshold=threshold)([image])
    torch.testing.assert_close(result["scores"], scores[0][:2])


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    assert torch.equal(a["labels"], b["labels"])
    for key in a.keys() - {"labels"}:
        torch.testing.assert_close({key: a[key]}, {key: b[key]}, rtol=tolerance, atol=tolerance)


@every_detector
def test_an_image_is_seen_alike_alone_and_among_others(kind: str) -> None:
    detector = lively(f"{kind}_a2fpn")
    # Two pairs share a padded size, in one of them with different sizes inside it.
    images = [torch.rand(3, *size) for size in ((48, 80), (45, 96), (96, 45), (64, 64), (48, 80), (10, 90))]
    together = detector(images)
    for image, result in zip(images, together, strict=True):
        (alone,) = detector([image])
        # Products of other batch sizes round differently, and random weights amplify it.
        same(result, alone, tolerance=5e-4)


def test_bytes_are_seen_as_255ths(detector: Detector) -> None:
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    same(*detector([image, image / 255]))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2000, 3)])
def test_images_of_any_shape(detector: Detector, size: tuple[int, int]) -> None:
    image = torch.rand(3, *size)
    (result,) = detector([image])
    assert (result["boxes"] <= torch.tensor([size[1], size[0]] * 2) + 1e-3).all()
    assert result["masks"].shape[-2:] == size
    target = {"boxes": torch.tensor([[0.0, 0.0, size[1], size[0]]]), "labels": torch.tensor([1])}
    losses = copy.deepcopy(detector).train()([image], [{**target, "masks": torch.ones(1, *size)}])
    assert all(loss.isfinite() for loss in losses.values())


def test_detection_changes_nothing(detector: Detector) -> None:
    before = copy.deepcopy(detector.state_dict())
    image = torch.rand(3, 50, 70)
    same(*(detector([image])[0] for _ in range(2)), tolerance=0)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


@every_detector
def test_bfloat16_autocast_end_to_end(kind: str) -> None:
    model = lively(f"{kind}_a2fpn")
    images, targets = batch(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
        results = model.eval()(images)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    for result in results:
        assert {result[key].dtype for key in result.keys() - {"labels"}} == {torch.float32}
        # Boxes with 8 bits of mantissa would all lie on a grid.
        assert not torch.equal(result["boxes"], result["boxes"].bfloat16().float())


def test_rpn_and_boxes_are_decoded_in_float32_under_autocast(detector: Detector) -> None:
    seen = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for module in (detector.rpn.head, detector.roi_heads.box_predictor, detector.roi_heads.mask_predictor)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        detector([torch.rand(3, 50, 70)])
    for hook in hooks:
        hook.remove()
    (objectness, deltas), boxes, masks = seen
    assert {x.dtype for x in (*objectness, *deltas, *boxes, masks)} == {torch.float32}


def test_frozen_parts_stay_frozen_in_training() -> None:
    model = tiny_model("fasterrcnn_fpn", backbone="test_resnet", trainable_layers=2, norm="frozen")
    model.eval().train()
    assert model.training
    assert not model.backbone.body.layer1.training
    before = copy.deepcopy(model.backbone.state_dict())
    sum(model(*batch(2)).values()).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"conv1", "layer1", "layer2"}
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


# Wiring


@pytest.mark.parametrize("name", [name for name in MODELS if issubclass(DETECTORS[name.partition("_")[0]], RCNN)])
def test_everything_is_wired_from_the_pyramid(name: str) -> None:
    model = tiny_model(name, anchor_sizes=None, neck_args={"extra_levels": 2})
    assert model.neck.out_spec.strides == (4, 8, 16, 32, 64, 128)
    assert model.rpn.anchor_generator.strides == (4, 8, 16, 32, 64, 128)
    assert [sizes for (sizes,) in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512, 1024]
    # Levels made by subsampling serve the RPN alone, and padding need not cover them.
    assert list(model.roi_heads.box_roi_pool.strides.values()) == [4, 8, 16, 32]
    assert model.preprocess.divisor == 32
    assert model.roi_heads.has_mask() == model.has_masks


def test_anchor_sizes_must_fit_the_levels() -> None:
    with pytest.raises(ValueError, match=r"one tuple per pyramid level: 5 levels of strides .*, got 2 tuples"):
        tiny_model("fasterrcnn_fpn", anchor_sizes=[[8], [16]])


def test_heads_are_as_configured() -> None:
    model = tiny_model("maskrcnn_fpn", box_pool_size=5, mask_pool_size=10, roi_aligned=True, roi_sampling_ratio=1)
    for pool, size in ((model.roi_heads.box_roi_pool, 5), (model.roi_heads.mask_roi_pool, 10)):
        assert (pool.output_size, pool.aligned, pool.sampling_ratio) == ((size, size), True, 1)
    (result,) = model.eval()([torch.rand(3, 50, 70)], paste_masks=False)
    assert result["masks"].shape[-2:] == (20, 20)


@pytest.mark.parametrize("detector", ["maskrcnn", "cascademaskrcnn", "htc"])
def test_mask_targets_lie_where_the_features_are_pooled_and_edges_weigh_as_configured(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool, float]] = []

    def spy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append((logits.shape[-1], kwargs["aligned"], kwargs["boundary_weight"]))
        return mask_loss(logits, *args, **kwargs)

    for module in ("roi_heads", "cascade"):
        monkeypatch.setattr(f"a2fpn.heads.{module}.mask_loss", spy)
    wanted = set()
    for aligned, weight, pool in ((True, 3.0, 28), (False, 1.0, 14)):
        model = tiny_model(
            f"{detector}_fpn", roi_aligned=aligned, mask_boundary_weight=weight, mask_pool_size=pool
        ).train()
        image, target = torch.rand(3, 64, 64), {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0])}
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        target["masks"][0, 8:40, 8:40] = 1
        assert torch.isfinite(model([image], [target])["loss_mask"])
        wanted.add((2 * pool, aligned, weight))
    assert set(asked) == wanted


# The peer


def torchvision_twin(model: Detector) -> MaskRCNN:
    """torchvision's Mask R-CNN with the weights of ours."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    twin = MaskRCNN(
        backbone,
        model.config.num_classes + 1,
        min_size=128,
        max_size=192,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        rpn_post_nms_top_n_train=0,
        box_score_thresh=0.0,
        box_detections_per_img=30,
    )
    twin.load_state_dict(torchvision_names(model.state_dict()))
    return twin


def test_maskrcnn_fpn_is_that_of_torchvision() -> None:
    model = a2fpn.create_model(
        "maskrcnn_fpn_r18",
        num_classes=4,
        min_size=128,
        max_size=192,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        rpn_post_nms_top_n_train=0,
        score_threshold=0.0,
        detections_per_image=30,
        mask_paste="torchvision",
    )
    # Scores far from each other: rounding must not decide what NMS keeps. Large deltas would amplify it.
    randomize(model.rpn, std=0.02)
    randomize(model.roi_heads.box_predictor)
    randomize(model.roi_heads.mask_predictor)
    twin = torchvision_twin(model)

    image, target = torch.rand(3, 128, 192), random_target([[10, 20, 100, 90], [60, 5, 180, 120]], (128, 192))
    with torch.no_grad():
        (ours,), (theirs,) = model.eval()([image]), twin.eval()([image])
    assert len(ours["scores"]) == 30
    same(ours, {**theirs, "labels": theirs["labels"] - 1})

    # With the ground truth as the only proposals, rounding does not decide what is sampled.
    def reseed(*_: Any) -> None:
        torch.manual_seed(1)

    losses = []
    for detector, shift in ((model, 0), (twin, 1)):
        # torchvision draws a number to choose an image size, before the RPN draws its samples.
        detector.rpn.register_forward_pre_hook(reseed)
        losses.append(detector.train()([image], [{**target, "labels": target["labels"] + shift}]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
