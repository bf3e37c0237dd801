"""A folder <-> (``config.json``, ``model.safetensors``): strict, checked, and it builds nothing.

Only safetensors are read, never pickles. Weights must match the model tensor by tensor, and the file must have the
sha256 that ``config.json`` names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from a2fpn._version import __version__
from a2fpn.config import FORMAT_VERSION, ModelConfig, from_dict, to_dict

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what it says it is."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of ``config.json``.

    Args:
        model: What to build.
        sha256: Hex digest of the weights file.
        format_version: Version of this format.
        a2fpn_version: Version of the package that wrote it.
        metadata: Anything worth knowing: metrics, recipe, data, licences. JSON values only.
    """

    model: ModelConfig
    sha256: str
    format_version: int = FORMAT_VERSION
    a2fpn_version: str = __version__
    metadata: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    half: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint folder.

    Args:
        directory: Made if it does not exist.
        config: What the model is.
        state: Its state dict.
        half: Whether matrices and kernels are stored in float16; vectors (norm statistics, biases) stay as they are,
            since running variances leave float16's range.
        metadata: JSON-able facts about the run.

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (x.half() if half and x.is_floating_point() and x.ndim > 1 else x).detach().cpu().contiguous()
        for name, x in state.items()
    }
    # Written beside and renamed, so that a reader never meets half a file.
    temporary = directory / f".{WEIGHTS_FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    checkpoint = Checkpoint(model=config, sha256=file_sha256(temporary), metadata=metadata or {})
    os.replace(temporary, directory / WEIGHTS_FILE)
    temporary = directory / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(to_dict(checkpoint), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, directory / CONFIG_FILE)
    return directory


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Reads and validates ``config.json`` of a folder.

    Raises:
        CheckpointError: If there is none, it is no JSON, or any key or value is wrong.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(directory)!r} is no checkpoint folder: it has no {CONFIG_FILE}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is no valid JSON: {error}.") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format_version {version!r}, this version of a2fpn reads {FORMAT_VERSION}."
        )
    try:
        return from_dict(Checkpoint, data, where=str(path))
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def read_weights(directory: str | Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Reads the tensors of a folder after checking the file's sha256.

    Raises:
        CheckpointError: If the file is missing, damaged, or not the one that ``config.json`` names.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{str(directory)!r} has no {WEIGHTS_FILE}; only safetensors are loaded.")
    digest = file_sha256(path)
    if digest != checkpoint.sha256:
        raise CheckpointError(
            f"{str(path)!r} is damaged or not the file that belongs here: its sha256 is {digest}, "
            f"{CONFIG_FILE} expects {checkpoint.sha256}."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file: {error}.") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads tensors strictly: same names, same shapes; floating dtypes are converted.

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
    }
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"The weights do not fit the model; tensors {'; '.join(found)}.")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(state[name])


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
