import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

import a2fpn
from a2fpn.cli.demo import DEMO_DATA
from a2fpn.compose import override
from a2fpn.config import Category
from a2fpn.convert.torchvision_config import published_config
from a2fpn.data import encode_box_masks
from a2fpn.evaluation import evaluate_coco
from a2fpn.inference import Predictor, Result, list_images
from a2fpn.inference.tta import Augmentation
from a2fpn.pretrained.catalog import TorchvisionWeights

CATEGORIES = (Category(7, "cat"), Category(23, "dog"), Category(90, "x-ray"))
SMALL = {
    "backbone": "test_efficientnet",
    "neck_args": {"out_channels": 16},
    "box_channels": 16,
    "mask_channels": 8,
    "mask_layers": 1,
    "min_size": 64,
    "max_size": 128,
    "score_threshold": 0.0,
    "detections_per_image": 8,
}


def create(name="maskrcnn_fpn", **overrides):
    torch.manual_seed(0)
    return a2fpn.create_model(name, **{**SMALL, "categories": CATEGORIES, **overrides})


@pytest.fixture(scope="module")
def predictor():
    return Predictor(create())


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def make_result(n=3, size=(40, 60), seed=0):
    """A result of n objects with masks that fill their boxes."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, (size[1] - 10, size[0] - 10), (n, 2))
    boxes = np.concatenate([corners, corners + rng.integers(2, 10, (n, 2))], axis=1).astype(np.float32)
    return Result(
        boxes=boxes,
        scores=np.sort(rng.uniform(size=n)).astype(np.float32)[::-1],
        labels=rng.integers(0, len(CATEGORIES), n),
        size=size,
        categories=CATEGORIES,
        rles=tuple(encode_box_masks(torch.ones(n, 1, 28, 28), torch.from_numpy(boxes), size)),
    )


def test_predictor_gives_the_contract(predictor, pixels):
    result = predictor(pixels)
    assert len(result) == 8
    assert result.boxes.shape == (8, 4)
    assert result.boxes.dtype == np.float32
    assert result.scores.dtype == np.float32
    assert result.labels.dtype == np.int64
    assert result.size == (48, 80)
    assert (np.diff(result.scores) <= 0).all()
    assert ((result.boxes >= 0) & (result.boxes <= [80, 48, 80, 48])).all()
    assert result.masks.shape == (8, 48, 80)
    assert result.masks.dtype == bool
    assert result.categories == CATEGORIES
    assert set(result.names) <= {"cat", "dog", "x-ray"}
    assert sum(result.counts.values()) == 8


def test_masks_are_those_of_the_model_pasted_into_the_image(predictor, pixels):
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    model = predictor.model.eval()
    with torch.inference_mode():
        (expected,) = model([tensor])
    (result,) = predictor.predict([tensor])
    np.testing.assert_array_equal(result.masks, (expected["masks"] > 0.5)[:, 0].numpy())
    np.testing.assert_array_equal(result.boxes, expected["boxes"].numpy())
    assert result.masks.any()


def test_every_way_to_give_an_image_finds_the_same(predictor, pixels, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = predictor(pixels)
    for image in (str(path), path, Image.fromarray(pixels), tensor, tensor / 255):
        result = predictor(image)
        np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_array_equal(result.labels, expected.labels)
        np.testing.assert_array_equal(result.load_image(), pixels)
        from_file = isinstance(image, (str, type(path)))
        assert (result.image is None) == from_file
        assert result.path == (str(path) if from_file else None)


def test_gray_and_transparent_images_become_rgb(predictor):
    gray = np.full((20, 30), 128, dtype=np.uint8)
    assert (predictor(gray).image == 128).all()
    assert (predictor(Image.fromarray(gray)).image == 128).all()
    transparent = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    assert (predictor(transparent).image == 255).all()


def test_folders_and_sequences_give_lists_in_order(predictor, pixels, tmp_path):
    for index, name in enumerate(["b.png", "a.PNG", "c.jpg"], start=1):
        Image.fromarray(pixels[: 10 * index]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder").mkdir()
    results = predictor(tmp_path)
    assert [result.size[0] for result in results] == [20, 10, 30]
    (tmp_path / "._a.png").write_bytes(b"Mac OS X")
    assert [path.name for path in list_images(tmp_path)] == ["a.PNG", "b.png", "c.jpg"]
    results = predictor([tmp_path / "b.png", pixels])
    assert [result.size for result in results] == [(10, 80), (48, 80)]
    assert predictor([]) == []


def test_results_do_not_depend_on_the_batch(predictor, pixels):
    tensors = [torch.from_numpy(pixels[:height]).permute(2, 0, 1) for height in (48, 24)]
    for batched, tensor in zip(predictor.predict(tensors), tensors, strict=True):
        np.testing.assert_allclose(batched.boxes, predictor(tensor).boxes, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_sizes(predictor, size):
    result = predictor(np.zeros((*size, 3), dtype=np.uint8))
    assert result.size == size
    assert result.masks.shape == (len(result), *size)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.png", ValueError, r"nowhere\.png: no such file"),
        (np.zeros((4, 4, 3)), ValueError, r"uint8 array \(H, W, 3\).*float64 of shape \(4, 4, 3\)"),
        (np.zeros((4, 4, 4), dtype=np.uint8), ValueError, r"got uint8 of shape \(4, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), ValueError, r"shape \(2, 4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"\(3, H, W\).*\(1, 3, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), ValueError, r"shape \(0, 4, 3\)"),
        (7, TypeError, "path, PIL image, uint8 array or tensor.*got int"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_image_is_an_error(predictor, image, error, message):
    with pytest.raises(error, match=message):
        predictor(image)


def test_a_folder_without_images_is_an_error(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"No images in the folder .*\.jpg.*sub-folders are not searched"):
        predictor(tmp_path)


@pytest.mark.parametrize("model", [torch.nn.Identity(), "maskrcnn_a2fpn_r50"])
def test_only_detectors_are_accepted(model):
    with pytest.raises(TypeError, match=r"create_model.*got (Identity|str)"):
        Predictor(model)


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_score_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {threshold}"):
        Predictor(create(), score_threshold=threshold)


def test_score_threshold_drops_the_lower_scores(pixels):
    model = create()
    every = Predictor(model)(pixels)
    threshold = float(np.median(every.scores))
    some = Predictor(model, score_threshold=threshold)(pixels)
    assert 0 < len(some) < len(every)
    assert len(some) == (every.scores >= threshold).sum()
    assert some.scores.min() >= threshold


def test_a_model_in_training_stays_as_it_was(pixels):
    model = create().train()
    model.neck.eval()
    before = {name: module.training for name, module in model.named_modules()}
    predictor = Predictor(model)
    predictor(pixels)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="uint8"):
        predictor(pixels.astype(float))
    with pytest.raises(ValueError, match="H, W"):
        predictor.predict([torch.zeros(5, 4, 4)])
    assert {name: module.training for name, module in model.named_modules()} == before

    # Nothing that inference mode made, such as cached anchors, may reach the next training step.
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 48, 80, dtype=torch.uint8),
    }
    losses = model.train()([torch.from_numpy(pixels).permute(2, 0, 1)], [target])
    sum(losses.values()).backward()
    assert model.rpn.head.cls_logits.weight.grad.abs().sum() > 0


def test_box_detectors_have_no_masks(pixels):
    result = Predictor(create("fasterrcnn_fpn"))(pixels)
    assert len(result) == 8
    assert result.rles is None
    assert result.masks is None
    assert "segmentation" not in result.to_coco(1)[0]
    pytest.importorskip("supervision")
    assert result.to_supervision().mask is None


def test_a_model_without_categories_numbers_its_classes(pixels):
    result = Predictor(create(categories=(), num_classes=2))(pixels)
    assert set(result.names) <= {"class 0", "class 1"}
    assert {record["category_id"] for record in result.to_coco(1)} == set((result.labels + 1).tolist())


def test_to_coco_round_trip_reaches_perfect_ap():
    result = make_result(n=12)
    records = result.to_coco(image_id=5)
    assert json.loads(json.dumps(records)) == records
    assert {record["category_id"] for record in records} <= {7, 23, 90}
    x0, y0, x1, y1 = result.boxes[0].tolist()
    assert records[0]["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    truth = {
        "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
        "annotations": [{**record, "id": index, "iscrowd": 0} for index, record in enumerate(records)],
    }
    metrics = evaluate_coco(truth, records)
    assert metrics.bbox.ap == pytest.approx(1)
    assert metrics.segm.ap == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:OpenCV")
@pytest.mark.parametrize("n", [0, 4])
def test_to_supervision(n):
    supervision = pytest.importorskip("supervision")
    result = make_result(n)
    detections = result.to_supervision()
    assert len(detections) == n
    np.testing.assert_array_equal(detections.xyxy, result.boxes)
    np.testing.assert_array_equal(np.asarray(detections.mask), result.masks)
    if n and hasattr(getattr(supervision, "CompactMask", None), "from_coco_rle"):
        assert isinstance(detections.mask, supervision.CompactMask)
        assert len(supervision.MaskAnnotator().annotate(np.zeros((*result.size, 3), np.uint8), detections)) > 0
    np.testing.assert_array_equal(detections.class_id, result.labels)
    assert tuple(detections.data["class_name"]) == result.names


@given(n=st.integers(0, 20), seed=st.integers(0, 99), threshold=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_above_keeps_exactly_the_objects_that_score_enough(n, seed, threshold):
    result = make_result(n, seed=seed)
    kept = result.above(threshold)
    count = int((result.scores >= threshold).sum())
    assert len(kept) == len(kept.rles) == count
    np.testing.assert_array_equal(kept.boxes, result.boxes[:count])
    assert kept.names == result.names[:count]
    assert kept.to_coco(1) == result.to_coco(1)[:count]
    assert len(result.above(0)) == n


def test_many_objects_of_a_large_image_stay_small():
    result = make_result(n=400, size=(1024, 1024))
    assert len(pickle.dumps(result)) < 100_000


def test_an_empty_result_works_everywhere():
    result = make_result(n=0)
    assert repr(result) == "<Result: 0 objects in 60 x 40 pixels>"
    assert result.to_coco(1) == []
    assert result.masks.shape == (0, 40, 60)
    assert result.names == ()


def test_plot_draws_what_scores_enough(pixels):
    result = make_result(n=5, size=(48, 80))
    everything = result.plot(pixels, score_threshold=0)
    nothing = result.plot(pixels, score_threshold=1)
    assert everything.mode == "RGB"
    assert np.asarray(everything).shape[1] == np.asarray(nothing).shape[1]
    assert everything.tobytes() != nothing.tobytes()
    assert result.plot(pixels).tobytes() == result.plot(pixels, score_threshold=0.5).tobytes()


def test_plot_without_an_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither the image nor its path; give the image to plot\(image=...\)"):
        make_result().plot()


def test_plot_reads_the_file_again(predictor, pixels, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    result = predictor(path)
    assert result.plot(score_threshold=0).tobytes() != result.plot(np.zeros_like(pixels), score_threshold=0).tobytes()
    path.unlink()
    with pytest.raises(ValueError, match=r"image\.png: no such file"):
        result.plot()


# Keypoints


@pytest.fixture(scope="module")
def keypoint_predictor():
    options = {key: value for key, value in SMALL.items() if not key.startswith("mask_")}
    torch.manual_seed(0)
    return Predictor(
        a2fpn.create_model(
            "keypointrcnn_fpn",
            **options,
            keypoint_channels=8,
            keypoint_layers=1,
            num_keypoints=3,
            keypoint_names=["nose", "left_ear", "right_ear"],
            categories=CATEGORIES,
        )
    )


def test_keypoints_are_those_of_the_model(keypoint_predictor, pixels):
    with torch.inference_mode():
        (expected,) = keypoint_predictor.model.eval()([torch.from_numpy(pixels).permute(2, 0, 1)])
    result = keypoint_predictor(pixels)
    np.testing.assert_array_equal(result.keypoints, expected["keypoints"].numpy())
    np.testing.assert_array_equal(result.keypoint_scores, expected["keypoint_scores"].numpy())
    assert result.keypoints.shape == (8, 3, 3)
    assert result.keypoints.dtype == result.keypoint_scores.dtype == np.float32
    assert result.keypoint_names == ("nose", "left_ear", "right_ear")
    assert result.masks is None
    best = result.above(float(result.scores[2]))
    np.testing.assert_array_equal(best.keypoints, result.keypoints[: len(best)])
    np.testing.assert_array_equal(best.keypoint_scores, result.keypoint_scores[: len(best)])


def test_keypoints_in_the_formats_of_others(keypoint_predictor, pixels):
    pytest.importorskip("supervision")
    result = keypoint_predictor(pixels)
    records = json.loads(json.dumps(result.to_coco(4)))
    for record, points, score in zip(records, result.keypoints, result.scores, strict=True):
        assert record["keypoints"] == points.ravel().tolist()
        assert len(record["keypoints"]) == 9
        assert record["score"] == pytest.approx(float(score))
    detections, keypoints = result.to_supervision(), result.to_supervision_keypoints()
    np.testing.assert_array_equal(detections.data["keypoints"], result.keypoints)
    np.testing.assert_array_equal(detections[:2].data["keypoints"], result.keypoints[:2])
    np.testing.assert_array_equal(keypoints.xy, result.keypoints[..., :2])
    np.testing.assert_array_equal(keypoints.class_id, result.labels)
    assert keypoints.data["class_name"].tolist() == list(result.names)
    assert result.plot(score_threshold=0).width >= 480
    empty = result.above(1.0)
    assert (empty.to_coco(1), len(empty.to_supervision_keypoints().xy)) == ([], 0)
    assert empty.keypoints.shape == (0, 3, 3)
    assert "keypoints" not in make_result().to_supervision().data
    with pytest.raises(ValueError, match="has no keypoints; they come from detectors such as keypointrcnn"):
        make_result().to_supervision_keypoints()


def test_keypoints_of_several_views_or_tiles_are_an_error(keypoint_predictor, pixels):
    with pytest.raises(ValueError, match="Keypoints of several tiles can't be merged; predict without tile"):
        keypoint_predictor(pixels, tile=40)
    with pytest.raises(ValueError, match="can't flip keypoints; use a detector of boxes or masks"):
        keypoint_predictor(pixels, tta=True)
    whole = keypoint_predictor(pixels, tile=80)  # it fits one tile
    np.testing.assert_array_equal(whole.keypoints, keypoint_predictor(pixels).keypoints)


def test_names_go_with_the_keypoints_that_they_name(tmp_path):
    with torch.device("meta"):
        source = a2fpn.create_model("keypointrcnn_fpn_r18", keypoint_names=[f"point {i}" for i in range(17)])
        other = a2fpn.create_model("keypointrcnn_fpn_r18", num_keypoints=4)
    assert source.config.heads.keypoint_names[16] == "point 16"
    assert other.config.heads.keypoint_names == ()
    model = a2fpn.create_model(
        "keypointrcnn_fpn", backbone="test_resnet", num_keypoints=2, keypoint_names=["a", "b"], keypoint_layers=0
    )
    a2fpn.save_pretrained(model, tmp_path / "model")
    assert a2fpn.from_pretrained(tmp_path / "model").config.heads.keypoint_names == ("a", "b")
    published = published_config(TorchvisionWeights("keypointrcnn_resnet50_fpn", frozen_eps=0.0))
    assert published.heads.keypoint_names[:2] == ("nose", "left_eye")
    changed = override(published, None, {"num_keypoints": 5})
    assert (changed.heads.num_keypoints, changed.heads.keypoint_names) == (5, ())
    assert override(published, None, {"num_keypoints": 17}).heads == published.heads
    with pytest.raises(ValueError, match="num_keypoints is 17 and keypoint_names has 2 names; give one name per"):
        a2fpn.create_model("keypointrcnn_fpn_r18", keypoint_names=["a", "b"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_finds_the_same_as_cpu(pixels):
    expected = Predictor(create())(pixels)
    result = Predictor(create(), device="cuda")(pixels)
    np.testing.assert_allclose(result.boxes[:3], expected.boxes[:3], atol=0.1)


# Options of a prediction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nms_threshold": 2.0}, ValueError, r"nms_threshold must be between 0 and 1, got 2\.0"),
        ({"max_objects": 0}, ValueError, "at least 1, got 0"),
        ({"soft_nms": "hard"}, ValueError, "linear, gaussian or None, got 'hard'"),
        ({"tile": 8}, ValueError, "tile must be at least 16 pixels, got 8"),
        ({"overlap": -0.1}, ValueError, r"overlap must be between 0 and 0\.9"),
        ({"tiles": 64}, TypeError, "unexpected keyword argument 'tiles'"),
    ],
)
def test_options_out_of_range(predictor, pixels, options, error, message):
    with pytest.raises(error, match=message):
        predictor(pixels, **options)
    with pytest.raises(error, match=message):
        Predictor(predictor.model, **options)


def test_options_of_a_call_take_the_place_of_those_of_the_predictor(pixels):
    predictor = Predictor(create(), max_objects=4)
    assert len(predictor(pixels)) == 4
    assert len(predictor(pixels, max_objects=2)) == 2
    assert len(predictor(pixels, max_objects=None)) == 8
    assert [len(result) for result in predictor([pixels, pixels], max_objects=3)] == [3, 3]
    assert len(predictor(pixels)) == 4
    assert predictor.model.roi_heads.rule.detections_per_image == 8


def test_a_threshold_below_the_models_own_finds_more(pixels):
    model = create(score_threshold=0.99)
    assert len(Predictor(model)(pixels)) == 0
    assert len(Predictor(model, score_threshold=0.0)(pixels)) == 8


def test_nms_and_soft_nms(pixels):
    predictor = Predictor(create(detections_per_image=1000))
    plain = predictor(pixels)
    assert len(predictor(pixels, nms_threshold=0.1)) < len(plain) < len(predictor(pixels, nms_threshold=0.9))
    for kind in ("linear", "gaussian"):
        soft = predictor(pixels, soft_nms=kind)
        assert len(soft) > len(plain)
        assert (np.diff(soft.scores) <= 0).all()


@pytest.mark.parametrize("name", ["maskrcnn_fpn", "fasterrcnn_fpn"])
def test_one_unchanged_view_is_the_prediction_itself(pixels, name):
    predictor = Predictor(create(name, nms_threshold=0.3))
    expected = predictor(pixels)
    result = predictor(pixels, tta=Augmentation(scales=(1.0,), horizontal_flip=False))
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)
    np.testing.assert_array_equal(result.labels, expected.labels)
    if expected.masks is not None:
        assert (result.masks != expected.masks).mean() < 0.01


def test_tta_on_a_mirrored_image_gives_the_mirrored_result(pixels):
    predictor = Predictor(create(), tta=True)
    result = predictor(pixels)
    mirrored = predictor(np.ascontiguousarray(pixels[:, ::-1]))
    assert len(result) > 0
    np.testing.assert_allclose(mirrored.scores, result.scores, atol=1e-3)
    np.testing.assert_allclose(
        np.sort(80 - mirrored.boxes[:, [2, 0]], axis=0), np.sort(result.boxes[:, [0, 2]], axis=0), atol=0.05
    )


@pytest.mark.parametrize("name", ["maskrcnn_fpn", "fasterrcnn_fpn"])
def test_an_image_that_fits_a_tile_is_predicted_whole(pixels, name):
    predictor = Predictor(create(name))
    expected, result = predictor(pixels), predictor(pixels, tile=128)
    np.testing.assert_array_equal(result.boxes, expected.boxes)
    assert result.rles == expected.rles


def test_tiles_with_views_give_one_result_of_the_whole_image(predictor, pixels):
    result = predictor(pixels, tile=40, overlap=0.3, tta=Augmentation(scales=(1.0,)))
    assert result.size == (48, 80)
    assert result.masks.shape == (len(result), 48, 80)
    assert (result.boxes <= [80, 48, 80, 48]).all()
    assert result.boxes[:, 0].max() > 40
    assert (np.diff(result.scores) <= 0).all()
    assert len(predictor(pixels, tile=40, score_threshold=1.0)) == 0


@pytest.fixture(scope="module")
def mosaic():
    """Two by two images of nuclei, 512 x 512 pixels."""
    folder = DEMO_DATA / "images"
    images = [np.asarray(Image.open(path).convert("RGB"))[:256, :256] for path in sorted(folder.iterdir())]
    images = [image for image in images if image.shape == (256, 256, 3)][:4]
    return np.concatenate([np.concatenate(images[:2], 1), np.concatenate(images[2:], 1)], 0)


def test_nuclei_in_tiles_are_those_of_the_whole_image(mosaic):
    # Not enlarged, so that a tile shows the nuclei as large as the whole image does.
    model = a2fpn.create_model("maskrcnn_a2fpn_lite0.nuclei", pretrained=True, resize="none")
    predictor = Predictor(model, score_threshold=0.5)
    whole, tiled = predictor(mosaic), predictor(mosaic, tile=320)
    assert len(whole) > 50

    def iou(a, b):
        return mask_utils.iou(list(a.rles), list(b.rles), [0] * len(b))

    assert (iou(whole, tiled).max(1) > 0.5).mean() > 0.95
    # The network's global context sees a tile, not the image, and is a little less strict: a tolerance of 30 %.
    assert len(whole) * 0.95 <= len(tiled) <= len(whole) * 1.3
    # NMS by boxes leaves some masks that overlap; tiles add none.
    assert (iou(tiled, tiled) > 0.5).sum() - len(tiled) <= (iou(whole, whole) > 0.5).sum() - len(whole)
