"""Detectors by name, from a folder or from the Hub."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from a2fpn._registry import did_you_mean, match_names
from a2fpn.build import build_model, trained_backbone_fields
from a2fpn.compose import compose, model_names, override, parse_name
from a2fpn.config import ModelConfig
from a2fpn.convert.graft import graft, graft_config
from a2fpn.convert.torchvision import published_config, torchvision_state
from a2fpn.detectors import Detector
from a2fpn.errors import CheckpointError, HubError, HubIntegrityError
from a2fpn.pretrained.catalog import PRETRAINED, GraftedWeights, HubWeights, TorchvisionWeights, Weights, find_weights
from a2fpn.pretrained.checkpoint import check_shapes, load_weights, read_checkpoint, read_weights, save_checkpoint
from a2fpn.pretrained.hub import Repo, download_checkpoint, is_repo_id
from a2fpn.pretrained.torchvision import read_torchvision

_logger = logging.getLogger(__name__)


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
    return match_names(model_names(), pattern)


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
    config = override(saved, num_classes, overrides)
    model = build_model(config)
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
            own = {name: tuple(x.shape) for name, x in build_model(config).state_dict().items()}
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
