"""Quantization of exported files to int8: convolutions, and operators between them, in ONNX's QDQ format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from a2fpn._atomic import replaced_file
from a2fpn.errors import ConfigError
from a2fpn.inference.exported import ExportedDetector

_BETWEEN = ("Relu", "Clip", "MaxPool", "Resize")
"""Operators that run in int8 if their input does."""
_READERS = {*_BETWEEN, "Conv", "Add", "RoiAlign"}
"""Operators that consume features. A convolution without such a consumer is a predictor and stays in float."""
_GATED = ({"Sigmoid", "Mul"}, {"HardSigmoid", "Mul"}, {"HardSwish"}, {"Erf", "Mul"}, {"Gelu"})
"""Operators of SiLU, Hardswish and GELU, which consume features too; a sigmoid alone consumes a prediction."""
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Metadata entry without which ONNX Runtime warns that a model was not pre-processed."""


def quantize(
    path: str | Path,
    images: Iterable[Tensor],
    output: str | Path | None = None,
    *,
    weight_bits: Literal[7, 8] = 7,
) -> Path:
    """Quantize the features of an exported detector to int8, with per-channel weights.

    Activation ranges are the minima and maxima over calibration images. Convolutions that predict scores, boxes, masks
    or kernels, linear layers and everything after them stay in float.

    Args:
        path: An ``.onnx`` file of :func:`a2fpn.export_model`.
        images: ``(C, H, W)`` uint8, or float in [0, 1], representative of the detector's use; about twenty to fifty.
        output: The file to write; None replaces ``path``.
        weight_bits: 8 is nearer to the float file, on processors with VNNI, AMX or on ARM; sums of products with 8-bit
            weights overflow on others, such as those with AVX2 only.

    Returns:
        The written file.

    Raises:
        ConfigError: If ONNX Runtime or onnx are not installed, the file is not ONNX, no object is detected, or
            ``weight_bits`` is another number.
        CheckpointError: If it is not a file of :func:`a2fpn.export_model`.
    """
    path = Path(path)
    if weight_bits not in (7, 8):
        raise ConfigError(f"weight_bits must be 7 or 8, got {weight_bits!r}.")
    if path.suffix != ".onnx":
        raise ConfigError(f"{path.name}: int8 quantization supports .onnx files only.")
    try:
        import onnx
        from onnxruntime import quantization
    except ModuleNotFoundError as error:
        raise ConfigError(f'{error.name} is not installed: pip install "a2fpn[onnx]".') from error
    detector = ExportedDetector(path, runtime="onnxruntime")
    target = path if output is None else Path(output)
    with replaced_file(target) as partial:
        program = onnx.load(path)
        nodes = _features(program.graph)
        facts = {fact.key: fact.value for fact in program.metadata_props}
        onnx.helper.set_model_props(program, dict([*facts.items(), _PREPARED]))
        onnx.save(program, partial)
        quantization.quantize_static(
            str(partial),
            str(partial),
            _Reader(detector, images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=[node.name for node in nodes],
            op_types_to_quantize=sorted({node.op_type for node in nodes}),
        )
        program = onnx.load(partial)
        onnx.helper.set_model_props(program, facts | {"precision": "int8"})
        onnx.save(program, partial)
    return target


def _features(graph: Any) -> list[Any]:
    """Select nodes that compute features: convolutions with a consumer of features, and operators between them."""
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    weights = {weight.name for weight in graph.initializer}
    made: set[str] = set()
    nodes = []
    for node in graph.node:  # in topological order
        if node.op_type == "Conv":
            own = readers.get(node.output[0], set())
            read = bool(own & _READERS) or any(own >= gate for gate in _GATED)
            chosen = node.input[1] in weights and read
        elif node.op_type == "Add":
            chosen = made.issuperset(node.input)
        else:
            chosen = node.op_type in _BETWEEN and node.input[0] in made
        if chosen:
            made.add(node.output[0])
            nodes.append(node)
    return nodes


class _Reader:
    """Calibration data reader of ONNX Runtime, with one input per image.

    Args:
        detector: The float file.
        images: See :func:`quantize`.
    """

    def __init__(self, detector: ExportedDetector, images: Iterable[Tensor]) -> None:
        self._inputs = self._read(detector, images)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input, None after the last."""
        return next(self._inputs, None)

    @staticmethod
    def _read(detector: ExportedDetector, images: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
        seen = False
        for image in images:
            # Images without objects do not calibrate the heads.
            seen = seen or bool(len(detector.run(image[None])["scores"]))
            yield {"images": detector.to_input(image[None]).numpy()}
        if not seen:
            raise ConfigError("int8: no object was found in any image; calibrate on images of the model's domain.")
