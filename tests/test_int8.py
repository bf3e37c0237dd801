"""Exported files in int8: which operators change, that they find nearly the same, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from a2fpn.data.images import read_image
from a2fpn.errors import CheckpointError, ConfigError
from a2fpn.export import quantize
from a2fpn.inference.exported import ExportedDetector
from tests.exports import Exported, exported_once, noise
from tests.helpers import torch_from
from tests.test_cli import fails, run

pytestmark = torch_from(2, 11, "the oldest whose exporter has been tried")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_once(tmp_path_factory)


@pytest.fixture(scope="module")
def files(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in float and in int8."""
    images = [read_image(photo).as_subclass(torch.Tensor) for photo in sorted(exported.photos.iterdir())]
    return exported.path, quantize(exported.path, images, tmp_path_factory.mktemp("int8") / "int8.onnx")


def test_features_are_int8_and_predictors_float(files: tuple[Path, Path]) -> None:
    program = onnx.load(files[1])
    onnx.checker.check_model(program)
    made = {name: node for node in program.graph.node for name in node.output}
    integers = {
        weight.name: weight for weight in program.graph.initializer if weight.data_type == onnx.TensorProto.INT8
    }
    kinds = Counter()
    for node in program.graph.node:
        if node.op_type == "Conv":
            source = made.get(node.input[1])
            quantized = source is not None and source.op_type == "DequantizeLinear"
            name = source.input[0] if source is not None and quantized else node.input[1]
            predicts = any(word in name for word in ("cls_logits", "bbox_pred", "mask_fcn_logits", "se.conv_expand"))
            assert quantized != predicts, name
            kinds[quantized] += 1
            if source is not None and quantized:
                scales = next(x for x in program.graph.initializer if x.name == source.input[1])
                assert list(scales.dims) == [integers[name].dims[0]]  # one for each channel
    assert min(kinds[True], kinds[False]) > 5
    assert files[1].stat().st_size < files[0].stat().st_size
    facts = {fact.key: fact.value for fact in program.metadata_props}
    plain = {fact.key: fact.value for fact in onnx.load(files[0]).metadata_props}
    assert facts == plain | {"precision": "int8"}


def test_it_finds_nearly_the_same(files: tuple[Path, Path]) -> None:
    image = noise((64, 96), 1)
    expected, found = (ExportedDetector(file)([image])[0]["scores"] for file in files)
    assert abs(len(expected) - len(found)) <= 0.5 * len(expected)
    assert found[0] == pytest.approx(float(expected[0]), abs=0.1)
    assert not torch.equal(expected[:3], found[:3])


def largest_weight(file: Path) -> int:
    weights = [onnx.numpy_helper.to_array(x) for x in onnx.load(file).graph.initializer if x.data_type == 3]
    return max(int(abs(x.astype(int)).max()) for x in weights if x.ndim == 4)


@pytest.mark.parametrize(("bits", "largest"), [(7, 64), (8, 127)])
def test_weights_have_as_many_bits_as_asked_for(exported: Exported, tmp_path: Path, bits: int, largest: int) -> None:
    images = [read_image(photo).as_subclass(torch.Tensor) for photo in sorted(exported.photos.iterdir())]
    assert largest_weight(quantize(exported.path, images[:1], tmp_path / "int8.onnx", weight_bits=bits)) == largest


@pytest.mark.slow
def test_the_command_passes_on_the_bits(exported: Exported, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    run("export", exported.checkpoint, "--output", file, "--int8", exported.photos, "--weight-bits", 8)
    assert largest_weight(file) == 127


@pytest.mark.slow
def test_the_command(files: tuple[Path, Path], exported: Exported, tmp_path: Path) -> None:
    run("export", exported.checkpoint, "--output", tmp_path / "model.onnx", "--int8", exported.photos)
    expected, found = (
        ExportedDetector(file)([noise((64, 96), 1)])[0]["scores"] for file in (files[1], tmp_path / "model.onnx")
    )
    assert torch.equal(expected, found)


def test_openvino_is_refused_since_it_finds_nothing(files: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ConfigError, match=r"int8\.onnx is an int8 file.*use ONNX Runtime"):
        ExportedDetector(files[1], runtime="openvino")


def test_images_that_show_no_object(files: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ConfigError, match="no object was found in any image"):
        quantize(files[0], [], target)
    assert not list(tmp_path.iterdir())


def test_what_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.pt2: int8 quantization supports .onnx files only"):
        quantize("model.pt2", [])
    with pytest.raises(ConfigError, match="weight_bits must be 7 or 8, got 4"):
        quantize(exported.path, [], weight_bits=4)
    (tmp_path / "alien.onnx").write_bytes(b"alien")
    with pytest.raises(CheckpointError, match="not written by a2fpn export"):
        quantize(tmp_path / "alien.onnx", [])
    out = tmp_path / "model.pt2"
    assert "--int8 is for ONNX files" in fails(
        "export", exported.checkpoint, "--output", out, "--int8", exported.photos
    )
    out = tmp_path / "model.onnx"
    assert "--weight-bits is for int8 files" in fails(
        "export", exported.checkpoint, "--output", out, "--weight-bits", 8
    )
    text = fails("export", exported.checkpoint, "--output", out, "--int8", exported.photos, "--verify", exported.photos)
    assert "--verify does not support int8 files" in text
    assert not out.exists()
