"""A tiny training run, and running it in processes that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
run: {name: tiny, epochs: 2, log_every: 1, seed: 3}
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


_CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once, in a process of its own
_CONTEXT.set_forkserver_preload(["tests.training", "a2fpn.training.trainer", "a2fpn.inference", "matplotlib.figure"])


class Process:
    """A training in a process of its own.

    Args:
        arguments: Of the command line.
        log: A file that takes its output.
        before: Called in the process first; what can't be pickled won't do.
    """

    def __init__(self, arguments: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log = log
        self._process = _CONTEXT.Process(target=_train, args=(list(arguments), str(log), before))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float | None = 120) -> int | None:
        """Its exit code, negative for a signal that killed it, or None if it is still running after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def _train(arguments: list[str], log: str, before: Callable[[], None] | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.set_start_method(None, force=True)  # loader processes as in a program of its own
    import torch

    from a2fpn.training.cli import main

    torch.set_num_threads(1)
    if before:
        before()
    sys.exit(main(arguments))
