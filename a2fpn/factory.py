"""The one place that joins it all: names and overrides in, models out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from a2fpn._registry import Registry, did_you_mean, match_names
from a2fpn.backbones import ALIASES, TimmBackbone, pretrained_statistics, resolve_backbone_name
from a2fpn.checkpoint import CheckpointError, check_shapes, load_weights, read_checkpoint, read_weights, save_checkpoint
from a2fpn.config import (
    BackboneConfig,
    Category,
    ModelConfig,
    NeckConfig,
    from_dict,
    heads_type,
)
from a2fpn.detectors import DETECTORS, RCNN
from a2fpn.hub import HubError, Repo, download_checkpoint, is_repo_id
from a2fpn.necks import NECKS, Neck
from a2fpn.pyramid import PyramidSpec
from a2fpn.weights import PRETRAINED, find_weights

_logger = logging.getLogger(__name__)

MODELS: Registry[Callable[[], ModelConfig]] = Registry("model")


def register_model(name: str) -> Callable[[Callable[[], ModelConfig]], Callable[[], ModelConfig]]:
    """Returns a decorator that registers a function giving a :class:`ModelConfig` under a model name.

    Only models that differ from the plain ``<detector>_<neck>_<backbone>`` need it.

    Example:
        >>> @register_model("tiny_example")
        ... def tiny_example() -> ModelConfig:
        ...     return ModelConfig("tiny_example", "fasterrcnn", BackboneConfig("test_resnet"), NeckConfig("fpn"))
        >>> create_model("tiny_example", num_classes=3).config.detector
        'fasterrcnn'
    """
    return MODELS.register(name)


def _register_narrow() -> None:
    """Detectors on EfficientNet-Lite0 with a pyramid and heads as narrow as the backbone, for use on a CPU."""
    for detector, neck in itertools.product(DETECTORS, _composable_necks()):
        config = ModelConfig(
            architecture=f"{detector}_{neck}_lite0",
            detector=detector,
            backbone=BackboneConfig(ALIASES["lite0"]),
            neck=NeckConfig(neck, {"out_channels": 96}),
            heads=heads_type(detector)(box_channels=512, mask_channels=96),
        )
        register_model(config.architecture)(functools.partial(_identity, config))


def _identity(config: ModelConfig) -> ModelConfig:
    return config


def _composable_necks() -> list[str]:
    """Necks for backbones that give several levels, as every alias does."""
    return [name for name in NECKS if getattr(NECKS[name], "fuses_levels", True)]


_register_narrow()


def list_models(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """Names that :func:`create_model` knows. Any other timm backbone can be written out or passed as ``backbone``.

    Args:
        pattern: A wildcard pattern, or a part of the name.
        pretrained: Whether to list only names with pretrained weights, with their tags.

    Example:
        >>> list_models("fasterrcnn_fpn_r*")
        ['fasterrcnn_fpn_r18', 'fasterrcnn_fpn_r34', 'fasterrcnn_fpn_r50', 'fasterrcnn_fpn_r101']
    """
    if pretrained:
        return match_names(PRETRAINED, pattern)
    composed = {"_".join(parts) for parts in itertools.product(DETECTORS, _composable_necks(), ALIASES)}
    return match_names(composed | set(MODELS), pattern)


def list_necks(pattern: str = "") -> list[str]:
    """Registered neck names.

    Example:
        >>> "a2fpn" in list_necks()
        True
    """
    return NECKS.names(pattern)


def create_neck(name: str, in_spec: PyramidSpec, **options: Any) -> Neck:
    """Builds a neck.

    Args:
        name: A registered neck.
        in_spec: What the backbone gives.
        **options: The neck's own arguments (``out_channels``, ``attention``, ...).

    Raises:
        ValueError: For an unknown name or argument.

    Example:
        >>> neck = create_neck("a2fpn", PyramidSpec.from_channels([64, 128, 256, 512]), out_channels=64)
        >>> neck.out_spec.strides
        (4, 8, 16, 32, 64)
    """
    neck = NECKS[name]
    accepted = _keyword_arguments(neck)
    for option in options:
        if option not in accepted:
            raise ValueError(f"Neck {name!r} has no argument {option!r}. {did_you_mean(option, accepted)}")
    return neck(in_spec, **options)


def create_backbone(name: str, *, pretrained: bool = False, **options: Any) -> TimmBackbone:
    """Builds a backbone.

    Args:
        name: An alias or a timm name, with or without a tag.
        pretrained: Whether to load timm's ImageNet weights.
        **options: Fields of :class:`a2fpn.config.BackboneConfig`.

    Example:
        >>> create_backbone("test_resnet").out_spec.strides
        (4, 8, 16, 32)
    """
    config = from_dict(BackboneConfig, {"name": name, **options}, where="create_backbone")
    return TimmBackbone(config, pretrained=pretrained)


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    num_classes: int | None = None,
    **overrides: Any,
) -> RCNN:
    """Builds a detector.

    Args:
        name: ``<detector>_<neck>_<backbone>``, see :func:`list_models`; the backbone may be any timm name or be left
            out when ``backbone`` is given. With a tag (``maskrcnn_a2fpn_lite0.nuclei``): the model as it was trained.
            ``hf-hub:org/name@revision`` and ``local-dir:PATH`` name checkpoints, as in :func:`from_pretrained`.
        pretrained: Whether to load detector weights. No backbone weights are loaded then.
        pretrained_backbone: Whether to load ImageNet weights of the backbone; its batch norm is then frozen unless
            ``norm`` says otherwise.
        num_classes: Number of classes without background; None takes the checkpoint's, or 80. With pretrained
            weights of another number, exactly the class-dependent tensors start anew, and a log line names them.
        **overrides: ``backbone``, ``backbone_weights`` (a local file), ``neck``, ``neck_args``, ``categories``, or
            any field of :class:`~a2fpn.config.BackboneConfig`, :class:`~a2fpn.config.PreprocessConfig` and the
            detector's heads (:class:`~a2fpn.config.RCNNConfig` or what :func:`~a2fpn.config.heads_type` gives).

    Returns:
        The detector; in training mode unless ``pretrained``.

    Raises:
        ValueError: For an unknown name or override, with the closest ones, or weights that do not fit.

    Example:
        >>> model = create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=3, min_size=320).eval()
        >>> model.config.preprocess.min_size, model.neck.out_spec.names
        (320, ('p2', 'p3', 'p4', 'p5', 'p6'))
        >>> create_model("maskrcnn_a2fpm_r50")
        Traceback (most recent call last):
        ...
        ValueError: Unknown model 'maskrcnn_a2fpm_r50'. Did you mean 'maskrcnn_a2fpn_r50' or ...
    """
    folder = _prefixed_folder(name, weights=pretrained)
    if folder is not None:
        return _from_folder(folder, num_classes=num_classes, load=pretrained, overrides=overrides)
    weights = find_weights(name)
    if pretrained and weights is None:
        available = ", ".join(PRETRAINED)
        raise ValueError(f"There are no pretrained weights for {name!r}; there are some for: {available}.")
    if weights is not None and (pretrained or name == weights[0]):
        if pretrained_backbone and not pretrained:
            raise ValueError(
                f"{name!r} names trained weights. Pass pretrained=True to load them, or leave the tag out to start "
                "from a pretrained backbone."
            )
        return _from_folder(weights[1].folder, num_classes=num_classes, load=pretrained, overrides=overrides)
    backbone_weights = overrides.pop("backbone_weights", None)
    config = _parse_name(name, overrides.pop("backbone", None))
    if (pretrained_backbone or backbone_weights) and "norm" not in overrides:
        overrides["norm"] = "frozen"
    mean, std = pretrained_statistics(config.backbone.name)
    if overrides.get("in_chans", 3) == 3:
        overrides = {"mean": mean, "std": std, **overrides}
    config = _override(config, num_classes, overrides)
    return _build(config, pretrained_backbone=pretrained_backbone, backbone_weights=backbone_weights)


def from_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> RCNN:
    """Loads a detector from a folder, the Hub, or by the name of pretrained weights; nothing has to be retyped.

    Args:
        source: A folder written by :func:`save_pretrained` (also as ``local-dir:PATH``), a name of
            ``list_models(pretrained=True)``, or a repository of the Hub: ``org/name`` or ``hf-hub:org/name``, either
            with ``@revision``.
        num_classes: Another number of classes to fine-tune on; see :func:`create_model`.
        revision: Branch, tag, pull request (``refs/pr/1``) or commit on the Hub; None is the main branch.
        token: Access token of the Hub; None takes the one saved by ``hf auth login``, False sends none.
        cache_dir: Folder that downloads are kept in; None takes huggingface_hub's.
        local_files_only: Whether to take everything from that folder and ask nobody.
        **overrides: As in :func:`create_model`; only such that leave the weights' shapes alone.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: If there is neither such a folder nor such a name.
        CheckpointError: If the checkpoint is damaged, or not one of this package.
        HubError: If the Hub does not give it; its children say why.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    name = str(source)
    weights = find_weights(name)
    if Path(source).is_dir():
        folder: Path | None = Path(source)
    elif weights is not None:
        folder = weights[1].folder
    elif Path(source).is_file():
        raise ValueError(f"{name!r} is a file; give its folder. Only safetensors are loaded, never pickles.")
    else:
        folder = _prefixed_folder(name, **options)
    if folder is None and is_repo_id(name.partition("@")[0]):
        try:
            folder = download_checkpoint(Repo.parse(name, **options))
        except HubError as error:
            raise type(error)(f"There is no folder {name!r} here, and: {error}") from error
    if folder is None:
        raise ValueError(
            f"{name!r} is neither a checkpoint folder, nor a repository of the Hub ('org/name'), nor the name of "
            f"pretrained weights. {did_you_mean(name, PRETRAINED)}"
        )
    return _from_folder(folder, num_classes=num_classes, load=True, overrides=overrides)


def save_pretrained(
    model: RCNN, directory: str | Path, *, half: bool = False, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Saves a detector as ``config.json`` and ``model.safetensors``.

    Args:
        model: The detector.
        directory: Made if it does not exist.
        half: Whether matrices and kernels are stored in float16.
        metadata: JSON-able facts: metrics, recipe, data, licences.

    Returns:
        The directory.

    Example:
        >>> import tempfile
        >>> model = create_model("fasterrcnn_fpn", backbone="test_resnet", num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = from_pretrained(save_pretrained(model, folder))
        >>> again.config == model.config, again.training
        (True, False)
    """
    return save_checkpoint(directory, model.config, model.state_dict(), half=half, metadata=metadata)


def _prefixed_folder(name: str, *, weights: bool = True, **options: Any) -> Path | None:
    """The checkpoint folder that a name with a prefix stands for, downloaded if need be; None without a prefix."""
    if name.startswith("hf-hub:"):
        return download_checkpoint(Repo.parse(name.removeprefix("hf-hub:"), **options), weights=weights)
    return Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None


def _from_folder(folder: Path, *, num_classes: int | None, load: bool, overrides: Mapping[str, Any]) -> RCNN:
    checkpoint = read_checkpoint(folder)
    state = read_weights(folder, checkpoint) if load else None
    return _assemble(checkpoint.model, state, where=str(folder), num_classes=num_classes, overrides=overrides)


def _assemble(
    saved: ModelConfig,
    state: dict[str, Tensor] | None,
    *,
    where: str,
    num_classes: int | None,
    overrides: Mapping[str, Any],
) -> RCNN:
    """Builds a model as it was saved but for the overrides, with weights if there are any."""
    shapes = None if state is None else {name: tuple(x.shape) for name, x in state.items()}
    _check_buildable(saved, shapes, where)
    config = _override(saved, num_classes, overrides)
    model = _build(config)
    if state is None:
        return model
    if config.num_classes != saved.num_classes:
        fresh = model.state_dict()
        renewed = [key for key in fresh if key.startswith(model.class_dependent) and key in state]
        state |= {key: fresh[key] for key in renewed}
        _logger.warning(
            "num_classes %d -> %d: these tensors start anew: %s",
            saved.num_classes,
            config.num_classes,
            ", ".join(renewed),
        )
    load_weights(model, state)
    return model.eval()


def _check_buildable(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]] | None, where: str) -> None:
    """Builds a model without memory first: a config from anywhere may ask for any size, and for any nonsense.

    Raises:
        CheckpointError: If the config describes no model, or one of other tensors than its weights.
    """
    try:
        with torch.device("meta"), _few_parameters(_MOST_PARAMETERS if shapes is None else 10 * len(shapes) + 1000):
            own = {name: tuple(x.shape) for name, x in _build(config).state_dict().items()}
    except Exception as error:  # what foreign values make timm and torch raise cannot be foreseen
        raise CheckpointError(f"The config of {where!r} describes no model that can be built: {error}") from error
    if shapes is not None:
        check_shapes(own, shapes)


_MOST_PARAMETERS = 100_000


@contextlib.contextmanager
def _few_parameters(most: int) -> Iterator[None]:
    """Stops a construction that makes more parameter tensors than any sound model; some are made and thrown away."""
    count = itertools.count(1)

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(count) > most:
            raise ValueError(f"it has more than {most} parameters")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _build(
    config: ModelConfig, *, pretrained_backbone: bool = False, backbone_weights: str | Path | None = None
) -> RCNN:
    backbone = TimmBackbone(config.backbone, pretrained=pretrained_backbone, weights=backbone_weights)
    neck = create_neck(config.neck.name, backbone.out_spec, **config.neck.args)
    return DETECTORS[config.detector](config, backbone, neck)


def _parse_name(name: str, backbone: str | None) -> ModelConfig:
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
            raise ValueError(f"Model {name!r} needs a backbone: create_model({name!r}, backbone='r50').")
        if name == prefix or name.startswith(f"{prefix}_"):
            chosen = backbone or name.removeprefix(f"{prefix}_")
            try:
                full = resolve_backbone_name(chosen)
            except ValueError:
                if backbone is not None:
                    raise
                continue
            heads = heads_type(detector)()
            return ModelConfig(name, detector, BackboneConfig(full), NeckConfig(neck), heads=heads)
    raise ValueError(f"Unknown model {name!r}. {did_you_mean(name, list_models())}")


def _override(config: ModelConfig, num_classes: int | None, overrides: Mapping[str, Any]) -> ModelConfig:
    """A config with flat overrides applied to the part that has a field of that name."""
    sections: dict[str, Any] = {"backbone": config.backbone, "preprocess": config.preprocess, "heads": config.heads}
    owner = {f.name: key for key, part in sections.items() for f in dataclasses.fields(part) if f.name != "name"}
    own = ("neck", "neck_args", "categories")
    changed: dict[str, dict[str, Any]] = {key: {} for key in sections}
    for key, value in overrides.items():
        if key in owner:
            changed[owner[key]][key] = value
        elif key in ("backbone", "backbone_weights"):
            raise ValueError(f"The {key} of a checkpoint cannot be replaced; its own is {config.backbone.name!r}.")
        elif key not in own:
            known = [*owner, *own, "backbone", "backbone_weights", "num_classes"]
            raise ValueError(f"Unknown argument {key!r} of a model. {did_you_mean(key, known)}")
    parts = {
        key: from_dict(type(part), dataclasses.asdict(part) | changed[key], where=key) for key, part in sections.items()
    }
    neck = config.neck
    if "neck" in overrides and overrides["neck"] != neck.name:
        neck = NeckConfig(overrides["neck"], {k: v for k, v in neck.args.items() if k == "out_channels"})
    if "neck_args" in overrides:
        neck = NeckConfig(neck.name, {**neck.args, **overrides["neck_args"]})
    categories = _categories(overrides["categories"]) if "categories" in overrides else config.categories
    if num_classes is None:
        num_classes = len(categories) if "categories" in overrides else config.num_classes
    elif num_classes != config.num_classes and "categories" not in overrides:
        categories = ()
    return dataclasses.replace(config, neck=neck, num_classes=num_classes, categories=categories, **parts)


def _categories(categories: Sequence[Category | Mapping[str, Any]]) -> tuple[Category, ...]:
    return tuple(c if isinstance(c, Category) else from_dict(Category, c, where="categories") for c in categories)


def _keyword_arguments(neck: Callable[..., Neck]) -> set[str]:
    return {p.name for p in inspect.signature(neck).parameters.values() if p.kind is p.KEYWORD_ONLY}
