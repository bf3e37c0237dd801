"""Evaluation backends with a common interface."""

from __future__ import annotations

import functools
import logging
import types
import typing
from typing import Any, Literal

import pycocotools.coco
import pycocotools.cocoeval

from a2fpn.errors import ConfigError

logger = logging.getLogger(__name__)
Backend = Literal["auto", "hotcoco", "pycocotools"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)


@functools.cache
def load_library(backend: Backend) -> tuple[Any, Any]:
    """Return the classes ``COCO`` and ``COCOeval`` of a backend, with pycocotools' interface."""
    if backend not in BACKENDS:
        raise ConfigError(f"Unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}.")
    if backend == "pycocotools":
        return _silent_pycocotools()
    try:
        import hotcoco
    except ImportError as error:
        if backend == "hotcoco":
            raise ConfigError(f"hotcoco can't be imported ({error}); install it, or use 'pycocotools'.") from error
        logger.warning("hotcoco can't be imported (%s): using pycocotools, which is many times slower", error)
        return _silent_pycocotools()
    return hotcoco.COCO, hotcoco.COCOeval


def _silent_pycocotools() -> tuple[Any, Any]:
    """Pycocotools' classes without their progress messages, which have no off switch."""

    def silent(function: Any) -> Any:
        namespace = {**function.__globals__, "print": lambda *_: None}
        return types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)

    coco, evaluator = pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval
    return (
        type("COCO", (coco,), {"__init__": silent(coco.__init__), "createIndex": silent(coco.createIndex)}),
        type("COCOeval", (evaluator,), {name: silent(getattr(evaluator, name)) for name in ("evaluate", "accumulate")}),
    )
