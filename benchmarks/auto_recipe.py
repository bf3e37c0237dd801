"""Mask AP of ``--config auto`` and of a recipe written by hand, trained for the same time on the same data.

    python -m benchmarks.auto_recipe --data DIR --backbone-weights tf_efficientnet_lite0.safetensors --minutes 15

Both sides start from the same backbone weights and are evaluated once, at the end, with as many detections per image.
A few steps of each are timed first; the automatic side then takes all its steps or those that fit the minutes, and the
other as many as fit the same time. What the data set's hand-written recipe is, :data:`HAND` says; ``--hand`` names
another, and ``--set`` changes a setting of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from a2fpn.data.operations import subset_coco
from a2fpn.training.cli import parse
from a2fpn.training.config import TrainConfig
from benchmarks import _measure as measure
from benchmarks.ablation.plan import RECIPES
from benchmarks.ablation.pool import environment
from benchmarks.gpu.record import circumstances

ON_CPU = (
    "data.batch_size=2",
    "data.passes=1",
    "optim.lr=4e-4",
    "optim.lr_scaling=none",
    "optim.warmup_steps=50",
    "optim.warmup_factor=0.01",
)
HAND: Mapping[str, tuple[str, ...]] = {
    "nuclei": ("nuclei_lite0", *ON_CPU),
    "facades": (str(RECIPES / "facades.yaml"), *ON_CPU),
    "nwpu_vhr10": (str(RECIPES / "nwpu_vhr10.yaml"), *ON_CPU),
    "mushrooms": ("dense_small_objects", "model.name=maskrcnn_a2fpn_lite0", *ON_CPU),
}
"""Recipe by hand of each data set. They were written for GPUs: batches of 16 would take too few steps on a CPU."""

METRICS = ("segm/ap", "segm/ap50", "segm/ap75", "bbox/ap")


def main(
    data: Annotated[Path, typer.Option(help="Root of a data set in COCO format.")],
    backbone_weights: Annotated[Path, typer.Option(help="File of the backbone's weights.")],
    hand: Annotated[str | None, typer.Option(help="Recipe of the other side; default: that of the data set.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value of the recipe by hand.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time limit of a training.", min=0)] = 15.0,
    seed: Annotated[int, typer.Option()] = 0,
    records: Annotated[Path, typer.Option(help="File that gets the result as a line.")] = Path("auto_recipe.jsonl"),
    quick: measure.Quick = False,
) -> None:
    """Train both sides and compare them."""
    recipe = [hand] if hand else [*HAND.get(data.name, ())]
    if not recipe:
        raise typer.BadParameter(f"--hand names the recipe to compare with; one is known for {', '.join(HAND)}.")
    arguments = {"auto": ["--config", "auto"], "hand": ["--config", *recipe, *(settings or ())]}
    common = [
        f"data.root={data.resolve()}",
        f"model.backbone_weights={backbone_weights.resolve()}",
        "model.pretrained=false",
        "model.pretrained_backbone=false",
        "data.workers=0",
        "data.check_images=0",
        "run.mixed_precision=none",
        "run.pictures=0",
        "run.trackers=[]",
        "run.evaluate_every=100000",
        f"run.seed={seed}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        planned = parse([*arguments["auto"], *common])
        common.append(f"run.max_detections={planned.run.max_detections}")
        arguments["hand"].append("run.epochs=100000")  # as many as the time allows
        few = Path(folder, "two.json")
        few.write_text(json.dumps(subset_coco(data / planned.data.val_annotations, number=2)), encoding="utf-8")
        seconds = {}
        for side, given in arguments.items():
            brief = [*given, *common, f"data.val_annotations={few}"]
            probe = train(brief, Path(folder) / f"probe_{side}", steps=2 if quick else 16)
            seconds[side] = probe["train_seconds"] / probe["steps"]
        time = min(60 * minutes, seconds["auto"] * whole(planned, data))
        rows = {}
        for side, given in arguments.items():
            steps = 2 if quick else max(1, round(time / seconds[side]))
            rows[side] = train([*given, *common], Path(folder) / side, steps=steps)
    record = {
        "data": data.name,
        "minutes": minutes,
        "seed": seed,
        "settings": {
            side: [text.replace(f"{RECIPES}{os.sep}", "") for text in given[1:]] for side, given in arguments.items()
        },
        **rows,
        **circumstances(torch.device("cpu")),
    }
    records.parent.mkdir(parents=True, exist_ok=True)
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    show(record)


def whole(config: TrainConfig, data: Path) -> int:
    """Return the steps of a run that nothing cuts short."""
    images = len(json.loads((data / config.data.train_annotations).read_text(encoding="utf-8"))["images"])
    return config.run.epochs * -(-images * config.data.passes // config.data.batch_size)


def train(arguments: Sequence[str], folder: Path, *, steps: int) -> dict[str, Any]:
    """Train in a process of its own with one thread; return its steps, seconds and AP."""
    command = [sys.executable, "-m", "a2fpn", "train", *arguments, f"run.output={folder}", f"run.max_steps={steps}"]
    measure.console().print(f"{folder.name}: {steps:,} steps", soft_wrap=True)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stderr[-2000:]}")
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ap = {name: round(epochs[-1][name], 4) for name in METRICS if name in epochs[-1]}
    return {"steps": epochs[-1]["step"], "train_seconds": round(sum(e["train_seconds"] for e in epochs), 1), **ap}


def show(record: Mapping[str, Any]) -> None:
    """Print both sides."""
    rows = []
    for side in ("auto", "hand"):
        row = record[side]
        recipe = record["settings"][side][0]
        ap = [f"{100 * row[name]:.1f}" if name in row else "" for name in METRICS]
        rows.append([side, recipe, f"{row['steps']:,}", f"{row['train_seconds']:.0f}", *ap])
    measure.print_table(
        f"{record['data']}, one thread, one seed",
        ("side", "recipe", "steps", "s", "mask AP", "50", "75", "box AP"),
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
