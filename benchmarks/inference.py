"""``maskrcnn_fpn_r50`` against torchvision's model of the same weights, as it is, optimized and in bf16.

All get the same image, which none of them resizes. torchvision, and ours where no more is said, paste the masks of some
60 objects into it; "RLE" means run lengths instead, which is what evaluation and files need: torchvision's masks are
encoded once they are pasted, ours are never pasted. Every side is compared with torchvision as it is and at the same
kind of output, and compared with the target both times. Outputs are compared first. Ours are laid out as
:class:`a2fpn.Predictor` lays them out. Beside them stand ``maskrcnn_a2fpn_r50``, grafted onto the same weights, and the
cascades on the same backbone, pyramid and proposals, with fresh heads made to find as many objects. Targets: ours in
no more time than torchvision's; optimized, with run lengths, in at most 0.78 of it at 480x640 and 0.66 at 800x1088; in
bf16 in at most 0.30, where the processor has units for it (AMX).
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import a2fpn
from a2fpn.convert import graft_model
from a2fpn.data import encode_masks
from a2fpn.detectors import RCNN
from benchmarks import _measure as measure
from benchmarks.gpu.record import circumstances

TORCHVISION, FPN, A2FPN = "torchvision", "maskrcnn_fpn_r50", "maskrcnn_a2fpn_r50"
TORCHVISION_RLE, RUN_LENGTH = f"{TORCHVISION}, RLE", f"{FPN}, RLE"
OPTIMIZED, OPTIMIZED_RLE, BF16 = f"{FPN}, optimized", f"{FPN}, optimized, RLE", f"{FPN}, bf16, RLE"
CASCADES = tuple(f"{name}_fpn_r50{how}" for name in ("cascademaskrcnn", "htc") for how in ("", ", optimized"))
SIDES = (TORCHVISION, TORCHVISION_RLE, FPN, RUN_LENGTH, OPTIMIZED, OPTIMIZED_RLE, BF16, A2FPN, *CASCADES)
QUICK_SIDES = (TORCHVISION, TORCHVISION_RLE, FPN, OPTIMIZED_RLE, BF16, A2FPN)
TARGETS = {(480, 640): 0.78, (800, 1088): 0.66}
BF16_TARGET = 0.30
TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-4}
LEAST_MASK_IOU = 0.99
FEWEST, MOST = 50, 70

Size = tuple[int, int]
Detections = Mapping[str, Tensor]


def make_torchvision(size: Size, weights: Path | None = None, threshold: float = 0.02) -> Any:
    """``maskrcnn_resnet50_fpn`` of torchvision in evaluation mode."""
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=min(size), max_size=max(size), box_score_thresh=threshold
    )
    if weights:
        model.load_state_dict(torch.load(weights))
    return model.eval()


def make_ours(side: str, weights: Path, threshold: float) -> a2fpn.Predictor:
    """Our model with torchvision's weights and its way to paste masks, laid out as users run it."""
    state = rename(torch.load(weights))
    name = side.partition(",")[0]
    # Fresh heads of a cascade are sure of nothing: as many objects, whatever they score.
    rule = (
        {"score_threshold": threshold} if name in (FPN, A2FPN) else {"score_threshold": 0.0, "detections_per_image": 60}
    )
    torch.manual_seed(0)
    model = a2fpn.create_model(
        FPN if name == A2FPN else name, num_classes=90, resize="none", mask_paste="torchvision", **rule
    ).eval()
    if name in (FPN, A2FPN):
        model.load_state_dict(state)
    else:
        shared = {key: x for key, x in state.items() if not key.startswith("roi_heads.")}
        if model.load_state_dict(shared, strict=False).unexpected_keys:
            raise RuntimeError(f"Backbone, pyramid and proposals of {name} have other names than those of {FPN}.")
    if name == A2FPN:
        model = graft_model(model).eval()
    if "bf16" in side or "optimized" in side:
        dtype = torch.bfloat16 if "bf16" in side else torch.float32
        return a2fpn.Predictor(a2fpn.optimize_for_inference(model, dtype=dtype), channels_last=False)
    return a2fpn.Predictor(model)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of torchvision's model to ours; only the pyramid's differ."""
    names = {"inner_blocks": "lateral", "layer_blocks": "output"}
    return {
        re.sub(
            r"^backbone\.fpn\.(\w+)\.(\d+)\.0\.", lambda m: f"neck.{names[m[1]]}.p{int(m[2]) + 2}.conv.", key
        ): tensor
        for key, tensor in state.items()
    }


def make_image(size: Size) -> Tensor:
    """Soft blobs of several scales."""
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(1, 3, size[0] // cell, size[1] // cell, generator=generator) for cell in (8, 32)]
    return torch.stack([F.interpolate(grid, size=size, mode="bilinear")[0] for grid in grids]).mean(0)


@torch.inference_mode()
def save_weights(size: Size, path: Path) -> float:
    """Save random weights that decide like trained ones: a few confident objects among many rejected boxes.

    Returns:
        A score threshold that leaves 50 to 70 objects, in the widest gap between two scores.

    Raises:
        RuntimeError: If there are fewer.
    """
    torch.manual_seed(0)
    model = make_torchvision(size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(std=0.1)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, std=0.1)
    image = make_image(size)
    # Fresh heads say nearly the same of every box: class scores are centered and spread over this image's boxes.
    predictor = model.roi_heads.box_predictor.cls_score
    hook = predictor.register_forward_hook(functools.partial(_standardize, spread=1.0))
    model([image])
    hook.remove()
    torch.save(model.state_dict(), path)
    scores = model([image])[0]["scores"]
    if len(scores) <= MOST:
        raise RuntimeError(f"Random weights found {len(scores)} objects, not {MOST}.")
    gaps = scores[FEWEST - 1 : MOST] - scores[FEWEST : MOST + 1]
    place = FEWEST + int(gaps.argmax())
    return float(scores[place - 1 : place + 1].mean())


def _standardize(linear: nn.Linear, _: object, output: Tensor, *, spread: float) -> None:
    gain = spread / float(output.std(0).mean())
    linear.bias.sub_(output.mean(0)).mul_(gain)
    linear.weight.mul_(gain)


def prepare(side: str, size: Size, weights: Path, threshold: float) -> measure.Call:
    """Make a model; return one detection."""
    image = make_image(size)
    if side.startswith(TORCHVISION):
        model = make_torchvision(size, weights, threshold)
        plain = torch.inference_mode()(lambda: model([image]))
        return (lambda: encode_masks(plain()[0]["masks"][:, 0] > 0.5)) if side == TORCHVISION_RLE else plain
    predictor = make_ours(side, weights, threshold)
    if "RLE" in side:
        return lambda: predictor.predict([image])
    return torch.inference_mode()(lambda: predictor.model([image]))


def compare(reference: Detections, ours: Detections) -> str:
    """Match two sets of detections and describe the largest differences.

    Args:
        reference: torchvision's, whose labels count the background.
        ours: Ours.

    Raises:
        RuntimeError: If a detection has no partner, or differs by more than the tolerances.
    """
    distances = _distances(reference, ours)
    if distances.shape[0] != distances.shape[1] or len(set(distances.argmin(1).tolist())) != len(distances):
        raise RuntimeError(f"torchvision found {distances.shape[0]} objects, ours {distances.shape[1]}: no pairs.")
    partner = distances.argmin(1)
    parts = []
    for name, tolerance in TOLERANCES.items():
        difference = float((reference[name] - ours[name][partner]).abs().max())
        if difference > tolerance:
            raise RuntimeError(f"The {name} differ by {difference:.1e}, more than {tolerance:.0e}.")
        parts.append(f"{name} {difference:.0e} (relative {difference / float(reference[name].abs().max()):.0e})")
    iou = float(mask_iou(reference["masks"], ours["masks"][partner]).min())
    if iou < LEAST_MASK_IOU:
        raise RuntimeError(f"The IoU of a mask with its partner is {iou:.3f}, less than {LEAST_MASK_IOU}.")
    return f"{len(partner)} objects on either side; largest differences: {', '.join(parts)}; least mask IoU {iou:.4f}"


def resemblance(reference: Detections, ours: Detections) -> str:
    """Describe how near detections are that are not meant to be equal; arguments as those of :func:`compare`."""
    distance, partner = _distances(reference, ours).min(1)
    near = distance < 0.1 * (reference["boxes"][:, 2:] - reference["boxes"][:, :2]).amin(1)
    rows, partner = torch.where(near)[0], partner[near]
    score = float((reference["scores"][rows] - ours["scores"][partner]).abs().max())
    iou = float(mask_iou(reference["masks"][rows], ours["masks"][partner]).median())
    return (
        f"{len(reference['boxes'])} and {len(ours['boxes'])} objects, {len(rows)} with a partner of the same class "
        f"within a tenth of their size; of these the scores differ by at most {score:.0e}, median mask IoU {iou:.3f}"
    )


def _distances(reference: Detections, ours: Detections) -> Tensor:
    """Largest difference of corners of every pair, pixels; another label is as bad as a box far off."""
    theirs = torch.cat([reference["boxes"], 1e4 * (reference["labels"] - 1)[:, None]], 1)
    return torch.cdist(theirs, torch.cat([ours["boxes"], 1e4 * ours["labels"][:, None]], 1), p=float("inf"))


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of masks ``(N, 1, H, W)``, pair by pair; 1 where both are empty."""
    a, b = a.flatten(1) > 0.5, b.flatten(1) > 0.5
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """The parts of either side's detector under common names."""
    ours = isinstance(model, RCNN)
    heads = model.roi_heads
    return {
        "resize, normalize, pad": [model.preprocess if ours else model.transform],
        "backbone": [model.backbone if ours else model.backbone.body],
        "neck": [model.neck if ours else model.backbone.fpn],
        "RPN: convolutions": [model.rpn.head],
        "RPN: anchors": [model.rpn.anchor_generator],
        "RPN: decoding, top k, NMS": [model.rpn],
        "box RoI pooling": [heads.box_roi_pool],
        "box head": [heads.box_head, heads.box_predictor],
        "mask RoI pooling": [heads.mask_roi_pool],
        "mask head": [heads.mask_head, heads.mask_predictor],
        "decoding, NMS per class": [heads],
        "pasting masks, rest": [model],
    }


def main(
    rounds: measure.Rounds = 7,
    quick: measure.Quick = False,
    threads: measure.Threads = 0,
    profile: Annotated[bool, typer.Option(help="Print where the time goes, part by part.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of all sides, not of the first alone.")] = True,
    only: Annotated[str | None, typer.Option(help="One of the sizes, such as 480x640.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file whose figures of these sizes are replaced.")] = None,
) -> None:
    """Compare outputs, times and peak memory at two image sizes."""
    rounds = 1 if quick else rounds
    sizes, sides = ([(32, 48)], QUICK_SIDES) if quick else (list(TARGETS), SIDES)
    measure.start(threads, rounds)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        measure.console().print(f"{BF16} is left out: this processor has no units for bf16.")
        sides = tuple(side for side in sides if side != BF16)
    document = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else {}
    for size in sizes:
        name = f"{size[0]}x{size[1]}"
        if only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = _report(size, sides, Path(folder, "weights.pt"), rounds, profile, memory and not quick)
        here = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
        document[name] = {**circumstances(torch.device("cpu")), **here, "rounds": rounds, "rows": rows}
    if output:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _report(
    size: Size, sides: Sequence[str], weights: Path, rounds: int, profile: bool, every_memory: bool
) -> list[dict[str, Any]]:
    threshold = save_weights(size, weights)
    calls = {side: prepare(side, size, weights, threshold) for side in sides}
    title = f"Mask R-CNN, ResNet-50, {size[0]}x{size[1]}, one image"
    (reference,) = calls[TORCHVISION]()
    for side in (FPN, OPTIMIZED, *([BF16] if BF16 in sides else [])):
        (ours,) = prepare(side.removesuffix(", RLE"), size, weights, threshold)()
        text = (resemblance if side == BF16 else compare)(reference, ours)
        measure.console().print(f"{title}, {side.removesuffix(', RLE')}: {text}")
    timings = measure.time_interleaved(calls, rounds=rounds, title=title)
    memory = measure.peak_memories(prepare, sides, size, weights, threshold, quick=not every_memory)
    targets = {FPN: 1.0, OPTIMIZED_RLE: TARGETS.get(size), BF16: BF16_TARGET}
    rows, recorded = [], []
    for side in sides:
        plain = timings.ratio(side, TORCHVISION)
        alike = timings.ratio(side, TORCHVISION_RLE if "RLE" in side else TORCHVISION)
        goals = [measure.against(ratio.value, targets.get(side)) for ratio in (plain, alike)]
        rows.append(
            [
                side,
                measure.milliseconds(timings.median(side)),
                str(plain),
                goals[0],
                str(alike),
                goals[1],
                str(timings.ratio(side, FPN)),
                measure.mebibytes(memory[side]),
                f"{memory[side] / memory[TORCHVISION]:.2f}",
            ]
        )
        recorded.append(
            {
                "side": side,
                "ms": 1e3 * timings.median(side),
                "ratio": plain.value,
                "range": [plain.low, plain.high],
                "goal": goals[0],
                "same_output": alike.value,
                "same_output_goal": goals[1],
            }
        )
    columns = [
        "model",
        "time",
        "/ torchvision",
        "target",
        "same output",
        "target",
        "/ fpn",
        "peak memory",
        "/ torchvision",
    ]
    measure.print_table(title, columns, rows)
    if profile:
        _profile(size, weights, threshold, rounds)
    return recorded


def _profile(size: Size, weights: Path, threshold: float, rounds: int) -> None:
    image = make_image(size)
    models: dict[str, nn.Module] = {TORCHVISION: make_torchvision(size, weights, threshold)}
    models |= {side: make_ours(side, weights, threshold).model for side in (FPN, A2FPN)}
    run = torch.inference_mode()(lambda model: model([image]))
    sides = {name: (parts_of(model), functools.partial(run, model)) for name, model in models.items()}
    seconds = measure.time_parts(sides, rounds=rounds, title="parts")
    measure.print_table(
        "Where the time goes",
        ["part", *models, f"{FPN} / torchvision"],
        [
            [
                part,
                *(measure.milliseconds(seconds[name][part]) for name in models),
                f"{seconds[FPN][part] / seconds[TORCHVISION][part]:.2f}",
            ]
            for part in seconds[FPN]
        ],
    )


if __name__ == "__main__":
    typer.run(main)
