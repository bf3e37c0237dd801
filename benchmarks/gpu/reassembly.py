"""Content-aware reassembly against what it has to move at least: its inputs and outputs, once each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from a2fpn.layers import reassemble
from benchmarks.gpu.record import Call, Record, peak_bytes, precision, time_sides

CASES = [(1, 256, 100, 168, 5), (2, 256, 100, 168, 5), (8, 256, 50, 84, 5)]


def run(record: Record) -> None:
    """Forward and both passes, in float32 and bfloat16, NHWC memory."""
    for case in [(1, 8, 6, 8, 3)] if record.quick else CASES:
        for dtype in (torch.float32, torch.bfloat16):
            if record.left < 15:
                return
            with record.attempt(case=str(case), dtype=str(dtype)), precision("tf32", record.device):
                _case(record, case, dtype)


def _case(record: Record, case: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    device = record.device
    batch, channels, height, width, k = case
    size = (2 * height, 2 * width)
    x = torch.randn(batch, channels, height, width, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernels = torch.randn(batch, k * k, *size, device=device, dtype=dtype).softmax(1)
    kernels = kernels.to(memory_format=torch.channels_last)
    x.requires_grad_()
    kernels.requires_grad_()
    sides = {"reassemble": lambda a, b: reassemble(a, b, size)}
    if record.left > 30 and not record.quick:
        # Under the compiler the op is written as shifted products.
        sides["torch.compile"] = torch.compile(lambda a, b: reassemble(a, b, size), dynamic=False)
    if batch * channels * height * width < 2**23:
        sides["unfold and einsum"] = lambda a, b: _unfold(a, b, k)
    expected = _unfold(x.detach().double(), kernels.detach().double(), k)
    grad = torch.randn(batch, channels, *size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    moved = x.numel() + kernels.numel() + grad.numel()
    source = torch.randn(moved // 2, device=device, dtype=dtype)  # a copy reads and writes
    target = torch.empty_like(source)
    forward: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    both: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    errors = {}
    for name, call in sides.items():
        with record.attempt(case=str(case), dtype=str(dtype), side=name):
            out = call(x, kernels)
            errors[name] = float((out.detach().double() - expected).norm() / expected.norm())
            del out
            forward[name] = lambda call=call: call(x.detach(), kernels.detach())
            both[name] = lambda call=call: torch.autograd.grad(call(x, kernels), (x, kernels), grad)
    for what, calls in (("forward", forward), ("forward and backward", both)):
        timings = time_sides(calls, device=device, rounds=1 if record.quick else 5, least=0.05)
        for name, call in calls.items():
            seconds = timings.median(name)
            memory = peak_bytes(call, device)
            record.add(
                case=str(case),
                dtype=str(dtype).removeprefix("torch."),
                what=what,
                side=name,
                ms=1e3 * seconds,
                to_copy=timings.ratio(name, "copy").value,
                gb_per_s=moved * x.element_size() / seconds / 1e9,
                peak_mib=memory and round(memory / 2**20),
                relative_error=errors.get(name),
            )


def _unfold(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    batch, channels, height, width = x.shape
    padded = F.pad(x, (k // 2,) * 4, mode="replicate")
    windows = F.unfold(padded, k).view(batch, channels * k * k, height, width)
    windows = F.interpolate(windows, scale_factor=2, mode="nearest").view(batch, channels, k * k, *kernels.shape[2:])
    return torch.einsum("bckhw,bkhw->bchw", windows, kernels)
