"""The training run: builds everything from a :class:`TrainConfig`, trains, evaluates, writes checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    gather_object,
    set_seed,
)
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor

import a2fpn
from a2fpn._atomic import partial_path, recover_folder, replaced_folder
from a2fpn.data import CocoDataset
from a2fpn.errors import ConfigError, RunError
from a2fpn.training.config import TrainConfig
from a2fpn.training.feed import Batch, Feed
from a2fpn.training.importing import import_folder
from a2fpn.training.monitor import (
    HostCopy,
    LossWindow,
    ProgressLine,
    get_logger,
    grid,
    plot_metrics,
    text_log,
    track_picture,
)
from a2fpn.training.optim import build_optimizer, build_scheduler, scaled_lr
from a2fpn.training.seeding import derived_seed, use_deterministic_algorithms
from a2fpn.training.signals import Signals, StopRequest
from a2fpn.training.sources import (
    build_feed,
    build_model,
    check_folder,
    credits_of,
    log_odd_plans,
    open_training_set,
    open_validation_set,
)
from a2fpn.training.state import (
    METRICS_FILE,
    RESUME_FOLDER,
    CheckpointWriteError,
    RunState,
    append_metrics,
    changed_settings,
    code_version,
    read_metrics,
    resume_folder,
    rewind_metrics,
    write_config,
)
from a2fpn.training.validate import Validator

logger = get_logger(__name__)


class NonFiniteLossError(RunError):
    """A loss became infinite or not a number."""


class LoaderError(RunError):
    """A loader process died."""


class Trainer:
    """One training run.

    Args:
        config: The settings.

    Raises:
        ValueError: If the settings do not fit the data, the model or the machine.
        OSError: If a file is missing.
    """

    def __init__(self, config: TrainConfig) -> None:
        run = config.run
        self.config = config
        self.output = Path(run.output)
        self.accelerator = Accelerator(
            mixed_precision="no" if run.mixed_precision == "none" else run.mixed_precision,
            gradient_accumulation_steps=run.grad_accumulation,
            log_with=list(run.trackers),
            project_config=ProjectConfiguration(project_dir=run.output, logging_dir=run.output),
            # Rank 0 computes the COCO numbers while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        check_processes(self.accelerator)
        if run.deterministic:
            use_deterministic_algorithms()
        if run.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ConfigError("run.mixed_precision=fp16 needs a GPU; on a CPU use none or bf16.")
        resume = self._resume_folder()
        data = import_folder(config.data)
        train_set = open_training_set(data)
        val_set = open_validation_set(data, train_set)
        self.datasets = train_set, val_set
        self.batch_size = data.batch_size * self.accelerator.num_processes * run.grad_accumulation
        set_seed(run.seed)
        model = build_model(config.model, train_set).to(self.accelerator.device)
        for dataset in self.datasets:
            # The maps of the validation images are not needed to measure boxes and masks.
            unused = () if dataset is train_set or run.val_loss else ("semantic",)
            model.check_data(dataset.name, (*dataset.target_keys, *unused))
            if data.check_images and isinstance(dataset, CocoDataset) and self.accelerator.is_main_process:
                check_folder(dataset, train_set, images=data.check_images)
        if run.channels_last:
            model = model.to(memory_format=torch.channels_last)
        # Before `prepare`, which replaces `forward`; a copy made later would call the original.
        self.ema = ModelEmaV3(model, decay=run.ema, use_warmup=True) if run.ema else None
        if run.compile:
            model.compile_maps()
        self._global_losses = run.sync_losses and self.accelerator.num_processes > 1
        model.normalize_losses_globally(enabled=self._global_losses)
        self.feed: Feed = build_feed(config, train_set, model, self.accelerator)
        self.total_steps, self.epochs = self._length()

        optimizer = build_optimizer(model, config.optim, lr=scaled_lr(config.optim, self.batch_size))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Not prepared: Accelerate would step a prepared schedule once per process.
        self.scheduler = build_scheduler(self.optimizer, self.total_steps, config.optim)
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
        )
        self.metric = f"{self.validator.iou_types[-1]}/ap"
        self.state = RunState()
        self._origin = {"commit": code_version(), **credits_of(train_set)}
        self.epoch_losses = LossWindow(self.accelerator)
        self.accelerator.register_for_checkpointing(self.scheduler, self.state)
        if self.ema:
            self.accelerator.register_for_checkpointing(self.ema)
        if resume:
            self.accelerator.load_state(str(resume))
            self.epoch_losses.restore(self.state.sums)
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            rewind_metrics(self.output, self.state.step)
            write_config(config, self.output)
        self.accelerator.init_trackers(run.name)

    def run(self) -> None:
        """Train to the end, evaluating and writing checkpoints on the way.

        Raises:
            StopRequest: After a signal; a checkpoint is written.
            NonFiniteLossError: If a loss is not finite.
            LoaderError: If a loader process died.
            CheckpointWriteError: If a checkpoint can't be written.
        """
        run = self.config.run
        with text_log(self.output / "train.log", enabled=self.accelerator.is_main_process), Signals() as signals:
            self._log_start()
            try:
                self._run_epochs(signals)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise LoaderError(
                    f"{str(error).splitlines()[0].rstrip('. ')}. If memory ran out, lower data.workers or "
                    "data.batch_size; run.resume=auto continues from the last checkpoint."
                ) from error
            if self.state.step < self.total_steps:
                logger.info("Stopping early: no better %s in %d evaluations.", self.metric, run.patience)
        self.accelerator.end_training()

    def summary(self) -> str:
        """Say where the best checkpoint of a finished run is, how to load it, and what was skipped."""
        best, skipped = self.output / "best", self.state.skipped
        annotations = sum(len(data.skipped.annotations) for data in self.datasets)
        lines = [f"Skipped {len(skipped)} unreadable images: {', '.join(skipped)}"] if skipped else []
        lines += [f"Skipped {annotations} unusable annotations, listed at the start."] if annotations else []
        return "\n".join(
            [
                *lines,
                f"Losses and AP:   {self.output / 'metrics.png'}",
                f"Best checkpoint: {best} ({self.metric} {self.state.best:.4f} after epoch {self.state.best_epoch})",
                f'Load it:         model = a2fpn.from_pretrained("{best}")',
                f"Use it:          a2fpn predict IMAGE --model {best}",
            ]
        )

    @property
    def evaluated_model(self) -> Any:
        """The model that is evaluated and saved: the moving average if there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    # Setting up

    def _resume_folder(self) -> Path | None:
        """The training state to continue from, after what a kill may have left is put right."""
        run = self.config.run
        if run.resume and self.accelerator.is_main_process:
            for name in ("last", "best"):
                recover_folder(self.output / name)
        self.accelerator.wait_for_everyone()
        if not run.resume and (self.output / METRICS_FILE).exists():
            raise ConfigError(f"{self.output} already holds a run; choose another run.output, or run.resume=auto.")
        folder = resume_folder(run.resume, self.output)
        changes = changed_settings(self.config, self.output) if folder else []
        if changes:
            logger.warning("The run was started with other settings: %s", "; ".join(changes))
        return folder

    def _length(self) -> tuple[int, int]:
        """Steps and epochs of the run."""
        run = self.config.run
        steps = epochs = 0
        while (steps < run.max_steps) if run.max_steps else (epochs < run.epochs):
            steps += self.feed.steps(epochs)
            epochs += 1
        return run.max_steps or steps, epochs

    def _log_start(self) -> None:
        config, (train_set, val_set) = self.config, self.datasets
        if self.state.step:
            logger.info("Continuing after step %d of %d.", self.state.step, self.total_steps)
        parameters = sum(parameter.numel() for parameter in self.accelerator.unwrap_model(self.model).parameters())
        logger.info(
            "%s, %d classes, %.1f M parameters; %d training and %d validation images; %d steps in %d epochs.",
            config.model.name,
            len(train_set.categories),
            parameters / 1e6,
            len(train_set),
            len(val_set),
            self.total_steps,
            self.epochs,
        )
        log_odd_plans(config, self.accelerator.unwrap_model(self.model), self.datasets, steps=self.total_steps)
        logger.info(
            "%d images per step (%d per batch, %d process(es) on %s, %d batch(es) per step); "
            "learning rate %.3g, which is %.3g for %d images, scaling: %s.",
            self.batch_size,
            config.data.batch_size,
            self.accelerator.num_processes,
            self.accelerator.device,
            config.run.grad_accumulation,
            scaled_lr(config.optim, self.batch_size),
            config.optim.lr,
            config.optim.lr_batch_size,
            config.optim.lr_scaling,
        )

    # Training

    def _run_epochs(self, signals: Signals) -> None:
        run = self.config.run
        while self.state.step < self.total_steps and not (run.patience and self.state.stale >= run.patience):
            record = self._train_epoch(signals)
            if self.state.epoch % run.evaluate_every == 0 or self.state.step >= self.total_steps:
                record |= self._evaluate()
            self._save(record)

    def _train_epoch(self, signals: Signals) -> dict[str, Any]:
        """Train to the end of the epoch, or of the run; return the epoch's record."""
        state, config = self.state, self.config
        self.model.train()
        steps, window = self.feed.steps(state.epoch), LossWindow(self.accelerator)
        batches = self.feed.batches(state.epoch, start=state.step_in_epoch)
        start = time.perf_counter()
        title = f"Epoch {state.epoch + 1}/{self.epochs}"
        last = min(steps, state.step_in_epoch + self.total_steps - state.step)
        with ProgressLine(title, last, self.accelerator, done=state.step_in_epoch) as line:
            while state.step_in_epoch < steps and state.step < self.total_steps:
                self._step(self._fetch(batches, signals), window)
                state.step += 1
                state.step_in_epoch += 1
                line.advance()
                if state.step % config.run.log_every == 0 or state.step == self.total_steps:
                    means, throughput = window.read()
                    rate = float(max(self.scheduler.get_last_lr()))
                    line.show(state.step, means["loss"], rate, throughput)
                    values = {f"train/{name}": value for name, value in means.items()}
                    speed = {"images_per_second": throughput.images_per_second, "waiting_for_data": throughput.waiting}
                    self.accelerator.log({**values, "lr": rate, **speed}, step=state.step)
                self.scheduler.step()
                every = config.run.checkpoint_every
                if every and state.step % every == 0 and state.step_in_epoch < steps and state.step < self.total_steps:
                    self._save(None)
        means, throughput = self.epoch_losses.read()
        state.epoch += 1
        state.step_in_epoch = 0
        return {
            "epoch": state.epoch,
            "step": state.step,
            "train_seconds": round(time.perf_counter() - start, 1),
            "images_per_second": round(throughput.images_per_second, 2),
            **{f"train/{name}": value for name, value in means.items()},
        }

    def _fetch(self, batches: Iterator[Batch], signals: Signals) -> list[tuple[Batch, float]]:
        """The batches of a step and how long each took to come; writes a checkpoint and stops if a signal came.

        Raises:
            StopRequest: On all processes, if a signal came to any.
        """
        fetched = []
        try:
            for _ in range(self.config.run.grad_accumulation):
                start = time.perf_counter()
                fetched.append((next(batches), time.perf_counter() - start))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or not signals.received:
                raise  # else the signal went to the loader processes as well, which have left
        signum = int(max(self._gather(signals.received)))
        if signum:
            self._save(None)
            raise StopRequest(signum, f"stopped after step {self.state.step}; run.resume=auto continues from there")
        return fetched

    def _gather(self, value: float) -> list[float]:
        """One number from every process."""
        if self.accelerator.num_processes == 1:
            return [value]
        values: list[float] = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).tolist()
        return values

    def _step(self, parts: Sequence[tuple[Batch, float]], window: LossWindow) -> None:
        """One step of the optimizer."""
        accelerator, config = self.accelerator, self.config
        for number, ((images, targets), waited) in enumerate(parts):
            # What is drawn in a step depends on nothing before it.
            place = (config.run.seed, self.state.step, number, accelerator.process_index)
            torch.manual_seed(derived_seed("step", *place))
            is_last = number == len(parts) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                losses = self.model(images, targets, resize=False)
                losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
                total = HostCopy(losses["loss"])
                accelerator.backward(losses["loss"])
                # Before the weights change, but with the backward pass under way: the device has no time to idle.
                self._check_finite({**losses, "loss": total.value()}, targets)
            for one in (self.epoch_losses, window):
                one.add({name: value.detach() for name, value in losses.items()}, images=len(images), waited=waited)
        if config.optim.clip_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(accelerator.unwrap_model(self.model), step=self.state.step + 1)

    def _check_finite(self, losses: Mapping[str, Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        """Stop all processes if the loss of any is not finite.

        Raises:
            NonFiniteLossError: That names the images.
        """
        bad = not bool(torch.isfinite(losses["loss"]))
        if not any(self._gather(float(bad))):
            return
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        mine = [(values, [int(target["image_id"]) for target in targets])] if bad else []
        found = gather_object(mine)
        ids = ", ".join(str(image_id) for _, images in found for image_id in images)
        last = self.output / "last"
        kept = f" The last good checkpoint is {last}." if last.exists() else ""
        raise NonFiniteLossError(
            f"The loss is not finite in step {self.state.step + 1} ({found[0][0]}) on the images with ids {ids}. Look "
            f"at their annotations, lower optim.lr, or set optim.clip_norm.{kept}"
        )

    # Evaluating and saving

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate on all processes; return the numbers on the main one, else nothing."""
        accelerator, start, model = self.accelerator, time.perf_counter(), self.evaluated_model
        if accelerator.num_processes > 1:
            # Batch norm statistics differ between processes; the checkpoint gets those of process 0.
            broadcast(list(model.buffers()))
        losses: dict[str, float] = {}
        if self.config.run.val_loss:
            model.normalize_losses_globally(enabled=False)  # processes have different numbers of batches
            losses = self.validator.losses(model)
            model.normalize_losses_globally(enabled=self._global_losses)
        metrics, pictures = self.validator.evaluate(model)
        if not accelerator.is_main_process:
            return {}
        accelerator.log({**losses, **{f"val/{name}": value for name, value in metrics.items()}}, step=self.state.step)
        if pictures:
            path = self.output / "predictions" / f"epoch_{self.state.epoch:03d}.jpg"
            path.parent.mkdir(exist_ok=True)
            page = grid(pictures)
            page.save(path, quality=88)
            track_picture(accelerator, "val/predictions", page, path, self.state.step)
        return {"eval_seconds": round(time.perf_counter() - start, 1), **losses, **metrics}

    def _save(self, record: dict[str, Any] | None) -> None:
        """Write the ``last`` checkpoint and, at the end of an epoch, its record and a better ``best``.

        Args:
            record: The epoch's record, or None within an epoch.

        Raises:
            CheckpointWriteError: If the disk doesn't take it; what was there before is untouched.
        """
        state, last = self.state, self.output / "last"
        state.sums = self.epoch_losses.totals()
        names = gather_object([name for data in self.datasets for name in data.skipped.images])
        state.skipped = sorted({*state.skipped, *names})
        # Only the main process knows the numbers; all have to agree on when to stop.
        value = self._gather((record or {}).get(self.metric, -math.inf))[0]
        improved = value > state.best
        if improved:
            state.best, state.best_epoch, state.stale = value, state.epoch, 0
        elif value > -math.inf:
            state.stale += 1
        try:
            self._write(last, record, improved)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial_path(last), ignore_errors=True)
            free = shutil.disk_usage(self.output).free / 2**20
            kept = (
                f"the one in {last} is untouched; run.resume=auto continues from it"
                if last.exists()
                else "none before it"
            )
            raise CheckpointWriteError(
                f"cannot write a checkpoint to {self.output}: {' '.join(str(error).split())} ({free:.0f} MiB free); "
                f"{kept}."
            ) from error

    def _write(self, last: Path, record: dict[str, Any] | None, improved: bool) -> None:
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(partial_path(last), ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial_path(last) / RESUME_FOLDER))  # every process has its part
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if record is not None:
                append_metrics(record, self.output)
            for folder in (self.output / "best", last) if improved else (last,):
                with replaced_folder(folder) as partial:
                    a2fpn.save_pretrained(self.evaluated_model, partial, metadata=self._metadata(record or {}))
            if record is not None:
                self._report(record, improved)
        accelerator.wait_for_everyone()

    def _report(self, record: Mapping[str, Any], improved: bool) -> None:
        if self.metric in record:
            plot_metrics(read_metrics(self.output), self.output / "metrics.png")
        numbers = ", ".join(
            f"{name} {record[name]:.4f}" for name in ("bbox/ap", "segm/ap", "keypoints/ap") if name in record
        )
        logger.info(
            "Epoch %d/%d: loss %.4f, %s%.1f images/s%s",
            self.state.epoch,
            self.epochs,
            record["train/loss"],
            f"{numbers}, " if numbers else "",
            record["images_per_second"],
            " (best so far)" if improved else "",
        )

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        return {
            "recipe": self.config.run.name,
            "epochs": self.state.epoch,
            "steps": self.state.step,
            "seed": self.config.run.seed,
            "ema": self.config.run.ema,
            **self._origin,
            "max_detections": self.config.run.max_detections,
            "metrics": {
                name: value for name, value in record.items() if name.startswith(("bbox/", "segm/", "keypoints/"))
            },
        }


def check_processes(accelerator: Accelerator) -> None:
    """Refuse ways to start several processes that would train something else than is asked for.

    Raises:
        ValueError: If weights would be sharded, or processes would not know of each other.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{kind.value} shards weights, which checkpoints and the moving average here don't support; detectors of "
            "this size train with plain data parallelism: choose MULTI_GPU in `accelerate config`, or use torchrun."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but each knows of {accelerator.num_processes} only and would write to "
            "the same folder. Without a GPU use ACCELERATE_USE_CPU=true torchrun --nproc-per-node N train/ ..., and no "
            "FSDP or DeepSpeed configuration."
        )


def train(config: TrainConfig) -> Trainer:
    """Run a training from start to end.

    Args:
        config: The settings.

    Returns:
        The finished trainer; ``output`` is the run's folder and ``state`` says how far it came.
    """
    trainer = Trainer(config)
    trainer.run()
    return trainer
