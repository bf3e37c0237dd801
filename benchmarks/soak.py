"""A tiny training that is disturbed in every way, beside one that nothing disturbs.

    python -m benchmarks.soak --minutes 10

A run is started again and again with the same line. Meanwhile it is killed at random times and between the files of a
checkpoint, asked to stop, given a full disk, a flipped bit in one of its files, other settings, settings that can't
change, and a second process in its folder. When it has ended, weights, metrics and the best checkpoint are compared
with those of the undisturbed run, and another begins.

Ends with exit code 1 if a state was lost (a start went on from less than the newest whole checkpoint, or one flipped
bit damaged two), something differs in silence, or a start failed otherwise than it should. Where flips have damaged
every checkpoint of a run, it has to be refused, and another begins. Leaves nothing unless something failed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import _measure as measure

RECIPE = """
model:
  name: maskrcnn_fpn
  overrides: {backbone: test_efficientnet, neck_args: {out_channels: 16}, min_size: 64, max_size: 96,
    box_channels: 32, rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 20, rpn_batch_size: 64, box_batch_size: 32,
    mask_channels: 16, mask_layers: 1, score_threshold: 0.0, detections_per_image: 10,
    anchor_sizes: [[8], [16], [32], [64], [128]]}
data: {train_images: images, train_annotations: train.json, val_images: images, val_annotations: val.json, workers: 0}
optim: {name: adamw, lr: 1.0e-3, lr_batch_size: 2, warmup_steps: 2, schedule: cosine, clip_norm: 1.0}
run: {name: soak, epochs: 12, evaluate_every: 3, checkpoint_every: 1, ema: 0.9, pictures: 0, trackers: [], log_every: 1}
"""
HARMLESS = ("data.workers=1", "data.eval_batch_size=2", "run.log_every=2", "run.name=other", "data.strict=true")
REFUSED = (
    "model.overrides.neck=pafpn",
    "optim.name=sgd",
    "model.pretrained_backbone=true",
    "model.name=fasterrcnn_fpn",
)
TIMES = {"train_seconds", "images_per_second", "eval_seconds"}
GENERATIONS = ("last", "previous", "best")
KINDS = {
    **{"kill": 4, "kill in a save": 4, "stop": 2, "full disk": 2, "flipped bit": 4},
    **{"other settings": 2, "refused settings": 1, "second process": 1},
}
"""Disturbances and how often they come."""

_CONTEXT = multiprocessing.get_context("forkserver")


class Start:
    """A start of the run, in a process of its own.

    Args:
        arguments: Of ``a2fpn train``.
        log: A file that takes its output.
        limit: Bytes beyond which no file can grow, as on a full disk; 0 for none.
        kill_at: The call that makes something durable at which it is killed; 0 for none.
    """

    def __init__(self, arguments: list[str], log: Path, *, limit: int = 0, kill_at: int = 0) -> None:
        log.unlink(missing_ok=True)
        self._log = log
        self._process = _CONTEXT.Process(target=_train, args=(arguments, str(log), limit, kill_at))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None if it is still running after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._process.pid or 0), number)

    def end(self) -> int:
        """Wait for its end; kill what hangs."""
        code = self.wait(180)
        if code is None:
            self.send(signal.SIGKILL)
            self.wait(10)
            raise RuntimeError(f"A start hung: {self.log()[-2000:]}")
        return code

    def log(self) -> str:
        """Everything that it said."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def _train(arguments: list[str], log: str, limit: int, kill_at: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.set_start_method(None, force=True)  # loader processes as in a program of its own
    import torch

    from a2fpn.training.cli import main

    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if kill_at:
        calls = iter(range(kill_at, -1, -1))
        for name in ("fsync", "rename", "replace", "unlink", "link"):
            setattr(os, name, functools.partial(_counted, calls, getattr(os, name)))
    sys.exit(main(arguments))


def _counted(calls: Iterator[int], original: Any, *arguments: Any, **options: Any) -> Any:
    if next(calls, 0) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)


def write_data(root: Path) -> None:
    """Write 6 images with a few rectangles and ellipses, four of them for training, and the recipe."""
    chance = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(6):
        picture = Image.fromarray(chance.integers(0, 40, (64, 80, 3), dtype=np.uint8))
        for label in (1, 2):
            left, top = (int(x) for x in chance.integers(0, 30, 2))
            right, bottom = left + 20 + 10 * label, top + 24
            color = (220, 60, 60) if label == 1 else (60, 220, 60)
            ImageDraw.Draw(picture).rectangle((left, top, right, bottom), fill=color)
            polygon = [left, top, right, top, right, bottom, left, bottom]
            box = [left, top, right - left, bottom - top]
            annotation = {"image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **annotation, "segmentation": [polygon]})
        picture.save(root / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 64})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    for name, part in (("train", images[:4]), ("val", images[4:])):
        ids = {image["id"] for image in part}
        kept = [annotation for annotation in annotations if annotation["image_id"] in ids]
        document = {"images": part, "annotations": kept, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def whole_step(folder: Path) -> int | None:
    """Step of a generation, if its files have the hashes that it lists; read without the code under test."""
    try:
        lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        sums = dict(reversed(line.split("  ")) for line in lines)
        wanted = {
            "config.json",
            "model.safetensors",
            "training_state/state.json",
            "training_state/optimizer.safetensors",
        }
        if not wanted <= sums.keys():
            return None
        for name, digest in sums.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return None
        state = json.loads((folder / "training_state" / "state.json").read_text(encoding="utf-8"))["state"]
        return int(state["step"])
    except (OSError, ValueError):
        return None


def content(run: Path) -> dict[str, str]:
    """Hashes of the files of a run that a refused start has to leave alone; not of what a kill left half written."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("run.lock", "train.log"))
    names = ((str(path.relative_to(run)), path) for path in files)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names if not name.startswith(".")}


def _line(settings: dict[str, Any], name: str) -> str:
    """Return a setting as the command line gives it."""
    value = functools.reduce(lambda part, key: part[key], name.split("."), settings)
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


class Soak:
    """Disturbs runs and counts what became of them.

    Args:
        root: Folder of the data, the undisturbed run and the disturbed one.
        chance: What decides.
    """

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        self.run, self.log = root / "run", root / "start.log"
        self.events: Counter[str] = Counter()
        self.lost: list[str] = []
        self.different: list[str] = []
        self.wrong: list[str] = []
        self.said = self.finished = self.refused = 0
        self._best_lost = False

    def arguments(self, *more: str, output: str = "run") -> list[str]:
        """The line that starts a run, or goes on with it."""
        where = [f"data.root={self.root}", f"run.output={self.root / output}"]
        return ["--config", str(self.root / "recipe.yaml"), *where, "run.resume=auto", *more]

    def reference(self) -> None:
        """Make the undisturbed run, and measure how long one takes."""
        write_data(self.root)
        start = time.monotonic()
        code = Start(self.arguments(output="whole"), self.log).end()
        if code:
            raise RuntimeError(f"The undisturbed run failed: {self.log.read_text()[-2000:]}")
        self.seconds = time.monotonic() - start

    def disturb(self) -> None:
        """Start the run once more, and let something happen to it."""
        kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("flipped bit", "refused settings") and not (self.run / "last").exists():
            kind = "kill in a save"
        more, limit, kill_at, flipped, news = [], 0, 0, "", False
        if kind == "kill in a save":
            kill_at = self.chance.randint(2, 120)
        elif kind == "full disk":
            limit = self.chance.randint(1_000, 500_000)
        elif kind == "flipped bit":
            flipped = self._flip()
        elif kind == "other settings":
            more = [self.chance.choice(HARMLESS)]
            news = more[0] not in self._settings()
        elif kind == "refused settings":
            more = [self.chance.choice(REFUSED)]
        before = content(self.run) if kind == "refused settings" else {}
        steps = self._steps()
        beyond_repair = not any(step is not None for step in steps.values()) and (self.run / "last").exists()
        process = Start(self.arguments(*more), self.log, limit=limit, kill_at=kill_at)
        code = process.wait(self.chance.uniform(0.05, 0.7) * self.seconds)
        if code is None and kind == "second process":
            self._second()
        if code is None and kind in ("kill", "flipped bit", "other settings", "second process"):
            process.send(signal.SIGKILL)
        if code is None and kind == "stop":
            process.send(signal.SIGTERM)
        code = process.end()
        self.events[kind] += 1
        if beyond_repair:
            self._judge_refusal(kind, code, process.log())
            return
        self._judge(kind, code, process.log(), steps, more if news else [], flipped)
        after = content(self.run) if before else {}
        if any(after.get(name) != digest for name, digest in before.items()):
            self.wrong.append(f"{more}: a refused start changed the folder")
        if code == 0:
            self._compare()

    def _steps(self) -> dict[str, int | None]:
        """Steps of the generations that are whole."""
        return {name: whole_step(self.run / name) for name in GENERATIONS}

    def _settings(self) -> set[str]:
        """Harmless settings that the newest whole generation was made with: to give them again changes nothing."""
        steps = {name: step for name, step in self._steps().items() if step is not None}
        if not steps:
            return set()
        state = self.run / max(steps, key=steps.__getitem__) / "training_state" / "state.json"
        found = json.loads(state.read_text(encoding="utf-8"))["settings"]
        return {line for line in HARMLESS if line == _line(found, line.partition("=")[0])}

    def _flip(self) -> str:
        """Flip a bit in one file of the run; return its name within it."""
        before = self._steps()
        files = [path for name in GENERATIONS for path in (self.run / name).rglob("*") if path.is_file()]
        files += [path for path in (self.run / "metrics.jsonl", self.run / "config.yaml") if path.exists()]
        path = self.chance.choice(sorted(files))
        data = bytearray(path.read_bytes())
        if not data:
            return ""
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)
        name, after = str(path.relative_to(self.run)), self._steps()
        if sum(before[generation] != after[generation] for generation in GENERATIONS) > 1:
            self.lost.append(f"a flipped bit in {name} damaged more than one generation")
        return name

    def _second(self) -> None:
        """Start another process in the folder of one that runs."""
        second = Start(self.arguments(), self.root / "second.log")
        code = second.end()
        if code not in (0, 2) or (code == 2 and "is being written to by process" not in second.log()):
            self.wrong.append(f"a second process ended with {code}: {second.log()[-500:]}")

    def _judge_refusal(self, kind: str, code: int, log: str) -> None:
        """Look at the end of a start without a whole checkpoint; make room for another run once it was refused."""
        if code in (-signal.SIGKILL, -signal.SIGTERM) or kind == "full disk":  # perhaps before it could say so
            return
        if code != 2 or "is whole" not in log:
            self.wrong.append(f"{kind} of a run without a whole checkpoint ended with {code}: {log}")
        self.refused += 1
        self._best_lost = False
        shutil.rmtree(self.run)

    def _judge(
        self, kind: str, code: int, log: str, steps: dict[str, int | None], news: list[str], flipped: str
    ) -> None:
        """Compare what a start said and how it ended with what it should have."""
        name = flipped.partition("/")[0]
        newest = max((step for step in steps.values() if step is not None), default=None)
        gone_on = re.search(r"Continuing after step (\d+)", log)
        began = "images per step" in log
        if newest is not None and began and newest > (int(gone_on[1]) if gone_on else 0):
            self.lost.append(f"{kind}: step {newest} was whole, went on from {gone_on and gone_on[1]}: {log[-1500:]}")
        if began and name in GENERATIONS and not re.search(rf"/{name}(/\S+)? (is|was|got|can't|has)\b", log):
            self.different.append(f"a flipped bit in {flipped} was not noticed: {log[-1500:]}")
        if "The best checkpoint, of epoch" in log:
            self.said += 1
            self._best_lost = True
        if newest is not None and began and news and f"Setting changed: {news[0].partition('=')[0]}: " not in log:
            self.different.append(f"{news} was not said: {log[-1500:]}")
        expected = {
            "stop": {0, 143, -signal.SIGTERM},
            "full disk": {0, 1},
            "refused settings": {2},
            "kill in a save": {0, -signal.SIGKILL},
        }.get(kind, {0, -signal.SIGKILL})
        # A loader process may have words for the end of the one that was killed.
        if code not in expected or ("Traceback" in log and code != -signal.SIGKILL and "Logging error" not in log):
            self.wrong.append(f"{kind} ended with {code}: {log[-1500:]}")

    def _compare(self) -> None:
        """Compare a run that has ended with the undisturbed one, and make room for another."""
        from safetensors.numpy import load_file

        whole = self.root / "whole"
        names = ["last/model", "last/training_state/weights", "last/training_state/optimizer"]
        names += [] if self._best_lost else ["best/model"]
        for name in names:
            ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (self.run, whole))
            if ours.keys() != theirs.keys() or any(not np.array_equal(ours[key], theirs[key]) for key in theirs):
                self.different.append(f"{name}.safetensors of an ended run differs")
        records = [
            [
                {key: value for key, value in json.loads(line).items() if key not in TIMES}
                for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            for folder in (self.run, whole)
        ]
        if records[0] != records[1]:
            self.different.append("metrics.jsonl of an ended run differs")
        self.finished += 1
        self._best_lost = False
        shutil.rmtree(self.run)


def main(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.1)] = 10,
    seed: Annotated[int, typer.Option(help="Of what happens when.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="An empty folder to work in, which stays.")] = None,
) -> None:
    """Disturb a training for some minutes; print what it survived, lost, and got wrong."""
    root = keep or Path(tempfile.mkdtemp(prefix="soak"))
    _CONTEXT.set_forkserver_preload(["a2fpn.training.trainer", "a2fpn.inference"])
    soak = Soak(root.resolve(), random.Random(seed))
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("the undisturbed run", total=60 * minutes)
        begin = time.monotonic()
        soak.reference()
        while time.monotonic() - begin < 60 * minutes:
            soak.disturb()
            told = f"{soak.events.total()} events, {soak.finished} runs ended"
            bar.update(task, completed=time.monotonic() - begin, description=told)
    rows = [[kind, str(soak.events[kind])] for kind in KINDS]
    measure.print_table(f"Disturbances of a tiny run, {minutes:g} minutes, seed {seed}", ["disturbance", "times"], rows)
    measure.console().print(
        f"events survived {soak.events.total() - len(soak.wrong)}, runs ended and compared {soak.finished}, "
        f"damaged best checkpoints said to be lost {soak.said}, runs without a whole checkpoint {soak.refused}\n"
        f"states lost {len(soak.lost)}, silent differences {len(soak.different)}, wrong ends {len(soak.wrong)}"
    )
    failures = [*soak.lost, *soak.different, *soak.wrong]
    for failure in failures[:5]:
        print(failure, file=sys.stderr)
    if failures:
        raise typer.Exit(1)
    if keep is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    typer.run(main)
