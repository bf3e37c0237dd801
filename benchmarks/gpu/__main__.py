"""Every part in a process and a budget of its own: one that fails, or hangs, stops none of the others.

``python -m benchmarks.gpu --output DIR`` writes ``DIR/gpu_PART.json`` while it runs and prints a table at the end of
every part. Goals: inference in at most 0.60, training in at most 0.70 of torchvision's time at equal outputs and
losses; ``maskrcnn_a2fpn_r50`` in at most 1.35 of our FPN's.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.record import Record
from benchmarks.gpu.table import print_rows

SHARES = {"inference": 0.36, "training": 0.34, "sync": 0.08, "reassembly": 0.08, "loader": 0.14}
"""Share of the minutes that each part gets."""


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON files.")],
    parts: Annotated[str, typer.Option(help=f"Some of {','.join(SHARES)}.")] = ",".join(SHARES),
    minutes: Annotated[float, typer.Option(help="For all parts together.", min=0.1)] = 8.0,
    data: Annotated[Path | None, typer.Option(help="Folder in COCO format for the loader, else it is made.")] = None,
    device: Annotated[str, typer.Option(help="Where to run; cpu only tries whether it does.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Tiny sizes.")] = False,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure the parts one after the other."""
    chosen = [name for name in parts.split(",") if name]
    if unknown := [name for name in chosen if name not in SHARES]:
        raise typer.BadParameter(f"Unknown parts {', '.join(unknown)}; there are {', '.join(SHARES)}.")
    if inside:
        (part,) = chosen
        record = Record(output, part, device=torch.device(device), seconds=60 * minutes, quick=quick)
        with record.attempt(name=part):
            importlib.import_module(f"benchmarks.gpu.{part}").run(record, *([data] if part == "loader" else []))
        return
    stop, share = time.perf_counter() + 60 * minutes, sum(SHARES[name] for name in chosen)
    for name in chosen:
        # What a part leaves over goes to those after it.
        seconds = max(10.0, (stop - time.perf_counter()) * SHARES[name] / share)
        share -= SHARES[name]
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--output", str(output), "--parts", name]
        command += ["--minutes", str(seconds / 60), "--device", device, *(["--quick"] if quick else [])]
        command += ["--data", str(data)] if data else []
        try:
            # Past its budget a part finishes what it began; what takes longer hangs.
            code = subprocess.run(command, timeout=seconds + 45, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        try:
            print_rows(name, json.loads((output / f"gpu_{name}.json").read_text(encoding="utf-8"))["rows"])
        except Exception as error:  # the next part is worth more than this table
            print(f"{name}: no table: {type(error).__name__}: {error}", flush=True)
        if code:
            print(f"{name}: stopped with code {code}; the rows above are what it wrote.", flush=True)


if __name__ == "__main__":
    typer.run(main)
