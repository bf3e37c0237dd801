"""Which pretrained weights exist, by ``model.tag``, and how torchvision's are fetched.

Nothing is listed that does not exist: what comes with the package, what torchvision has published, and grafts, which
are made of torchvision's on the spot. Of torchvision's weights everything (address, hash, metrics) is read from
torchvision's own records.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from a2fpn._registry import match_names
from a2fpn.checkpoint import CheckpointError, Facts, file_sha256, read_checkpoint
from a2fpn.hub import (
    HubAccessError,
    HubCacheError,
    HubIntegrityError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)

ASSETS = Path(__file__).parent / "assets"
PATIENCE = 10.0
"""Seconds that a server may keep silent before a download counts as broken."""


@dataclass(frozen=True)
class WeightsConfig:
    """Weights inside the package.

    Args:
        folder: Checkpoint folder inside the package.
        description: Data, licence and result in one line.
    """

    folder: Path
    description: str


@dataclass(frozen=True)
class HubWeights:
    """Weights that were published on the Hub.

    Args:
        repo: ``org/name``.
        revision: The commit.
        sha256: Hex digest of ``model.safetensors``.
        facts: Those of its ``config.json``, so that listing needs no network.
    """

    repo: str
    revision: str
    sha256: str
    facts: Facts


@dataclass(frozen=True)
class TorchvisionWeights:
    """Weights that torchvision has published, converted when they are loaded.

    Args:
        builder: Name of the function in ``torchvision.models.detection`` that builds the detector.
        frozen_eps: Epsilon of the backbone's frozen batch norm; None where its batch norm is trained. torchvision sets
            0 for its older weights after loading them, which no record says.
        tag: Which of the builder's weights.
    """

    builder: str
    frozen_eps: float | None = None
    tag: str = "COCO_V1"

    @property
    def published(self) -> WeightsEnum:
        """The record that torchvision keeps of them."""
        return get_model_weights(self.builder)[self.tag]

    @property
    def file(self) -> Path:
        """Where torch.hub keeps the file, or will."""
        url: str = self.published.url
        return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@dataclass(frozen=True)
class GraftedWeights:
    """Weights made on the spot by :func:`a2fpn.convert.graft`.

    Args:
        base: Name of the weights of an FPN detector.
        neck: What takes the FPN's place.
    """

    base: str
    neck: str


Weights = WeightsConfig | HubWeights | TorchvisionWeights | GraftedWeights


def _torchvision() -> dict[str, Weights]:
    mobilenet = "fasterrcnn_mobilenet_v3_large"
    return {
        "maskrcnn_fpn_r50.tv_coco": TorchvisionWeights("maskrcnn_resnet50_fpn", frozen_eps=0.0),
        "maskrcnn_fpn_r50.tv_coco_v2": TorchvisionWeights("maskrcnn_resnet50_fpn_v2"),
        "fasterrcnn_fpn_r50.tv_coco": TorchvisionWeights("fasterrcnn_resnet50_fpn", frozen_eps=0.0),
        "fasterrcnn_fpn_r50.tv_coco_v2": TorchvisionWeights("fasterrcnn_resnet50_fpn_v2"),
        "fasterrcnn_fpn_mobilenetv3_large_100.tv_coco": TorchvisionWeights(f"{mobilenet}_fpn", frozen_eps=1e-5),
        "fasterrcnn_fpn_mobilenetv3_large_100.tv_coco_320": TorchvisionWeights(f"{mobilenet}_320_fpn", frozen_eps=1e-5),
        "keypointrcnn_fpn_r50.tv_coco": TorchvisionWeights("keypointrcnn_resnet50_fpn", frozen_eps=0.0),
        "retinanet_fpn_r50.tv_coco": TorchvisionWeights("retinanet_resnet50_fpn", frozen_eps=0.0),
        "retinanet_fpn_r50.tv_coco_v2": TorchvisionWeights("retinanet_resnet50_fpn_v2"),
        "fcos_fpn_r50.tv_coco": TorchvisionWeights("fcos_resnet50_fpn", frozen_eps=1e-5),
    }


def _grafts() -> Iterator[tuple[str, Weights]]:
    necks = ("a2fpn", "a2fpn_lite", "pafpn", "pafpn_mgc", "carafe_fpn")
    for detector in ("maskrcnn", "fasterrcnn", "keypointrcnn", "retinanet", "fcos"):
        for neck in necks:
            yield f"{detector}_{neck}_r50.tv_coco_graft", GraftedWeights(f"{detector}_fpn_r50.tv_coco", neck)
    # In the second version of the R-CNNs the FPN has a norm, behind which only a neck without a bottom-up path can
    # begin as an FPN.
    plain = ("a2fpn_lite", "carafe_fpn")
    for detector, possible in (("maskrcnn", plain), ("fasterrcnn", plain), ("retinanet", necks)):
        for neck in possible:
            yield f"{detector}_{neck}_r50.tv_coco_v2_graft", GraftedWeights(f"{detector}_fpn_r50.tv_coco_v2", neck)


PRETRAINED: dict[str, Weights] = {
    "maskrcnn_a2fpn_lite0.nuclei": WeightsConfig(
        folder=ASSETS / "maskrcnn_a2fpn_lite0.nuclei",
        description="nuclei in microscopy images (BBBC038v1, CC0), trained with train/recipes/nuclei_lite0.yaml",
    ),
    **_torchvision(),
    **dict(_grafts()),
}
"""Pretrained weights by name; the first tag of a model is its default. Weights from the Hub go first."""


def find_weights(name: str) -> tuple[str, Weights] | None:
    """The weights of ``model.tag``, or the default ones of ``model``; None where there are none."""
    for full, weights in PRETRAINED.items():
        if name in (full, full.partition(".")[0]):
            return full, weights
    return None


# What there is


@dataclass(frozen=True)
class PretrainedModel:
    """What is known of pretrained weights without fetching them.

    Args:
        name: ``model.tag``, for :func:`a2fpn.create_model`.
        source: Where they come from.
        origin: The file, repository or address.
        trained: Whether they were trained as they are; False for a graft, which is to be fine-tuned.
        box_ap: Box AP in 0..1; None if it was not measured.
        mask_ap: Mask AP in 0..1; None if it has no masks.
        keypoint_ap: Keypoint AP in 0..1; None if it has no keypoints.
        measured: On what and by whom; for a graft also of what.
        licence: Of the weights, as far as their source says.
    """

    name: str
    source: Literal["embedded", "hub", "torchvision"]
    origin: str
    trained: bool
    box_ap: float | None
    mask_ap: float | None
    keypoint_ap: float | None
    measured: str
    licence: str


def list_pretrained(pattern: str = "") -> list[PretrainedModel]:
    """All pretrained weights and what is known of them; nothing is fetched.

    Args:
        pattern: A wildcard pattern, or a part of the name.

    Example:
        >>> [(row.name, row.source, row.box_ap) for row in list_pretrained("maskrcnn_fpn")]
        [('maskrcnn_fpn_r50.tv_coco', 'torchvision', 0.379), ('maskrcnn_fpn_r50.tv_coco_v2', 'torchvision', 0.474)]
    """
    return [_describe(name, PRETRAINED[name]) for name in match_names(PRETRAINED, pattern)]


def _describe(name: str, weights: Weights) -> PretrainedModel:
    if isinstance(weights, GraftedWeights):
        base = _describe(weights.base, PRETRAINED[weights.base])
        measured = f"{base.measured}, of {weights.base} before the graft"
        return PretrainedModel(**{**vars(base), "name": name, "trained": False, "measured": measured})
    if isinstance(weights, TorchvisionWeights):
        meta = weights.published.meta
        ((data, metrics),) = meta["_metrics"].items()
        return PretrainedModel(
            name=name,
            source="torchvision",
            origin=weights.published.url,
            trained=True,
            **{f"{kind}_ap": _share(metrics.get(key)) for kind, key in _TORCHVISION_METRICS.items()},
            measured=f"{data}, published by torchvision",
            licence=meta.get("license") or "not stated by torchvision, whose code is under BSD-3-Clause",
        )
    embedded = isinstance(weights, WeightsConfig)
    facts = read_checkpoint(weights.folder).facts if isinstance(weights, WeightsConfig) else weights.facts
    return PretrainedModel(
        name=name,
        source="embedded" if embedded else "hub",
        origin=str(weights.folder.name) if isinstance(weights, WeightsConfig) else f"{weights.repo}@{weights.revision}",
        trained=True,
        **{f"{kind}_ap": facts.metrics.get(f"{key}/ap") for kind, key in _METRICS.items()},
        measured=facts.data or "not stated",
        licence=facts.licence or "not stated",
    )


_TORCHVISION_METRICS = {"box": "box_map", "mask": "mask_map", "keypoint": "kp_map"}
_METRICS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}


def _share(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 4)


# Fetching torchvision's


class Download(NamedTuple):
    """What is fetched.

    Args:
        what: The weights, for messages.
        url: From where.
        file: To where.
    """

    what: str
    url: str
    file: Path


def read_torchvision(weights: TorchvisionWeights, *, local_files_only: bool = False) -> dict[str, Tensor]:
    """The state dict of a torchvision detector, from torch.hub's cache or downloaded into it.

    The file must have the hash that its name ends with, also when it comes from the cache; one that has not is
    downloaded once more. Nothing but tensors is unpickled.

    Args:
        weights: Which.
        local_files_only: Whether to take the file from the cache and ask nobody; so it is with ``HF_HUB_OFFLINE=1``.

    Returns:
        The tensors, by torchvision's names.

    Raises:
        HubError: If it cannot be had; its children say why.
        CheckpointError: If the file holds anything but tensors.
    """
    from huggingface_hub.constants import is_offline_mode

    wanted = Download(f"{weights.builder}, {weights.tag}", weights.published.url, weights.file)
    digest = wanted.file.stem.rpartition("-")[2]
    if not (wanted.file.is_file() and file_sha256(wanted.file).startswith(digest)):
        if local_files_only or is_offline_mode():
            reason = "local_files_only=True" if local_files_only else "offline mode is on (HF_HUB_OFFLINE)"
            raise HubOfflineError(_cannot(wanted, reason))
        with _explained(wanted):
            wanted.file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(wanted.url, str(wanted.file), digest, progress=True)
    try:
        # It is there: this only reads it, and would say on standard output what it downloads.
        state = torch.hub.load_state_dict_from_url(wanted.url, map_location="cpu", check_hash=True, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{str(wanted.file)!r} holds more than tensors, or is damaged, and is not loaded: {reason}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{str(wanted.file)!r} holds no state dict but a {type(state).__name__}.")
    return dict(state)


def _cannot(wanted: Download, reason: str) -> str:
    lacking = "damaged" if wanted.file.is_file() else "not"
    return (
        f"The weights of torchvision's {wanted.what} are {lacking} in torch.hub's cache, and cannot be downloaded from "
        f"{wanted.url}: {reason}. Download this file elsewhere and put it at {wanted.file}"
    )


@contextlib.contextmanager
def _explained(wanted: Download) -> Iterator[None]:
    """Turns what a download raises into a :class:`HubError`, and does not wait for ever for a silent server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    except urllib.error.HTTPError as error:
        kind = {401: HubAccessError, 403: HubAccessError, 404: HubNotFoundError, 410: HubNotFoundError}
        raise kind.get(error.code, HubServerError)(
            _cannot(wanted, f"the server answered {error.code} {error.reason}")
        ) from error
    except urllib.error.URLError as error:
        raise HubOfflineError(_cannot(wanted, f"it cannot be reached ({error.reason})")) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise HubServerError(_cannot(wanted, f"the connection broke ({type(error).__name__})")) from error
    except OSError as error:
        raise HubCacheError(_cannot(wanted, error.strerror or str(error))) from error
    except RuntimeError as error:
        # torch.hub's only one: the hash. Nothing was kept.
        raise HubIntegrityError(_cannot(wanted, f"what comes from there is another file ({error})")) from error
    finally:
        socket.setdefaulttimeout(before)
