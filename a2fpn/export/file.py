"""Export of a detector to a file."""

from __future__ import annotations

import importlib.util
import typing
from pathlib import Path
from typing import Any, Literal

import torch

from a2fpn._atomic import replaced_file
from a2fpn.detectors import Detector
from a2fpn.errors import ConfigError, ConfigTypeError, ExportError, MissingFileError
from a2fpn.export.metadata import describe
from a2fpn.export.simplify import drop_in_place, drop_noops
from a2fpn.export.trace import DTYPES, quiet, trace
from a2fpn.export.translate import optimize, translations
from a2fpn.inference.eval_view import eval_view

Format = Literal["onnx", "torch"]
FORMATS: tuple[str, ...] = typing.get_args(Format)
OPSET = 18
"""ONNX opset, supported by ONNX Runtime since 1.14 and by OpenVINO."""
OLDEST_TORCH = (2, 11)
"""Oldest version whose exporter has been tested."""
_LARGEST = 2**31 - 2**24
"""Maximum size of the weights in one ONNX file, in bytes, with room for the rest."""


def export_model(
    model: Detector,
    path: str | Path,
    *,
    format: Format | None = None,
    size: tuple[int, int] | None = None,
    dtype: Literal["uint8", "float32"] = "uint8",
) -> Path:
    """Export a detector with its preprocessing and post-processing to one file.

    The input is ``images`` (N, C, H, W), RGB, uint8 in 0..255 or float32 in [0, 1]; N, H and W are dynamic. The outputs
    are ``image_index`` (M,) int64, ascending, ``boxes`` (M, 4) float32 xyxy in pixels of the images, ``scores`` (M,)
    descending within an image, ``labels`` (M,) int64, indices into the metadata's ``categories``, and, depending on the
    detector, ``masks`` (M, S, S) float32, probabilities inside the boxes, or ``heatmaps`` (M, K, S, S), keypoint logits
    inside the boxes. The metadata contain categories, thresholds, the configuration and the sha256 of the weights.

    Args:
        model: A detector of :func:`a2fpn.create_model` or :func:`a2fpn.from_pretrained`; not modified.
        path: The file, replaced if it exists.
        format: ``"onnx"``, for ONNX Runtime, OpenVINO and browsers, or ``"torch"``, a program for
            ``torch.export.load``; None for the one of the suffix, ``.onnx`` or ``.pt2``.
        size: Height and width of all images, for runtimes that require static shapes; None for dynamic sizes.
        dtype: Dtype of the images.

    Returns:
        The path.

    Raises:
        TypeError: If the model is not one of this package's detectors, or an optimized one.
        ValueError: For an unknown format, size or dtype, or a detector that can't be exported (:class:`ExportError`).

    Example:
        >>> import a2fpn
        >>> model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=2)
        >>> path = export_model(model, "model.onnx")  # doctest: +SKIP
        >>> result = a2fpn.Predictor("model.onnx")("image.png")  # doctest: +SKIP
    """
    path = Path(path)
    kind = check_export(model, path, format=format, size=size, dtype=dtype)
    detector = eval_view(model)
    device = next(detector.parameters()).device
    if device.type != "cpu":
        raise ConfigError(f"Export requires a detector on the CPU, got {device}; call model.cpu() first.")
    program = trace(detector, size=size, dtype=DTYPES[dtype])
    drop_noops(program)
    outputs = [str(name) for name in program.call_spec.out_spec.context]
    facts = describe(detector, dtype=dtype, outputs=outputs)
    with replaced_file(path) as partial, quiet():
        if kind == "torch":
            with partial.open("wb") as file:
                torch.export.save(program, file, extra_files=facts)
        else:
            _to_onnx(program, facts, outputs).save(str(partial))
    return path


def check_export(
    model: Detector, path: Path, *, format: str | None = None, size: tuple[int, int] | None = None, dtype: str = "uint8"
) -> str:
    """Validate the arguments before any work, and return the format.

    Raises:
        ConfigError: See :func:`export_model`.
    """
    if not isinstance(model, Detector):
        raise ConfigTypeError(
            "export_model expects a detector of a2fpn.create_model(...) or a2fpn.from_pretrained(...), got "
            f"{type(model).__name__}. Export the model without optimize_for_inference: runtimes fold and fuse "
            "themselves."
        )
    kind = format or {".onnx": "onnx", ".pt2": "torch"}.get(path.suffix)
    if kind not in FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(FORMATS)}, got {format!r}."
            if format
            else f"{path.name!r} ends neither in .onnx nor in .pt2; set format='onnx' or 'torch'."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"size must be a height and a width of at least 1 pixel, got {size}.")
    if not path.parent.is_dir():
        raise MissingFileError(f"{path.parent}: no such folder to write {path.name} into.")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ConfigError(f"Export needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, got {torch.__version__}.")
    if kind == "onnx":
        _check_onnx(model)
    return kind


def _check_onnx(model: Detector) -> None:
    for name in ("onnx", "onnx_ir", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'{name}, required for ONNX export, is not installed: pip install "a2fpn[onnx]".')
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if weights > _LARGEST:
        raise ExportError(
            f"An ONNX file holds at most 2 GiB and {model.config.architecture!r} has {weights / 2**30:.1f} GiB of "
            "weights; use format='torch'."
        )


def _to_onnx(program: torch.export.ExportedProgram, facts: dict[str, str], outputs: list[str]) -> Any:
    """Convert a torch.export program to ONNX.

    Raises:
        ExportError: If an operator has no ONNX equivalent.
    """
    from onnx_ir.passes import common

    drop_in_place(program)
    try:
        converted: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            output_names=outputs,
            verbose=False,
            external_data=False,
            optimize=False,
            custom_translation_table=translations(),
        )
    except Exception as error:  # torch raises errors of any type
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ExportError(f"The detector can't be converted to ONNX ({reason}); use format='torch'.") from error
    optimize(converted.model)
    # They contain source locations with local paths.
    common.ClearMetadataAndDocStringPass()(converted.model)
    converted.model.metadata_props.update(facts)
    converted.model.producer_name = "a2fpn"
    return converted
