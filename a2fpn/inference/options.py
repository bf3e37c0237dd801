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
"""Candidates for each object that may be found: proposals of one object are many."""
_LARGEST_SCALE = 64.0


@dataclass(frozen=True)
class PredictOptions:
    """Options of prediction; None leaves a limit to the model's own configuration.

    Args:
        score_threshold: Objects that score less are dropped, between 0 and 1. None takes 0.5, or what the model was
            configured with where that is 0 or more than 0.05; and for :meth:`Predictor.predict`, which is for
            evaluation, always the model's own. Below that there are more objects than the model gives by itself.
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
            "candidates": None if self.max_objects is None else self.max_objects * CANDIDATES,
        }

    @property
    def augmentation(self) -> Augmentation | None:
        """Views of test-time augmentation, if there are more than one."""
        return (Augmentation() if self.tta else None) if isinstance(self.tta, bool) else self.tta

    def reading(self, **choices: Any) -> SlideOptions:
        """Choices of reading a file, with those of the predictor."""
        return SlideOptions(channels=self.channels, intensity=self.intensity, **choices)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PredictOptions:
        """Options by name.

        Raises:
            TypeError: For an unknown one, with the one that was meant.
        """
        _check_names(given)
        return cls(**given)

    def but(self, changes: Mapping[str, Any]) -> PredictOptions:
        """Options with some of them changed.

        Raises:
            TypeError: For an unknown one, with the one that was meant.
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
    """Show the options in a function's signature in the place of ``**options``: for Tab and ``help()``."""
    plain = inspect.signature(function)
    own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(PredictOptions)
    ]
    function.__signature__ = plain.replace(parameters=own + options)  # type: ignore[attr-defined]
    return function
