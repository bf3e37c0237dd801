import contextlib
import copy
import io
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from a2fpn.data import DataError, read_coco
from a2fpn.evaluation import COCO_SIGMAS, annotations_as_detections, common_iou_types, evaluate_coco
from a2fpn.evaluation.backends import load_library
from a2fpn.masks.rle import encode_masks
from tests.coco_data import write_coco

TEN = ["ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75", "ar_medium", "ar_large"]
TWELVE = [
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
]


@pytest.fixture(params=("hotcoco", "pycocotools"))
def backend(request):
    return request.param


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


def pycocotools_stats(path, results, kind, sigmas=None):
    """What pycocotools itself says, used as its own readme does."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        reference = COCOeval(truth, truth.loadRes(results), kind)
        if sigmas is not None:
            reference.params.kpt_oks_sigmas = np.array(sigmas)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return list(reference.stats)


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
def test_the_numbers_are_pycocotools_own(ground_truth, kind, backend):
    data = json.loads(ground_truth.read_text())
    for annotation in data["annotations"]:
        annotation["id"] += 1  # pycocotools would count id 0 as a miss
        annotation["area"] = (500, 5000, 50000)[annotation["id"] % 3]
    ground_truth.write_text(json.dumps(data))
    detections = disturbed(ground_truth)
    metrics = evaluate_coco(ground_truth, detections, backend=backend)
    results = [{k: v for k, v in d.items() if k != {"bbox": "segmentation", "segm": "bbox"}[kind]} for d in detections]
    ours = [getattr(getattr(metrics, kind), name) for name in TWELVE]
    assert ours == pytest.approx(pycocotools_stats(ground_truth, results, kind), abs=1e-12)
    assert 0.1 < ours[0] < 0.9
    assert min(ours) > 0
    assert len(set(ours)) > 8


def test_ground_truth_as_detections_is_perfect(ground_truth, capfd, backend):
    metrics = evaluate_coco(ground_truth, annotations_as_detections(ground_truth), backend=backend)
    for numbers in (metrics.bbox, metrics.segm):
        assert numbers.ap == pytest.approx(1)
        assert numbers.ar100 == pytest.approx(1)
        assert numbers.ap_large == -1  # there is none
        assert numbers.per_class == pytest.approx({"shape 7": 1, "shape 23": 1, "shape 90": 1})
    assert capfd.readouterr() == ("", "")


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


def test_crowds_count_neither_way(ground_truth, backend):
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
    metrics = evaluate_coco(file, [in_crowd, *perfect], backend=backend)
    assert metrics.bbox.ap == pytest.approx(1)
    assert metrics.segm.ap == pytest.approx(1)
    elsewhere = {**in_crowd, "bbox": [0, 0, 1, 1]}
    assert evaluate_coco(file, [elsewhere, *perfect], iou_types=["bbox"], backend=backend).bbox.ap < 1


def test_no_detections_and_no_objects(ground_truth, backend):
    metrics = evaluate_coco(ground_truth, [], backend=backend)
    assert (metrics.bbox.ap, metrics.segm.ar100) == (0, 0)
    assert evaluate_coco(one_image(), [], backend=backend).segm.ap == -1
    everything_missing = {"images": [], "annotations": [], "categories": []}
    assert evaluate_coco(everything_missing, [], backend=backend).bbox.ap == -1


def test_max_detections_decides_all_numbers_but_ar1_and_ar10(backend):
    truth = one_image(*grid(150))
    perfect = annotations_as_detections(truth)
    by_limit = {
        n: evaluate_coco(truth, perfect, iou_types=["bbox"], max_detections=n, backend=backend)
        for n in (5, 100, 150, 500)
    }
    assert by_limit[500].bbox.ap == by_limit[150].bbox.ap == pytest.approx(1)
    assert by_limit[500].bbox.ap_small == by_limit[500].bbox.ap50 == pytest.approx(1)
    assert by_limit[100].bbox.ap == pytest.approx(67 / 101)  # recalls 0.00 to 0.66 of 101
    assert [by_limit[n].bbox.ar100 for n in by_limit] == pytest.approx([5 / 150, 2 / 3, 1, 1])
    assert [by_limit[n].bbox.ar10 for n in by_limit] == pytest.approx([5 / 150, 1 / 15, 1 / 15, 1 / 15])
    assert [by_limit[n].bbox.ar1 for n in by_limit] == pytest.approx([1 / 150] * 4)
    assert by_limit[500].max_detections == 500


def test_mask_sizes_are_those_of_the_masks(backend):
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
    found = [frame, *({**d, "score": 0.5} for d in annotations_as_detections(truth))]
    metrics = evaluate_coco(truth, found, backend=backend)
    assert metrics.segm.ap_large == pytest.approx(1)
    assert metrics.bbox.ap_large == pytest.approx(0.5)


def test_per_class_names_and_the_flat_dict():
    truth = one_image(*grid(3)) | {"categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cat"}]}
    metrics = evaluate_coco(truth, annotations_as_detections(truth), iou_types=["bbox"])
    assert metrics.bbox.per_class == pytest.approx({"cat (7)": 1, "cat (9)": -1})
    assert list(metrics.to_dict()) == [f"bbox/{name}" for name in TWELVE]
    assert set(metrics.to_dict(per_class=True)) - set(metrics.to_dict()) == {"bbox/ap/cat (7)", "bbox/ap/cat (9)"}
    assert metrics.to_dict()["bbox/ap"] == pytest.approx(1)


def test_inputs_are_not_changed_and_a_box_may_come_from_the_mask(ground_truth, backend):
    truth, detections = json.loads(ground_truth.read_text()), disturbed(ground_truth)
    copies = copy.deepcopy((truth, detections))
    metrics = evaluate_coco(truth, detections, backend=backend)
    assert (truth, detections) == copies
    assert metrics == evaluate_coco(read_coco(ground_truth), detections, backend=backend)
    without_boxes = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    assert evaluate_coco(truth, without_boxes, backend=backend) == metrics


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
        ({"bbox": [1, 2, 3, math.inf]}, r"detection 1: its bbox must be \[x, y, width, height\], got \[1, 2, 3, inf"),
        ({"segmentation": {"size": [5, 5], "counts": "0"}}, r"detection 1: the mask's size is \[5, 5\]"),
    ],
)
def test_broken_detections_are_errors(change, message):
    annotation = grid(1)[0] | {"segmentation": [[0, 0, 15, 0, 15, 15, 0, 15]]}
    truth = one_image(annotation)
    (good,) = annotations_as_detections(truth)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth, [good, {**good, **change}])


@pytest.mark.parametrize("kinds", [["segm"], ["bbox"]])
def test_the_first_broken_detection_is_named(kinds):
    truth = one_image(grid(1)[0] | {"segmentation": [[0, 0, 15, 0, 15, 15, 0, 15]]})
    (good,) = annotations_as_detections(truth)
    del good["bbox"]
    bad_mask = good | {"segmentation": {"size": [400, 600], "counts": "0"}}
    bad_score = good | {"score": math.nan}
    # More than are checked at once.
    with pytest.raises(ValueError, match="detection 300: the run lengths of the mask add up to 0 pixels"):
        evaluate_coco(truth, [good] * 300 + [bad_mask, bad_score, bad_mask], iou_types=kinds)
    with pytest.raises(ValueError, match="detection 300: its score is nan"):
        evaluate_coco(truth, [good] * 300 + [bad_score, bad_mask], iou_types=kinds)


def test_many_masks_get_pycocotools_numbers(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(30)]
    entries = []
    for number in range(600):
        x, y, width, height = (int(side) for side in rng.integers([0, 0, 2, 2], [40, 30, 40, 30]))
        mask = np.zeros((1, 60, 80))
        mask[0, y : y + height, x : x + width] = rng.random((height, width)) < 0.9
        entry = {"image_id": number % 30, "category_id": 7 + number % 2 * 2, "segmentation": encode_masks(mask)[0]}
        area = int(mask.sum())
        entries.append(entry | {"id": number + 1, "iscrowd": 0, "area": area, "bbox": [x, y, width, height]})
    truth = one_image() | {"images": images, "annotations": entries[:200]}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    keys = ("image_id", "category_id", "segmentation")
    found = [{key: entry[key] for key in keys} | {"score": rng.random()} for entry in entries[100:]]
    metrics = evaluate_coco(path, found, iou_types=["segm"], backend="hotcoco").segm
    expected = pycocotools_stats(path, copy.deepcopy(found), "segm")
    assert [getattr(metrics, name) for name in TWELVE] == pytest.approx(expected, abs=1e-9)


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
    with pytest.raises(ValueError, match=r"iou_types must be some of bbox, segm, keypoints, got \['boxes'\]"):
        evaluate_coco(truth, [], iou_types=["boxes"])
    with pytest.raises(ValueError, match=r"has no keypoints; evaluate boxes only, with iou_types=\['bbox'\]"):
        evaluate_coco(truth, [], iou_types=["keypoints"])
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate_coco(truth, [], max_detections=0)
    with pytest.raises(ValueError, match="max_keypoint_detections must be at least 1, got -1"):
        evaluate_coco(truth, [], max_keypoint_detections=-1)
    with pytest.raises(ValueError, match="Unknown backend 'cocoapi'; expected one of auto, hotcoco, pycocotools"):
        evaluate_coco(truth, [], backend="cocoapi")
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        evaluate_coco("nowhere.json", [])


def test_the_arguments_are_checked_before_anything_is_predicted():
    def predictions():
        pytest.fail("the first detection was taken")
        yield

    with pytest.raises(ValueError, match="has no masks"):
        evaluate_coco(one_image(*grid(1)), predictions())
    perfect = annotations_as_detections(one_image(*grid(3)))
    assert evaluate_coco(one_image(*grid(3)), iter(perfect), iou_types=["bbox"]).bbox.ap == pytest.approx(1)


# The libraries count alike


def same_numbers(truth, detections, kinds, backend, **options):
    """Compares a library with pycocotools, and returns what it says."""
    options = {"iou_types": kinds, **options}
    ours, reference = (evaluate_coco(truth, detections, backend=b, **options) for b in (backend, "pycocotools"))
    assert ours.to_dict(per_class=True) == pytest.approx(reference.to_dict(per_class=True), rel=0, abs=1e-12)
    return ours


@st.composite
def scenes(draw, kind):
    """A small scene on a coarse grid of places and scores, so that ties and overlaps at a threshold are common."""
    height, width, points = 24, 32, 3
    image_ids = draw(st.lists(st.integers(-3, 2**40), min_size=1, max_size=4, unique=True))
    category_ids = draw(st.lists(st.integers(-1, 10**6), min_size=1, max_size=3, unique=True))
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": [],
    }
    detections = []
    for kept, most in ((truth["annotations"], 8), (detections, 16)):
        for number in range(draw(st.integers(0, most))):
            x, y = draw(st.sampled_from(range(0, width - 4, 4))), draw(st.sampled_from(range(0, height - 4, 4)))
            w, h = draw(st.sampled_from((1, 2, 4, 10, 20))), draw(st.sampled_from((1, 2, 4, 10, 20)))
            entry = {
                "image_id": draw(st.sampled_from(image_ids)),
                "category_id": draw(st.sampled_from(category_ids)),
                "bbox": [x, y, w, h],
            }
            if kind == "segm":
                mask = np.zeros((1, height, width))
                mask[0, y : y + h, x : x + w : draw(st.sampled_from((1, 1, 2)))] = 1
                entry["segmentation"] = encode_masks(mask)[0]
            if kind == "keypoints":
                places = [(x + draw(st.integers(0, 3)), y + draw(st.integers(0, 3))) for _ in range(points)]
                entry["keypoints"] = [v for place in places for v in (*place, draw(st.integers(0, 2)))]
            if kept is detections:
                entry["score"] = draw(st.sampled_from((-0.5, 0.0, 0.25, 0.5, 1.0)))
            else:
                entry |= {"id": number, "iscrowd": draw(st.sampled_from((0, 0, 0, 1)))}
                if draw(st.booleans()):
                    entry["area"] = draw(st.sampled_from((0, 10, 32**2, 5000, 96**2, 10**5)))
            kept.append(entry)
    if kind == "keypoints":  # so that the file has keypoints
        truth["annotations"].append(
            {"id": 99, "image_id": image_ids[0], "category_id": category_ids[0], "bbox": [1, 1, 9, 9]}
            | {"keypoints": [1, 2, 1] * points, "area": 2000}
        )
    return truth, detections


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_every_scene_gets_the_same_numbers(kind):
    @settings(max_examples=60, deadline=None)
    @given(scenes(kind), st.sampled_from((1, 3, 100, 500)))
    def check(scene, limit):
        options = {"max_detections": limit, "max_keypoint_detections": limit, "oks_sigmas": (0.03, 0.1, 1.5)}
        same_numbers(*scene, [kind], "hotcoco", **options)

    check()


def with_scores(detections, score):
    return [{**detection, "score": score(position)} for position, detection in enumerate(detections)]


@pytest.mark.parametrize("limit", [100, 500])
def test_many_objects_and_ties(limit):
    truth = one_image(*grid(130))
    jitter = np.random.default_rng(0).integers(-3, 4, (130, 4))
    detections = [
        {**d, "bbox": [v + int(j) for v, j in zip(d["bbox"], row, strict=True)]}
        for d, row in zip(annotations_as_detections(truth), jitter, strict=True)
    ]
    for score in (lambda _: 0.5, lambda i: i % 3, lambda i: -i / 7):
        metrics = same_numbers(truth, with_scores(detections, score), ["bbox"], "hotcoco", max_detections=limit)
        assert 0.01 < metrics.bbox.ap < 0.5


def test_huge_and_tiny_boxes():
    boxes = [[0, 0, 1e5, 1e5], [1e4, 1e4, 9e4, 9e4], [5, 5, 0.02, 0.02], [7, 7, 1e-2, 3e4], [5.5, 5.5, 32, 32]]
    entries = [{"id": i, "image_id": 1, "category_id": 7, "bbox": box} for i, box in enumerate(boxes)]
    truth = one_image(*entries) | {"images": [{"id": 1, "file_name": "a.png", "height": 10**5, "width": 10**5}]}
    detections = with_scores(annotations_as_detections(truth), lambda i: i)
    assert same_numbers(truth, detections, ["bbox"], "hotcoco").bbox.ap == pytest.approx(1)
    odd = [{**detections[0], "score": 9, "bbox": box} for box in ([0, 0, 0, 0], [3, 3, -2, -2], [-1e6, 0, 1e8, 1e8])]
    assert same_numbers(truth, [*odd, *detections], ["bbox"], "hotcoco").bbox.ap < 1


@pytest.mark.parametrize("share", range(10, 20))
def test_an_iou_at_a_threshold_passes_it(share):
    truth = one_image({"id": 0, "image_id": 1, "category_id": 7, "bbox": [0, 0, 20, 20]})
    found = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 20, share], "score": 1}
    metrics = same_numbers(truth, [found], ["bbox"], "hotcoco")
    assert metrics.bbox.ap == pytest.approx((share - 9) / 10)


def test_the_order_of_the_images_does_not_matter(ground_truth, backend):
    # All scores tie, within and across the images.
    detections = with_scores(disturbed(ground_truth, copies=4), lambda i: i % 2)
    expected = evaluate_coco(ground_truth, detections, backend=backend)
    by_image = {}
    for detection in detections:
        by_image.setdefault(detection["image_id"], []).append(detection)
    for seed in range(5):
        order = list(by_image)
        random.Random(seed).shuffle(order)
        shuffled = [detection for image_id in order for detection in by_image[image_id]]
        assert evaluate_coco(ground_truth, shuffled, backend=backend) == expected  # to the last bit
    reverse = [detection for found in by_image.values() for detection in found[::-1]]
    assert evaluate_coco(ground_truth, reverse, backend=backend) != expected  # ties go to the first of an image


def test_without_a_fast_library_pycocotools_counts(ground_truth, monkeypatch, caplog):
    expected = evaluate_coco(ground_truth, disturbed(ground_truth), backend="pycocotools")
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an import of it then meets is an ImportError
    load_library.cache_clear()
    try:
        for _ in range(2):
            assert evaluate_coco(ground_truth, disturbed(ground_truth)) == expected
        (record,) = caplog.records
        assert record.getMessage().startswith("hotcoco can't be imported")
        with pytest.raises(ValueError, match=r"hotcoco can't be imported .*; install it, or use 'pycocotools'"):
            evaluate_coco(ground_truth, [], backend="hotcoco")
    finally:
        load_library.cache_clear()


# Keypoints


def people(count=6, points=17, seed=0):
    """A file with keypoints, some hidden or not labeled, a crowd, an object without any, and a class without any."""
    rng = np.random.default_rng(seed)
    annotations = []
    for number in range(count):
        x, y, w, h = rng.uniform(0, 200), rng.uniform(0, 100), rng.uniform(20, 200), rng.uniform(30, 250)
        places = np.stack([x + rng.random(points) * w, y + rng.random(points) * h], 1).round(2)
        keypoints = np.concatenate([places, rng.integers(0, 3, (points, 1))], 1)
        annotations.append(
            {
                "id": number,
                "image_id": 1 + number % 2,
                "category_id": 7,
                "bbox": [x, y, w, h],
                "area": 0.6 * w * h,
                "keypoints": keypoints.ravel().tolist(),
                "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                "iscrowd": 0,
            }
        )
    nothing = {"keypoints": [0] * 3 * points, "num_keypoints": 0}
    annotations += [
        {**annotations[0], "id": count, "iscrowd": 1, **nothing, "bbox": [300, 300, 200, 100]},
        {**annotations[0], "id": count + 1, **nothing, "bbox": [10, 300, 50, 60], "area": 3000.0},
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 400, "width": 600} for i in (1, 2, 3)]
    return one_image(*annotations) | {"images": images}


def moved(detections, shift):
    """Detections with every keypoint moved by pixels to the right."""
    return [
        {**d, "keypoints": [v + shift if i % 3 == 0 else v for i, v in enumerate(d["keypoints"])]} for d in detections
    ]


def test_keypoints_get_pycocotools_numbers(tmp_path, backend):
    truth = people(12)
    truth["annotations"] = [{**annotation, "id": annotation["id"] + 1} for annotation in truth["annotations"]]
    path = tmp_path / "people.json"
    path.write_text(json.dumps(truth))
    rng = np.random.default_rng(1)
    detections = []
    for perfect in annotations_as_detections(truth) * 2:
        keypoints = np.array(perfect["keypoints"]) + rng.normal(size=51) * rng.choice([1, 4, 12])
        detections.append({**perfect, "keypoints": keypoints.tolist(), "score": round(float(rng.random()), 1)})
    metrics = evaluate_coco(path, detections, iou_types=["keypoints"], backend=backend)
    results = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    ours = [getattr(metrics.keypoints, name) for name in TEN]
    assert ours == pytest.approx(pycocotools_stats(path, results, "keypoints", COCO_SIGMAS), abs=1e-12)
    assert tuple(COCOeval(iouType="keypoints").params.kpt_oks_sigmas) == COCO_SIGMAS
    assert min(ours) > 0.1
    assert max(ours) < 1
    assert metrics.bbox is None
    assert list(metrics.to_dict()) == [f"keypoints/{name}" for name in TEN]
    assert metrics.keypoints.per_class == {"cat": metrics.keypoints.ap, "dog": -1}


def test_keypoints_of_the_ground_truth_are_perfect(backend, capfd):
    truth = people()
    perfect = annotations_as_detections(truth)
    metrics = evaluate_coco(truth, perfect, iou_types=["bbox", "keypoints"], backend=backend)
    assert metrics.keypoints.ap == metrics.keypoints.ar == pytest.approx(1)
    assert metrics.bbox.ap == pytest.approx(1)
    assert capfd.readouterr() == ("", "")
    assert evaluate_coco(truth, [], iou_types=["keypoints"], backend=backend).keypoints.ap == 0


@pytest.mark.parametrize("similarity", [0.97, 0.72, 0.51, 0.4])
def test_a_shift_lowers_ap_as_oks_says(similarity, backend):
    entry = {"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 100, 50], "area": 4000}
    truth = one_image(entry | {"keypoints": [20, 20, 2, 50, 30, 1, 0, 0, 0]})
    sigma = 0.08
    shift = math.sqrt(-math.log(similarity) * 8 * sigma**2 * 4000)
    detections = moved(annotations_as_detections(truth), shift)
    options = {"iou_types": ["keypoints"], "oks_sigmas": [sigma, sigma, 5.0], "backend": backend}
    passed = sum(similarity >= 0.5 + 0.05 * step for step in range(10))
    assert evaluate_coco(truth, detections, **options).keypoints.ap == pytest.approx(passed / 10)
    # Only what is labeled counts.
    detections[0]["keypoints"][6:] = [1000, 1000, 1]
    assert evaluate_coco(truth, detections, **options).keypoints.ap == pytest.approx(passed / 10)


def test_most_detections_of_keypoints():
    truth = people(40)
    perfect = annotations_as_detections(truth)
    options = {"iou_types": ["keypoints"]}
    assert evaluate_coco(truth, perfect * 2, **options, max_keypoint_detections=100).keypoints.ar == pytest.approx(1)
    assert evaluate_coco(truth, perfect, **options, max_keypoint_detections=10).keypoints.ar == pytest.approx(0.5)
    assert evaluate_coco(truth, perfect, **options, max_detections=1).keypoints.ar == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"oks_sigmas": [0.1] * 4}, "has 5 keypoints per object, oks_sigmas are 4; give one sigma for each"),
        ({}, {"oks_sigmas": COCO_SIGMAS}, r"has 5 keypoints .* are 17; .* \(the default is those of COCO\)"),
        ({}, {"oks_sigmas": [0.1, 0.1, 0, 0.1, 0.1]}, r"oks_sigmas must be positive numbers, got \[0.1, 0.1, 0,"),
        ({"keypoints": [1, 2, 1]}, {}, r"detection 0: its keypoints must be 5 times x, y, v, got \[1, 2, 1\]"),
        ({"keypoints": [math.nan] * 15}, {}, "detection 0: its keypoints must be 5 times x, y, v"),
        ({"keypoints": None}, {}, "detection 0: "),
    ],
)
def test_broken_keypoints_are_errors(change, options, message):
    truth = people(points=5)
    detections = [{**detection, **change} for detection in annotations_as_detections(truth)]
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth, detections, **{"iou_types": ["keypoints"], "oks_sigmas": [0.1] * 5, **options})
    with pytest.raises(ValueError, match="it has no keypoints, which 'keypoints' needs"):
        evaluate_coco(
            truth,
            [{k: v for k, v in d.items() if k != "keypoints"} for d in detections],
            iou_types=["keypoints"],
            oks_sigmas=[0.1] * 5,
        )


def test_what_model_and_file_have_in_common(ground_truth):
    both, masks, keypoints = ["boxes", "masks", "keypoints"], read_coco(ground_truth), read_coco(people())
    assert common_iou_types(masks, both) == ["bbox", "segm"]
    assert common_iou_types(keypoints, both) == ["bbox", "keypoints"]
    assert common_iou_types(masks, ["boxes", "labels"]) == ["bbox"]
