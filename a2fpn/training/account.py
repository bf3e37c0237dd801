"""What a run says of itself: in the log at its start, to people and to machines at its end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from a2fpn.training.monitor import get_logger
from a2fpn.training.optim import scaled_lr
from a2fpn.training.sources import log_odd_plans
from a2fpn.training.state import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from a2fpn.training.trainer import Trainer

logger = get_logger(__name__)


def log_start(trainer: Trainer) -> None:
    """Log what is trained, on what, from where and at which rate."""
    config, state, (train_set, val_set) = trainer.config, trainer.state, trainer.datasets
    for note in trainer.keeper.notes:
        logger.warning("%s", note)
    if state.step:
        logger.info(
            "Continuing after step %d: %d of %d epochs and %.1f %% of the run are done, %d images were seen.",
            state.step,
            state.epoch,
            trainer.plan.epochs(state),
            100 * state.share,
            state.images,
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s, %d classes, %.1f M parameters; %d training and %d validation images; %d steps in %d epochs.",
        config.model.name,
        len(train_set.categories),
        parameters / 1e6,
        len(train_set),
        len(val_set),
        trainer.plan.total_steps,
        trainer.plan.epochs(state),
    )
    log_odd_plans(
        config, trainer.accelerator.unwrap_model(trainer.model), trainer.datasets, steps=trainer.plan.total_steps
    )
    logger.info(
        "%d images per step (%d per batch, %d process(es) on %s, %d batch(es) per step); "
        "learning rate %.3g, which is %.3g for %d images, scaling: %s.",
        trainer.batch_size,
        config.data.batch_size,
        trainer.accelerator.num_processes,
        trainer.accelerator.device,
        config.run.grad_accumulation,
        scaled_lr(config.optim, trainer.batch_size),
        config.optim.lr,
        config.optim.lr_batch_size,
        config.optim.lr_scaling,
    )


def summary(trainer: Trainer) -> str:
    """Return where the best checkpoint of a finished run is, how to load it, and what was skipped."""
    state, best = trainer.state, trainer.output / "best"
    annotations = sum(len(data.skipped.annotations) for data in trainer.datasets)
    lines = []
    if state.skipped:
        lines.append(f"Skipped {len(state.skipped)} unreadable images: {', '.join(state.skipped)}")
    if annotations:
        lines.append(f"Skipped {annotations} unusable annotations, listed at the start.")
    if state.skipped_steps:
        lines.append(f"Skipped {state.skipped_steps} steps whose loss or gradient was not finite.")
    if state.best is None:
        return "\n".join([*lines, f"No evaluation was made; the last checkpoint is {trainer.output / 'last'}"])
    pictures = sorted((trainer.output / "predictions").glob("*.jpg"))
    ground_truth = trainer.validator.dataset
    measured = f"--images {shlex.quote(str(ground_truth.root))} --annotations {shlex.quote(ground_truth.name)}"
    return "\n".join(
        [
            *lines,
            *([f"Pictures:        {pictures[-1]}"] if pictures else []),
            f"Losses and AP:   {trainer.output / 'metrics.png'}",
            f"Why not better:  a2fpn evaluate --model {shlex.quote(str(best))} {measured} --report report.html",
            f"Publish it:      a2fpn hub push {shlex.quote(str(best))} --repo ORG/NAME",
            f"Best checkpoint: {best} ({trainer.metrics[0]} {state.best[0]:.4f} after epoch {state.best_epoch})",
            f'Load it:         model = a2fpn.from_pretrained("{best}")',
            f"Use it:          a2fpn predict IMAGE --model {shlex.quote(str(best))}",
        ]
    )


def numbers(trainer: Trainer) -> dict[str, Any]:
    """Return where the best checkpoint of a finished run is and what was measured, for machines."""
    state = trainer.state
    return {
        "output": str(trainer.output),
        "best": None if state.best is None else str(trainer.output / "best"),
        "metric": trainer.metrics[0],
        "value": None if state.best is None else state.best[0],
        "epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "skipped": list(state.skipped),
        "records": read_metrics((trainer.output / METRICS_FILE).read_text(encoding="utf-8")),
    }
