"""Catalog of pretrained weights by ``model.tag``.

It lists weights inside the package, weights published by torchvision, and grafts, which are built from torchvision's
on loading. URL, hash and metrics of torchvision's weights are read from torchvision itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torchvision.models import WeightsEnum, get_model_weights

from a2fpn._registry import match_names
from a2fpn.pretrained.checkpoint import Facts, read_checkpoint

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class PretrainedModel:
    """Description of pretrained weights, available without downloading them.

    Args:
        name: ``model.tag``, for :func:`a2fpn.create_model`.
        source: Kind of source.
        origin: The file, repository or URL.
        trained: Whether they were trained in this form; False for a graft, which needs fine-tuning.
        box_ap: Box AP in 0..1; None if not measured.
        mask_ap: Mask AP in 0..1; None without masks.
        keypoint_ap: Keypoint AP in 0..1; None without keypoints.
        measured: Data set and author of the measurement; for a graft also the measured model.
        license: License of the weights as stated by their source.
    """

    name: str
    source: Literal["embedded", "hub", "torchvision"]
    origin: str
    trained: bool
    box_ap: float | None
    mask_ap: float | None
    keypoint_ap: float | None
    measured: str
    license: str


_TORCHVISION_METRICS = {"box": "box_map", "mask": "mask_map", "keypoint": "kp_map"}
_METRICS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}


def _share(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 4)


def _from_facts(name: str, source: Literal["embedded", "hub"], origin: str, facts: Facts) -> PretrainedModel:
    return PretrainedModel(
        name=name,
        source=source,
        origin=origin,
        trained=True,
        **{f"{kind}_ap": facts.metrics.get(f"{key}/ap") for kind, key in _METRICS.items()},
        measured=facts.data or "not stated",
        license=facts.license or "not stated",
    )


@dataclass(frozen=True)
class EmbeddedWeights:
    """Weights inside the package.

    Args:
        folder: Checkpoint folder inside the package.
        description: Data, license and result in one line.
    """

    folder: Path
    description: str

    def describe(self, name: str) -> PretrainedModel:
        """Describe the weights by their ``config.json``."""
        return _from_facts(name, "embedded", self.folder.name, read_checkpoint(self.folder).facts)


@dataclass(frozen=True)
class HubWeights:
    """Weights published on the Hub.

    Args:
        repo: ``org/name``.
        revision: The commit.
        sha256: Hex digest of ``model.safetensors``.
        facts: Facts of its ``config.json``, so that listing needs no network.
    """

    repo: str
    revision: str
    sha256: str
    facts: Facts

    def describe(self, name: str) -> PretrainedModel:
        """Describe the weights by the facts that are listed here."""
        return _from_facts(name, "hub", f"{self.repo}@{self.revision}", self.facts)


@dataclass(frozen=True)
class TorchvisionWeights:
    """Weights published by torchvision, converted on loading.

    Args:
        builder: Name of the function in ``torchvision.models.detection`` that builds the detector.
        frozen_eps: Epsilon of the backbone's frozen batch norm; None if its batch norm is trained. torchvision sets 0
            for its older weights after loading them, which its metadata do not state.
        tag: Name of the builder's weights.
    """

    builder: str
    frozen_eps: float | None = None
    tag: str = "COCO_V1"

    @property
    def published(self) -> WeightsEnum:
        """Entry of the weights in torchvision."""
        return get_model_weights(self.builder)[self.tag]

    @property
    def file(self) -> Path:
        """Path of the file in torch.hub's cache, whether downloaded yet or not."""
        url: str = self.published.url
        return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    def describe(self, name: str) -> PretrainedModel:
        """Describe the weights by torchvision's entry."""
        meta = self.published.meta
        ((data, metrics),) = meta["_metrics"].items()
        return PretrainedModel(
            name=name,
            source="torchvision",
            origin=self.published.url,
            trained=True,
            **{f"{kind}_ap": _share(metrics.get(key)) for kind, key in _TORCHVISION_METRICS.items()},
            measured=f"{data}, published by torchvision",
            license=meta.get("license") or "not stated by torchvision, whose code is under BSD-3-Clause",
        )


@dataclass(frozen=True)
class GraftedWeights:
    """Weights built on loading by :func:`a2fpn.convert.graft`.

    Args:
        base: Name of the weights of an FPN detector.
        neck: The neck that replaces the FPN.
    """

    base: str
    neck: str

    def describe(self, name: str) -> PretrainedModel:
        """Describe the weights before the graft."""
        base = PRETRAINED[self.base].describe(self.base)
        return replace(base, name=name, trained=False, measured=f"{base.measured}, of {self.base} before the graft")


Weights = EmbeddedWeights | HubWeights | TorchvisionWeights | GraftedWeights


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
    # In the second version of the R-CNNs the FPN has a norm, after which only a neck without a bottom-up path can be
    # initialized to an FPN.
    plain = ("a2fpn_lite", "carafe_fpn")
    for detector, possible in (("maskrcnn", plain), ("fasterrcnn", plain), ("retinanet", necks)):
        for neck in possible:
            yield f"{detector}_{neck}_r50.tv_coco_v2_graft", GraftedWeights(f"{detector}_fpn_r50.tv_coco_v2", neck)


PRETRAINED: dict[str, Weights] = {
    "maskrcnn_a2fpn_lite0.nuclei": EmbeddedWeights(
        folder=ASSETS / "maskrcnn_a2fpn_lite0.nuclei",
        description="nuclei in microscopy images (BBBC038v1, CC0), trained with the recipe nuclei_lite0",
    ),
    **_torchvision(),
    **dict(_grafts()),
}
"""Pretrained weights by name; the first tag of a model is its default. Weights from the Hub come first."""


def find_weights(name: str) -> tuple[str, Weights] | None:
    """Look up the weights of ``model.tag``, or the default ones of ``model``; None if there are none."""
    for full, weights in PRETRAINED.items():
        if name in (full, full.partition(".")[0]):
            return full, weights
    return None


def list_pretrained(pattern: str = "") -> list[PretrainedModel]:
    """List pretrained weights with their descriptions, without network access.

    Args:
        pattern: A wildcard pattern, or a part of the name.

    Example:
        >>> [(row.name, row.source, row.box_ap) for row in list_pretrained("maskrcnn_fpn")]
        [('maskrcnn_fpn_r50.tv_coco', 'torchvision', 0.379), ('maskrcnn_fpn_r50.tv_coco_v2', 'torchvision', 0.474)]
    """
    return [PRETRAINED[name].describe(name) for name in match_names(PRETRAINED, pattern)]
