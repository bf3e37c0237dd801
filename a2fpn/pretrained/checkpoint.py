"""A folder <-> (``config.json``, ``model.safetensors``): strict, checked, and it builds nothing.

Only safetensors are read, never pickles. Weights must match the model tensor by tensor, and the file must have the
sha256 that ``config.json`` names.
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
    """Metadata with a meaning of their own: for cards, lists, ``python -m hub verify``. All may be missing.

    Args:
        metrics: Measured numbers, such as ``bbox/ap`` in 0..1; -1 where there was nothing to measure.
        data: What it was trained and measured on.
        data_license: License of the data.
        license: License of the weights.
        recipe: How it was trained.
        max_detections: Best detections per image and class that counted for the metrics.
        packages: Packages outside a2fpn and timm that define its neck, detector or backbone.
        count_threshold: Score from which objects count, chosen on annotated images, see :mod:`a2fpn.counting`.
        microns_per_pixel: What a pixel that the network sees measured in training, for images of known scale.

    Raises:
        TypeError: If a metric is no number.
        ValueError: If the threshold is not in [0, 1], or the scale not above 0.
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
        # Written so that NaN is bad as well.
        if self.microns_per_pixel is not None and not self.microns_per_pixel > 0:
            raise ConfigError(f"microns_per_pixel must be above 0, got {self.microns_per_pixel}.")
        object.__setattr__(self, "metrics", {key: float(value) for key, value in self.metrics.items()})


@dataclass(frozen=True)
class Checkpoint:
    """The content of ``config.json``.

    Args:
        model: What to build.
        sha256: Hex digest of the weights file.
        format_version: Version of this format.
        a2fpn_version: Version of the package that wrote it.
        metadata: Anything worth knowing, as JSON values; what :class:`Facts` has a field for must be of its type.
        code_license: License of the package that wrote it. That of the backbone's weights is in ``model.backbone``.

    Raises:
        TypeError: If a fact is of another type.
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
        directory: Made if it does not exist.
        config: What the model is.
        state: Its state dict.
        half: Whether matrices and kernels are stored in float16; vectors (norm statistics, biases) stay as they are,
            since running variances leave float16's range.
        metadata: JSON-able facts about the run.

    Returns:
        The directory.

    Raises:
        TypeError: If the metadata cannot be written as JSON, or a fact in it is of another type.
    """
    # First of all, before a good file is replaced: metadata that JSON cannot hold, or of a wrong type, are an error.
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
        weights.chmod(description.stat().st_mode)  # safetensors makes files that only their owner may read
    return directory


def add_metadata(directory: str | Path, **facts: Any) -> Checkpoint:
    """Write facts into the metadata of a checkpoint folder, over those of the same names; the weights stay.

    Args:
        directory: The folder.
        **facts: JSON values.

    Returns:
        What ``config.json`` then holds.

    Raises:
        CheckpointError: See :func:`read_checkpoint`.
        TypeError: If a fact cannot be written as JSON, or is of another type than :class:`Facts` has.
        ValueError: If a fact is out of its range.
    """
    json.dumps(facts)
    checkpoint = read_checkpoint(directory)
    checkpoint = dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, **facts})
    write_text(Path(directory) / CONFIG_FILE, json.dumps(to_dict(checkpoint), indent=2) + "\n")
    return checkpoint


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and validate ``config.json`` of a folder.

    Raises:
        CheckpointError: If there is none, it is no JSON, or any key or value is wrong.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        held = [name for name in ("best", "last") if (Path(directory) / name / CONFIG_FILE).is_file()]
        advice = (
            f" It is a training run, whose checkpoints are in {' and '.join(held)}: {path.parent / held[0]}."
            if held
            else ""
        )
        raise CheckpointError(f"{str(directory)!r} is no checkpoint folder: it has no {CONFIG_FILE}.{advice}")
    if path.stat().st_size > CONFIG_LIMIT:
        raise CheckpointError(f"{str(path)!r} has {path.stat().st_size} bytes, more than any configuration needs.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    # Beside what is no JSON: numbers of thousands of digits, and deep nesting.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is no valid JSON: {error}.") from error
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
    """Name the packages that have to be imported first; a checkpoint never makes anything be imported.

    Raises:
        CheckpointError: If one is not.
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
            f"{where!r} needs {names}, which defines parts of the model: install it if need be and `import {names}` "
            f"first, or give commands --import {missing[0]}."
        )


def missing_weights(where: str, files: Iterable[str]) -> str:
    """Return the message for a place that has no safetensors, given the names of its files."""
    pickles = [name for name in files if name.endswith((".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"))]
    if not pickles:
        return f"{where} has no {WEIGHTS_FILE}; only safetensors are loaded."
    return (
        f"{where} has no {WEIGHTS_FILE} but {', '.join(pickles[:5])}: a pickle can run any code and is never loaded. "
        "Turn the weights of another framework into a checkpoint with `a2fpn hub convert`."
    )


def check_weights(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Return the weights file of a folder after checking its sha256.

    Raises:
        CheckpointError: If the file is missing or not the one that ``config.json`` names.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(missing_weights(repr(str(directory)), (file.name for file in path.parent.glob("*"))))
    digest = file_sha256(path)
    if digest != checkpoint.sha256:
        raise CheckpointError(wrong_weights(repr(str(path)), digest, checkpoint.sha256))
    return path


def wrong_weights(where: str, digest: str, expected: str) -> str:
    """Return the message for weights that are not those of their ``config.json``."""
    return (
        f"{where} is damaged or not the file that belongs here: its sha256 is {digest}, "
        f"{CONFIG_FILE} expects {expected}."
    )


def read_weights(directory: str | Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the tensors of a folder after checking the file's sha256.

    Raises:
        CheckpointError: If the file is missing, damaged, or not the one that ``config.json`` names.
    """
    return read_tensors(check_weights(directory, checkpoint))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file whose hash is known to be right.

    Raises:
        CheckpointError: If it is no safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file: {error}.") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors strictly: same names, same shapes, same kinds of numbers; floating dtypes are converted.

    Raises:
        CheckpointError: Naming up to five tensors per kind of mismatch.
    """
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(x.shape)}"
            for name, x in own.items()
            if name in state and state[name].shape != x.shape
        ],
        "of another kind of number": [
            f"{name} {_dtype(state[name])} instead of {_dtype(x)}"
            for name, x in own.items()
            if name in state and _kind(state[name]) != _kind(x)
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"The weights do not fit the model; tensors {'; '.join(found)}.")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(state[name])


def _kind(x: Tensor) -> str:
    """Floating, complex, boolean or whole: numbers of one kind can be converted, others mean something else.

    Floating numbers of 8 bits are a kind of their own: they are read with a scale that stands elsewhere.
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
