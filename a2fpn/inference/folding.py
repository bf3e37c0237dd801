"""Folding of batch norms and activations into the preceding convolutions."""

from __future__ import annotations

import contextlib
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from a2fpn.backbones.same_padding import SamePaddedConv
from a2fpn.detectors import Detector
from a2fpn.inference.fused import ActivatedConv, ResidualBlock, is_fusible, is_plain
from a2fpn.pyramid import Features

_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)
_SAMPLE_SIDE = 64  # pixels
_TOLERANCE = 1e-3  # relative to the largest activation: far above rounding, far below the effect of a missing norm


# Batch norms and activations into convolutions
class _Step(NamedTuple):
    """A recorded call of a module.

    Args:
        module: The module.
        source: Id of the input tensor.
        result: Id of the output tensor; the same if the module works in place.
        used_before: Number of uses of the source before the call.
        used_then: Number of uses of the source right after the call.
    """

    module: nn.Module
    source: int
    result: int
    used_before: int
    used_then: int


class _Recording(TorchFunctionMode):
    """Records the inputs and outputs of modules, and how often every tensor is used.

    Module calls are not enough: the output of a convolution may also be used by functions, such as a residual sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()
        self.steps: list[_Step] = []
        self._before: list[int] = []
        self._alive: list[Tensor] = []  # keeps tensors alive, since ids of freed ones are reused

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self._alive += tensors.values()
            self.uses.update(tensors.keys())
        return result

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        self._before.append(self.uses[id(args[0])] if args else 0)

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Forward hook."""
        before = self._before.pop()
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            self._alive += [args[0], result]
            self.steps.append(_Step(module, id(args[0]), id(result), before, self.uses[id(args[0])]))

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """Return the only module that uses a module's output, if that is its only input; else None."""
        readers = []
        for place, made in enumerate(self.steps):
            if made.module is module:
                reader = next((step for step in self.steps[place + 1 :] if step.source == made.result), None)
                if reader is None or reader.used_before:
                    return None
                # After an in-place operation nobody else reads the original values.
                if reader.result != reader.source and self.uses[reader.source] != reader.used_then:
                    return None
                readers.append(reader.module)
        if len(set(readers)) != 1 or [step.module for step in self.steps].count(readers[0]) != len(readers):
            return None
        return readers[0]


def fold_norms(detector: Detector, *, fuse: bool = True) -> None:
    """Fold batch norms into the convolutions before them.

    Args:
        detector: A detector in evaluation mode; modified in place.
        fuse: Whether to fuse activations and residual sums into convolutions as well.
    """
    hooked = {module for module in detector.modules() if module._forward_hooks or module._forward_pre_hooks}
    sample = _sample(detector)
    before = _pyramid(detector, sample)
    recording = _Recording()
    with contextlib.ExitStack() as stack:
        for module in detector.modules():
            if isinstance(module, (nn.Conv2d, *_BATCH_NORMS, *_ACTIVATIONS)):
                stack.callback(module.register_forward_pre_hook(recording.enter).remove)
                stack.callback(module.register_forward_hook(recording.leave).remove)
        with recording:
            detector(sample, resize=False, paste_masks=False)
    for conv in [module for module in detector.modules() if type(module) in (nn.Conv2d, SamePaddedConv)]:
        _fold_one(detector, typing.cast(nn.Conv2d, conv), recording, hooked, fuse)
    for stage in [module for module in detector.modules() if fuse and type(module) is nn.Sequential]:
        for place, block in enumerate(stage):
            if type(block) in (BasicBlock, Bottleneck) and is_plain(block) and hooked.isdisjoint(block.modules()):
                stage[place] = ResidualBlock(block, own_input=place > 0 and type(stage[place - 1]) is ResidualBlock)
    after = _pyramid(detector, sample)
    for name, x in before.items():
        if float((x - after[name]).abs().max()) > _TOLERANCE * float(x.abs().max()):
            raise RuntimeError(
                f"Folding the batch norms of {detector.config.backbone.name} changed the level {name}. Use the model "
                "without folding, and please report this."
            )


def _fold_one(detector: Detector, conv: nn.Conv2d, recording: _Recording, hooked: set[nn.Module], fuse: bool) -> None:
    follower: Any = None if conv in hooked else recording.only_reader(conv)
    if isinstance(follower, _BATCH_NORMS) and follower not in hooked and follower.running_mean is not None:
        activation = getattr(follower, "act", None) or nn.Identity()
        _fold_norm(conv, follower)
        replace_module(detector, follower, activation)
        # An activation inside the norm is not recorded separately.
        follower = activation if hasattr(follower, "act") else recording.only_reader(follower)
    if fuse and is_fusible(conv) and type(follower) in _ACTIVATIONS and follower not in hooked:
        replace_module(detector, conv, ActivatedConv(conv, follower))
        replace_module(detector, follower, nn.Identity())


def _sample(detector: Detector) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = max(_SAMPLE_SIDE, detector.preprocess.divisor)
    return [torch.rand(len(detector.config.preprocess.mean), side, side, generator=generator)]


def _pyramid(detector: Detector, sample: list[Tensor]) -> Features:
    return detector.features(detector.preprocess(sample, resize=False))


def _fold_norm(conv: nn.Conv2d, norm: Any) -> None:
    """Fold a norm into a convolution's weight and bias, in place."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def replace_module(detector: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another wherever it is registered."""
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
