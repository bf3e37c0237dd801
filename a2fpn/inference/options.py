"""Options of prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from a2fpn.data.slides import SlideOptions
from a2fpn.errors import ConfigError
from a2fpn.heads.postprocess import PostprocessConfig, SoftNms
from a2fpn.inference.tiling import tile_windows
from a2fpn.inference.tta import Augmentation

_LARGEST_SCALE = 64.0


@dataclass(frozen=True)
class PredictOptions:
    """Options of prediction; None leaves a limit to the model's own configuration.

    Args:
        score_threshold: Objects that score less are dropped, between 0 and 1. Below the model's own threshold (0.05
            unless configured) there are more objects than it gives by itself.
        nms_threshold: IoU above which an object removes a worse one of its class, between 0 and 1.
        max_objects: Most objects of an image, or of a tile. The limits on the way follow: proposals of a level and of
            the image, candidates of one-stage detectors.
        soft_nms: ``"linear"`` or ``"gaussian"`` lowers the scores of objects that overlap better ones, where NMS
            removes them; see :func:`a2fpn.heads.soft_nms`. False removes.
        tile: Side in pixels of the overlapping tiles in which larger images are predicted, and whose objects are
            merged; None predicts images whole. Each tile is resized by the model's own rule. Keypoints can't be
            merged, nor fused by ``tta``: with a detector of keypoints both are errors.
        overlap: Least share of a tile that the next one shows too. Objects up to this size are seen whole.
        batch: Tiles predicted at once. On a CPU one by one takes least memory and no more time.
        workers: Threads that read and decode tiles of a file ahead; with 0 nothing is read ahead.
        tta: True sees each image, or tile, at three sizes and mirrored, and fuses what is found; an
            :class:`~a2fpn.inference.tta.Augmentation` says which views to take. Takes several times as long.
        scale: Pixels that the network sees per pixel of the image, in place of the model's own rule of resizing.
        microns_per_pixel: What a pixel that the network sees measures, in place of ``scale``; the file has to say what
            its own pixels measure.
        channels: Channels of a TIFF file that the model gets, see :class:`~a2fpn.data.slides.SlideOptions`.
        intensity: Values of a TIFF file that become black and white, see there.

    Raises:
        ValueError: For a value out of its range.
    """

    score_threshold: float | None = None
    nms_threshold: float | None = None
    max_objects: int | None = None
    soft_nms: SoftNms | Literal[False] = False
    tile: int | None = None
    overlap: float = 0.2
    batch: int = 1
    workers: int = 0
    tta: bool | Augmentation = False
    scale: float | None = None
    microns_per_pixel: float | None = None
    channels: tuple[int, ...] | None = None
    intensity: tuple[float, float] | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if self.max_objects is not None and self.max_objects < 1:
            raise ConfigError(f"max_objects must be at least 1, got {self.max_objects}.")
        PostprocessConfig(**self.changes)
        tile_windows((1, 1), self.tile or 16, self.overlap)
        if self.batch < 1 or self.workers < 0:
            raise ConfigError(f"batch must be at least 1 and workers 0, got {self.batch} and {self.workers}.")
        for name in ("scale", "microns_per_pixel"):
            value = getattr(self, name)
            # Written so that NaN is bad as well.
            if value is not None and not 1 / _LARGEST_SCALE <= value <= _LARGEST_SCALE:
                raise ConfigError(f"{name} must be between {1 / _LARGEST_SCALE} and {_LARGEST_SCALE}, got {value}.")
        if self.scale is not None and self.microns_per_pixel is not None:
            raise ConfigError("scale and microns_per_pixel both say what the network sees; give one of them.")
        self.reading()

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the model's rule that are replaced."""
        limits = {
            "score_threshold": self.score_threshold,
            "nms_threshold": self.nms_threshold,
            "detections_per_image": self.max_objects,
        }
        return {
            **{name: value for name, value in limits.items() if value is not None},
            "soft_nms": self.soft_nms or None,
        }

    @property
    def augmentation(self) -> Augmentation | None:
        """Views of test-time augmentation, if there are more than one."""
        return (Augmentation() if self.tta else None) if isinstance(self.tta, bool) else self.tta

    def reading(self, *, in_channels: int = 3, max_pixels: int | None = None) -> SlideOptions:
        """Choices of reading a file for a model with so many channels."""
        return SlideOptions(
            channels=self.channels, in_channels=in_channels, intensity=self.intensity, max_pixels=max_pixels
        )
