"""Feature pyramids between backbone, neck and heads: named maps with declared channels and strides.

Shape shorthand used everywhere: ``B`` batch, ``C`` channels, ``H`` and ``W`` height and width of a map in
pixels of that map. A level's name gives its stride: backbone ``cK`` and neck ``pK`` have stride ``2**K``; of several
levels with the same stride, later ones get a letter, ``c5`` and ``c5b``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from a2fpn.errors import ConfigError, ConfigTypeError

Features = dict[str, Tensor]
"""Ordered mapping from level name to a map ``(B, C, H, W)``, finest level first."""


@dataclass(frozen=True)
class LevelSpec:
    """One level of a pyramid.

    Args:
        channels: Channels of the map.
        stride: Input pixels per map pixel, per side.
    """

    channels: int
    stride: int


class PyramidSpec(Mapping[str, LevelSpec]):
    """Ordered mapping from level name to :class:`LevelSpec`, finest level first.

    Args:
        levels: The levels; strides must not decrease.

    Raises:
        ValueError: If there are no levels, or strides decrease.

    Example:
        >>> spec = PyramidSpec.from_channels([64, 128], strides=[8, 16])
        >>> spec
        PyramidSpec(c3: 64 x stride 8, c4: 128 x stride 16)
        >>> spec["c4"].stride
        16
    """

    def __init__(self, levels: Mapping[str, LevelSpec]) -> None:
        strides = [level.stride for level in levels.values()]
        if not strides:
            raise ConfigError("A pyramid needs at least one level, got none.")
        if any(fine > coarse for fine, coarse in itertools.pairwise(strides)):
            raise ConfigError(f"The strides of a pyramid must not decrease from level to level, got {strides}.")
        self._levels = dict(levels)

    @classmethod
    def from_channels(
        cls, channels: Sequence[int], *, strides: Sequence[int] = (4, 8, 16, 32), prefix: str = "c"
    ) -> PyramidSpec:
        """Build a spec from channel counts; levels are named after the power of two of their stride.

        Raises:
            ValueError: If the counts differ or a stride is not a power of two.
        """
        if len(channels) != len(strides):
            raise ConfigError(f"{len(channels)} channel counts were given for {len(strides)} strides {list(strides)}.")
        names = level_names(prefix, strides)
        return cls({name: LevelSpec(c, s) for name, c, s in zip(names, channels, strides, strict=True)})

    def __getitem__(self, name: str) -> LevelSpec:
        return self._levels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __repr__(self) -> str:
        levels = ", ".join(f"{name}: {level.channels} x stride {level.stride}" for name, level in self.items())
        return f"PyramidSpec({levels})"

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, finest first."""
        return tuple(self)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(level.channels for level in self.values())

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides per level."""
        return tuple(level.stride for level in self.values())


def level_name(prefix: str, stride: int) -> str:
    """Name of a level by its stride.

    Raises:
        ValueError: If the stride is not a power of two.

    Example:
        >>> level_name("p", 32)
        'p5'
    """
    if stride < 1 or stride & (stride - 1):
        raise ConfigError(f"Levels are named by the power of two of their stride, got stride {stride}.")
    return f"{prefix}{stride.bit_length() - 1}"


def level_names(prefix: str, strides: Sequence[int]) -> tuple[str, ...]:
    """Names of levels by their strides.

    Raises:
        ValueError: If a stride is not a power of two.

    Example:
        >>> level_names("c", [16, 32, 32])
        ('c4', 'c5', 'c5b')
    """
    repeats = [list(strides[:i]).count(stride) for i, stride in enumerate(strides)]
    return tuple(
        level_name(prefix, stride) + (chr(ord("a") + repeat) if repeat else "")
        for stride, repeat in zip(strides, repeats, strict=True)
    )


def check_features(features: Mapping[str, Tensor], spec: PyramidSpec) -> None:
    """Check that feature maps match a spec: names, order, channels, and a common batch size.

    Args:
        features: The maps, each ``(B, C, H, W)``.
        spec: The declared levels.

    Raises:
        ValueError: With what was expected and found.
    """
    if not isinstance(features, Mapping):
        raise ConfigTypeError(
            f"Expected feature maps by name, {{{spec.names[0]!r}: map, ...}}, got {_described(features)}. Maps in the "
            f"order {', '.join(spec.names)} get their names by dict(zip(neck.in_spec.names, maps))."
        )
    if tuple(features) != spec.names:
        raise ConfigError(f"Expected feature maps named {list(spec.names)} in this order, got {list(features)}.")
    for name, level in spec.items():
        shape = tuple(features[name].shape)
        if len(shape) != 4 or shape[1] != level.channels:
            raise ConfigError(f"Level {name}: expected a map (B, {level.channels}, H, W), got {shape}.")
    batches = {name: x.shape[0] for name, x in features.items()}
    # Compared instead of collected in a set: symbolic sizes are not hashable.
    if any(batch != features[spec.names[0]].shape[0] for batch in batches.values()):
        raise ConfigError(f"All levels must have the same batch size, got {batches}.")


def _described(value: object) -> str:
    """Describe the type and shapes of a value that is not a mapping."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        shapes = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in value[:6]]
        return f"a {type(value).__name__} of {len(value)}: {', '.join(shapes)}{', ...' if len(value) > 6 else ''}"
    return f"a {type(value).__name__}"


def check_pyramid(pyramid: Sequence[Tensor], spec: PyramidSpec, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
    """Check that a neck's levels match its spec: channels, and sizes that fit their strides.

    Args:
        pyramid: The levels, finest first.
        spec: The levels that the neck declares.
        maps: Its input maps.
        strides: Their strides.

    Raises:
        ValueError: With the level, and what was expected and found.
    """
    for (name, level), x in zip(spec.items(), pyramid, strict=True):
        # The coarsest input that is not coarser than the level; sizes in between may have been rounded.
        source = max((i for i, stride in enumerate(strides) if stride <= level.stride), default=0)
        sides = [side * strides[source] / level.stride for side in maps[source].shape[-2:]]
        fits = all(abs(got - wanted) < 1 for got, wanted in zip(x.shape[-2:], sides, strict=True))
        if x.ndim != 4 or x.shape[:2] != (maps[0].shape[0], level.channels) or not fits:
            wanted = (maps[0].shape[0], level.channels, *(math.ceil(side) for side in sides))
            raise ConfigError(
                f"The neck declares level {name} with {level.channels} channels at stride {level.stride}, which is "
                f"{wanted} here, and returned {tuple(x.shape)}."
            )


def level_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size of a level's map for an image of the given size: ``ceil(size / stride)``.

    Example:
        >>> level_size((33, 64), 32)
        (2, 2)
    """
    # Ceiling division without negative numbers: ONNX rounds toward zero.
    return (size[0] + stride - 1) // stride, (size[1] + stride - 1) // stride
