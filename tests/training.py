"""A tiny training run, and running it in processes that may be killed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import processes
from tests.coco_data import write_coco

TINY_RECIPE = """
model:
  name: maskrcnn_fpn
  overrides:
    backbone: test_efficientnet
    neck_args: {out_channels: 16}
    min_size: 64
    max_size: 128
    anchor_sizes: [[8], [16], [32], [64], [128]]
    rpn_post_nms_top_n_train: 50
    rpn_post_nms_top_n_test: 20
    rpn_batch_size: 64
    box_batch_size: 32
    box_channels: 32
    mask_channels: 16
    mask_layers: 1
    score_threshold: 0.0
    detections_per_image: 10
data:
  train_images: train/images
  train_annotations: train/annotations.json
  val_images: val/images
  val_annotations: val/annotations.json
  workers: 0
optim: {name: adamw, lr: 1.0e-3, lr_batch_size: 2, warmup_steps: 2, schedule: cosine, clip_norm: 1.0}
run: {name: tiny, epochs: 2, log_every: 1, seed: 3, pictures: 0}
"""


def tiny_run(root: Path, output: str = "run", *, size: tuple[int, int] = (64, 80)) -> list[str]:
    """Writes 4 training and 3 validation images and a recipe, if they are not there; returns the arguments."""
    if not (root / "recipe.yaml").exists():
        write_coco(root / "train", images=4, seed=0, size=size)
        write_coco(root / "val", images=3, seed=1, size=size)
        (root / "recipe.yaml").write_text(TINY_RECIPE)
    return ["--config", str(root / "recipe.yaml"), f"data.root={root}", f"run.output={root / output}"]


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


class Process(processes.Process):
    """A training in a process of its own.

    Args:
        arguments: Of the command line.
        log: A file that takes its output.
        before: Called in the process first; what can't be pickled won't do.
    """

    def __init__(self, arguments: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log = log
        super().__init__(train, (list(arguments), before), log)


def train(arguments: list[str], before: Callable[[], None] | None = None) -> None:
    """Train on the CPU and exit as the command does."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from a2fpn.training.cli import main

    if before:
        before()
    sys.exit(main(arguments))
