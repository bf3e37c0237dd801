"""Do necks differ? Many small trainings that differ in one thing, several at a time, compared in pairs by seed.

    python -m benchmarks.ablation --data DIR --recipe facades --arms fpn,pafpn,a2fpn --seeds 5 --jobs 4 --output DIR

The output folder gets ``records.jsonl``, a line for every run that ended, and ``curves.png``. The same command again
continues: finished runs are kept, stopped ones resume. With ``--minutes`` it ends in time with exit code 75 if runs
are left. Without training anything, ``--report DIR/records.jsonl --page FILE`` writes a page.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from a2fpn.training.settings import read_file
from a2fpn.training.state import code_version
from benchmarks import _measure as measure
from benchmarks.ablation.arms import Arm, choose, parse_arm, with_detectors
from benchmarks.ablation.plan import Circumstances, Plan, Run, find_recipe
from benchmarks.ablation.pool import Pool, environment, multi_process_service
from benchmarks.ablation.records import append_record, check_fingerprint, failed, finished, read_records
from benchmarks.ablation.report import Comparison, draw, print_report, write_page
from benchmarks.ablation.throughput import as_json, measure_throughput

UNFINISHED = 75  # EX_TEMPFAIL: come again

Data = Annotated[Path | None, typer.Option(help="Root of a data set in COCO format.")]
Recipe = Annotated[str, typer.Option(help="A file, or the name of one in benchmarks/recipes.")]
Arms = Annotated[str, typer.Option(help="Names with commas between them.")]
Further = Annotated[list[str] | None, typer.Option("--arm", help="A further arm: NAME=section.key=value,...")]
Detectors = Annotated[str, typer.Option(help="Every arm with each of these, commas between; by default the recipe's.")]
Control = Annotated[str, typer.Option(help="The arm that others are compared with.")]
Seeds = Annotated[int, typer.Option(help="Runs per arm, with the seeds 0, 1, ...", min=1)]
Jobs = Annotated[int, typer.Option(help="Runs at a time.", min=1)]
Workers = Annotated[int, typer.Option(help="Loader processes of each run.", min=0)]
Output = Annotated[Path, typer.Option(help="Folder of the runs and records.")]
Weights = Annotated[Path | None, typer.Option("--backbone-weights", help="File of backbone weights for all runs.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Setting for every run, e.g. run.epochs=4.")]
Minutes = Annotated[float | None, typer.Option(help="Stop in time; running ones write a checkpoint.", min=0)]
Grace = Annotated[float, typer.Option(help="Seconds before that at which they are asked to.", min=1)]
Mps = Annotated[bool, typer.Option("--mps", help="Share the GPU through NVIDIA's multi-process service.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Run again what failed.")]
Commit = Annotated[str | None, typer.Option(help="Commit to record where the code is no checkout.")]
ThroughputOption = Annotated[bool, typer.Option("--throughput", help="Measure images/s of 1 and of --jobs runs only.")]
Seconds = Annotated[float, typer.Option(help="How long --throughput counts.", min=1)]
Report = Annotated[list[Path] | None, typer.Option(help="Records to report on; nothing is trained.")]
Page = Annotated[Path | None, typer.Option(help="Markdown page to write.")]


def main(
    data: Data = None,
    recipe: Recipe = "facades",
    arms: Arms = "fpn,pafpn,a2fpn",
    arm: Further = None,
    detectors: Detectors = "",
    control: Control = "fpn",
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    workers: Workers = 1,
    output: Output = Path("runs/ablation"),
    backbone_weights: Weights = None,
    settings: Settings = None,
    minutes: Minutes = None,
    grace: Grace = 60.0,
    mps: Mps = False,
    retry_failed: Retry = False,
    commit: Commit = None,
    throughput: ThroughputOption = False,
    seconds: Seconds = 30.0,
    report: Report = None,
    page: Page = None,
) -> None:
    """Train all arms with all seeds, as far as time allows, and report."""
    torch.set_num_threads(1)
    if report:
        _report(report, page)
        return
    if data is None:
        raise typer.BadParameter("--data names the folder to train on; --report FILE reports on runs that were made.")
    try:
        plan = Plan(find_recipe(recipe), data, output, backbone_weights, tuple(settings or ()), workers)
        chosen = choose(list(filter(None, arms.split(","))), [parse_arm(text) for text in arm or ()], control=control)
        model = str(read_file(plan.recipe).get("model", {}).get("name", ""))
        chosen = with_detectors(chosen, list(filter(None, detectors.split(","))), model)
        check_fingerprint(read_records(plan.records).values(), plan, plan.records)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    here = Circumstances(commit or code_version(), _device(), jobs, mps, _versions())
    with multi_process_service(environment(), wanted=mps) as env:
        if throughput:
            _throughput(plan, chosen[0], here, env, seconds)
            return
        age = time.time() - psutil.Process().create_time()  # the limit counts from there
        pool = Pool(jobs, env, seconds=60 * minutes - age if minutes else float("inf"), grace=grace)
        left = _train(plan, chosen, seeds, here, pool, retry=retry_failed)
    _report([plan.records], page, picture=output / "curves.png")
    if left:
        measure.console().print(f"{left} run(s) are left; the same command continues.")
        raise typer.Exit(UNFINISHED)


def _train(plan: Plan, arms: list[Arm], seeds: int, here: Circumstances, pool: Pool, *, retry: bool) -> int:
    """Make the runs that have no record, and return how many are left."""
    records = read_records(plan.records)
    over = {key for key, record in records.items() if record.status == "done" or not retry}
    waiting = [run for run in plan.runs(arms, seeds) if run.key not in over]

    def ended(run: Run, success: bool) -> None:
        make = finished if success else failed
        append_record(make(run, plan, here), plan.records)
        if success:  # `last` is the model of the record
            shutil.rmtree(run.folder / "best", ignore_errors=True)

    return len(pool.work(waiting, plan.command, ended))


def _throughput(plan: Plan, arm: Arm, here: Circumstances, env: dict[str, str], seconds: float) -> None:
    one, several = (measure_throughput(plan, arm, jobs, env, seconds=seconds) for jobs in (1, here.jobs))
    result = {"arm": arm.name, "recipe": plan.recipe.stem, "data": plan.data.name, "workers": plan.workers}
    result |= {"seconds": seconds, "circumstances": here.as_json(), **as_json(one, several)}
    plan.output.mkdir(parents=True, exist_ok=True)
    (plan.output / "throughput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    measure.print_table(
        f"Training {arm.name} on {plan.data.name}, {here.device}{', MPS' if here.mps else ''}, {seconds:.0f} s each",
        ("runs at a time", "images/s", "each", "ratio"),
        [
            (str(t.jobs), f"{t.images_per_second:.1f}", f"{min(t.each):.1f}–{max(t.each):.1f}", f"{ratio:.2f}")
            for t, ratio in ((one, 1.0), (several, result["ratio"]))
        ],
    )


def _report(files: list[Path], page: Path | None, *, picture: Path | None = None) -> None:
    comparisons = [Comparison.of(read_records(file).values()) for file in files]
    for comparison in comparisons:
        print_report(comparison)
        if picture and comparison.series:
            draw(comparison, picture)
    made = [comparison for comparison in comparisons if comparison.series]
    if page and made:
        write_page(made, page)


def _device() -> str:
    """Name of the GPU that trainings use, else of the processor; the runner itself stays off the GPU."""
    smi = shutil.which("nvidia-smi")
    if smi and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        query = [smi, "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.splitlines()[0].strip()
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "accelerate")}


if __name__ == "__main__":
    typer.run(main)
