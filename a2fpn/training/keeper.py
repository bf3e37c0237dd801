"""Resuming a run from its folder and saving checkpoints to it, on all processes together."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import a2fpn
from a2fpn.data import CocoDataset
from a2fpn.pretrained.checkpoint import add_metadata
from a2fpn.training.changes import changed_data, changed_settings, check_model, content_of, judged_by
from a2fpn.training.config import TrainConfig
from a2fpn.training.folder import Content, RunFolder
from a2fpn.training.generations import Generation, Record
from a2fpn.training.health import DivergedError, check_before_saving, total_norm
from a2fpn.training.monitor import LossWindow, get_logger, plot_metrics
from a2fpn.training.processes import gather_number, on_main
from a2fpn.training.restore import load_generation, optimizer_tensors
from a2fpn.training.sources import TrainingSet, credits_of
from a2fpn.training.state import Plan, RunState, as_plain, code_version, read_metrics

logger = get_logger(__name__)

PLOT_SECONDS = 20.0
"""Minimum time between two updates of the plot, since small data sets are evaluated very often."""


@dataclass(frozen=True)
class Parts:
    """Stateful parts of a run.

    Args:
        model: The trained model, without wrappers.
        average: Its moving average, if there is one.
        optimizer: The optimizer.
        losses: Losses of the current epoch.
        plan: Length of the run.
        metrics: Names of the metrics that decide the best checkpoint, by priority.
    """

    model: Any
    average: nn.Module | None
    optimizer: Any
    losses: LossWindow
    plan: Plan
    metrics: Sequence[str]

    @property
    def evaluated(self) -> Any:
        """Model to evaluate and save: the moving average if there is one."""
        return self.model if self.average is None else self.average


class Keeper:
    """Saves and resumes a run in its folder, which it owns until :meth:`close`.

    Args:
        config: The settings.
        accelerator: The accelerator of the run.

    Attributes:
        notes: Messages to the user about resuming.
        state: Progress of the run.

    Raises:
        ValueError: If the folder can't be acquired, or there is no intact checkpoint to resume from.
    """

    state: RunState
    _parts: Parts

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.notes: list[str] = []
        self._config, self._accelerator, self._output = config, accelerator, Path(config.run.output)
        self._folder: RunFolder | None = None  # on the main process only
        self._source = on_main(accelerator, self._open)
        self._saved = -1  # step of the last saved state
        self._lines = ""  # of metrics.jsonl
        self._to_plot, self._plotted = False, time.monotonic()

    def _open(self) -> Generation | None:
        self._folder = RunFolder(self._output, self._config.run.resume)
        return self._folder.source

    def close(self) -> None:
        """Release the folder."""
        if self._folder:
            if self._to_plot:
                self._plot()
            self._folder.close()

    def check_data(self, train_set: TrainingSet, val_set: CocoDataset) -> None:
        """Compare settings and data with those of the resumed run.

        Raises:
            ConfigError: If a setting changed that can't change within a run.
        """
        self._datasets = train_set, val_set
        self._content = content_of(self._config, train_set, val_set)
        self._origin = {"commit": code_version(), **credits_of(train_set)}
        if self._source:
            self.notes += changed_settings(self._source, self._config, self._content)
            self.notes += changed_data(self._source, self._content)

    def check_model(self, model: Any) -> None:
        """Compare the model and its classes with those of the resumed run.

        Raises:
            ConfigError: If they differ.
        """
        if self._source:
            check_model(self._source, model.config)

    def resume(self, parts: Parts, *, images_per_step: int) -> RunState:
        """Restore the state of the resumed run, and bring the folder to that state.

        Raises:
            CheckpointError: If the state doesn't fit.
            CheckpointWriteError: If the folder can't be written to.
        """
        self._parts, self.state = parts, RunState()
        source, scaler = self._source, self._accelerator.scaler
        if source:
            load_generation(source, model=parts.model, average=parts.average, optimizer=parts.optimizer)
            if scaler is not None and source.record.scaler:
                scaler.load_state_dict(source.record.scaler)
            self.state, self._lines, self._saved = (
                dataclasses.replace(source.state),
                source.metrics(),
                source.state.step,
            )
        state = self.state
        share, images, steps = state.share, state.images_per_step, state.steps_in_epoch
        parts.plan.enter(state)
        state.share, state.images_per_step = parts.plan.share(state), images_per_step
        if images not in (0, images_per_step):
            self.notes.append(f"Images per step: {images} -> {images_per_step}.")
        if source and abs(state.share - share) > 1e-9:
            self.notes.append(f"{share:.1%} of the run were done; with the current settings this is {state.share:.1%}.")
        if steps not in (0, state.steps_in_epoch):
            self.notes.append("The steps per epoch changed: some images of this epoch are seen twice or not at all.")
        state.norm = state.norm or float(total_norm(parts.model.state_dict().values()))
        parts.losses.restore(state.sums)
        self.state = on_main(self._accelerator, partial(self._settle, state))
        if self._folder:
            self.notes += self._folder.notes
        return self.state

    def _settle(self, state: RunState) -> RunState:
        assert self._folder is not None
        self._folder.settle(state)
        judges = judged_by(self._config, self._datasets[1], self._parts.metrics[0])
        if state.judged_by not in ("", judges) and state.best is not None:
            self.notes.append("The evaluation data or settings changed: the best checkpoint is reset.")
            self._folder.forget_best(state)
        state.judged_by = judges
        self._folder.write_config(self._config)
        return state

    def last_good(self) -> str:
        """Describe the last good checkpoint after a failed step; collective, every process has to call it."""
        return on_main(self._accelerator, partial(self._last_good, self.state.step))

    def _last_good(self, step: int) -> str:
        assert self._folder is not None
        return self._folder.last_good(step)

    def save_unless_saved(self) -> None:
        """Write a checkpoint within an epoch, unless this step is saved already."""
        if self._saved != self.state.step:
            self.save(None)

    def save(self, record: dict[str, Any] | None) -> None:
        """Write the ``last`` checkpoint and, at the end of an epoch, its record and an improved ``best``.

        Collective: every process has to call it.

        Args:
            record: The epoch's record, or None within an epoch and before its evaluation.

        Raises:
            CheckpointWriteError: If it can't be written; earlier checkpoints are untouched.
            DivergedError: If the weights have diverged.
        """
        state = self.state
        state.sums = self._parts.losses.totals()
        names = gather_object([name for data in self._datasets for name in data.skipped.images])
        state.skipped = tuple(sorted({*state.skipped, *names}))
        # Only the main process has the metrics; all have to agree on when to stop.
        found = [(record or {}).get(name, -math.inf) for name in self._parts.metrics]
        value = tuple(gather_number(self._accelerator, number)[0] for number in found)
        improved = value[0] > -math.inf and state.judge(value)
        on_main(self._accelerator, partial(self._write, record, improved))
        self._saved = state.step

    def _write(self, record: dict[str, Any] | None, improved: bool) -> None:
        assert self._folder is not None
        state, parts, scaler = self.state, self._parts, self._accelerator.scaler
        optimizer, trained = optimizer_tensors(parts.optimizer, parts.model), parts.model.state_dict()
        averages = parts.average.state_dict() if parts.average is not None else {}
        others = {**optimizer, **{f"average of {name}": x for name, x in averages.items()}}
        try:
            state.norm = check_before_saving(trained, others, before=state.norm, step=state.step)
        except DivergedError as error:
            good = self._last_good(state.step - 1)  # the step that produced these weights was not really good
            raise DivergedError(f"{error} Lower optim.lr or set optim.clip_norm. {good}") from None
        metadata = self._metadata(record or {})
        lines = self._lines + (json.dumps(record) + "\n" if record is not None else "")
        content = Content(
            record=Record(
                state=state,
                settings=as_plain(self._config),
                model=parts.model.config,
                content=self._content,
                scaler=scaler.state_dict() if scaler is not None else {},
            ),
            metrics=lines,
            save_model=partial(a2fpn.save_pretrained, parts.evaluated, metadata=metadata),
            change_model=partial(add_metadata, **metadata),
            optimizer=optimizer,
            trained=trained if averages else None,
        )
        self._folder.save(content, best=improved)
        self._lines = lines
        if record is not None:
            self._report(record, improved)

    def _report(self, record: Mapping[str, Any], improved: bool) -> None:
        self._to_plot |= self._parts.metrics[0] in record
        if self._to_plot and time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()
        numbers = ", ".join(
            f"{name} {record[name]:.4f}" for name in ("bbox/ap", "segm/ap", "keypoints/ap") if name in record
        )
        logger.info(
            "Epoch %d/%d: loss %.4f, %s%.1f images/s%s",
            self.state.epoch,
            self._parts.plan.epochs(self.state),
            record.get("train/loss", math.nan),
            f"{numbers}, " if numbers else "",
            record["images_per_second"],
            " (best so far)" if improved else "",
        )

    def _plot(self) -> None:
        try:
            plot_metrics(read_metrics(self._lines), self._output / "metrics.png")
        except OSError as error:  # the plot is optional
            logger.warning("metrics.png can't be written: %s", error)
        self._to_plot, self._plotted = False, time.monotonic()

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        run = self._config.run
        return {
            "recipe": run.name,
            "epochs": self.state.epoch,
            "steps": self.state.step,
            "seed": run.seed,
            "ema": run.ema,
            **self._origin,
            "max_detections": run.max_detections,
            "metrics": {
                name: value for name, value in record.items() if name.startswith(("bbox/", "segm/", "keypoints/"))
            },
        }
