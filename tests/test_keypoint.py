import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

import a2fpn
from a2fpn.config import KeypointRCNNConfig
from a2fpn.data import CocoDataset, DataError, ImageError, read_coco, train_transforms
from a2fpn.data.transforms import mirrored_keypoints
from a2fpn.detectors.keypoint_rcnn import resize_keypoints
from tests.helpers import in_our_layout, random_target, randomize, tiny_model, torchvision_names, with_zero_gradient

SIZE = (64, 96)
BOXES = [[5.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 30.0]]


def test_keypoints_learn() -> None:
    # Without proposals of the RPN the objects alone are what the keypoint head sees.
    model = tiny_model("keypointrcnn_fpn", rpn_post_nms_top_n_train=0)
    losses = model([torch.rand(3, *SIZE)], [random_target(BOXES, SIZE)])
    losses["loss_keypoint"].backward()
    assert with_zero_gradient(model.roi_heads.keypoint_head) == []
    assert with_zero_gradient(model.roi_heads.keypoint_predictor) == []


def test_what_is_not_labeled_does_not_count() -> None:
    model = tiny_model("keypointrcnn_fpn", rpn_post_nms_top_n_train=0)
    image, target = torch.rand(3, *SIZE), random_target(BOXES, SIZE)
    losses = []
    for place, visibility in ((0.0, 0), (30.0, 0), (30.0, 2)):
        keypoints = target["keypoints"].clone()
        keypoints[:, 2] = torch.tensor([place, place, visibility])
        losses.append(model([image], [target | {"keypoints": keypoints}])["loss_keypoint"].item())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    hidden = target["keypoints"] * torch.tensor([1, 1, 0])
    assert model([image], [target | {"keypoints": hidden}])["loss_keypoint"] == 0


def test_keypoints_are_in_the_images_own_pixels() -> None:
    rule = {"resize": "shortest_edge", "min_size": 48, "max_size": 96}
    model = tiny_model("keypointrcnn_fpn", **rule).eval()
    randomize(model.roi_heads)
    image = torch.rand(3, 24, 40)
    (resized,) = model([image])
    batch = model.preprocess([image])
    ready = batch.tensor[0, :, :48, :80] * model.preprocess.std + model.preprocess.mean
    (given,) = model([ready], resize=False)
    assert len(resized["scores"]) > 1
    torch.testing.assert_close(resized["keypoints"] * torch.tensor([2.0, 2.0, 1.0]), given["keypoints"])
    # They lie in their boxes, which a heatmap covers.
    x, y, ones = resized["keypoints"].unbind(-1)
    x0, y0, x1, y1 = resized["boxes"][:, :, None].unbind(1)
    assert ((x >= x0 - 1) & (x <= x1 + 1) & (y >= y0 - 1) & (y <= y1 + 1)).all()
    assert (ones == 1).all()


def test_losses_follow_the_resized_keypoints() -> None:
    target = random_target(BOXES, SIZE)
    large = {
        "boxes": target["boxes"] * 2,
        "labels": target["labels"],
        "keypoints": resize_keypoints(target["keypoints"], SIZE, (128, 192)),
    }
    model = tiny_model("keypointrcnn_fpn", resize="shortest_edge", min_size=128, max_size=192)
    batch = model.preprocess([torch.ones(3, *SIZE)])
    ready = batch.tensor[0] * model.preprocess.std + model.preprocess.mean
    losses = []
    for image, given, resize in ((torch.ones(3, *SIZE), target, True), (ready, large, False)):
        torch.manual_seed(1)
        losses.append(model([image], [given], resize=resize))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keypoints", "got"),
    [
        (None, "none"),
        (torch.zeros(2, 4, 3), "(2, 4, 3)"),
        (torch.zeros(1, 3, 3), "(1, 3, 3)"),
        (torch.zeros(2), "(2,)"),
    ],
)
def test_missing_keypoints_are_an_error(keypoints: Tensor | None, got: str) -> None:
    target: dict[str, Any] = {**random_target(BOXES, SIZE), "image_id": 42, "keypoints": keypoints}
    message = f"image_id 42: keypointrcnn trains on keypoints (N, K, 3) = (2, 3, 3), got {got}. Without keypoints use "
    with pytest.raises(ValueError, match=re.escape(f"{message}fasterrcnn.")):
        tiny_model("keypointrcnn_fpn")(
            [torch.rand(3, *SIZE)], [{key: value for key, value in target.items() if value is not None}]
        )


def test_heads_are_as_configured() -> None:
    with torch.device("meta"):
        heads = a2fpn.create_model("keypointrcnn_fpn_r18", num_keypoints=4, num_classes=2).roi_heads
    assert [m.out_channels for m in heads.keypoint_head if isinstance(m, nn.Conv2d)] == [512] * 8
    assert heads.keypoint_predictor.kps_score_lowres.out_channels == 4
    assert heads.keypoint_roi_pool.output_size == (14, 14)
    assert tiny_model("keypointrcnn_fpn", keypoint_layers=0).roi_heads.keypoint_predictor.out_channels == 3
    with pytest.raises(ValueError, match="num_keypoints must be at least 1, got 0"):
        KeypointRCNNConfig(num_keypoints=0)
    with pytest.raises(ValueError, match="keypoint_layers must be between 0 and 100, got 101"):
        KeypointRCNNConfig(keypoint_layers=101)
    with pytest.raises(ValueError, match="Unknown argument 'num_keypoints'"):
        tiny_model("maskrcnn_fpn", num_keypoints=3)


# The peer


def twin(**options: Any) -> nn.Module:
    """torchvision's Keypoint R-CNN on a ResNet-18, with a narrow keypoint head."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return detection.KeypointRCNN(
        backbone,
        3,
        keypoint_head=KeypointRCNNHeads(256, (16,)),
        keypoint_predictor=KeypointRCNNPredictor(16, 3),
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        rpn_post_nms_top_n_train=100,
        box_score_thresh=0.0,
        box_detections_per_img=30,
        **options,
    )


class OfOneImage(MultiScaleRoIAlign):
    """torchvision's pooling, called with RoIs (R, 5) as well."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor] | Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        return super().forward(x, [boxes[:, 1:]] if isinstance(boxes, Tensor) else boxes, sizes)


@pytest.mark.parametrize("pool", ["ours", "torchvision's"])
def test_it_is_torchvisions(pool: str) -> None:
    """With torchvision's RoI pooling the difference is 0.0; ours sums in another order."""
    rule = {"min_size": 128, "max_size": 192}
    model = a2fpn.create_model(
        "keypointrcnn_fpn_r18",
        num_classes=2,
        num_keypoints=3,
        keypoint_channels=16,
        keypoint_layers=1,
        legacy_anchors=True,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        rpn_post_nms_top_n_train=100,
        score_threshold=0.0,
        detections_per_image=30,
        **rule,
    )
    randomize(model.rpn, std=0.02)
    randomize(model.roi_heads.box_predictor)
    randomize(model.roi_heads.keypoint_predictor)
    theirs = in_our_layout(twin(**rule))
    theirs.load_state_dict(torchvision_names(model.state_dict()))
    if pool == "torchvision's":
        levels = ["p2", "p3", "p4", "p5"]
        model.roi_heads.box_roi_pool = OfOneImage(levels, 7, 2)
        model.roi_heads.keypoint_roi_pool = OfOneImage(levels, 14, 2)
    image, target = torch.rand(3, 64, 90), random_target([[5, 10, 50, 45], [30, 2, 80, 60]], (64, 90), classes=2)
    tolerance = {"rtol": 0, "atol": 0} if pool == "torchvision's" else {"rtol": 1e-4, "atol": 1e-3}

    states = [copy.deepcopy(m.state_dict()) for m in (model, theirs)]
    losses = []
    for detector, shift in ((model, 0), (theirs, 1)):
        # torchvision draws a number to choose an image size, before the RPN draws its samples.
        handle = detector.get_submodule("rpn").register_forward_pre_hook(lambda *_: torch.manual_seed(1) and None)
        losses.append(detector.train()([image], [{**target, "labels": target["labels"] + shift}]))
        handle.remove()
    # What is sampled depends on proposals, which are equal to the last bit; RoI pooling comes after.
    torch.testing.assert_close(losses[0], losses[1], **tolerance)

    for detector, state in zip((model, theirs), states, strict=True):
        detector.load_state_dict(state)
    with torch.no_grad():
        (ours,), (wanted,) = model.eval()([image]), theirs.eval()([image])
    assert len(ours["scores"]) == 30
    assert torch.equal(ours["labels"], wanted["labels"] - 1)
    names = {"boxes": "boxes", "scores": "scores", "keypoints": "keypoints", "keypoint_scores": "keypoints_scores"}
    for ours_name, name in names.items():
        torch.testing.assert_close(ours[ours_name], wanted[name], **tolerance)


# Data


NAMES = ["nose", "left_ear", "right_ear"]


def coco(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Two images, of which the first has an object with keypoints and one without; images and maps are written."""
    (tmp_path / "maps").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.full((40, 60), 7, dtype=np.uint8)).save(tmp_path / "maps" / f"{name}.png")
    points = [12, 13, 2, 20, 20, 1, 0, 0, 0]
    common = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
    return {
        "images": [{"id": i, "file_name": f"{n}.png", "height": 40, "width": 60} for i, n in ((1, "a"), (2, "b"))],
        "categories": [{"id": 1, "name": "cat", "keypoints": NAMES}],
        "annotations": [{**common, "keypoints": points, **changes}, common],
    }


def test_a_data_set_gives_keypoints(tmp_path: Path) -> None:
    dataset = CocoDataset(tmp_path, coco(tmp_path))
    assert dataset.coco.keypoint_names == tuple(NAMES)
    assert dataset.coco.num_keypoints == 3
    (_, target), (_, empty) = dataset[0], dataset[1]
    assert target["keypoints"].tolist() == [[[12, 13, 2], [20, 20, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert target["keypoints"].dtype == torch.float32
    assert empty["keypoints"].shape == (0, 3, 3)
    assert set(dataset.target_keys) == set(target)
    model = tiny_model("keypointrcnn_fpn", num_classes=1)
    model.check_data(dataset.coco.name, dataset.target_keys)
    assert model([dataset[0][0], dataset[1][0]], [target, empty])["loss_keypoint"] > 0


def test_a_data_set_without_keypoints_has_none(tmp_path: Path) -> None:
    data = coco(tmp_path, keypoints=[])
    dataset = CocoDataset(tmp_path, data)
    assert "keypoints" not in dataset[0][1]
    with pytest.raises(ValueError, match=r"has no keypoints, which keypointrcnn trains on\. .* use fasterrcnn"):
        tiny_model("keypointrcnn_fpn").check_data(dataset.coco.name, dataset.target_keys)


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        ([1, 2, 2], r"a list of 3 x 3 numbers as in the rest of the file, got 3"),
        ("nose", r"a list of 3 x 3 numbers as in the rest of the file, got str"),
        ([1, 2, None] * 3, r"its keypoints have non-numeric values"),
        ([1, 2, math.nan] * 3, r"its keypoints have non-numeric values"),
    ],
)
def test_unusable_keypoints_are_problems(tmp_path: Path, keypoints: Any, message: str) -> None:
    data = coco(tmp_path)
    data["annotations"][1] = {**data["annotations"][1], "id": 9, "keypoints": keypoints}
    (problem,) = read_coco(data).losses
    assert re.search(f"annotation 9: .*{message}", problem)


def test_semantic_maps_come_from_a_folder(tmp_path: Path) -> None:
    data = coco(tmp_path)
    dataset = CocoDataset(tmp_path, data, semantic=tmp_path / "maps")
    semantic = dataset[0][1]["semantic"]
    assert isinstance(semantic, tv_tensors.Mask)
    assert (semantic.dtype, tuple(semantic.shape), semantic.unique().tolist()) == (torch.uint8, (40, 60), [7])
    assert "semantic" in dataset.target_keys
    with pytest.raises(DataError, match="nowhere: no such folder of semantic maps"):
        CocoDataset(tmp_path, data, semantic="nowhere")
    model = tiny_model("htc_fpn", semantic="stuff")
    with pytest.raises(ValueError, match=r"data has no semantic, .*Without stuff maps use semantic='things' or False"):
        model.check_data("data", {"boxes", "labels", "masks"})


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "no such file; every image needs a semantic map of its name"),
        (np.zeros((40, 60, 3), dtype=np.uint8), "must be an 8-bit palette or gray image, got 'RGB'"),
        (np.zeros((60, 40), dtype=np.uint8), r"the map has size \(width, height\) \(40, 60\), its image \(60, 40\)"),
    ],
)
def test_unusable_semantic_maps_are_errors(tmp_path: Path, pixels: Any, message: str) -> None:
    data = coco(tmp_path)
    (tmp_path / "maps" / "a.png").unlink()
    if pixels is not None:
        Image.fromarray(pixels).save(tmp_path / "maps" / "a.png")
    with pytest.raises(ImageError, match=message):
        CocoDataset(tmp_path, data, semantic=tmp_path / "maps", strict=True)[0]
    # Otherwise the next image takes its place, as where the image itself is unreadable.
    assert CocoDataset(tmp_path, data, semantic=tmp_path / "maps")[0][1]["image_id"] == 2


# Augmentation


def marked(points: list[tuple[int, int]]) -> tuple[tv_tensors.Image, dict[str, Any]]:
    """An image of 40 x 60 pixels whose only bright pixels are at the keypoints, and a map of them."""
    pixels = torch.zeros(3, 40, 60, dtype=torch.uint8)
    for number, (x, y) in enumerate(points):
        pixels[number, y, x] = 200
    keypoints = torch.tensor([[[x + 0.5, y + 0.5, 2.0] for x, y in points]])
    target = {
        "boxes": tv_tensors.BoundingBoxes([[0.0, 0, 60, 40]], format="XYXY", canvas_size=(40, 60)),
        "labels": torch.zeros(1, dtype=torch.int64),
        "keypoints": keypoints,
        "semantic": tv_tensors.Mask(pixels[0] // 200),
    }
    return tv_tensors.Image(pixels), target


@pytest.mark.parametrize(
    "options",
    [{}, {"horizontal_flip": 1.0}, {"vertical_flip": 1.0}, {"rotate90": 1.0}, {"crop_size": 30}],
    ids=["nothing", "horizontal", "vertical", "turn", "crop"],
)
def test_keypoints_and_maps_follow_the_pixels(options: dict[str, Any]) -> None:
    augment = train_transforms(
        lambda height, width: (height, width),
        **{"scale_range": (1.0, 1.0), "crop_size": None, "horizontal_flip": 0.0, **options},
    )
    seen = 0
    for _ in range(8):
        image, target = augment(*marked([(10, 5), (40, 8), (50, 30)]))
        if not len(target["keypoints"]):
            continue
        for channel, (x, y, visibility) in enumerate(target["keypoints"][0].tolist()):
            bright = torch.nonzero(image[channel])
            assert len(bright) == (visibility > 0)
            seen += len(bright)
            if len(bright):
                assert (bright[0] + 0.5).tolist() == [y, x]
            else:
                assert (x, y) == (0, 0)
        assert torch.equal(target["semantic"].as_subclass(Tensor) * 200, image[0].as_subclass(Tensor))
    assert seen > 3


def test_keypoints_are_scaled_with_the_image() -> None:
    augment = train_transforms(
        lambda height, width: (2 * height, 3 * width), scale_range=(1.0, 1.0), crop_size=None, horizontal_flip=0.0
    )
    _, target = augment(*marked([(10, 5), (40, 8), (50, 30)]))
    assert target["keypoints"][0].tolist() == [[31.5, 11, 2], [121.5, 17, 2], [151.5, 61, 2]]


FLIPPED: dict[str, Any] = {"scale_range": (1.0, 1.0), "crop_size": None, "horizontal_flip": 1.0}


def test_a_flip_exchanges_left_and_right() -> None:
    image, target = marked([(10, 5), (40, 8), (50, 30)])
    target["keypoints"][0, 2] = 0
    _, named = train_transforms(lambda *size: size, **FLIPPED, keypoint_names=NAMES)(image, dict(target))
    assert named["keypoints"][0].tolist() == [[49.5, 5.5, 2], [0, 0, 0], [19.5, 8.5, 2]]


@pytest.mark.parametrize("names", [(), NAMES[:2], ["head", "tail", "brightness"]])
def test_images_whose_keypoints_have_no_sides_are_not_flipped(names: Sequence[str]) -> None:
    image, target = marked([(10, 5), (40, 8), (50, 30)])
    augment = train_transforms(lambda *size: size, **FLIPPED, vertical_flip=1.0, keypoint_names=names)
    same, found = augment(image, dict(target))
    assert torch.equal(same, image)
    assert torch.equal(found["keypoints"], target["keypoints"])
    del target["keypoints"]
    assert not torch.equal(augment(image, dict(target))[0], image)


def test_keypoints_that_nobody_learns_do_not_hinder_a_flip() -> None:
    image, target = marked([(10, 5), (40, 8), (50, 30)])
    flipped, found = train_transforms(lambda *size: size, **FLIPPED, keypoint_names=None)(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert "keypoints" not in found


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["Left_Eye", "Right_Eye"], (1, 0)),
        (["LEFT EYE", "RIGHT EYE"], (1, 0)),
        (["nose", "leftEye", "rightEye"], (0, 2, 1)),
        (["EyeRight", "Nose", "EyeLeft"], (2, 1, 0)),
        (["eye.l", "eye.r"], (1, 0)),
        (["L_Eye", "R_Eye", "l"], (1, 0, 2)),
        (["left hand left thumb", "right hand right thumb"], (1, 0)),
        (["left_1", "left_2", "right_2", "right_1"], (3, 2, 1, 0)),
        (["left_eye", "brightness"], None),
        (["left_eye", "right_eye", "left_ear"], None),
        (["bright", "leftover"], None),
        (["links", "rechts"], None),
        (["nose"], None),
        ([], None),
    ],
)
def test_pairs_are_found_by_whole_words_in_any_case(names: Sequence[str], places: tuple[int, ...] | None) -> None:
    assert mirrored_keypoints(names) == places
