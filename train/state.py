"""What a run leaves on disk: checkpoints that appear whole or not at all, metrics, and the resolved config."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from train.config import TrainConfig

RESUME_FOLDER = "training_state"


@dataclasses.dataclass
class RunState:
    """How far a run is; saved with the training state.

    Args:
        epoch: Finished epochs.
        step: Finished optimiser steps.
        best: Highest value of the main metric so far.
        best_epoch: The epoch that reached it.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("-inf")
    best_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the fields."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the fields."""
        for name, value in state.items():
            setattr(self, name, value)


def write_config(config: TrainConfig, output: Path) -> None:
    """Writes ``config.yaml``, from which ``--config`` starts the same run anew."""
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    plain = json.loads(json.dumps(dataclasses.asdict(fresh)))  # tuples become lists
    (output / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def append_metrics(record: Mapping[str, Any], output: Path) -> None:
    """Adds one line to ``metrics.jsonl``."""
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def temporary_folder(folder: Path) -> Path:
    """Returns the name under which a checkpoint folder is written before it is complete."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of ``folder`` when the block ends without an error.

    Files that are already in the temporary folder are kept and move along.
    """
    partial, previous = temporary_folder(folder), folder.with_name(f".{folder.name}.previous")
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def resume_folder(resume: bool | str, output: Path) -> Path | None:
    """Finds the training state to continue from.

    Args:
        resume: False, True for the run's own ``last`` checkpoint, or a path to a run or a checkpoint.
        output: The run's folder.

    Returns:
        The folder of the training state, or None to start afresh.

    Raises:
        FileNotFoundError: If there is no training state.
    """
    if not resume:
        return None
    start = output if resume is True else Path(resume)
    folder = next((f for f in (start / RESUME_FOLDER, start / "last" / RESUME_FOLDER) if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"run.resume: no training state in {start / 'last'}; start without run.resume.")
    return folder


def code_version() -> str | None:
    """Returns the git commit of the code, with ``-dirty`` for uncommitted changes, or None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def dataset_credits(annotations: Path) -> dict[str, str]:
    """Returns what a COCO JSON says of its origin: ``data`` (its description) and ``data_licence``."""
    document = json.loads(annotations.read_text(encoding="utf-8"))
    licences = [str(entry.get("name", "unnamed")) for entry in document.get("licenses", [])]
    return {
        "data": str(document.get("info", {}).get("description", annotations.name)),
        "data_licence": ", ".join(licences) or "not stated",
    }
