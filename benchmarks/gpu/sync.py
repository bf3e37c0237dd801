"""Lines of a training step at which the host waits for the GPU, for ours and torchvision's."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import torch

from benchmarks import training as base
from benchmarks.gpu.record import Record, kernel_use, precision, synchronize
from benchmarks.gpu.training import A2FPN, CASCADE, QUICK_SIZE, SIZE, make_step


def run(record: Record) -> None:
    """Count the waits of one step of every detector, in the main thread and in the backward pass."""
    device, size = record.device, QUICK_SIZE if record.quick else SIZE
    for side in (base.TORCHVISION, base.FPN, A2FPN, CASCADE):
        if record.left < 10:
            break
        with record.attempt(side=side), precision("bf16", device) as autocast:
            step = make_step(side, size, 2, device, autocast)
            for _ in range(2):
                step()
            synchronize(device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    step()
                finally:
                    if device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
            places = Counter(
                f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
                for w in caught
                if "synchroniz" in str(w.message).lower()
            )
            use = kernel_use(step, device)
            record.add(
                side=side,
                waits=sum(places.values()),
                host_waits=use and use["host_waits"],
                copies_to_host=use and use["copies_to_host"],
                kernels=use and use["kernels"],
            )
            for place, count in places.most_common():
                record.add(side=side, place=place, waits=count)
