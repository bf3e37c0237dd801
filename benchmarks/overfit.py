"""Can every detector learn? Each is trained on eight images until it finds their objects again.

    python -m benchmarks.overfit --data FOLDER --backbone-weights tf_efficientnet_lite0.safetensors

The folder holds ``images/`` and ``annotations/instances_train.json`` with masks. A detector passes if boxes, and masks
if it has any, reach AP50 >= 0.9 on the images that it was trained on within a bounded number of steps. Keypoints are
made up: the center of each mask and its two ends along x. COCO's keypoint AP needs tolerances that made-up points lack;
their distance from the truth is printed instead, and not judged.

Ends with exit code 1 if a detector fails. Saves nothing.
"""

from __future__ import annotations

import fnmatch
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn
from torchvision.ops import box_iou

from a2fpn import Predictor, create_model
from a2fpn.data import CocoDataset, DataError, collate
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.evaluation import evaluate_coco
from benchmarks import _measure as measure

IMAGES = 8
SIZE = 256  # longest side of the images, pixels
MOST_OBJECTS = 20
SMALLEST_OBJECT = 10  # short side of a box, pixels
WANTED = 0.9
BATCH = 2
FIRST_LOOK, LOOK_EVERY = 100, 50  # steps

Target = dict[str, Any]

Data = Annotated[Path, typer.Option(help="Folder with images/ and annotations/instances_train.json.")]
Detectors = Annotated[list[str] | None, typer.Option(help="Names or wildcard patterns; all by default.")]
Neck = Annotated[str, typer.Option(help="A neck.")]
Backbone = Annotated[str, typer.Option(help="A backbone.")]
Weights = Annotated[Path | None, typer.Option(help="Its ImageNet weights; without them it learns from scratch.")]
Steps = Annotated[int, typer.Option(help="Most training steps for a detector.", min=1)]
Rate = Annotated[float, typer.Option(help="Highest learning rate of AdamW.", min=0)]


def main(
    data: Data,
    detectors: Detectors = None,
    neck: Neck = "fpn",
    backbone: Backbone = "lite0",
    backbone_weights: Weights = None,
    steps: Steps = 400,
    learning_rate: Rate = 1e-3,
    quick: measure.Quick = False,
) -> None:
    """Train every detector, print a table, and fail if one of them did."""
    torch.set_num_threads(1)
    names = sorted({name for pattern in detectors or ["*"] for name in fnmatch.filter(DETECTORS, pattern)})
    if not names:
        raise typer.BadParameter(f"No detector matches {detectors}; there are {', '.join(DETECTORS)}.")
    dataset, samples = load(data, quick=quick)
    rows, failed = [], []
    with measure.progress() as bar:
        for name in bar.track(names, description="Overfitting"):
            model = build(name, neck, backbone, backbone_weights, dataset, quick=quick)
            start = time.perf_counter()
            done, scores = train(model, dataset, samples, 2 if quick else steps, learning_rate, bar)
            seconds = time.perf_counter() - start
            passed = min(scores.values()) >= WANTED
            failed += [] if passed else [name]
            rows.append(
                [
                    f"{name}_{neck}_{backbone}",
                    f"{scores['bbox']:.3f}",
                    f"{scores['segm']:.3f}" if "segm" in scores else "",
                    keypoint_error(model, samples) if "keypoints" in model.target_keys else "",
                    str(done),
                    f"{seconds:.0f} s",
                    "passed" if passed else "failed",
                ]
            )
            measure.print_table(f"After {name}", COLUMNS, rows[-1:])
    measure.print_table(
        f"Trained on {len(samples)} images of {data.name}, at most {steps} steps of {BATCH} images; AP50 >= {WANTED}",
        COLUMNS,
        rows,
    )
    if failed and not quick:
        raise typer.Exit(1)


COLUMNS = ("detector", "box AP50", "mask AP50", "keypoints off by", "steps", "time", "")


def load(data: Path, *, quick: bool) -> tuple[CocoDataset, list[tuple[Tensor, Target]]]:
    """The first images with few and not too small objects, and their targets with keypoints made of the masks."""
    dataset = CocoDataset(data / "images", data / "annotations" / "instances_train.json")
    chosen = []
    for index, image_id in enumerate(dataset.image_ids):
        entry, objects = dataset.coco.images[image_id], dataset.coco.annotations[image_id]
        sides = [min(a.bbox[2:]) for a in objects if not a.iscrowd]
        fits = max(entry.height, entry.width) <= SIZE and 0 < len(sides) <= MOST_OBJECTS
        if fits and min(sides) >= SMALLEST_OBJECT:
            chosen.append(index)
        if len(chosen) == (2 if quick else IMAGES):
            break
    else:
        raise DataError(
            f"{dataset.coco.name} has {len(chosen)} images of at most {SIZE} pixels with up to {MOST_OBJECTS} objects "
            f"of at least {SMALLEST_OBJECT} pixels, expected {IMAGES}."
        )
    samples = []
    for index in chosen:
        image, target = dataset[index]
        if "masks" not in target:
            raise DataError(f"{dataset.coco.name} has no masks.")
        keypoints = torch.stack([mask_keypoints(mask) for mask in target["masks"].dense()])
        samples.append((image, {**target, "keypoints": keypoints}))
    return dataset, samples


def mask_keypoints(mask: Tensor) -> Tensor:
    """Center, leftmost and rightmost point of a mask ``(H, W)``, ``(3, 3)`` as x, y, 2."""
    ys, xs = (c.float() + 0.5 for c in torch.where(mask))
    points = [(xs.mean(), ys.mean()), *((xs[i], ys[i]) for i in (xs.argmin(), xs.argmax()))]
    return torch.tensor([[float(x), float(y), 2.0] for x, y in points])


def build(name: str, neck: str, backbone: str, weights: Path | None, dataset: CocoDataset, *, quick: bool) -> Detector:
    """A detector for small images, with anchors half as large as usual where it has any."""
    torch.manual_seed(0)
    strides = DETECTORS[name].strides
    options: dict[str, Any] = {}
    if name == "retinanet":
        levels = [*strides, 64, 128]
        options["anchor_sizes"] = [[round(2 * s * 2 ** (i / 3)) for i in range(3)] for s in levels]
    elif name != "fcos":
        options["anchor_sizes"] = [[4 * s] for s in (*strides, 64)]
        options |= {f"rpn_{part}_nms_top_n_{phase}": 200 for part in ("pre", "post") for phase in ("train", "test")}
        options |= {"rpn_batch_size": 128, "box_batch_size": 64}
    if name == "keypointrcnn":
        options |= {"num_keypoints": 3, "keypoint_layers": 4}
    return create_model(
        f"{name}_{neck}_{backbone}",
        backbone_weights=weights,
        categories=dataset.categories,
        min_size=32 if quick else SIZE,
        max_size=48 if quick else 2 * SIZE,
        **options,
    )


def train(
    model: Detector,
    dataset: CocoDataset,
    samples: Sequence[tuple[Tensor, Target]],
    steps: int,
    learning_rate: float,
    bar: Progress,
) -> tuple[int, dict[str, float]]:
    """Train until AP50 is reached or the steps are used up; return the steps taken and AP50 by kind."""
    model.check_data("The data", samples[0][1])
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20)
    generator = torch.Generator().manual_seed(0)
    scores: dict[str, float] = {}
    task = bar.add_task(model.config.detector, total=steps)
    for step in range(1, steps + 1):
        if step == steps * 3 // 4:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        rows = torch.randperm(len(samples), generator=generator)[:BATCH].tolist()
        losses = model.train()(*collate([samples[row] for row in rows]))
        assert isinstance(losses, dict)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        warmup.step()
        bar.advance(task)
        if step == steps or (step >= FIRST_LOOK and step % LOOK_EVERY == 0):
            scores = evaluate(model, dataset, samples)
            ap50 = ", ".join(f"{kind} {score:.3f}" for kind, score in scores.items())
            bar.update(task, description=f"{model.config.detector}: AP50 {ap50}")
            if min(scores.values()) >= WANTED:
                break
    bar.remove_task(task)
    return step, scores


def evaluate(model: Detector, dataset: CocoDataset, samples: Sequence[tuple[Tensor, Target]]) -> dict[str, float]:
    """AP50 of boxes and, if there are any, of masks."""
    ids = {int(target["image_id"]) for _, target in samples}
    truth = {
        "images": [vars(dataset.coco.images[i]) for i in ids],
        "categories": [vars(category) for category in dataset.categories],
        "annotations": [
            {
                "id": number,
                "image_id": i,
                "category_id": a.category_id,
                "bbox": list(a.bbox),
                "segmentation": a.rle,
                "area": a.area,
                "iscrowd": int(a.iscrowd),
            }
            for number, (i, a) in enumerate((i, a) for i in ids for a in dataset.coco.annotations[i])
        ],
    }
    predictor = Predictor(model, channels_last=False)
    found = [
        record for image, target in samples for record in predictor.predict([image])[0].to_coco(int(target["image_id"]))
    ]
    kinds = ("bbox", "segm") if model.has_masks else ("bbox",)
    metrics = evaluate_coco(truth, found, iou_types=kinds).to_dict()
    return {kind: float(metrics[f"{kind}/ap50"]) for kind in kinds}


@torch.inference_mode()
def keypoint_error(model: Detector, samples: Sequence[tuple[Tensor, Target]]) -> str:
    """Median distance of the keypoints of found objects from the truth, pixels."""
    distances: list[float] = []
    for image, target in samples:
        (result,) = model.eval()([image])
        assert isinstance(result, dict)
        if not len(result["scores"]):
            continue
        best, index = box_iou(target["boxes"].as_subclass(Tensor), result["boxes"]).max(1)
        off = (result["keypoints"][index] - target["keypoints"])[..., :2].norm(dim=-1)
        distances += off[best > 0.5].flatten().tolist()
    return f"{statistics.median(distances):.1f} px" if distances else "nothing found"


if __name__ == "__main__":
    typer.run(main)
