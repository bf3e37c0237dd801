"""``a2fpn predict`` never costs a user anything: no file of theirs, no result that was computed."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli.app import app
from a2fpn.cli.predictions import Job, PredictionFolder
from a2fpn.inference import Predictor
from a2fpn.training.lock import RunLock
from tests.processes import run_a2fpn

RUN = {"manifest.json", "predictions.json", "predictions.jsonl"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = a2fpn.create_model(
        "fasterrcnn_fpn",
        backbone="test_efficientnet",
        neck_args={"out_channels": 16},
        box_channels=16,
        min_size=64,
        max_size=128,
        score_threshold=0.0,
        detections_per_image=5,
        num_classes=2,
    )
    return a2fpn.save_pretrained(model, tmp_path_factory.mktemp("checkpoint"))


def images(folder: Path, *names: str) -> Path:
    """Pictures of four colors: PNG is slow to compress overlays on noise."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colors = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colors.repeat(20, 0).repeat(25, 1)).save(folder / name)
    return folder


def predict(checkpoint: Path, *arguments: object, code: int = 0) -> str:
    command = ["predict", *map(str, arguments), "--model", str(checkpoint), "--score-threshold", "0"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_strangers_files_stay_unless_they_may_be_replaced(checkpoint: Path, tmp_path: Path) -> None:
    photos, mine = images(tmp_path / "photos", "cat.png"), tmp_path / "mine"
    mine.mkdir()
    for name in ("cat.png", "predictions.json", "notes.txt"):
        (mine / name).write_text("mine")
    output = predict(checkpoint, photos, "--output", mine, code=2)
    assert "mine holds predictions.json, cat.png, not made by this run. --overwrite replaces what is there" in output
    assert {path.name: path.read_text() for path in mine.iterdir()} == dict.fromkeys(
        ("cat.png", "predictions.json", "notes.txt"), "mine"
    )
    predict(checkpoint, photos, "--output", mine, "--overwrite")
    assert len(read(mine / "predictions.json")) == 5
    assert (mine / "notes.txt").read_text() == "mine"
    assert "--resume continues that run" in predict(checkpoint, photos, "--output", mine, code=2)


def test_nothing_is_written_through_a_link(checkpoint: Path, tmp_path: Path) -> None:
    data, photos = images(tmp_path / "data", "x.png"), tmp_path / "photos"
    photos.mkdir()
    (photos / "x.png").symlink_to(data / "x.png")
    original = (data / "x.png").read_bytes()
    for output in (photos, data):
        assert "choose another one" in predict(checkpoint, photos, "--output", output, "--overwrite", code=2)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.png", *RUN):
        (out / name).symlink_to(data / "x.png")
    predict(checkpoint, photos, "--output", out, code=2)
    predict(checkpoint, photos, "--output", out, "--overwrite")
    assert (data / "x.png").read_bytes() == original
    assert not any((out / name).is_symlink() for name in ("x.png", *RUN))


def test_records_keep_the_path_as_given_and_the_manifest_the_table_of_ids(checkpoint: Path, tmp_path: Path) -> None:
    images(tmp_path, "a/1.jpg", "b/1.jpg")
    paths = [str(tmp_path / name) for name in ("a/1.jpg", "b/1.jpg")]
    predict(checkpoint, *paths, "--output", tmp_path / "out")
    records = read(tmp_path / "out/predictions.json")
    assert {(record["file_name"], record["image_id"]) for record in records} == {(paths[0], 1), (paths[1], 2)}
    rows = read(tmp_path / "out/manifest.json")["images"]
    assert [(row["id"], row["file_name"], row["stem"]) for row in rows] == [(1, paths[0], "1"), (2, paths[1], "1_2")]


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Presses Ctrl-C when so many images are done."""
    predict_one, done = Predictor.__call__, []

    def press(*args: Any, **options: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return predict_one(*args, **options)

    monkeypatch.setattr(Predictor, "__call__", press)


def test_ctrl_c_keeps_what_is_done_and_resume_does_the_rest(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = images(tmp_path / "photos", *(f"p{i}.png" for i in range(6))), tmp_path / "out"
    predict(checkpoint, photos, "--output", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupted(patched, after=2)
        output = predict(checkpoint, photos, "--output", out, code=130)
    assert "Stopped after 2 of 6 images; the results are in" in output
    assert "with --resume to continue" in output
    assert len(read(out / "predictions.json")) == 10
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 2
    pictures = {name: (out / name).stat().st_mtime_ns for name in ("p0.png", "p1.png")}
    with (out / "predictions.jsonl").open("a") as stream:
        stream.write('{"file_name": "cut o')  # as a kill would
    assert "2 images of 6 already done" in predict(checkpoint, photos, "--output", out, "--resume")
    assert read(out / "predictions.json") == read(tmp_path / "whole/predictions.json")
    assert {name: (out / name).stat().st_mtime_ns for name in pictures} == pictures
    assert "max_objects was None in the run" in predict(
        checkpoint, photos, "--output", out, "--resume", "--max-objects", 2, code=2
    )


def test_ctrl_c_before_the_first_image_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, after=0)
    output = predict(checkpoint, images(tmp_path / "photos", "a.png"), "--output", tmp_path / "out", code=130)
    assert "Stopped before the first image; nothing was written" in output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_resumed_run_has_the_same_weights_and_images(checkpoint: Path, tmp_path: Path) -> None:
    """Else its results would be of two models, or of pictures that are no more."""
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    copy = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    predict(copy, photos, "--output", out)
    before = read(out / "predictions.json")
    Image.new("RGB", (30, 20)).save(photos / "b.png")
    output = predict(copy, photos, "--output", out, "--resume")
    assert "1 image of 2 already done" in output
    assert "1 image changed since; their results are replaced." in output
    after = read(out / "predictions.json")
    assert after[:5] == before[:5]
    assert {record["file_name"] for record in after[5:]} == {str(photos / "b.png")}
    assert max(x + w for x, _, w, _ in (record["bbox"] for record in after[5:])) <= 30
    assert "changed since" not in predict(copy, photos, "--output", out, "--resume")
    model = a2fpn.from_pretrained(copy)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.001)
    a2fpn.save_pretrained(model, copy)
    assert re.search(r"weights was '\w{16}' in the run", predict(copy, photos, "--output", out, "--resume", code=2))
    assert read(out / "predictions.json") == after


@pytest.mark.parametrize(
    ("name", "formats"),
    [("c.png", "coco"), ("c.geojson", "geojson"), ("objects.csv", "csv"), ("labelme/a.json", "labelme")],
)
def test_going_on_replaces_nothing_of_a_stranger(checkpoint: Path, tmp_path: Path, name: str, formats: str) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    predict(checkpoint, photos, "--output", out)
    images(photos, "c.png")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    command = (checkpoint, photos, "--output", out, "--format", f"overlay,{formats}")
    output = predict(*command, "--resume", code=2)
    assert (
        f"out holds {name.partition('/')[0]}, not made by this run. --overwrite starts over and replaces it" in output
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    predict(*command, "--overwrite")
    assert not (out / name).exists() or (out / name).read_bytes() != b"mine"


@pytest.mark.parametrize("change", ["edit", "add"])
def test_corrected_labels_are_not_replaced_by_going_on(checkpoint: Path, tmp_path: Path, change: str) -> None:
    photos, out = images(tmp_path / "photos", "a.png"), tmp_path / "out"
    command = (checkpoint, photos, "--output", out, "--format", "overlay,labelme")
    predict(*command)
    images(photos, "b.png")
    corrected = out / "labelme" / {"edit": "a.json", "add": "notes.txt"}[change]
    corrected.write_text("mine")
    output = predict(*command, "--resume", code=2)
    assert "out holds labelme, changed since this run wrote it. Delete it to have it written again, or leave" in output
    predict(checkpoint, photos, "--output", out, "--format", "overlay", "--resume")
    assert (out / "b.png").exists()
    assert corrected.read_text() == "mine"


def test_files_of_done_images_that_somebody_changed_are_kept_and_named(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    command = (checkpoint, photos, "--output", out, "--format", "geojson")
    predict(*command)
    assert "so kept" not in predict(*command, "--resume")
    whole = (out / "a.geojson").read_bytes()
    (out / "a.geojson").write_text("mine")
    (out / "b.geojson").unlink()
    assert "so kept: a.geojson. Delete a file to have it written again." in predict(*command, "--resume")
    assert (out / "a.geojson").read_text() == "mine"
    assert (out / "b.geojson").exists()
    (out / "a.geojson").unlink()
    predict(*command, "--resume")
    assert (out / "a.geojson").read_bytes() == whole


def test_labels_that_nobody_touched_take_new_images(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = images(tmp_path / "photos", "a.png"), tmp_path / "out"
    command = (checkpoint, photos, "--output", out, "--format", "overlay,labelme")
    predict(*command)
    images(photos, "b.png")
    predict(*command, "--resume")
    assert {path.name for path in (out / "labelme").glob("*.json")} >= {"a.json", "b.json"}


def test_a_file_that_came_between_a_stop_and_going_on_stays(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png", "c.png"), tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupted(patched, after=1)
        predict(checkpoint, photos, "--output", out, code=130)
    (out / "c.png").write_text("mine")
    assert "out holds c.png, not made by this run" in predict(checkpoint, photos, "--output", out, "--resume", code=2)
    (out / "c.png").rename(out / "b.png")  # as a kill between picture and line of the first one leaves it
    predict(checkpoint, photos, "--output", out, "--resume")
    assert len(read(out / "predictions.json")) == 15


@pytest.mark.parametrize("line", ["[1]", "{}", '{"file_name": "x"}', "7", "null"])
def test_a_line_that_is_no_record_ends_what_is_done(checkpoint: Path, tmp_path: Path, line: str) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    predict(checkpoint, photos, "--output", out)
    whole = read(out / "predictions.json")
    lines = (out / "predictions.jsonl").read_text().splitlines()
    (out / "predictions.jsonl").write_text(f"{lines[0]}\n{line}\n{lines[1]}\n")
    assert "1 image of 2 already done" in predict(checkpoint, photos, "--output", out, "--resume")
    assert read(out / "predictions.json") == whole


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_folder_in_the_place_of_a_picture_is_an_error(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    (out / "a.png").mkdir(parents=True)
    output = predict(checkpoint, photos, "--output", out, *options, code=2)
    assert re.search(r"a\.png is a folder, expected a file to write", output)
    assert list(out.iterdir()) == [out / "a.png"]


def test_where_nothing_can_be_read_nothing_else_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        (photos / name).write_text("no picture")
    out.mkdir()
    (out / "predictions.json").write_text("precious")
    (out / "labelme").mkdir()
    output = predict(checkpoint, photos, "--output", out, "--overwrite", "--format", "coco,labelme", code=2)
    assert "None of the 2 images could be read" in output
    assert sorted(path.name for path in out.iterdir()) == ["labelme", "predictions.json"]
    assert (out / "predictions.json").read_text() == "precious"
    output = predict(checkpoint, photos, "--output", out / "predictions.json", code=2)
    assert "predictions.json is a file; expected a folder to write to." in output


def test_one_process_at_a_time_writes_to_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    predict(checkpoint, photos, "--output", out)
    held = RunLock(out)
    for option in ("--resume", "--overwrite"):
        output = predict(checkpoint, photos, "--output", out, option, code=2)
        assert re.search(r"is being written to by process \d+ on .*; wait for it, stop it, or choose another", output)
    held.release()
    predict(checkpoint, photos, "--output", out, "--resume")
    assert {path.name for path in out.iterdir()} == RUN | {"a.png", "b.png"}
    assert len(read(out / "predictions.json")) == 10


def test_new_images_of_a_resumed_run_get_ids_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = images(tmp_path / "photos", "b.png"), tmp_path / "out"
    predict(checkpoint, photos, "--output", out)
    images(photos, "a.png", "B.jpg")
    predict(checkpoint, photos, "--output", out, "--resume")
    table = {Path(row["file_name"]).name: (row["id"], row["stem"]) for row in read(out / "manifest.json")["images"]}
    assert table == {"b.png": (1, "b"), "B.jpg": (2, "B_2"), "a.png": (3, "a")}
    assert sorted({record["image_id"] for record in read(out / "predictions.json")}) == [1, 2, 3]


def test_results_are_on_the_disk_as_they_come_and_one_bad_picture_is_skipped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png", "c.png"), tmp_path / "out"
    lines: list[int] = []
    add = PredictionFolder.add

    def watched(self: PredictionFolder, job: Job, *rest: Any) -> None:
        if job.path.name == "b.png":
            raise PermissionError(13, "Permission denied", job.stem)
        add(self, job, *rest)
        lines.append(len((out / "predictions.jsonl").read_text().splitlines()))

    monkeypatch.setattr(PredictionFolder, "add", watched)
    output = predict(checkpoint, photos, "--output", out)
    assert lines == [1, 2]
    assert "skipped" in output
    assert "in 2 images (1 more could not be read)" in output


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_file_names_that_are_no_utf8(checkpoint: Path, tmp_path: Path) -> None:
    images(tmp_path / "photos", "a.png", "b.png")
    os.rename(tmp_path / "photos/a.png", os.fsencode(tmp_path / "photos") + b"/\xff.png")
    command = ("predict", "photos", "--model", checkpoint, "--output", "out", "--score-threshold", 0)
    done = run_a2fpn(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in 2 images" in done.stdout
    names = {os.fsencode(record["file_name"]) for record in read(tmp_path / "out/predictions.json")}
    assert names == {b"photos/b.png", b"photos/\xff.png"}


def test_what_is_left_out_of_a_folder_is_told(checkpoint: Path, tmp_path: Path) -> None:
    photos = images(tmp_path / "photos", "a.png", "sub/b.png")
    (photos / "slide.svs").write_text("")
    (photos / "notes.txt").write_text("")
    (photos / ".DS_Store").write_text("")
    output = predict(checkpoint, photos, "--output", tmp_path / "out")
    assert "photos: 1 sub-folder and 2 unsupported files skipped" in output


def test_the_limit_of_pixels_is_an_option(checkpoint: Path, tmp_path: Path) -> None:
    photo = images(tmp_path, "a.png") / "a.png"
    for limit, code in ((1999, 2), (2000, 0)):
        output = predict(checkpoint, photo, "--output", tmp_path / "out", "--max-pixels", limit, code=code)
        assert ("50 x 40 = 2000 pixels exceed the limit of 1999; raise max_pixels" in output) == (code == 2)


def test_formats_are_chosen_and_can_be_asked_for_later(checkpoint: Path, tmp_path: Path) -> None:
    photos, out = images(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    predict(checkpoint, photos, "--output", out, "--format", "geojson,csv", "--format", "jsonl")
    kept = {"manifest.json", "predictions.jsonl", "a.geojson", "b.geojson", "objects.csv"}
    assert {path.name for path in out.iterdir()} == kept
    assert len((out / "objects.csv").read_text().splitlines()) == 11
    stamp = (out / "a.geojson").stat().st_mtime_ns
    output = predict(checkpoint, photos, "--output", out, "--format", "geojson,overlay,coco", "--resume")
    assert "2 images of 2 already done" in output
    assert {path.name for path in out.iterdir()} == kept | {"a.png", "b.png", "predictions.json"}
    assert len(read(out / "predictions.json")) == 10
    assert (out / "a.geojson").stat().st_mtime_ns == stamp
    assert "Unknown format of results 'coko'. Did you mean 'coco'" in predict(
        checkpoint, photos, "--output", tmp_path / "new", "--format", "coko", code=2
    )
    assert not (tmp_path / "new").exists()
