"""Construction and loading of detectors by name, from a folder or from the Hub."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from a2fpn._registry import did_you_mean, match_names
from a2fpn._words import advice_on_model
from a2fpn.build import build_model, trained_backbone_fields
from a2fpn.compose import check_name, compose, model_names, override, parse_name
from a2fpn.config import FORMAT_VERSION, ModelConfig
from a2fpn.convert.graft import graft, graft_config
from a2fpn.convert.torchvision_config import published_config
from a2fpn.convert.torchvision_state import torchvision_state
from a2fpn.detectors import Detector
from a2fpn.errors import CheckpointError, ConfigError, ConfigTypeError, HubError, HubIntegrityError
from a2fpn.layers import positional_keys
from a2fpn.pretrained.catalog import (
    PRETRAINED,
    EmbeddedWeights,
    GraftedWeights,
    HubWeights,
    TorchvisionWeights,
    find_weights,
)
from a2fpn.pretrained.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_checkpoint,
    read_tensors,
    read_weights,
    save_checkpoint,
)
from a2fpn.pretrained.hub import download_checkpoint
from a2fpn.pretrained.hub_client import Repo, is_repo_id
from a2fpn.pretrained.provenance import Provenance, fingerprint, merged_metadata
from a2fpn.pretrained.torchvision import read_torchvision

_logger = logging.getLogger(__name__)


def list_models(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """List model names for :func:`create_model`. Any other timm backbone can be spelled out or passed as ``backbone``.

    Args:
        pattern: A wildcard pattern, or a part of the name.
        pretrained: Whether to list only names with pretrained weights, with their tags.

    Example:
        >>> list_models("fasterrcnn_fpn_r*")
        ['fasterrcnn_fpn_r18', 'fasterrcnn_fpn_r34', 'fasterrcnn_fpn_r50', 'fasterrcnn_fpn_r101']
    """
    if pretrained:
        return match_names(PRETRAINED, pattern)
    return match_names(model_names(), pattern)


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    num_classes: int | None = None,
    **overrides: Any,
) -> Detector:
    """Build a detector.

    Args:
        name: ``<detector>_<neck>_<backbone>``, see :func:`list_models`; the backbone may be any timm name, or omitted
            if ``backbone`` is given. With a tag of :func:`a2fpn.list_pretrained` (``maskrcnn_fpn_r50.tv_coco``):
            the model as it was trained.
            ``hf-hub:org/name@revision`` and ``local-dir:PATH`` name checkpoints, as in :func:`from_pretrained`.
        pretrained: Whether to load detector weights; without a tag, the first listed for the model. Backbone weights
            are not loaded then. Those of torchvision are downloaded once to torch.hub's cache and converted; grafting
            them onto another neck is logged.
        pretrained_backbone: Whether to load ImageNet weights of the backbone; its batch norm is then frozen unless
            ``norm`` says otherwise.
        num_classes: Number of classes without background; None for the checkpoint's, or 80. With pretrained weights of
            another number, only the class-dependent tensors are reinitialized, and a log line names them.
        **overrides: ``backbone``, ``backbone_weights`` (a local file), ``neck``, ``neck_args``, ``categories``, or
            any field of :class:`~a2fpn.config.BackboneConfig`, :class:`~a2fpn.config.PreprocessConfig` and the
            detector's heads (:class:`~a2fpn.config.RCNNConfig` or the result of :func:`~a2fpn.config.heads_type`).

    Returns:
        The detector; in training mode unless ``pretrained``.

    Raises:
        ValueError: For an unknown name or override, with the closest known ones, or weights that do not fit.

    Example:
        >>> model = create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=3, min_size=320).eval()
        >>> model.config.preprocess.min_size, model.neck.out_spec.names
        (320, ('p2', 'p3', 'p4', 'p5', 'p6'))
        >>> create_model("maskrcnn_a2fpm_r50")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: Unknown model 'maskrcnn_a2fpm_r50'. Did you mean 'maskrcnn_a2fpn_r50' or ...
    """
    for argument, value in {"pretrained": pretrained, "pretrained_backbone": pretrained_backbone}.items():
        if not isinstance(value, bool):
            raise ConfigTypeError(
                f"{argument} must be True or False, got {value!r}. Load a checkpoint with from_pretrained(FOLDER), "
                "weights of a backbone with backbone_weights=FILE."
            )
    check_name(name, overrides.get("backbone"))
    given = _prefixed(name, load=pretrained)
    if given is not None:
        return _assemble(given, where=name, num_classes=num_classes, overrides=overrides)
    weights = find_weights(name)
    if pretrained and weights is None:
        raise ConfigError(f"There are no pretrained weights for {name!r}. {_advice(name)}")
    if weights is not None and (pretrained or name == weights[0]):
        if pretrained_backbone and not pretrained:
            raise ConfigError(
                f"{name!r} names trained weights. Pass pretrained=True to load them, or omit the tag to start "
                "from a pretrained backbone."
            )
        listed = read_pretrained(weights[1], load=pretrained)
        return _assemble(listed, where=weights[0], num_classes=num_classes, overrides=overrides)
    backbone_weights = overrides.pop("backbone_weights", None)
    if pretrained_backbone or backbone_weights is not None:
        backbone = parse_name(name, overrides.get("backbone")).backbone.name
        overrides = trained_backbone_fields(backbone) | overrides
    config = compose(name, num_classes=num_classes, **overrides)
    return build_model(config, pretrained_backbone=pretrained_backbone, backbone_weights=backbone_weights)


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
    """Load a detector from a folder, the Hub, or by the name of pretrained weights.

    Args:
        source: A folder written by :func:`save_pretrained` (also as ``local-dir:PATH``), a name of
            ``list_models(pretrained=True)``, or a repository of the Hub: ``org/name`` or ``hf-hub:org/name``, either
            with ``@revision``.
        num_classes: Another number of classes to fine-tune on; see :func:`create_model`.
        revision: Branch, tag, pull request (``refs/pr/1``) or commit on the Hub; None is the main branch.
        token: Access token of the Hub; None for the one saved by ``hf auth login``, False sends none.
        cache_dir: Folder of the download cache; None for huggingface_hub's.
        local_files_only: Whether to use the cache only, without network requests.
        **overrides: As in :func:`create_model`, if they do not change the weights' shapes.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: If there is neither such a folder nor such a name.
        CheckpointError: If the checkpoint is damaged, or not one of this package.
        HubError: If it can't be downloaded; subclasses give the reason.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigTypeError(
            f"A checkpoint must be a folder, a repository of the Hub or a name, got a {type(source).__name__}."
        )
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    name = str(source)
    listed = find_weights(name)
    if Path(source).is_dir():
        weights: Weights | None = _from_folder(Path(source), load=True)
    elif listed is not None:
        name = listed[0]
        weights = read_pretrained(listed[1], load=True, **options)
    elif Path(source).is_file():
        ours = Path(source).name in (CONFIG_FILE, WEIGHTS_FILE)
        advice = f"give its folder, {str(Path(source).parent)!r}" if ours else _CONVERT
        raise ConfigError(f"{name!r} is a file; {advice}. Only safetensors are loaded, never pickles.")
    else:
        weights = _prefixed(name, load=True, **options)
    if weights is None and is_repo_id(name.partition("@")[0]):
        try:
            weights = _from_hub(Repo.parse(name, **options), load=True)
        except HubError as error:
            raise type(error)(f"No local folder {name!r}, and: {error}") from error
    if weights is None:
        raise ConfigError(
            f"{name!r} is neither a checkpoint folder, nor a repository of the Hub ('org/name'), nor the name of "
            f"pretrained weights. {_advice(name)}"
        )
    return _assemble(weights, where=name, num_classes=num_classes, overrides=overrides)


def save_pretrained(
    model: Detector, directory: str | Path, *, half: bool = False, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Save a detector as ``config.json`` and ``model.safetensors``.

    Metadata of the checkpoint that the model was loaded from (licenses, recipe, data) are saved too. Its metrics are
    kept only if weights and settings have not changed; otherwise they are stored under ``derived_from``.

    Args:
        model: The detector.
        directory: Created if it does not exist.
        half: Whether to store matrices and kernels in float16.
        metadata: JSON-serializable facts: metrics, recipe, data, licenses; they override known ones.

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
    facts = merged_metadata(model, metadata)
    return save_checkpoint(directory, model.config, model.state_dict(), half=half, metadata=facts)


_CONVERT = "convert it first: a2fpn hub convert FILE --from torchvision|detectron2|mmdet --output FOLDER"


def _advice(name: str) -> str:
    """Advice for a name without pretrained weights."""
    if name.endswith((".pt", ".pth", ".pkl", ".ckpt", ".bin")):
        return f"File not found. For a weights file, {_CONVERT}."
    return advice_on_model(name) or did_you_mean(name, PRETRAINED)


class Weights(NamedTuple):
    """Configuration and state dict that a model is built from.

    Args:
        config: The saved configuration.
        state: Its tensors; None if not requested.
        format_version: Format version of the checkpoint.
        metadata: Metadata of the checkpoint.
    """

    config: ModelConfig
    state: dict[str, Tensor] | None
    format_version: int = FORMAT_VERSION
    metadata: Mapping[str, Any] = MappingProxyType({})


def _prefixed(name: str, *, load: bool, **options: Any) -> Weights | None:
    """Load the checkpoint of a prefixed name, downloaded if necessary; None without a prefix."""
    if name.startswith("hf-hub:"):
        return _from_hub(Repo.parse(name.removeprefix("hf-hub:"), **options), load=load)
    return _from_folder(Path(name.removeprefix("local-dir:")), load=load) if name.startswith("local-dir:") else None


def _from_folder(folder: Path, *, load: bool) -> Weights:
    checkpoint = read_checkpoint(folder)
    state = read_weights(folder, checkpoint) if load else None
    return Weights(checkpoint.model, state, checkpoint.format_version, checkpoint.metadata)


def _from_hub(repo: Repo, *, load: bool, sha256: str | None = None) -> Weights:
    folder, checkpoint = download_checkpoint(repo, weights=load)
    if sha256 is not None and checkpoint.sha256 != sha256:
        raise HubIntegrityError(
            f"{repo.id!r} at revision {repo.revision!r} does not match the catalog of this version of a2fpn: its "
            f"weights have the sha256 {checkpoint.sha256}, expected {sha256}."
        )
    state = read_tensors(folder / WEIGHTS_FILE) if load else None
    return Weights(checkpoint.model, state, checkpoint.format_version, checkpoint.metadata)


@functools.singledispatch
def read_pretrained(weights: Any, *, load: bool, **options: Any) -> Weights:
    """Read the configuration of listed weights, and optionally the tensors.

    Args:
        weights: One of :data:`~a2fpn.pretrained.catalog.PRETRAINED`.
        load: Whether to read the tensors.
        **options: Fields of :class:`~a2fpn.pretrained.hub.Repo` except its id.
    """
    raise NotImplementedError(type(weights))


@read_pretrained.register
def _(weights: EmbeddedWeights, *, load: bool, **options: Any) -> Weights:
    return _from_folder(weights.folder, load=load)


@read_pretrained.register
def _(weights: HubWeights, *, load: bool, **options: Any) -> Weights:
    repo = Repo(weights.repo, **{**options, "revision": weights.revision})
    return _from_hub(repo, load=load, sha256=weights.sha256)


@read_pretrained.register
def _(weights: TorchvisionWeights, *, load: bool, **options: Any) -> Weights:
    config = published_config(weights)
    if not load:
        return Weights(config, None)
    found = read_torchvision(weights, local_files_only=options.get("local_files_only", False))
    return Weights(config, torchvision_state(found, config))


@read_pretrained.register
def _(weights: GraftedWeights, *, load: bool, **options: Any) -> Weights:
    base, tensors, *_ = read_pretrained(PRETRAINED[weights.base], load=load, **options)
    config = graft_config(base, target=weights.neck)
    if tensors is None:
        return Weights(config, None)
    _logger.warning(
        "The neck %s is grafted, not trained: it is initialized from %s with nearly the same outputs, to be "
        "fine-tuned. For the trained detector itself: create_model(%r, pretrained=True).",
        weights.neck,
        weights.base,
        weights.base,
    )
    return Weights(config, graft(tensors, target=weights.neck, **base.neck.args))


def _assemble(
    weights: Weights,
    *,
    where: str,
    num_classes: int | None,
    overrides: Mapping[str, Any],
) -> Detector:
    """Build a saved model with overrides, and load its weights, if any."""
    saved, state, version, metadata = weights
    config = override(saved, num_classes, overrides)
    try:
        model = build_model(config)
    except ConfigError as error:
        if overrides:  # which may have caused it
            raise
        raise CheckpointError(f"The config of {where!r} is not a valid model: {error}") from error
    if state is None:
        return model
    if version == 1:
        names = {counted: named for named, counted in positional_keys(model).items()}
        state = {names.get(key, key): x for key, x in state.items()}
    if config.num_classes != saved.num_classes:
        fresh = model.state_dict()
        renewed = [key for key in fresh if key.startswith(model.class_dependent) and key in state]
        state |= {key: fresh[key] for key in renewed}
        _logger.warning(
            "num_classes %d -> %d: re-initialized tensors: %s",
            saved.num_classes,
            config.num_classes,
            ", ".join(renewed),
        )
    load_weights(model, _with_counters_of(model.backbone.state_dict(prefix="backbone."), state))
    model.provenance = Provenance(metadata, saved, fingerprint(model.state_dict()))
    return model.eval()


def _with_counters_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapt the batch counters of weights to a backbone, so that weights of frozen and trained batch norm both load.

    Only a batch norm without momentum uses the counters.
    """
    fitting = {
        key: value
        for key, value in state.items()
        if key in own or not (key.startswith("backbone.") and key.endswith(".num_batches_tracked"))
    }
    return fitting | {key: x for key, x in own.items() if key.endswith(".num_batches_tracked") and key not in state}
