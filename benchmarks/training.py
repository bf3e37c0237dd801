"""A training step of ``maskrcnn_fpn_r50`` against torchvision's on the CPU: forward, backward, SGD.

Both have the same weights, images and objects, frozen batch norm, and the stem and first stage frozen; torchvision gets
masks as N full-size planes, ours as its loader gives them. Losses are compared first. Targets: at most 0.80 of
torchvision's time and of its peak memory, once as it is and once with the backbone's activations computed again
(``grad_checkpointing=True``). Beside them stand the other necks and detectors of the family. Then it is told which
share of a step the checks of losses and gradient take; ``--checks`` measures that alone.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import a2fpn
from a2fpn.convert import from_torchvision
from a2fpn.data import InstanceMasks
from a2fpn.training.health import total_norm
from benchmarks import _measure as measure
from benchmarks.gpu.record import circumstances

TORCHVISION, FPN = "torchvision", "maskrcnn_fpn_r50"
RECOMPUTED = f"{FPN}, grad_checkpointing"
OTHERS = ("maskrcnn_a2fpn_lite_r50", "maskrcnn_a2fpn_r50", "cascademaskrcnn_fpn_r50", "htc_fpn_r50")
TARGET = 0.80
CHECKS_TARGET = 0.01
TOLERANCE = 1e-3  # relative; the layouts round differently, and random weights amplify it
CLASSES, OBJECTS = 10, 12
FROZEN = ("conv1", "bn1", "layer1")

Size = tuple[int, int]


def make_torchvision(size: Size, **options: Any) -> Any:
    """Mask R-CNN as torchvision fine-tunes it, with random weights; options are those of its constructor."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    _calm(backbone)
    return MaskRCNN(backbone, CLASSES + 1, min_size=min(size), max_size=max(size), **options).train()


def _calm(backbone: nn.Module) -> None:
    """Set frozen statistics with which activations of random weights do not explode."""
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(2.0)


def make(side: str, size: Size, **options: Any) -> nn.Module:
    """Either side's model in training mode; ours with torchvision's weights, and options, if it is the same model."""
    if side == TORCHVISION:
        model: nn.Module = make_torchvision(size, **options)
        return model
    if side in (FPN, RECOMPUTED):
        model = from_torchvision(make_torchvision(size, **options))
        if side == RECOMPUTED:
            model.get_submodule("backbone.body").set_grad_checkpointing(True)  # type: ignore[operator]
    else:
        torch.manual_seed(0)
        model = a2fpn.create_model(side, num_classes=CLASSES, norm="frozen", resize="none")
        _calm(model)
    for name, parameter in model.get_submodule("backbone").named_parameters():
        if name.removeprefix("body.").startswith(FROZEN):
            parameter.requires_grad_(False)
    return model.train().to(memory_format=torch.channels_last)


def make_batch(size: Size, *, dense: bool, count: int = 2) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Images of noise with a dozen ellipses each."""
    generator = torch.Generator().manual_seed(1)
    height, width = size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    images, targets = [], []
    for _ in range(count):
        half = torch.rand(OBJECTS, 2, generator=generator) * min(size) / 4 + 4
        center = half + torch.rand(OBJECTS, 2, generator=generator) * (torch.tensor([width, height]) - 2 * half)
        inside = ((columns - center[:, 0, None, None]) / half[:, 0, None, None]) ** 2 + (
            (rows - center[:, 1, None, None]) / half[:, 1, None, None]
        ) ** 2 <= 1
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        images.append(torch.rand(3, height, width, generator=generator))
        masks = inside.to(torch.uint8)
        boxes = torch.cat([center - half, center + half], 1)
        targets.append(
            {
                "boxes": boxes,
                "labels": labels + 1 if dense else labels,  # torchvision counts the background
                "masks": masks if dense else InstanceMasks.from_dense(masks),
            }
        )
    return images, targets


def prepare(side: str, size: Size) -> measure.Call:
    """Make a model and a batch; return one step, which returns its losses."""
    model = make(side, size)
    images, targets = make_batch(size, dense=side == TORCHVISION)
    run = model if side == TORCHVISION else functools.partial(model, resize=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)

    def step() -> dict[str, float]:
        torch.manual_seed(0)
        losses: dict[str, Tensor] = run(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    return step


def main(
    rounds: measure.Rounds = 5,
    quick: measure.Quick = False,
    threads: measure.Threads = 0,
    others: Annotated[bool, typer.Option(help="Measure the other necks and detectors as well.")] = False,
    checks: Annotated[bool, typer.Option(help="Measure the checks of losses and gradient alone.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for what the checks take.")] = None,
) -> None:
    """Compare losses, times and peak memory of one training step of two images."""
    rounds = 1 if quick else rounds
    size = (64, 96) if quick else (480, 640)
    measure.start(threads, rounds)
    if checks:
        step = measure.time_interleaved({FPN: prepare(FPN, size)}, rounds=rounds, title="Training step").median(FPN)
        found = _report_checks(size, step, rounds)
        if output:
            document = {**circumstances(torch.device("cpu")), "threads": torch.get_num_threads(), "rounds": rounds}
            output.write_text(json.dumps({**document, **found}, indent=1) + "\n", encoding="utf-8")
        return
    _report(size, (TORCHVISION, FPN, RECOMPUTED, *(OTHERS if others else ())), rounds)


def _report(size: Size, sides: Sequence[str], rounds: int) -> None:
    theirs = prepare(TORCHVISION, size)()
    for side in (FPN, RECOMPUTED):
        ours = prepare(side, size)()
        worst = max(abs(ours[name] - value) / max(abs(value), 1e-6) for name, value in theirs.items())
        losses = ", ".join(f"{name} {theirs[name]:.4f} / {ours[name]:.4f}" for name in sorted(theirs))
        measure.console().print(f"Losses, torchvision / {side}: {losses}; largest relative difference {worst:.0e}")
        if worst > TOLERANCE or theirs.keys() != ours.keys():
            raise RuntimeError(f"The losses differ by {worst:.1e}, more than {TOLERANCE:.0e}.")
    calls = {side: prepare(side, size) for side in sides}
    title = f"Training step, 2 images of {size[0]}x{size[1]}"
    timings = measure.time_interleaved(calls, rounds=rounds, title=title)
    memory = measure.peak_memories(prepare, sides, size)
    rows = []
    for side in sides:
        time, space = timings.ratio(side, TORCHVISION), memory[side] / memory[TORCHVISION]
        target = TARGET if side in (FPN, RECOMPUTED) else None
        rows.append(
            [
                side,
                measure.milliseconds(timings.median(side)),
                str(time),
                measure.against(time.value, target),
                measure.mebibytes(memory[side]),
                f"{space:.2f}",
                measure.against(space, target),
            ]
        )
    columns = ["model", "time", "/ torchvision", "target", "peak memory", "/ torchvision", "target"]
    measure.print_table(title, columns, rows)
    _report_checks(size, timings.median(FPN), rounds)


def _report_checks(size: Size, step: float, rounds: int) -> dict[str, float]:
    """Tell the time of the checks of losses and gradient in each step of a run.

    Timed by itself: beside a whole step it would drown in the noise.

    Args:
        size: Of the images, pixels.
        step: Seconds of a step without them.
        rounds: A tenth of how often.

    Returns:
        Milliseconds of a step and of the checks, and the share that these are.
    """
    model = make(FPN, size)
    images, targets = make_batch(size, dense=False)
    losses: dict[str, Tensor] = model(images, targets, resize=False)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()

    def look() -> bool:
        norm = total_norm(x.grad for x in model.parameters() if x.grad is not None)
        return math.isfinite(float(loss)) and math.isfinite(float(norm))

    seconds = measure.time_interleaved({"checks": look}, rounds=10 * rounds, title="Checks").median("checks")
    share = seconds / step
    measure.console().print(
        f"Looking at the loss and the gradient takes {measure.milliseconds(seconds)}, {share:.2%} of a step of {FPN} "
        f"({measure.milliseconds(step)}); target {CHECKS_TARGET:.0%}: {measure.against(share, CHECKS_TARGET)}"
    )
    return {"step_ms": 1000 * step, "checks_ms": 1000 * seconds, "share": share}


if __name__ == "__main__":
    typer.run(main)
