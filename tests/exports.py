"""Small detectors that find something in noise, and one of them as an exported file."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

import a2fpn
from a2fpn.config import Category
from a2fpn.detectors import Detector
from tests.helpers import randomize, tiny_model
from tests.test_cli import run

CATEGORIES = tuple(Category(index, f"shape {index}") for index in (7, 23, 90))
NOTHING = torch.full((3, 64, 96), 128, dtype=torch.uint8)


def detector(name: str, **overrides: Any) -> Detector:
    """A small detector that finds something in noise."""
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 200, "resize": "shortest_edge", "categories": CATEGORIES}
    model = tiny_model(name, **(options | overrides)).eval().requires_grad_(False)
    randomize(model, std=0.05)
    for key, parameter in model.named_parameters():
        if ("cls_score" in key or "cls_logits" in key) and parameter.ndim > 1:
            parameter.mul_(20)  # scores that differ
    return model


def noise(size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def between(model: Detector) -> float:
    """A score that much in noise has and nothing in gray, or the least of images."""
    with torch.no_grad():
        images = [NOTHING, *(noise((64, 96), seed) for seed in range(6))]
        best = [float(model([x], paste_masks=False)[0]["scores"][0]) for x in images]
    return min(best) + 0.2 * (max(best) - min(best))


class Exported(NamedTuple):
    model: Detector
    checkpoint: Path
    photos: Path
    path: Path
    text: str


def exported_once(factory: pytest.TempPathFactory) -> Exported:
    """A checkpoint, exported and compared by the command; once for all workers, for it takes long."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported_once"
    model = detector("maskrcnn_fpn", score_threshold=between(detector("maskrcnn_fpn", score_threshold=0.0)))
    checkpoint, photos, path, said = (folder / name for name in ("checkpoint", "photos", "model.onnx", "said.txt"))
    with FileLock(f"{folder}.lock"):
        if not said.exists():
            a2fpn.save_pretrained(model, checkpoint)
            photos.mkdir()
            for seed, (height, width) in enumerate([(64, 96), (50, 40)]):
                picture = noise((height, width), seed + 1).permute(1, 2, 0).numpy()
                Image.fromarray(picture).save(photos / f"{seed}.png")
            said.write_text(run("export", checkpoint, "--output", path, "--verify", photos))
    return Exported(model, checkpoint, photos, path, said.read_text())
