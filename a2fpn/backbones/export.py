"""Export of a detector's backbone to a folder that timm loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor

from a2fpn.backbones.timm_backbone import TimmBackbone
from a2fpn.config import PreprocessConfig
from a2fpn.errors import ConfigError

_logger = logging.getLogger(__name__)


def export_backbone(
    backbone: TimmBackbone, directory: str | Path, *, preprocess: PreprocessConfig | None = None
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` in timm's own format, without this package's necks and heads.

    ``timm.create_model("local-dir:DIRECTORY", pretrained=True, features_only=True)`` then returns the same maps; after
    ``hf upload org/name DIRECTORY`` so does ``hf-hub:org/name``. Layers that a detector does not use, such as a final
    norm, are omitted if timm loads the rest without them. Otherwise they are written untrained, and a log line names
    them.

    Args:
        backbone: The backbone of a detector, trained or not.
        directory: Created if it does not exist.
        preprocess: Source of the stored mean, standard deviation and interpolation; None for those of timm's weights.

    Returns:
        The directory.

    Raises:
        ValueError: If timm's constructor cannot build the network.

    Example:
        >>> import tempfile
        >>> from a2fpn.config import BackboneConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_backbone(TimmBackbone(BackboneConfig("test_resnet")), folder)
        ...     body = timm.create_model(f"local-dir:{path}", pretrained=True, features_only=True)
        >>> body.feature_info.reduction()
        [2, 4, 8, 16, 32]
    """
    config = backbone.config
    if config.norm == "gn" or config.stride_in_1x1:
        option = "norm='gn'" if config.norm == "gn" else "stride_in_1x1=True"
        raise ConfigError(f"timm's {backbone.name!r} has no option for {option}, so it cannot load this backbone.")
    options = {**backbone._switches(), "in_chans": config.in_chans}
    whole = timm.create_model(backbone.name, num_classes=0, **options)
    # timm's wrappers add a prefix to names, and some join two parts with an underscore.
    flat = {key.replace(".", "_"): key for key in whole.state_dict()}
    state: dict[str, Tensor] = {}
    for name, x in backbone.body.state_dict().items():
        key = flat.get(name.replace(".", "_")) or flat[name.partition(".")[2].replace(".", "_")]
        state[key] = x.detach().cpu().contiguous()
        module, _, tensor = name.rpartition(".")
        if tensor == "running_var":
            # timm's constructors use their own epsilon: the variance absorbs the difference to ours.
            ours: Any = backbone.body.get_submodule(module)
            theirs: Any = whole.get_submodule(key.rpartition(".")[0])
            state[key] = state[key] + (ours.eps - theirs.eps)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    wanted = {key: getattr(preprocess, key) for key in ("mean", "std", "interpolation")} if preprocess else None
    save_config_for_hf(whole, str(directory / "config.json"), model_args=options, data_config=wanted)
    _save(state, directory)
    try:
        timm.create_model(f"local-dir:{directory}", pretrained=True, features_only=True)
    except RuntimeError:
        # Most constructors require every tensor, used or not.
        rest = {key: x for key, x in whole.state_dict().items() if key not in state}
        _save(state | rest, directory)
        _logger.warning(
            "The detector does not use %s of %s; they are untrained in %s. Use features_only=True.",
            ", ".join(rest),
            backbone.name,
            directory,
        )
    return directory


def _save(state: Mapping[str, Tensor], directory: Path) -> None:
    save_file(dict(state), directory / "model.safetensors", metadata={"format": "pt"})
