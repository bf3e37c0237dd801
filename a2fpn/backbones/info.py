"""Adaptations of timm architectures to feature maps of declared strides, and the table of them in the package."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import is_model_in_modules

from a2fpn.config import PreprocessConfig
from a2fpn.errors import ConfigError

TABLE = "assets/backbones.csv"
PYRAMID = (4, 8, 16, 32)
"""Strides that the necks expect."""
_UNKNOWN = "?"


class UnsupportedBackboneError(ConfigError):
    """A timm model that cannot serve as a backbone; the message gives the reason and similar models that can."""


@dataclass(frozen=True)
class BackboneInfo:
    """Feature maps of an architecture, and the adaptations needed to get them at declared strides.

    Args:
        architecture: timm's name without a tag.
        strides: Strides of its native maps, increasing; of several maps with one stride, the deepest.
        channels: Channels of these maps.
        indices: Their indices among timm's features.
        options: Arguments passed to its constructor.
        divisor: Images are padded to a multiple of this.
        size: Side of the only square image it accepts, unless built for another; None for any size.
        resizable: Whether it can be built for another fixed size.
        channels_last: Whether its maps are ``(B, H, W, C)``.
        resized: Whether its maps match their strides only approximately and are resized.
        unused: Modules that no map of stride 4 to 32 depends on, which are removed, and such parameters, which are
            frozen since the network does not run without them. None if unknown.
        unused_from_8: The same for the maps of stride 8 to 32, which one-stage detectors use.
        parameters: Number of parameters, in millions.
        reason: Why it can't be attached; empty if it can.
        timm: Version of timm that was probed.
    """

    architecture: str
    strides: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    divisor: int = 1
    size: int | None = None
    resizable: bool = False
    channels_last: bool = False
    resized: bool = False
    unused: tuple[str, ...] | None = None
    unused_from_8: tuple[str, ...] | None = None
    parameters: float = 0.0
    reason: str = ""
    timm: str = timm.__version__

    @property
    def adaptations(self) -> str:
        """Keywords joined by ``+``; ``native`` if no adaptation is needed.

        ``permuted`` (channels last), ``switched`` (constructor switches), ``padded`` (to more than multiples of 32),
        ``fixed`` (one image size), ``resized`` (maps), ``simple_fpn`` (one stride, the others are resampled from it),
        ``completed`` (some strides are resampled from the nearest one), or ``unsupported``.
        """
        missing = not set(PYRAMID) <= set(self.strides)
        words = {
            "permuted": self.channels_last,
            "switched": bool(self.options),
            "padded": self.size is None and 32 % self.divisor != 0,
            "fixed": self.size is not None,
            "resized": self.resized,
            "simple_fpn": len(self.strides) == 1,
            "completed": missing and len(self.strides) > 1,
        }
        return "unsupported" if self.reason else "+".join(word for word, true in words.items() if true) or "native"

    @property
    def usual_size(self) -> int | None:
        """Default image side of a detector's backbone; None for any size.

        Objects are small at the 224 pixels of most such classifiers, so their own size is doubled while it stays at
        most 800, the size of other detectors, if the weights can be resized. MLP-Mixers keep theirs: they have weights
        per position.
        """
        if self.size is None or not self.resizable or is_model_in_modules(self.architecture, {"mlp_mixer"}):
            return self.size
        return self.size << int(math.log2(max(1, PreprocessConfig.min_size // self.size)))

    def source(self, stride: int) -> int:
        """Position of the map from which a given stride is taken or resampled: the same stride, or the nearest one."""
        distances = [abs(math.log2(own / stride)) for own in self.strides]
        # Of two equally near ones the coarser, which has more semantics.
        return max(i for i, distance in enumerate(distances) if distance == min(distances))

    def unused_by(self, sources: Collection[int]) -> tuple[str, ...] | None:
        """``unused`` for maps at the given positions; None if unknown."""
        for strides, unused in ((PYRAMID, self.unused), (PYRAMID[1:], self.unused_from_8)):
            if set(sources) == {self.source(stride) for stride in strides}:
                return unused
        return None

    def to_row(self) -> dict[str, str]:
        """Convert to text for the table."""
        return {
            "architecture": self.architecture,
            "adaptations": self.adaptations,
            **{f.name: _text(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "architecture"},
            **{key: _UNKNOWN for key in ("unused", "unused_from_8") if getattr(self, key) is None},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> BackboneInfo:
        """Convert back from :meth:`to_row`; other columns are ignored."""
        readers: dict[str, Callable[[str], Any]] = {
            "options": json.loads,
            "divisor": int,
            "parameters": float,
            "size": lambda text: int(text) if text else None,
            **dict.fromkeys(
                ("unused", "unused_from_8"), lambda text: None if text == _UNKNOWN else tuple(text.split())
            ),
            **dict.fromkeys(("resizable", "channels_last", "resized"), "True".__eq__),
            **dict.fromkeys(("strides", "channels", "indices"), lambda text: tuple(map(int, text.split()))),
        }
        return cls(**{f.name: readers.get(f.name, str)(row[f.name]) for f in dataclasses.fields(cls)})


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, Mapping) else "" if value is None else str(value)


@functools.cache
def read_table() -> dict[str, BackboneInfo]:
    """Read the packaged table, by architecture."""
    text = importlib.resources.files("a2fpn").joinpath(TABLE).read_text(encoding="utf-8")
    return {row["architecture"]: BackboneInfo.from_row(row) for row in csv.DictReader(text.splitlines())}
