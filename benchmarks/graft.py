"""Fidelity of a graft to a trained FPN detector, and gradients of the new parts at their initial values.

    python -m benchmarks.graft

Trains a small Faster R-CNN with an FPN on synthetic shapes (a few minutes on one core), grafts it onto every target
neck, and onto ``a2fpn`` with several center biases. Prints three tables and saves nothing.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

from a2fpn import create_model
from a2fpn.convert import TARGETS, graft_model
from a2fpn.detectors import RCNN
from a2fpn.evaluation import evaluate_coco
from a2fpn.layers import GACARAFE
from a2fpn.layers.fusion import KernelPredictor
from a2fpn.necks.neck import NearestFusion
from benchmarks import _measure as measure

SIZE = 128
CLASSES = ("rectangle", "ellipse", "triangle")
CENTER_BIASES = (0.0, 4.0, 6.0, 8.0, 10.0, 15.0)
COLUMNS = ("features rms", "max", "kept", "max score diff", "max box diff", "AP50", "AP75")

Target = dict[str, Tensor]
Steps = Annotated[int, typer.Option(help="Training steps of the detector.", min=20)]


def main(steps: Steps = 300, quick: measure.Quick = False) -> None:
    """Train, graft, compare and print."""
    with measure.progress() as bar:
        model = train(2 if quick else steps, bar)
        test = Reference(model, *shapes(2 if quick else 48, torch.Generator().manual_seed(1)))
        targets = [
            [target, *test.compare(graft_model(model, target=target))]
            for target in bar.track(TARGETS, description="Grafting onto every neck")
        ]
        fidelity, learning = [], []
        for bias in bar.track(CENTER_BIASES, description="Grafting with several center biases"):
            grafted = graft_model(model, center_bias=bias)
            weight = math.exp(bias) / (math.exp(bias) + 24)
            fidelity.append([f"{bias:g}", f"{weight:.4f}", *test.compare(grafted)])
            gradient = predictor_gradient(grafted, *shapes(4, torch.Generator().manual_seed(2)))
            losses = [f"{learned(bias, scale=scale):.3f}" for scale in (4.0, 1.0)]
            learning.append([f"{bias:g}", f"{gradient:.1e}", *losses])
    ap50, ap75 = test.precision(test.detections)
    measure.console().print(
        f"A trained FPN detector: AP50 {ap50:.4f}, AP75 {ap75:.4f}, {test.confident} detections with score > 0.3.\n"
        "Feature differences are relative to the standard deviation of the level, on the worst level; kept are "
        "detections with the same label and an IoU > 0.9."
    )
    measure.print_table("Grafted, center_bias 8", ["target", *COLUMNS], targets)
    measure.print_table("Grafted onto a2fpn", ["center_bias", "weight on nearest", *COLUMNS], fidelity)
    measure.print_table(
        "Can the kernel predictor learn from there? Loss of imitating a random upsampling, after 100 steps of SGD, "
        "relative to nearest neighbor (1 is no gradient)",
        ["center_bias", "its gradient in the detector", "loss, scale 4", "loss, scale 1"],
        learning,
    )


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


def train(steps: int, bar: Progress) -> RCNN:
    """A Faster R-CNN on a randomly initialized ResNet-18, trained on shapes."""
    torch.manual_seed(0)
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
    generator = torch.Generator().manual_seed(0)
    for _ in bar.track(range(steps), description="Training a small detector"):
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


class Reference:
    """Outputs of the FPN detector on some images, to compare others with."""

    def __init__(self, model: RCNN, images: list[Tensor], targets: list[Target]) -> None:
        self.images = images
        self.truth = coco_truth(targets)
        self.features, self.detections = self.run(model)
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

    def compare(self, model: RCNN) -> list[str]:
        """Compare another detector with this one: a cell for each of ``COLUMNS``."""
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
        ap50, ap75 = self.precision(detections)
        return [
            f"{max(float(d.square().mean().sqrt()) for d in differences):.2g}",
            f"{max(float(d.abs().max()) for d in differences):.2g}",
            f"{kept}/{self.confident}",
            f"{max(scores):.2g}",
            f"{max(boxes):.2g} px",
            f"{ap50:.4f}",
            f"{ap75:.4f}",
        ]


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


def learned(center_bias: float, *, scale: float) -> float:
    """Loss after 100 steps of SGD of an upsampling that imitates a random one, relative to nearest neighbor."""
    torch.manual_seed(0)
    teacher, student = GACARAFE(16, compressed_channels=16), GACARAFE(16, compressed_channels=16)
    teacher.kernels.reset_center(0.0)
    nn.init.normal_(teacher.kernels.conv.weight, std=0.1)
    student.kernels = KernelPredictor(32, center_bias=center_bias, scale=scale)
    student.gates.requires_grad_(False)  # they would lower the loss without the kernels
    maps = [(torch.randn(4, 16, 12, 12), torch.randn(4, 16, 24, 24)) for _ in range(20)]
    with torch.no_grad():
        batches = [(coarse, fine, teacher(coarse, fine)) for coarse, fine in maps]
        nearest = [F.mse_loss(NearestFusion(16)(coarse, fine), wanted) for coarse, fine, wanted in batches]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for coarse, fine, wanted in batches * 5:
        loss = F.mse_loss(student(coarse, fine), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-len(nearest) :]).mean() / torch.stack(nearest).mean())


if __name__ == "__main__":
    typer.run(main)
