"""Plan of the runs: a recipe, the settings all runs share, arms, seeds; and the one place that knows the command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2fpn.training.settings import assign, dump_yaml, flat, read_arguments, read_file
from benchmarks.ablation.arms import Arm

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TRAIN = (sys.executable, "-m", "train")
"""The training command; ``--config FILE`` follows."""


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        arm: What is particular to it.
        seed: Its seed.
        folder: Where it leaves its files.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def key(self) -> tuple[str, int]:
        """Arm and seed: what there is one record of."""
        return self.arm.name, self.seed

    @property
    def log(self) -> Path:
        """Path of the run's output."""
        return self.folder / "log.txt"

    def __str__(self) -> str:
        return f"{self.arm.name}/{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Runs that can be compared.

    Args:
        recipe: YAML file of the training's settings.
        data: Root of a data set in COCO format.
        output: Folder of the runs and of their records.
        weights: File of backbone weights, or None for what the recipe says.
        settings: ``section.key=value`` for every run.
        workers: Loader processes of a run.
    """

    recipe: Path
    data: Path
    output: Path
    weights: Path | None = None
    settings: tuple[str, ...] = ()
    workers: int = 1

    @property
    def records(self) -> Path:
        """The file of the records."""
        return self.output / "records.jsonl"

    def run(self, arm: Arm, seed: int) -> Run:
        """Return a run."""
        return Run(arm, seed, self.output / "runs" / arm.name / f"seed{seed}")

    def runs(self, arms: Sequence[Arm], seeds: int) -> list[Run]:
        """Return all runs, seed by seed, so that what is there when time is up can be paired."""
        return [self.run(arm, seed) for seed in range(seeds) for arm in arms]

    def config(self, run: Run, *further: str) -> dict[str, Any]:
        """Return the settings of a run; those of the arm come after the shared ones."""
        own: dict[str, Any] = {
            "data": {"root": str(self.data.resolve()), "workers": self.workers},
            "run": {"output": str(run.folder.resolve()), "name": run.arm.name, "seed": run.seed, "resume": "auto"},
        }
        if self.weights:
            own["model"] = {"backbone_weights": str(self.weights.resolve()), "pretrained_backbone": False}
        settings = (*self.settings, *run.arm.settings, *further)
        return _changed(read_file(self.recipe), [*flat(own).items(), *read_arguments(settings)])

    def command(self, run: Run, *further: str) -> list[str]:
        """Write the settings of a run into its folder, and return the command that starts or continues it."""
        run.folder.mkdir(parents=True, exist_ok=True)
        file = run.folder / "settings.yaml"
        file.write_text(dump_yaml(self.config(run, *further)), encoding="utf-8")
        return [*TRAIN, "--config", str(file.resolve())]

    def fingerprint(self) -> str:
        """Return a hash of what all runs share: recipe, settings, annotations and backbone weights."""
        settings = _changed(read_file(self.recipe), read_arguments(self.settings))
        data = settings.get("data", {})
        names = [data.get(f"{part}_annotations", f"annotations/instances_{part}.json") for part in ("train", "val")]
        files = [*(self.data / name for name in names), *([self.weights] if self.weights else [])]
        parts = [json.dumps(settings, sort_keys=True), *map(sha256, files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe that is given as a path or by its name.

    Raises:
        ValueError: If there is none.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.iterdir()))
    raise ValueError(f"No recipe {name!r}; give a file or one of {known}.")


def _changed(settings: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in changes:
        settings = assign(settings, name, value)
    return settings


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Circumstances:
    """Circumstances of a run that its record states.

    Args:
        commit: Commit of the code.
        device: Processor or GPU.
        jobs: Runs at a time.
        mps: Whether they shared the GPU through NVIDIA's multi-process service.
        versions: Of the libraries.
    """

    commit: str | None
    device: str
    jobs: int
    mps: bool
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)
