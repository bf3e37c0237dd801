"""The training run: builds everything from a :class:`TrainConfig`, trains, evaluates, writes checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    gather_object,
    set_seed,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import a2fpn
from a2fpn.data import CocoDataset, collate, train_transforms
from a2fpn.evaluation import evaluate_coco
from train.config import DataSection, TrainConfig
from train.optim import build_optimizer, build_scheduler
from train.state import (
    RESUME_FOLDER,
    RunState,
    append_metrics,
    code_version,
    dataset_credits,
    replaced_folder,
    resume_folder,
    temporary_folder,
    write_config,
)

logger = get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number."""


class LossWindow:
    """Mean of every loss, and images per second, since the last reading, over all processes.

    Args:
        accelerator: The accelerator of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = self._images = 0
        self._start = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], *, images: int) -> None:
        """Adds the scalar losses of one batch of so many images."""
        self._sums = {name: self._sums.get(name, 0) + value.detach().float() for name, value in losses.items()}
        self._batches += 1
        self._images += images

    def read(self) -> tuple[dict[str, float], float]:
        """Returns the means and the images per second and starts anew; every process has to call it."""
        means = self._accelerator.reduce(torch.stack(list(self._sums.values())) / self._batches, reduction="mean")
        speed = self._images * self._accelerator.num_processes / (time.perf_counter() - self._start)
        values = dict(zip(self._sums, means.tolist(), strict=True))
        self._restart()
        return values, speed


class ProgressLine:
    """A progress bar on a terminal, log lines elsewhere; silent on all but the main process.

    Args:
        title: What is going on.
        total: Number of batches.
        accelerator: The accelerator of the run.
    """

    def __init__(self, title: str, total: int, accelerator: Accelerator) -> None:
        self._title = title
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if accelerator.is_main_process and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[info]}")
            self._bar = Progress("{task.description}", *columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=total, info="")

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self) -> None:
        """Counts one batch."""
        if self._bar:
            self._bar.advance(self._task)

    def show(self, step: int, loss: float, lr: float, speed: float) -> None:
        """Shows the state of the training."""
        info = f"loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s"
        if self._bar:
            self._bar.update(self._task, info=info)
        else:
            logger.info("%s  step %d  %s", self._title, step, info)


def load_datasets(data: DataSection) -> tuple[CocoDataset, CocoDataset]:
    """Opens the training and the validation set; the classes of both are the training set's.

    Raises:
        ValueError: If a folder, a file, or its content is missing or wrong.
    """
    root = Path(data.root)
    train_set = CocoDataset(root / data.train_images, root / data.train_annotations, strict=data.strict)
    val_set = CocoDataset(
        root / data.val_images, root / data.val_annotations, categories=train_set.categories, strict=data.strict
    )
    for dataset in (train_set, val_set):
        if not len(dataset):
            raise ValueError(f"{dataset.coco.name} lists no image.")
    return train_set, val_set


class Trainer:
    """One training run.

    Args:
        config: The settings.

    Raises:
        ValueError: If the settings do not fit the data, the model or the machine.
        OSError: If a file is missing.
    """

    def __init__(self, config: TrainConfig) -> None:
        run, data = config.run, config.data
        self.config = config
        self.output = Path(run.output)
        resume = resume_folder(run.resume, self.output)
        if resume is None and (self.output / "metrics.jsonl").exists():
            raise ValueError(f"{self.output} already holds a run; choose another run.output or run.resume=true.")
        self.accelerator = Accelerator(
            mixed_precision="no" if run.mixed_precision == "none" else run.mixed_precision,
            gradient_accumulation_steps=run.grad_accumulation,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=run.output, logging_dir=run.output),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed),
            # Rank 0 computes the COCO numbers while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        if run.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("run.mixed_precision=fp16 needs a GPU; on a CPU use none or bf16.")
        self.datasets = train_set, val_set = load_datasets(data)
        set_seed(run.seed)
        overrides: Mapping[str, Any] = config.model.overrides
        model = a2fpn.create_model(
            config.model.name,
            pretrained_backbone=config.model.pretrained_backbone,
            backbone_weights=config.model.backbone_weights,
            num_classes=len(train_set.categories),
            categories=train_set.categories,
            **overrides,
        ).to(self.accelerator.device)
        for dataset in self.datasets:
            if model.has_masks and not dataset.coco.has_masks:
                raise ValueError(f"{dataset.coco.name} has no masks; train a box detector, e.g. fasterrcnn_a2fpn_r50.")
        if run.channels_last:
            model = model.to(memory_format=torch.channels_last)
        train_set.transforms = train_transforms(model.preprocess.target_size, **vars(data.transforms))
        # Before `prepare`, which replaces `forward`; a copy made later would call the original.
        self.ema = ModelEmaV3(model, decay=run.ema, use_warmup=True) if run.ema else None

        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model,
            build_optimizer(model, config.optim),
            DataLoader(
                train_set,
                data.batch_size,
                shuffle=True,
                num_workers=data.workers,
                collate_fn=collate,
                drop_last=len(train_set) >= data.batch_size * self.accelerator.num_processes,
                pin_memory=self.accelerator.device.type == "cuda",
                persistent_workers=data.workers > 0,
            ),
        )
        shard = range(self.accelerator.process_index, len(val_set), self.accelerator.num_processes)
        self.val_loader = DataLoader(
            Subset(val_set, shard), data.eval_batch_size, num_workers=data.workers, collate_fn=collate
        )
        self.metric = "segm/ap" if model.has_masks else "bbox/ap"
        steps_per_epoch = math.ceil(len(self.loader) / run.grad_accumulation)
        self.total_steps = run.max_steps or run.epochs * steps_per_epoch
        self.epochs = math.ceil(self.total_steps / steps_per_epoch)
        # Not prepared: Accelerate would step a prepared schedule once per process.
        self.scheduler = build_scheduler(self.optimizer, self.total_steps, config.optim)
        self.state = RunState()
        self.accelerator.register_for_checkpointing(self.scheduler, self.state)
        if self.ema:
            self.accelerator.register_for_checkpointing(self.ema)

        # The same weights everywhere so far, different augmentation and sampling from here on.
        set_seed(run.seed, device_specific=True)
        if resume:
            self.accelerator.load_state(str(resume))
            logger.info("Continuing after epoch %d from %s", self.state.epoch, resume)
        self.accelerator.init_trackers("tensorboard")
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            write_config(config, self.output)
        logger.info(
            "%s, %d classes, %.1f M parameters; %d training and %d validation images; %d steps in %d epochs, "
            "%d images per step on %d process(es), %s",
            config.model.name,
            len(train_set.categories),
            sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            len(train_set),
            len(val_set),
            self.total_steps,
            self.epochs,
            data.batch_size * self.accelerator.num_processes * run.grad_accumulation,
            self.accelerator.num_processes,
            self.accelerator.device,
        )

    @property
    def evaluated_model(self) -> Any:
        """The model that is evaluated and saved: the moving average if there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    def run(self) -> None:
        """Trains to the end, evaluating and writing checkpoints on the way."""
        while self.state.step < self.total_steps:
            start = time.perf_counter()
            losses, images_per_second = self._train_epoch()
            self.state.epoch += 1
            record: dict[str, Any] = {
                "epoch": self.state.epoch,
                "step": self.state.step,
                "train_seconds": round(time.perf_counter() - start, 1),
                "images_per_second": round(images_per_second, 2),
                **{f"train/{name}": value for name, value in losses.items()},
            }
            if self.state.epoch % self.config.run.evaluate_every == 0 or self.state.step >= self.total_steps:
                record |= self._evaluate()
            self._save(record)
        self.skipped = sorted(set(gather_object([name for data in self.datasets for name in data.skipped.images])))
        self.accelerator.end_training()

    def summary(self) -> str:
        """Says where the best checkpoint of a finished run is, how to load it, and what was skipped."""
        best = self.output / "best"
        annotations = sum(len(data.skipped.annotations) for data in self.datasets)
        lines = [f"Skipped {len(self.skipped)} unreadable images: {', '.join(self.skipped)}"] if self.skipped else []
        lines += [f"Skipped {annotations} unusable annotations, listed at the start."] if annotations else []
        return "\n".join(
            [
                *lines,
                f"Best checkpoint: {best} ({self.metric} {self.state.best:.4f} after epoch {self.state.best_epoch})",
                f'Load it:         model = a2fpn.from_pretrained("{best}")',
                f"Use it:          a2fpn predict IMAGE --model {best}",
            ]
        )

    def _train_epoch(self) -> tuple[dict[str, float], float]:
        """Returns the epoch's mean losses, and the images per second of all processes together."""
        accelerator, config = self.accelerator, self.config
        self.model.train()
        self.loader.set_epoch(self.state.epoch)
        epoch, window = LossWindow(accelerator), LossWindow(accelerator)
        with ProgressLine(f"Epoch {self.state.epoch + 1}/{self.epochs}", len(self.loader), accelerator) as line:
            for images, targets in self.loader:
                with accelerator.accumulate(self.model):
                    losses = self.model(images, targets, resize=False)
                    losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
                    if not torch.isfinite(losses["loss"]):
                        raise NonFiniteLossError(_describe(losses, targets, self.state.step))
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients and config.optim.clip_norm:
                        accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                epoch.add(losses, images=len(images))
                window.add(losses, images=len(images))
                line.advance()
                if not accelerator.sync_gradients:
                    continue
                self.state.step += 1
                if self.ema:
                    self.ema.update(accelerator.unwrap_model(self.model), step=self.state.step)
                if self.state.step % config.run.log_every == 0 or self.state.step == self.total_steps:
                    means, speed = window.read()
                    rate = float(max(self.scheduler.get_last_lr()))
                    line.show(self.state.step, means["loss"], rate, speed)
                    values = {f"train/{name}": value for name, value in means.items()}
                    accelerator.log({**values, "lr": rate, "images_per_second": speed}, step=self.state.step)
                self.scheduler.step()
                if self.state.step >= self.total_steps:
                    break
        return epoch.read()

    def _evaluate(self) -> dict[str, float]:
        """Predicts the validation set on all processes; returns the COCO numbers on the main one, else nothing."""
        accelerator, start = self.accelerator, time.perf_counter()
        model = self.evaluated_model
        if accelerator.num_processes > 1:
            # Batch norm statistics differ between processes; the checkpoint gets those of process 0.
            broadcast(list(model.buffers()))
        predictor = a2fpn.Predictor(model, device=accelerator.device, channels_last=self.config.run.channels_last)
        predictions: list[tuple[int, list[dict[str, Any]]]] = []
        with ProgressLine("Evaluation", len(self.val_loader), accelerator) as line:
            for images, targets in self.val_loader:
                ids = [int(target["image_id"]) for target in targets]
                results = predictor.predict(images)
                predictions += [(i, result.to_coco(i)) for i, result in zip(ids, results, strict=True)]
                line.advance()
        by_image = dict(gather_object(predictions))
        if not accelerator.is_main_process:
            return {}
        truth = self.datasets[1].coco
        known = {category.id for category in truth.categories}  # the training set may have more
        metrics = evaluate_coco(
            truth,
            [found for image_id in sorted(by_image) for found in by_image[image_id] if found["category_id"] in known],
            iou_types=("bbox", "segm") if model.has_masks else ("bbox",),
            max_detections=self.config.run.max_detections,
        ).to_dict(per_class=True)
        accelerator.log({f"val/{name}": value for name, value in metrics.items()}, step=self.state.step)
        return {"eval_seconds": round(time.perf_counter() - start, 1), "images_evaluated": len(by_image), **metrics}

    def _save(self, record: dict[str, Any]) -> None:
        """Writes the ``last`` and, where the main metric rose, the ``best`` checkpoint, and the metrics line."""
        accelerator, last = self.accelerator, self.output / "last"
        value = record.get(self.metric, -math.inf)  # only the main process has it, and only after an evaluation
        improved = value > self.state.best
        if improved:
            self.state.best, self.state.best_epoch = value, self.state.epoch
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(temporary_folder(last), ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary_folder(last) / RESUME_FOLDER))  # random states of every process
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for folder in (last, self.output / "best") if improved else (last,):
                with replaced_folder(folder) as partial:
                    a2fpn.save_pretrained(self.evaluated_model, partial, metadata=self._metadata(record))
            append_metrics(record, self.output)
            numbers = ", ".join(f"{name} {record[name]:.4f}" for name in ("bbox/ap", "segm/ap") if name in record)
            logger.info(
                "Epoch %d/%d: loss %.4f, %s%.1f images/s%s",
                self.state.epoch,
                self.epochs,
                record["train/loss"],
                f"{numbers}, " if numbers else "",
                record["images_per_second"],
                " (best so far)" if improved else "",
            )
        accelerator.wait_for_everyone()

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint says about its making."""
        return {
            "recipe": self.config.run.name,
            "epochs": self.state.epoch,
            "steps": self.state.step,
            "seed": self.config.run.seed,
            "ema": self.config.run.ema,
            "commit": code_version(),
            **dataset_credits(Path(self.datasets[0].coco.name)),
            "max_detections": self.config.run.max_detections,
            "metrics": {name: value for name, value in record.items() if name.startswith(("bbox/", "segm/"))},
        }


def _describe(losses: Mapping[str, Tensor], targets: Sequence[Mapping[str, Any]], step: int) -> str:
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    ids = ", ".join(str(int(target["image_id"])) for target in targets)
    return (
        f"The loss is not finite in step {step + 1} ({values}) on the images with ids {ids}. Look at their "
        "annotations, lower optim.lr, or set optim.clip_norm."
    )


def train(config: TrainConfig) -> Trainer:
    """Runs a training from start to end.

    Args:
        config: The settings.

    Returns:
        The finished trainer; ``output`` is the run's folder and ``state`` says how far it came.
    """
    trainer = Trainer(config)
    trainer.run()
    return trainer
