"""Instance metrics equal references written from the papers, pixel by pixel and pair by pair."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from a2fpn.data import DataError, read_coco
from a2fpn.evaluation import annotations_as_detections
from a2fpn.instance_metrics import (
    IOU_THRESHOLDS,
    InstanceMetrics,
    Overlap,
    evaluate_instances,
    instance_metrics,
    label_image,
)
from a2fpn.masks.rle import decode_rle, encode_masks
from tests.coco_data import write_coco

LABELS = nps.arrays(
    np.int32, nps.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.sampled_from([0, 3, 4, 9])
)


@st.composite
def image_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A label image, and one that equals it but for some pixels and the numbers of its objects."""
    truth = draw(LABELS)
    other = draw(nps.arrays(np.int32, truth.shape, elements=st.sampled_from([0, 3, 4, 9, 12])))
    keep = draw(nps.arrays(np.bool_, truth.shape, elements=st.sampled_from([True, True, True, False])))
    return truth, np.where(keep, truth, other) * 2


# References


def masks_of(labels: np.ndarray) -> list[np.ndarray]:
    return [labels == number for number in sorted(set(labels.ravel().tolist()) - {0})]


def iou_table(truth: np.ndarray, found: np.ndarray) -> list[list[float]]:
    return [[(a & b).sum() / (a | b).sum() for b in masks_of(found)] for a in masks_of(truth)]


def bowl_counts(table: list[list[float]], columns: int, threshold: float) -> tuple[int, int, int]:
    """True positives, false positives and false negatives as the competition's evaluation describes them."""
    hits = [[iou > threshold for iou in row] for row in table]
    tp = sum(any(row) for row in hits)
    fp = sum(not any(row[j] for row in hits) for j in range(columns))
    fn = sum(not any(row) for row in hits)
    return tp, fp, fn


def kumar(truth: np.ndarray, found: np.ndarray) -> float:
    """AJI, Algorithm 1 of the paper."""
    objects, predictions = masks_of(truth), masks_of(found)
    shared = union = 0
    used = set()
    for mask in objects:
        ious = [(mask & other).sum() / (mask | other).sum() for other in predictions]
        best = int(np.argmax(ious)) if ious else None
        if best is None or ious[best] == 0:
            union += mask.sum()
            continue
        shared += (mask & predictions[best]).sum()
        union += (mask | predictions[best]).sum()
        used.add(best)
    union += sum(other.sum() for j, other in enumerate(predictions) if j not in used)
    return shared / union if union else 1.0


def reference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    tables = [(iou_table(*pair), len(masks_of(pair[0])), len(masks_of(pair[1]))) for pair in pairs]
    by_iou: dict[str, dict[float, float]] = {name: {} for name in ("precision", "recall", "f1", "accuracy")}
    scores, f1s = [], []
    for t in IOU_THRESHOLDS:
        counts = [bowl_counts(table, columns, t) for table, _, columns in tables]
        tp, fp, fn = (sum(column) for column in zip(*counts, strict=True))
        by_iou["precision"][t] = tp / (tp + fp) if tp + fp else math.nan
        by_iou["recall"][t] = tp / (tp + fn) if tp + fn else math.nan
        by_iou["f1"][t] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan
        by_iou["accuracy"][t] = tp / (tp + fp + fn) if tp + fp + fn else math.nan
        scores += [a / (a + b + c) if a + b + c else 1.0 for a, b, c in counts]
        f1s += [2 * a / (2 * a + b + c) if a + b + c else 1.0 for a, b, c in counts]
    matched = [iou for table, _, _ in tables for row in table for iou in row if iou > 0.5]
    true, found = (np.array([table[k] for table in tables], float) for k in (1, 2))
    total = true.sum() + found.sum()
    variance = ((true - true.mean()) ** 2).sum()
    return {
        **by_iou,
        "bowl_score": np.mean(scores),
        "average_f1": np.mean(f1s),
        # The paper's Eq. 1: sum of IoU / (TP + FP / 2 + FN / 2).
        "pq": sum(matched) / (total / 2) if total else math.nan,
        "sq": np.mean(matched) if matched else math.nan,
        "rq": 2 * len(matched) / total if total else math.nan,
        "aji": np.mean([kumar(*pair) for pair in pairs]),
        "count_bias": np.mean(found - true),
        "count_mae": np.mean(abs(found - true)),
        "count_r2": 1 - ((found - true) ** 2).sum() / variance if variance else math.nan,
    }


@settings(deadline=None)
@given(pairs=st.lists(image_pairs(), min_size=1, max_size=4))
@example(pairs=[(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32))])
@example(pairs=[(np.zeros((2, 3), np.int32), np.ones((2, 3), np.int32))])
@example(pairs=[(np.ones((2, 3), np.int32), np.zeros((2, 3), np.int32))])
def test_all_numbers_are_those_of_the_papers(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    metrics = instance_metrics(Overlap.of(*pair) for pair in pairs)
    expected = reference(pairs)
    assert metrics.images == len(pairs)
    assert metrics.objects == sum(len(masks_of(truth)) for truth, _ in pairs)
    assert metrics.found == sum(len(masks_of(found)) for _, found in pairs)
    for name, value in expected.items():
        got = getattr(metrics, name)
        assert got == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


def test_an_iou_of_exactly_a_threshold_does_not_match() -> None:
    truth, found = np.array([[1, 1]]), np.array([[7, 0]])
    assert Overlap.of(truth, found).ious.tolist() == [0.5]
    assert Overlap.of(truth, found).matches() == [0] * 10
    assert Overlap.of(np.array([[1, 1, 1]]), np.array([[7, 7, 0]])).matches((0.5, 0.65, 2 / 3, 0.7)) == [1, 1, 0, 0]


@pytest.mark.parametrize("thresholds", [(0.49,), (0.5, 1.01), (math.nan,)])
def test_thresholds_at_which_an_object_may_match_two_are_an_error(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"IoU thresholds must lie in \[0.5, 1\]"):
        instance_metrics([Overlap.of(np.eye(3, dtype=int), np.eye(3, dtype=int))], thresholds=thresholds)


def test_images_of_two_sizes_and_none_at_all_are_errors() -> None:
    with pytest.raises(ValueError, match=r"one size, got \(2, 3\) and \(3, 2\)"):
        Overlap.of(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="at least one image"):
        instance_metrics([])


# Label images


@settings(deadline=None)
@given(
    masks=nps.arrays(np.bool_, st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6))),
    scores=st.none() | st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=5, max_size=5),
    min_visible=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_pixels_go_to_the_best_object_that_keeps_enough(
    masks: np.ndarray, scores: list[float] | None, min_visible: float
) -> None:
    own = None if scores is None else scores[: len(masks)]
    labels = label_image(encode_masks(masks), masks.shape[1:], scores=own, min_visible=min_visible)
    expected = np.zeros(masks.shape[1:], int)
    ranked = sorted(range(len(masks)), key=lambda i: (-(own[i] if own else 0), masks[i].sum(), i))
    for i in ranked:
        left = masks[i] & (expected == 0)
        if left.sum() >= min_visible * masks[i].sum():
            expected[left] = i + 1
    assert np.array_equal(labels, expected)
    if not min_visible:
        assert np.array_equal(labels > 0, masks.any(0))


def test_label_images_refuse_what_does_not_fit() -> None:
    rles = encode_masks(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="Expected one score per mask, got 1 for 2 masks"):
        label_image(rles, (3, 4), scores=[0.5])
    with pytest.raises(ValueError, match=r"A mask of \(3, 4\) pixels does not match a label image of \(4, 3\)"):
        label_image(rles, (4, 3))
    with pytest.raises(ValueError, match=r"min_visible must lie in \[0, 1\], got 1.5"):
        label_image(rles, (3, 4), min_visible=1.5)


# COCO files


@pytest.fixture
def coco(tmp_path):
    return read_coco(write_coco(tmp_path, images=6, size=(80, 90))[1])


def separate(coco) -> list[dict[str, Any]]:
    """The file's objects as detections without overlaps in a class, as in its label images."""
    found = []
    for image_id, image in coco.images.items():
        for category in coco.categories:
            rles = [
                a.rle for a in coco.annotations[image_id] if a.category_id == category.id and not a.iscrowd and a.rle
            ]
            labels = label_image(rles, (image.height, image.width))
            planes = np.array([labels == number for number in np.unique(labels[labels > 0])])
            found += [
                {"image_id": image_id, "category_id": category.id, "score": 0.8, "segmentation": rle}
                for rle in (encode_masks(planes) if len(planes) else [])
            ]
    return found


def test_a_file_against_itself_is_perfect(coco) -> None:
    results = evaluate_instances(coco, separate(coco))
    assert results
    for metrics in results.values():
        assert metrics.images == len(coco.images)
        assert metrics.objects == metrics.found > 0
        perfect = ("bowl_score", "average_f1", "pq", "sq", "rq", "aji")
        assert [getattr(metrics, name) for name in perfect] == [1.0] * 6
        assert (metrics.count_bias, metrics.count_mae) == (0, 0)
        assert set(metrics.f1.values()) == {1.0}


def test_detections_below_the_threshold_do_not_count_and_those_at_it_do(coco) -> None:
    detections = separate(coco)
    name = next(iter(evaluate_instances(coco, detections)))
    at, above = (evaluate_instances(coco, detections, score_threshold=t)[name] for t in (0.8, 0.81))
    assert (at.found, above.found) == (at.objects, 0)
    assert above.bowl_score == pytest.approx(np.mean([not count for count in per_image(coco, name)]))
    assert above.count_bias == -above.count_mae == -at.objects / at.images
    assert math.isnan(above.precision[0.5])
    assert above.recall[0.5] == above.pq == 0


def per_image(coco, name: str) -> list[int]:
    ids = {category.id for category in coco.categories if category.name == name}
    return [
        sum(a.category_id in ids and not a.iscrowd for a in annotations) for annotations in coco.annotations.values()
    ]


def tiny(*, crowd: bool) -> dict[str, Any]:
    """An image of 4 x 8 pixels with an object on the left and, if asked for, a crowd on the right."""
    planes = np.zeros((2, 4, 8))
    planes[0, :, :2] = planes[1, :, 4:] = 1
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 7, "iscrowd": i, "bbox": box, "area": area, "segmentation": rle}
        for i, (box, area, rle) in enumerate(
            zip([[0, 0, 2, 4], [4, 0, 4, 4]], [8, 16], encode_masks(planes), strict=True)
        )
    ]
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 8}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 8, "name": "other"}],
        "annotations": annotations[: 1 + crowd],
    }


def detection(left: int, right: int, score: float = 0.9, **changes: Any) -> dict[str, Any]:
    plane = np.zeros((1, 4, 8))
    plane[:, :, left:right] = 1
    return {"image_id": 1, "category_id": 7, "score": score, "segmentation": encode_masks(plane)[0], **changes}


@pytest.mark.parametrize(("left", "counts"), [(2, 1), (3, 0)])
def test_detections_that_lie_in_a_crowd_by_more_than_half_count_neither_way(left: int, counts: int) -> None:
    found = [detection(0, 2), detection(left, 6)]
    with_crowd = evaluate_instances(tiny(crowd=True), found)["cell"]
    assert (with_crowd.objects, with_crowd.found) == (1, 1 + counts)
    assert evaluate_instances(tiny(crowd=False), found)["cell"].found == 2


def test_of_two_detections_of_one_object_the_better_counts() -> None:
    found = [detection(0, 3, 0.6), detection(0, 2, 0.9)]
    assert evaluate_instances(tiny(crowd=False), found)["cell"].found == 1
    visible = evaluate_instances(tiny(crowd=False), found, min_visible=0.0)["cell"]
    assert (visible.found, visible.sq) == (2, 1.0)
    assert evaluate_instances(tiny(crowd=False), found[:1])["cell"].sq == pytest.approx(2 / 3)


def test_a_class_that_nobody_has_is_left_out_and_one_that_is_only_found_is_not() -> None:
    assert set(evaluate_instances(tiny(crowd=False), [])) == {"cell"}
    results = evaluate_instances(tiny(crowd=False), [detection(0, 2, category_id=8)])
    assert (results["cell"].found, results["other"].found, results["other"].objects) == (0, 1, 0)


def test_to_dict_names_every_number(coco) -> None:
    metrics = next(iter(evaluate_instances(coco, separate(coco)).values()))
    flat = metrics.to_dict()
    assert flat["f1@0.50"] == flat["accuracy@0.95"] == flat["pq"] == 1.0
    mappings = [f.name for f in dataclasses.fields(InstanceMetrics) if isinstance(getattr(metrics, f.name), dict)]
    assert len(flat) == len(dataclasses.fields(InstanceMetrics)) + len(mappings) * (len(IOU_THRESHOLDS) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 2}, "Detection 0 must have a known image_id and category_id and a segmentation"),
        ({"category_id": 9}, "Detection 0 must have a known"),
        ({"segmentation": {"size": [8, 4], "counts": "0P1"}}, "the mask's size is"),
    ],
)
def test_detections_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_instances(tiny(crowd=False), [detection(0, 2, **changes)])


def test_a_ground_truth_without_masks_or_of_another_kind_is_an_error() -> None:
    boxes = tiny(crowd=False)
    del boxes["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match="has no masks; instance metrics compare masks"):
        evaluate_instances(boxes, [])
    with pytest.raises(DataError):
        evaluate_instances({"images": 3}, [])


def test_overlapping_annotations_are_cut_the_smaller_on_top(coco) -> None:
    detections = annotations_as_detections(coco)
    for category in coco.categories:
        rles = [d["segmentation"] for d in detections if d["category_id"] == category.id and d["image_id"] == 1]
        if len(rles) < 2:
            continue
        labels = label_image(rles, (80, 90))
        smallest = int(np.argmin([mask.sum() for mask in decode_rle(rles)]))
        assert (labels == smallest + 1).sum() == decode_rle(rles)[smallest].sum()
