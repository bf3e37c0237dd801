"""``import a2fpn`` against importing torch, torchvision and timm, each in a fresh interpreter.

Target: at most 10 % more.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import typer

from benchmarks import _measure as measure

BASE = "import torch, torchvision, timm"
OURS = "import a2fpn"
TARGET = 1.10


def main(rounds: measure.Rounds = 7, quick: measure.Quick = False) -> None:
    """Times both statements and prints the ratio."""
    rounds = 1 if quick else rounds
    measure.start(0, rounds)
    calls = {statement: functools.partial(_run, statement) for statement in (BASE, OURS)}
    # The first round compiles bytecode and fills the file cache.
    timings = measure.time_interleaved(calls, rounds=rounds, warmup=0 if quick else 1, title="import")
    ratio = timings.ratio(OURS, BASE)
    measure.print_table(
        "Start of a fresh interpreter",
        ["statement", "time", "ratio", "target"],
        [
            [BASE, measure.milliseconds(timings.median(BASE)), "1", ""],
            [OURS, measure.milliseconds(timings.median(OURS)), str(ratio), measure.against(ratio.value, TARGET)],
        ],
    )


def _run(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


if __name__ == "__main__":
    typer.run(main)
