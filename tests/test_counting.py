"""Counts: the threshold with the least error, and the commands that choose, store and use it."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli.app import app
from a2fpn.config import Category
from a2fpn.counting import calibrate_counts
from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import add_metadata, check_weights, read_checkpoint
from tests.coco_data import write_coco

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), max_size=6)


def mae(scores, counts, threshold):
    return np.mean([abs(sum(s >= threshold for s in own) - n) for own, n in zip(scores, counts, strict=True)])


@given(images=st.lists(st.tuples(SCORES, st.integers(0, 6)), min_size=1, max_size=5))
def test_no_threshold_counts_better(images):
    scores, counts = zip(*images, strict=True)
    best = calibrate_counts(scores, counts)
    candidates = [0.0, 1.0, *np.linspace(0.01, 0.99, 99)]
    assert best.mae == pytest.approx(min(mae(scores, counts, t) for t in candidates))
    assert best.mae == pytest.approx(mae(scores, counts, best.threshold))
    assert best.mae_at_half == pytest.approx(mae(scores, counts, 0.5))
    found = sum(s >= best.threshold for own in scores for s in own)
    assert best.bias == pytest.approx((found - sum(counts)) / len(counts))
    assert 0 <= best.threshold <= 1


def test_the_threshold_is_in_the_middle_of_the_widest_step():
    assert calibrate_counts([[0.9, 0.3]], [1]).threshold == pytest.approx(0.6)
    assert calibrate_counts([[0.9, 0.3]], [0]).threshold == pytest.approx(0.95)
    assert calibrate_counts([[0.9, 0.3]], [2]).threshold == pytest.approx(0.15)
    assert calibrate_counts([[]], [0]).threshold == pytest.approx(0.5)
    # A score of 1 can't be left out.
    assert calibrate_counts([[1.0, 0.2]], [0]).threshold == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("scores", "counts", "message"),
    [
        ([], [], "one or more images, got 0 and 0"),
        ([[0.5]], [1, 2], "got 1 and 2"),
        ([[1.5]], [1], r"Scores must lie in \[0, 1\]"),
        ([[float("nan")]], [1], r"Scores must lie in \[0, 1\]"),
    ],
)
def test_what_can_not_be_calibrated_is_an_error(scores, counts, message):
    with pytest.raises(ValueError, match=message):
        calibrate_counts(scores, counts)


# Commands


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = a2fpn.create_model(
        "maskrcnn_fpn",
        backbone="test_efficientnet",
        neck_args={"out_channels": 16},
        box_channels=16,
        mask_channels=8,
        mask_layers=1,
        min_size=64,
        max_size=128,
        score_threshold=0.0,
        detections_per_image=5,
        categories=tuple(Category(index, f"shape {index}") for index in (7, 23, 90)),
    )
    return a2fpn.save_pretrained(model, tmp_path / "model", metadata={"recipe": "r", "metrics": {"segm/ap": 0.5}})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), images=3)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_facts_are_added_and_the_rest_stays(checkpoint):
    before = read_checkpoint(checkpoint)
    after = add_metadata(checkpoint, count_threshold=0.25, note="x")
    assert after == read_checkpoint(checkpoint)
    assert after.metadata == {**before.metadata, "count_threshold": 0.25, "note": "x"}
    assert (after.facts.count_threshold, before.facts.count_threshold) == (0.25, None)
    assert (after.model, after.sha256) == (before.model, before.sha256)
    assert check_weights(checkpoint, after)


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"count_threshold": 1.5}, ValueError),
        ({"count_threshold": "high"}, TypeError),
        ({"note": object()}, TypeError),
    ],
)
def test_wrong_facts_leave_the_file_alone(checkpoint, facts, error):
    before = (checkpoint / "config.json").read_text()
    with pytest.raises(error):
        add_metadata(checkpoint, **facts)
    assert (checkpoint / "config.json").read_text() == before
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        add_metadata(checkpoint.parent, note="x")


def test_calibrate_stores_what_count_takes(checkpoint, data, tmp_path):
    folder, annotations = data
    table = tmp_path / "counts.csv"
    assert "with a score of 0.500 or more (no threshold is stored with the model)" in run(
        "count", folder, "--model", checkpoint
    )
    output = run("calibrate", checkpoint, "--images", folder, "--annotations", annotations)
    threshold = read_checkpoint(checkpoint).facts.count_threshold
    assert threshold is not None
    assert f"at a score threshold of {threshold:.3f}" in output
    counted = run("count", folder, "--model", checkpoint, "--output", table)
    assert f"with a score of {threshold:.3f} or more (calibrated)" in counted
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["class"]) for row in rows] == [
        (str(folder / f"{i}.png"), f"shape {k}") for i in range(3) for k in (7, 23, 90)
    ]
    detector = a2fpn.from_pretrained(checkpoint)
    results = a2fpn.Predictor(detector, score_threshold=threshold)(folder)
    expected = [result.counts.get(f"shape {k}", 0) for result in results for k in (7, 23, 90)]
    assert [int(row["count"]) for row in rows] == expected
    truth = [
        sum(
            a["category_id"] == k and a["image_id"] == image["id"] and not a.get("iscrowd") for a in file["annotations"]
        )
        for file in [json.loads(annotations.read_text())]
        for image in file["images"]
        for k in (7, 23, 90)
    ]
    assert f"{np.abs(np.array(expected) - truth).mean():.2f} on average" in output
    assert "(as asked for)" in run("count", folder, "--model", checkpoint, "--score-threshold", 0)


def test_count_reports_what_it_can_not_read(checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(b"none")
    assert "a.png" in run("count", tmp_path / "a.png", "--model", checkpoint, code=2)


def test_calibrate_wants_a_checkpoint_folder(data):
    folder, annotations = data
    output = run("calibrate", "maskrcnn_a2fpn_lite0.nuclei", "--images", folder, "--annotations", annotations, code=2)
    assert "is not a checkpoint folder" in output


def test_evaluate_instances_prints_and_writes(checkpoint, data, tmp_path):
    folder, annotations = data
    out = tmp_path / "numbers.json"
    arguments = ("evaluate", "--model", checkpoint, "--images", folder, "--annotations", annotations)
    output = run(*arguments, "--metrics", "instances", "--score-threshold", 0.0, "--json", out)
    assert "Panoptic quality" in output
    assert "shape 7" in output
    numbers = json.loads(out.read_text())
    assert numbers["score_threshold"] == 0
    file = json.loads(annotations.read_text())
    for k in (7, 23, 90):
        objects = sum(a["category_id"] == k and not a.get("iscrowd") for a in file["annotations"])
        if objects:
            assert numbers[f"shape {k}/objects"] <= objects
            assert 0 <= numbers[f"shape {k}/recall@0.50"] <= 1
    assert "requires --metrics instances" in run(*arguments, "--score-threshold", 0.5, code=2)
