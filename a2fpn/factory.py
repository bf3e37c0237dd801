"""The one place that joins it all: names and overrides in, models out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from a2fpn._registry import Registry, did_you_mean, match_names
from a2fpn.backbones import (
    ALIASES,
    TimmBackbone,
    find_attachment,
    preprocessing,
    resolve_backbone_name,
    weights_licence,
)
from a2fpn.checkpoint import CheckpointError, check_shapes, load_weights, read_checkpoint, read_weights, save_checkpoint
from a2fpn.config import (
    BackboneConfig,
    Category,
    ModelConfig,
    NeckConfig,
    RCNNConfig,
    from_dict,
    heads_type,
)
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.hub import HubError, HubIntegrityError, Repo, download_checkpoint, is_repo_id
from a2fpn.necks import NECKS, create_neck
from a2fpn.necks.neck import keyword_arguments
from a2fpn.weights import (
    PRETRAINED,
    GraftedWeights,
    HubWeights,
    TorchvisionWeights,
    Weights,
    find_weights,
    read_torchvision,
)

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
    """What a detector wants of a neck, as far as the neck has such arguments."""
    accepted = keyword_arguments(NECKS[neck])
    return {key: value for key, value in DETECTORS[detector].neck_args.items() if key in accepted}


def _fields(config: object) -> set[str]:
    """Names of the fields of a configuration or of its class."""
    return {f.name for f in dataclasses.fields(typing.cast(Any, config))}


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


def create_backbone(
    name: str,
    *,
    levels: Sequence[int] = (4, 8, 16, 32),
    pretrained: bool = False,
    weights: str | Path | None = None,
    **options: Any,
) -> TimmBackbone:
    """Builds a backbone.

    Args:
        name: An alias or a timm name, with or without a tag; see :func:`a2fpn.list_backbones`.
        levels: Strides of the maps, increasing powers of two. What the network lacks is made from its nearest map.
        pretrained: Whether to load the weights that timm has for the name; batch norm is then frozen unless ``norm``
            says otherwise.
        weights: A local file of weights to load instead.
        **options: Fields of :class:`a2fpn.config.BackboneConfig`.

    Raises:
        ValueError: For an unknown name or option, a network that can't be attached, or weights that don't fit.

    Example:
        >>> backbone = create_backbone("test_resnet", levels=(8, 16))
        >>> list(backbone.out_spec.items())
        [('c3', LevelSpec(channels=48, stride=8)), ('c4', LevelSpec(channels=192, stride=16))]
    """
    if pretrained or weights is not None:
        options = _of_trained(name) | options
    config = from_dict(BackboneConfig, {"name": name, "strides": levels, **options}, where="create_backbone")
    return TimmBackbone(config, pretrained=pretrained, weights=weights)


def _of_trained(backbone: str) -> dict[str, Any]:
    """Fields of a backbone that come with pretrained weights, unless they are set."""
    return {"norm": "frozen", "license": weights_licence(backbone)}


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    num_classes: int | None = None,
    **overrides: Any,
) -> Detector:
    """Builds a detector.

    Args:
        name: ``<detector>_<neck>_<backbone>``, see :func:`list_models`; the backbone may be any timm name or be left
            out when ``backbone`` is given. With a tag of :func:`a2fpn.list_pretrained` (``maskrcnn_fpn_r50.tv_coco``):
            the model as it was trained.
            ``hf-hub:org/name@revision`` and ``local-dir:PATH`` name checkpoints, as in :func:`from_pretrained`.
        pretrained: Whether to load detector weights; without a tag the first that are listed for the model. No
            backbone weights are loaded then. Those of torchvision are fetched once into torch.hub's cache and
            converted; a graft of them on another neck is told by a log line.
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
        raise ValueError(f"There are no pretrained weights for {name!r}. {did_you_mean(name, PRETRAINED)}")
    if weights is not None and (pretrained or name == weights[0]):
        if pretrained_backbone and not pretrained:
            raise ValueError(
                f"{name!r} names trained weights. Pass pretrained=True to load them, or leave the tag out to start "
                "from a pretrained backbone."
            )
        return _from_weights(*weights, num_classes=num_classes, load=pretrained, overrides=overrides)
    backbone_weights = overrides.pop("backbone_weights", None)
    config = _parse_name(name, overrides.pop("backbone", None))
    if pretrained_backbone or backbone_weights is not None:
        overrides = _of_trained(config.backbone.name) | overrides
    config = _attached(_override(config, num_classes, overrides), overrides)
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
) -> Detector:
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
        return _from_weights(*weights, num_classes=num_classes, load=True, overrides=overrides, **options)
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
    model: Detector, directory: str | Path, *, half: bool = False, metadata: Mapping[str, Any] | None = None
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


def _from_folder(folder: Path, *, num_classes: int | None, load: bool, overrides: Mapping[str, Any]) -> Detector:
    checkpoint = read_checkpoint(folder)
    state = read_weights(folder, checkpoint) if load else None
    return _assemble(checkpoint.model, state, where=str(folder), num_classes=num_classes, overrides=overrides)


def _from_weights(
    name: str,
    weights: Weights,
    *,
    num_classes: int | None,
    load: bool,
    overrides: Mapping[str, Any],
    **options: Any,
) -> Detector:
    config, state = _read(weights, load=load, **options)
    if load and isinstance(weights, GraftedWeights):
        _logger.warning(
            "%s is a graft, not a detector that was trained with neck %s: the weights of %s in that neck, set up to "
            "compute the same, ready to be fine-tuned. For that detector itself: create_model(%r, pretrained=True).",
            name,
            weights.neck,
            weights.base,
            weights.base,
        )
    return _assemble(config, state, where=name, num_classes=num_classes, overrides=overrides)


def _read(weights: Weights, *, load: bool, **options: Any) -> tuple[ModelConfig, dict[str, Tensor] | None]:
    """The configuration of pretrained weights, and the tensors if they are wanted."""
    # Not at the top: most converters build models with this module.
    from a2fpn.convert.graft import graft, graft_config
    from a2fpn.convert.torchvision import published_config, torchvision_state

    state: dict[str, Tensor] | None = None
    if isinstance(weights, GraftedWeights):
        base, tensors = _read(PRETRAINED[weights.base], load=load, **options)
        config = graft_config(base, target=weights.neck)
        if tensors is not None:
            state = graft(tensors, target=weights.neck, strides=base.backbone.strides, **base.neck.args)
        return config, state
    if isinstance(weights, TorchvisionWeights):
        config = published_config(weights)
        if load:
            found = read_torchvision(weights, local_files_only=options.get("local_files_only", False))
            state = torchvision_state(found, config)
        return config, state
    if isinstance(weights, HubWeights):
        folder = download_checkpoint(Repo(weights.repo, **{**options, "revision": weights.revision}), weights=load)
    else:
        folder = weights.folder
    checkpoint = read_checkpoint(folder)
    if isinstance(weights, HubWeights) and checkpoint.sha256 != weights.sha256:
        raise HubIntegrityError(
            f"{weights.repo!r} at revision {weights.revision!r} is not what this version of a2fpn lists: its weights "
            f"have the sha256 {checkpoint.sha256}, expected {weights.sha256}."
        )
    return checkpoint.model, read_weights(folder, checkpoint) if load else None


def _assemble(
    saved: ModelConfig,
    state: dict[str, Tensor] | None,
    *,
    where: str,
    num_classes: int | None,
    overrides: Mapping[str, Any],
) -> Detector:
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
    load_weights(model, _with_counters_of(model.backbone.state_dict(prefix="backbone."), state))
    return model.eval()


def _with_counters_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with exactly the batch counters of a backbone: those of frozen batch norm and trained go into each other.

    Nothing reads the counters but a batch norm without momentum.
    """
    fitting = {
        key: value
        for key, value in state.items()
        if key in own or not (key.startswith("backbone.") and key.endswith(".num_batches_tracked"))
    }
    return fitting | {key: x for key, x in own.items() if key.endswith(".num_batches_tracked") and key not in state}


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
    elif sum(map(math.prod, own.values())) > _MOST_NUMBERS:
        raise CheckpointError(
            f"The config of {where!r} describes a model of more than {_MOST_NUMBERS:,} numbers, and nothing shows that "
            "there are weights for it: load it with pretrained=True."
        )


_MOST_PARAMETERS = 100_000
_MOST_NUMBERS = 2**29
"""Of a model that a config alone asks for; 2 GB."""


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
) -> Detector:
    backbone = TimmBackbone(config.backbone, pretrained=pretrained_backbone, weights=backbone_weights)
    neck = create_neck(config.neck.name, backbone.out_spec, **config.neck.args)
    return DETECTORS[config.detector](config, backbone, neck)


def _attached(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """A config with what its backbone wants of images and gives to a neck, but for what was asked for."""
    wanted = {key: value for key, value in preprocessing(config.backbone).items() if key not in overrides}
    backbone = config.backbone
    own = find_attachment(backbone.name.partition(".")[0]).strides
    if config.neck.name not in _composable_necks() and len(own) == 1 and "strides" not in overrides:
        backbone = dataclasses.replace(backbone, strides=own)
    return dataclasses.replace(config, backbone=backbone, preprocess=dataclasses.replace(config.preprocess, **wanted))


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
            return ModelConfig(
                name,
                detector,
                BackboneConfig(full, strides=DETECTORS[detector].strides),
                NeckConfig(neck, _neck_args(detector, neck)),
                heads=heads_type(detector)(),
            )
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
    points = getattr(config.heads, "num_keypoints", None)
    if changed["heads"].get("num_keypoints", points) != points:
        changed["heads"].setdefault("keypoint_names", ())  # they named the old ones
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
        # They stood for what the old classes left out.
        parts["heads"] = dataclasses.replace(parts["heads"], unused_outputs=overrides.get("unused_outputs", 0))
    return dataclasses.replace(config, neck=neck, num_classes=num_classes, categories=categories, **parts)


def _categories(categories: Sequence[Category | Mapping[str, Any]]) -> tuple[Category, ...]:
    return tuple(c if isinstance(c, Category) else from_dict(Category, c, where="categories") for c in categories)
