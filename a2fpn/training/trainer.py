"""Training run: builds everything from a :class:`TrainConfig`, trains, evaluates, writes checkpoints."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from timm.utils import ModelEmaV3

from a2fpn.data import CocoDataset
from a2fpn.errors import ConfigError, RunError
from a2fpn.training.account import log_start
from a2fpn.training.config import TrainConfig
from a2fpn.training.feed import Batch, Feed
from a2fpn.training.folder import CheckpointWriteError
from a2fpn.training.health import MOST_SKIPPED, NonFiniteLossError
from a2fpn.training.importing import import_folder
from a2fpn.training.keeper import Keeper, Parts
from a2fpn.training.monitor import LossWindow, get_logger, text_log
from a2fpn.training.optim import build_optimizer, lr_factor, scaled_lr, set_rate
from a2fpn.training.processes import check_processes, check_trackers, gather_number
from a2fpn.training.progress import RunBoard
from a2fpn.training.seeding import use_deterministic_algorithms
from a2fpn.training.signals import Signals, StopRequest
from a2fpn.training.sources import (
    build_feed,
    build_model,
    check_folder,
    open_training_set,
    open_validation_set,
)
from a2fpn.training.state import LOG_FILE, Plan
from a2fpn.training.stepping import Stepper
from a2fpn.training.validate import Validator

logger = get_logger(__name__)
_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}


class LoaderError(RunError):
    """A loader process that died."""


class Trainer:
    """One training run.

    Args:
        config: The settings.
        quiet: Whether to hide progress.

    Raises:
        ValueError: If the settings do not fit the data, the model, the machine or the resumed run.
        OSError: If a file is missing.
    """

    def __init__(self, config: TrainConfig, *, quiet: bool = False) -> None:
        run = config.run
        self.config, self._quiet = config, quiet
        self.output = Path(run.output)
        check_trackers(run.trackers)
        self.accelerator = Accelerator(
            mixed_precision="no" if run.mixed_precision == "none" else run.mixed_precision,
            gradient_accumulation_steps=run.grad_accumulation,
            log_with=list(run.trackers) or None,  # it complains about an empty list
            project_config=ProjectConfiguration(project_dir=run.output, logging_dir=run.output),
            # Rank 0 computes the COCO metrics while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        check_processes(self.accelerator)
        if run.deterministic:
            use_deterministic_algorithms()
        if run.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ConfigError("run.mixed_precision=fp16 needs a GPU; on a CPU use none or bf16.")
        self._skipped_in_a_row = 0
        self.keeper = Keeper(config, self.accelerator)
        try:
            self._build()
        except BaseException:
            self.keeper.close()
            raise

    def _build(self) -> None:
        config, run = self.config, self.config.run
        data = import_folder(config.data)
        train_set = open_training_set(data)
        val_set = open_validation_set(data, train_set)
        self.datasets = train_set, val_set
        self.keeper.check_data(train_set, val_set)
        self.batch_size = data.batch_size * self.accelerator.num_processes * run.grad_accumulation
        set_seed(run.seed)
        model = build_model(config.model, train_set).to(self.accelerator.device)
        self.keeper.check_model(model)
        for dataset in self.datasets:
            # Semantic maps of the validation images are not needed to evaluate boxes and masks.
            unused = () if dataset is train_set or run.val_loss else ("semantic",)
            model.check_data(dataset.name, (*dataset.target_keys, *unused))
            if data.check_images and isinstance(dataset, CocoDataset) and self.accelerator.is_main_process:
                check_folder(dataset, train_set, images=data.check_images)
        if run.channels_last:
            model = model.to(memory_format=torch.channels_last)
        # Before `prepare`, which replaces `forward`; a later copy would call the original's.
        self.ema = ModelEmaV3(model, decay=run.ema, use_warmup=True) if run.ema else None
        model.checkpoint_neck(run.checkpoint_neck)
        if run.compile:
            model.compile_maps()
        global_losses = run.sync_losses and self.accelerator.num_processes > 1
        model.normalize_losses_globally(enabled=global_losses)
        self.feed: Feed = build_feed(config, train_set, model, self.accelerator)
        self.plan = Plan(self.feed, run)

        optimizer = build_optimizer(model, config.optim, lr=scaled_lr(config.optim, self.batch_size))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.validator = Validator(
            val_set,
            self.accelerator,
            target_keys=model.target_keys,
            oks_sigmas=data.oks_sigmas,
            batch_size=data.eval_batch_size,
            workers=data.workers,
            max_detections=run.max_detections,
            backend=run.evaluator,
            channels_last=run.channels_last,
            pictures=run.pictures,
            seed=run.seed,
            global_losses=global_losses,
            quiet=self._quiet,
        )
        # The first decides which checkpoint is the best; the others break ties.
        self.metrics = [f"{kind}/ap" for kind in reversed(self.validator.iou_types)]
        self.epoch_losses = LossWindow(self.accelerator)
        self.stepper = Stepper(self.accelerator, self.model, self.optimizer, self.ema, config)
        parts = Parts(
            model=self.accelerator.unwrap_model(self.model),
            average=self.ema.module if self.ema else None,
            optimizer=self.optimizer,
            losses=self.epoch_losses,
            plan=self.plan,
            metrics=self.metrics,
        )
        self.evaluated_model = parts.evaluated
        self.state = self.keeper.resume(parts, images_per_step=self.batch_size)
        self.accelerator.init_trackers(run.name)
        shown = self.accelerator.is_main_process and not self._quiet
        self.board = RunBoard(shown, total_steps=self.plan.total_steps, place=self.plan.place(self.state))

    def run(self) -> None:
        """Train to the end, with evaluation and checkpoints.

        Raises:
            StopRequest: After a signal; a checkpoint is written.
            NonFiniteLossError: If a loss or gradient is not finite.
            DivergedError: If the weights have diverged.
            LoaderError: If a loader process died.
            CheckpointWriteError: If a checkpoint can't be written.
        """
        try:
            self._run()
        except (
            RuntimeError
        ) as error:  # torch raises it from a signal handler: anywhere, and once more while cleaning up
            if isinstance(error, LoaderError) or "DataLoader worker" not in str(error):
                raise
            raise LoaderError(
                f"{str(error).splitlines()[0].rstrip('. ')}. If memory ran out, lower data.workers or "
                "data.batch_size; run.resume=auto continues from the last checkpoint."
            ) from error

    def _run(self) -> None:
        run = self.config.run
        try:
            with text_log(self.output / LOG_FILE, enabled=self.accelerator.is_main_process), Signals() as signals:
                log_start(self)
                try:
                    self._run_epochs(signals)
                except OSError as error:
                    if error.filename is not None or error.errno not in _FULL:
                        raise
                    raise CheckpointWriteError(
                        f"The disk of {self.output} is full ({error.strerror}); run.resume=auto continues from the "
                        "last checkpoint."
                    ) from error
                if not self._done():
                    logger.info("Stopping early: no better %s in %d evaluations.", self.metrics[0], run.patience)
            self.accelerator.end_training()
        finally:
            self.keeper.close()

    def _done(self) -> bool:
        return self.plan.place(self.state) >= self.plan.total_steps

    def _run_epochs(self, signals: Signals) -> None:
        run, state = self.config.run, self.state
        while state.pending or not (self._done() or (run.patience and state.stale >= run.patience)):
            record = state.pending or self._train_epoch(signals)
            if state.pending or state.epoch % run.evaluate_every == 0 or self._done():
                if not state.pending:  # saved first, since evaluation may fail
                    state.pending = record
                    self.keeper.save(None)
                record = {**record, **self._evaluate(signals)}
                state.pending = None
            self.keeper.save(record)
            self.board.add(record, best=state.best_epoch == state.epoch)

    def _train_epoch(self, signals: Signals) -> dict[str, Any]:
        """Train to the end of the epoch or of the run, and return the epoch's record."""
        state, config, plan = self.state, self.config, self.plan
        self.model.train()
        window = LossWindow(self.accelerator)
        plan.enter(state)
        batches = self.feed.batches(state.epoch, start=state.step_in_epoch)
        start = time.perf_counter()
        steps = state.steps_in_epoch
        last = min(steps, state.step_in_epoch + plan.total_steps - plan.place(state))
        with self.board.training(state.epoch, plan.epochs(state), last, done=state.step_in_epoch) as line:
            while state.step_in_epoch < last:
                factor = lr_factor(
                    plan.place(state), total_steps=plan.total_steps, config=config.optim, updates=state.step
                )
                rate = set_rate(self.optimizer, factor)
                self._step(self._fetch(batches, signals), window)
                state.value = None  # it was the metric of the previous weights
                state.step += 1
                state.step_in_epoch += 1
                state.images += self.batch_size
                state.share = plan.share(state)
                line.advance()
                if state.step % config.run.log_every == 0 or self._done():
                    means, throughput = window.read()
                    line.show(state.step, plan.place(state), means, rate, throughput)
                    values = {f"train/{name}": value for name, value in means.items()}
                    speed = {"images_per_second": throughput.images_per_second, "waiting_for_data": throughput.waiting}
                    self.accelerator.log({**values, "lr": rate, **speed}, step=state.step)
                every = config.run.checkpoint_every
                if every and state.step % every == 0 and state.step_in_epoch < last:
                    self.keeper.save(None)
        means, throughput = self.epoch_losses.read()
        state.epoch += 1
        state.step_in_epoch = state.steps_in_epoch = 0
        return {
            "epoch": state.epoch,
            "step": state.step,
            "train_seconds": round(time.perf_counter() - start, 1),
            "images_per_second": round(throughput.images_per_second, 2),
            **{f"train/{name}": value for name, value in means.items()},
        }

    def _fetch(self, batches: Iterator[Batch], signals: Signals) -> list[tuple[Batch, float]]:
        """Fetch the batches of a step with the waiting times; after a signal, write a checkpoint and stop.

        Raises:
            StopRequest: On all processes, if any received a signal.
        """
        fetched = []
        try:
            for _ in range(self.config.run.grad_accumulation):
                start = time.perf_counter()
                fetched.append((next(batches), time.perf_counter() - start))
        except ConnectionError as error:  # a loader process died while sending a batch
            if not signals.received:
                raise RuntimeError("A DataLoader worker process exited unexpectedly.") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or not signals.received:
                raise  # otherwise the loader processes received the signal as well, and have exited
        signum = self._signal(signals)
        if signum:
            self.keeper.save_unless_saved()
            raise StopRequest(signum, f"stopped after step {self.state.step}; run.resume=auto continues from there")
        return fetched

    def _signal(self, signals: Signals) -> int:
        """Signal received by any process, or 0."""
        return int(max(gather_number(self.accelerator, signals.received)))

    def _step(self, parts: list[tuple[Batch, float]], window: LossWindow) -> None:
        """Run one optimizer step; skipped steps are counted as well.

        Raises:
            NonFiniteLossError: If a loss or gradient is not finite, and the step is not to be skipped.
        """
        batches, problem = self.stepper.step(parts, self.state.step)
        if problem:
            self._skip(problem)
            return
        self._skipped_in_a_row = 0
        for batch in batches:
            for one in (self.epoch_losses, window):
                one.add(batch.losses, images=batch.images, waited=batch.waited)

    def _skip(self, problem: str) -> None:
        self._skipped_in_a_row += 1
        if self.config.run.nonfinite == "stop" or self._skipped_in_a_row > MOST_SKIPPED:
            raise NonFiniteLossError(
                f"{problem} Look at their annotations, lower optim.lr, set optim.clip_norm, or skip such steps with "
                f"run.nonfinite=skip. {self.keeper.last_good()}"
            )
        self.state.skipped_steps += 1
        logger.warning("%s The step is skipped.", problem)

    def _evaluate(self, signals: Signals) -> dict[str, Any]:
        """Evaluate on all processes; return the metrics on the main one, else nothing.

        Raises:
            StopRequest: On all processes, if any received a signal.
        """

        def poll() -> None:
            if signum := self._signal(signals):
                raise StopRequest(
                    signum,
                    f"stopped while evaluating epoch {self.state.epoch}, which is saved; run.resume=auto evaluates it",
                )

        return self.validator.record(
            self.evaluated_model,
            poll,
            losses=self.config.run.val_loss,
            step=self.state.step,
            picture=self.output / "predictions" / f"epoch_{self.state.epoch:03d}.jpg",
        )


def train(config: TrainConfig) -> Trainer:
    """Run a training.

    Args:
        config: The settings.

    Returns:
        The finished trainer; ``output`` is the run's folder and ``state`` its progress.
    """
    trainer = Trainer(config)
    trainer.run()
    return trainer
