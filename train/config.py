"""The settings of a training run: frozen, typed dataclasses, one per section of a recipe.

The docstrings are the text of ``python -m train --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

JsonValue = None | bool | int | float | list[Any] | dict[str, Any] | str


@dataclass(frozen=True)
class ModelSection:
    """Which detector is trained; its classes are the categories of the training annotations.

    Args:
        name: A registered model name, see `a2fpn list`.
        pretrained_backbone: Start from timm's ImageNet weights, downloaded once.
        backbone_weights: Start from this file of backbone weights (timm's keys) instead; needs no network.
        overrides: Further keywords of a2fpn.create_model, e.g. --model.overrides.neck fpn.
    """

    name: str = "maskrcnn_a2fpn_r50"
    pretrained_backbone: bool = False
    backbone_weights: str | None = None
    overrides: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformsSection:
    """Random changes of the training images, see a2fpn.data.train_transforms.

    Args:
        scale_range: Lowest and highest factor on the size at which the model sees an image.
        crop_size: Longest side of the random crop in pixels after resizing; null keeps the whole image.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a turn by 90, 180 or 270 degrees.
        colour_jitter: Strength of the change of brightness, contrast, saturation and hue, 0 to 1.
        min_box_size: Objects of which fewer pixels are left are dropped.
    """

    scale_range: tuple[float, float] = (1.0, 1.0)
    crop_size: int | None = None
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    rotate90: float = 0.0
    colour_jitter: float = 0.0
    min_box_size: float = 1.0


@dataclass(frozen=True)
class DataSection:
    """Two sets in COCO format; paths are relative to the root.

    Args:
        root: Folder of the data set.
        train_images: Folder of the training images.
        train_annotations: COCO JSON of the training images.
        val_images: Folder of the validation images.
        val_annotations: COCO JSON of the validation images.
        batch_size: Training images per process and step.
        eval_batch_size: Validation images per process and step.
        workers: Loader processes per training process; 0 loads in the training process.
        strict: Stop at the first unreadable image or annotation instead of counting and skipping it.
        transforms: Random changes of the training images.
    """

    root: str
    train_images: str = "images"
    train_annotations: str = "annotations/instances_train.json"
    val_images: str = "images"
    val_annotations: str = "annotations/instances_val.json"
    batch_size: int = 2
    eval_batch_size: int = 1
    workers: int = 2
    strict: bool = False
    transforms: TransformsSection = field(default_factory=TransformsSection)


@dataclass(frozen=True)
class OptimSection:
    """Optimiser and learning-rate schedule.

    Args:
        name: sgd or adamw.
        lr: Peak learning rate at this run's batch size (batch_size x processes x grad_accumulation).
        momentum: Momentum of SGD.
        weight_decay: Decay of the weights; never of biases, norms and other one-dimensional parameters.
        backbone_lr_factor: Learning rate of the backbone relative to lr.
        warmup_steps: Optimiser steps over which the rate rises linearly to lr.
        warmup_factor: Rate of the first step relative to lr.
        schedule: cosine falls to final_factor; step multiplies by gamma at each milestone.
        milestones: Where the step schedule falls, as fractions of the run.
        gamma: Factor of the step schedule.
        final_factor: Rate at the end of the cosine schedule relative to lr.
        clip_norm: Largest norm of the gradient; null does not clip.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    backbone_lr_factor: float = 1.0
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    gamma: float = 0.1
    final_factor: float = 0.01
    clip_norm: float | None = None


@dataclass(frozen=True)
class RunSection:
    """Length, precision, evaluation and output of the run.

    Args:
        name: Name of the recipe, kept in the checkpoints.
        output: Folder for checkpoints, metrics.jsonl, config.yaml and TensorBoard files.
        epochs: Passes over the training images.
        max_steps: Stop after this many optimiser steps instead of after epochs.
        seed: Seed of everything random.
        mixed_precision: bf16 and fp16 run the network under autocast; weights stay in fp32.
        grad_accumulation: Batches per optimiser step.
        evaluate_every: Evaluate after every so many epochs, and always after the last one.
        max_detections: Detections per image that the evaluation counts (COCO's default is 100).
        log_every: Optimiser steps between two log entries.
        channels_last: Use the channels-last memory format.
        ema: Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 is off.
        resume: true continues from output/last, a path from that folder.
    """

    name: str = "custom"
    output: str = "runs/train"
    epochs: int = 12
    max_steps: int | None = None
    seed: int = 0
    mixed_precision: Literal["none", "bf16", "fp16"] = "none"
    grad_accumulation: int = 1
    evaluate_every: int = 1
    max_detections: int = 100
    log_every: int = 20
    channels_last: bool = True
    ema: float = 0.0
    resume: bool | str = False


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        data: Data set.
        model: Model.
        optim: Optimiser and schedule.
        run: Run.
    """

    data: DataSection
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
