"""Probing of timm architectures for the strides of their feature maps and the image sizes they accept.

timm declares strides and channels, but not at which image sizes a network runs, nor what it does with other sizes. So
a network is built on the meta device, which takes neither memory nor computation, and run at two sizes. The results
for all architectures are packaged as a table (written by ``python -m benchmarks.backbones``); any other is probed on
demand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from a2fpn.backbones.create import create_network
from a2fpn.backbones.info import BackboneInfo
from a2fpn.pyramid import level_size

# Constructor switches that may let a network accept any image size; the first that works is used.
_SWITCHES: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})
# Patches of 12 or 14 pixels give strides that are no powers of two; timm resamples their weights to 16.
_PATCH_16: tuple[dict[str, Any], ...] = ({"patch_size": 16, "dynamic_img_size": True}, {"patch_size": 16})
# Image sizes are tried as multiples of these, common ones with every switch first; the rare ones, 28 to 384, are window
# sizes of one family.
_DIVISORS = (1, 32, 64)
_RARE_DIVISORS = (28, 56, 96, 128, 224, 256, 384)

# Not square, with sides that differ by a factor of at least 1.4: detects networks that resize their input internally
# and so always return maps of one size.
_SIZES = ((200, 333), (445, 230))


def probe(architecture: str) -> BackboneInfo:
    """Determine the adaptations of an architecture; ``reason`` says why if there are none.

    Example:
        >>> found = probe("test_resnet")
        >>> found.strides, found.divisor, found.adaptations
        ((2, 4, 8, 16, 32), 1, 'native')
    """
    try:
        return _Probe(architecture, "meta").run()
    except _NeedsValuesError:
        # Networks with value-dependent code can't run on the meta device.
        return _Probe(architecture, "cpu").run()


class _NeedsValuesError(Exception):
    """A network that can't run on the meta device."""


@dataclass(frozen=True)
class _Maps:
    """Strides and channels of a network's maps at one or more image sizes.

    ``strides`` are rounded to the nearest power of two, ``ratios`` are not. Maps are ``exact`` if their sizes match the
    strides, and ``even`` if their ratios are the same at every size.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    channels_last: bool
    ratios: tuple[float, ...]
    exact: bool
    even: bool = False


class _Probe:
    """Search for switches and a divisor with which a network runs, on one device."""

    def __init__(self, architecture: str, device: str) -> None:
        self.architecture = architecture
        self.device = device
        config = timm.get_pretrained_cfg(architecture)
        self.native = 224 if config is None else max(config.input_size[1:])
        self.reasons: list[str] = []

    def run(self) -> BackboneInfo:
        body = self._build({})
        if body is None:
            return BackboneInfo(self.architecture, reason=self.reasons[0])
        every = feature_info(body).get_dicts(idx=list(range(len(feature_info(body)))))
        # timm can't extract a map that is not the output of a module.
        indices = tuple(i for i, level in enumerate(every) if level["module"])
        reductions = [every[i]["reduction"] for i in indices]
        if len(set(reductions)) == 1:
            indices = indices[-1:]
        patch = _PATCH_16 if len(set(reductions)) == 1 and reductions[0] in (12, 14) else ()
        found = self._free_size(indices, (*patch, *_SWITCHES)) or self._fixed_size(indices)
        if found is None:
            return BackboneInfo(self.architecture, reason=self.reasons[-1])
        return dataclasses.replace(found, parameters=round(sum(p.numel() for p in body.parameters()) / 1e6, 3))

    def _free_size(self, indices: tuple[int, ...], switches: Sequence[dict[str, Any]]) -> BackboneInfo | None:
        bodies: dict[int, nn.Module | None] = {}
        nearly: BackboneInfo | None = None
        evenly = False
        common = list(itertools.product(_DIVISORS, range(len(switches))))
        rare = [(divisor, i) for i in range(len(switches)) for divisor in _RARE_DIVISORS]
        for divisor, i in [*common, *rare]:
            if evenly:
                break
            if i not in bodies:
                bodies[i] = self._build({**switches[i], "out_indices": indices})
            body = bodies[i]
            sizes = [tuple(math.ceil(side / divisor) * divisor for side in size) for size in _SIZES]
            maps = None if body is None else self._measure(body, [(h, w) for h, w in sizes])
            if maps is not None and divisor == 1 and not maps.exact:
                # A larger divisor may make it exact.
                continue
            if maps is not None and (maps.exact or maps.even or nearly is None):
                nearly, evenly = self._info(maps, indices, options=switches[i], divisor=divisor), maps.even
                if maps.exact:
                    break
        return nearly

    def _fixed_size(self, indices: tuple[int, ...]) -> BackboneInfo | None:
        body = self._build({"out_indices": indices})
        maps = None if body is None else self._measure(body, [(self.native, self.native)])
        if maps is None:
            return None
        double = 2 * self.native
        larger = self._build({"out_indices": indices, "img_size": double})
        again = None if larger is None else self._measure(larger, [(double, double)])
        found = self._info(maps, indices, divisor=self.native)
        return dataclasses.replace(
            found, size=self.native, resizable=again is not None and again.strides == maps.strides
        )

    def _info(self, maps: _Maps, indices: tuple[int, ...], **options: Any) -> BackboneInfo:
        # The deepest map of each stride.
        last = {stride: i for i, stride in enumerate(maps.strides)}
        return BackboneInfo(
            self.architecture,
            strides=tuple(last),
            channels=tuple(maps.channels[i] for i in last.values()),
            indices=tuple(indices[i] for i in last.values()),
            channels_last=maps.channels_last,
            resized=not maps.exact,
            **options,
        )

    def _build(self, options: dict[str, Any]) -> nn.Module | None:
        with self._noted(f"its constructor with {options}"), torch.device(self.device):
            body = create_network(self.architecture, features_only=True, **options)
            # On the meta device they are unrolled step by step, which takes minutes.
            if self.device == "meta" and any(isinstance(module, nn.RNNBase) for module in body.modules()):
                raise _NeedsValuesError
            return body.eval()
        return None

    def _measure(self, body: nn.Module, sizes: Sequence[tuple[int, int]]) -> _Maps | None:
        channels = tuple(feature_info(body).channels())
        for_sizes = []
        for size in sizes:
            with self._noted(f"an image of {size[0]} x {size[1]}"):
                for_sizes.append(measure(self._run(body, size), size, channels))
        if len(for_sizes) < len(sizes):
            return None
        first = for_sizes[0]
        if any((m.strides, m.channels_last) != (first.strides, first.channels_last) for m in for_sizes):
            self.reasons.append(f"Its strides depend on the size of the image: {[m.strides for m in for_sizes]}.")
            return None
        even = len({m.ratios for m in for_sizes}) == 1 and first.even
        return dataclasses.replace(first, exact=all(m.exact for m in for_sizes), even=even)

    @torch.no_grad()
    def _run(self, body: nn.Module, size: tuple[int, int]) -> list[Tensor]:
        with torch.device(self.device):
            return list(body(torch.zeros(1, 3, *size)))

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Record exceptions of a network, of any kind: its code may be written for another size."""
        try:
            yield
        except _NeedsValuesError:
            raise
        except Exception as error:
            if self.device == "meta" and "meta tensor" in str(error):
                raise _NeedsValuesError from error
            self.reasons.append(f"It fails on {what}: {type(error).__name__}: {str(error).strip()[:200]}.")


def measure(maps: Sequence[Tensor], size: tuple[int, int], channels: Sequence[int]) -> _Maps:
    """Measure the strides of maps of an image with the given height and width.

    Args:
        maps: timm's maps.
        size: Height and width of the image.
        channels: Channels that timm declares.

    Raises:
        ValueError: For maps that are not 2-D grids, channels that are not as declared, or strides that differ between
            height and width.
    """
    if len(maps) != len(channels) or any(x.ndim != 4 for x in maps):
        raise ValueError(f"expected {len(channels)} maps, got {[tuple(x.shape) for x in maps]}")
    fitting = [all(x.shape[axis] == c for x, c in zip(maps, channels, strict=True)) for axis in (1, 3)]
    if not any(fitting):
        raise ValueError(f"expected maps of {list(channels)} channels, got {[tuple(x.shape) for x in maps]}")
    strides, ratios, exact = [], [], True
    for x in maps:
        grid = (int(x.shape[2]), int(x.shape[3])) if fitting[0] else (int(x.shape[1]), int(x.shape[2]))
        sides = [2 ** max(0, round(math.log2(side / cells))) for side, cells in zip(size, grid, strict=True)]
        if sides[0] != sides[1]:
            raise ValueError(f"a map of {grid} for an image of {size} has different strides in height and width")
        strides.append(sides[0])
        ratios.append((size[0] / grid[0], size[1] / grid[1]))
        exact &= grid == level_size(size, sides[0])
    if any(fine > coarse for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(f"strides decrease from map to map: {strides}")
    even = all(rows == columns for rows, columns in ratios)
    return _Maps(tuple(strides), tuple(channels), not fitting[0], tuple(rows for rows, _ in ratios), exact, even)


def feature_info(body: nn.Module) -> FeatureInfo:
    """Return timm's description of a network's maps, typed."""
    return typing.cast(FeatureInfo, body.feature_info)
