import copy
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, get_model_builder, get_model_weights
from torchvision.models import detection as tv
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import a2fpn
from a2fpn import CheckpointError
from a2fpn.backbones import TimmBackbone
from a2fpn.build import build_model
from a2fpn.cli.hub import _compare, main
from a2fpn.convert import from_torchvision, load_torchvision
from a2fpn.convert.torchvision_config import backbone_config, published_config, torchvision_config
from a2fpn.convert.torchvision_state import torchvision_state
from a2fpn.detectors import Detector
from a2fpn.device import without_values
from a2fpn.heads import dense
from a2fpn.pretrained.catalog import PRETRAINED, TorchvisionWeights
from a2fpn.pretrained.checkpoint import read_checkpoint
from tests.helpers import largest_difference

# Few and small, so that a whole ResNet-50 detector runs in a second; no threshold that random weights miss.
RCNN = {
    "min_size": 64,
    "max_size": 112,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 10,
    "rpn_pre_nms_top_n_train": 20,
    "rpn_post_nms_top_n_train": 10,
    "rpn_batch_size_per_image": 32,
    "rpn_score_thresh": 0.0,
    "box_batch_size_per_image": 8,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 4,
}
ONE_STAGE = {"min_size": 64, "max_size": 112, "score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 40}
# Builder and the epsilon of its frozen norm, as torchvision has it after loading its weights.
FAST = {
    "maskrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn_v2": None,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "keypointrcnn_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn_v2": None,
    "fcos_resnet50_fpn": 1e-5,
}
SLOW = {
    "fasterrcnn_resnet50_fpn": 0.0,
    "fasterrcnn_resnet50_fpn_v2": None,
    "fasterrcnn_mobilenet_v3_large_fpn": None,
    "retinanet_resnet50_fpn": 0.0,
}
BUILDERS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
LOSSES = {
    "classification": "loss_classifier",
    "bbox_regression": "loss_box_reg",
    "bbox_ctrness": "loss_centerness",
}


def is_rcnn(module: nn.Module) -> bool:
    return hasattr(module, "rpn")


def freeze(module: nn.Module, eps: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | FrozenBatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(len(child.running_mean), eps))
        else:
            freeze(child, eps)


@torch.no_grad()
def scatter(module: nn.Module) -> None:
    """Random weights; norms with some tiny variances as trained ones have; outputs that differ from place to place."""
    for name, parameter in module.named_parameters():
        gain = 3 if re.search("cls|bbox|fc", name) else 1.4
        std = gain / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.02
        parameter.normal_(std=std)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.3, 0.8)
            norm.bias.normal_(std=0.1)
            norm.running_var[::20] *= 1e-4
            norm.weight[::20] *= 1e-2
        elif isinstance(norm, nn.GroupNorm):
            nn.init.ones_(norm.weight)


def published_like(name: str, **options: Any) -> nn.Module:
    """A detector like torchvision's own with published weights, but random and in evaluation mode."""
    options = (ONE_STAGE if name.startswith(("retinanet", "fcos")) else RCNN) | options
    if not name.startswith("keypoint"):
        options.setdefault("num_classes", 6)
    with without_values():  # their own random numbers would be thrown away
        module = get_model_builder(name)(weights=None, weights_backbone=None, **options)
        if name.startswith("keypoint"):
            module.roi_heads.keypoint_head = tv.keypoint_rcnn.KeypointRCNNHeads(256, (32, 32))
            module.roi_heads.keypoint_predictor = tv.keypoint_rcnn.KeypointRCNNPredictor(32, 17)
        eps = (FAST | SLOW)[name]
        if eps is not None:
            freeze(module.backbone.body, eps)
    module.to_empty(device="cpu")
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.num_batches_tracked.zero_()
    scatter(module)
    return module.eval()


def small(**options: Any) -> nn.Module:
    """A torchvision Faster R-CNN on ResNet-18 with narrow heads."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=2)
    head = TwoMLPHead(256 * 9, 16)
    predictor = tv.faster_rcnn.FastRCNNPredictor(16, options.pop("num_classes", 6))
    anchors = tv.rpn.AnchorGenerator(((8,), (16,), (24,), (32,), (40,)), ((0.5, 1.0, 2.0),) * 5)
    parts = {"box_roi_pool": pool, "box_head": head, "box_predictor": predictor, "rpn_anchor_generator": anchors}
    module = tv.FasterRCNN(backbone, **RCNN, **parts, **options)
    scatter(module)
    return module.eval()


@pytest.fixture
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's RoIAlign in the place of ours, and none of its degenerate boxes dropped."""

    def kernel(x: Tensor, rois: Tensor, size: int, scale: float, ratios: tuple[int, int], aligned: bool) -> Tensor:
        return torchvision.ops.roi_align(x, rois, size, scale, ratios[0], aligned)

    monkeypatch.setattr("a2fpn.heads.roi_pool._gather_roi_align", kernel)
    monkeypatch.setattr(dense, "is_large", lambda boxes: torch.ones(len(boxes), dtype=torch.bool))


def same_layout(module: nn.Module) -> None:
    """Makes torchvision's batches channels-last as ours are: convolutions round differently otherwise."""
    batch_images = module.transform.batch_images

    def channels_last(images: list[Tensor], size_divisible: int = 32) -> Tensor:
        return batch_images(images, size_divisible).contiguous(memory_format=torch.channels_last)

    module.transform.batch_images = channels_last


def detections(module: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """What a torchvision detector finds, one image at a time, with our labels and keys."""
    results = [result for image in images for result in module([image])]
    for result in results:
        result["labels"] -= int(is_rcnn(module))
        if "keypoints_scores" in result:
            result["keypoint_scores"] = result.pop("keypoints_scores")
    return results


def target(module: nn.Module, model: Detector, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an image holds, for torchvision and for us."""
    boxes = torch.tensor([[8.0, 12.0, 60.0, 58.0], [30.0, 6.0, 90.0, 70.0]])
    masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    keypoints = torch.cat([boxes[:, None, :2] + 5 + torch.rand(2, 17, 2) * 30, torch.ones(2, 17, 1)], 2)
    everything = {"boxes": boxes, "masks": masks, "keypoints": keypoints}
    ours = {key: everything[key] for key in model.target_keys if key != "labels"}
    ours["labels"] = torch.arange(2) % model.config.num_classes
    return copy.deepcopy(ours) | {"labels": ours["labels"] + int(is_rcnn(module))}, ours


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.rand(3, 90, 100), torch.rand(3, 64, 130)]


# The same function


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.usefixtures("same_kernels")
def test_features_proposals_detections_and_losses_are_torchvisions(name: str, images: list[Tensor]) -> None:
    module = published_like(name)
    same_layout(module)
    model = from_torchvision(module)
    found: dict[str, list[Tensor]] = {}
    module.backbone.register_forward_hook(lambda *call: found.update(features=list(call[2].values())))
    if is_rcnn(module):
        module.rpn.register_forward_hook(lambda *call: found.update(theirs=call[2][0]))
    with torch.no_grad():
        theirs, ours = detections(module, images[:1]), model(images[:1])
        batch = model.preprocess(images[:1])
        features = model.features(batch)
    assert largest_difference(found["features"], list(features.values())) == 0.0
    if is_rcnn(module):
        assert len(found["theirs"][0]) > 0
        with torch.no_grad():
            proposals = model.rpn(ImageList(batch.tensor, batch.sizes), features)[0]
        assert largest_difference(found["theirs"], proposals) == 0.0
    for their, our in zip(theirs, ours, strict=True):
        assert len(their["boxes"]) > 0
        assert set(their) == set(our)
        assert max(largest_difference([their[key]], [our[key]]) for key in their) == 0.0

    losses = []
    for detector, wanted in zip((module.train(), model.train()), target(module, model, images[0]), strict=True):
        if is_rcnn(module):  # torchvision's resize draws a number before
            detector.rpn.register_forward_pre_hook(lambda *_: (torch.manual_seed(0), None)[1])
        losses.append(detector(images[:1], [wanted]))
    assert {LOSSES.get(key, key): loss.item() for key, loss in losses[0].items()} == {
        key: loss.item() for key, loss in losses[1].items()
    }


@torch.no_grad()
def test_with_our_own_kernels_only_rounding_differs(images: list[Tensor]) -> None:
    module = small(num_classes=6)
    theirs, ours = detections(module, images), from_torchvision(module)(images)
    for their, our in zip(theirs, ours, strict=True):
        assert torch.equal(their["labels"], our["labels"])
        assert 0 < (their["boxes"] - our["boxes"]).abs().max() < 0.05
        assert (their["scores"] - our["scores"]).abs().max() < 1e-3


@torch.no_grad()
def test_the_epsilon_matters_and_is_in_no_state_dict(images: list[Tensor]) -> None:
    module = small()
    freeze(module.backbone.body, 0.0)
    scatter(module)
    model = from_torchvision(module)
    assert model.config.backbone.norm_eps == 0.0
    config = dataclasses.replace(model.config.backbone, norm_eps=None)
    other = TimmBackbone(config).eval()
    other.load_state_dict(model.backbone.state_dict())
    x = model.preprocess(images[:1]).tensor
    theirs = list(module.backbone.body(x).values())
    assert largest_difference(theirs, model.backbone(x)) == 0.0
    assert largest_difference(theirs, other(x)) > 1e-3


@pytest.mark.parametrize(("size", "differ"), [((64, 128), False), ((96, 160), True)])
def test_anchors_are_where_torchvision_has_them(size: tuple[int, int], differ: bool) -> None:
    module = small()
    model = from_torchvision(module)
    maps = [torch.zeros(1, 256, size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    maps.append(maps[-1][..., ::2, ::2])
    image = ImageList(torch.zeros(1, 3, *size), [size])
    (theirs,), (ours,) = module.rpn.anchor_generator(image, maps), model.rpn.anchor_generator(image, maps)
    assert torch.equal(theirs, ours)
    model.rpn.anchor_generator.legacy = False
    assert torch.equal(theirs, model.rpn.anchor_generator(image, maps)[0]) is not differ


# Labels


COCO = get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]
GAPS = [i for i, name in enumerate(COCO) if name == "N/A"]


@pytest.mark.usefixtures("same_kernels")
@torch.no_grad()
def test_cocos_left_out_ids_keep_their_share_of_the_softmax(images: list[Tensor]) -> None:
    module = small(num_classes=91)
    same_layout(module)
    module.roi_heads.box_predictor.cls_score.bias[GAPS] += 1
    module.roi_heads.detections_per_img = 200
    model = from_torchvision(module)
    assert (model.config.num_classes, model.config.heads.unused_outputs) == (80, 10)
    assert model.config.categories[0] == a2fpn.Category(1, "person")
    assert model.config.categories[-1] == a2fpn.Category(90, "toothbrush")
    ids = torch.tensor([category.id for category in model.config.categories])
    for their, our in zip(detections(module, images), model(images), strict=True):
        category = their["labels"] + 1
        real = ~torch.isin(category, torch.tensor(GAPS))
        assert 0 < real.sum() < len(real)
        assert torch.equal(category[real], ids[our["labels"]])
        # The same sums in another order.
        torch.testing.assert_close(their["scores"][real], our["scores"])
        torch.testing.assert_close(their["boxes"][real], our["boxes"])


@pytest.mark.parametrize("detector", [tv.RetinaNet, tv.FCOS])
def test_outputs_of_one_stage_detectors_are_taken_one_by_one(detector: type[nn.Module]) -> None:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=torchvision.ops.feature_pyramid_network.LastLevelP6P7(256, 256),
    )
    module = detector(backbone, 91, **ONE_STAGE).eval()
    scatter(module)
    model = from_torchvision(module)
    assert model.config.num_classes == 80
    maps = [torch.randn(1, 256, 4 - min(i, 3), 5 - i) for i in range(5)]
    theirs, ours = module.head(maps), model.head(maps)
    ids = [category.id for category in model.config.categories]
    torch.testing.assert_close(theirs["cls_logits"][..., ids], ours["cls_logits"])
    assert torch.equal(theirs["bbox_regression"], ours["bbox_regression"])


@pytest.mark.parametrize(
    ("outputs", "names", "expected"),
    [
        (3, None, []),
        (3, ["background", "cat", "dog"], [(1, "cat"), (2, "dog")]),
        (4, ["__background__", "cat", "N/A", "dog"], [(1, "cat"), (3, "dog")]),
        (91, [], []),
    ],
)
def test_categories_are_those_given(outputs: int, names: list[str] | None, expected: list[tuple[int, str]]) -> None:
    with without_values():
        config = torchvision_config(small(num_classes=outputs), categories=names)
    assert [(category.id, category.name) for category in config.categories] == expected
    assert config.num_classes == (len(expected) or outputs - 1)
    assert config.num_classes + config.heads.unused_outputs == outputs - 1


def test_a_wrong_number_of_categories_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 categories were given for a detector with 6 outputs"):
        from_torchvision(small(), categories=["a", "b"])


# State dicts


def old_names(state: dict[str, Tensor], *, retinanet: bool) -> dict[str, Tensor]:
    """The names that torchvision's older published files use."""

    def rename(key: str) -> str:
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", key)
        if retinanet:
            key = re.sub(r"conv\.(\d)\.0\.", lambda match: f"conv.{2 * int(match[1])}.", key)
        return key

    return {rename(key): x for key, x in state.items() if "num_batches_tracked" not in key}


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_older_files_have_other_names(name: str) -> None:
    with without_values():
        module = get_model_builder(name)(weights=None, weights_backbone=None)
        freeze(module.backbone.body, 0.0)
    config = torchvision_config(module)
    state = module.state_dict()
    older = old_names(state, retinanet=name.startswith("retinanet"))
    assert set(older) != set(state)
    new, old = torchvision_state(state, config), torchvision_state(older, config)
    assert {key: x.shape for key, x in old.items()} == {key: x.shape for key, x in new.items()}


PUBLISHED = {name: weights for name, weights in PRETRAINED.items() if isinstance(weights, TorchvisionWeights)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_what_torchvision_would_build_for_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's own builder is told that it has weights; only their loading is left out."""
    weights = PUBLISHED[name]
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *args, **kwargs: {})
    with without_values():
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
            module = get_model_builder(weights.builder)(weights=weights.published, weights_backbone=None)
        config = published_config(weights)
        ours = build_model(config).state_dict()
    theirs = torchvision_config(module)
    assert config == theirs
    assert config.architecture == name.partition(".")[0]
    state = torchvision_state(module.state_dict(), config)
    assert {key: x.shape for key, x in state.items()} == {key: x.shape for key, x in ours.items()}


def test_a_state_of_another_model_is_an_error() -> None:
    module = small()
    config = torchvision_config(module)
    state = torchvision_state({"stray.weight": torch.zeros(1), **module.state_dict()}, config)
    del state["rpn.head.cls_logits.bias"]
    model = from_torchvision(module)
    with pytest.raises(
        CheckpointError, match=r"missing \(1\): rpn\.head\.cls_logits\.bias; unexpected \(1\): stray\.weight"
    ):
        a2fpn.pretrained.checkpoint.load_weights(model, state)


# The module


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_are_told_apart(depth: int) -> None:
    with without_values():
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=2)
        config = torchvision_config(tv.FasterRCNN(backbone, 3))
        assert config.backbone.name == f"resnet{depth}.tv_in1k"
        assert config.backbone.trainable_layers == 2
        ours = TimmBackbone(config.backbone)
    assert set(ours.body.state_dict()) == set(backbone.body.state_dict())


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"])
def test_wider_resnets_are_told_apart(name: str) -> None:
    with without_values():
        backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5)
        config = torchvision_config(tv.FasterRCNN(backbone, 3))
        ours = TimmBackbone(config.backbone).body.state_dict()
    assert config.backbone.name == f"{name}.tv_in1k"
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in backbone.body.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_mode_type_and_the_module_itself_stay(training: bool) -> None:
    module = small().double().train(training)
    before = copy.deepcopy(module.state_dict())
    model = from_torchvision(module)
    assert model.training is training
    assert next(model.parameters()).dtype == torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(x, module.state_dict()[key]) for key, x in before.items())


def test_a_converted_detector_can_be_saved(tmp_path: Any, images: list[Tensor]) -> None:
    model = from_torchvision(small(num_classes=91))
    again = a2fpn.from_pretrained(a2fpn.save_pretrained(model, tmp_path))
    assert again.config == model.config
    with torch.no_grad():
        for before, after in zip(model(images), again(images), strict=True):
            assert largest_difference(before, after) == 0.0


class Subclass(tv.FasterRCNN):
    pass


def mixed_norm(module: nn.Module) -> None:
    module.backbone.body.bn1.eps = 0.5


def two_ratios(module: nn.Module) -> None:
    module.rpn.anchor_generator.aspect_ratios = ((0.5,), (1.0,), (1.0,), (1.0,), (1.0,))


def other_weights(module: nn.Module) -> None:
    module.roi_heads.box_coder.weights = (1.0, 1.0, 1.0, 1.0)


def undecided(module: nn.Module) -> None:
    module.roi_heads.proposal_matcher.low_threshold = 0.3


def fixed_size(module: nn.Module) -> None:
    module.transform.fixed_size = (64, 64)


def own_box_head(module: nn.Module) -> None:
    module.roi_heads.box_head = nn.Flatten()


def own_predictor(module: nn.Module) -> None:
    module.roi_heads.box_predictor = nn.Linear(16, 6)


def no_fpn(module: nn.Module) -> None:
    module.backbone = module.backbone.body


def shorter(module: nn.Module) -> None:
    module.backbone.body.layer4 = module.backbone.body.layer4[:1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            mixed_norm,
            r"its backbone's norm is \[.*0\.5\), .*1e-05\)\], only 'batch norm of one kind'|its backbone's norm",
        ),
        (two_ratios, "its aspect_ratios is .* only 'the same on every level' can be"),
        (other_weights, r"its bbox_reg_weights is \(1\.0, 1\.0, 1\.0, 1\.0\), only \(10\.0"),
        (undecided, r"its box_bg_iou_thresh is 0\.3, only 0\.5"),
        (fixed_size, r"its fixed_size is \(64, 64\), only None"),
        (own_box_head, "its box_head is 'Flatten', only 'TwoMLPHead"),
        (own_predictor, "its box_predictor is 'Linear', only 'FastRCNNPredictor'"),
        (no_fpn, "The backbone is a IntermediateLayerGetter; only one with torchvision's FPN"),
        (shorter, "its backbone is 'a ResNet of 7 blocks, 64 wide', only"),
    ],
)
def test_what_ours_lacks_is_an_error(damage: Callable[[nn.Module], None], message: str) -> None:
    with without_values():
        module = small()
    damage(module)
    with pytest.raises(ValueError, match=message):
        torchvision_config(module)


def test_what_is_no_detector_of_torchvisions_is_an_error() -> None:
    with without_values():
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        subclass, ssd = Subclass(backbone, 3), tv.ssd300_vgg16(weights=None, weights_backbone=None)
    for module, name in ((subclass, "Subclass"), (ssd, "SSD"), (nn.Linear(1, 1), "Linear")):
        with pytest.raises(ValueError, match=f"A {name} cannot be converted, but torchvision's FasterRCNN, MaskRCNN"):
            from_torchvision(module)


def test_sizes_that_torchvision_rounds_down_are_few() -> None:
    """The one known difference: its floating point makes some short sides a pixel smaller than asked for."""
    model = from_torchvision(small())
    wanted = [model.preprocess.target_size(side, side)[0] for side in range(32, 112)]
    theirs = [int(side * (64 / side)) for side in range(32, 112)]
    assert set(wanted) == {64}
    assert set(theirs) <= {63, 64}
    assert theirs.count(63) <= 8


@pytest.mark.parametrize(("theirs", "ours"), [(6, None), (5, 4), (4, 3), (3, 2), (2, 1), (0, 0)])
def test_a_mobilenet_is_frozen_as_torchvision_does(theirs: int, ours: int | None) -> None:
    """Its stages there are one more: the last convolution is one of its own."""
    with without_values():
        body = mobilenet_backbone(
            backbone_name="mobilenet_v3_large",
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            fpn=True,
            trainable_layers=theirs,
        ).body
        config = backbone_config(body)
        backbone = TimmBackbone(config)
    assert config.trainable_layers == ours
    expected = [p.requires_grad for p in body.parameters()]
    assert [p.requires_grad for p in backbone.body.parameters()] == expected
    if theirs == 3:  # what torchvision's weights come with
        assert (sum(expected), len(expected)) == (48, 78)
        assert (
            published_config(TorchvisionWeights("fasterrcnn_mobilenet_v3_large_fpn")).backbone.trainable_layers == ours
        )


def test_pretrained_backbones_are_frozen_as_torchvision_does() -> None:
    assert ResNet50_Weights.IMAGENET1K_V1 is not None
    for trained, stages in itertools.product(range(6), ([1, 2, 3, 4], [2, 3, 4])):
        with without_values():
            backbone = resnet_fpn_backbone(
                backbone_name="resnet18", weights=None, trainable_layers=trained, returned_layers=stages
            )
            config = backbone_config(backbone.body)
            ours = TimmBackbone(config)
        assert config.trainable_layers == (None if trained == 5 else trained)
        theirs = {name for name, p in backbone.body.named_parameters() if p.requires_grad}
        assert {name for name, p in ours.body.named_parameters() if p.requires_grad} == theirs


# Files of torchvision


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_the_detector_of_a_state_dict_is_built_again(name: str, images: list[Tensor]) -> None:
    module = published_like(name)
    options = {"min_size": 64, "max_size": 112}
    again = load_torchvision(module.state_dict(), name, norm_eps=FAST[name], **options)
    ours, theirs = torchvision_config(again), torchvision_config(module)
    assert (ours.backbone.norm, ours.backbone.norm_eps) == (theirs.backbone.norm, theirs.backbone.norm_eps)
    assert (ours.num_classes, ours.categories) == (theirs.num_classes, theirs.categories)
    batch = torch.stack([images[0]])
    with torch.no_grad():
        expected, got = module.backbone.eval()(batch), again.backbone(batch)
    assert largest_difference(expected, got) == 0


def test_numbers_are_read_from_the_tensors() -> None:
    with without_values():
        keypoints = tv.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_keypoints=5)
        retinanet = tv.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=7)
    state = {key: torch.zeros(x.shape, dtype=x.dtype) for key, x in keypoints.state_dict().items()}
    module = load_torchvision(state, "keypointrcnn_resnet50_fpn", norm_eps=1e-5)
    assert module.roi_heads.keypoint_predictor.kps_score_lowres.out_channels == 5
    assert torchvision_config(module).num_classes == 1
    state = {key: torch.zeros(x.shape, dtype=x.dtype) for key, x in retinanet.state_dict().items()}
    assert torchvision_config(load_torchvision(state, "retinanet_resnet50_fpn_v2"), categories=[]).num_classes == 7


def test_what_a_file_does_not_say_must_be_given() -> None:
    state = {"backbone.body.conv1.weight": torch.zeros(1)}
    for name in [name for name, eps in {**FAST, **SLOW}.items() if eps == 0]:
        with pytest.raises(ValueError, match=rf"Give norm_eps: the outputs of {name} depend .* It is 0\.0 if"):
            load_torchvision(state, name)
    with pytest.raises(
        ValueError, match=r"The state dict is not that of torchvision's fcos_resnet50_fpn: (?s:.*)Missing"
    ):
        load_torchvision(state, "fcos_resnet50_fpn")
    with pytest.raises(
        ValueError, match=r"'fasterrcnn_resnet50' cannot be converted\. Did you mean 'fasterrcnn_resnet"
    ):
        load_torchvision(state, "fasterrcnn_resnet50")
    with pytest.raises(ValueError, match=r"has no argument 'minsize'\. Did you mean 'min_size'"):
        load_torchvision(state, "fcos_resnet50_fpn", minsize=64)


def test_the_command_line_converts_a_file_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    module = published_like(name).eval()
    torch.save({"model": module.state_dict(), "epoch": 3}, tmp_path / "tuned.pth")
    command = ["convert", str(tmp_path / "tuned.pth"), "--from", "torchvision", "--model", name, "--output"]
    options = ["--option", "min_size=64", "--option", "max_size=112", "--option", "box_detections_per_img=4"]
    with pytest.raises(SystemExit) as ended:
        main([*command, str(tmp_path / "ours"), *options])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert re.match(
        r"Same as torchvision on a random image: features differ by \S+ \(relative\), scores by \S+\.\n", said
    )
    assert f'a2fpn.from_pretrained("{tmp_path / "ours"}")' in said
    again = a2fpn.from_pretrained(tmp_path / "ours")
    assert largest_difference(again.state_dict(), from_torchvision(module).state_dict()) == 0
    assert read_checkpoint(tmp_path / "ours").metadata["converted_from"]["framework"] == "torchvision"


def test_two_sides_that_differ_are_an_error() -> None:
    module = small()
    model = from_torchvision(module)
    assert "Same as torchvision" in _compare(module, model)
    with torch.no_grad():
        model.backbone.body.conv1.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"The two sides differ on a random image: features by \S+ \(relative\)"):
        _compare(module, model)
