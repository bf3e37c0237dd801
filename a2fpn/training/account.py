"""Summary of a run: logged at its start, human- and machine-readable at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from a2fpn._text import count_of
from a2fpn.data import CocoDataset
from a2fpn.training.config import TrainConfig
from a2fpn.training.keeper import Keeper
from a2fpn.training.monitor import get_logger
from a2fpn.training.optim import scaled_lr
from a2fpn.training.sources import TrainingSet, log_odd_plans
from a2fpn.training.state import METRICS_FILE, Plan, RunState, read_metrics
from a2fpn.training.validate import Validator

logger = get_logger(__name__)


class Run(Protocol):
    """Attributes of a training run that its summary uses."""

    config: TrainConfig
    accelerator: Accelerator
    model: Any
    datasets: tuple[TrainingSet, CocoDataset]
    batch_size: int
    plan: Plan
    state: RunState
    keeper: Keeper
    validator: Validator
    metrics: list[str]
    output: Path


def log_start(run: Run) -> None:
    """Log the model, the data, the starting point and the learning rate."""
    config, state, (train_set, val_set) = run.config, run.state, run.datasets
    for note in run.keeper.notes:
        logger.warning("%s", note)
    if state.step:
        logger.info(
            "Continuing after step %d: %d of %d epochs and %.1f %% of the run are done, %d images were seen.",
            state.step,
            state.epoch,
            max(state.epoch, run.plan.epochs(state)),
            100 * state.share,
            state.images,
        )
    model = run.accelerator.unwrap_model(run.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s, %s, %.1f M parameters; %d training and %d validation images; %s in %s.",
        config.model.name,
        count_of(len(train_set.categories), "class"),
        parameters / 1e6,
        len(train_set),
        len(val_set),
        count_of(run.plan.total_steps, "step"),
        count_of(run.plan.epochs(state), "epoch"),
    )
    log_odd_plans(config, model, run.datasets, steps=run.plan.total_steps)
    logger.info(
        "%s per step (%d per batch, %s on %s, %s per step); "
        "learning rate %.3g, which is %.3g for %d images, scaling: %s.",
        count_of(run.batch_size, "image"),
        config.data.batch_size,
        count_of(run.accelerator.num_processes, "process"),
        run.accelerator.device,
        count_of(config.run.grad_accumulation, "batch"),
        scaled_lr(config.optim, run.batch_size),
        config.optim.lr,
        config.optim.lr_batch_size,
        config.optim.lr_scaling,
    )


def summary(run: Run) -> str:
    """Describe the best checkpoint of a finished run, how to load it, and what was skipped."""
    state, best = run.state, run.output / "best"
    annotations = sum(len(data.skipped.annotations) for data in run.datasets)
    lines = []
    if state.skipped:
        lines.append(f"Skipped {len(state.skipped)} unreadable images: {', '.join(state.skipped)}")
    if annotations:
        lines.append(f"Skipped {annotations} unusable annotations, listed at the start.")
    if state.skipped_steps:
        lines.append(f"Skipped {state.skipped_steps} steps whose loss or gradient was not finite.")
    if state.best is None:
        return "\n".join([*lines, f"No evaluation was made; the last checkpoint is {run.output / 'last'}"])
    pictures = sorted((run.output / "predictions").glob("*.jpg"))
    ground_truth = run.validator.dataset
    measured = f"--images {shlex.quote(str(ground_truth.root))} --annotations {shlex.quote(ground_truth.name)}"
    return "\n".join(
        [
            *lines,
            *([f"Pictures:        {pictures[-1]}"] if pictures else []),
            f"Losses and AP:   {run.output / 'metrics.png'}",
            f"Why not better:  a2fpn evaluate --model {shlex.quote(str(best))} {measured} --report report.html",
            f"Publish it:      a2fpn hub push {shlex.quote(str(best))} --repo ORG/NAME",
            f"Best checkpoint: {best} ({run.metrics[0]} {state.best[0]:.4f} after epoch {state.best_epoch})",
            f'Load it:         model = a2fpn.from_pretrained("{best}")',
            f"Use it:          a2fpn predict IMAGE --model {shlex.quote(str(best))}",
        ]
    )


def numbers(run: Run) -> dict[str, Any]:
    """Return the path of a finished run's best checkpoint and its metrics, machine-readable."""
    state = run.state
    return {
        "output": str(run.output),
        "best": None if state.best is None else str(run.output / "best"),
        "metric": run.metrics[0],
        "value": None if state.best is None else state.best[0],
        "epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "skipped": list(state.skipped),
        "records": read_metrics((run.output / METRICS_FILE).read_text(encoding="utf-8")),
    }
