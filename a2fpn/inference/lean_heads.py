"""Heads that do no more than results need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from a2fpn import device
from a2fpn.detectors import Detector
from a2fpn.heads import DetectionRoIHeads, Float32RPNHead, ProposalNetwork
from a2fpn.inference.folding import replace_module
from a2fpn.pyramid import Features


def replace_heads(detector: Detector) -> None:
    """Put lean heads in the place of those that have one."""
    for module in list(detector.modules()):
        if type(module) is Float32RPNHead:
            replace_module(detector, module, _RPNHead(module))
        elif type(module) is ProposalNetwork:
            module.__class__ = _Proposals
        elif isinstance(module, RoIHeads):
            if type(module.box_head) is TwoMLPHead:
                module.box_head = _BoxHead(module.box_head, module.box_roi_pool.output_size[0])
            module.box_predictor = Float32Predictor(module.box_predictor)
            if type(module) is DetectionRoIHeads and isinstance(module.mask_predictor, MaskRCNNPredictor):
                module.__class__ = _MaskRoIHeads


class _RPNHead(nn.Module):
    """The RPN's head with one convolution for objectness and deltas.

    Args:
        head: The head.
    """

    def __init__(self, head: Float32RPNHead) -> None:
        super().__init__()
        parts = (head.cls_logits, head.bbox_pred)
        self.conv = head.conv
        self.anchors = head.cls_logits.out_channels
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness ``(B, A, H, W)`` and deltas ``(B, 4 A, H, W)`` per level, float32."""
        outputs = []
        for level in x:
            y = self.conv(level)
            outputs.append(F.conv2d(y, self.weight.to(y.dtype), self.bias.to(y.dtype)).float())
        return [y[:, : self.anchors] for y in outputs], [y[:, self.anchors :] for y in outputs]


class _Proposals(ProposalNetwork):
    """torchvision's proposals, decoded after the best of each level are chosen instead of before."""

    def forward(
        self, images: ImageList, features: Features, targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Per image boxes ``(P, 4)`` xyxy, best first, and no losses."""
        if device.runs_ahead(images.tensors):
            return self.forward_at_once(images, features)
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        return [
            self._of_image([o[i] for o in objectness], [d[i] for d in deltas], anchors[i], size)
            for i, size in enumerate(images.image_sizes)
        ], {}

    def _of_image(
        self, objectness: list[Tensor], deltas: list[Tensor], anchors: Tensor, size: tuple[int, int]
    ) -> Tensor:
        scores, chosen_deltas, chosen, levels, first = [], [], [], [], 0
        for level, (logits, offsets) in enumerate(zip(objectness, deltas, strict=True)):
            flat = logits.permute(1, 2, 0).flatten()
            best, rows = flat.topk(min(self.pre_nms_top_n(), len(flat)))
            scores.append(best)
            chosen_deltas.append(offsets.permute(1, 2, 0).reshape(-1, 4)[rows])
            chosen.append(anchors[first + rows])
            levels.append(torch.full_like(rows, level))
            first += len(flat)
        boxes = self.box_coder.decode_single(torch.cat(chosen_deltas), torch.cat(chosen))
        boxes, probabilities, level_of = (
            clip_boxes_to_image(boxes, size),
            torch.cat(scores).sigmoid(),
            torch.cat(levels),
        )
        kept = remove_small_boxes(boxes, self.min_size)
        kept = kept[probabilities[kept] >= self.score_thresh]
        boxes, probabilities, level_of = boxes[kept], probabilities[kept], level_of[kept]
        kept = batched_nms(boxes, probabilities, level_of, self.nms_thresh)[: self.post_nms_top_n()]
        chosen_boxes: Tensor = boxes[kept]
        return chosen_boxes


class _BoxHead(nn.Module):
    """The two-layer box head for features that lie in memory as NHWC, which are then not copied.

    Args:
        head: The head.
        size: Side of the pooled features.
    """

    def __init__(self, head: TwoMLPHead, size: int) -> None:
        super().__init__()
        weight = head.fc6.weight
        # From (channel, row, column) to (row, column, channel).
        order = torch.arange(weight.shape[1]).view(-1, size, size).permute(1, 2, 0).flatten()
        self.fc6, self.fc7 = head.fc6, head.fc7
        self.fc6.weight = nn.Parameter(weight[:, order.to(weight.device)], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to ``(R, box_channels)``."""
        y: Tensor = F.relu(self.fc7(F.relu(self.fc6(x.permute(0, 2, 3, 1).flatten(1)))))
        return y


class Float32Predictor(nn.Module):
    """A box predictor that computes in float32 whatever the rest does: it decides, and costs little.

    Args:
        predictor: The predictor.
    """

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas, see :class:`a2fpn.heads.Float32BoxPredictor`."""
        with torch.autocast(x.device.type, enabled=False):
            logits, deltas = self.predictor(x.float())
        return logits, deltas


class _MaskRoIHeads(DetectionRoIHeads):
    """RoI heads that predict masks of the classes found instead of all classes."""

    def mask_probabilities(self, x: Tensor, labels: list[Tensor]) -> list[Tensor]:
        """See :meth:`DetectionRoIHeads.mask_probabilities`."""
        return list(torch.split(_masks(self.mask_predictor, x, torch.cat(labels)), [len(own) for own in labels]))


def _masks(predictor: MaskRCNNPredictor, x: Tensor, labels: Tensor) -> Tensor:
    """Probabilities ``(R, 1, M, M)`` float32 of the class of each RoI."""
    y = predictor.relu(predictor.conv5_mask(x)).permute(0, 2, 3, 1)
    last = predictor.mask_fcn_logits
    weight = last.weight.flatten(1)[labels].to(y.dtype)
    logits = torch.bmm(y.flatten(1, 2), weight[:, :, None]).float() + last.bias[labels].float()[:, None, None]
    probabilities: Tensor = logits.sigmoid().view(len(y), 1, *y.shape[1:3])
    return probabilities
