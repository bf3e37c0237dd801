"""``a2fpn.layers.reassemble`` against the naive form: nearest upsampling, ``unfold`` with dilation 2, ``einsum``.

Targets at 256 channels, k = 5, on a CPU in eager mode: forward at most 0.10 of the time and 0.06 of the peak memory,
forward and backward together at most 0.04 and 0.15.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from a2fpn.layers import reassemble
from benchmarks import _measure as measure

K = 5
TIME_TARGETS = {"forward": 0.10, "forward + backward": 0.04}
MEMORY_TARGETS = {"forward": 0.06, "forward + backward": 0.15}

Size = tuple[int, int]
Reassembly = Callable[[Tensor, Tensor, Size], Tensor]


def naive_double(x: Tensor, kernels: Tensor, size: Size) -> Tensor:
    """As most ports have it: exact doubling, zeros beyond the border."""
    windows = F.unfold(F.interpolate(x, size=size, mode="nearest"), K, dilation=2, padding=2 * (K // 2))
    return torch.einsum("bckhw,bkhw->bchw", windows.view(*x.shape[:2], K * K, *size), kernels)


def naive_any(x: Tensor, kernels: Tensor, size: Size) -> Tensor:
    """For any pair of sizes, edges repeated: windows of the source, then nearest sampling."""
    windows = F.unfold(F.pad(x, (K // 2,) * 4, mode="replicate"), K).view(x.shape[0], -1, *x.shape[2:])
    windows = F.interpolate(windows, size=size, mode="nearest")
    return torch.einsum("bckhw,bkhw->bchw", windows.view(*x.shape[:2], K * K, *size), kernels)


@functools.cache
def compiled() -> Reassembly:
    """The op under ``torch.compile``, which it meets as k * k shifted products."""
    return torch.compile(reassemble, dynamic=False)


FORMS: dict[str, Callable[[], Reassembly]] = {
    "naive": lambda: naive_double,
    "naive, any size": lambda: naive_any,
    "ours": lambda: reassemble,
    "ours, compiled": compiled,
}


@dataclass(frozen=True)
class Case:
    """A comparison.

    Args:
        title: What it shows.
        source: Size of the source map.
        target: Size of the target map.
        naive: Key of ``FORMS`` to compare with.
        ours: Key of ``FORMS``.
        channels_last: Memory layout of the inputs.
        targets: Whether the targets apply.
    """

    title: str
    source: Size
    target: Size
    naive: str = "naive"
    ours: str = "ours"
    channels_last: bool = False
    targets: bool = False

    def __str__(self) -> str:
        return f"{self.title} {self.source[0]}x{self.source[1]} -> {self.target[0]}x{self.target[1]}"


def cases(fine: Size, *, compile_too: bool) -> list[Case]:
    """Comparisons for a pyramid whose finest map has the given size, a multiple of 4."""
    middle, coarse = (fine[0] // 2, fine[1] // 2), (fine[0] // 4, fine[1] // 4)
    odd = (fine[0] - 1, fine[1] - 1)
    chosen = [
        Case("2x", coarse, middle, targets=True),
        Case("2x", middle, fine, targets=True),
        Case("2x, channels last", middle, fine, channels_last=True),
        Case("2x - 1", middle, odd, naive="naive, any size"),
        Case("pooling (GACAP)", fine, middle, naive="naive, any size"),
    ]
    return [*chosen, Case("2x, compiled", middle, fine, ours="ours, compiled")] if compile_too else chosen


def prepare(form: str, case: Case, channels: int, backward: bool) -> measure.Call:
    """Makes inputs; returns one run of a form."""
    operation = FORMS[form]()
    x, kernels = inputs(case, channels)
    if not backward:
        return functools.partial(torch.no_grad()(operation), x, kernels, case.target)
    gradient = torch.randn(1, channels, *case.target)
    x.requires_grad_()
    kernels.requires_grad_()
    return lambda: torch.autograd.grad(operation(x, kernels, case.target), (x, kernels), gradient)


def inputs(case: Case, channels: int) -> tuple[Tensor, Tensor]:
    """Source and normalized kernels, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, *case.source, generator=generator)
    kernels = torch.randn(1, K * K, *case.target, generator=generator).softmax(1)
    if case.channels_last:
        return x.to(memory_format=torch.channels_last), kernels.to(memory_format=torch.channels_last)
    return x, kernels


def check(case: Case, channels: int) -> float:
    """Largest difference between the two forms; the naive one is wrong at the border, which is left out.

    Raises:
        RuntimeError: If they differ.
    """
    x, kernels = inputs(case, channels)
    ours, theirs = (FORMS[form]()(x, kernels, case.target) for form in (case.ours, case.naive))
    border = 2 * (K // 2) if case.naive == "naive" else 0
    inside = (..., slice(border, -border or None), slice(border, -border or None))
    difference = float((ours[inside] - theirs[inside]).abs().max())
    if difference > 1e-5:
        raise RuntimeError(f"{case}: the two forms differ by {difference:.1e}.")
    return difference


def main(rounds: measure.Rounds = 7, quick: measure.Quick = False, threads: measure.Threads = 0) -> None:
    """Compares times and peak memory, forward and forward + backward."""
    rounds = 1 if quick else rounds
    fine, channels = ((32, 48), 8) if quick else ((200, 272), 256)
    measure.start(threads, rounds)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if not compiler:
        measure.console().print("torch.compile needs a C++ compiler and there is none: its row is left out.")
    rows: dict[str, list[list[str]]] = {key: [] for key in TIME_TARGETS}
    for case in cases(fine, compile_too=bool(compiler) and not quick):
        measure.console().print(f"{case}: largest difference {check(case, channels):.0e}")
        for key, table in rows.items():
            table.append(_row(case, channels, rounds, key))
    columns = ["map", "naive", "ours", "ratio", "target", "naive", "ours", "ratio", "target"]
    for key, table in rows.items():
        measure.print_table(f"reassemble, {channels} channels, k = {K}, {key}: time, then peak memory", columns, table)


def _row(case: Case, channels: int, rounds: int, key: str) -> list[str]:
    backward = key != "forward"
    forms = {"naive": case.naive, "ours": case.ours}
    calls = {side: prepare(form, case, channels, backward) for side, form in forms.items()}
    timings = measure.time_interleaved(calls, rounds=rounds, title=f"{case}, {key}")
    memory = {side: measure.peak_memory(prepare, form, case, channels, backward) for side, form in forms.items()}
    ratio, memory_ratio = timings.ratio("ours", "naive"), memory["ours"] / max(1, memory["naive"])
    return [
        str(case),
        *(measure.milliseconds(timings.median(side)) for side in forms),
        str(ratio),
        measure.against(ratio.value, TIME_TARGETS[key] if case.targets else None),
        *(measure.mebibytes(memory[side]) for side in forms),
        f"{memory_ratio:.2f}",
        measure.against(memory_ratio, MEMORY_TARGETS[key] if case.targets else None),
    ]


if __name__ == "__main__":
    typer.run(main)
