"""Exported files in int8: convolutions, and what lies between them, as 8-bit operators of ONNX's QDQ form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from a2fpn._atomic import replaced_file
from a2fpn.errors import ConfigError
from a2fpn.inference.exported import ExportedDetector

_BETWEEN = ("Relu", "Clip", "MaxPool", "Resize")
"""Operators that stay in int8 if their input is."""
_READERS = {*_BETWEEN, "Conv", "Add", "RoiAlign"}
"""Operators that read features. A convolution that none of these reads predicts something, and stays in float."""
_GATED = ({"Sigmoid", "Mul"}, {"HardSigmoid", "Mul"}, {"HardSwish"}, {"Erf", "Mul"}, {"Gelu"})
"""Operators of SiLU, Hardswish and GELU, which read features too; a sigmoid alone reads a prediction."""
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Facts that ONNX Runtime looks for in the metadata before it warns that a model was not prepared."""


def quantize(path: str | Path, images: Iterable[Tensor], output: str | Path | None = None) -> Path:
    """Turn the features of an exported detector into int8, weights per channel.

    The ranges of the features are the widest that some images show. Convolutions that predict scores, boxes, masks or
    kernels, linear layers and all that follows stay in float. Weights take 7 of the 8 bits, since processors without
    VNNI or AMX overflow with 8.

    Args:
        path: An ``.onnx`` file of :func:`a2fpn.export_model`.
        images: ``(C, H, W)`` uint8, or float in [0, 1], like those that the detector will see; some twenty to fifty.
        output: The file to write; None replaces ``path``.

    Returns:
        The file that was written.

    Raises:
        ConfigError: If ONNX Runtime or onnx are not installed, the file is not ONNX, or no image shows an object.
        CheckpointError: If it is no file of :func:`a2fpn.export_model`.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ConfigError(f"{path.name}: int8 is made of .onnx files alone.")
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
            reduce_range=True,
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
    """Nodes that make features: convolutions with a reader of features, and what lies between them."""
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
    """Inputs, one for each image, of which ONNX Runtime takes the ranges of features.

    Args:
        detector: The file in float.
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
            # The heads of an image without objects show no ranges.
            seen = seen or bool(len(detector.run(image[None])["scores"]))
            yield {"images": detector.to_input(image[None]).numpy()}
        if not seen:
            raise ConfigError(
                "int8: no object was found in any image; calibrate on images like those that the model is for."
            )
