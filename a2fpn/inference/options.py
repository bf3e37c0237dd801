"""Options of a prediction, by name and in signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from a2fpn._registry import did_you_mean
from a2fpn._words import PREDICTION
from a2fpn.data.slides import SlideOptions
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads.postprocess import PostprocessConfig, SoftNms
from a2fpn.inference.tiling import tile_windows
from a2fpn.inference.tta import Augmentation

CANDIDATES = 16
"""Candidates per object of ``max_objects``, since each object has many proposals."""
_LARGEST_SCALE = 64.0


@dataclass(frozen=True)
class PredictOptions:
    """Options of prediction; None for the model's own limit.

    Args:
        score_threshold: Objects with a lower score are dropped, between 0 and 1. None for 0.5, or the model's own
            threshold if that is 0 or more than 0.05; for :meth:`Predictor.predict`, which is for evaluation, always the
            model's own. A lower value gives more objects than the model does by default.
        nms_threshold: IoU above which an object is suppressed by a better one of its class, between 0 and 1.
        max_objects: Maximum number of objects per image or tile. Limits of earlier steps are raised accordingly:
            proposals per level and per image, candidates of one-stage detectors.
        soft_nms: ``"linear"`` or ``"gaussian"`` lowers the scores of objects that overlap better ones instead of
            suppressing them, see :func:`a2fpn.heads.soft_nms`. False for plain NMS.
        tile: Side in pixels of the overlapping tiles in which larger images are predicted, and whose objects are
            merged; None predicts images whole. Each tile is resized by the model's own rule. Keypoints can be neither
            merged nor fused by ``tta``: with a keypoint detector both are errors.
        overlap: Minimum share of a tile that overlaps the next. Objects up to this size are whole in some tile.
        batch: Tiles per batch. On a CPU a batch of one takes the least memory and no more time.
        workers: Threads that read and decode tiles of a file ahead; 0 disables reading ahead.
        tta: True predicts each image or tile at three sizes and flipped, and fuses the detections; an
            :class:`~a2fpn.inference.tta.Augmentation` selects the views. Takes several times as long.
        scale: Network input pixels per image pixel, instead of the model's own resize rule.
        microns_per_pixel: Size of a network input pixel, instead of ``scale``; the file must state the size of its own
            pixels.
        channels: Channels of a TIFF file passed to the model, see :class:`~a2fpn.data.slides.SlideOptions`.
        intensity: Values of a TIFF file that become black and white, see there.

    Raises:
        ValueError: For a value out of range.
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
            # The negation also rejects NaN.
            if value is not None and not 1 / _LARGEST_SCALE <= value <= _LARGEST_SCALE:
                raise ConfigError(f"{name} must be between {1 / _LARGEST_SCALE} and {_LARGEST_SCALE}, got {value}.")
        if self.scale is not None and self.microns_per_pixel is not None:
            raise ConfigError("scale and microns_per_pixel are mutually exclusive; give one of them.")
        self.reading()

    @property
    def changes(self) -> dict[str, Any]:
        """Replaced fields of the model's post-processing."""
        limits = {
            "score_threshold": self.score_threshold,
            "nms_threshold": self.nms_threshold,
            "detections_per_image": self.max_objects,
        }
        return {
            **{name: value for name, value in limits.items() if value is not None},
            "soft_nms": self.soft_nms or None,
            "candidates": None if self.max_objects is None else self.max_objects * CANDIDATES,
        }

    @property
    def augmentation(self) -> Augmentation | None:
        """Views of test-time augmentation, if there are more than one."""
        return (Augmentation() if self.tta else None) if isinstance(self.tta, bool) else self.tta

    def reading(self, **choices: Any) -> SlideOptions:
        """Options of reading a file, combined with the predictor's."""
        return SlideOptions(channels=self.channels, intensity=self.intensity, **choices)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PredictOptions:
        """Build options from keyword arguments.

        Raises:
            TypeError: For an unknown option, with a suggestion.
        """
        _check_names(given)
        return cls(**given)

    def but(self, changes: Mapping[str, Any]) -> PredictOptions:
        """Return a copy with some options changed.

        Raises:
            TypeError: For an unknown option, with a suggestion.
        """
        _check_names(changes)
        return replace(self, **changes)


def _check_names(given: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(PredictOptions)]
    for name in given:
        if name not in known:
            raise ConfigTypeError(
                f"A Predictor got an unexpected keyword argument {name!r}. {did_you_mean(name, known, PREDICTION)}"
            )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_options(function: _Function) -> _Function:
    """Replace ``**options`` in a function's signature by the options, for completion and ``help()``."""
    plain = inspect.signature(function)
    own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(PredictOptions)
    ]
    function.__signature__ = plain.replace(parameters=own + options)  # type: ignore[attr-defined]
    return function
