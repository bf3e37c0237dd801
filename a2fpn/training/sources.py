"""Data of a run: a folder, shards or a ``datasets`` data set for training, a folder for validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import a2fpn
from a2fpn._text import count_of
from a2fpn.data import (
    CocoDataset,
    CopyPaste,
    HfDataset,
    ShardDataset,
    StreamDataset,
    check_data,
    train_transforms,
)
from a2fpn.data.importers import detect
from a2fpn.data.transforms import mirrored_keypoints
from a2fpn.errors import ConfigError, DataError
from a2fpn.training.config import DataSection, ModelSection, TrainConfig
from a2fpn.training.feed import Feed, FolderFeed
from a2fpn.training.importing import VAL_SHARE
from a2fpn.training.monitor import get_logger
from a2fpn.training.streams import StreamFeed

logger = get_logger(__name__)
TrainingSet = CocoDataset | StreamDataset


def open_training_set(data: DataSection) -> TrainingSet:
    """Open the training set.

    Raises:
        ValueError: If a folder, a file, or its content is missing or wrong.
    """
    stream = data.stream
    if stream.shards and stream.dataset:
        raise ConfigError("data.stream.shards and data.stream.dataset are mutually exclusive.")
    if not stream.shards and not stream.dataset:
        return _folder(data, data.train_images, data.train_annotations, data.train_semantic)
    folder_only = {"group_by_aspect": data.group_by_aspect, "repeat_threshold": data.repeat_threshold}
    for name, value in {**folder_only, "copy_paste": data.copy_paste}.items():
        if value:
            raise ConfigError(f"data.{name} needs a folder of images; set it to {type(value)(0)} for a stream.")
    for name, value, usual in (("passes", data.passes, 1), ("gray_bits", data.gray_bits, 16)):
        if value != usual:
            raise ConfigError(f"data.{name} needs a folder of images; set it to {usual} for a stream.")
    options: dict[str, Any] = {"shuffle_buffer": stream.shuffle_buffer, "strict": data.strict}
    if stream.shards:
        return ShardDataset(stream.shards, **options)
    # Class labels of `datasets` start at 0; the validation set maps their names to categories.
    categories = _folder(data, data.val_images, data.val_annotations, None).categories
    return HfDataset.load(
        str(stream.dataset),
        options=stream.options,
        categories=categories,
        num_keypoints=stream.num_keypoints,
        num_samples=stream.num_samples,
        bbox_format=stream.bbox_format,
        split_by_file=stream.split_by_file,
        **options,
    )


def open_validation_set(data: DataSection, training_set: TrainingSet) -> CocoDataset:
    """Open the validation set, with the labels of the training set.

    Raises:
        ValueError: If a folder, a file, or its content is missing or wrong.
    """
    return _folder(data, data.val_images, data.val_annotations, data.val_semantic, categories=training_set.categories)


def _folder(data: DataSection, images: str, annotations: str, semantic: str | None, **options: Any) -> CocoDataset:
    root = Path(data.root)
    maps = root / semantic if semantic else None
    if root.is_dir() and not (root / annotations).exists():
        if annotations != data.train_annotations and (root / data.train_annotations).is_file():
            command = f"a2fpn data split {root / data.train_annotations} --output {root / 'splits'} --val {VAL_SHARE}"
            raise DataError(
                f"{root} has no {annotations}. Split the training set: {command}, then "
                "data.train_annotations=splits/instances_train.json data.val_annotations=splits/instances_val.json."
            )
        _say_how_to_import(root, annotations)
    options = {"semantic": maps, "gray_bits": data.gray_bits, "strict": data.strict, **options}
    dataset = CocoDataset(root / images, root / annotations, **options)
    if not len(dataset):
        raise ConfigError(f"{dataset.name} lists no image.")
    return dataset


def _say_how_to_import(root: Path, annotations: str) -> None:
    """Raise with the import command for a folder if it holds labels of another format or in another layout.

    Raises:
        DataError: If it does.
    """
    try:
        name = detect(root)
    except DataError:
        return  # the reader reports what is missing
    imported = f"{root.resolve()}_coco"
    raise DataError(
        f"{root} holds {name} labels and no {annotations}. Import them, and train on what that writes: "
        f"a2fpn data import {root} --output {imported} --val {VAL_SHARE} (without --val if the data has a split of "
        f"its own), then data.root={imported}. Or let the training do so: data.format=auto."
    )


def check_folder(dataset: CocoDataset, classes: TrainingSet, *, images: int) -> None:
    """Check the annotations and some image files before training, like ``a2fpn check-data``.

    Args:
        dataset: The data set to check.
        classes: The data set with the model's classes.
        images: Number of files to open.

    Raises:
        ValueError: If the data can't be trained or evaluated on, with the reason.
    """
    report = check_data(dataset.root, dataset.name, categories=classes.categories, sample=images, decode=True)
    if report.fatal:
        finding = report.fatal[0]
        raise ConfigError(f"{dataset.name}: {finding.message} {finding.advice} See a2fpn check-data.")
    for finding in report.errors:
        logger.warning("%s: %s %s See a2fpn check-data.", dataset.name, finding.message, finding.advice)


def credits_of(dataset: TrainingSet) -> dict[str, str]:
    """Return the origin stated by a data set: ``data`` (its description) and ``data_license``."""
    if isinstance(dataset, CocoDataset):
        info, licenses = dataset.coco.info, dataset.coco.licenses
    elif isinstance(dataset, ShardDataset):
        info, licenses = dataset.index.info, dataset.index.licenses
    else:
        info, licenses = None, None
    entries = licenses if isinstance(licenses, (list, tuple)) else ()
    names = [str(entry.get("name", "unnamed")) for entry in entries if isinstance(entry, Mapping)]
    description = info.get("description") if isinstance(info, Mapping) else None
    return {
        "data": str(description or Path(dataset.name).name),
        "data_license": ", ".join(names) or "not stated",
    }


def build_model(model: ModelSection, dataset: TrainingSet) -> Any:
    """Build the detector for the classes, and the named keypoints, of a data set.

    Args:
        model: The settings.
        dataset: The training set.

    Raises:
        ValueError: For an unknown name or override, or weights that don't fit.
    """
    options: dict[str, Any] = {"num_classes": len(dataset.categories), "categories": dataset.categories}
    if model.backbone_weights:
        options["backbone_weights"] = model.backbone_weights
    if dataset.num_keypoints and model.name.startswith("keypointrcnn"):
        options["num_keypoints"] = dataset.num_keypoints
        options |= {"keypoint_names": list(dataset.keypoint_names)} if dataset.keypoint_names else {}
    return a2fpn.create_model(
        model.name,
        pretrained=model.pretrained,
        pretrained_backbone=model.pretrained_backbone,
        **{**options, **model.overrides},
    )


def log_odd_plans(config: TrainConfig, model: Any, datasets: Sequence[TrainingSet], *, steps: int) -> None:
    """Log data that is not trained on, and settings that have no effect.

    Args:
        config: The settings.
        model: The detector.
        datasets: Training and validation sets.
        steps: Length of the run.
    """
    for dataset in datasets:
        masked, objects = dataset.coco.count_masks() if isinstance(dataset, CocoDataset) else (0, 0)
        if "masks" in model.target_keys and masked < objects:
            logger.warning(
                "%s: %d of %d objects have masks; the others are used for boxes only", dataset.name, masked, objects
            )
    folders = [dataset for dataset in datasets if isinstance(dataset, CocoDataset)]
    files = [{dataset.root / entry.file_name for entry in dataset.coco.images.values()} for dataset in folders]
    if len(files) > 1 and (shared := files[0] & files[1]):
        logger.warning(
            "the training and the validation set have %s in common, such as %s: the metrics will be too high; "
            "a2fpn data split makes splits without common images",
            count_of(len(shared), "image"),
            min(shared).name,
        )
    names, transforms = datasets[0].keypoint_names, config.data.transforms
    flips = transforms.horizontal_flip or transforms.vertical_flip
    if "keypoints" in model.target_keys and flips and mirrored_keypoints(names) is None:
        logger.warning(
            "Images are not flipped: the keypoint names, %s, do not distinguish left from right. Name them in pairs, "
            "such as left_eye and right_eye, in the categories' keypoints",
            ", ".join(names) or "which are missing",
        )
    warmup, found = config.optim.warmup_steps, model.config.heads.detections_per_image
    if warmup >= steps:
        logger.warning(
            "optim.warmup_steps=%d: the run has %d steps, so the learning rate never reaches optim.lr. A tenth of the "
            "run is usual: optim.warmup_steps=%d",
            warmup,
            steps,
            steps // 10,
        )
    if config.run.max_detections > found:
        logger.warning(
            "run.max_detections=%d: the model finds at most %d objects in an image; raise "
            "model.overrides.detections_per_image to find more",
            config.run.max_detections,
            found,
        )


def build_feed(config: TrainConfig, dataset: TrainingSet, model: Any, accelerator: Accelerator) -> Feed:
    """Build this process's feed of the augmented training set.

    Args:
        config: The settings.
        dataset: The training set.
        model: The detector, whose image size the augmentation varies.
        accelerator: The accelerator of the run.
    """
    data, run = config.data, config.run
    names = dataset.keypoint_names if "keypoints" in model.target_keys else None
    transforms = train_transforms(model.preprocess.target_size, keypoint_names=names, **vars(data.transforms))
    options: dict[str, Any] = {
        "batch_size": data.batch_size,
        "grad_accumulation": run.grad_accumulation,
        "workers": data.workers,
        "seed": run.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if isinstance(dataset, StreamDataset):
        return StreamFeed(dataset, transforms=transforms, **options)
    dataset.transforms = transforms
    return FolderFeed(
        CopyPaste(dataset, probability=data.copy_paste) if data.copy_paste else dataset,
        dataset,
        group_by_aspect=data.group_by_aspect,
        passes=data.passes,
        repeat_threshold=data.repeat_threshold,
        **options,
    )
