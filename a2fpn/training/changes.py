"""Changes of settings, data or classes when a run is resumed.

Every change either applies from then on and is logged in one line, or is refused with a way out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a2fpn._serialize import from_dict, migrate_keys, to_dict
from a2fpn.config import ModelConfig
from a2fpn.data import CocoDataset, ShardDataset
from a2fpn.data.images import image_path
from a2fpn.errors import ConfigError, ImageError
from a2fpn.pretrained.checkpoint import file_sha256
from a2fpn.training.config import TrainConfig
from a2fpn.training.generations import Generation
from a2fpn.training.settings import flat, setting_names
from a2fpn.training.sources import TrainingSet
from a2fpn.training.state import as_plain

_ANOTHER_MODEL = "Set it back, or train the other model in another run.output"
_FROM_WEIGHTS = "model.name=local-dir:{folder} model.pretrained=true run.output=ANOTHER_FOLDER"

REFUSED = {
    "model.name": _ANOTHER_MODEL,
    "model.pretrained": "A resumed run uses its own weights. Set it back, or start another run in another run.output",
    "model.pretrained_backbone": "A resumed run uses its own weights. Set it back, or start another run in another "
    "run.output",
    "model.backbone_weights": "A resumed run uses its own weights. Name a file of the same content, or start another "
    "run in another run.output",
    "model.overrides": _ANOTHER_MODEL,
    "optim.name": f"Set it back, or start another run from these weights: {_FROM_WEIGHTS}",
}
"""Settings that can't change within a run, and the way out."""

CONTINUES = (
    "model.overrides.grad_checkpointing",
    *(
        "data.format",
        "data.cache",
        "data.root",
        "data.train_images",
        "data.train_annotations",
        "data.val_images",
        "data.val_annotations",
    ),
    *("data.train_semantic", "data.val_semantic", "data.batch_size", "data.eval_batch_size", "data.workers"),
    *("data.strict", "data.check_images", "data.group_by_aspect", "data.passes", "data.repeat_threshold"),
    *("data.copy_paste", "data.gray_bits", "data.oks_sigmas"),
    *("data.stream.shards", "data.stream.dataset", "data.stream.options", "data.stream.num_samples"),
    *("data.stream.bbox_format", "data.stream.num_keypoints", "data.stream.split_by_file"),
    "data.stream.shuffle_buffer",
    *("data.transforms.min_sizes", "data.transforms.scale_range", "data.transforms.large_scale_jitter"),
    *("data.transforms.crop_range", "data.transforms.crop_size", "data.transforms.horizontal_flip"),
    *("data.transforms.vertical_flip", "data.transforms.rotate90", "data.transforms.color_jitter"),
    "data.transforms.min_box_size",
    *("optim.lr", "optim.lr_batch_size", "optim.lr_scaling", "optim.momentum", "optim.weight_decay"),
    *("optim.backbone_lr_factor", "optim.layer_decay", "optim.warmup_steps", "optim.warmup_factor"),
    *("optim.schedule", "optim.milestones", "optim.gamma", "optim.final_factor", "optim.clip_norm"),
    *("run.name", "run.output", "run.epochs", "run.max_steps", "run.seed", "run.mixed_precision"),
    *("run.grad_accumulation", "run.sync_losses", "run.checkpoint_every", "run.evaluate_every", "run.evaluator"),
    *("run.val_loss", "run.max_detections", "run.patience", "run.log_every", "run.trackers", "run.pictures"),
    *("run.channels_last", "run.compile", "run.checkpoint_neck", "run.deterministic", "run.nonfinite", "run.ema"),
    "run.resume",
)
"""Settings whose new value applies from then on."""

_FREE = "backbone.grad_checkpointing"
"""The field of a model's configuration that does not affect its results."""


def refused(setting: str) -> str | None:
    """Return the way out for a setting that can't change within a run, None for one that can.

    Example:
        >>> refused("optim.lr") is None, refused("model.overrides.neck") is None
        (True, False)
    """
    name = setting
    while name:
        if name in CONTINUES:
            return None
        if name in REFUSED:
            return REFUSED[name]
        name = name.rpartition(".")[0]
    raise KeyError(setting)


def changed_settings(source: Generation, config: TrainConfig, content: Mapping[str, Any]) -> list[str]:
    """Compare the settings with those of a generation.

    Args:
        source: The generation.
        config: The new settings.
        content: See :func:`content_of`.

    Returns:
        A line for each setting that changed.

    Raises:
        ConfigError: If one can't change within a run.
    """
    old, new = flat(_known(source.record.settings)), flat(as_plain(config))
    lines = []
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        way_out = refused(name)
        same_content = name in content and content[name] == source.record.content.get(name)
        if way_out and not same_content:
            raise ConfigError(
                f"{name} was {before!r} in {source.folder} and can't become {now!r} in the same run. "
                f"{way_out.format(folder=source.folder)}."
            )
        lines.append(f"Setting changed: {name}: {before} -> {now}, from step {source.state.step + 1} on.")
    return lines


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings of another version: removed settings are dropped, new ones get their defaults."""
    names = set(setting_names())
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 4)}

    def keep(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in nested.items():
            name = f"{prefix}{key}"
            if name in names:
                yield key, value
            elif name in parts and isinstance(value, Mapping):
                yield key, dict(keep(value, f"{name}."))

    return as_plain(from_dict(TrainConfig, dict(keep(migrate_keys(settings), "")), where="settings"))


def check_model(source: Generation, model: ModelConfig) -> None:
    """Compare the model with that of a generation.

    Raises:
        ConfigError: If the model or its classes differ.
    """
    before = source.record.model
    if before.categories != model.categories:
        classes = [", ".join(f"{c.name} ({c.id})" for c in config.categories) for config in (before, model)]
        raise ConfigError(
            f"The classes of the training set were {classes[0]} in {source.folder} and are {classes[1]} now. Set "
            "data.train_annotations back, or start another run from these weights, which re-initializes the layers "
            f"that depend on the classes: {_FROM_WEIGHTS.format(folder=source.folder)}."
        )
    old, new = flat(to_dict(before)), flat(to_dict(model))
    changed = [
        f"{name}: {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)
    ]
    changed = [line for line in changed if not line.startswith(f"{_FREE}:")]
    if changed:
        raise ConfigError(
            f"The model is not the one in {source.folder}: {'; '.join(changed)}. Set back what changed it, or train it "
            "in another run.output."
        )


def content_of(config: TrainConfig, train_set: TrainingSet, val_set: CocoDataset) -> dict[str, Any]:
    """Hashes of the files named by settings, by setting, and the numbers of images."""
    weights = config.model.backbone_weights
    known = weights is not None and Path(weights).is_file()  # otherwise building the model raises the error
    return {
        "training": {"images": len(train_set), "sha256": _hash_of(train_set)},
        "validation": {"images": len(val_set), "sha256": _hash_of(val_set)},
        **({"model.backbone_weights": file_sha256(Path(str(weights)))} if known else {}),
    }


def changed_data(source: Generation, content: Mapping[str, Any]) -> list[str]:
    """Return a line for each data set whose annotations differ from those of a generation."""
    lines = []
    for part in ("training", "validation"):
        before, now = source.record.content.get(part, {}), content[part]
        if before != now:
            lines.append(
                f"The {part} annotations changed: {before.get('images')} -> {now['images']} images, sha256 "
                f"{str(before.get('sha256'))[:12]} -> {now['sha256'][:12]}."
            )
    return lines


def judged_by(config: TrainConfig, val_set: CocoDataset, metric: str) -> str:
    """Hash of everything but the weights that affects evaluation: results are comparable only if it is equal.

    Images count as changed if a file size differs, not if they are in another folder.
    """
    sizes = [_bytes_of(val_set.root, entry.file_name) for entry in val_set.coco.images.values()]
    parts = [metric, _hash_of(val_set), sizes, config.data.gray_bits, config.run.max_detections, config.data.oks_sigmas]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bytes_of(root: Path, file_name: str) -> int:
    """Size of an image file; -1 if it can't be read."""
    try:
        return image_path(root, file_name).stat().st_size
    except (ImageError, OSError):
        return -1


def _hash_of(dataset: TrainingSet) -> str:
    if isinstance(dataset, CocoDataset):
        return file_sha256(Path(dataset.name))
    parts = to_dict(dataset.index) if isinstance(dataset, ShardDataset) else [dataset.name, len(dataset)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
