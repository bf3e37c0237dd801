"""A whole detector as one program of torch, for any number of images and, unless fixed, any size of them."""

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
"""Names of the outputs, of which a detector has some."""
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
"""Types of the input by name."""

_SIZE = (190, 270)
"""Height and width of the images that a detector is traced with; nothing special about them."""


class Stacked(nn.Module):
    """A detector that takes images as one tensor and gives its detections as one table.

    Args:
        detector: In evaluation mode.
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
        detector: On the CPU, in evaluation mode.
        size: Height and width of all images; None takes any.
        dtype: Type of the images.

    Raises:
        ExportError: If torch can't trace it.
    """
    from torch._dynamo import config as tracer

    config = detector.config
    height, width = size or _SIZE
    images = torch.zeros(2, config.backbone.in_chans, height, width, dtype=dtype)
    dynamic = torch.export.Dim.DYNAMIC
    shape = {0: dynamic} if size else {0: dynamic, 2: dynamic, 3: dynamic}
    # Of tensors whose sizes are unknown a cache costs more than it finds.
    with torch.no_grad(), quiet(), tracer.patch(fake_tensor_cache_enabled=False):
        # A tracer takes as long for a norm as for a convolution.
        folded = copy.deepcopy(detector).requires_grad_(False)
        fold_norms(folded, fuse=False)
        try:
            return torch.export.export(Stacked(folded), (images,), dynamic_shapes={"images": shape}, strict=False)
        except Exception as error:  # torch raises anything for what it can't trace
            advice = "" if size else " One size for all images (size, --size HxW) is easier to trace."
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            name = f"{config.architecture!r} on the backbone {config.backbone.name!r}"
            raise ExportError(f"torch can't trace {name} ({reason}).{advice}") from error


def drop_checks(program: torch.export.ExportedProgram) -> None:
    """Take the checks of sizes out of a program: these are limits of the tracer, and smaller images run as well."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks on its own deprecations, and its exporter's progress, from the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
