"""The settings of a training run: frozen, typed dataclasses, one per section of a recipe.

The docstrings are the text of ``a2fpn train --help``. Each section checks the types and ranges of its settings,
however it was made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from a2fpn._serialize import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check_fields

JsonValue = None | bool | int | float | list[Any] | dict[str, Any] | str


@dataclass(frozen=True)
class ModelSection:
    """Detector to train; its classes are the categories of the training annotations.

    Args:
        name: Model name, see `a2fpn list`, or local-dir:PATH of a checkpoint.
        pretrained: Start from pretrained detector weights, see `a2fpn list --pretrained`; class-dependent layers are
            reinitialized.
        pretrained_backbone: Start from timm's ImageNet weights, downloaded once.
        backbone_weights: Start from this file of backbone weights (timm's keys) instead; works offline.
        overrides: Further arguments of a2fpn.create_model, e.g. --model.overrides.neck fpn.
    """

    name: str = "maskrcnn_a2fpn_r50"
    pretrained: bool = False
    pretrained_backbone: bool = False
    backbone_weights: str | None = None
    overrides: dict[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "model")


@dataclass(frozen=True)
class TransformsSection:
    """Augmentation of the training images, see a2fpn.data.train_transforms.

    Args:
        min_sizes: Short sides in pixels for multi-scale training, one drawn per image; empty uses the model's own.
        scale_range: Minimum and maximum random scale factor on the model's input size.
        large_scale_jitter: Minimum and maximum factor on a size that fills crop_size, e.g. 0.1 and 2; null disables.
        crop_range: Minimum and maximum fraction of each side kept by the first random crop, before resizing.
        crop_size: Maximum side of the random crop in pixels, after resizing; null keeps the whole image.
        horizontal_flip: Probability of a horizontal flip, 0 to 1.
        vertical_flip: Probability of a vertical flip, 0 to 1.
        rotate90: Probability of a rotation by 90, 180 or 270 degrees, 0 to 1.
        color_jitter: Strength of brightness, contrast, saturation and hue jitter, 0 to 1.
        min_box_size: Minimum width and height of an object in pixels, after augmentation; smaller ones are dropped.
    """

    min_sizes: tuple[int, ...] = ()
    scale_range: tuple[float, float] = (1.0, 1.0)
    large_scale_jitter: tuple[float, float] | None = None
    crop_range: tuple[float, float] = (1.0, 1.0)
    crop_size: int | None = None
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    rotate90: float = 0.0
    color_jitter: float = 0.0
    min_box_size: float = 1.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data.transforms",
            **dict.fromkeys(("min_sizes", "crop_size"), COUNT),
            **dict.fromkeys(("scale_range", "large_scale_jitter", "crop_range"), POSITIVE),
            **dict.fromkeys(("horizontal_flip", "vertical_flip", "rotate90", "color_jitter"), SHARE),
            min_box_size=NOT_NEGATIVE,
        )


@dataclass(frozen=True)
class StreamSection:
    """Training data that is not a folder, see docs/streaming.md; the validation set stays one.

    Args:
        shards: Folder or URL of shards written by `a2fpn data shard`.
        dataset: Data set of the `datasets` library: a name on the Hub, a builder such as parquet, or a folder.
        options: Further arguments of datasets.load_dataset, e.g. split and data_files.
        num_samples: Number of images, if the data set doesn't state it.
        bbox_format: Box format of the data set.
        num_keypoints: Number of keypoints per object; 0 ignores keypoints.
        split_by_file: Let each process read its own files of the data set instead of all rows.
        shuffle_buffer: Number of images in the shuffle buffer, held in memory.
    """

    shards: str | None = None
    dataset: str | None = None
    options: dict[str, JsonValue] = field(default_factory=dict)
    num_samples: int | None = None
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    num_keypoints: int = 0
    split_by_file: bool = False
    shuffle_buffer: int = 512

    def __post_init__(self) -> None:
        check_fields(self, "data.stream", num_samples=COUNT, num_keypoints=NOT_NEGATIVE, shuffle_buffer=COUNT)


@dataclass(frozen=True)
class DataSection:
    """A training and a validation set in COCO format; paths are relative to the root.

    Args:
        root: Root folder of the data set.
        format: Data set format; auto imports labels in other formats into the cache, as `a2fpn data import` does; coco
            stops with the command to run instead.
        cache: Folder of imported data sets; null uses a2fpn/imports in XDG_CACHE_HOME or ~/.cache.
        train_images: Folder of training images.
        train_annotations: COCO annotations of the training images.
        val_images: Folder of validation images.
        val_annotations: COCO annotations of the validation images.
        train_semantic: Folder of semantic maps of the training images, for htc with semantic: stuff.
        val_semantic: Folder of semantic maps of the validation images; only needed for validation losses.
        batch_size: Training batch size per process.
        eval_batch_size: Validation batch size per process.
        workers: Number of data loader workers per training process; 0 loads in the training process.
        strict: Stop at the first unreadable image or bad annotation instead of counting and skipping it.
        check_images: Number of images to open in the check before the first step; 0 disables the check.
        group_by_aspect: Batch portrait and landscape images separately to reduce padding.
        passes: Passes over the training images per epoch. Each epoch ends with a checkpoint and a loader restart,
            which is costly for small data sets.
        repeat_threshold: Oversample images with classes that occur in less than this fraction of images (LVIS); 0
            disables.
        copy_paste: Probability of copy-paste augmentation: pasting the objects of another image, 0 to 1.
        gray_bits: Bit depth of gray values in 16-bit files, 9 to 16; 12 for many microscopes. Predict with the same.
        oks_sigmas: OKS sigma of each keypoint, for keypoint AP; empty uses those of COCO's 17 keypoints.
        stream: Training data that is not a folder.
        transforms: Augmentation of the training images.
    """

    root: str
    format: Literal["coco", "auto"] = "coco"
    cache: str | None = None
    train_images: str = "images"
    train_annotations: str = "annotations/instances_train.json"
    val_images: str = "images"
    val_annotations: str = "annotations/instances_val.json"
    train_semantic: str | None = None
    val_semantic: str | None = None
    batch_size: int = 2
    eval_batch_size: int = 1
    workers: int = 2
    strict: bool = False
    check_images: int = 32
    group_by_aspect: bool = True
    passes: int = 1
    repeat_threshold: float = 0.0
    copy_paste: float = 0.0
    gray_bits: int = 16
    oks_sigmas: tuple[float, ...] = ()
    stream: StreamSection = field(default_factory=StreamSection)
    transforms: TransformsSection = field(default_factory=TransformsSection)

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data",
            **dict.fromkeys(("batch_size", "eval_batch_size", "passes"), COUNT),
            **dict.fromkeys(("workers", "check_images"), NOT_NEGATIVE),
            **dict.fromkeys(("repeat_threshold", "copy_paste"), SHARE),
            gray_bits=(9, 16),
            oks_sigmas=POSITIVE,
        )


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning-rate schedule.

    Args:
        name: Optimizer: SGD with momentum, or AdamW.
        lr: Peak learning rate for lr_batch_size images per step; scaled to the run's batch size (batch_size x
            processes x grad_accumulation).
        lr_batch_size: Total batch size that lr refers to.
        lr_scaling: Scale lr by batch size / lr_batch_size (linear), by its square root (sqrt), or not at all (none).
        momentum: SGD momentum, 0 to 1.
        weight_decay: Weight decay; not applied to biases, norms and other one-dimensional parameters.
        backbone_lr_factor: Learning rate of the backbone, relative to lr.
        layer_decay: Layer-wise learning-rate decay: factor from the neck to the backbone's last layer, and from each
            layer to the one before it, by timm's groups; 1 disables.
        warmup_steps: Number of optimizer steps of linear warmup to lr.
        warmup_factor: Learning rate of the first step, relative to lr.
        schedule: Learning-rate schedule: step multiplies by gamma at each milestone, cosine decays to final_factor.
        milestones: Milestones of the step schedule, as fractions of the run.
        gamma: Decay factor of the step schedule.
        final_factor: Final learning rate of the cosine schedule, relative to lr.
        clip_norm: Maximum gradient norm; null disables clipping.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    lr_batch_size: int = 16
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    backbone_lr_factor: float = 1.0
    layer_decay: float = 1.0
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    gamma: float = 0.1
    final_factor: float = 0.01
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim",
            **dict.fromkeys(("lr", "gamma", "layer_decay"), POSITIVE),
            **dict.fromkeys(("momentum", "warmup_factor", "milestones", "final_factor"), SHARE),
            **dict.fromkeys(("weight_decay", "backbone_lr_factor", "warmup_steps", "clip_norm"), NOT_NEGATIVE),
            lr_batch_size=COUNT,
        )


@dataclass(frozen=True)
class RunSection:
    """Length, precision, evaluation and output of the run.

    Args:
        name: Recipe name, stored in the checkpoints.
        output: Output folder for checkpoints, metrics, pictures, config.yaml and the log.
        epochs: Number of epochs, each of data.passes over the training images.
        max_steps: Stop after this many optimizer steps instead of after epochs.
        seed: Random seed.
        mixed_precision: Run the network under bf16 or fp16 autocast; weights stay in fp32.
        grad_accumulation: Number of batches per optimizer step.
        sync_losses: Normalize losses over the objects of all processes, to match training in a single process.
        checkpoint_every: Save a checkpoint every N optimizer steps, besides every epoch; 0 disables.
        evaluate_every: Evaluate every N epochs, and always after the last one.
        evaluator: Evaluation backend for the COCO metrics; all give the same results.
        val_loss: Compute the validation losses too.
        max_detections: Maximum detections per image and class in evaluation (COCO's default is 100).
        patience: Early stopping: stop after this many evaluations without improvement; 0 disables.
        log_every: Log every N optimizer steps.
        trackers: Experiment trackers to use besides metrics.jsonl: tensorboard, trackio, ...
        pictures: Number of validation images to draw after each evaluation.
        channels_last: Use the channels-last memory format.
        compile: Compile backbone, neck and dense head with torch.compile: faster steps after minutes of compilation.
        checkpoint_neck: Recompute the neck's activations in the backward pass: less memory, slower steps on a GPU; null
            does so unless compile is set.
        deterministic: Make runs on the same GPU bit-for-bit reproducible, at lower speed; warns about operations
            without a deterministic version. CPU runs always are.
        nonfinite: On a non-finite loss or gradient, stop the run and name the images, or skip the step; skip stops
            after ten in a row.
        ema: Decay of the exponential moving average of the weights, which is evaluated and saved; 0 disables.
        resume: Resume training: auto from output/last if it exists, else start a new run; true requires it; a path
            resumes from that run or checkpoint.
    """

    name: str = "custom"
    output: str = "runs/train"
    epochs: int = 12
    max_steps: int | None = None
    seed: int = 0
    mixed_precision: Literal["none", "bf16", "fp16"] = "none"
    grad_accumulation: int = 1
    sync_losses: bool = True
    checkpoint_every: int = 0
    evaluate_every: int = 1
    evaluator: Literal["auto", "hotcoco", "pycocotools"] = "auto"
    val_loss: bool = False
    max_detections: int = 100
    patience: int = 0
    log_every: int = 20
    trackers: tuple[str, ...] = ("tensorboard",)
    pictures: int = 6
    channels_last: bool = True
    compile: bool = False
    checkpoint_neck: bool | None = None
    deterministic: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    ema: float = 0.0
    resume: bool | str = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            "run",
            **dict.fromkeys(("epochs", "max_steps", "grad_accumulation", "evaluate_every", "log_every"), COUNT),
            **dict.fromkeys(("seed", "checkpoint_every", "patience", "pictures"), NOT_NEGATIVE),
            max_detections=COUNT,
            ema=SHARE,
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        data: Data set.
        model: Model.
        optim: Optimizer and learning-rate schedule.
        run: Length, precision, evaluation and output.
    """

    data: DataSection
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        check_fields(self, "")
