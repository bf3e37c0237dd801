"""Tracing of a whole detector to one program, for any batch size and, unless fixed, any image size."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from a2fpn.detectors import Detector
from a2fpn.errors import ExportError
from a2fpn.inference.folding import fold_norms

COLUMNS = ("image_index", "boxes", "scores", "labels", "masks", "heatmaps")
"""Names of all possible outputs."""
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
"""Dtypes of the input by name."""

_SIZE = (190, 270)
"""Arbitrary height and width of the images that a detector is traced with."""


class Stacked(nn.Module):
    """Detector with a batch tensor as input and one table of detections as output.

    Args:
        detector: A detector in evaluation mode.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detect objects in images ``(N, C, H, W)``, float in [0, 1] or uint8; see :data:`COLUMNS`."""
        found = self.detector.detect_stack(images)
        found["image_index"] = found.pop("images")
        if "masks" in found:
            found["masks"] = found["masks"][:, 0]
        return {name: found[name] for name in COLUMNS if name in found}


def trace(
    detector: Detector, *, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.uint8
) -> torch.export.ExportedProgram:
    """Trace a detector.

    Args:
        detector: A detector on the CPU, in evaluation mode.
        size: Height and width of all images; None for any.
        dtype: Dtype of the images.

    Raises:
        ExportError: If torch can't trace it.
    """
    from torch._dynamo import config as tracer

    config = detector.config
    height, width = size or _SIZE
    images = torch.zeros(2, config.backbone.in_chans, height, width, dtype=dtype)
    dynamic = torch.export.Dim.DYNAMIC
    shape = {0: dynamic} if size else {0: dynamic, 2: dynamic, 3: dynamic}
    # With symbolic shapes the fake tensor cache costs more than it saves.
    with torch.no_grad(), quiet(), tracer.patch(fake_tensor_cache_enabled=False):
        # Tracing a norm takes as long as tracing a convolution.
        folded = copy.deepcopy(detector).requires_grad_(False)
        fold_norms(folded, fuse=False)
        try:
            return torch.export.export(Stacked(folded), (images,), dynamic_shapes={"images": shape}, strict=False)
        except Exception as error:  # torch raises errors of any type if it can't trace
            advice = "" if size else " A fixed image size (size, --size HxW) is easier to trace."
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            name = f"{config.architecture!r} on the backbone {config.backbone.name!r}"
            raise ExportError(f"torch can't trace {name} ({reason}).{advice}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's deprecation warnings and the exporter's progress messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
