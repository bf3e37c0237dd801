"""Interface of necks, and the pyramid that the FPN family shares.

Shape shorthand: ``B`` batch, ``C_i`` channels and ``H_i, W_i`` size of backbone level ``i``, ``d`` pyramid channels.
"""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn._registry import Registry, did_you_mean
from a2fpn.errors import ConfigError
from a2fpn.layers import MGC, ConvNormAct, LevelModules
from a2fpn.pyramid import Features, PyramidSpec, check_features, check_pyramid, level_size

_MOST_EXTRA_LEVELS = 8  # each halves the previous: further ones would be a single pixel


class Neck(nn.Module, ABC):
    """Turns backbone features into a pyramid of equal channels.

    Subclasses implement :meth:`fuse`; this class checks the inputs, masks padding and adds the extra levels. A neck
    is independent of the image size and never modifies its inputs.

    Args:
        in_spec: Output levels of the backbone.
        out_channels: Channels ``d`` of every output level.
        extra_levels: Coarser levels, each subsampled from the previous one by two, as for the RPN of an R-CNN.

    Attributes:
        out_spec: Output levels of the neck.
        fuses_levels: Whether the neck fuses several backbone levels; False if it builds its levels from one.

    Raises:
        ValueError: For fewer than one channel or a negative number of extra levels.
    """

    fuses_levels: ClassVar[bool] = True

    def __init__(self, in_spec: PyramidSpec, *, out_channels: int = 256, extra_levels: int = 1) -> None:
        super().__init__()
        if out_channels < 1 or not 0 <= extra_levels <= _MOST_EXTRA_LEVELS:
            raise ConfigError(
                f"Expected out_channels >= 1 and 0 to {_MOST_EXTRA_LEVELS} extra_levels, got {out_channels} and "
                f"{extra_levels}."
            )
        self.in_spec = in_spec
        self.out_channels = out_channels
        self.extra_levels = extra_levels
        strides = list(in_spec.strides)
        strides += [strides[-1] << (i + 1) for i in range(extra_levels)]
        self.out_spec = PyramidSpec.from_channels([out_channels] * len(strides), strides=strides, prefix="p")
        # An unbound function, so that a copy of the neck does not run the original.
        self._fuse: Callable[[Neck, list[Tensor], list[Tensor | None]], list[Tensor]] = type(self).fuse

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile :meth:`fuse` by :func:`torch.compile`, which receives the arguments.

        Padding masks are computed outside: they depend on image sizes and would trigger recompilation.
        """
        self._fuse = torch.compile(type(self).fuse, *args, **kwargs)

    @abstractmethod
    def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
        """Maps ``(B, C_i, H_i, W_i)`` per level to ``(B, d, H_i, W_i)`` per level.

        Args:
            features: Backbone maps, finest first.
            valid: Per level a bool map ``(B, 1, H_i, W_i)``, False on padding, or None without padding.

        Returns:
            The levels of ``out_spec``; omitted extra levels are subsampled from the last one.
        """

    @property
    def roi_levels(self) -> tuple[str, ...]:
        """Names of the levels that RoI heads pool from: the first of each stride, without extra levels.

        The others are used for proposals only.
        """
        levels = list(self.out_spec.items())[: len(self.out_spec) - self.extra_levels]
        return tuple(name for i, (name, level) in enumerate(levels) if level not in dict(levels[:i]).values())

    def losses(self) -> dict[str, Tensor]:
        """Losses on the neck's own parameters, ready to be added to the detector's; none by default."""
        return {}

    def forward(self, features: Features, image_sizes: Sequence[tuple[int, int]] | None = None) -> Features:
        """Compute the pyramid.

        Args:
            features: Backbone maps named as in ``in_spec``.
            image_sizes: Height and width of each image of the batch in pixels, without padding; a single pair if all
                have one size, None if no image is padded.

        Returns:
            Maps ``(B, d, H_i, W_i)`` named as in ``out_spec``.

        Raises:
            ValueError: If the maps do not match ``in_spec``, or the pyramid does not match ``out_spec``.
            TypeError: If the maps have no names.
        """
        check_features(features, self.in_spec)
        maps = list(features.values())
        for (fine_name, fine), (coarse_name, coarse) in itertools.pairwise(features.items()):
            if coarse.shape[-2] > fine.shape[-2] or coarse.shape[-1] > fine.shape[-1]:
                raise ConfigError(
                    f"Level {coarse_name} {tuple(coarse.shape[-2:])} is larger than the finer {fine_name} "
                    f"{tuple(fine.shape[-2:])}; maps must shrink from level to level."
                )
        valid = _valid_maps(maps, self.in_spec.strides, image_sizes)
        pyramid = self._fuse(self, maps, valid)
        if len(pyramid) > len(self.out_spec):
            raise ConfigError(f"The neck declares {len(self.out_spec)} levels and returned {len(pyramid)}.")
        while len(pyramid) < len(self.out_spec):
            # Not a slice: torch.compile fails where a module receives a strided view of dynamic size.
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        if not torch.compiler.is_compiling():  # would add guards on symbolic sizes
            check_pyramid(pyramid, self.out_spec, maps, self.in_spec.strides)
        return dict(zip(self.out_spec.names, pyramid, strict=True))


def _valid_maps(
    maps: Sequence[Tensor], strides: Sequence[int], image_sizes: Sequence[tuple[int, int]] | None
) -> list[Tensor | None]:
    """Validity masks for all levels, or None for each."""
    if image_sizes is None:
        return [None] * len(maps)
    sizes = [[level_size(size, stride) for size in image_sizes] for stride in strides]
    if len(image_sizes) == 1:
        return _valid_of_one_size(maps, [own[0] for own in sizes])
    if all(h >= x.shape[-2] and w >= x.shape[-1] for x, own in zip(maps, sizes, strict=True) for h, w in own):
        return [None] * len(maps)
    # One asynchronous copy for all levels.
    on_device = torch.tensor(sizes, pin_memory=maps[0].is_cuda).to(maps[0].device, non_blocking=True)
    return [_valid_map(x, *(own.T[..., None])) for x, own in zip(maps, on_device, strict=True)]


def _valid_of_one_size(maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    # Symbolic sizes must cover images with and without padding.
    padded = torch.compiler.is_compiling() or any(
        h < x.shape[-2] or w < x.shape[-1] for x, (h, w) in zip(maps, sizes, strict=True)
    )
    return [_valid_map(x, *size) if padded else None for x, size in zip(maps, sizes, strict=True)]


def _valid_map(x: Tensor, heights: Tensor | int, widths: Tensor | int) -> Tensor:
    """Build a bool map ``(B, 1, H, W)`` from sides ``(B, 1)``, or ``(1, 1, H, W)`` from sides that all images share."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    valid: Tensor = (rows < heights).view(-1, 1, x.shape[-2], 1) & (columns < widths).view(-1, 1, 1, x.shape[-1])
    return valid


NECKS: Registry[Callable[..., Neck]] = Registry("neck")
register_neck = NECKS.register


def create_neck(name: str, in_spec: PyramidSpec, **options: Any) -> Neck:
    """Build a neck.

    Args:
        name: A registered neck.
        in_spec: Output levels of the backbone.
        **options: The neck's own arguments (``out_channels``, ``attention``, ...).

    Raises:
        ValueError: For an unknown name or argument.

    Example:
        >>> neck = create_neck("a2fpn", PyramidSpec.from_channels([64, 128, 256, 512]), out_channels=64)
        >>> neck.out_spec.strides
        (4, 8, 16, 32, 64)
    """
    neck = NECKS[name]
    accepted = keyword_arguments(neck)
    for option in options:
        if option not in accepted:
            raise ConfigError(f"Neck {name!r} has no argument {option!r}. {did_you_mean(option, accepted)}")
    return neck(in_spec, **options)


def keyword_arguments(neck: Callable[..., Neck]) -> set[str]:
    """Names of a neck's own arguments."""
    return {p.name for p in inspect.signature(neck).parameters.values() if p.kind is p.KEYWORD_ONLY}


class NearestFusion(nn.Module):
    """Nearest-neighbor upsampling and addition (Lin et al., "Feature Pyramid Networks", CVPR 2017).

    Args:
        channels: Unused, for a common signature of fusions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``(B, C, h, w)`` into ``(B, C, H, W)``."""
        # In place, since allocating a map of the finest level costs as much time as the sum.
        return F.interpolate(coarse, size=fine.shape[-2:], mode="nearest").add_(fine)


class StridedFusion(nn.Module):
    """A 3x3 convolution of stride 2 and addition (Liu et al., "Path Aggregation Network", CVPR 2018).

    Args:
        channels: Channels of both maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = ConvNormAct(channels, channels, 3, stride=2)

    def forward(self, fine: Tensor, coarse: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``(B, C, H, W)`` into ``(B, C, h, w)``."""
        down: Tensor = self.down(fine)
        if down.shape[-2:] != coarse.shape[-2:]:
            # Sizes differ by a row or column with backbones that round sizes down.
            down = F.interpolate(down, size=coarse.shape[-2:], mode="nearest")
        return coarse + down


class PyramidNeck(Neck):
    """Lateral convolutions, optional global context, a top-down and an optional bottom-up path.

    Subclasses choose the parts.

    Args:
        in_spec: Output levels of the backbone.
        top_down_options: For subclasses: options of their top-down fusion, None for none.
        bottom_up_options: Likewise for the bottom-up fusion.
        out_channels: Channels ``d`` of every level.
        extra_levels: Coarser levels added by subsampling.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation after each convolution (timm name), or None.

    Attributes:
        top_down_fusion: Module for ``d`` channels, ``(coarse, fine, valid) -> merged``, that merges a level into the
            next finer one; ``valid`` masks the level merged into.
        bottom_up_fusion: Module ``(fine, coarse, valid) -> merged`` that merges a level into the next coarser one;
            None leaves the path out.
        context: Global context added to the laterals, or None.
    """

    top_down_fusion: ClassVar[type[nn.Module]]
    bottom_up_fusion: ClassVar[type[nn.Module] | None] = None

    def __init__(
        self,
        in_spec: PyramidSpec,
        top_down_options: Mapping[str, str] | None = None,
        bottom_up_options: Mapping[str, str] | None = None,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__(in_spec, out_channels=out_channels, extra_levels=extra_levels)
        going_down, going_up = top_down_options or {}, bottom_up_options or {}

        def conv(in_channels: int, kernel_size: int) -> ConvNormAct:
            return ConvNormAct(in_channels, out_channels, kernel_size, norm_layer=norm_layer, act_layer=act_layer)

        steps, down = range(len(in_spec) - 1), self.bottom_up_fusion
        names = self.out_spec.names[: len(in_spec)]
        self.lateral = LevelModules(names, (conv(channels, 1) for channels in in_spec.channels))
        self.context: MGC | None = None
        # Steps are named after the level that they merge into.
        self.top_down = LevelModules(names[:-1], (self.top_down_fusion(out_channels, **going_down) for _ in steps))
        self.output = LevelModules(names, (conv(out_channels, 3) for _ in in_spec))
        self.bottom_up = self.bottom_up_output = None
        if down is not None:
            self.bottom_up = LevelModules(names[1:], (down(out_channels, **going_up) for _ in steps))
            self.bottom_up_output = LevelModules(names[1:], (conv(out_channels, 3) for _ in steps))

    def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
        """See :meth:`Neck.fuse`."""
        pyramid: list[Tensor] = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        if self.context is not None:
            pyramid = self.context(features, valid, residual=pyramid)
        for i in reversed(range(len(pyramid) - 1)):
            pyramid[i] = self.top_down[i](pyramid[i + 1], pyramid[i], valid[i])
        pyramid = [output(x) for output, x in zip(self.output, pyramid, strict=True)]
        if self.bottom_up is not None and self.bottom_up_output is not None:
            for i, (merge, output) in enumerate(zip(self.bottom_up, self.bottom_up_output, strict=True)):
                pyramid[i + 1] = output(merge(pyramid[i], pyramid[i + 1], valid[i + 1]))
        return pyramid
