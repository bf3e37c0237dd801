"""Files of a run: checkpoints that appear whole or not at all, metrics, and the resolved config.

Whenever a run is killed, or the machine loses power, ``last`` and ``best`` are whole, or become so by
:func:`~a2fpn._atomic.recover_folder` when the run is resumed. Within one save the metrics come first, then ``best``,
then ``last``: the steps after ``last`` are repeated and write the same again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a2fpn._atomic import write_text
from a2fpn._serialize import migrate_keys, to_dict
from a2fpn.errors import MissingFileError, RunError
from a2fpn.training.config import TrainConfig
from a2fpn.training.settings import dump_yaml, flat, load_yaml

RESUME_FOLDER = "training_state"
METRICS_FILE = "metrics.jsonl"


class CheckpointWriteError(RunError):
    """A checkpoint could not be written; the one before it is untouched."""


@dataclasses.dataclass
class RunState:
    """Progress of a run; saved with the training state.

    Args:
        epoch: Finished epochs.
        step: Finished optimizer steps.
        step_in_epoch: Finished optimizer steps of the running epoch.
        sums: Losses of the running epoch, summed over its batches and processes.
        best: Highest value of the main metric so far.
        best_epoch: The epoch that reached it.
        stale: Evaluations since then.
        skipped: Images that could not be read.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float = float("-inf")
    best_epoch: int = 0
    stale: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the fields."""
        for name, value in state.items():
            setattr(self, name, value)


def write_config(config: TrainConfig, output: Path) -> None:
    """Write ``config.yaml``, from which ``--config`` starts the same run anew."""
    write_text(output / "config.yaml", dump_yaml(as_plain(config)))


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON values, without what says how this start of the run came about."""
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    return to_dict(fresh)


def changed_settings(config: TrainConfig, output: Path) -> list[str]:
    """List differences from the settings that the run in a folder was started with, as ``name: old -> new``."""
    path = output / "config.yaml"
    if not path.exists():
        return []
    old, new = flat(migrate_keys(load_yaml(path.read_text(encoding="utf-8"), str(path)))), flat(as_plain(config))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]


def append_metrics(record: Mapping[str, Any], output: Path) -> None:
    """Add one line to ``metrics.jsonl``."""
    with (output / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``; a last line that was cut off is left out."""
    path = output / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # a whole line ends in a line break


def rewind_metrics(output: Path, step: int) -> None:
    """Drop the records of steps after ``step``, which a resumed run makes again."""
    if (output / METRICS_FILE).exists():
        kept = [json.dumps(record) + "\n" for record in read_metrics(output) if record["step"] <= step]
        write_text(output / METRICS_FILE, "".join(kept))


def resume_folder(resume: bool | str, output: Path) -> Path | None:
    """Find the training state to continue from.

    Args:
        resume: False; True for the run's own ``last`` checkpoint; ``"auto"`` for the same where there is one; or a path
            to a run or a checkpoint.
        output: The run's folder.

    Returns:
        The folder of the training state, or None to start afresh.

    Raises:
        FileNotFoundError: If there is no training state.
    """
    if not resume:
        return None
    start = output if resume in (True, "auto") else Path(str(resume))
    folder = next((f for f in (start / RESUME_FOLDER, start / "last" / RESUME_FOLDER) if f.is_dir()), None)
    if folder is None and resume != "auto":
        raise MissingFileError(f"run.resume: no training state in {start / 'last'}; start without run.resume.")
    return folder


def code_version() -> str | None:
    """Return the git commit of the code, with ``-dirty`` for uncommitted changes, or None outside a checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():  # installed, perhaps into somebody else's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
