"""Which pretrained weights exist, by ``model.tag``. Nothing is listed that does not exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class WeightsConfig:
    """One set of pretrained weights.

    Args:
        folder: Checkpoint folder inside the package.
        description: Data, licence and result in one line.
    """

    folder: Path
    description: str


PRETRAINED = {
    "maskrcnn_a2fpn_lite0.nuclei": WeightsConfig(
        folder=ASSETS / "maskrcnn_a2fpn_lite0.nuclei",
        description="nuclei in microscopy images (BBBC038v1, CC0), trained with train/recipes/nuclei_lite0.yaml",
    ),
}
"""Pretrained weights by name; the first tag of a model is its default."""


def find_weights(name: str) -> tuple[str, WeightsConfig] | None:
    """The weights of ``model.tag``, or the default ones of ``model``; None where there are none."""
    for full, weights in PRETRAINED.items():
        if name in (full, full.partition(".")[0]):
            return full, weights
    return None
