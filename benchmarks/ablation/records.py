"""Records of finished and failed runs: one JSON line each, on the disk before the next run is looked at."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import a2fpn
from a2fpn.data import CocoDataset
from a2fpn.training.cli import parse
from a2fpn.training.config import TrainConfig
from a2fpn.training.feed import FolderFeed
from benchmarks.ablation.plan import Circumstances, Plan, Run, sha256
from benchmarks.necks import count_gmacs

METRIC = re.compile(r"(bbox|segm)/ap(50|75|_small|_medium|_large)?")
TAIL = 15  # lines of the log that a failed run leaves in its record


@dataclass(frozen=True)
class Record:
    """A run as it ended.

    Args:
        arm: Name of the arm.
        seed: Seed.
        control: Name of the arm it is compared with.
        status: ``"done"`` or ``"failed"``.
        settings: What is particular to the arm.
        fingerprint: Of what all runs share, see :meth:`Plan.fingerprint`.
        circumstances: See :class:`~benchmarks.ablation.plan.Circumstances`.
        plan: Names of recipe and data, the shared settings, and the resolved settings of the training.
        seen: Hash of the images, their order and the start of each augmentation's random numbers.
        weights: Hash of the file of backbone weights.
        curve: Step, epoch, losses and average precision at every evaluation; the last entry is the result.
        costs: ``parameters``, ``gmacs`` of backbone and neck, ``gmacs_size`` in pixels, ``seconds_per_step``,
            ``train_seconds``, ``images_per_second``.
        log: Last lines of the log of a failed run.
    """

    arm: str
    seed: int
    control: str
    status: str
    settings: tuple[str, ...]
    fingerprint: str
    circumstances: dict[str, Any]
    plan: dict[str, Any]
    seen: str = ""
    weights: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """Arm and seed."""
        return self.arm, self.seed

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return int(self.curve[-1]["step"])

    @property
    def comparable(self) -> tuple[str, str, str, int]:
        """Return the part of a record in which runs of one seed must agree to be paired."""
        return self.fingerprint, self.seen, self.weights, self.steps

    def value(self, metric: str) -> float | None:
        """The last average precision in percent; None where the data have no such object."""
        value = self.curve[-1].get(metric, -1.0)
        return None if value < 0 else 100 * value


def read_records(path: Path) -> dict[tuple[str, int], Record]:
    """Return the latest record of every arm and seed; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return {record.key: record for record in records}


def append_record(record: Record, path: Path) -> None:
    """Add a line, and return when the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def failed(run: Run, plan: Plan, circumstances: Circumstances) -> Record:
    """Return the record of a run that failed."""
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return Record(**_common(run, plan, circumstances), status="failed", log=lines)


def finished(run: Run, plan: Plan, circumstances: Circumstances) -> Record:
    """Return the record of a run that came to its end."""
    epochs = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = parse(["--config", str(run.folder / "config.yaml")])
    curve = [
        {key: value for key, value in epoch.items() if key in ("step", "epoch", "train/loss") or METRIC.fullmatch(key)}
        for epoch in epochs
        if any(METRIC.fullmatch(key) for key in epoch)
    ]
    return Record(
        **_common(run, plan, circumstances),
        status="done",
        seen=seen(config, epochs=int(epochs[-1]["epoch"])),
        weights=sha256(plan.weights) if plan.weights else "",
        curve=curve,
        costs={**_pace(epochs), **_size(run.folder / "last")},
    )


def _common(run: Run, plan: Plan, circumstances: Circumstances) -> dict[str, Any]:
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "control": run.arm.control,
        "settings": run.arm.settings,
        "fingerprint": plan.fingerprint(),
        "circumstances": circumstances.as_json(),
        "plan": {"recipe": plan.recipe.stem, "data": plan.data.name, "settings": list(plan.settings)} | _resolved(run),
    }


def _resolved(run: Run) -> dict[str, Any]:
    """The settings that matter for reading the result, without the folders of one machine."""
    file = run.folder / "config.yaml"
    if not file.exists():  # failed before it wrote any
        return {}
    config = dataclasses.asdict(parse(["--config", str(file)]))
    del config["data"]["root"], config["run"]["output"], config["model"]["backbone_weights"]
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return {"config": plain}


def _pace(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Costs of the training; medians, since an epoch that was resumed is counted in part."""
    steps = [later["step"] - earlier["step"] for earlier, later in zip([{"step": 0}, *epochs], epochs, strict=False)]
    seconds = [epoch["train_seconds"] / count for epoch, count in zip(epochs, steps, strict=True)]
    return {
        "seconds_per_step": round(statistics.median(seconds), 5),
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in epochs),
        "train_seconds": round(sum(epoch["train_seconds"] for epoch in epochs), 1),
        "eval_seconds": round(sum(epoch.get("eval_seconds", 0.0) for epoch in epochs), 1),
    }


def _size(checkpoint: Path) -> dict[str, float]:
    model = a2fpn.from_pretrained(checkpoint)
    side = model.config.preprocess.min_size
    images = torch.zeros(1, 3, side, side)
    with torch.inference_mode():
        gmacs = count_gmacs(lambda: model.neck(model.backbone(images)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "gmacs": round(gmacs, 3), "gmacs_size": side}


class _Draws(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Samples that hold their index and the first random number that their augmentation would draw."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return torch.rand(()), {"index": index}


def seen(config: TrainConfig, *, epochs: int) -> str:
    """Return a hash of what a training is shown: files, order, augmentation settings and their random numbers.

    The order comes from the trainer's own feed for these settings.

    Args:
        config: The settings that the training wrote.
        epochs: Epochs that it began.
    """
    data, root = config.data, Path(config.data.root)
    coco = CocoDataset(root / data.train_images, root / data.train_annotations)
    feed = FolderFeed(
        _Draws(),
        coco,
        batch_size=data.batch_size,
        grad_accumulation=config.run.grad_accumulation,
        seed=config.run.seed,
        group_by_aspect=data.group_by_aspect,
        repeat_threshold=data.repeat_threshold,
    )
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(data.transforms), data.copy_paste]).encode())
    names = [coco.coco.images[image_id].file_name for image_id in coco.image_ids]
    for epoch in range(epochs):
        for draws, targets in feed.batches(epoch):
            digest.update("".join(names[target["index"]] for target in targets).encode())
            digest.update(torch.stack(draws).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(records: Iterable[Record], plan: Plan, path: Path) -> None:
    """Refuse to add to records of other settings.

    Raises:
        ValueError: If there are any.
    """
    mine = plan.fingerprint()
    for record in records:
        if record.fingerprint != mine:
            other = " ".join([record.plan["recipe"], *record.plan["settings"]])
            raise ValueError(
                f"{path} holds runs of another recipe, other settings, data or backbone weights ({other}); choose "
                "another --output."
            )
