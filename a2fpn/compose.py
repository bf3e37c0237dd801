"""Configurations from model names and overrides; nothing is built or read here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from a2fpn._plugins import load_plugins
from a2fpn._registry import Registry, did_you_mean
from a2fpn._serialize import from_dict
from a2fpn._words import MODEL, advice_on_model
from a2fpn.backbones import (
    ALIASES,
    find_backbone_info,
    preprocessing,
    resolve_backbone_name,
)
from a2fpn.config import BackboneConfig, Category, ModelConfig, NeckConfig, RCNNConfig, heads_type
from a2fpn.detectors import DETECTORS
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.necks import NECKS
from a2fpn.necks.neck import keyword_arguments

MODELS: Registry[Callable[[], ModelConfig]] = Registry("model")


def register_model(name: str) -> Callable[[Callable[[], ModelConfig]], Callable[[], ModelConfig]]:
    """Return a decorator that registers a function giving a :class:`ModelConfig` under a model name.

    Only models that differ from the plain ``<detector>_<neck>_<backbone>`` need it.

    Example:
        >>> @register_model("tiny_example")
        ... def tiny_example() -> ModelConfig:
        ...     return ModelConfig("tiny_example", "fasterrcnn", BackboneConfig("test_resnet"), NeckConfig("fpn"))
        >>> from a2fpn import create_model
        >>> create_model("tiny_example", num_classes=3).config.detector
        'fasterrcnn'
    """
    return MODELS.register(name)


_NARROW = {"box_channels": 512, "mask_channels": 96, "keypoint_channels": 128}


def _register_narrow() -> None:
    """Detectors on EfficientNet-Lite0 with a pyramid and heads as narrow as the backbone, for use on a CPU."""
    for detector, neck in itertools.product(DETECTORS, _composable_necks()):
        heads = heads_type(detector)
        config = ModelConfig(
            architecture=f"{detector}_{neck}_lite0",
            detector=detector,
            backbone=BackboneConfig(ALIASES["lite0"], strides=DETECTORS[detector].strides),
            neck=NeckConfig(neck, {**_neck_args(detector, neck), "out_channels": 96}),
            heads=from_dict(heads, {key: value for key, value in _NARROW.items() if key in _fields(heads)}),
        )
        register_model(config.architecture)(functools.partial(_identity, config))


def _neck_args(detector: str, neck: str) -> dict[str, Any]:
    """Return those of a detector's neck arguments that the neck accepts."""
    accepted = keyword_arguments(NECKS[neck])
    return {key: value for key, value in DETECTORS[detector].neck_args.items() if key in accepted}


def _fields(config: object) -> set[str]:
    """Names of the fields of a configuration or of its class."""
    return {f.name for f in dataclasses.fields(typing.cast(Any, config))}


def _identity(config: ModelConfig) -> ModelConfig:
    return config


def _composable_necks() -> list[str]:
    """Necks for backbones with several levels, as every alias has."""
    return [name for name in NECKS if getattr(NECKS[name], "fuses_levels", True)]


_register_narrow()


def model_names() -> set[str]:
    """Every ``<detector>_<neck>_<alias>`` and every registered model."""
    load_plugins()
    return {"_".join(parts) for parts in itertools.product(DETECTORS, _composable_necks(), ALIASES)} | set(MODELS)


def list_necks(pattern: str = "") -> list[str]:
    """Registered neck names.

    Example:
        >>> "a2fpn" in list_necks()
        True
    """
    load_plugins()
    return NECKS.names(pattern)


_GRID = 32  # pixels, the stride of the coarsest map


def attached(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Adapt a config's image sizes, preprocessing and strides to its backbone, except for what was overridden."""
    backbone = config.backbone
    found = find_backbone_info(backbone.name.partition(".")[0])
    sides = [overrides[key] for key in ("min_size", "max_size") if key in overrides]
    if found.size is not None and found.resizable and backbone.image_size is None:
        # The largest size asked for, rounded up to the stride of the coarsest level.
        side = -(-max(sides) // _GRID) * _GRID if sides else found.usual_size
        backbone = dataclasses.replace(backbone, image_size=side)
        overrides = {**({"min_size": max(sides), "max_size": max(sides)} if sides else {}), **overrides}
        config = dataclasses.replace(config, backbone=backbone)
    wanted = {key: value for key, value in preprocessing(config.backbone).items() if key not in overrides}
    own = found.strides
    if config.neck.name not in _composable_necks() and len(own) == 1 and "strides" not in overrides:
        backbone = dataclasses.replace(backbone, strides=own)
    return dataclasses.replace(config, backbone=backbone, preprocess=dataclasses.replace(config.preprocess, **wanted))


def compose(name: str, *, backbone: str | None = None, num_classes: int | None = None, **overrides: Any) -> ModelConfig:
    """Configuration of a model by name, with flat overrides as in :func:`a2fpn.create_model`.

    Raises:
        ValueError: For an unknown name or override, with the closest known ones.

    Example:
        >>> compose("fasterrcnn_fpn", backbone="test_resnet", num_classes=3, min_size=320).preprocess.min_size
        320
    """
    return attached(override(parse_name(name, backbone), num_classes, overrides), overrides)


def parse_name(name: str, backbone: str | None) -> ModelConfig:
    """Configuration of ``<detector>_<neck>_<backbone>``, of ``<detector>_<neck>`` and a backbone, or a registered name.

    Raises:
        ValueError: For an unknown name, with the closest known ones.
    """
    check_name(name, backbone)
    found = _parse(name, backbone)
    if found is None and load_plugins():
        found = _parse(name, backbone)
    if found is None:
        advice = advice_on_model(name)
        if advice is None and _is_backbone(name):
            advice = f"It is a backbone: name a detector and a neck before it, such as 'maskrcnn_fpn_{name}'."
        raise ConfigError(f"Unknown model {name!r}. {advice or did_you_mean(name, model_names())}")
    return found


def _is_backbone(name: str) -> bool:
    try:
        return bool(resolve_backbone_name(name))
    except ConfigError:
        return False


def _parse(name: str, backbone: str | None) -> ModelConfig | None:
    if name in MODELS:
        config = MODELS[name]()
        if backbone is None:
            return config
        replaced = dataclasses.replace(config.backbone, name=resolve_backbone_name(backbone))
        return dataclasses.replace(config, backbone=replaced)
    # Longest first: "a2fpn_lite" before "a2fpn".
    for detector, neck in itertools.product(DETECTORS, sorted(NECKS, key=len, reverse=True)):
        prefix = f"{detector}_{neck}"
        if name == prefix and backbone is None:
            raise ConfigError(f"Model {name!r} needs a backbone: create_model({name!r}, backbone='r50').")
        if name == prefix or name.startswith(f"{prefix}_"):
            chosen = name.removeprefix(f"{prefix}_") if backbone is None else backbone
            try:
                full = resolve_backbone_name(chosen)
            except ValueError:
                if backbone is not None:
                    raise
                continue
            return ModelConfig(
                name,
                detector,
                BackboneConfig(full, strides=DETECTORS[detector].strides),
                NeckConfig(neck, _neck_args(detector, neck)),
                heads=heads_type(detector)(),
            )
    return None


def override(config: ModelConfig, num_classes: int | None, overrides: Mapping[str, Any]) -> ModelConfig:
    """Apply flat overrides, each to the part of the config that has a field of that name."""
    _check_kinds(num_classes, overrides)
    sections: dict[str, Any] = {"backbone": config.backbone, "preprocess": config.preprocess, "heads": config.heads}
    owner = {f.name: key for key, part in sections.items() for f in dataclasses.fields(part) if f.name != "name"}
    own = ("neck", "neck_args", "categories")
    changed: dict[str, dict[str, Any]] = {key: {} for key in sections}
    for key, value in overrides.items():
        if key in owner:
            changed[owner[key]][key] = value
        elif key in ("backbone", "backbone_weights"):
            raise ConfigError(f"The {key} of a checkpoint cannot be replaced; its own is {config.backbone.name!r}.")
        elif key not in own:
            known = [*owner, *own, "backbone", "backbone_weights", "num_classes"]
            raise ConfigError(f"Unknown argument {key!r} of a model. {did_you_mean(key, known, MODEL)}")
    points = getattr(config.heads, "num_keypoints", None)
    if changed["heads"].get("num_keypoints", points) != points:
        changed["heads"].setdefault("keypoint_names", ())  # the old names are for the old number of keypoints
    parts = {
        key: from_dict(type(part), dataclasses.asdict(part) | changed[key], where=key) for key, part in sections.items()
    }
    neck = config.neck
    if "neck" in overrides and overrides["neck"] != neck.name:
        kept = {k: v for k, v in neck.args.items() if k == "out_channels"}
        neck = NeckConfig(overrides["neck"], {**_neck_args(config.detector, overrides["neck"]), **kept})
    if "neck_args" in overrides:
        neck = NeckConfig(neck.name, {**neck.args, **overrides["neck_args"]})
    categories = _categories(overrides["categories"]) if "categories" in overrides else config.categories
    if num_classes is None:
        num_classes = len(categories) if "categories" in overrides else config.num_classes
    elif num_classes != config.num_classes and "categories" not in overrides:
        categories = ()
    if num_classes != config.num_classes and isinstance(parts["heads"], RCNNConfig):
        # The unused outputs belonged to the old classes.
        parts["heads"] = dataclasses.replace(parts["heads"], unused_outputs=overrides.get("unused_outputs", 0))
    return dataclasses.replace(config, neck=neck, num_classes=num_classes, categories=categories, **parts)


def _categories(given: Sequence[Category | Mapping[str, Any] | str] | Mapping[int, str]) -> tuple[Category, ...]:
    """Convert COCO records, names (with ids from 1), or names by id to categories."""
    if isinstance(given, Mapping):
        given = [{"id": key, "name": name} for key, name in given.items()]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigTypeError(f"categories: expected a list of names or of COCO categories, got {given!r}.")
    named = [{"id": i, "name": c} if isinstance(c, str) else c for i, c in enumerate(given, start=1)]
    return tuple(c if isinstance(c, Category) else from_dict(Category, c, where="categories") for c in named)


def check_name(name: object, backbone: object) -> None:
    """Refuse modules where names are expected.

    Raises:
        TypeError: With advice.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(
            f"A model name must be a string such as 'maskrcnn_a2fpn_r50', got a {type(name).__name__}."
        )
    if backbone is not None and not isinstance(backbone, str):
        raise ConfigTypeError(
            f"backbone must be the name of a timm model, got a {type(backbone).__name__}. Register your own network "
            "with timm's register_model; see docs/extending.md."
        )


def _check_kinds(num_classes: object, overrides: Mapping[str, Any]) -> None:
    """Refuse classes and modules where names and numbers are expected.

    Raises:
        TypeError: With advice.
    """
    neck = overrides.get("neck", "")
    if not isinstance(neck, str):
        shown = neck.__name__ if isinstance(neck, type) else type(neck).__name__
        raise ConfigTypeError(
            f"neck must be a name, got {shown}. Register the class with @a2fpn.register_neck('my_neck') and pass "
            "neck='my_neck'."
        )
    if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, int)):
        raise ConfigTypeError(
            f"num_classes must be a number, got {num_classes!r}. Pass class names as categories=[...]."
        )
