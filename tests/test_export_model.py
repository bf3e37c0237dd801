"""Whole detectors as files: what they hold, what they find, and what is said of those that can't be made."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import a2fpn
from a2fpn.config import Category
from a2fpn.detectors import Detector
from a2fpn.errors import CheckpointError, ConfigError
from a2fpn.export import verify
from a2fpn.inference.exported import ExportedDetector
from tests.helpers import randomize, tiny_model
from tests.test_cli import fails, run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZES = [(190, 270), (64, 96), (33, 150), (1, 1), (97, 31)]
CATEGORIES = tuple(Category(index, f"shape {index}") for index in (7, 23, 90))


def detector(name: str, **overrides: Any) -> Detector:
    """A small detector that finds something in noise."""
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 200, "resize": "shortest_edge", "categories": CATEGORIES}
    model = tiny_model(name, **(options | {"score_threshold": 0.05} | overrides)).eval().requires_grad_(False)
    randomize(model, std=0.05)
    return model


def noise(size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector("maskrcnn_a2fpn")


@pytest.fixture(scope="module")
def path(model: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a2fpn.export_model(model, tmp_path_factory.mktemp("export") / "model.onnx")


def test_it_finds_what_the_detector_finds(model: Detector, path: Path) -> None:
    """Images of five sizes, each alone and in a batch of two different ones, and an empty one."""
    images = [(str(size), noise(size, seed)) for seed, size in enumerate(SIZES)]
    results = list(verify(model, ExportedDetector(path), images))
    assert len(results) == 3 * len(SIZES) + 1
    for result in results:
        assert result.equal, result
    assert sum(result.found for result in results) > 20
    assert all(result.mask_iou is not None for result in results if result.found)


def test_what_differs_is_seen(model: Detector, path: Path) -> None:
    other = detector("maskrcnn_a2fpn")
    with torch.no_grad():
        other.roi_heads.box_predictor.bbox_pred.bias.add_(0.1)
    results = list(verify(other, ExportedDetector(path), [("noise", noise((64, 96)))]))
    assert not results[0].equal


def test_no_objects(path: Path) -> None:
    exported = ExportedDetector(path)
    found = exported.run(torch.zeros(2, 3, 40, 50, dtype=torch.uint8))
    kept = found["scores"] > 2
    assert not kept.any()
    strict = a2fpn.export_model(detector("maskrcnn_fpn", score_threshold=1.0), path.with_name("strict.onnx"))
    found = ExportedDetector(strict).run(torch.zeros(2, 3, 40, 50, dtype=torch.uint8))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "image_index": (0,),
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 28, 28),
    }


def test_what_the_file_holds(model: Detector, path: Path) -> None:
    program = onnx.load(path)
    onnx.checker.check_model(program)
    assert [(opset.domain, opset.version) for opset in program.opset_import if opset.domain == ""] == [("", 18)]
    assert {node.domain for node in program.graph.node} == {""}
    operators = {node.op_type for node in program.graph.node}
    assert {"RoiAlign", "NonMaxSuppression"} <= operators
    facts = {entry.key: entry.value for entry in program.metadata_props}
    assert json.loads(facts["categories"]) == ["shape 7", "shape 23", "shape 90"]
    assert json.loads(facts["category_ids"]) == [7, 23, 90]
    assert float(facts["score_threshold"]) == 0.05
    assert len(facts["weights_sha256"]) == 64
    names = [value.name for value in program.graph.output]
    assert names == json.loads(facts["outputs"]) == ["image_index", "boxes", "scores", "labels", "masks"]
    (images,) = program.graph.input
    assert images.name == "images"
    shape = images.type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in shape] == [True, False, True, True]
    # No paths of the machine that wrote it.
    assert str(Path(a2fpn.__file__).parent).encode() not in path.read_bytes()


def test_the_sha256_is_that_of_the_checkpoint(model: Detector, path: Path, tmp_path: Path) -> None:
    folder = a2fpn.save_pretrained(model, tmp_path / "checkpoint")
    assert ExportedDetector(path).facts["weights_sha256"] == json.loads((folder / "config.json").read_text())["sha256"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_predictor_runs_it(model: Detector, path: Path, runtime: Any) -> None:
    pytest.importorskip(runtime)
    image = noise((90, 120)).permute(1, 2, 0).numpy()
    expected = a2fpn.Predictor(model)(image)
    result = a2fpn.Predictor(path, runtime=runtime)(image)
    assert len(result) == len(expected) > 0
    assert result.names == expected.names
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)
    assert result.masks is not None
    assert (result.masks ^ expected.masks).mean() < 1e-3
    best = float(result.scores[0])
    assert len(a2fpn.Predictor(path, runtime=runtime, score_threshold=best)(image)) == 1
    assert len(a2fpn.Predictor(path, runtime=runtime, detections_per_image=2)(image)) == 2


def test_tiles_are_predicted(model: Detector, path: Path) -> None:
    image = noise((150, 200))
    expected, result = (a2fpn.Predictor(source, tile=100).predict([image])[0] for source in (model, path))
    assert len(result) == len(expected) > 0
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nms_threshold": 0.3}, r"model\.onnx was exported with nms_threshold 0\.5, got 0\.3"),
        ({"score_threshold": 0.01}, r"exported with score_threshold >= 0\.05, got 0\.0"),
        ({"detections_per_image": 11}, "exported with detections_per_image <= 10, got 11"),
        ({"soft_nms": "linear"}, "exported with soft_nms False, got linear"),
        ({"tta": True}, "resizes images by itself"),
    ],
)
def test_what_is_fixed_in_the_file(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a2fpn.Predictor(path, **options).predict([noise((40, 50))])


def test_the_exported_threshold_itself_can_be_asked_for(path: Path) -> None:
    a2fpn.Predictor(path, score_threshold=0.05).predict([noise((40, 50))])


def test_files_of_others(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    graph = onnx.helper.make_graph([], "nothing", [], [])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), foreign)
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "text.pt2").write_text("hello")
    for name in ("foreign.onnx", "text.onnx", "text.pt2"):
        with pytest.raises(CheckpointError, match=rf"{name} is no file of a2fpn export, or a damaged one"):
            a2fpn.Predictor(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        a2fpn.Predictor(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match=r"foreign\.onnx is run by onnxruntime or openvino, got runtime='torch'"):
        a2fpn.Predictor(foreign, runtime="torch")
    with pytest.raises(TypeError, match=r"or an \.onnx or \.pt2 file"):
        a2fpn.Predictor(str(tmp_path))


def test_bad_requests(model: Detector, tmp_path: Path) -> None:
    for options, message in (
        ({"path": "model.bin"}, r"'model\.bin' ends neither in \.onnx nor in \.pt2"),
        ({"format": "tflite"}, "format must be one of onnx, torch, got 'tflite'"),
        ({"dtype": "int8"}, "dtype must be one of uint8, float32, got 'int8'"),
        ({"size": (0, 5)}, "size must be a height and a width of at least 1 pixel"),
        ({"path": "no/such/model.onnx"}, "no such folder"),
    ):
        arguments: dict[str, Any] = {"path": "model.onnx"} | options
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            a2fpn.export_model(model, tmp_path / arguments.pop("path"), **arguments)
    with pytest.raises(TypeError, match="that was not optimized"):
        a2fpn.export_model(a2fpn.optimize_for_inference(model), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch(tmp_path: Path) -> None:
    model = detector("fasterrcnn_fpn")
    path = a2fpn.export_model(model, tmp_path / "model.pt2", dtype="float32")
    assert all(result.equal for result in verify(model, ExportedDetector(path), [("noise", noise((64, 96)))]))
    code = "import sys, torch, torchvision; print(*torch.export.load(sys.argv[1]).module()(torch.rand(1, 3, 64, 80)))"
    text = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout
    assert text.split() == ["image_index", "boxes", "scores", "labels"]


def test_the_model_stays_as_it_is(path: Path) -> None:
    model = detector("fasterrcnn_fpn").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    a2fpn.export_model(model, path.with_name("again.onnx"))
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_command(model: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = a2fpn.save_pretrained(model, tmp_path / "checkpoint")
    (tmp_path / "photos").mkdir()
    for seed, (height, width) in enumerate([(64, 96), (50, 40)]):
        picture = noise((height, width), seed).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / "photos" / f"{seed}.png")
    file = tmp_path / "model.onnx"
    text = run("export", checkpoint, "--output", file, "--verify", tmp_path / "photos")
    assert "Compared on 2 images, alone, in batches of 2 and empty" in text
    assert file.stat().st_size > 10**5
    assert "exists; --overwrite replaces it" in fails("export", checkpoint, "--output", file)
    assert "expected HEIGHTxWIDTH" in fails("export", checkpoint, "--output", tmp_path / "a.onnx", "--size", "64")
    assert "is an exported file" in fails("export", file, "--output", tmp_path / "a.onnx")
    predict = ["predict", tmp_path / "photos", "--output"]
    run(*predict, tmp_path / "theirs", "--model", file, "--score-threshold", "0.06")
    run(*predict, tmp_path / "ours", "--model", checkpoint, "--score-threshold", "0.06")
    theirs, ours = (json.loads((tmp_path / x / "predictions.json").read_text()) for x in ("theirs", "ours"))
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=2e-2)
    assert "--optimize and --dtype are for checkpoints" in fails(
        *predict, tmp_path / "none", "--model", file, "--optimize"
    )
    monkeypatch.setattr("a2fpn.export.verify.BOX_TOLERANCE", -1.0)
    text = run("export", checkpoint, "--output", file, "--overwrite", "--verify", tmp_path / "photos", code=1)
    assert "was deleted: it differs from the model" in text
    assert not file.exists()
