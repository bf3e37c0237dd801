"""Checkpoint folders: ``config.json`` and ``model.safetensors``, read strictly, without building models.

Only safetensors are read, never pickles. Weights must match the model tensor by tensor, and the file must have the
sha256 stated in ``config.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from a2fpn._atomic import replaced_file, write_text
from a2fpn._plugins import load_plugins
from a2fpn._serialize import from_dict, migrate_keys, to_dict
from a2fpn._version import __version__
from a2fpn.backbones import backbone_module
from a2fpn.config import FORMAT_VERSION, ModelConfig
from a2fpn.detectors import DETECTORS
from a2fpn.errors import CheckpointError, ConfigError, ConfigTypeError
from a2fpn.necks import NECKS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_LIMIT = 2**22
"""Bytes above which a ``config.json`` is not read."""


@dataclass(frozen=True)
class Facts:
    """Metadata with a defined meaning, for cards, lists and ``python -m hub verify``. All are optional.

    Args:
        metrics: Measured metrics, such as ``bbox/ap`` in 0..1; -1 if there was nothing to measure.
        data: Data set of training and evaluation.
        data_license: License of the data.
        license: License of the weights.
        recipe: Training recipe.
        max_detections: Maximum number of detections per image and class in the metrics.
        packages: Packages outside a2fpn and timm that define its neck, detector or backbone.
        count_threshold: Score threshold for counting, calibrated on annotated images, see :mod:`a2fpn.counting`.
        microns_per_pixel: Size of a network input pixel in training, for images of known scale.

    Raises:
        TypeError: If a metric is not a number.
        ValueError: If the threshold is not in [0, 1], or the scale is not positive.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    data: str | None = None
    data_license: str | None = None
    license: str | None = None
    recipe: str | None = None
    max_detections: int = 100
    packages: tuple[str, ...] = ()
    count_threshold: float | None = None
    microns_per_pixel: float | None = None

    def __post_init__(self) -> None:
        for key, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigTypeError(f"The metric {key!r} must be a number, got {value!r}.")
        if self.count_threshold is not None and not 0 <= self.count_threshold <= 1:
            raise ConfigError(f"count_threshold must lie in [0, 1], got {self.count_threshold}.")
        # The negation also rejects NaN.
        if self.microns_per_pixel is not None and not self.microns_per_pixel > 0:
            raise ConfigError(f"microns_per_pixel must be above 0, got {self.microns_per_pixel}.")
        object.__setattr__(self, "metrics", {key: float(value) for key, value in self.metrics.items()})


@dataclass(frozen=True)
class Checkpoint:
    """The content of ``config.json``.

    Args:
        model: Configuration of the model.
        sha256: Hex digest of the weights file.
        format_version: Version of this format.
        a2fpn_version: Version of the package that wrote it.
        metadata: Further information as JSON values; fields of :class:`Facts` must have their types.
        code_license: License of the package that wrote it. That of the backbone's weights is in ``model.backbone``.

    Raises:
        TypeError: If a fact has the wrong type.
    """

    model: ModelConfig
    sha256: str
    format_version: int = FORMAT_VERSION
    a2fpn_version: str = __version__
    metadata: Mapping[str, Any] = field(default_factory=dict)
    code_license: str = "Apache-2.0"

    def __post_init__(self) -> None:
        self.facts  # noqa: B018 - wrong ones are an error here, not where they are read

    @property
    def facts(self) -> Facts:
        """Metadata that :class:`Facts` has a field for."""
        known = {f.name for f in dataclasses.fields(Facts)}
        return from_dict(Facts, {key: x for key, x in self.metadata.items() if key in known}, where="metadata")


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    half: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder.

    Args:
        directory: Created if it does not exist.
        config: Configuration of the model.
        state: Its state dict.
        half: Whether to store matrices and kernels in float16; vectors (norm statistics, biases) keep their dtype,
            since running variances exceed float16's range.
        metadata: JSON-serializable facts about the run.

    Returns:
        The directory.

    Raises:
        TypeError: If the metadata cannot be written as JSON, or a fact in it has the wrong type.
    """
    # Checked before an existing file is replaced: metadata that JSON cannot represent, or of a wrong type.
    json.dumps(dict(metadata or {}))
    packages = _packages(config)
    facts = {**(metadata or {}), **({"packages": packages} if packages else {})}
    checkpoint = Checkpoint(model=config, sha256="", metadata=facts)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (x.half() if half and x.is_floating_point() and x.ndim > 1 else x).detach().cpu().contiguous()
        for name, x in state.items()
    }
    with replaced_file(directory / WEIGHTS_FILE) as weights, replaced_file(directory / CONFIG_FILE) as description:
        save_file(tensors, weights, metadata={"format": "pt"})
        checkpoint = dataclasses.replace(checkpoint, sha256=file_sha256(weights))
        description.write_text(json.dumps(to_dict(checkpoint), indent=2) + "\n", encoding="utf-8")
        weights.chmod(description.stat().st_mode)  # safetensors creates files readable by their owner only
    return directory


def add_metadata(directory: str | Path, **facts: Any) -> Checkpoint:
    """Add facts to the metadata of a checkpoint folder, replacing those of the same names; weights are not changed.

    Args:
        directory: The folder.
        **facts: JSON values.

    Returns:
        The new content of ``config.json``.

    Raises:
        CheckpointError: See :func:`read_checkpoint`.
        TypeError: If a fact cannot be written as JSON, or has another type than in :class:`Facts`.
        ValueError: If a fact is out of range.
    """
    json.dumps(facts)
    checkpoint = read_checkpoint(directory)
    checkpoint = dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, **facts})
    write_text(Path(directory) / CONFIG_FILE, json.dumps(to_dict(checkpoint), indent=2) + "\n")
    return checkpoint


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and validate ``config.json`` of a folder.

    Raises:
        CheckpointError: If it is missing or not JSON, or any key or value is wrong.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        held = [name for name in ("best", "last") if (Path(directory) / name / CONFIG_FILE).is_file()]
        advice = (
            f" It is a training run, whose checkpoints are in {' and '.join(held)}: {path.parent / held[0]}."
            if held
            else " Names of models with weights: a2fpn list --pretrained."
        )
        raise CheckpointError(f"{str(directory)!r} is not a checkpoint folder: it has no {CONFIG_FILE}.{advice}")
    if path.stat().st_size > CONFIG_LIMIT:
        raise CheckpointError(f"{str(path)!r} has {path.stat().st_size} bytes, too large for a configuration.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    # Apart from invalid JSON: numbers with thousands of digits, and deep nesting.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}.") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format_version {version!r}, this version of a2fpn reads 1 to {FORMAT_VERSION}."
        )
    _check_packages(data, str(path))
    try:
        return from_dict(Checkpoint, migrate_keys(data), where=str(path))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(str(error)) from error


def _packages(config: ModelConfig) -> list[str]:
    """Top-level packages outside a2fpn and timm that define parts of a model."""
    modules = [DETECTORS[config.detector].__module__, NECKS[config.neck.name].__module__]
    roots = {module.partition(".")[0] for module in [*modules, backbone_module(config.backbone.name)]}
    return sorted(roots - {"a2fpn", "timm"})


def _check_packages(data: Mapping[str, Any], where: str) -> None:
    """Check that required packages are imported; a checkpoint never triggers imports.

    Raises:
        CheckpointError: If one is not imported, with its name.
    """
    metadata = data.get("metadata")
    packages = metadata.get("packages") if isinstance(metadata, dict) else None
    if not isinstance(packages, list):
        return
    load_plugins()
    missing = [name for name in packages if isinstance(name, str) and name not in sys.modules]
    if missing:
        names = ", ".join(missing)
        raise CheckpointError(
            f"{where!r} needs {names}, which defines parts of the model: install it if necessary and `import {names}` "
            f"first, or give commands --import {missing[0]}."
        )


def missing_weights(where: str, files: Iterable[str]) -> str:
    """Return the message for a location without safetensors, given the names of its files."""
    pickles = [name for name in files if name.endswith((".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"))]
    if not pickles:
        return f"{where} has no {WEIGHTS_FILE}; only safetensors are loaded."
    return (
        f"{where} has no {WEIGHTS_FILE} but {', '.join(pickles[:5])}: pickles can run arbitrary code and are never "
        "loaded. Convert weights of another framework with `a2fpn hub convert`."
    )


def check_weights(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Return the weights file of a folder after checking its sha256.

    Raises:
        CheckpointError: If the file is missing or does not match ``config.json``.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(missing_weights(repr(str(directory)), (file.name for file in path.parent.glob("*"))))
    digest = file_sha256(path)
    if digest != checkpoint.sha256:
        raise CheckpointError(wrong_weights(repr(str(path)), digest, checkpoint.sha256))
    return path


def wrong_weights(where: str, digest: str, expected: str) -> str:
    """Return the message for weights that do not match their ``config.json``."""
    return f"{where} is damaged or replaced: its sha256 is {digest}, {CONFIG_FILE} expects {expected}."


def read_weights(directory: str | Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the tensors of a folder after checking the file's sha256.

    Raises:
        CheckpointError: If the file is missing, damaged, or does not match ``config.json``.
    """
    return read_tensors(check_weights(directory, checkpoint))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file with a verified hash.

    Raises:
        CheckpointError: If it is not a safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is not a safetensors file: {error}.") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors strictly: names, shapes and kinds of dtype must match; floating-point dtypes are converted.

    Raises:
        CheckpointError: With up to five tensors per kind of mismatch.
    """
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "with another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(x.shape)}"
            for name, x in own.items()
            if name in state and state[name].shape != x.shape
        ],
        "with another dtype": [
            f"{name} {_dtype(state[name])} instead of {_dtype(x)}"
            for name, x in own.items()
            if name in state and _kind(state[name]) != _kind(x)
        ],
    }
    found = [f"{kind} ({len(names)}): {', '.join(names[:5])}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"The weights do not match the model: tensors {'; '.join(found)}.")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(state[name])


def _kind(x: Tensor) -> str:
    """Kind of dtype: floating-point, complex, boolean or integer; only dtypes of one kind are convertible.

    8-bit floating-point is a kind of its own, since its values need a scale that is stored elsewhere.
    """
    if x.dtype == torch.bool:
        return "boolean"
    if x.is_floating_point() and x.element_size() == 1:
        return "scaled"
    return "floating" if x.is_floating_point() else "complex" if x.is_complex() else "whole"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
