"""Inference against torchvision on one GPU: the same weights, images, and pasted masks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import a2fpn
from benchmarks import inference as base
from benchmarks.gpu.record import Call, Record, peak_bytes, precision, time_sides
from benchmarks.gpu.static import accelerated

GOAL, NECK_GOAL = 0.60, 1.35
CASCADE = "cascademaskrcnn_fpn_r50"
OURS = (base.FPN, base.A2FPN)

# By what they say about the goals, should the time run out.
CASES = [
    ((800, 1333), 1, "bf16"),
    ((800, 1333), 1, "tf32"),
    ((800, 1333), 8, "bf16"),
    ((800, 1333), 1, "fp32"),
    ((480, 640), 1, "bf16"),
    ((800, 1333), 8, "tf32"),
    ((480, 640), 8, "bf16"),
    ((480, 640), 1, "tf32"),
    ((800, 1333), 8, "fp32"),
]
QUICK_CASES = [((32, 48), 1, "bf16"), ((32, 48), 2, "fp32")]


def run(record: Record) -> None:
    """Measure case by case, eager and graphs first, the compiler where time is left."""
    cases, models = QUICK_CASES if record.quick else CASES, Models()
    with tempfile.TemporaryDirectory() as folder:
        thresholds: dict[base.Size, float] = {}
        for size, batch, kind in cases:
            path = Path(folder, f"{size[0]}.pt")
            if size not in thresholds:
                thresholds[size] = base.save_weights(size, path)
            if record.left < 20:
                record.add(size=f"{size[0]}x{size[1]}", batch=batch, precision=kind, side="left out: no time")
                continue
            with record.attempt(size=f"{size[0]}x{size[1]}", batch=batch, precision=kind):
                _case(record, models, size, batch, kind, path, thresholds[size])
        for size, batch, kind in cases[:3]:
            if record.left > 75 or record.quick:
                with record.attempt(size=f"{size[0]}x{size[1]}", batch=batch, precision=kind, side="compiled"):
                    _case(
                        record,
                        models,
                        size,
                        batch,
                        kind,
                        Path(folder, f"{size[0]}.pt"),
                        thresholds[size],
                        compiled=True,
                    )


class Models:
    """Detectors on the device that several cases use."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The detector of a key, made when it is asked for first."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _case(
    record: Record,
    models: Models,
    size: base.Size,
    batch: int,
    kind: str,
    path: Path,
    threshold: float,
    *,
    compiled: bool = False,
) -> None:
    device = record.device
    image = base.make_image(size).to(device)
    images = [image.roll(37 * i, -1) for i in range(batch)]
    with precision(kind, device) as autocast:
        theirs = models.get((size, base.TORCHVISION), lambda: base.make_torchvision(size, path, threshold).to(device))
        calls: dict[str, Call] = {base.TORCHVISION: _plain(theirs, images, autocast)}
        if compiled:
            sides = {
                f"{base.FPN}, compiled": (base.FPN, "compiled"),
                f"{base.A2FPN}, compiled": (base.A2FPN, "compiled"),
            }
        else:
            sides = {f"{name}{how and ', '}{how}": (name, how) for how in ("", "optimized", "graphs") for name in OURS}
            if batch == 1 and kind == "bf16":
                sides |= {f"{CASCADE}{how and ', '}{how}": (CASCADE, how) for how in ("", "graphs")}
        for side, (name, how) in sides.items():
            with record.attempt(size=f"{size[0]}x{size[1]}", batch=batch, precision=kind, side=side):
                call = _ours(models, name, how, size, path, threshold, images, kind, autocast, device)
                call()
                calls[side] = call
        agreement = {side: _agreement(calls[base.TORCHVISION], calls[side], side, kind) for side in calls}
        timings = time_sides(calls, device=device, rounds=1 if record.quick else 5)
        for side, call in calls.items():
            fpn = side.replace("a2fpn", "fpn")
            ratio = timings.ratio(side, base.TORCHVISION)
            goal = GOAL if side.startswith(base.FPN) and ("graphs" in side or "compiled" in side) else None
            against = timings.ratio(side, fpn).value if "a2fpn" in side and fpn in calls else None
            memory = peak_bytes(call, device)
            record.add(
                size=f"{size[0]}x{size[1]}",
                batch=batch,
                precision=kind,
                side=side,
                ms=1e3 * timings.median(side),
                ratio=ratio.value,
                range=f"{ratio.low:.2f}-{ratio.high:.2f}",
                goal="" if goal is None else f"<= {goal} {'met' if ratio.value <= goal else 'missed'}",
                to_fpn=against,
                neck_goal="" if against is None else ("met" if against <= NECK_GOAL else "missed"),
                peak_mib=memory and round(memory / 2**20),
                outputs=agreement[side],
            )


def _plain(model: Any, images: list[Tensor], autocast: Callable[[], Any]) -> Call:
    def call() -> Any:
        with torch.inference_mode(), autocast():
            return model(images)

    return call


def _ours(
    models: Models,
    name: str,
    how: str,
    size: base.Size,
    path: Path,
    threshold: float,
    images: list[Tensor],
    kind: str,
    autocast: Callable[[], Any],
    device: torch.device,
) -> Call:
    def plain() -> Any:
        return base.make_ours(name, path, threshold).model.to(device).to(memory_format=torch.channels_last)

    def optimized() -> Any:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        made = a2fpn.optimize_for_inference(models.get((size, name), plain), dtype=dtype)
        if how != "optimized":
            accelerated(made.detector, how)
        return made

    if not how:
        return _plain(models.get((size, name), plain), images, autocast)
    return functools.partial(models.get((size, name, how, kind), optimized), images)


def _agreement(theirs: Call, ours: Call, side: str, kind: str) -> str:
    """Compare the detections of the first image; only float32 promises equality."""
    if side == base.TORCHVISION:
        return f"{len(theirs()[0]['boxes'])} objects"
    if "cascade" in side:
        return f"{len(ours()[0]['boxes'])} objects"
    (reference, found) = ({key: x.float().cpu() for key, x in call()[0].items()} for call in (theirs, ours))
    try:
        return (base.compare if kind == "fp32" and side.startswith(base.FPN) else base.resemblance)(reference, found)
    except RuntimeError as error:
        return f"UNEQUAL: {error}"
