"""Content-aware reassembly beside other forms of the op, and beside a copy of the bytes it has to move.

Every form reads the map and the weights and writes the result; a copy of as many bytes is the floor. Goal: at most 2
times the copy's time, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from a2fpn.layers import reassemble
from a2fpn.layers.reassemble import _Reassemble, _reassemble_by_shifts
from benchmarks.gpu.record import Call, Record, peak_bytes, time_sides

GOAL = 2.0
K = 5
CASES = ((2, 256, 100, 168), (2, 256, 50, 84), (8, 256, 50, 84))
"""Batch, channels, height and width of a map that becomes twice as large; forms are compiled for the first."""

Form = Callable[[Tensor, Tensor], Tensor]


def ours(x: Tensor, kernels: Tensor) -> Tensor:
    """Run the op as the device runs it."""
    return reassemble(x, kernels, (kernels.shape[2], kernels.shape[3]))


def bags(x: Tensor, kernels: Tensor) -> Tensor:
    """Weighted bags: ``embedding_bag``."""
    result: Tensor = _Reassemble.apply(x, kernels.to(x.dtype), K)
    return result


def shifts(x: Tensor, kernels: Tensor) -> Tensor:
    """A shifted product for each place of the window."""
    return _reassemble_by_shifts(x, kernels.to(x.dtype), K)


def compiled() -> Form:
    """Shifts under ``torch.compile``, whose buffers stay for a backward pass that runs again and again."""
    torch._functorch.config.donated_buffer = False
    return torch.compile(shifts, dynamic=False)


FORMS: dict[str, Callable[[], Form]] = {
    "reassemble": lambda: ours,
    "embedding_bag": lambda: bags,
    "shifts": lambda: shifts,
    "shifts, compiled": compiled,
}


def run(record: Record) -> None:
    """Each pass in bfloat16 and float32, NHWC memory."""
    for case in ((1, 8, 6, 8),) if record.quick else CASES:
        for dtype in (torch.bfloat16, torch.float32):
            if record.left < 15:
                return
            with record.attempt(case=str(case), dtype=str(dtype)):
                _case(record, case, dtype)


def _case(record: Record, case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, kernels, direction = _inputs(case, dtype, record.device)
    wide = [y.detach().to(dtype).double().requires_grad_() for y in (x, kernels)]
    exact = bags(*wide)
    expected = (exact.detach(), *torch.autograd.grad(exact, wide, direction.double()))
    operands = x.nbytes + kernels.nbytes
    moved = {"forward": operands + direction.nbytes, "backward": 2 * operands + direction.nbytes}
    floor = {}
    for name, size in moved.items():
        source = torch.empty(size // 2, dtype=torch.uint8, device=record.device)  # a copy reads and writes
        floor[name] = _seconds(functools.partial(torch.empty_like(source).copy_, source), record)
    common = {"case": str(case), "dtype": str(dtype).removeprefix("torch.")}
    for name, seconds in floor.items():
        record.add(
            **common, what=name, side="copy", ms=1e3 * seconds, to_copy=1.0, gb_per_s=moved[name] / seconds / 1e9
        )
    for form_name, make in FORMS.items():
        if make is compiled and (record.quick or case != CASES[0] or record.left < 30):
            continue  # compiling takes longer than all the rest
        with record.attempt(**common, side=form_name):
            form = make()
            out = form(x, kernels)
            errors = _errors((out.detach(), *torch.autograd.grad(out, (x, kernels), direction)), expected)
            out = form(x, kernels)
            calls: Mapping[str, Call] = {
                "forward": functools.partial(form, x, kernels),
                "backward": functools.partial(torch.autograd.grad, out, (x, kernels), direction, retain_graph=True),
            }
            for name, call in calls.items():
                seconds = _seconds(call, record)
                memory = peak_bytes(call, record.device)
                record.add(
                    **common,
                    what=name,
                    side=form_name,
                    ms=1e3 * seconds,
                    to_copy=seconds / floor[name],
                    gb_per_s=moved[name] / seconds / 1e9,
                    goal=_goal(seconds / floor[name]) if form is ours else None,
                    peak_mib=memory and round(memory / 2**20),
                    relative_error=max(errors[:1] if name == "forward" else errors[1:]),
                )


def _goal(ratio: float) -> str:
    return f"<= {GOAL:g} {'met' if ratio <= GOAL else 'missed'}"


def _inputs(case: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Map and direction channels-last, as detectors have them, and float32 weights."""
    batch, channels, height, width = case
    random: Any = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    target = (2 * height, 2 * width)
    x, direction = (
        random(batch, channels, *size).to(dtype, memory_format=torch.channels_last)
        for size in ((height, width), target)
    )
    return x.requires_grad_(), random(batch, K * K, *target).softmax(1).requires_grad_(), direction


def _errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Relative rms errors."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]


def _seconds(call: Call, record: Record) -> float:
    """Median; on CUDA by its events, the cache flushed before every call."""
    if record.device.type != "cuda":
        return float(time_sides({"call": call}, device=record.device, rounds=1, least=0.01).median("call"))
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=100, return_mode="median")) / 1000
