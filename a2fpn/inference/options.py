"""Options of a prediction, by name and in signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from a2fpn._registry import did_you_mean
from a2fpn._words import PREDICTION
from a2fpn.errors import ConfigTypeError
from a2fpn.heads.postprocess import PostprocessConfig, SoftNms
from a2fpn.inference.tiling import tile_windows
from a2fpn.inference.tta import Augmentation


@dataclass(frozen=True)
class PredictOptions:
    """Options of prediction; None leaves a limit to the model's own configuration.

    Args:
        score_threshold: Objects that score less are dropped, between 0 and 1. None takes 0.5, or what the model was
            configured with where that is 0 or more than 0.05; and for :meth:`Predictor.predict`, which is for
            evaluation, always the model's own. Below that there are more objects than the model gives by itself.
        nms_threshold: IoU above which an object removes a worse one of its class, between 0 and 1.
        detections_per_image: Most objects of an image, or of a tile.
        soft_nms: ``"linear"`` or ``"gaussian"`` lowers the scores of objects that overlap better ones, where NMS
            removes them; see :func:`a2fpn.heads.soft_nms`. False removes.
        tile: Side in pixels of the overlapping tiles in which larger images are predicted one by one, and whose
            objects are merged; None predicts images whole. Each tile is resized by the model's own rule. Keypoints
            can't be merged, nor fused by ``tta``: with a detector of keypoints both are errors.
        overlap: Least share of a tile that the next one shows too. Objects up to this size are seen whole.
        tta: True sees each image, or tile, at three sizes and mirrored, and fuses what is found; an
            :class:`~a2fpn.inference.tta.Augmentation` says which views to take. Takes several times as long.

    Raises:
        ValueError: For a value out of its range.
    """

    score_threshold: float | None = None
    nms_threshold: float | None = None
    detections_per_image: int | None = None
    soft_nms: SoftNms | Literal[False] = False
    tile: int | None = None
    overlap: float = 0.2
    tta: bool | Augmentation = False

    def __post_init__(self) -> None:
        PostprocessConfig(**self.changes)
        tile_windows((1, 1), self.tile or 16, self.overlap)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the model's rule that are replaced."""
        limits = ("score_threshold", "nms_threshold", "detections_per_image")
        given = {name: getattr(self, name) for name in limits if getattr(self, name) is not None}
        return {**given, "soft_nms": self.soft_nms or None}

    @property
    def augmentation(self) -> Augmentation | None:
        """Views of test-time augmentation, if there are more than one."""
        return (Augmentation() if self.tta else None) if isinstance(self.tta, bool) else self.tta

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
