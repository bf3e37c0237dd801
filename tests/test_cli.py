import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli.app import app
from a2fpn.cli.demo import DEMO_MODEL
from a2fpn.cli.info import INFO_SIZE
from a2fpn.config import Category
from a2fpn.evaluation import BACKENDS
from a2fpn.pretrained.catalog import PRETRAINED, EmbeddedWeights
from tests.coco_data import write_coco
from tests.helpers import torch_from

SMALL = {
    "backbone": "test_efficientnet",
    "neck_args": {"out_channels": 16},
    "box_channels": 16,
    "mask_channels": 8,
    "mask_layers": 1,
    "min_size": 64,
    "max_size": 128,
    "score_threshold": 0.0,
    "detections_per_image": 5,
}
RUN = ["manifest.json", "predictions.json", "predictions.jsonl"]
CATEGORIES = tuple(Category(index, f"shape {index}") for index in (7, 23, 90))


def run(*arguments, code=0, env=None):
    """Runs the command line, checks its exit code and returns all it wrote."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", **(env or {})})
    assert result.exit_code == code, result.output
    return result.output


def fails(*arguments):
    """Runs the command line, which must end with one line of error, and returns it."""
    lines = [line for line in run(*arguments, code=2).splitlines() if "a2fpn: error:" in line]
    assert len(lines) == 1
    return lines[0]


def save(folder, name="maskrcnn_fpn", **overrides):
    torch.manual_seed(0)
    model = a2fpn.create_model(name, **{**SMALL, "categories": CATEGORIES, **overrides})
    return a2fpn.save_pretrained(model, folder, metadata={"license": "CC0-1.0", "metrics": {"segm/ap": 0.5}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder and annotations of 3 images."""
    return write_coco(tmp_path_factory.mktemp("data"), images=3)


def test_predict_writes_pictures_and_coco_results(checkpoint, data, tmp_path):
    folder, _ = data
    out = tmp_path / "new" / "folder"
    output = run("predict", folder, "--model", checkpoint, "--output", out, "--score-threshold", 0)
    assert "Found 15 objects in 3 images" in output
    assert "ms per image" in output
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png", *RUN]
    records = json.loads((out / "predictions.json").read_text())
    assert len(records) == 15
    assert {(record["image_id"], record["file_name"]) for record in records} == {
        (i, str(folder / f"{i}.png")) for i in range(3)
    }
    assert {record["category_id"] for record in records} <= {7, 23, 90}
    assert all(record["segmentation"]["size"] in ([64, 80], [80, 64]) for record in records)
    opened = output.rpartition("Open ")[2].strip()
    assert Image.open(opened).width >= 768


def test_score_threshold_and_single_files(checkpoint, data, tmp_path):
    output = run(
        "predict",
        data[0] / "1.png",
        data[0] / "0.png",
        "--model",
        checkpoint,
        "--output",
        tmp_path,
        "--score-threshold",
        1,
    )
    assert "Found 0 objects in 2 images" in output
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
    assert (tmp_path / "1.png").is_file()


def test_images_of_one_name_get_pictures_of_their_own(checkpoint, data, tmp_path):
    image = Image.open(data[0] / "0.png")
    for name in ("a/cell.png", "a/cell.jpg", "b/Cell.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    run("predict", tmp_path / "a", tmp_path / "b", "--model", checkpoint, "--output", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    run("predict", tmp_path / "a", "--model", checkpoint, "--output", tmp_path / "a out", "--score-threshold", 0)
    records = json.loads((tmp_path / "a out" / "predictions.json").read_text())
    names = [str(tmp_path / "a" / name) for name in ("cell.jpg", "cell.png")]
    assert {(record["image_id"], record["file_name"]) for record in records} == set(enumerate(names, 1))


def test_bad_images_in_a_folder_are_reported_and_the_others_done(checkpoint, data, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "corrupt.png").write_bytes((data[0] / "0.png").read_bytes()[:300])
    (images / "no_image.jpg").write_text("hello")
    Image.open(data[0] / "0.png").save(images / "good.png")
    output = run("predict", images, "--model", checkpoint, "--output", tmp_path / "out")
    assert "skipped" in output
    assert "corrupt.png" in output
    assert "no_image.jpg" in output
    assert "in 1 image (2 more could not be read)" in output
    assert (tmp_path / "out" / "good.png").is_file()

    assert "corrupt.png: not a readable image" in fails(
        "predict", images / "corrupt.png", "--model", checkpoint, "--output", tmp_path / "none"
    )
    (images / "good.png").unlink()
    assert "None of the 2 images could be read" in fails(
        "predict", images, "--model", checkpoint, "--output", tmp_path / "none"
    )
    assert list((tmp_path / "none").iterdir()) == []


def test_unusual_images_are_converted(checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16)).save(images / "16bit.png")
    Image.fromarray(rng.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA").save(images / "rgba.png")
    Image.fromarray(rng.integers(0, 256, (40, 50, 4), dtype=np.uint8), "CMYK").save(images / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(images / "gray.png")
    frames = [Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(images / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(images / "tiny.png")
    Image.new("RGB", (20_000, 30)).save(images / "wide.png")
    output = run("predict", images, "--model", checkpoint, "--output", tmp_path / "out", "--score-threshold", 0)
    assert "in 7 images," in output
    assert "skipped" not in output
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


def test_predict_never_writes_where_it_reads(checkpoint, data):
    assert "choose another one" in fails("predict", data[0], "--model", checkpoint, "--output", data[0])


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere.png", r"nowhere.png: no such file"), ("", "No images in the folder")]
)
def test_predict_needs_images(checkpoint, tmp_path, source, message):
    assert message in fails("predict", tmp_path / source, "--model", checkpoint, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_and_broken_models(data, tmp_path):
    arguments = ("predict", data[0], "--output", tmp_path / "out", "--model")
    assert "Did you mean 'maskrcnn_a2fpn_lite0.nuclei'" in fails(*arguments, "maskrcnn_a2fpn_lite0.nucle")
    assert "not a checkpoint folder" in fails(*arguments, tmp_path)
    broken = save(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "damaged" in fails(*arguments, broken)
    (broken / "config.json").write_text("{")
    assert "not valid JSON" in fails(*arguments, broken)


def test_unknown_device(checkpoint, data, tmp_path):
    arguments = ("predict", data[0], "--output", tmp_path / "out", "--model", checkpoint, "--device")
    assert "--device quantum is not available" in fails(*arguments, "quantum")


def test_evaluate_prints_and_writes_the_numbers(checkpoint, data, tmp_path):
    out = tmp_path / "numbers.json"
    output = run(
        "evaluate", "--model", checkpoint, "--images", data[0], "--annotations", data[1],
        "--max-detections", 300, "--json", out,
    )  # fmt: skip
    assert "3 images" in output
    assert "boxes" in output
    assert "masks" in output
    assert "AR, 300 detections per image" in output
    assert "shape 23" in output
    numbers = json.loads(out.read_text())
    assert numbers["max_detections"] == 300
    assert len([key for key in numbers if key.count("/") == 1]) == 24
    assert {"segm/ap/shape 7", "bbox/ap/shape 90"} <= numbers.keys()


def test_evaluate_agrees_with_predict(checkpoint, data, tmp_path):
    from a2fpn.evaluation import evaluate_coco

    folder, annotations = data
    truth = json.loads(annotations.read_text())
    run("predict", folder, "--model", checkpoint, "--output", tmp_path, "--score-threshold", 0)
    records = json.loads((tmp_path / "predictions.json").read_text())
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    expected = evaluate_coco(truth, [record | {"image_id": ids[Path(record["file_name"]).name]} for record in records])
    out = tmp_path / "numbers.json"
    run("evaluate", "--model", checkpoint, "--images", folder, "--annotations", annotations, "--json", out)
    numbers = json.loads(out.read_text())
    assert {key: numbers[key] for key in expected.to_dict()} == expected.to_dict()


def test_evaluate_box_detectors_and_single_classes(tmp_path):
    folder, annotations = write_coco(tmp_path, images=2, category_ids=(7,))
    checkpoint = save(tmp_path / "boxes", "fasterrcnn_fpn", categories=CATEGORIES[:1])
    output = run("evaluate", "--model", checkpoint, "--images", folder, "--annotations", annotations)
    assert "boxes" in output
    assert "masks" not in output
    assert "per class" not in output


def test_evaluate_a_model_without_categories(data, tmp_path):
    same = save(tmp_path / "same", categories=(), num_classes=3)
    run("evaluate", "--model", same, "--images", data[0], "--annotations", data[1])
    other = save(tmp_path / "other", categories=(), num_classes=2)
    message = fails("evaluate", "--model", other, "--images", data[0], "--annotations", data[1])
    assert "2 classes" in message
    assert "has 3" in message


def test_evaluate_a_mask_detector_on_a_file_without_masks(checkpoint, data, tmp_path):
    truth = json.loads(data[1].read_text())
    truth["annotations"] = [{k: v for k, v in a.items() if k != "segmentation"} for a in truth["annotations"]]
    annotations, out = tmp_path / "boxes.json", tmp_path / "numbers.json"
    annotations.write_text(json.dumps(truth))
    output = run("evaluate", "--model", checkpoint, "--images", data[0], "--annotations", annotations, "--json", out)
    assert "masks" not in output
    numbers = json.loads(out.read_text())
    assert not [key for key in numbers if key.startswith("segm")]
    run("evaluate", "--model", checkpoint, "--images", data[0], "--annotations", data[1], "--json", out)
    with_masks = json.loads(out.read_text())
    assert {key: with_masks[key] for key in numbers} == numbers  # the file says how large each object is


def test_evaluate_with_every_library_gives_the_same_numbers(checkpoint, data, tmp_path):
    common = ("evaluate", "--model", checkpoint, "--images", data[0], "--annotations", data[1], "--json")
    numbers = []
    for backend in ("auto", "hotcoco", "pycocotools"):
        run(*common, tmp_path / backend, "--backend", backend)
        numbers.append(json.loads((tmp_path / backend).read_text()))
    assert numbers[0] == numbers[1] == pytest.approx(numbers[2], abs=1e-12)
    text = run("evaluate", "--help")
    assert [backend for backend in BACKENDS if backend not in text] == []


NOSES = ["nose", "left_ear", "right_ear"]


def with_keypoints(annotations, path, count=3):
    """The annotations with keypoints inside their boxes, the last of which is not labeled."""
    truth = json.loads(annotations.read_text())
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = [[x + w * step / count, y + h * step / count, 2] for step in range(count - 1)] + [[0, 0, 0]]
        annotation["keypoints"] = [value for point in points for value in point]
        del annotation["segmentation"]
    truth["categories"] = [{**category, "keypoints": NOSES[:count]} for category in truth["categories"]]
    path.write_text(json.dumps(truth))
    return path


def test_evaluate_a_keypoint_detector(data, tmp_path):
    small = {key: value for key, value in SMALL.items() if not key.startswith("mask_")}
    model = a2fpn.create_model(
        "keypointrcnn_fpn", **small, categories=CATEGORIES, keypoint_channels=8, keypoint_layers=1, num_keypoints=3,
        keypoint_names=NOSES,
    )  # fmt: skip
    checkpoint = a2fpn.save_pretrained(model, tmp_path / "model")
    common = ("evaluate", "--model", checkpoint, "--images", data[0], "--annotations")
    annotations, out = with_keypoints(data[1], tmp_path / "keypoints.json"), tmp_path / "numbers.json"
    output = run(*common, annotations, "--oks-sigmas", "0.1,0.1,0.2", "--json", out)
    assert "keypoints (OKS)" in output
    assert "AR of keypoints at OKS 0.75" in output
    assert "masks" not in output
    numbers = json.loads(out.read_text())
    assert len([key for key in numbers if key.startswith("keypoints/") and key.count("/") == 1]) == 10
    assert "keypoints/ap/shape 23" in numbers
    assert "masks" not in run(*common, data[1])
    assert "keypoints" not in run(*common, data[1])

    assert "has 3 keypoints per object, oks_sigmas are 17" in fails(*common, annotations)
    assert "comma-separated numbers, such as 0.026,0.025, got 'a,b'" in fails(
        *common, annotations, "--oks-sigmas", "a,b"
    )
    two = with_keypoints(data[1], tmp_path / "two.json", count=2)
    assert "The model gives 3 keypoints, " in fails(*common, two)
    truth = json.loads(annotations.read_text())
    for category in truth["categories"]:
        category["keypoints"] = ["tail", "left_ear", "right_ear"]
    two.write_text(json.dumps(truth))
    assert "The model's keypoints are nose, left_ear, right_ear, those of " in fails(*common, two)


def test_evaluate_detections_of_classes_the_data_lacks_do_not_count(checkpoint, tmp_path):
    folder, annotations = write_coco(tmp_path, images=2, category_ids=(23,))
    run("evaluate", "--model", checkpoint, "--images", folder, "--annotations", annotations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["categories"][0].update(id=8) or [a.update(category_id=8) for a in d["annotations"]],
            "category 8",
        ),
        (lambda d: d["categories"][0].update(name="cat"), "Category 7 is 'cat'"),
        (lambda d: d.pop("annotations"), "not a COCO file"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "gone.png: no such file"),
        (lambda d: d["images"][0].update(height=63), "the annotations give"),
    ],
)
def test_evaluate_with_wrong_data(checkpoint, data, tmp_path, change, message):
    folder, annotations = data
    changed = json.loads(annotations.read_text())
    change(changed)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(changed))
    assert message in fails("evaluate", "--model", checkpoint, "--images", folder, "--annotations", path)


def test_evaluate_with_missing_files(checkpoint, data, tmp_path):
    arguments = ("evaluate", "--model", checkpoint, "--images")
    assert "no such folder" in fails(*arguments, tmp_path / "nowhere", "--annotations", data[1])
    assert "no such file" in fails(*arguments, data[0], "--annotations", tmp_path / "nowhere.json")
    assert "not UTF-8 text" in fails(*arguments, data[0], "--annotations", data[0] / "0.png")


def test_list():
    assert run("list", "maskrcnn_a2fpn_r").split() == a2fpn.list_models("maskrcnn_a2fpn_r")
    assert run("list", "*_fpn_r50").split() == a2fpn.list_models("*_fpn_r50")
    assert run("list", "--necks").split() == a2fpn.list_necks()
    lines = run("list", "--pretrained").splitlines()
    assert [line.split()[0] for line in lines] == a2fpn.list_models(pretrained=True)
    (graft,) = run("list", "--pretrained", "maskrcnn_a2fpn_r50").splitlines()
    assert " torchvision  grafted  box 0.379  mask 0.346 " in graft
    assert "license: not stated by torchvision" in graft
    assert "matches 'nonsense'" in fails("list", "nonsense")


def test_info_of_a_checkpoint(checkpoint):
    output = run("info", checkpoint)
    for expected in ("maskrcnn", "test_efficientnet", "shape 7, shape 23, shape 90", "CC0-1.0", "segm/ap 0.5"):
        assert expected in output
    model = a2fpn.from_pretrained(checkpoint)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total / 1e6:.2f} M" in output
    assert "640 x 480" in output
    for name in model.neck.out_spec.names:
        assert name in output


@torch_from(2, 5, "its counter does not know the attention of the CPU")
def test_info_counts_multiplications(tmp_path):
    # Of every level, the neck's 1x1 and 3x3 convolutions at the size of the padded image: known by hand.
    output = run("info", save(tmp_path))
    model = a2fpn.from_pretrained(tmp_path)
    height, width = model.preprocess([torch.zeros(3, *INFO_SIZE)]).tensor.shape[-2:]
    macs = 0
    for level in model.neck.in_spec.names:
        spec = model.neck.in_spec[level]
        macs += (spec.channels * 16 + 9 * 16 * 16) * (height // spec.stride) * (width // spec.stride)
    (line,) = [line for line in output.splitlines() if "neck" in line and "M" in line]
    assert f"{macs / 1e9:.2f}" in line


def test_info_of_torchvision_weights_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "fasterrcnn_fpn_mobilenetv3_large_100.tv_coco_320"
    output = " ".join(run("info", name).split())
    (row,) = a2fpn.list_pretrained(name)
    for expected in (f"weights {row.origin}", "kind trained", f"AP box 0.228 ({row.measured})", "80: person, bicycle"):
        assert expected in output
    assert not list(tmp_path.rglob("*"))


def test_info_of_a_name(checkpoint):
    assert "tf_efficientnet_lite0" in run("info", "fasterrcnn_fpn_lite0")
    assert "Did you mean" in fails("info", "maskrcnn_a2fpm_r50")


@pytest.fixture
def demo_data(data, checkpoint, tmp_path, monkeypatch):
    """A demo of three images, with the checkpoint in the place of the embedded model."""
    (tmp_path / "assets").mkdir()
    os.symlink(data[0], tmp_path / "assets" / "images")
    (tmp_path / "assets" / "annotations.json").write_text(data[1].read_text())
    monkeypatch.setattr("a2fpn.cli.demo.DEMO_DATA", tmp_path / "assets")
    monkeypatch.setitem(PRETRAINED, DEMO_MODEL, EmbeddedWeights(checkpoint, "a test"))


@pytest.mark.usefixtures("demo_data")
def test_demo(tmp_path):
    out = tmp_path / "out"
    output = run("demo", "--output", out, "--score-threshold", 0)
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png"]
    (row,) = [line for line in output.splitlines() if "0.png" in line and "Open" not in line]
    assert row.replace("│", " ").split()[1] == "5"
    (total,) = [line for line in output.splitlines() if "all" in line]
    assert total.replace("│", " ").split()[1] == "15"
    assert output.rstrip().splitlines()[-1] == f"Open {out / '0.png'}"


def test_errors_show_their_traceback_only_when_asked():
    assert "a2fpn: error" in run("list", "nonsense", code=2)
    for arguments, env in ((["--debug"], {}), ([], {"A2FPN_DEBUG": "1"})):
        result = CliRunner().invoke(app, [*arguments, "list", "nonsense"], env=env)
        assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug"), AssertionError("a bug")])
def test_bugs_keep_their_traceback(monkeypatch, error):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(a2fpn, "list_models", broken)
    result = CliRunner().invoke(app, ["list"])
    assert result.exception is error
    assert "a2fpn: error" not in result.output


def test_files_that_can_not_be_written_are_no_bug(checkpoint, data, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "is a file; expected a folder" in fails(
        "predict", data[0], "--model", checkpoint, "--output", tmp_path / "out"
    )


@pytest.mark.parametrize("command", ["demo", "predict", "evaluate", "list", "info"])
def test_every_command_has_help_with_an_example(command):
    output = run(command, "--help")
    assert f"Example: a2fpn {command}" in output


def test_an_interrupt_before_a_command_begins_ends_without_a_traceback(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("a2fpn.cli.door.prepare_streams", interrupt)
    with pytest.raises(SystemExit, match="130"):
        a2fpn.cli.main(["list"])


def test_wrong_usage(checkpoint, tmp_path):
    assert "Missing option" in run("predict", tmp_path, code=2)
    assert "No such command" in run("predikt", code=2)
    assert "--score-threshold" in run("predict", tmp_path, "--model", checkpoint, "--score-threshold", 2, code=2)
    assert run("--version").split() == ["a2fpn", a2fpn.__version__]


def test_python_dash_m_starts_without_what_it_does_not_need():
    command = [sys.executable, "-X", "importtime", "-m", "a2fpn", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    for command in ("demo", "predict", "evaluate", "list", "info"):
        assert command in process.stdout
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "a2fpn.cli" in imported
    assert not {"torch", "timm", "matplotlib", "supervision", "pycocotools"} & imported


def test_predict_in_tiles_and_views(checkpoint, data, tmp_path):
    arguments = ("predict", data[0] / "0.png", "--model", checkpoint, "--output", tmp_path, "--score-threshold", 0)
    assert "Found 5 objects" in run(*arguments)
    assert "Found 2 objects" in run(*arguments, "--max-objects", 2, "--overwrite")
    run(
        *arguments,
        "--overwrite",
        "--tile",
        40,
        "--overlap",
        0.3,
        "--tta",
        "--soft-nms",
        "gaussian",
        "--nms-threshold",
        0.3,
    )
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert records
    assert all(record["segmentation"]["size"] in ([64, 80], [80, 64]) for record in records)


@pytest.mark.parametrize("arguments", [["--optimize"], ["--dtype", "bf16"]])
def test_predict_with_an_optimized_model(checkpoint, data, tmp_path, arguments):
    common = ("predict", data[0] / "0.png", "--model", checkpoint, "--output", tmp_path, "--score-threshold", 0)
    run(*common)
    expected = json.loads((tmp_path / "predictions.json").read_text())
    run(*common, *arguments, "--overwrite")
    records = json.loads((tmp_path / "predictions.json").read_text())
    tolerance = 1e-4 if "--optimize" in arguments else 0.02
    scores = [record["score"] for record in records]
    assert scores == pytest.approx([record["score"] for record in expected], abs=tolerance)


def test_evaluate_takes_the_same_options(checkpoint, data, tmp_path):
    common = ("evaluate", "--model", checkpoint, "--images", data[0], "--annotations", data[1], "--json")
    run(*common, tmp_path / "a.json", "--optimize", "--max-objects", 3)
    run(*common, tmp_path / "b.json", "--tile", 64, "--tta", "--soft-nms", "linear", "--dtype", "bf16")
    assert json.loads((tmp_path / "a.json").read_text()).keys() == json.loads((tmp_path / "b.json").read_text()).keys()


@pytest.mark.parametrize("arguments", [["--tile", 8], ["--overlap", 1], ["--soft-nms", "hard"], ["--dtype", "fp8"]])
def test_options_out_of_range_are_named(checkpoint, data, tmp_path, arguments):
    output = run(
        "predict", data[0] / "0.png", "--model", checkpoint, "--output", tmp_path, *arguments, code=2
    )  # fmt: skip
    assert arguments[0] in output
