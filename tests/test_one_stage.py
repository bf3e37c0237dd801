import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import a2fpn
from a2fpn.detectors import DETECTORS, Detector, OneStage
from a2fpn.heads import Float32FCOSHead, StrideAnchors, TopLevels
from a2fpn.heads.dense import LevelOutputs, dense_detections
from a2fpn.heads.postprocess import PostprocessConfig
from tests.helpers import (
    in_our_layout,
    random_target,
    randomize,
    tiny_model,
    torchvision_names,
    with_zero_gradient,
    without_gradient,
)

KINDS = [kind for kind in DETECTORS if issubclass(DETECTORS[kind], OneStage)]
kinds = pytest.mark.parametrize("kind", KINDS)
SIZE = (64, 96)
BOXES = [[5.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 30.0]]


def test_which_they_are() -> None:
    assert KINDS == ["fcos", "retinanet"]


# On any neck and any backbone


@pytest.mark.parametrize("neck", [neck for neck in a2fpn.list_necks() if neck != "simple_fpn"])
@kinds
def test_any_neck_trains_and_detects(kind: str, neck: str) -> None:
    model = tiny_model(f"{kind}_{neck}")
    sum(model([torch.rand(3, *SIZE)], [random_target(BOXES, SIZE)]).values()).backward()
    assert without_gradient(model) == []
    (result,) = model.eval()([torch.rand(3, 50, 70)])
    assert set(result) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_mambaout"])
@kinds
def test_any_backbone_trains_and_detects(kind: str, backbone: str) -> None:
    model = tiny_model(f"{kind}_a2fpn_lite", backbone=backbone)
    images = [torch.rand(3, *SIZE)] * 2
    sum(model(images, [random_target(BOXES[:count], SIZE) for count in (1, 0)]).values()).backward()
    assert without_gradient(model) == []
    assert len(model.eval()([torch.rand(3, 50, 70), torch.rand(3, 33, 20)])) == 2


@kinds
def test_everything_is_wired_from_the_pyramid(kind: str) -> None:
    model = tiny_model(f"{kind}_fpn", **({"anchor_sizes": None} if kind == "retinanet" else {}))
    assert model.neck.out_spec.strides == (8, 16, 32)
    assert model.spec.strides == (8, 16, 32, 64, 128)
    assert list(model.top) == ["p6", "p7"]
    assert model.preprocess.divisor == 32
    anchors = model.anchor_generator
    assert anchors.strides == model.spec.strides
    if kind == "fcos":
        assert anchors.sizes == ((8,), (16,), (32,), (64,), (128,))
    else:
        # torchvision's, and its rounding.
        assert anchors.sizes == ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812))
    features = model.features(model.preprocess([torch.rand(3, 65, 97)]))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        "p3": (1, 16, 12, 16),
        "p4": (1, 16, 6, 8),
        "p5": (1, 16, 3, 4),
        "p6": (1, 16, 2, 2),
        "p7": (1, 16, 1, 1),
    }


@kinds
@pytest.mark.parametrize(
    ("options", "strides"),
    [
        ({"strides": [4, 8, 16, 32], "top_levels": 1}, (4, 8, 16, 32, 64)),
        ({"neck_args": {"extra_levels": 2}, "top_levels": 0}, (8, 16, 32, 64, 128)),
        ({"neck_args": {"extra_levels": 1}, "top_levels": 1}, (8, 16, 32, 64, 128)),
        ({"strides": [16], "top_levels": 0, "backbone": "test_resnet"}, (16,)),
    ],
)
def test_any_levels(kind: str, options: dict[str, Any], strides: tuple[int, ...]) -> None:
    if kind == "retinanet":
        options = {**options, "anchor_sizes": None}
    model = tiny_model(f"{kind}_fpn", **options)
    assert model.spec.strides == strides
    sum(model([torch.rand(3, *SIZE)], [random_target(BOXES, SIZE)]).values()).backward()
    assert without_gradient(model) == []
    assert len(model.eval()([torch.rand(3, 50, 70)])) == 1


def test_levels_may_be_made_of_the_backbones_last_map() -> None:
    model = tiny_model("retinanet_fpn", top_source="backbone")
    batch = model.preprocess([torch.rand(3, *SIZE)])
    maps = model.backbone(batch.tensor)
    assert model.top["p6"].in_channels == maps["c5"].shape[1] != 16
    features = model.features(batch)
    assert torch.equal(features["p6"], model.top["p6"](maps["c5"]))
    assert torch.equal(features["p7"], model.top["p7"](features["p6"].relu()))
    with pytest.raises(ValueError, match=r"beyond stride 64 cannot be computed from the backbone's map of stride 32"):
        tiny_model("retinanet_fpn", top_source="backbone", neck_args={"extra_levels": 1})


def test_top_levels_are_torchvisions() -> None:
    ours, theirs = TopLevels(8, 8, ["p6", "p7"]), LastLevelP6P7(8, 8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 7, 6)
    maps, names = theirs([x], [x], ["p5"])
    assert list(ours(x)) == names[1:]
    assert all(torch.equal(a, b) for a, b in zip(ours(x).values(), maps[1:], strict=True))


def test_anchors_of_the_wrong_arity_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"one tuple per pyramid level: 5 levels of strides .*, got 2 tuples"):
        tiny_model("retinanet_fpn", anchor_sizes=[[8], [16]])
    with pytest.raises(ValueError, match=r"top_levels must be between 0 and 8, got -1"):
        tiny_model("fcos_fpn", top_levels=-1)


def test_anchors_follow_the_declared_strides_or_torchvisions() -> None:
    image = detection.image_list.ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    maps = [torch.zeros(1, 1, 12, 20), torch.zeros(1, 1, 1, 2)]
    sizes = ((32,), (64,))
    theirs = detection.anchor_utils.AnchorGenerator(sizes, ((1.0,),) * 2)(image, maps)[0]
    legacy = StrideAnchors(sizes, (1.0,), (8, 128), legacy=True)(image, maps)[0]
    declared = StrideAnchors(sizes, (1.0,), (8, 128))(image, maps)[0]
    assert torch.equal(legacy, theirs)
    assert torch.equal(declared[:-2], theirs[:-2])
    assert (theirs[-1] - theirs[-2]).tolist() == [80, 0, 80, 0]
    assert (declared[-1] - declared[-2]).tolist() == [128, 0, 128, 0]


@pytest.mark.parametrize("channels", [1, 16, 32, 96, 256])
def test_group_norm_fits_any_width_and_map(channels: int) -> None:
    head = Float32FCOSHead(channels, 2, num_layers=1)
    (norm,) = {m for m in head.classification_head.modules() if isinstance(m, nn.GroupNorm)}
    assert norm.num_groups == (32 if channels % 32 == 0 and channels > 32 else max(1, channels // 2))
    # One pixel, one image: what a group norm of one channel per group refuses.
    if channels > 1:
        assert head.train()([torch.randn(1, channels, 1, 1)])["cls_logits"].isfinite().all()


# Losses


@pytest.mark.parametrize("label", [0, 1, 2])
@kinds
def test_labels_are_the_same_in_and_out(kind: str, label: int) -> None:
    model = tiny_model(f"{kind}_fpn")
    logits = model.head.classification_head.cls_logits
    nn.init.zeros_(logits.weight)
    # One anchor per location: outputs are classes.
    with torch.no_grad():
        logits.bias.fill_(-5.0).view(-1, 3)[:, label] = 5.0
    images = [torch.rand(3, *SIZE)]
    losses = [
        model.train()(images, [{**random_target(BOXES[:1], SIZE), "labels": torch.tensor([n])}])["loss_classifier"]
        for n in range(3)
    ]
    assert min(range(3), key=losses.__getitem__) == label
    (result,) = model.eval()(images)
    assert len(result["labels"]) > 0
    assert (result["labels"] == label).all()


@kinds
def test_every_branch_learns(kind: str) -> None:
    # FCOS's boxes come from a ReLU, which starts dead in half of its outputs.
    model = tiny_model(f"{kind}_fpn")
    randomize(model)
    sum(model([torch.rand(3, *SIZE)], [random_target(BOXES, SIZE)]).values()).backward()
    assert with_zero_gradient(model.head) == []
    assert with_zero_gradient(model.top["p6"]) == []


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_box_losses(box_loss: str) -> None:
    model = tiny_model("retinanet_fpn", box_loss=box_loss, head_norm="gn")
    losses = [model([torch.rand(3, *SIZE)], [random_target(BOXES[:n], SIZE)])["loss_box_reg"] for n in (2, 0)]
    assert losses[0] > 0
    assert losses[1] == 0
    with pytest.raises(ValueError, match=rf"heads\.box_loss: expected one of 'l1', .*, got '{box_loss}x'"):
        tiny_model("retinanet_fpn", box_loss=f"{box_loss}x")


def test_the_head_is_float32_under_autocast() -> None:
    for kind in KINDS:
        model = tiny_model(f"{kind}_fpn").eval()
        with torch.autocast("cpu", torch.bfloat16):
            features = model.features(model.preprocess([torch.rand(3, *SIZE)]))
            assert features["p3"].dtype == torch.bfloat16
            outputs, (anchors,), _ = model.outputs(features, model.preprocess([torch.rand(3, *SIZE)]))
        assert {x.dtype for x in (*outputs.values(), anchors)} == {torch.float32}


# Detection


def test_detections_by_hand() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50, 0, 60, 10]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.05, 0.6], [0.99, 0.0]])
    level = LevelOutputs(scores[None], torch.zeros(1, 4, 4), anchors.__getitem__)

    def found(candidates_per_level: int = 10, **rule: Any) -> list[tuple[float, int, float]]:
        result = dense_detections(
            [level],
            lambda deltas, boxes: boxes + deltas,
            [(10, 40)],
            rule=PostprocessConfig(**rule),
            candidates_per_level=candidates_per_level,
        )
        rows = zip(result["scores"].tolist(), result["labels"].tolist(), result["boxes"][:, 0].tolist(), strict=True)
        return [(round(score, 2), label, x) for score, label, x in rows]

    # What scores 0.05 is not above it, 0.8 and 0.1 are suppressed in their class, 0.99 lies outside of the image.
    assert found() == [(0.9, 0, 0.0), (0.7, 1, 1.0), (0.6, 1, 20.0)]
    assert found(detections_per_image=2) == [(0.9, 0, 0.0), (0.7, 1, 1.0)]
    assert found(nms_threshold=0.9)[:3] == [(0.9, 0, 0.0), (0.8, 0, 1.0), (0.7, 1, 1.0)]
    assert found(score_threshold=0.65) == [(0.9, 0, 0.0), (0.7, 1, 1.0)]
    assert found(candidates_per_level=2) == [(0.9, 0, 0.0)]


# The peer


def twin_backbone(source_channels: int) -> nn.Module:
    """torchvision's ResNet-18 with FPN from stride 8 to 128; the last two are made of a map of so many channels."""
    backbone: nn.Module = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(source_channels, 256),
    )
    return backbone


def torchvisions_retinanet(**options: Any) -> nn.Module:
    return detection.RetinaNet(twin_backbone(256), 4, topk_candidates=100, **options)


def torchvisions_retinanet_v2(**options: Any) -> nn.Module:
    # What retinanet_resnet50_fpn_v2 builds.
    head = RetinaNetHead(256, 9, 4, norm_layer=functools.partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return detection.RetinaNet(twin_backbone(512), 4, head=head, topk_candidates=100, **options)


def torchvisions_fcos(**options: Any) -> nn.Module:
    return detection.FCOS(twin_backbone(256), 4, topk_candidates=100, **options)


@pytest.mark.parametrize(
    ("kind", "build", "options"),
    [
        ("retinanet", torchvisions_retinanet, {}),
        ("retinanet", torchvisions_retinanet_v2, {"top_source": "backbone", "head_norm": "gn", "box_loss": "giou"}),
        ("fcos", torchvisions_fcos, {}),
    ],
    ids=["retinanet", "retinanet v2", "fcos"],
)
def test_difference_to_torchvision_is_zero(kind: str, build: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    rule = {"min_size": 128, "max_size": 192}
    model = a2fpn.create_model(
        f"{kind}_fpn_r18",
        num_classes=4,
        legacy_anchors=True,
        score_threshold=0.001,
        detections_per_image=50,
        candidates_per_level=100,
        **rule,
        **options,
    )
    randomize(model.head, std=0.03)
    randomize(model.top, std=0.01)
    twin = in_our_layout(build(score_thresh=0.001, detections_per_img=10**6, **rule))
    twin.load_state_dict(torchvision_names(model.state_dict()))
    # Enlarged, but to a width that P6's and P7's strides do not divide: torchvision's anchors drift.
    images = [torch.rand(3, 64, 90), torch.rand(3, 64, 90)]
    targets = [random_target([[5, 10, 50, 45], [30, 2, 89, 60]], (64, 90), classes=4), random_target([], (64, 90))]
    assert_equal(model, twin, images, targets)
    # And with declared strides the outputs are others.
    model.anchor_generator.legacy = False
    with torch.no_grad():
        ours, theirs = model.eval()(images[:1])[0], twin.eval()(images[:1])[0]
    assert ours["boxes"].shape != theirs["boxes"].shape or not torch.equal(ours["boxes"], theirs["boxes"])


def assert_equal(model: Detector, twin: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
    """Detections and losses differ by 0.0."""
    names = {"loss_classifier": "classification", "loss_box_reg": "bbox_regression", "loss_centerness": "bbox_ctrness"}
    # In training first: eval mode then has statistics of the batch norms that are not the initial ones.
    states = [copy.deepcopy(m.state_dict()) for m in (model, twin)]
    ours, theirs = model.train()(images, targets), twin.train()(images, targets)
    assert {name: loss.item() for name, loss in ours.items()} == {name: theirs[names[name]].item() for name in ours}
    assert len(theirs) == len(ours)
    assert all(loss > 0 for loss in ours.values())
    for m, state in zip((model, twin), states, strict=True):
        m.load_state_dict(state)
    with torch.no_grad():
        results, expected = model.eval()(images), twin.eval()(images)
    for result, wanted in zip(results, expected, strict=True):
        # torchvision keeps boxes without area, such as those it clipped to a line at the border of the image.
        sides = wanted["boxes"][:, 2:] - wanted["boxes"][:, :2]
        solid = torch.where((sides >= 0.01 * 64 / 128).all(1))[0][:50]
        assert len(result["scores"]) == 50
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(result[key], wanted[key][solid]), key


def test_the_losses_are_documented() -> None:
    for kind in KINDS:
        losses = tiny_model(f"{kind}_fpn")([torch.rand(3, *SIZE)], [random_target(BOXES, SIZE)])
        documented = set(re.findall(r"``(loss_\w+)``", DETECTORS[kind].__doc__ or ""))
        assert set(losses) == documented
