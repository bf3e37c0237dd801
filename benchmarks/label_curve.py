"""Mask AP over the number of labeled images, beside torchvision's Mask R-CNN with its v2 heads.

    python -m benchmarks.label_curve --data DIR --backbone-weights tf_efficientnet_lite0.safetensors --images 10

trains one model and adds a line to the records; run it for every number of images, seed and side, several at a time
if there is room. ``--report`` prints the table of the records and, with ``--picture``, draws the curve.

Both sides start from the same EfficientNet-Lite0 and see the same images in the same order with the same augmentation,
for the same number of steps of AdamW; the first seed's 50 images hold its 25. Ours is ``maskrcnn_fpn_lite0``.
torchvision's has a plain pyramid on the same features and the heads of ``maskrcnn_resnet50_fpn_v2``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import a2fpn
from a2fpn.config import Category
from a2fpn.data import CocoDataset, collate, encode_masks, train_transforms
from a2fpn.data.operations import load_coco, subset_coco
from a2fpn.evaluation import evaluate_coco
from benchmarks import _measure as measure
from benchmarks.gpu.record import commit

Side = Literal["a2fpn", "torchvision"]
SIZES, QUICK_SIZES = (384, 640), (64, 96)  # short and long side of images, pixels; crops are squares of the short one
ANCHORS = [[8], [16], [32], [64], [128]]
PROPOSALS, DETECTIONS, SAMPLES = 1000, 300, 256
RATE, DECAY, WARMUP, CLIP = 5e-4, 0.05, 20, 5.0


def main(
    data: Annotated[Path | None, typer.Option(help="Root of a data set in COCO format.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="File of the backbone's weights.")] = None,
    images: Annotated[int, typer.Option(help="Labeled images; 0 takes all.", min=0)] = 0,
    side: Annotated[Side, typer.Option(help="Whose model.")] = "a2fpn",
    seed: Annotated[int, typer.Option(help="Chooses the images, their order and the heads' weights.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    workers: Annotated[int, typer.Option(help="Loader processes.", min=0)] = 1,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    records: Annotated[Path, typer.Option(help="File that gets the result as a line.")] = Path("label_curve.jsonl"),
    report: Annotated[bool, typer.Option("--report", help="Show the records instead of training.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --report: picture of the curve.")] = None,
    quick: measure.Quick = False,
) -> None:
    """Train and evaluate one model, or report."""
    torch.set_num_threads(1)
    if report:
        rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        show(rows)
        if picture is not None:
            draw(rows, picture)
        return
    if data is None:
        raise typer.BadParameter("--data names the folder to train on; --report shows what was trained.")
    training, validation = (data / "annotations" / f"instances_{part}.json" for part in ("train", "val"))
    part = subset_coco(training, number=images, seed=seed) if images else load_coco(training)
    truth = CocoDataset(data / "images", validation)
    sizes, steps = (QUICK_SIZES, 2) if quick else (SIZES, steps)
    torch.manual_seed(seed)
    model = build(side, truth.categories, backbone_weights, sizes).to(device, memory_format=torch.channels_last)
    augment = augmentation(build("a2fpn", truth.categories, None, sizes).preprocess.target_size, sizes[0])
    samples = CocoDataset(data / "images", part, transforms=augment, categories=truth.categories)
    start = time.perf_counter()
    loss = train(model, side, samples, steps=steps, batch=batch, seed=seed, workers=workers, device=device)
    seconds = time.perf_counter() - start
    metrics = evaluate_coco(truth.coco, list(predict(model, side, truth, device)), max_detections=DETECTIONS)
    found = {name: value for name, value in metrics.to_dict().items() if name.split("/")[1].startswith("ap")}
    record = {
        "side": side,
        "images": len(samples),
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "data": data.name,
        "loss": round(loss, 4),
        "train_seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "commit": commit(),
        **{name: round(value, 4) for name, value in found.items()},
    }
    records.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(records, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # runs beside this one add lines as well
    os.write(descriptor, (json.dumps(record) + "\n").encode())
    os.close(descriptor)
    print(json.dumps(record))


def augmentation(target_size: Callable[..., tuple[int, int]], crop: int) -> Callable[..., Any]:
    """Return the augmentation of both sides: few images, so a strong one."""
    options: dict[str, Any] = {"scale_range": (0.6, 1.5), "horizontal_flip": 0.5, "vertical_flip": 0.5}
    return train_transforms(target_size, crop_size=crop, rotate90=0.75, color_jitter=0.3, **options)


def build(side: Side, categories: Sequence[Category], weights: Path | None, sizes: tuple[int, int]) -> Any:
    """Make a model with the limits that both share."""
    limits = {f"rpn_{kind}_nms_top_n_{phase}": PROPOSALS for kind in ("pre", "post") for phase in ("train", "test")}
    ours = a2fpn.create_model(
        "maskrcnn_fpn_lite0",
        categories=categories,
        backbone_weights=weights,
        norm="bn",
        min_size=sizes[0],
        max_size=sizes[1],
        anchor_sizes=ANCHORS,
        detections_per_image=DETECTIONS,
        box_batch_size=SAMPLES,
        score_threshold=0.05,
        **limits,
    )
    if side == "a2fpn":
        return ours
    features = _Features(ours.backbone, ours.backbone.out_spec.channels)
    ratios = (0.5, 1.0, 2.0)
    names = features.names
    theirs = MaskRCNN(
        features,
        len(categories) + 1,
        min_size=sizes[0],
        max_size=sizes[1],
        image_mean=list(ours.config.preprocess.mean),
        image_std=list(ours.config.preprocess.std),
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, ANCHORS)), (ratios,) * len(ANCHORS)),
        rpn_head=RPNHead(256, len(ratios), conv_depth=2),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d),
        box_detections_per_img=DETECTIONS,
        box_batch_size_per_image=SAMPLES,
        **limits,
    )
    for head in (theirs.rpn.head, theirs.roi_heads.box_predictor):
        # Boxes decoded in bfloat16 are off by up to 2 pixels, and on a CPU small ones get no width: a loss of NaN.
        head.register_forward_hook(lambda _head, _inputs, output: tree_map(Tensor.float, output))
    return theirs


class _Features(nn.Module):
    """The backbone's maps and torchvision's pyramid."""

    def __init__(self, body: Any, channels: Sequence[int]) -> None:
        super().__init__()
        self.body, self.names, self.out_channels = body, list(body.out_spec.names), 256
        self.fpn = FeaturePyramidNetwork(list(channels), 256, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(x))
        return maps


def train(
    model: Any, side: Side, samples: CocoDataset, *, steps: int, batch: int, seed: int, workers: int, device: str
) -> float:
    """Train, and return the mean loss of the last 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(len(samples), generator=generator).tolist()
    loader = DataLoader(
        samples,
        batch_sampler=[order[start : start + batch] for start in range(0, steps * batch, batch)],
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
    )
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP)),
        ],
        [WARMUP],
    )
    model.train()
    if side == "torchvision":
        model.transform._skip_resize = True
    sums: list[Tensor] = []
    for images, targets in loader:
        arguments, options = on_device(side, images, targets, device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            losses = model(*arguments, **options)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        sums.append(total.detach())
    if side == "torchvision":
        model.transform._skip_resize = False
    return float(torch.stack(sums[-50:]).mean())


def on_device(
    side: Side, images: Iterable[Tensor], targets: Iterable[Mapping[str, Any]], device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a batch the form that a side takes."""
    if side == "a2fpn":
        return ([image.to(device) for image in images], list(targets)), {"resize": False}
    theirs = [
        {
            "boxes": target["boxes"].as_subclass(Tensor).to(device),
            "labels": target["labels"].to(device) + 1,  # 0 is the background
            "masks": target["masks"].dense().to(device, torch.uint8),
        }
        for target in targets
    ]
    return ([image.as_subclass(Tensor).to(device).float() / 255 for image in images], theirs), {}


def predict(model: Any, side: Side, truth: CocoDataset, device: str) -> Iterable[dict[str, Any]]:
    """Yield COCO results of all images."""
    model.eval()
    predictor = a2fpn.Predictor(model, channels_last=False) if side == "a2fpn" else None
    for image, target in truth:  # type: ignore[attr-defined]
        image_id = int(target["image_id"])
        if predictor is not None:
            yield from predictor.predict([image.as_subclass(Tensor)])[0].to_coco(image_id)
            continue
        with torch.inference_mode():
            (found,) = model([image.as_subclass(Tensor).to(device).float() / 255])
        corners = found["boxes"].cpu()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        rles = encode_masks((found["masks"][:, 0] > 0.5).cpu().numpy())
        rows = zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), rles, strict=True)
        for box, score, label, rle in rows:
            category = truth.categories[label - 1].id
            yield {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "segmentation": rle}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print mean and standard deviation over the seeds."""
    table = []
    for images in sorted({row["images"] for row in rows}):
        line = [str(images)]
        for side in ("a2fpn", "torchvision"):
            values = [100 * row["segm/ap"] for row in rows if (row["images"], row["side"]) == (images, side)]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            seconds = [row["train_seconds"] for row in rows if (row["images"], row["side"]) == (images, side)]
            line += [f"{statistics.fmean(values):.1f}{spread} ({len(values)})" if values else "", ""]
            line[-1] = f"{statistics.median(seconds):.0f}" if seconds else ""
        table.append(line)
    first = rows[0]
    title = (
        f"{first['data']}, {first['steps']} steps of {first['batch']} images, {first['device']}: mask AP in % (runs)"
    )
    measure.print_table(title, ["labeled images", "a2fpn", "s", "torchvision", "s"], table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the means over the seeds with every run as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    names = {"a2fpn": "maskrcnn_fpn_lite0", "torchvision": "torchvision, v2 heads"}
    for (side, name), color in zip(names.items(), ("#0072b2", "#d55e00"), strict=True):
        points = sorted({row["images"] for row in rows if row["side"] == side})
        runs = [[100 * row["segm/ap"] for row in rows if (row["images"], row["side"]) == (n, side)] for n in points]
        axes.plot(points, [statistics.fmean(values) for values in runs], marker="o", color=color, label=name)
        for images, values in zip(points, runs, strict=True):
            axes.scatter([images] * len(values), values, color=color, s=8, alpha=0.5)
    ticks = sorted({row["images"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
    axes.minorticks_off()
    axes.set_xlabel("labeled images")
    axes.set_ylabel("mask AP, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
