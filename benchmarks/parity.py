"""Detectors of detectron2 and mmdetection against ours, with the same random weights on the same random image.

    python -m benchmarks.parity --source detectron2
    python -m benchmarks.parity --source mmdet

Each published configuration is built on its own side, its weights are drawn at random, converted, and both sides
detect. Features, proposals, boxes, scores and masks are compared, then both sides are timed, ours also optimized, masks
pasted into the image. Needs the other framework; without it the command says so and ends.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

import a2fpn
from a2fpn.convert import from_detectron2, from_mmdet
from a2fpn.detectors import RCNN
from a2fpn.pretrained.checkpoint import save_checkpoint
from benchmarks import _measure as measure

SIZE = (480, 640)
COLUMNS = ("features", "proposals", "objects", "boxes", "scores", "mask pixels")
THEIRS, OURS, OPTIMIZED = "theirs", "ours", "ours, optimized"
GAINS = {
    "cls_score": 8.0,
    "fc_cls": 8.0,
    "bbox_pred": 0.5,
    "fc_reg": 0.5,
    "anchor_deltas": 0.2,
    "rpn_reg": 0.2,
    "stem": 1 / 64,
}
"""Standard deviation of what random layers give, 1 in others: some classes must be likely and boxes stay near their
anchors; detectron2's stem sees numbers up to 255."""


@dataclass(frozen=True)
class Output:
    """Outputs of one side for one image.

    Args:
        features: ``(1, C, H, W)`` per level.
        proposals: ``(P, 4)`` xyxy pixels.
        boxes: ``(N, 4)``.
        scores: ``(N,)`` descending.
        labels: ``(N,)`` from 0.
        masks: ``(N, H, W)`` bool; None where there are none to compare.
    """

    features: list[Tensor]
    proposals: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Framework(ABC):
    """The other side.

    Attributes:
        package: What to import.
        cases: Name of ours by configuration of theirs.
    """

    package: ClassVar[str]
    cases: ClassVar[dict[str, str]]

    @abstractmethod
    def build(self, config: str) -> nn.Module:
        """A model of a published configuration."""

    @abstractmethod
    def detect(self, model: nn.Module, image: Tensor) -> Any:
        """Detect on an image ``(3, H, W)``, blue first, uint8, as users of the framework do."""

    @abstractmethod
    def run(self, model: nn.Module, image: Tensor) -> Output:
        """Detect on an image, recording intermediate outputs."""

    @abstractmethod
    def convert(self, state: Mapping[str, Tensor], name: str) -> tuple[Any, dict[str, Tensor]]:
        """Configuration and weights of ours."""


class Detectron2(Framework):
    """Wu et al., https://github.com/facebookresearch/detectron2."""

    package = "detectron2"
    cases: ClassVar[dict[str, str]] = {
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": "fasterrcnn_fpn_r50",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": "maskrcnn_fpn_r50",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": "cascademaskrcnn_fpn_r50",
    }

    def build(self, config: str) -> nn.Module:
        """See :meth:`Framework.build`."""
        from detectron2.config import get_cfg
        from detectron2.model_zoo import get_config_file
        from detectron2.modeling import build_model

        options = get_cfg()
        options.merge_from_file(get_config_file(config))
        options.MODEL.DEVICE = "cpu"
        model: nn.Module = build_model(options)
        return model

    def detect(self, model: Any, image: Tensor) -> Any:
        """See :meth:`Framework.detect`."""
        return model.inference([{"image": image, "height": image.shape[1], "width": image.shape[2]}])[0]["instances"]

    def run(self, model: Any, image: Tensor) -> Output:
        """See :meth:`Framework.run`."""
        images = model.preprocess_image([{"image": image}])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        found = self.detect(model, image)
        return Output(
            list(features.values()),
            proposals[0].proposal_boxes.tensor,
            found.pred_boxes.tensor,
            found.scores,
            found.pred_classes,
            found.pred_masks if found.has("pred_masks") else None,
        )

    def convert(self, state: Mapping[str, Tensor], name: str) -> tuple[Any, dict[str, Tensor]]:
        """See :meth:`Framework.convert`."""
        return from_detectron2(state, name)


class MMDet(Framework):
    """Chen et al., https://github.com/open-mmlab/mmdetection, version 3."""

    package = "mmdet"
    cases: ClassVar[dict[str, str]] = {
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": "fasterrcnn_fpn_r50",
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": "maskrcnn_fpn_r50",
        "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": "cascadercnn_fpn_r50",
        "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py": "cascademaskrcnn_fpn_r50",
        "htc/htc-without-semantic_r50_fpn_1x_coco.py": "htc_fpn_r50",
        "htc/htc_r50_fpn_1x_coco.py": "htc_fpn_r50",
    }

    def build(self, config: str) -> nn.Module:
        """See :meth:`Framework.build`."""
        import mmdet
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

        register_all_modules()
        options = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / config)
        options.model.backbone.init_cfg = None
        model: nn.Module = MODELS.build(options.model)
        return model

    def detect(self, model: Any, image: Tensor) -> Any:
        """See :meth:`Framework.detect`."""
        data = self._prepare(model, image)
        return model.predict(data["inputs"], data["data_samples"], rescale=False)

    def _prepare(self, model: Any, image: Tensor) -> Any:
        from mmdet.structures import DetDataSample

        size = tuple(image.shape[1:])
        facts = {"img_shape": size, "ori_shape": size, "pad_shape": size, "scale_factor": (1.0, 1.0)}
        return model.data_preprocessor({"inputs": [image], "data_samples": [DetDataSample(metainfo=facts)]}, False)

    def run(self, model: Any, image: Tensor) -> Output:
        """See :meth:`Framework.run`."""
        data = self._prepare(model, image)
        features, samples = model.extract_feat(data["inputs"]), data["data_samples"]
        proposals = model.rpn_head.predict(features, samples, rescale=False)
        boxes = proposals[0].bboxes.clone()
        found = model.roi_head.predict(features, proposals, samples, rescale=False)[0]
        # Version 3 takes HTC's masks from the last stage alone; version 2, and ours, average them over the stages.
        masks = None if type(model).__name__ == "HybridTaskCascade" else found.get("masks")
        return Output(list(features), boxes, found.bboxes, found.scores, found.labels, masks)

    def convert(self, state: Mapping[str, Tensor], name: str) -> tuple[Any, dict[str, Tensor]]:
        """See :meth:`Framework.convert`."""
        return from_mmdet(state, name)


FRAMEWORKS: dict[str, type[Framework]] = {"detectron2": Detectron2, "mmdet": MMDet}
Source = Annotated[Literal["detectron2", "mmdet"], typer.Option(help="The other side.")]


def main(source: Source = "detectron2", rounds: measure.Rounds = 3, threads: measure.Threads = 0) -> None:
    """Build, convert, compare, time and print."""
    framework = FRAMEWORKS[source]()
    if importlib.util.find_spec(framework.package) is None:
        typer.echo(f"{framework.package} is not installed: nothing to compare with.")
        return
    measure.start(threads, rounds)
    differences, times = [], []
    for config, name in framework.cases.items():
        torch.manual_seed(0)
        theirs = framework.build(config).eval()
        randomize(theirs)
        settings, state = framework.convert(theirs.state_dict(), name)
        with tempfile.TemporaryDirectory() as folder:
            ours = a2fpn.from_pretrained(save_checkpoint(folder, settings, state))
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
        case = [Path(config).stem, name]
        with torch.inference_mode():
            differences.append([*case, *compare(framework.run(theirs, image), detect(ours, image.flip(0)))])
            times.append([*case, *timings(functools.partial(framework.detect, theirs, image), ours, image, rounds)])
    measure.print_table(
        "Largest differences: features relative to their standard deviation, boxes in pixels",
        ["theirs", "ours", *COLUMNS],
        differences,
    )
    measure.print_table(
        f"Time for one image of {SIZE[0]}x{SIZE[1]}",
        ["theirs", "ours", THEIRS, f"{OURS} / {THEIRS}", f"{OPTIMIZED} / {THEIRS}"],
        times,
    )


def timings(theirs: measure.Call, ours: RCNN, image: Tensor, rounds: int) -> list[str]:
    """Their time, and the ratio of ours to it, as it is and optimized; all paste masks."""
    calls = {THEIRS: theirs}
    for side, model in {OURS: a2fpn.Predictor(ours).model, OPTIMIZED: a2fpn.optimize_for_inference(ours)}.items():
        calls[side] = functools.partial(model, [image.flip(0)], resize=False)
    times = measure.time_interleaved(calls, rounds=rounds, title=ours.config.detector)
    return [measure.milliseconds(times.median(THEIRS)), *(str(times.ratio(side, THEIRS)) for side in (OURS, OPTIMIZED))]


def compare(wanted: Output, got: Output) -> list[str]:
    """The cells of ``COLUMNS`` for what either side gives."""
    pairs = [(i, j) for i in range(len(wanted.labels)) if (j := partner(wanted, got, i)) is not None]
    rows, columns = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    pixels = (
        "" if wanted.masks is None or got.masks is None else str(int((wanted.masks[rows] != got.masks[columns]).sum()))
    )
    return [
        f"{max(largest(a - b) / float(a.std()) for a, b in zip(wanted.features, got.features, strict=True)):.1e}",
        f"{float(torch.cdist(wanted.proposals, got.proposals, p=torch.inf).amin(1).max()):.1e}",
        f"{len(rows)} of {len(wanted.labels)}, {len(got.labels)}",
        f"{largest(wanted.boxes[rows] - got.boxes[columns]):.1e}",
        f"{largest(wanted.scores[rows] - got.scores[columns]):.1e}",
        pixels,
    ]


@torch.inference_mode()
def detect(model: RCNN, image: Tensor) -> Output:
    """Detect with our side on an image ``(3, H, W)``, red first, uint8."""
    batch = model.preprocess([image], resize=False)
    features = model.features(batch)
    (proposals,), _ = model.rpn(ImageList(batch.tensor, batch.sizes), dict(features))
    (found,) = model([image], resize=False, paste_masks=False)
    assert isinstance(found, dict)
    masks = paste(found["masks"], found["boxes"]) if "masks" in found else None
    return Output(list(features.values()), proposals, found["boxes"], found["scores"], found["labels"], masks)


def paste(masks: Tensor, boxes: Tensor) -> Tensor:
    """Masks (N, 1, M, M) in the image as theirs are: beyond the outermost cells' centers they fade to zero.

    Ours don't fade, which is why those are not what is compared.
    """
    ys, xs = torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5
    x0, y0, x1, y1 = boxes.T[:, :, None]
    rows, columns = (ys - y0) / (y1 - y0) * 2 - 1, (xs - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([columns[:, None].expand(-1, *SIZE), rows[:, :, None].expand(-1, *SIZE)], 3)
    return F.grid_sample(masks, grid, align_corners=False)[:, 0] >= 0.5


def largest(x: Tensor) -> float:
    """Largest magnitude, 0 of nothing."""
    return float(x.abs().max()) if x.numel() else 0.0


def partner(wanted: Output, got: Output, index: int) -> int | None:
    """Return our object that matches one of theirs: same class, and the closest box, up to a pixel."""
    distance = (got.boxes - wanted.boxes[index]).abs().amax(1)
    distance[got.labels != wanted.labels[index]] = torch.inf
    return int(distance.argmin()) if len(distance) and distance.min() < 1 else None


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights that keep features of a common size, and scores that differ from object to object."""
    for name, x in model.state_dict().items():
        if "running_var" in name:
            x.uniform_(0.5, 1.5)
        elif x.ndim > 1:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            x.normal_(std=gain / x[0].numel() ** 0.5)
        elif name.endswith(("bias", "running_mean")):
            x.normal_(std=0.1)
        elif x.is_floating_point():
            x.uniform_(0.5, 1.0)


if __name__ == "__main__":
    typer.run(main)
