"""Progress and length of a run, and its description files: metrics and resolved settings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2fpn._atomic import write_text
from a2fpn._serialize import to_dict
from a2fpn.training.config import RunSection, TrainConfig
from a2fpn.training.feed import Feed
from a2fpn.training.settings import dump_yaml

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
LOG_FILE = "train.log"


@dataclass
class RunState:
    """Progress of a run.

    Args:
        epoch: Finished epochs.
        step: Finished optimizer steps.
        step_in_epoch: Finished optimizer steps of the current epoch.
        steps_in_epoch: Steps of the current epoch.
        images: Training images seen.
        images_per_step: Training images per step, over all processes.
        share: Finished share of the run, in [0, 1].
        sums: Losses of the current epoch, summed over its batches and processes.
        pending: Record of an epoch that is trained but not yet evaluated.
        value: Main metric of these weights, and tie-breakers; None if not evaluated.
        best: The highest value so far.
        best_epoch: The epoch that reached it.
        best_step: The step that reached it.
        stale: Evaluations since the last improvement.
        judged_by: Hash of everything that makes evaluations comparable.
        norm: Norm of all weights.
        skipped: Images that could not be read.
        skipped_steps: Steps skipped for a non-finite loss or gradient.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    steps_in_epoch: int = 0
    images: int = 0
    images_per_step: int = 0
    share: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    pending: dict[str, Any] | None = None
    value: tuple[float, ...] | None = None
    best: tuple[float, ...] | None = None
    best_epoch: int = 0
    best_step: int = 0
    stale: int = 0
    judged_by: str = ""
    norm: float = 0.0
    skipped: tuple[str, ...] = ()
    skipped_steps: int = 0

    def judge(self, value: tuple[float, ...]) -> bool:
        """Record an evaluation; return whether these weights are to be kept, as the best or equal to the best."""
        self.value = value
        better = self.best is None or value > self.best
        # A run resumed from an earlier step may reach the step of the best again, which is no lack of improvement.
        self.stale = 0 if better or self.step == self.best_step else self.stale + 1
        if better or value == self.best:
            self.best, self.best_epoch, self.best_step = value, self.epoch, self.step
            return True
        return False

    def forget_best(self) -> None:
        """Reset the best, so that the next evaluation becomes it."""
        self.best, self.best_epoch, self.best_step, self.stale = None, 0, 0, 0


class Plan:
    """Length of a run under its current settings, and the position in it.

    The position is counted in steps of a run with these settings from the start. So a run that is resumed with another
    batch size, number of processes or images keeps its finished share.

    Args:
        feed: Batches of each epoch.
        run: The settings.
    """

    def __init__(self, feed: Feed, run: RunSection) -> None:
        self._feed, self._run = feed, run
        self._starts = [0]
        if not run.max_steps:
            for epoch in range(run.epochs):
                self._starts.append(self._starts[-1] + feed.steps(epoch))
        self.total_steps = run.max_steps or self._starts[-1]
        self._epochs = run.epochs if not run.max_steps else 0  # computed on demand

    def enter(self, state: RunState) -> None:
        """Rescale the position within an epoch if its number of steps has changed."""
        steps = self._feed.steps(state.epoch)
        if state.steps_in_epoch not in (0, steps):
            state.step_in_epoch = state.step_in_epoch * steps // state.steps_in_epoch
        state.steps_in_epoch = steps

    def place(self, state: RunState) -> int:
        """Finished steps of ``total_steps``."""
        if self._run.max_steps:
            return min(state.step, self.total_steps)
        if state.epoch >= self._run.epochs:
            return self.total_steps
        return self._starts[state.epoch] + state.step_in_epoch

    def share(self, state: RunState) -> float:
        """Finished share of the run, in [0, 1]."""
        return self.place(state) / max(1, self.total_steps)

    def epochs(self, state: RunState) -> int:
        """Number of epochs of the run; ``max_steps`` may cut the last one short."""
        if not self._epochs:
            epoch, done = state.epoch, state.step - state.step_in_epoch
            while done < self.total_steps or not epoch:
                done += self._feed.steps(epoch)
                epoch += 1
            self._epochs = epoch
        return self._epochs


def write_config(config: TrainConfig, output: Path) -> None:
    """Write ``config.yaml``, with which ``--config`` repeats the run."""
    write_text(output / CONFIG_FILE, dump_yaml(as_plain(config)))


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """Convert the settings to JSON values, without ``run.resume``."""
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    return to_dict(fresh)


def read_metrics(text: str) -> list[dict[str, Any]]:
    """Parse the records of ``metrics.jsonl``."""
    return [json.loads(line) for line in text.splitlines()]


def code_version() -> str | None:
    """Return the git commit of the code, with ``-dirty`` for uncommitted changes, or None outside a checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():  # installed, perhaps inside another project's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
