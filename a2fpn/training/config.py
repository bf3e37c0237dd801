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
    """The detector that is trained; its classes are the categories of the training annotations.

    Args:
        name: A registered model name, see `a2fpn list`, or local-dir:PATH of a checkpoint.
        pretrained: Start from the detector's own weights, see `a2fpn list --pretrained`; what depends on the classes
            starts anew.
        pretrained_backbone: Start from timm's ImageNet weights, downloaded once.
        backbone_weights: Start from this file of backbone weights (timm's keys) instead; needs no network.
        overrides: Further keywords of a2fpn.create_model, e.g. --model.overrides.neck fpn.
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
    """Random changes of the training images, see a2fpn.data.train_transforms.

    Args:
        min_sizes: Short sides in pixels of which one is drawn for every image (multi-scale training); empty takes the
            model's own.
        scale_range: Lowest and highest factor on the size at which the model sees an image.
        large_scale_jitter: Lowest and highest factor on a size that fills crop_size, e.g. 0.1 and 2; null is off.
        crop_range: Lowest and highest share of each side that a first random crop keeps.
        crop_size: Longest side of the random crop in pixels after resizing; null keeps the whole image.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a turn by 90, 180 or 270 degrees.
        color_jitter: Strength of the change of brightness, contrast, saturation and hue, 0 to 1.
        min_box_size: Objects of which fewer pixels are left are dropped.
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
        shards: Folder or URL of shards that `a2fpn data shard` wrote.
        dataset: A data set of the `datasets` library: a name on the Hub, a builder such as parquet, or a folder.
        options: Further arguments of datasets.load_dataset, e.g. split and data_files.
        num_samples: Images of the data set, where it does not say it itself.
        bbox_format: What the boxes of the data set hold.
        num_keypoints: Keypoints of every object of the data set; 0 does not read any.
        split_by_file: Each process reads its own files of the data set instead of all rows.
        shuffle_buffer: Images that are held in memory and shuffled.
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
        root: Folder of the data set.
        format: auto imports a folder of labels in another format into the cache, as a2fpn data import does, and trains
            on that; coco stops there and says the command.
        cache: Folder of imported data sets; null is a2fpn/imports in XDG_CACHE_HOME or ~/.cache.
        train_images: Folder of the training images.
        train_annotations: COCO JSON of the training images.
        val_images: Folder of the validation images.
        val_annotations: COCO JSON of the validation images.
        train_semantic: Folder of semantic maps of the training images, for htc with semantic: stuff.
        val_semantic: The same of the validation images; only validation losses need it.
        batch_size: Training images per process and step.
        eval_batch_size: Validation images per process and step.
        workers: Loader processes per training process; 0 loads in the training process.
        strict: Stop at the first unreadable image or annotation instead of counting and skipping it.
        check_images: Images that are opened by the check before the first step; 0 does not check.
        group_by_aspect: Put only upright or only wide images into a batch, which saves padding.
        passes: How often an epoch goes through the training images. After every epoch a checkpoint is written and the
            loader starts anew, which takes much of a short one.
        repeat_threshold: Repeat images of classes that are on less than this share of the images (LVIS); 0 does not.
        copy_paste: Probability of pasting the objects of another image onto an image.
        gray_bits: Bits that gray values of 16-bit files use, 9 to 16: 12 for many microscopes. Predict with the same.
        oks_sigmas: Per keypoint how precisely people place it, for keypoint AP; empty takes those of COCO's 17.
        stream: Training data that is not a folder.
        transforms: Random changes of the training images.
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
        name: sgd or adamw.
        lr: Peak learning rate for lr_batch_size images per step; scaled to those of the run (batch_size x processes x
            grad_accumulation).
        lr_batch_size: Images per step that lr is meant for.
        lr_scaling: linear multiplies lr by images / lr_batch_size, sqrt by its root, none takes lr as it is.
        momentum: Momentum of SGD.
        weight_decay: Decay of the weights; never of biases, norms and other one-dimensional parameters.
        backbone_lr_factor: Learning rate of the backbone relative to lr.
        layer_decay: Factor on the rate from the neck to the backbone's last layer, and from each layer to the one
            before it, by timm's groups; 1 is off.
        warmup_steps: Optimizer steps over which the rate rises linearly to lr.
        warmup_factor: Rate of the first step relative to lr.
        schedule: cosine falls to final_factor; step multiplies by gamma at each milestone.
        milestones: Where the step schedule falls, as fractions of the run.
        gamma: Factor of the step schedule.
        final_factor: Rate at the end of the cosine schedule relative to lr.
        clip_norm: Largest norm of the gradient; null does not clip.
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
        name: Name of the recipe, kept in the checkpoints.
        output: Folder for checkpoints, metrics, pictures, config.yaml and the log.
        epochs: Passes over the training images, each data.passes of them.
        max_steps: Stop after this many optimizer steps instead of after epochs.
        seed: Seed of everything random.
        mixed_precision: bf16 and fp16 run the network under autocast; weights stay in fp32.
        grad_accumulation: Batches per optimizer step.
        sync_losses: Divide losses by the objects of all processes, so that several processes learn what one would.
        checkpoint_every: Optimizer steps between two checkpoints, besides the one after every epoch; 0 is off.
        evaluate_every: Evaluate after every so many epochs, and always after the last one.
        evaluator: What computes the COCO numbers; all give the same.
        val_loss: Compute the losses of the validation images as well.
        max_detections: Detections per image that the evaluation counts (COCO's default is 100).
        patience: Stop after so many evaluations without a better result; 0 is off.
        log_every: Optimizer steps between two log entries.
        trackers: Where numbers and pictures go besides metrics.jsonl: tensorboard, trackio, ...
        pictures: Validation images drawn after every evaluation.
        channels_last: Use the channels-last memory format.
        compile: Compile backbone, neck and dense head by torch's compiler: faster steps after minutes of compiling.
        deterministic: Give the same weights to the last bit in every run on the same GPU, more slowly; a warning names
            operations that have no such form. On a CPU runs are so anyway.
        nonfinite: stop ends the run at a loss or gradient that is not finite and names the images; skip leaves the step
            out, and stops after ten in a row.
        ema: Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 is off.
        resume: auto continues from output/last where there is one and starts afresh elsewhere, true insists on it, a
            path continues from that run or checkpoint.
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
        optim: Optimizer and schedule.
        run: Run.
    """

    data: DataSection
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        check_fields(self, "")
