"""Generations of a run: folders with a model and everything needed to resume training from it.

A generation is a checkpoint for :func:`a2fpn.from_pretrained` plus ``training_state/``: JSON and safetensors, no
pickle. ``SHA256SUMS`` lists the hash of every file in the format of ``sha256sum --check``, and is written last. Each is
written under a temporary name, synced to the disk and renamed, so that a generation under its final name is complete.

``last`` is the newest, ``previous`` its predecessor, ``best`` the one with the best evaluation. They share no files, so
that damage to one does not affect the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from a2fpn._atomic import replaced_file, sync, write_text
from a2fpn._serialize import from_dict, to_dict
from a2fpn._version import __version__
from a2fpn.config import ModelConfig
from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    file_sha256,
    read_checkpoint,
    read_tensors,
)
from a2fpn.training.state import RunState

NAMES = ("last", "previous", "best")
STATE_FOLDER = "training_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
OPTIMIZER_FILE = f"{STATE_FOLDER}/optimizer.safetensors"
TRAINED_FILE = f"{STATE_FOLDER}/weights.safetensors"
METRICS_COPY = f"{STATE_FOLDER}/metrics.jsonl"
SUMS_FILE = "SHA256SUMS"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Content of ``state.json``.

    Args:
        state: Progress of the run.
        settings: The settings, nested.
        model: Configuration of the model, as in ``config.json``.
        content: Hashes of files named by settings, by setting: annotations, backbone weights.
        scaler: State of fp16's loss scaling.
        format: Version of this format.
        a2fpn_version: Version of the package that wrote it.
    """

    state: RunState
    settings: dict[str, Any]
    model: ModelConfig
    content: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    a2fpn_version: str = __version__


@dataclass(frozen=True)
class Generation:
    """A verified generation.

    Args:
        folder: Its folder.
        record: Progress and settings.
        edited: Whether metadata in ``config.json`` were changed after writing, as by ``a2fpn calibrate``.
    """

    folder: Path
    record: Record
    edited: bool = False

    @property
    def state(self) -> RunState:
        """Progress of the run."""
        return self.record.state

    def metrics(self) -> str:
        """Lines of ``metrics.jsonl`` up to here."""
        return (self.folder / METRICS_COPY).read_text(encoding="utf-8")

    def trained(self) -> dict[str, Tensor]:
        """Trained weights."""
        return read_tensors(self.folder / (TRAINED_FILE if self.averages else WEIGHTS_FILE))

    def evaluated(self) -> dict[str, Tensor]:
        """Evaluated weights: the moving average if there is one."""
        return read_tensors(self.folder / WEIGHTS_FILE)

    def optimizer(self) -> dict[str, Tensor]:
        """State of the optimizer, by parameter and name."""
        return read_tensors(self.folder / OPTIMIZER_FILE)

    @property
    def averages(self) -> bool:
        """True if it has a moving average in addition to the trained weights."""
        return (self.folder / TRAINED_FILE).exists()


class OldFormatError(CheckpointError):
    """A training state written as a pickle by an old version."""


def read_generation(folder: Path) -> Generation:
    """Check every file of a generation and read its record.

    Raises:
        CheckpointError: If a file is missing or differs from the one written; the message names it.
    """
    sums = _read_sums(folder)
    edited = False
    for name, digest in sums.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} can't be read: {error.strerror}.") from error
        if found == digest:
            continue
        if name != CONFIG_FILE:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the one in {SUMS_FILE}.")
        edited = True
    record = _read_record(folder / STATE_FILE)
    if edited:
        _check_edited(folder, record, sums)
    return Generation(folder, record, edited)


def read_generations(run: Path) -> tuple[dict[str, Generation], dict[str, str]]:
    """Read the intact generations of a run, and the problems of the others, by name.

    Raises:
        OldFormatError: If the training state has an old format that is not supported.
    """
    whole, damaged = {}, {}
    for name in NAMES:
        if os.path.lexists(run / name):
            try:
                whole[name] = read_generation(run / name)
            except OldFormatError:
                raise
            except CheckpointError as error:
                damaged[name] = str(error)
    return whole, damaged


def newest(whole: Mapping[str, Generation], damaged: Mapping[str, str]) -> Generation:
    """Return the most recent intact generation of a run.

    That is ``last``. If it is damaged, it is ``best`` if that was written after ``previous``, whose record then
    does not mention it. If ``last`` is missing, it was set aside, perhaps with the same weights as ``best``: then it is
    ``previous``.

    Args:
        whole: Intact generations by name, at least one.
        damaged: Problems of the others, by name.
    """
    best, previous = whole.get("best"), whole.get("previous")
    if best and previous and "last" in damaged:
        known = (previous.state.best_step, previous.state.best)
        if best.state.step > previous.state.step and known != (best.state.step, best.state.value):
            return best
    return next(whole[name] for name in NAMES if name in whole)


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        files = {file.suffix for file in (folder / STATE_FOLDER).glob("*")}
        if files & {".bin", ".pkl", ".pt"}:
            raise OldFormatError(
                f"{folder} was written by a2fpn 0.2 or older; its training state is a pickle, which is never loaded. "
                f"Start a new run from its weights: model.name=local-dir:{folder} model.pretrained=true "
                "run.output=ANOTHER_FOLDER."
            ) from None
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wanted = {CONFIG_FILE, WEIGHTS_FILE, STATE_FILE, OPTIMIZER_FILE, METRICS_COPY}
    if not wanted <= sums.keys() <= wanted | {TRAINED_FILE}:
        raise CheckpointError(f"{path} is damaged: it does not list the files of a generation.")
    return sums


def _read_record(path: Path) -> Record:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # intact, as its hash shows, but not written by this package
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not the record of a run, but a {type(document).__name__}.")
    version = document.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version!r}, this version of a2fpn reads {FORMAT}; it was written by "
            f"a2fpn {document.get('a2fpn_version')}."
        )
    try:
        return from_dict(Record, document, where=str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_edited(folder: Path, record: Record, sums: Mapping[str, str]) -> None:
    """Accept a ``config.json`` that differs from the one written only in its metadata.

    Raises:
        CheckpointError: If anything else differs.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint.model != record.model or checkpoint.sha256 != sums[WEIGHTS_FILE]:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: it is not what was written.")


def write_generation(
    folder: Path,
    record: Record,
    metrics: str,
    *,
    save_model: Callable[[Path], object],
    optimizer: Mapping[str, Tensor],
    trained: Mapping[str, Tensor] | None,
) -> None:
    """Write all files of a generation to an existing folder, which the caller renames.

    Args:
        folder: The folder.
        record: Content of ``state.json``.
        metrics: Content of ``metrics.jsonl``.
        save_model: Writes ``config.json`` and the evaluated weights to a folder.
        optimizer: Tensors of the optimizer.
        trained: The trained weights, if they differ from the evaluated ones.
    """
    (folder / STATE_FOLDER).mkdir()
    save_model(folder)
    _save_tensors(optimizer, folder / OPTIMIZER_FILE)
    if trained is not None:
        _save_tensors(trained, folder / TRAINED_FILE)
    _write_texts(folder, record, metrics)
    names = (OPTIMIZER_FILE, *((TRAINED_FILE,) if trained is not None else ()))
    _write_sums(folder, {WEIGHTS_FILE: read_checkpoint(folder).sha256, **_hashes(folder, names)})


def rewrite_generation(
    source: Path, folder: Path, record: Record, metrics: str, *, change_model: Callable[[Path], object]
) -> None:
    """Write a generation with the same weights as another, which it replaces and whose large files it shares.

    Args:
        source: The other generation.
        folder: An empty folder.
        record: Content of ``state.json``.
        metrics: Content of ``metrics.jsonl``.
        change_model: Writes the new metadata to ``config.json`` of a folder.
    """
    sums = _read_sums(source)
    put_files(source, folder, link=True)
    change_model(folder)
    _write_texts(folder, record, metrics)
    _write_sums(folder, {name: digest for name, digest in sums.items() if name.endswith(".safetensors")})


def put_files(source: Path, folder: Path, *, link: bool = False) -> None:
    """Copy the files of a generation to an empty folder, or hard-link them if requested and supported."""
    (folder / STATE_FOLDER).mkdir(parents=True)
    for name in (*_read_sums(source), SUMS_FILE):
        if link:
            with contextlib.suppress(OSError):
                os.link(source / name, folder / name)
                continue
        shutil.copyfile(source / name, folder / name)


def sync_folder(folder: Path) -> None:
    """Flush a folder and its content to the disk (fsync)."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write_texts(folder: Path, record: Record, metrics: str) -> None:
    write_text(folder / METRICS_COPY, metrics)
    write_text(folder / STATE_FILE, json.dumps(to_dict(record), indent=1) + "\n")


def _write_sums(folder: Path, known: Mapping[str, str]) -> None:
    sums = {**known, **_hashes(folder, (CONFIG_FILE, STATE_FILE, METRICS_COPY))}
    write_text(folder / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in names}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    with replaced_file(path) as partial:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial)
