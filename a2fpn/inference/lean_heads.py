"""Heads without redundant computation for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from a2fpn.detectors import Detector
from a2fpn.heads import DetectionRoIHeads


def replace_heads(detector: Detector) -> None:
    """Replace a detector's heads by their lean variants, if any."""
    for module in list(detector.modules()):
        if isinstance(module, RoIHeads):
            if type(module.box_head) is TwoMLPHead:
                module.box_head = _BoxHead(module.box_head, module.box_roi_pool.output_size[0])
            module.box_predictor = Float32Predictor(module.box_predictor)
            if type(module) is DetectionRoIHeads and isinstance(module.mask_predictor, MaskRCNNPredictor):
                module.__class__ = _MaskRoIHeads


class _BoxHead(nn.Module):
    """The two-layer box head for channels-last features, which are not copied.

    Args:
        head: The head.
        size: Side of the pooled features.
    """

    def __init__(self, head: TwoMLPHead, size: int) -> None:
        super().__init__()
        weight = head.fc6.weight
        # Permutes weights from (channel, row, column) to (row, column, channel).
        order = torch.arange(weight.shape[1]).view(-1, size, size).permute(1, 2, 0).flatten()
        self.fc6, self.fc7 = head.fc6, head.fc7
        self.fc6.weight = nn.Parameter(weight[:, order.to(weight.device)], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to ``(R, box_channels)``."""
        y: Tensor = F.relu(self.fc7(F.relu(self.fc6(x.permute(0, 2, 3, 1).flatten(1)))))
        return y


class Float32Predictor(nn.Module):
    """A box predictor in float32 regardless of autocast: it decides the results and costs little.

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
    """RoI heads that predict masks only for the detected class instead of all classes."""

    def mask_probabilities(self, x: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`DetectionRoIHeads.mask_probabilities`."""
        return _masks(self.mask_predictor, x, labels)


def _masks(predictor: MaskRCNNPredictor, x: Tensor, labels: Tensor) -> Tensor:
    """Probabilities ``(R, 1, M, M)`` float32 of the class of each RoI."""
    y = predictor.relu(predictor.conv5_mask(x)).permute(0, 2, 3, 1)
    last = predictor.mask_fcn_logits
    weight = last.weight.flatten(1)[labels].to(y.dtype)
    logits = torch.bmm(y.flatten(1, 2), weight[:, :, None]).float() + last.bias[labels].float()[:, None, None]
    probabilities: Tensor = logits.sigmoid().view(len(y), 1, *y.shape[1:3])
    return probabilities
