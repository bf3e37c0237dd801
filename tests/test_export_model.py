"""Whole detectors as files: what they hold, what they find, and what is said of those that can't be made."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import a2fpn
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import CheckpointError, ConfigError
from a2fpn.export import verify
from a2fpn.inference.exported import ExportedDetector
from tests.exports import NOTHING, Exported, between, detector, exported_once, noise
from tests.helpers import torch_from
from tests.test_cli import fails, run

pytestmark = torch_from(2, 11, "the oldest whose exporter has been tried")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZES = [(190, 270), (64, 96), (33, 150), (1, 1), (97, 31)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_once(tmp_path_factory)


@pytest.fixture(scope="module")
def path(exported: Exported) -> Path:
    return exported.path


def test_it_finds_what_the_detector_finds(exported: Exported) -> None:
    """Images of five sizes, each alone and in a batch of two different ones, and an empty one."""
    images = [(str(size), noise(size, seed)) for seed, size in enumerate(SIZES)]
    results = list(verify(exported.model, ExportedDetector(exported.path), images))
    assert len(results) == 3 * len(SIZES) + 1
    for result in results:
        assert result.equal, result
    assert sum(result.found for result in results) > 5
    assert all(result.mask_iou is not None for result in results if result.found)


def test_what_differs_is_seen(exported: Exported) -> None:
    other = detector("maskrcnn_fpn", score_threshold=exported.model.rule.score_threshold)
    with torch.no_grad():
        other.roi_heads.box_predictor.bbox_pred.bias.add_(0.1)
    results = list(verify(other, ExportedDetector(exported.path), [("noise", noise((64, 96), 1))]))
    assert not results[0].equal


def test_an_object_that_the_file_lacks_takes_no_partner_of_another(exported: Exported) -> None:
    """The first of two boxes is another one in the file, and nearer to the second than to what is there instead."""
    same = {"scores": torch.tensor([0.9, 0.8]), "labels": torch.zeros(2, dtype=torch.int64)}
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [3.0, 0.0, 33.0, 30.0]])

    class File:
        def run(self, images: Tensor) -> dict[str, Tensor]:
            others = torch.tensor([[60.0, 30.0, 90.0, 60.0], [3.0, 0.0, 33.0, 30.0]])
            return {"image_index": torch.zeros(2, dtype=torch.int64), "boxes": others, **same}

    def detect(images: list[Tensor], *, paste_masks: bool) -> list[dict[str, Tensor]]:
        return [{"boxes": boxes, **same}]

    result = next(verify(cast(Detector, detect), File(), [("image", NOTHING)]))
    assert (result.box, result.apart, result.equal) == (60, 1, False)


def test_no_objects(path: Path) -> None:
    found = ExportedDetector(path).run(torch.stack([NOTHING, NOTHING]))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "image_index": (0,),
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 28, 28),
    }
    result = a2fpn.Predictor(path)(NOTHING)
    assert len(result) == 0
    assert result.masks is not None
    assert result.masks.shape == (0, 64, 96)


def test_what_the_file_holds(exported: Exported) -> None:
    program = onnx.load(exported.path)
    onnx.checker.check_model(program)
    assert [(opset.domain, opset.version) for opset in program.opset_import if opset.domain == ""] == [("", 18)]
    assert {node.domain for node in program.graph.node} == {""}
    assert {"RoiAlign", "NonMaxSuppression"} <= {node.op_type for node in program.graph.node}
    facts = {entry.key: entry.value for entry in program.metadata_props}
    assert json.loads(facts["categories"]) == ["shape 7", "shape 23", "shape 90"]
    assert json.loads(facts["category_ids"]) == [7, 23, 90]
    assert float(facts["score_threshold"]) == exported.model.rule.score_threshold
    assert facts["weights_sha256"] == json.loads((exported.checkpoint / "config.json").read_text())["sha256"]
    names = [value.name for value in program.graph.output]
    assert names == json.loads(facts["outputs"]) == ["image_index", "boxes", "scores", "labels", "masks"]
    (images,) = program.graph.input
    assert images.name == "images"
    assert [bool(side.dim_param) for side in images.type.tensor_type.shape.dim] == [True, False, True, True]
    # No paths of the machine that wrote it.
    assert str(Path(a2fpn.__file__).parent).encode() not in exported.path.read_bytes()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_predictor_runs_it(exported: Exported, runtime: Any) -> None:
    pytest.importorskip(runtime)
    image = noise((64, 96), 1).permute(1, 2, 0).numpy()
    expected = a2fpn.Predictor(exported.model)(image)
    result = a2fpn.Predictor(exported.path, runtime=runtime)(image)
    assert len(result) == len(expected) > 2
    assert result.names == expected.names
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)
    assert result.masks is not None
    assert (result.masks ^ expected.masks).mean() < 1e-3
    best = float(result.scores[0])
    assert len(a2fpn.Predictor(exported.path, runtime=runtime, score_threshold=best)(image)) == 1
    assert len(a2fpn.Predictor(exported.path, runtime=runtime, max_objects=2)(image)) == 2


def test_tiles_and_float_images_are_predicted(exported: Exported) -> None:
    image = noise((150, 200), 1)
    expected, result = (a2fpn.Predictor(x, tile=100).predict([image])[0] for x in (exported.model, exported.path))
    assert len(result) == len(expected) > 0
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-2)
    floats = a2fpn.Predictor(exported.path, tile=100).predict([image / 255])[0]
    np.testing.assert_array_equal(floats.boxes, result.boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nms_threshold": 0.3}, r"model\.onnx was exported with nms_threshold 0\.5, got 0\.3"),
        ({"score_threshold": 0.01}, r"exported with score_threshold >= 0\.\d+, got 0\.0"),
        ({"max_objects": 11}, "exported with detections_per_image <= 10, got 11"),
        ({"soft_nms": "linear"}, "exported with soft_nms False, got linear"),
        ({"tta": True}, "resizes images by itself"),
    ],
)
def test_what_is_fixed_in_the_file(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a2fpn.Predictor(path, **options).predict([noise((40, 50))])


def test_the_exported_threshold_itself_can_be_asked_for(exported: Exported) -> None:
    threshold = exported.model.rule.score_threshold
    a2fpn.Predictor(exported.path, score_threshold=threshold).predict([noise((40, 50))])


def test_an_exported_detector_only_detects(path: Path) -> None:
    exported = ExportedDetector(path)
    with pytest.raises(ConfigError, match="can't be trained"):
        exported.train()
    with pytest.raises(ConfigError, match=r"model\.onnx supports the CPU only, got device='cuda'"):
        a2fpn.Predictor(path, device="cuda")
    (pasted,) = exported([noise((64, 96), 1)])
    assert pasted["masks"].shape[1:] == (1, 64, 96)
    assert exported.target_keys == ("boxes", "labels", "masks")


def test_files_of_others(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "copy", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), foreign)
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "text.pt2").write_text("hello")
    for name in ("foreign.onnx", "text.onnx", "text.pt2"):
        with pytest.raises(CheckpointError, match=rf"{name} was not written by a2fpn export, or is damaged"):
            a2fpn.Predictor(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        a2fpn.Predictor(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match=r"foreign\.onnx is run by onnxruntime or openvino, got runtime='torch'"):
        a2fpn.Predictor(foreign, runtime="torch")
    with pytest.raises(TypeError, match=r"or an \.onnx or \.pt2 file"):
        a2fpn.Predictor(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert "was not written by a2fpn export" in fails(
        "predict", tmp_path / "image.png", "--model", tmp_path / "text.onnx"
    )


def test_bad_requests(exported: Exported, tmp_path: Path) -> None:
    for options, message in (
        ({"path": "model.bin"}, r"'model\.bin' ends neither in \.onnx nor in \.pt2"),
        ({"format": "tflite"}, "format must be one of onnx, torch, got 'tflite'"),
        ({"dtype": "int8"}, "dtype must be one of uint8, float32, got 'int8'"),
        ({"size": (0, 5)}, "size must be a height and a width of at least 1 pixel"),
        ({"path": "no/such/model.onnx"}, "no such folder"),
    ):
        arguments: dict[str, Any] = {"path": "model.onnx"} | options
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            a2fpn.export_model(exported.model, tmp_path / arguments.pop("path"), **arguments)
    with pytest.raises(TypeError, match="without optimize_for_inference"):
        a2fpn.export_model(a2fpn.optimize_for_inference(exported.model), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_fails_deletes_the_file(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same file again: what is exported does not change, and takes long.
    kept, file = exported.path.read_bytes(), tmp_path / "model.onnx"
    monkeypatch.setattr(a2fpn.export, "export_model", lambda model, path, **options: path.write_bytes(kept))
    command = ["export", exported.checkpoint, "--output", file, "--verify", exported.photos]
    assert "Compared on 2 images" in run(*command)
    # By its module, which the package's function of the same name hides.
    monkeypatch.setattr(sys.modules["a2fpn.export.verify"], "BOX_TOLERANCE", -1.0)
    text = run(*command, "--overwrite", code=1)
    assert "was deleted: it differs from the model" in text
    assert not file.exists()


def test_the_commands(exported: Exported, tmp_path: Path) -> None:
    checkpoint, file = exported.checkpoint, exported.path
    assert "Compared on 2 images, alone, in batches of 2 and empty" in exported.text
    assert "exists; --overwrite replaces it" in fails("export", checkpoint, "--output", file)
    assert "expected HEIGHTxWIDTH" in fails("export", checkpoint, "--output", tmp_path / "a.onnx", "--size", "64")
    assert "is an exported file" in fails("export", file, "--output", tmp_path / "a.onnx")
    predict = ["predict", exported.photos, "--output"]
    threshold = ["--score-threshold", exported.model.rule.score_threshold]
    run(*predict, tmp_path / "theirs", "--model", file, *threshold)
    run(*predict, tmp_path / "ours", "--model", checkpoint, *threshold)
    theirs, ours = (json.loads((tmp_path / x / "predictions.json").read_text()) for x in ("theirs", "ours"))
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=2e-2)
    options = (["--optimize"], ["--dtype", "bf16"])
    for option in options:
        assert "--optimize and --dtype are for checkpoints" in fails(*predict, tmp_path / "a", "--model", file, *option)
    assert "--runtime is for files" in fails(
        *predict, tmp_path / "a", "--model", checkpoint, "--runtime", "onnxruntime"
    )


@pytest.mark.slow
@pytest.mark.parametrize("neck", ["fpn", "pafpn", "a2fpn_lite", "a2fpn"])
@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_detector(name: str, neck: str, tmp_path: Path) -> None:
    model = detector(f"{name}_{neck}", score_threshold=between(detector(f"{name}_{neck}", score_threshold=0.0)))
    path = a2fpn.export_model(model, tmp_path / "model.onnx")
    results = list(verify(model, ExportedDetector(path), [(str(size), noise(size, i)) for i, size in enumerate(SIZES)]))
    assert [result for result in results if not result.equal] == []
