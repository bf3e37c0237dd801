"""What a graft keeps of a trained FPN detector, and whether the new parts can learn from where they start.

    python -m benchmarks.graft

Trains a small Faster R-CNN with an FPN on synthetic shapes (a few minutes on one core), grafts it onto every target
neck, and onto ``a2fpn`` with several centre biases. Prints two Markdown tables and saves nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

from a2fpn import create_model
from a2fpn.convert import TARGETS, graft_model
from a2fpn.detectors import RCNN
from a2fpn.evaluation import evaluate_coco
from a2fpn.layers import CARAFE
from a2fpn.layers.reassemble import KernelPredictor

SIZE = 128
CLASSES = ("rectangle", "ellipse", "triangle")
CENTRE_BIASES = (0.0, 4.0, 6.0, 8.0, 10.0, 15.0)
Target = dict[str, Tensor]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the toy detector")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = train(arguments.steps, arguments.seed)
    test = Reference(model, *shapes(32, torch.Generator().manual_seed(arguments.seed + 1)))
    before = f"AP50 {test.before[0]:.4f}, AP75 {test.before[1]:.4f}"
    print(f"\nToy detector after {arguments.steps} steps: {before}, {test.confident} detections with score > 0.3\n")

    names = ["target"] + [name for name in Comparison.COLUMNS]
    print_row(names)
    print_row(["---"] * len(names))
    for target in TARGETS:
        print_row([target, *test.compare(graft_model(model, target=target)).cells()])

    names = ["centre_bias", "weight on nearest", *Comparison.COLUMNS, "predictor gradient", "loss, scale 4", "scale 1"]
    print()
    print_row(names)
    print_row(["---"] * len(names))
    for bias in CENTRE_BIASES:
        grafted = graft_model(model, centre_bias=bias)
        print_row(
            [
                f"{bias:g}",
                f"{math.exp(bias) / (math.exp(bias) + 24):.4f}",
                *test.compare(grafted).cells(),
                f"{predictor_gradient(grafted, *shapes(4, torch.Generator().manual_seed(7))):.1e}",
                f"{learned(bias, scale=4.0):.3f}",
                f"{learned(bias, scale=1.0):.3f}",
            ]
        )
    print(
        "\nFeature differences are relative to the standard deviation of the level, worst level. Kept: same label, IoU "
        "> 0.9. Loss: of learned upsampling after 100 SGD steps relative to nearest neighbour; 1 is dead."
    )


def print_row(cells: Sequence[str]) -> None:
    """Prints a row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def shapes(count: int, generator: torch.Generator) -> tuple[list[Tensor], list[Target]]:
    """Noisy images (3, SIZE, SIZE) in [0, 1] with one to four bright shapes each, and their targets."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    ys, xs = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    images, targets = [], []
    for _ in range(count):
        image = torch.rand(3, 1, 1, generator=generator) * 0.5 + torch.rand(3, SIZE, SIZE, generator=generator) * 0.15
        boxes: list[Tensor] = []
        labels = []
        for _ in range(integer(1, 5)):
            w, h = integer(14, 60), integer(14, 60)
            x, y = integer(0, SIZE - w), integer(0, SIZE - h)
            box = torch.tensor([x, y, x + w, y + h]).float()
            if boxes and box_iou(box[None], torch.stack(boxes)).max() > 0.2:
                continue
            label = integer(0, len(CLASSES))
            # Coordinates from -1 to 1 across the box.
            u, v = (xs - x) / w * 2 - 1, (ys - y) / h * 2 - 1
            inside = (u.abs() <= 1) & (v.abs() <= 1)
            mask = inside & (True, u**2 + v**2 <= 1, u.abs() <= (v + 1) / 2)[label]
            image[:, mask] = torch.rand(3, 1, generator=generator) * 0.6 + 0.4
            boxes.append(box)
            labels.append(label)
        images.append(image.clamp(0, 1))
        targets.append({"boxes": torch.stack(boxes), "labels": torch.tensor(labels)})
    return images, targets


def train(steps: int, seed: int) -> RCNN:
    """A Faster R-CNN on a randomly initialised ResNet-18, trained on shapes."""
    torch.manual_seed(seed)
    model = create_model(
        "fasterrcnn_fpn",
        backbone="resnet18",
        num_classes=len(CLASSES),
        neck_args={"out_channels": 64},
        resize="none",
        anchor_sizes=((12,), (24,), (48,), (64,), (96,)),
        box_channels=256,
        **{f"rpn_{part}_nms_top_n_{phase}": 200 for part in ("pre", "post") for phase in ("train", "test")},
        rpn_batch_size=64,
        box_batch_size=64,
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "Training the toy detector"):
        loss = total_loss(model, *shapes(4, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def total_loss(model: RCNN, images: list[Tensor], targets: list[Target]) -> Tensor:
    """Sum of the training losses."""
    losses = model(images, targets)
    assert isinstance(losses, dict)
    return torch.stack(list(losses.values())).sum()


@dataclass(frozen=True)
class Comparison:
    """A detector beside the one that it was grafted on."""

    rms: float
    largest: float
    kept: str
    score_difference: float
    box_difference: float
    ap50: float
    ap75: float

    COLUMNS = ("features rms", "max", "kept", "max score diff", "max box diff, px", "AP50", "AP75")

    def cells(self) -> Iterator[str]:
        """One cell for each of ``COLUMNS``."""
        yield f"{self.rms:.2g}"
        yield f"{self.largest:.2g}"
        yield self.kept
        yield f"{self.score_difference:.2g}"
        yield f"{self.box_difference:.2g}"
        yield f"{self.ap50:.4f}"
        yield f"{self.ap75:.4f}"


class Reference:
    """What the FPN detector computes on some images, to compare others with."""

    def __init__(self, model: RCNN, images: list[Tensor], targets: list[Target]) -> None:
        self.images = images
        self.truth = coco_truth(targets)
        self.features, self.detections = self.run(model)
        self.before = self.precision(self.detections)
        self.confident = sum(int((d["scores"] > 0.3).sum()) for d in self.detections)

    @torch.inference_mode()
    def run(self, model: RCNN) -> tuple[list[Tensor], list[Target]]:
        """Pyramid and detections of all images."""
        detections = model(self.images)
        assert isinstance(detections, list)
        return list(model.features(model.preprocess(self.images)).values()), detections

    def precision(self, detections: list[Target]) -> tuple[float, float]:
        """AP50 and AP75 of boxes."""
        metrics = evaluate_coco(self.truth, coco_results(detections), iou_types=["bbox"]).bbox
        assert metrics is not None
        return metrics.ap50, metrics.ap75

    def compare(self, model: RCNN) -> Comparison:
        """Compares another detector with this one."""
        features, detections = self.run(model)
        differences = [(a - b) / a.std() for a, b in zip(self.features, features, strict=True)]
        scores, boxes = [0.0], [0.0]
        kept = 0
        for old, new in zip(self.detections, detections, strict=True):
            iou = box_iou(old["boxes"], new["boxes"]) * (old["labels"][:, None] == new["labels"])
            for i in torch.where(old["scores"] > 0.3)[0].tolist():
                best = int(iou[i].argmax()) if iou.shape[1] else -1
                if best >= 0 and iou[i, best] > 0.9:
                    kept += 1
                    scores.append(float((old["scores"][i] - new["scores"][best]).abs()))
                    boxes.append(float((old["boxes"][i] - new["boxes"][best]).abs().max()))
        return Comparison(
            max(float(d.square().mean().sqrt()) for d in differences),
            max(float(d.abs().max()) for d in differences),
            f"{kept}/{self.confident}",
            max(scores),
            max(boxes),
            *self.precision(detections),
        )


def coco_truth(targets: list[Target]) -> dict[str, Any]:
    """Targets as the content of a COCO file; image ids count from 1, category ids are labels + 1."""
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(len(targets))],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [{**record, "id": number} for number, record in enumerate(coco_results(targets), start=1)],
    }


def coco_results(detections: list[Target]) -> list[dict[str, Any]]:
    """Detections, or targets with score 1, as COCO results."""
    return [
        {"image_id": i + 1, "category_id": label + 1, "bbox": box, "score": score}
        for i, d in enumerate(detections)
        for label, box, score in zip(
            d["labels"].tolist(),
            box_convert(d["boxes"], "xyxy", "xywh").tolist(),
            d.get("scores", torch.ones(len(d["labels"]))).tolist(),
            strict=True,
        )
    ]


def predictor_gradient(model: RCNN, images: list[Tensor], targets: list[Target]) -> float:
    """Norm of the training loss's gradient on the top-down kernel predictors' weights."""
    model.train().backbone.eval()
    torch.manual_seed(0)  # of the proposals that are sampled
    total_loss(model, images, targets).backward()
    predictors = [m for m in model.neck.get_submodule("top_down").modules() if isinstance(m, KernelPredictor)]
    return float(torch.stack([p.conv.weight.grad.norm() for p in predictors]).norm())


def learned(centre_bias: float, *, scale: float, steps: int = 100) -> float:
    """Loss of CARAFE trained by SGD to invert 2 x 2 average pooling of maps with edges, relative to nearest."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(1, 16, 1, 1, generator=generator)

    def batch() -> tuple[Tensor, Tensor]:
        smooth = F.interpolate(torch.randn(4, 16, 5, 5, generator=generator), size=(24, 24), mode="bilinear")
        side = F.interpolate(torch.randn(4, 1, 4, 4, generator=generator), size=(24, 24), mode="bicubic") > 0
        fine = smooth + 2 * side * step
        return F.avg_pool2d(fine, 2), fine

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(F.mse_loss(carafe(x, torch.zeros_like(y)), y)) for x, y in batches[:8]) / 8

    batches = [batch() for _ in range(40)]
    nearest = sum(float(F.mse_loss(F.interpolate(x, scale_factor=2), y)) for x, y in batches[:8]) / 8
    torch.manual_seed(0)
    carafe = CARAFE(16)
    carafe.kernels = KernelPredictor(64, centre_bias=centre_bias, scale=scale)
    optimizer = torch.optim.SGD(carafe.parameters(), lr=0.02, momentum=0.9)
    for i in range(steps):
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        F.mse_loss(carafe(x, torch.zeros_like(y)), y).backward()
        optimizer.step()
    return mean_loss() / nearest


if __name__ == "__main__":
    main()
