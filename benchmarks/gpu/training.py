"""A training step against torchvision's on one GPU: forward, backward, SGD, batches that lie ready.

torchvision's targets lie on the GPU, as it wants them; ours in page-locked memory, as our loader gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from a2fpn.data import InstanceMasks
from a2fpn.detectors import Detector
from benchmarks import training as base
from benchmarks.gpu.record import Call, Record, kernel_use, peak_bytes, precision, synchronize, time_sides

GOAL, NECK_GOAL, NECK_MEMORY_GOAL = 0.70, 1.35, 1.25
COMPILED, STORED, RECOMPUTED = ", compiled", ", stored", ", recomputed"
"""Ends of sides: compiled maps, a neck without and with activation checkpointing where that is not the default."""
A2FPN, CASCADE = "maskrcnn_a2fpn_r50", "cascademaskrcnn_fpn_r50"
CASES = [(8, "bf16"), (2, "bf16"), (2, "tf32"), (8, "tf32")]
SIZE, CHECKED_SIZE, QUICK_SIZE = (800, 1333), (320, 480), (64, 96)
TOLERANCE = 2e-3  # relative

# Samplers that take all there are draw nothing: the losses of both sides can be compared.
ALL: dict[str, Any] = {
    "rpn_batch_size_per_image": 10**6,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 10**6,
    "box_positive_fraction": 1.0,
}


def run(record: Record) -> None:
    """Compare the losses, then measures case by case."""
    with record.attempt(side="losses"):
        _compare_losses(record)
    for batch, kind in [(2, "bf16")] if record.quick else CASES:
        if record.left < 25:
            record.add(batch=batch, precision=kind, side="left out: no time")
            continue
        with record.attempt(batch=batch, precision=kind):
            _case(record, batch, kind)


def _compare_losses(record: Record) -> None:
    device, size = record.device, QUICK_SIZE if record.quick else CHECKED_SIZE
    losses = {}
    with precision("fp32", device) as autocast:
        for side in (base.TORCHVISION, base.FPN):
            step = make_step(side, size, 2, device, autocast, **ALL)
            losses[side] = {name: float(value) for name, value in step().items()}
    theirs, ours = losses[base.TORCHVISION], losses[base.FPN]
    worst = max(abs(ours[name] - value) / max(abs(value), 1e-6) for name, value in theirs.items())
    record.note("losses", {**losses, "largest_relative_difference": worst, "tolerance": TOLERANCE})
    print(f"Losses, float32, all samples: {losses}; largest relative difference {worst:.1e}", flush=True)
    if worst > TOLERANCE or theirs.keys() != ours.keys():
        raise RuntimeError(f"The losses differ by {worst:.1e}, more than {TOLERANCE:.0e}: {losses}.")


def _case(record: Record, batch: int, kind: str) -> None:
    device, size = record.device, QUICK_SIZE if record.quick else SIZE
    sides = [base.TORCHVISION, base.FPN, A2FPN, A2FPN + STORED]
    if kind == "bf16":
        sides += [base.FPN + COMPILED, *([CASCADE] if batch == 2 else [])]
        # The compiler takes a minute for each.
        compiled = [A2FPN + COMPILED, A2FPN + COMPILED + RECOMPUTED]
        sides += compiled if record.quick or record.left > 150 else compiled[:1] if record.left > 90 else []
    with precision(kind, device) as autocast:
        calls: dict[str, Call] = {}
        for side in sides:
            with record.attempt(batch=batch, precision=kind, side=side):
                step = make_step(side, size, batch, device, autocast)
                step()
                calls[side] = step
        memory = {side: peak_bytes(call, device) for side, call in calls.items()}
        timings = time_sides(calls, device=device, rounds=1 if record.quick else 4, least=0.6)
        use = {side: kernel_use(call, device) for side, call in calls.items()}
    for side in calls:
        ratio, seconds = timings.ratio(side, base.TORCHVISION), timings.median(side)
        done, to_fpn, memory_to_fpn = use[side], None, None
        fpn = base.FPN + (COMPILED if COMPILED in side else "")
        if side.startswith((A2FPN, CASCADE)) and fpn in calls:
            to_fpn, peak, theirs = timings.ratio(side, fpn).value, memory[side], memory[fpn]
            memory_to_fpn = peak / theirs if peak and theirs else None
        record.add(
            batch=batch,
            precision=kind,
            side=side,
            ms=1e3 * seconds,
            images_per_second=batch / seconds,
            ratio=ratio.value,
            range=f"{ratio.low:.2f}-{ratio.high:.2f}",
            goal=f"<= {GOAL} {'met' if ratio.value <= GOAL else 'missed'}" if side.startswith(base.FPN) else "",
            to_fpn=to_fpn,
            memory_to_fpn=memory_to_fpn,
            neck_goal=_verdict(to_fpn, memory_to_fpn) if side.startswith(A2FPN) else "",
            # The peak of a step beside what the other sides hold.
            peak_mib=memory[side] and round(memory[side] / 2**20),
            gpu_busy=done and done["busy_seconds"] / seconds,
            kernels=done and done["kernels"],
            host_waits=done and done["host_waits"],
        )


def _verdict(time: float | None, memory: float | None) -> str:
    goals = [("time", time, NECK_GOAL), ("memory", memory, NECK_MEMORY_GOAL)]
    return ", ".join(
        f"{name} <= {goal} {'met' if value <= goal else 'missed'}" for name, value, goal in goals if value is not None
    )


def make_step(
    side: str,
    size: base.Size,
    batch: int,
    device: torch.device,
    autocast: Callable[[], Any],
    **options: Any,
) -> Callable[[], dict[str, Tensor]]:
    """One step of the optimizer, which gives its losses without waiting for them."""
    theirs = side == base.TORCHVISION
    model = base.make(side.partition(",")[0], size, **options).to(device)
    if isinstance(model, Detector):
        model.checkpoint_neck(True if RECOMPUTED in side else False if STORED in side else None)
        if COMPILED in side:
            model.compile_maps()
    images, targets = base.make_batch(size, dense=theirs, count=batch)
    images = [image.to(device) for image in images]
    targets = [{key: _place(x, device, theirs) for key, x in target.items()} for target in targets]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda")
    keywords = {} if theirs else {"resize": False}

    def step() -> dict[str, Tensor]:
        with autocast():
            losses: dict[str, Tensor] = model(images, targets, **keywords)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}

    synchronize(device)
    return step


def _place(x: Tensor | InstanceMasks, device: torch.device, theirs: bool) -> Any:
    if theirs:
        return x.to(device)
    return x.pin_memory() if device.type == "cuda" else x
