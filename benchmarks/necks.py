"""Every registered neck on ResNet-50's channels at 800 x 1088: parameters, GMACs, time, training memory, against ``fpn``.

Targets: ``a2fpn`` at most 2.2 times the GMACs of ``fpn``, 2.5 times its forward time and its training memory;
``a2fpn_lite`` at most 1.8 times each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import a2fpn
from a2fpn.layers import ConvNormAct
from benchmarks import _measure as measure

BASE = "fpn"
CHANNELS = (256, 512, 1024, 2048)
TARGETS = {
    "a2fpn": {"GMACs": 2.2, "forward": 2.5, "training memory": 2.5},
    "a2fpn_lite": {"GMACs": 1.8, "forward": 1.8, "training memory": 1.8},
}

Size = tuple[int, int]


def make_neck(name: str, channels: Sequence[int]) -> a2fpn.Neck:
    """The neck with its default arguments, laid out as training and prediction lay it out."""
    torch.manual_seed(0)
    neck = a2fpn.create_neck(name, a2fpn.PyramidSpec.from_channels(channels))
    return neck.to(memory_format=torch.channels_last)


def make_features(neck: a2fpn.Neck, size: Size) -> dict[str, Tensor]:
    """Random maps of an image of the given size."""
    maps = {
        name: torch.randn(1, level.channels, -(-size[0] // level.stride), -(-size[1] // level.stride))
        for name, level in neck.in_spec.items()
    }
    return {name: x.to(memory_format=torch.channels_last) for name, x in maps.items()}


def prepare(name: str, channels: Sequence[int], size: Size, training: bool) -> measure.Call:
    """Makes neck and features; returns a forward pass, or with ``training`` also the backward pass."""
    neck = make_neck(name, channels)
    features = make_features(neck, size)
    if not training:
        return torch.inference_mode()(lambda: neck.eval()(features))
    with torch.inference_mode():
        gradients = [torch.randn_like(x) for x in neck(features).values()]

    def step() -> None:
        leaves = {key: x.detach().requires_grad_() for key, x in features.items()}
        outputs = [*neck(leaves).values(), *neck.losses().values()]
        torch.autograd.backward(outputs, [*gradients, *(None for _ in neck.losses())])
        neck.zero_grad()

    return step


def gmacs(name: str, channels: Sequence[int], size: Size) -> float:
    """Multiplications and additions of convolutions and matrix products in a forward pass, 1e9."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        neck = make_neck(name, channels).eval()
        neck(make_features(neck, size))
    return counter.get_total_flops() / 2e9


def parts_of(neck: a2fpn.Neck) -> dict[str, list[nn.Module]]:
    """A neck's modules by name, levels taken together, two steps deep; what remains is named after the parent."""
    parts: dict[str, list[nn.Module]] = {"rest": [neck]}
    for name, child in neck.named_children():
        parts[name] = _levels(child)
        for module in parts[name]:
            if not isinstance(module, ConvNormAct):
                for inner, grandchild in module.named_children():
                    parts.setdefault(f"{name}.{inner}", []).extend(_levels(grandchild))
    return parts


def _levels(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]
