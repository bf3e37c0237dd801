import contextlib
import copy
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from coco_data import write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from a2fpn.data import DataError, read_coco
from a2fpn.data.masks import encode_masks
from a2fpn.evaluation import annotations_as_detections, evaluate_coco

TWELVE = [
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
]


@pytest.fixture
def ground_truth(tmp_path):
    return write_coco(tmp_path, images=8, size=(120, 160))[1]


def disturbed(path, *, copies=2, seed=0):
    """Returns the objects of a file as detections moved about, some with another class, some left out."""
    rng = np.random.default_rng(seed)
    file = read_coco(path)
    ids = [category.id for category in file.categories]
    detections = []
    for perfect in annotations_as_detections(file) * copies:
        image = file.images[perfect["image_id"]]
        x, y, w, h = np.maximum(np.round(np.array(perfect["bbox"]) + rng.normal(size=4) * 3), 1).astype(int)
        mask = np.zeros((1, image.height, image.width))
        mask[0, y : y + h, x : x + w] = 1
        if rng.random() < 0.8:
            detections.append(
                {
                    "image_id": image.id,
                    "category_id": int(rng.choice(ids)) if rng.random() < 0.2 else perfect["category_id"],
                    "bbox": [int(v) for v in (x, y, w, h)],
                    "segmentation": encode_masks(mask)[0],
                    "score": float(rng.random()),
                }
            )
    return detections


def one_image(*annotations):
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 400, "width": 600}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": list(annotations),
    }


def grid(count):
    """Returns ``count`` annotations without masks in a grid."""
    return [
        {"id": i, "image_id": 1, "category_id": 7, "bbox": [i % 25 * 20, i // 25 * 20, 15, 15]} for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_numbers_are_pycocotools_own(ground_truth, kind):
    data = json.loads(ground_truth.read_text())
    for annotation in data["annotations"]:
        annotation["id"] += 1  # pycocotools would count id 0 as a miss
        annotation["area"] = (500, 5000, 50000)[annotation["id"] % 3]
    ground_truth.write_text(json.dumps(data))
    detections = disturbed(ground_truth)
    metrics = evaluate_coco(ground_truth, detections)
    results = [{k: v for k, v in d.items() if k != {"bbox": "segmentation", "segm": "bbox"}[kind]} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(ground_truth))
        reference = COCOeval(truth, truth.loadRes(results), kind)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    ours = [getattr(getattr(metrics, kind), name) for name in TWELVE]
    assert ours == pytest.approx(list(reference.stats), abs=1e-12)
    assert 0.1 < ours[0] < 0.9
    assert min(ours) > 0
    assert len(set(ours)) > 8


def test_ground_truth_as_detections_is_perfect(ground_truth, capsys):
    metrics = evaluate_coco(ground_truth, annotations_as_detections(ground_truth))
    for numbers in (metrics.bbox, metrics.segm):
        assert numbers.ap == pytest.approx(1)
        assert numbers.ar100 == pytest.approx(1)
        assert numbers.ap_large == -1  # there is none
        assert numbers.per_class == pytest.approx({"shape 7": 1, "shape 23": 1, "shape 90": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    [
        "coco128/annotations/instances_val2017.json",
        "nuclei/annotations/instances_val.json",
        "pennfudan/annotations/instances_train.json",
        "pennfudan/annotations/instances_val.json",
    ],
)
def test_ground_truth_as_detections_is_perfect_on_real_data(name):
    root = os.environ.get("A2FPN_DATA")
    if not root or not (Path(root) / name).is_file():
        pytest.skip(f"A2FPN_DATA does not name a folder with {name}")
    file = read_coco(Path(root) / name, strict=True)
    metrics = evaluate_coco(file, annotations_as_detections(file), max_detections=1000)
    present = {a.category_id for annotations in file.annotations.values() for a in annotations if not a.iscrowd}
    for numbers in (metrics.bbox, metrics.segm):
        assert numbers.ap == pytest.approx(1)
        perfect = {label for label, ap in numbers.per_class.items() if ap == pytest.approx(1)}
        assert perfect == {category.name for category in file.categories if category.id in present}


def test_crowds_count_neither_way(ground_truth):
    file = read_coco(ground_truth)
    (crowd,) = (a for annotations in file.annotations.values() for a in annotations if a.iscrowd)
    perfect = annotations_as_detections(file)
    assert len(perfect) == sum(map(len, file.annotations.values())) - 1
    in_crowd = {
        "image_id": 100,
        "category_id": crowd.category_id,
        "bbox": list(crowd.bbox),
        "segmentation": crowd.rle,
        "score": 2.0,
    }
    metrics = evaluate_coco(file, [in_crowd, *perfect])
    assert metrics.bbox.ap == pytest.approx(1)
    assert metrics.segm.ap == pytest.approx(1)
    elsewhere = {**in_crowd, "bbox": [0, 0, 1, 1]}
    assert evaluate_coco(file, [elsewhere, *perfect], iou_types=["bbox"]).bbox.ap < 1


def test_no_detections_and_no_objects(ground_truth):
    metrics = evaluate_coco(ground_truth, [])
    assert (metrics.bbox.ap, metrics.segm.ar100) == (0, 0)
    assert evaluate_coco(one_image(), []).segm.ap == -1
    everything_missing = {"images": [], "annotations": [], "categories": []}
    assert evaluate_coco(everything_missing, []).bbox.ap == -1


def test_max_detections_decides_all_numbers_but_ar1_and_ar10():
    truth = one_image(*grid(150))
    perfect = annotations_as_detections(truth)
    by_limit = {n: evaluate_coco(truth, perfect, iou_types=["bbox"], max_detections=n) for n in (5, 100, 150, 500)}
    assert by_limit[500].bbox.ap == by_limit[150].bbox.ap == pytest.approx(1)
    assert by_limit[500].bbox.ap_small == by_limit[500].bbox.ap50 == pytest.approx(1)
    assert by_limit[100].bbox.ap == pytest.approx(67 / 101)  # recalls 0.00 to 0.66 of 101
    assert [by_limit[n].bbox.ar100 for n in by_limit] == pytest.approx([5 / 150, 2 / 3, 1, 1])
    assert [by_limit[n].bbox.ar10 for n in by_limit] == pytest.approx([5 / 150, 1 / 15, 1 / 15, 1 / 15])
    assert [by_limit[n].bbox.ar1 for n in by_limit] == pytest.approx([1 / 150] * 4)
    assert by_limit[500].max_detections == 500


def test_mask_sizes_are_those_of_the_masks():
    # A frame: its box has 10000 pixels (large), its mask 1900 (medium); matched with nothing, it counts only there.
    mask = np.zeros((1, 400, 600))
    mask[0, :100, :100] = 1
    mask[0, 5:95, 5:95] = 0
    frame = {
        "image_id": 1,
        "category_id": 7,
        "bbox": [0, 0, 100, 100],
        "score": 0.9,
        "segmentation": encode_masks(mask)[0],
    }
    polygon = [[300, 200, 500, 200, 500, 390, 300, 390]]
    large = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [300, 200, 200, 190], "segmentation": polygon}
    truth = one_image(large)
    metrics = evaluate_coco(truth, [frame, *({**d, "score": 0.5} for d in annotations_as_detections(truth))])
    assert metrics.segm.ap_large == pytest.approx(1)
    assert metrics.bbox.ap_large == pytest.approx(0.5)


def test_per_class_names_and_the_flat_dict():
    truth = one_image(*grid(3)) | {"categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cat"}]}
    metrics = evaluate_coco(truth, annotations_as_detections(truth), iou_types=["bbox"])
    assert metrics.bbox.per_class == pytest.approx({"cat (7)": 1, "cat (9)": -1})
    assert list(metrics.to_dict()) == [f"bbox/{name}" for name in TWELVE]
    assert set(metrics.to_dict(per_class=True)) - set(metrics.to_dict()) == {"bbox/ap/cat (7)", "bbox/ap/cat (9)"}
    assert metrics.to_dict()["bbox/ap"] == pytest.approx(1)


def test_inputs_are_not_changed_and_a_box_may_come_from_the_mask(ground_truth):
    truth, detections = json.loads(ground_truth.read_text()), disturbed(ground_truth)
    copies = copy.deepcopy((truth, detections))
    metrics = evaluate_coco(truth, detections)
    assert (truth, detections) == copies
    assert metrics == evaluate_coco(read_coco(ground_truth), detections)
    without_boxes = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    assert evaluate_coco(truth, without_boxes) == metrics


def test_an_unusable_annotation_is_left_out():
    bad = {"id": 99, "image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 5]}
    truth = one_image(*grid(3))
    assert evaluate_coco(one_image(*grid(3), bad), annotations_as_detections(truth), iou_types=["bbox"]).bbox.ap > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 2}, "detection 1: its image_id 2 is not in the given mapping"),
        ({"image_id": [1]}, "detection 1: "),
        ({"category_id": 8}, r"detection 1: its category_id 8 is not in the given mapping, which has \[7, 9\]"),
        ({"score": float("nan")}, "detection 1: its score is nan"),
        ({"score": None}, "detection 1: float"),
        ({"bbox": [1, 2, 3]}, r"detection 1: its bbox must be \[x, y, width, height\], got \[1, 2, 3\]"),
        ({"segmentation": {"size": [5, 5], "counts": "0"}}, r"detection 1: the mask's size is \[5, 5\]"),
    ],
)
def test_broken_detections_are_errors(change, message):
    annotation = grid(1)[0] | {"segmentation": [[0, 0, 15, 0, 15, 15, 0, 15]]}
    truth = one_image(annotation)
    (good,) = annotations_as_detections(truth)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth, [good, {**good, **change}])


def test_missing_values_and_wrong_arguments():
    truth = one_image(*grid(1))
    with pytest.raises(ValueError, match=r"has no masks; evaluate boxes only, with iou_types=\['bbox'\]"):
        evaluate_coco(truth, [])
    with pytest.raises(ValueError, match="detection 0: it has no category_id, score"):
        evaluate_coco(truth, [{"image_id": 1}], iou_types=["bbox"])
    with pytest.raises(ValueError, match="detection 0: it has no bbox, which 'bbox' needs"):
        evaluate_coco(truth, [{"image_id": 1, "category_id": 7, "score": 1}], iou_types=["bbox"])
    with pytest.raises(ValueError, match="it has no segmentation, which 'segm' needs"):
        evaluate_coco(
            one_image(), [{"image_id": 1, "category_id": 7, "score": 1, "bbox": [0, 0, 1, 1]}], iou_types=["segm"]
        )
    with pytest.raises(ValueError, match=r"iou_types must be some of bbox, segm, got \['keypoints'\]"):
        evaluate_coco(truth, [], iou_types=["keypoints"])
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate_coco(truth, [], max_detections=0)
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        evaluate_coco("nowhere.json", [])
