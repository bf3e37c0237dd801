"""Provenance of a model, passed on from one checkpoint to the next."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a2fpn.config import ModelConfig
from a2fpn.detectors import Detector

MEASURED = ("metrics", "max_detections", "count_threshold")
"""Facts that hold only for the weights and settings that they were measured with."""
OF_RUN = (
    *("settings", "version", "steps", "planned_steps", "epochs", "seed", "ema", "precision", "device", "torch"),
    *("commit", "run_metrics"),
)
"""Facts of the run that trained the weights, which do not hold for a model that was fine-tuned from them."""
OF_DATA = ("data", "data_license", "recipe")
"""Facts that are replaced together: new data without a license must not inherit the old license."""


@dataclass(frozen=True)
class Provenance:
    """Metadata of the checkpoint that a model was loaded from.

    Args:
        metadata: Metadata of the checkpoint.
        config: Configuration in the checkpoint.
        fingerprint: :func:`fingerprint` of the weights as loaded.
    """

    metadata: Mapping[str, Any]
    config: ModelConfig
    fingerprint: int

    def facts(self, model: Detector) -> dict[str, Any]:
        """Facts that still hold for a model.

        If weights, classes or settings differ from the checkpoint, facts of the measurement and of the training run
        move to ``derived_from``, so that they are not mistaken for the model's own.
        """
        if model.config == self.config and fingerprint(model.state_dict()) == self.fingerprint:
            return dict(self.metadata)
        former = (*MEASURED, *OF_RUN)
        kept = {key: value for key, value in self.metadata.items() if key not in former}
        moved = {key: self.metadata[key] for key in former if key in self.metadata}
        origin = {"architecture": self.config.architecture, "num_classes": self.config.num_classes, **moved}
        return {**kept, "derived_from": origin} if self.metadata else {}


def merged_metadata(model: Detector, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metadata to save with a model: its own that still hold, overridden by the given ones."""
    given = dict(given or {})
    provenance = getattr(model, "provenance", None)  # an optimized model has none, and can't be saved
    known = provenance.facts(model) if isinstance(provenance, Provenance) else {}
    if any(key in given for key in OF_DATA):
        former = {key: known.pop(key) for key in OF_DATA if key in known}
        if "derived_from" in known:
            known["derived_from"] = {**known["derived_from"], **former}
    return {**known, **given}


def fingerprint(state: Mapping[str, Tensor]) -> int:
    """Checksum of tensors and their names, independent of device and memory format.

    Example:
        >>> a, b = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
        >>> fingerprint(a) == fingerprint(dict(a)), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    code = 0
    for name in sorted(state):
        x = state[name].detach().cpu().contiguous()
        code = zlib.crc32(x.flatten().view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), code))
    return code
