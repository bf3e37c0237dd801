"""Metadata of an exported file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch

from a2fpn._serialize import to_dict
from a2fpn._version import __version__
from a2fpn.detectors import Detector
from a2fpn.inference.exported import FACTS, METADATA_VERSION


def describe(detector: Detector, *, dtype: str, outputs: Sequence[str]) -> dict[str, str]:
    """Build the metadata of a file: plain text, or JSON for several values.

    ``categories`` are the names in the order of the labels; ``config`` is the configuration of the detector;
    ``weights_sha256`` is the hash of its state dict as a safetensors file.

    Args:
        detector: The exported detector.
        dtype: Dtype of the input.
        outputs: Names of the outputs.
    """
    config, rule = detector.config, detector.rule
    state = {name: x.detach().cpu().contiguous() for name, x in detector.state_dict().items()}
    facts: dict[str, Any] = {
        "a2fpn_export": METADATA_VERSION,
        "a2fpn_version": __version__,
        "architecture": config.architecture,
        "categories": json.dumps([category.name for category in config.labeled_categories]),
        "category_ids": json.dumps([category.id for category in config.labeled_categories]),
        "config": json.dumps(to_dict(config)),
        "detections_per_image": rule.detections_per_image,
        "input": dtype,
        "mask_paste": detector.mask_paste,
        "nms_threshold": rule.nms_threshold,
        "outputs": json.dumps(list(outputs)),
        "score_threshold": rule.score_threshold,
        "weights_sha256": hashlib.sha256(safetensors.torch.save(state, metadata={"format": "pt"})).hexdigest(),
    }
    return {name: str(facts[name]) for name in FACTS}
