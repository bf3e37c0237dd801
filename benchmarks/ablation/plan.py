"""Plan of the runs: a recipe, the settings all runs share, arms, seeds; and the one place that knows the command."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
        return merged(merged(read_recipe(self.recipe), own), *map(assignment, settings))

    def command(self, run: Run, *further: str) -> list[str]:
        """Write the settings of a run into its folder, and return the command that starts or continues it."""
        run.folder.mkdir(parents=True, exist_ok=True)
        file = run.folder / "settings.yaml"
        file.write_text(yaml.safe_dump(self.config(run, *further), sort_keys=False), encoding="utf-8")
        return [*TRAIN, "--config", str(file.resolve())]

    def fingerprint(self) -> str:
        """Return a hash of what all runs share: recipe, settings, annotations and backbone weights."""
        settings = merged(read_recipe(self.recipe), *map(assignment, self.settings))
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


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings of a recipe."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


def assignment(text: str) -> dict[str, Any]:
    """Read ``section.key=value`` into nested settings.

    Raises:
        ValueError: If it reads otherwise.

    Example:
        >>> assignment("model.overrides.neck_args.out_channels=96"), assignment("optim.lr=1e-3")["optim"]
        ({'model': {'overrides': {'neck_args': {'out_channels': 96}}}}, {'lr': 0.001})
    """
    name, equals, text_value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", name):
        raise ValueError(f"A setting reads section.key=value, got {text!r}.")
    value = yaml.safe_load(text_value)
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):  # YAML 1.1 wants a point in it
        value = float(value)
    for part in reversed(name.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def merged(settings: Mapping[str, Any], *further: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with further ones put in, the later before the earlier.

    Example:
        >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    result = copy.deepcopy(dict(settings))
    for other in further:
        for key, value in other.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


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
