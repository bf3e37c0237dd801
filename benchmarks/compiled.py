"""``torch.compile`` of backbone and neck for inference: ``python -m benchmarks.compiled``.

One image of several sizes in turn, in the detector as it is, optimized by :func:`a2fpn.optimize_for_inference`, and
with :meth:`a2fpn.detectors.Detector.compile_maps`; also the first call of each size, in which torch compiles. Goals: at
most 120 s of compilation, once for all sizes, and never slower than the optimized detector.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import a2fpn
from benchmarks import _measure as measure
from benchmarks.gpu.record import circumstances

MODELS = ("maskrcnn_fpn_r50", "maskrcnn_a2fpn_r50")
SIZES = ((480, 640), (512, 768), (800, 1088), (640, 640))
SIDES = ("as it is", "optimized", "compiled")


def sides(name: str, *, freeze: bool) -> dict[str, nn.Module]:
    """Return the three detectors, which share weights and find 100 objects."""
    torch.manual_seed(0)
    model = a2fpn.create_model(name, num_classes=80, resize="none").eval().requires_grad_(False)
    compiled = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch._inductor.config.freezing = freeze
    compiled.compile_maps()
    return dict(zip(SIDES, (model, a2fpn.optimize_for_inference(model), compiled), strict=True))


@torch.inference_mode()
def report(name: str, *, rounds: int, freeze: bool) -> list[dict[str, Any]]:
    """Measure all sizes in turn and print a table."""
    detectors = sides(name, freeze=freeze)
    rows = []
    for size in SIZES:
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
        calls = {side: _in_inference_mode(detector, image) for side, detector in detectors.items()}
        start = time.perf_counter()
        calls["compiled"]()
        first = time.perf_counter() - start
        timings = measure.time_interleaved(calls, rounds=rounds, title=f"{name} {size[0]}x{size[1]}")
        row: dict[str, Any] = {"model": name, "size": size, "first_s": first, "frozen": freeze}
        for side in SIDES:
            row[side] = timings.median(side)
        ratio = timings.ratio("compiled", "optimized")
        rows.append(row | {"to_optimized": ratio.value, "range": (ratio.low, ratio.high)})
    columns = ["size", *SIDES, "compiled / optimized", "first call"]
    cells = [
        [
            "{}x{}".format(*row["size"]),
            *(measure.milliseconds(row[side]) for side in SIDES),
            str(measure.Ratio(row["to_optimized"], *row["range"])),
            f"{row['first_s']:.0f} s",
        ]
        for row in rows
    ]
    measure.print_table(f"{name}{', frozen weights' if freeze else ''}", columns, cells)
    return rows


def _in_inference_mode(detector: nn.Module, image: Tensor) -> measure.Call:
    return torch.inference_mode()(functools.partial(detector, [image]))


def main(
    *,
    rounds: measure.Rounds = 5,
    threads: measure.Threads = 2,
    freeze: Annotated[bool, typer.Option(help="Let torch fold the weights into compiled code.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Models; both by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file, written at the end.")] = None,
) -> None:
    """Time compiled detectors beside optimized ones."""
    measure.start(threads, rounds)
    rows = [row for name in model or MODELS for row in report(name, rounds=rounds, freeze=freeze)]
    if output:
        document = circumstances(torch.device("cpu")) | {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
