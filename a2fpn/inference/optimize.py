"""A detector made ready to run: the same results up to rounding, in less time, and nothing to save or to train.

What is done was measured on CPUs, in the order of what it gains: convolutions and what follows them on NHWC memory,
batch norms folded into convolutions, activations and shortcuts applied while a convolution's result is still in the
cache, masks predicted only for the class that was found.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from a2fpn.config import ModelConfig
from a2fpn.detectors import Detector
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads import PostprocessConfig
from a2fpn.inference.folding import fold_norms
from a2fpn.inference.fused import DTYPES, ActivatedConv
from a2fpn.inference.lean_heads import Float32Predictor, replace_heads
from a2fpn.preprocess import Preprocess


class OptimizedDetector(nn.Module):
    """Result of :func:`optimize_for_inference`: a detector for inference alone.

    Args:
        detector: A detector of its own, already changed.
        dtype: The type in which convolutions and matrix products are computed.

    Attributes:
        detector: What runs.
        dtype: The type in which it does.
    """

    def __init__(self, detector: Detector, dtype: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.dtype = dtype
        super().train(False)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model that was optimized."""
        return self.detector.config

    @property
    def preprocess(self) -> Preprocess:
        """The resize, normalization and padding rule."""
        return self.detector.preprocess

    @property
    def has_masks(self) -> bool:
        """Return whether the model predicts masks."""
        return self.detector.has_masks

    @property
    def mask_paste(self) -> Any:
        """Method of pasting masks into the image."""
        return self.detector.mask_paste

    @property
    def rule(self) -> PostprocessConfig:
        """The model's own post-processing."""
        return self.detector.rule

    @torch.inference_mode()
    def forward(
        self,
        images: Sequence[Tensor],
        *,
        resize: bool = True,
        paste_masks: bool = True,
        rule: PostprocessConfig | None = None,
    ) -> list[Any]:
        """Detect objects; see :meth:`a2fpn.detectors.Detector.forward`."""
        kind = next(self.detector.parameters()).device.type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            return self.detector(  # type: ignore[no-any-return]
                images, resize=resize, paste_masks=paste_masks, rule=rule
            )

    def train(self, mode: bool = True) -> OptimizedDetector:
        """Stays in evaluation mode.

        Raises:
            ValueError: If training is asked for.
        """
        if mode:
            raise ConfigError("An optimized detector can't be trained; train the model that it was made from.")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError(
            "An optimized detector can't be saved: its tensors are not those that a checkpoint holds. Save the model "
            "that it was made from, and optimize what from_pretrained gives."
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError("An optimized detector takes no weights; load them into the model that it is made from.")


def optimize_for_inference(model: Detector, *, dtype: torch.dtype = torch.float32) -> OptimizedDetector:
    """Make a detector ready to run, in a copy; the model itself stays as it is and is the one to save and to train.

    Args:
        model: A detector of :func:`a2fpn.create_model` or :func:`a2fpn.from_pretrained`, on the device it is to run on.
        dtype: ``torch.float32`` gives the same results up to rounding. ``torch.bfloat16`` computes convolutions and
            matrix products in bfloat16, and proposals, boxes, scores and NMS in float32: twice as fast on processors
            that know it, and not the same results.

    Returns:
        The detector, for :class:`a2fpn.Predictor` or to be called with images.

    Raises:
        TypeError: If the model is none of this package's detectors, or is optimized already.
        ValueError: For another dtype.

    Example:
        >>> import a2fpn
        >>> model = a2fpn.create_model("maskrcnn_fpn", backbone="test_resnet", num_classes=2, min_size=64)
        >>> result = a2fpn.Predictor(optimize_for_inference(model))("image.jpg")  # doctest: +SKIP
    """
    if not isinstance(model, Detector):
        raise ConfigTypeError(
            "optimize_for_inference expects a detector of a2fpn.create_model(...) or a2fpn.from_pretrained(...), "
            f"got {type(model).__name__}."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    place = next(model.parameters()).device
    # On the CPU no convolution rounds as TF32 does, which would look like a wrong fold.
    detector = copy.deepcopy(model).eval().requires_grad_(False).cpu().to(memory_format=torch.channels_last)
    with torch.inference_mode(False), torch.no_grad():
        fold_norms(detector)
        replace_heads(detector)
        detector.to(place).to(memory_format=torch.channels_last)
        if dtype != torch.float32:
            _convert_weights(detector, dtype)
    return OptimizedDetector(detector, dtype)


# Types
def _convert_weights(detector: Detector, dtype: torch.dtype) -> None:
    """Store the weights in the type that autocast would otherwise convert them to in every call."""
    decide = {
        part for module in detector.modules() if isinstance(module, Float32Predictor) for part in module.modules()
    }
    for module in detector.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ActivatedConv)) and module not in decide:
            module.to(dtype)
