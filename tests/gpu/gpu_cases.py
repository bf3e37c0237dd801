"""Small detectors, batches, and ways to compare what two devices give."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import a2fpn
from a2fpn.detectors import DETECTORS, RCNN, Detector
from tests.helpers import random_target, randomize, tiny_model

SIZE = (128, 160)
BOXES = [[5.0, 6.0, 60.0, 70.0], [70.0, 10.0, 150.0, 50.0], [20.0, 60.0, 50.0, 120.5], [90.0, 70.0, 120.0, 110.0]]
NECKS = tuple(neck for neck in a2fpn.list_necks() if neck != "simple_fpn")
# Every detector on two necks, every neck under one detector: the whole product takes ten times as long.
CASES = (
    *(f"{kind}_{neck}" for kind in DETECTORS for neck in ("fpn", "a2fpn")),
    *(f"maskrcnn_{neck}" for neck in NECKS if neck not in ("fpn", "a2fpn")),
)
FEW = ("maskrcnn_fpn", "maskrcnn_a2fpn", "fcos_fpn", "htc_carafe_fpn")

# Samplers that take all there are draw nothing.
ALL = {"rpn_batch_size": 10**6, "box_batch_size": 10**6, "rpn_positive_fraction": 1.0, "box_positive_fraction": 1.0}


def lively(name: str, **overrides: Any) -> Detector:
    """A detector on the CPU whose outputs differ from place to place."""
    torch.manual_seed(0)
    options = ALL if DETECTORS[name.partition("_")[0]].__mro__.count(RCNN) else {}
    model = tiny_model(name, backbone="test_resnet", norm="frozen", **(options | overrides))
    for part in (model.neck, *((model.rpn, model.roi_heads) if isinstance(model, RCNN) else (model.head,))):
        randomize(part, std=0.05)
    return model


def batch(*counts: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with so many objects each."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *SIZE, generator=generator) for _ in counts]
    return images, [random_target(BOXES[:count], SIZE) for count in counts]


def on(device: torch.device, values: Any) -> Any:
    """Tensors in lists and dicts on a device."""
    if isinstance(values, Mapping):
        return {key: on(device, value) for key, value in values.items()}
    if isinstance(values, list):
        return [on(device, value) for value in values]
    return values.to(device) if hasattr(values, "to") else values


def error(got: Iterable[Tensor | None], reference: Iterable[Tensor | None]) -> float:
    """Norm of the difference of all tensors together relative to that of the reference; NaN stays NaN."""
    pairs = [(a, b) for a, b in zip(got, reference, strict=True) if a is not None or b is not None]
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in pairs]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    return float(difference / torch.stack([b.square().sum() for _, b in pairs]).sum().sqrt())


def leaves(values: Any) -> list[Tensor]:
    """Tensors of nested lists, tuples and dicts in order."""
    if isinstance(values, Tensor):
        return [values]
    items = values.values() if isinstance(values, Mapping) else values
    return [leaf for value in items for leaf in leaves(value)]


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters() if parameter.requires_grad]


def share_found(reference: Mapping[str, Tensor], got: Mapping[str, Tensor], *, pixels: float, score: float) -> float:
    """Share of the detections with a partner of the same label, near in all corners and in the score."""
    reference, got = on(torch.device("cpu"), dict(reference)), on(torch.device("cpu"), dict(got))
    if not len(reference["boxes"]) or not len(got["boxes"]):
        return float(len(reference["boxes"]) == len(got["boxes"]))
    near = (reference["boxes"][:, None] - got["boxes"][None]).abs().amax(2) < pixels
    near &= reference["labels"][:, None] == got["labels"]
    near &= (reference["scores"][:, None] - got["scores"]).abs() < score
    return min(float(near.any(0).float().mean()), float(near.any(1).float().mean()))
