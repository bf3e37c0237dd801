"""timm network as a backbone: NCHW feature maps by stride, with frozen parts that stay in evaluation mode."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from a2fpn.backbones.attach import find_backbone_info
from a2fpn.backbones.create import create_network
from a2fpn.backbones.freezing import contributors, convert_norms, drop_modules, drop_unused, freeze_parameters
from a2fpn.backbones.info import PYRAMID, BackboneInfo
from a2fpn.backbones.names import resolve_backbone_name
from a2fpn.backbones.pretrained import create_with_weights
from a2fpn.backbones.probe import feature_info
from a2fpn.backbones.same_padding import pad_in_whole_numbers
from a2fpn.config import STAGES, BackboneConfig
from a2fpn.device import is_known
from a2fpn.errors import ConfigError
from a2fpn.layers import resample
from a2fpn.pyramid import Features, PyramidSpec, level_size

_logger = logging.getLogger(__name__)


class TimmBackbone(nn.Module):
    """Features of a timm network at given strides.

    Strides that the network lacks are resampled from its nearest map: finer ones by transposed convolutions, coarser
    ones by max pooling. If it has a single stride, as plain vision transformers do, each level also gets a norm, since
    the residual stream is not normalized; this is the pyramid of Li et al. (ECCV 2022) without its final convolutions,
    which are in the neck.

    Args:
        config: The network, and which parts of it are trained.
        pretrained: Whether to load timm's weights.
        weights: A local weights file that timm's loader reads instead of downloading.
        strides: Strides of the maps, increasing; None for those of the config.
        info: Maps and adaptations of the network; None looks them up.

    Attributes:
        info: Maps and adaptations of the network.
        body: timm's network.
        unused: Names of removed modules and frozen parameters that no output depends on.
        made: Modules that resample missing levels.
        out_spec: Names, channels and strides of the maps.

    Raises:
        ValueError: For an option that the network doesn't support, or weights of another network.
        UnsupportedBackboneError: If the network can't be attached; a ValueError.
        FileNotFoundError: If there is no such weights file.

    Example:
        >>> backbone = TimmBackbone(BackboneConfig("test_resnet"))
        >>> backbone.out_spec.strides
        (4, 8, 16, 32)
        >>> {name: tuple(x.shape[2:]) for name, x in backbone(torch.zeros(1, 3, 64, 90)).items()}
        {'c2': (16, 23), 'c3': (8, 12), 'c4': (4, 6), 'c5': (2, 3)}
        >>> TimmBackbone(BackboneConfig("test_vit")).out_spec
        PyramidSpec(c2: 16 x stride 4, c3: 32 x stride 8, c4: 64 x stride 16, c5: 64 x stride 32)
    """

    # Parameters created in inference mode can't be traced by autograd, which finds the unused ones.
    @torch.inference_mode(False)
    def __init__(
        self,
        config: BackboneConfig,
        *,
        pretrained: bool = False,
        weights: str | Path | None = None,
        strides: Sequence[int] | None = None,
        info: BackboneInfo | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = resolve_backbone_name(config.name)
        self.info = found = info or find_backbone_info(self.name.partition(".")[0])
        self._size = self._fixed_size()
        strides = tuple(config.strides if strides is None else strides)
        if not strides:
            raise ConfigError(f"Backbone {config.name!r} needs at least one stride, got none.")
        sources = [found.source(stride) for stride in strides]
        # Ascending, since timm returns maps in network order, not in the requested one.
        used = sorted(set(sources))
        options: dict[str, Any] = {
            **self._switches(),
            "features_only": True,
            "out_indices": [found.indices[i] for i in used],
            "in_chans": config.in_chans,
        }
        if pretrained or weights is not None:
            self.body = create_with_weights(self.name, weights, options)
        else:
            self.body = create_network(self.name, **options)
        self._sources = [used.index(source) for source in sources]
        self._own_strides = [found.strides[i] for i in used]
        channels = feature_info(self.body).channels()
        if config.taps:
            channels, strides = self._measure_taps()
            self._sources = list(range(len(strides)))
            self._own_strides = list(strides)
        self.made = nn.ModuleDict()
        self.out_spec = self._make_levels(strides, channels)
        self._needs_channels_first = any(map(_crashes_channels_last, self.body.modules()))
        if config.stride_in_1x1:
            _move_strides(self.body, self.name)
        if config.norm_eps is not None:
            for module in self.body.modules():
                if isinstance(module, _BatchNorm):
                    module.eps = config.norm_eps
        unused = None if config.taps else found.unused_by(sources)
        if unused is None:
            unused = drop_unused(self.body, self._example)
        else:
            drop_modules(self.body, unused)
        self.unused = unused
        self.body = convert_norms(self.body, config.norm)
        pad_in_whole_numbers(self.body)
        self._frozen: list[nn.Module] = []
        if config.norm == "frozen":
            # timm does not convert 1-D batch norms.
            self._freeze({p for m in self.body.modules() if isinstance(m, _BatchNorm) for p in m.parameters()})
        if config.trainable_layers is not None and config.trainable_layers < STAGES:
            self._freeze(self._early_parameters(STAGES - config.trainable_layers))
        if config.grad_checkpointing:
            self._checkpoint()

    def _make_levels(self, strides: Sequence[int], channels: Sequence[int]) -> PyramidSpec:
        """Fill ``made`` with modules that resample levels from maps with the given channels."""
        out_channels = [channels[source] for source in self._sources]
        # A single level is for a neck that builds the others and normalizes.
        norm = len(self.info.strides) == 1 and len(strides) > 1 and not self.config.taps
        for i, (stride, source) in enumerate(zip(strides, self._sources, strict=True)):
            modules, out_channels[i] = resample(out_channels[i], self._own_strides[source], stride)
            if norm:
                modules.append(LayerNorm2d(out_channels[i]))
            if modules:
                self.made[f"{stride}"] = nn.Sequential(*modules)
        return PyramidSpec.from_channels(out_channels, strides=strides)

    def _fixed_size(self) -> int | None:
        """Side of the only image that the network accepts; None for any."""
        found, wanted = self.info, self.config.image_size
        if found.size is None:
            if wanted is not None:
                raise ConfigError(
                    f"Backbone {self.name!r} takes images of any size; leave image_size at None, got {wanted}."
                )
            return None
        if wanted not in (None, found.size) and not found.resizable:
            raise ConfigError(
                f"Backbone {self.name!r} supports images of {found.size} x {found.size} only, got image_size={wanted}."
            )
        size = wanted or found.size
        _logger.warning(
            "Backbone %s is built for images of %d x %d: larger ones are scaled down, others padded.%s",
            self.name,
            size,
            size,
            " Set image_size to build it for another size." if found.resizable else "",
        )
        return size

    def _switches(self) -> dict[str, Any]:
        resized = self._size not in (None, self.info.size)
        return {**self.info.options, **({"img_size": self._size} if resized else {})}

    def _freeze(self, parameters: set[nn.Parameter]) -> None:
        self._frozen += freeze_parameters(self.body, parameters)

    def _early_parameters(self, stages: int) -> set[nn.Parameter]:
        """The network's parameters in the first of its stages, which end at strides 2, 4, 8, 16 and 32."""
        named = dict(self.body.named_parameters())
        if stages == STAGES:
            return set(named.values())
        reached = self._reached() if set(PYRAMID) <= set(self.info.strides) else {}
        if reached and all(fine <= coarse for fine, coarse in itertools.pairwise(reached.values())):
            names = set().union(*(found for stride, found in reached.items() if stride <= 1 << stages))
        else:
            # Without sequential stages, freeze the same proportion of the layers.
            ids = {name.removeprefix("body."): layer for name, layer in self.layer_ids().items()}
            last = max(ids[name] for name in named)
            names = {name for name in named if ids[name] < last * stages / STAGES}
        return {named[name] for name in names & set(named)}

    def _reached(self) -> dict[int, set[str]]:
        """Names of the parameters that each of the network's maps depends on, by stride."""
        found = self.info
        # A new network, since the body returns requested maps only. On the meta device recurrent layers would be
        # unrolled, which takes minutes.
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.body.modules())
        with torch.device("cpu" if recurrent else "meta"):
            options = {**self._switches(), "in_chans": self.config.in_chans}
            whole = create_network(self.name, features_only=True, out_indices=found.indices, **options)
        names = {parameter: name for name, parameter in whole.named_parameters()}
        maps = contributors(self._example(whole))
        return {stride: {names[p] for p in behind} for stride, behind in zip(found.strides, maps, strict=True)}

    def _checkpoint(self) -> None:
        # timm's wrappers store the network in one of these, or are the network.
        held = (getattr(self.body, name, None) for name in ("model", "body"))
        inner: Any = next((module for module in held if module is not None), self.body)
        try:
            inner.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"timm does not support gradient checkpointing for {self.name!r}; set grad_checkpointing=False."
            ) from error

    @torch.enable_grad()
    def _example(self, body: nn.Module | None = None) -> list[Tensor]:
        """Run the network on a small black image in evaluation mode and return its native maps."""
        body = body or self.body
        mode, device = body.training, next(body.parameters()).device
        maps = self._run(body.eval(), torch.zeros(1, self.config.in_chans, *self._example_size(), device=device))
        body.train(mode)
        return maps

    def _example_size(self) -> tuple[int, int]:
        side = min(128, self._size or 128)
        return self.padded_size(side, side)

    def _measure_taps(self) -> tuple[list[int], tuple[int, ...]]:
        """Measure channels and strides of the maps named by ``taps``, which timm does not declare."""
        maps = self._example()
        return [x.shape[1] for x in maps], tuple(self._example_size()[1] // x.shape[-1] for x in maps)

    def layer_ids(self) -> dict[str, int]:
        """Layer index of every parameter, for layer-wise learning rate decay.

        Layers are the blocks of timm's ``group_matcher``, not stages. Modules added to the network form its last layer.

        If timm has no groups, a parameter's layer is the first map that depends on it.

        Returns:
            Parameter name, as in ``named_parameters``, to layer: 0 next to the image, without gaps; there are
            ``1 + max(ids.values())`` layers.

        Example:
            >>> ids = TimmBackbone(BackboneConfig("test_resnet")).layer_ids()
            >>> ids["body.conv1.0.weight"], ids["body.layer4.0.conv1.weight"]
            (0, 4)
        """
        with torch.device("meta"):
            whole: Any = create_network(self.name, **self._switches())
        if hasattr(whole, "group_matcher"):
            groups = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        else:
            # In reverse order, so that the first map overwrites later ones.
            groups = {name: i for i, behind in reversed([*enumerate(self._reached().values())]) for name in behind}
        # timm's wrappers add a prefix to names, and some join two parts with an underscore.
        flat = {name.replace(".", "_"): layer for name, layer in groups.items()}
        own: dict[str, int] = {}
        for name, _ in self.body.named_parameters():
            candidates = (name.replace(".", "_"), name.partition(".")[2].replace(".", "_"))
            own[f"body.{name}"] = next((flat[c] for c in candidates if c in flat), max(flat.values()))
        order = {layer: i for i, layer in enumerate(sorted(set(own.values())))}
        ids = {name: order[layer] for name, layer in own.items()}
        return ids | {f"made.{name}": len(order) for name, _ in self.made.named_parameters()}

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the training mode of all but the frozen modules."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> Features:
        """Maps images ``(B, in_chans, H, W)`` to features named as in ``out_spec``, each ``ceil(H / stride)`` high.

        Raises:
            ValueError: If the images exceed the network's fixed size.
        """
        height, width = x.shape[-2:]
        padded = self.padded_size(height, width)
        if padded != (height, width):
            x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
        maps = self._run(self.body, x.contiguous() if self._needs_channels_first else x)
        if self.info.resized and not self.config.taps:
            maps = [
                F.interpolate(y, size=level_size(padded, stride), mode="bilinear", align_corners=False)
                for y, stride in zip(maps, self._own_strides, strict=True)
            ]
        features = {}
        for (name, level), source in zip(self.out_spec.items(), self._sources, strict=True):
            key = f"{level.stride}"
            y = self.made[key](maps[source]) if key in self.made else maps[source]
            rows, columns = level_size((height, width), level.stride)
            fits = is_known(y.shape[-2] == rows) and is_known(y.shape[-1] == columns)
            features[name] = y if fits else y[..., :rows, :columns]
        return features

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of an image after padding for the network.

        Raises:
            ValueError: If the image exceeds the network's fixed size.
        """
        divisor = self.info.divisor
        if self._size is None:
            return (
                (height, width) if divisor == 1 else (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
            )
        if max(height, width) > self._size:
            raise ConfigError(
                f"Backbone {self.name!r} is built for images of at most {self._size} x {self._size}, got {height} x "
                f"{width}. Set image_size for larger ones, if timm supports it."
            )
        return self._size, self._size

    def _run(self, body: nn.Module, x: Tensor) -> list[Tensor]:
        tapped = self.config.taps and body is self.body
        maps = _run_tapped(body, x, self.config.taps) if tapped else list(body(x))
        return [y.permute(0, 3, 1, 2) for y in maps] if self.info.channels_last else maps


def _run_tapped(body: nn.Module, x: Tensor, taps: Sequence[str]) -> list[Tensor]:
    """Run a network and return the outputs of the named modules."""
    maps: list[Tensor] = []
    # Hooks are removed, since a deep copy of the network would keep them and append to this list.
    with contextlib.ExitStack() as stack:
        for name in taps:
            try:
                tapped = body.get_submodule(name)
            except AttributeError as error:
                raise ConfigError(f"taps: the network has no module {name!r} ({error}).") from error
            hook = tapped.register_forward_hook(lambda module, inputs, output: maps.append(output))
            stack.callback(hook.remove)
        body(x)
    return maps


def _crashes_channels_last(module: nn.Module) -> bool:
    """Return whether channels_last must be avoided.

    On a CPU the backward pass of strided 1x1 convolutions with fewer than 16 input channels has corrupted memory.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 16
    )


def _move_strides(body: nn.Module, name: str) -> None:
    """Move the strides of bottlenecks to their first convolution, as in Caffe's ResNets."""
    blocks = [module for module in body.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise ConfigError(f"Backbone {name!r} has no ResNet bottlenecks; set stride_in_1x1=False.")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
