"""Optimization of a detector for inference: equal results up to rounding, in less time, not for saving or training.

The optimizations, by their measured gain on CPUs: channels-last convolutions and following layers, batch norms folded
into convolutions, activations and residual sums fused into convolutions, masks predicted only for the detected class.
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
    """Result of :func:`optimize_for_inference`: a detector for inference only.

    Args:
        detector: A separate, optimized copy of the detector.
        dtype: Dtype of convolutions and matrix products.

    Attributes:
        detector: The optimized detector.
        dtype: Dtype of convolutions and matrix products.
    """

    def __init__(self, detector: Detector, dtype: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.dtype = dtype
        super().train(False)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the original model."""
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
        """Refuse training mode.

        Raises:
            ValueError: If training mode is requested.
        """
        if mode:
            raise ConfigError("An optimized detector can't be trained; train the original model.")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError(
            "An optimized detector can't be saved: its tensors differ from those of a checkpoint. Save the original "
            "model, and optimize after from_pretrained."
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError("An optimized detector can't load weights; load them into the original model.")


def optimize_for_inference(model: Detector, *, dtype: torch.dtype = torch.float32) -> OptimizedDetector:
    """Optimize a copy of a detector for inference; save and train the original, which is not modified.

    Args:
        model: A detector of :func:`a2fpn.create_model` or :func:`a2fpn.from_pretrained`, on the device it will run on.
        dtype: ``torch.float32`` gives equal results up to rounding. ``torch.bfloat16`` computes convolutions and matrix
            products in bfloat16, and proposals, boxes, scores and NMS in float32: twice as fast on processors that
            support it, with different results.

    Returns:
        The detector, for :class:`a2fpn.Predictor` or to be called with images.

    Raises:
        TypeError: If the model is not one of this package's detectors, or is optimized already.
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
    # On the CPU, since TF32 rounding on a GPU would look like a folding error.
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
    """Store the weights in autocast's dtype, which saves the cast in every call."""
    decide = {
        part for module in detector.modules() if isinstance(module, Float32Predictor) for part in module.modules()
    }
    for module in detector.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ActivatedConv)) and module not in decide:
            module.to(dtype)
