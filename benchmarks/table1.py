"""Table 1 of the supplement as a command: the same recipe, seeds and backbone weights for every neck.

Each row and seed is one run of ``train``, in a folder of its own; finished runs are kept, so the command can be
stopped and started again. The paper's figures are for COCO val2017 with ResNet-50; figures on other data or another
backbone only compare the rows with each other.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import a2fpn
from a2fpn.detectors import Detector
from benchmarks import _measure as measure

METRICS = ("bbox/ap", "segm/ap", "segm/ap50", "segm/ap75", "segm/ap_small", "segm/ap_medium", "segm/ap_large")
HEADINGS = ("AP^bb", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
SIZE = (512, 512)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        method: As in the paper.
        attention: The paper's abbreviation, or a dash.
        settings: What differs from the recipe, as settings of ``train``.
        paper: The paper's figures on COCO val2017 in the order of ``HEADINGS``; empty where the table has none.
    """

    method: str
    attention: str
    settings: tuple[str, ...]
    paper: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """A name for files."""
        return "_".join(part.partition("=")[2] for part in self.settings)


def _mgc(kind: str) -> tuple[str, ...]:
    return ("model.overrides.neck=pafpn_mgc", f"model.overrides.neck_args.attention={kind}")


ROWS = (
    Row("FPN", "-", ("model.overrides.neck=fpn",), (37.1, 34.1, 55.4, 36.2, 18.4, 37.3, 46.0)),
    Row("PAFPN", "-", ("model.overrides.neck=pafpn",), (37.6, 34.4, 55.9, 36.4, 18.7, 37.5, 47.2)),
    Row("w/ MGC", "D.P.", _mgc("dot"), (38.2, 35.0, 56.9, 37.1, 19.0, 38.3, 48.0)),
    Row("w/ MGC", "S.D.P.", _mgc("scaled_dot"), (37.8, 34.6, 56.2, 36.7, 18.4, 38.0, 47.8)),
    Row("w/ MGC", "S.C.S.", _mgc("scaled_cosine"), (38.6, 35.4, 57.4, 37.5, 19.5, 38.6, 48.3)),
    Row("A2-FPN", "S.C.S.", ("model.overrides.neck=a2fpn",)),
)


def main(
    data: Annotated[Path, typer.Option(help="Root of a data set in COCO format.")],
    recipe: Annotated[Path, typer.Option(help="Recipe of train/; its neck is replaced row by row.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/table1"),
    seeds: Annotated[int, typer.Option(help="Runs per row, with the seeds 0, 1, ...", min=1)] = 2,
    rounds: measure.Rounds = 7,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Further setting of train for every run, e.g. run.epochs=4.")
    ] = None,
) -> None:
    """Trains every row of Table 1 and prints the table in the paper's layout, with the spread over the seeds."""
    runs = [(row, seed) for row in ROWS for seed in range(seeds)]
    with measure.progress() as bar:
        task = bar.add_task("", total=len(runs))
        for row, seed in runs:
            bar.update(task, description=f"{row.method} {row.attention}, seed {seed}")
            _train(row, seed, data, recipe, output, settings or [])
            bar.advance(task)
    _print(output, seeds, rounds)


def _folder(output: Path, row: Row, seed: int) -> Path:
    return output / f"{row.key}_seed{seed}"


def _train(row: Row, seed: int, data: Path, recipe: Path, output: Path, settings: Sequence[str]) -> None:
    folder = _folder(output, row, seed)
    if (folder / "seconds").exists():
        return
    resume = ["run.resume=true"] if (folder / "last").is_dir() else []
    command = [sys.executable, "-m", "train", "--config", str(recipe), *settings, *row.settings, *resume]
    command += [f"data.root={data}", f"run.seed={seed}", f"run.output={folder}", f"run.name={row.key}"]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    (folder / "seconds").write_text(f"{time.perf_counter() - start:.0f}\n", encoding="utf-8")


def _print(output: Path, seeds: int, rounds: int) -> None:
    table = Table(title=f"Mean of {seeds} seed(s), ± half the range; in brackets the paper on COCO val2017, ResNet-50")
    for heading in ("Method", "Atten.", *HEADINGS, "params M", "GMACs", "images/s"):
        table.add_column(heading, justify="left" if heading in ("Method", "Atten.") else "right")
    models = {row.key: a2fpn.from_pretrained(_folder(output, row, 0) / "last") for row in ROWS}
    passes = {key: functools.partial(_features, model) for key, model in models.items()}
    timings = measure.time_interleaved(passes, rounds=rounds, title="images/s")
    for row in ROWS:
        records = [_last_record(_folder(output, row, seed)) for seed in range(seeds)]
        cells = []
        for index, metric in enumerate(METRICS):
            values = [100 * record[metric] for record in records]
            mean, spread = statistics.mean(values), (max(values) - min(values)) / 2
            paper = f" ({row.paper[index]})" if row.paper else ""
            # COCO's mark for a size that no object of the data has.
            cells.append(f"{mean:.1f} ± {spread:.1f}{paper}" if min(values) >= 0 else f"none{paper}")
        with FlopCounterMode(display=False) as counter:
            passes[row.key]()
        gmacs = counter.get_total_flops() / 2e9
        parameters = sum(p.numel() for p in models[row.key].parameters()) / 1e6
        speed = 1 / timings.median(row.key)
        table.add_row(row.method, row.attention, *cells, f"{parameters:.1f}", f"{gmacs:.1f}", f"{speed:.1f}")
    Console(width=200).print(table)
    measure.console().print(f"GMACs and images/s: backbone and neck at {SIZE[0]}x{SIZE[1]}, one image.")


@torch.inference_mode()
def _features(model: Detector) -> None:
    model.neck(model.backbone(torch.zeros(1, 3, *SIZE)))


def _last_record(folder: Path) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record: dict[str, float] = json.loads(lines[-1])
    return record


if __name__ == "__main__":
    typer.run(main)
