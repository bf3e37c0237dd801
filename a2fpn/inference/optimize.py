"""A detector made ready to run: the same results up to rounding, in less time, and nothing to save or to train.

What is done was measured on CPUs, in the order of what it gains: convolutions and what follows them on NHWC memory,
batch norms folded into convolutions, activations and shortcuts applied while a convolution's result is still in the
cache, masks predicted only for the class that was found.
"""

from __future__ import annotations

import contextlib
import copy
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from timm.layers import BatchNormAct2d, DropPath, FrozenBatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FrozenBatchNorm2d

from a2fpn.backbones.same_padding import SamePaddedConv
from a2fpn.config import ModelConfig
from a2fpn.detectors import Detector
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads import DetectionRoIHeads, Float32RPNHead, PostprocessConfig
from a2fpn.preprocess import Preprocess
from a2fpn.pyramid import Features

DTYPES = (torch.float32, torch.bfloat16)
_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)
_SAMPLE_SIDE = 64  # pixels
_TOLERANCE = 1e-3  # of the largest activation: far above rounding, far below the effect of a norm left out


class OptimizedDetector(nn.Module):
    """Result of :func:`optimize_for_inference`: a detector for inference alone.

    Args:
        detector: A detector of its own, already changed.
        dtype: The type in which convolutions and matrix products are computed.

    Attributes:
        detector: What runs.
        dtype: The type in which it does.
    """

    def __init__(self, detector: Detector, dtype: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.dtype = dtype
        super().train(False)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model that was optimized."""
        return self.detector.config

    @property
    def preprocess(self) -> Preprocess:
        """The resize, normalization and padding rule."""
        return self.detector.preprocess

    @property
    def has_masks(self) -> bool:
        """Return whether the model predicts masks."""
        return self.detector.has_masks

    @property
    def mask_paste(self) -> Any:
        """Method of pasting masks into the image."""
        return self.detector.mask_paste

    @property
    def rule(self) -> PostprocessConfig:
        """The model's own post-processing."""
        return self.detector.rule

    @torch.inference_mode()
    def forward(
        self,
        images: Sequence[Tensor],
        *,
        resize: bool = True,
        paste_masks: bool = True,
        rule: PostprocessConfig | None = None,
    ) -> list[Any]:
        """Detect objects; see :meth:`a2fpn.detectors.Detector.forward`."""
        kind = next(self.detector.parameters()).device.type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            return self.detector(  # type: ignore[no-any-return]
                images, resize=resize, paste_masks=paste_masks, rule=rule
            )

    def train(self, mode: bool = True) -> OptimizedDetector:
        """Stays in evaluation mode.

        Raises:
            ValueError: If training is asked for.
        """
        if mode:
            raise ConfigError("An optimized detector can't be trained; train the model that it was made from.")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError(
            "An optimized detector can't be saved: its tensors are not those that a checkpoint holds. Save the model "
            "that it was made from, and optimize what from_pretrained gives."
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Its tensors are those of no checkpoint.

        Raises:
            ValueError: Always.
        """
        raise ConfigError("An optimized detector takes no weights; load them into the model that it is made from.")


def optimize_for_inference(model: Detector, *, dtype: torch.dtype = torch.float32) -> OptimizedDetector:
    """Make a detector ready to run, in a copy; the model itself stays as it is and is the one to save and to train.

    Args:
        model: A detector of :func:`a2fpn.create_model` or :func:`a2fpn.from_pretrained`, on the device it is to run on.
        dtype: ``torch.float32`` gives the same results up to rounding. ``torch.bfloat16`` computes convolutions and
            matrix products in bfloat16, and proposals, boxes, scores and NMS in float32: twice as fast on processors
            that know it, and not the same results.

    Returns:
        The detector, for :class:`a2fpn.Predictor` or to be called with images.

    Raises:
        TypeError: If the model is none of this package's detectors, or is optimized already.
        ValueError: For another dtype.

    Example:
        >>> import a2fpn
        >>> model = a2fpn.create_model("maskrcnn_fpn", backbone="test_resnet", num_classes=2, min_size=64)
        >>> result = a2fpn.Predictor(optimize_for_inference(model))("image.jpg")  # doctest: +SKIP
    """
    if not isinstance(model, Detector):
        raise ConfigTypeError(
            "optimize_for_inference expects a detector of a2fpn.create_model(...) or a2fpn.from_pretrained(...), "
            f"got {type(model).__name__}."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    place = next(model.parameters()).device
    # On the CPU no convolution rounds as TF32 does, which would look like a wrong fold.
    detector = copy.deepcopy(model).eval().requires_grad_(False).cpu().to(memory_format=torch.channels_last)
    with torch.inference_mode(False), torch.no_grad():
        _fold(detector)
        _replace_heads(detector)
        detector.to(place).to(memory_format=torch.channels_last)
        if dtype != torch.float32:
            _convert_weights(detector, dtype)
    return OptimizedDetector(detector, dtype)


# Batch norms and activations into convolutions


class _Step(NamedTuple):
    """One call of a module during the recording.

    Args:
        module: The module.
        source: The tensor it was given.
        result: The tensor it gave; the same one if it works in place.
        used_before: How often the source had been used before.
        used_then: How often it had been used right after.
    """

    module: nn.Module
    source: int
    result: int
    used_before: int
    used_then: int


class _Recording(TorchFunctionMode):
    """Records which module made which tensor, and how often every tensor is used.

    Modules alone don't tell: what a convolution gives may also be added to something else, which no module sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()
        self.steps: list[_Step] = []
        self._before: list[int] = []
        self._alive: list[Tensor] = []  # an id may be given again once its tensor is gone

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
        """A hook before the call of a module."""
        self._before.append(self.uses[id(args[0])] if args else 0)

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook after the call of a module."""
        before = self._before.pop()
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            self._alive += [args[0], result]
            self.steps.append(_Step(module, id(args[0]), id(result), before, self.uses[id(args[0])]))

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """The module that alone reads what a module gives, and reads nothing else; None if there is no such."""
        readers = []
        for place, made in enumerate(self.steps):
            if made.module is module:
                reader = next((step for step in self.steps[place + 1 :] if step.source == made.result), None)
                if reader is None or reader.used_before:
                    return None
                # What is changed in place is read as it was by nobody after.
                if reader.result != reader.source and self.uses[reader.source] != reader.used_then:
                    return None
                readers.append(reader.module)
        if len(set(readers)) != 1 or [step.module for step in self.steps].count(readers[0]) != len(readers):
            return None
        return readers[0]


def _fold(detector: Detector) -> None:
    """Fold batch norms into the convolutions before them, and let these apply the activation that follows."""
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
        _fold_one(detector, typing.cast(nn.Conv2d, conv), recording, hooked)
    for stage in [module for module in detector.modules() if type(module) is nn.Sequential]:
        for place, block in enumerate(stage):
            if type(block) in (BasicBlock, Bottleneck) and _is_plain(block) and hooked.isdisjoint(block.modules()):
                stage[place] = _ResidualBlock(block, own_input=place > 0 and type(stage[place - 1]) is _ResidualBlock)
    after = _pyramid(detector, sample)
    for name, x in before.items():
        if float((x - after[name]).abs().max()) > _TOLERANCE * float(x.abs().max()):
            raise RuntimeError(
                f"Folding the batch norms of {detector.config.backbone.name} changed the level {name}. Run the model "
                "as it is, and please report it."
            )


def _fold_one(detector: Detector, conv: nn.Conv2d, recording: _Recording, hooked: set[nn.Module]) -> None:
    follower: Any = None if conv in hooked else recording.only_reader(conv)
    if isinstance(follower, _BATCH_NORMS) and follower not in hooked and follower.running_mean is not None:
        activation = getattr(follower, "act", None) or nn.Identity()
        _fold_norm(conv, follower)
        _replace(detector, follower, activation)
        # An activation inside the norm is no step of its own.
        follower = activation if hasattr(follower, "act") else recording.only_reader(follower)
    if _fusible(conv) and type(follower) in _ACTIVATIONS and follower not in hooked:
        _replace(detector, conv, _ActivatedConv(conv, follower))
        _replace(detector, follower, nn.Identity())


def _sample(detector: Detector) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = max(_SAMPLE_SIDE, detector.preprocess.divisor)
    return [torch.rand(len(detector.config.preprocess.mean), side, side, generator=generator)]


def _pyramid(detector: Detector, sample: list[Tensor]) -> Features:
    return detector.features(detector.preprocess(sample, resize=False))


def _fold_norm(conv: nn.Conv2d, norm: Any) -> None:
    """Change weight and bias so that the convolution alone gives what the norm would make of it."""
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


def _replace(detector: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that is registered."""
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


class _ActivatedConv(nn.Module):
    """A convolution that applies its activation while the result is in the cache.

    Args:
        conv: The convolution.
        activation: A ReLU or ReLU6.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.limit = 6.0 if isinstance(activation, nn.ReLU6) else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        x = x.to(self.weight.dtype)
        padding, stride, dilation, groups = self.geometry
        if x.numel() and _has_fused_convolution(x):
            kind, limits = ("relu", []) if self.limit is None else ("hardtanh", [0.0, self.limit])
            fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, padding, stride, dilation, groups, kind, limits, ""
            )
            return fused
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return y.clamp_(min=0, max=self.limit)


def _is_plain(block: nn.Module) -> bool:
    """Return whether a folded residual block is nothing but convolutions, a sum and a ReLU."""
    *_, last = (module for module in _body(block) if type(module) is not nn.Identity)
    return (
        block.se is None
        and (block.drop_path is None or isinstance(block.drop_path, DropPath))
        and type(_last_activation(block)) is nn.ReLU
        and _fusible(last)
    )


def _body(block: Any) -> list[nn.Module]:
    """Return the modules on the main path of a timm residual block, up to the sum."""
    names = ["conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"]
    if isinstance(block, Bottleneck):
        names = ["conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"]
    return [getattr(block, name) for name in names]


def _last_activation(block: Any) -> nn.Module:
    activation: nn.Module = block.act3 if isinstance(block, Bottleneck) else block.act2
    return activation


def _fusible(conv: nn.Module) -> bool:
    """Return whether oneDNN's fused convolution can replace a module."""
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _ResidualBlock(nn.Module):
    """A residual block of timm whose last convolution adds the shortcut while its result is in the cache.

    Args:
        block: The block, folded, and plain by :func:`_is_plain`.
        own_input: Whether nothing else reads what the block is given, which it may then write into.
    """

    def __init__(self, block: Any, *, own_input: bool) -> None:
        super().__init__()
        *body, self.last = (module for module in _body(block) if type(module) is not nn.Identity)
        self.body = nn.Sequential(*body)
        self.downsample: nn.Module | None = block.downsample
        self.own_shortcut = own_input or self.downsample is not None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        last = self.last
        y = self.body(x).to(last.weight.dtype)
        shortcut = (x if self.downsample is None else self.downsample(x)).to(y.dtype)
        if not self.own_shortcut:
            shortcut = shortcut.clone()
        if not (y.numel() and _has_fused_convolution(y)):
            return shortcut.add_(last(y)).relu_()
        geometry = (last.weight, last.bias, last.padding, last.stride, last.dilation, last.groups)
        added: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, y, *geometry, "add", 1.0, "relu", [], ""
        )
        return added


def _has_fused_convolution(x: Tensor) -> bool:
    """Return whether oneDNN's fused convolution, which torch's compiler uses too, supports a tensor."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (x.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


# Heads that do no more than results need


def _replace_heads(detector: Detector) -> None:
    for module in list(detector.modules()):
        if type(module) is Float32RPNHead:
            _replace(detector, module, _RPNHead(module))
        elif isinstance(module, RoIHeads):
            if type(module.box_head) is TwoMLPHead:
                module.box_head = _BoxHead(module.box_head, module.box_roi_pool.output_size[0])
            module.box_predictor = _BoxPredictor(module.box_predictor)
            if type(module) is DetectionRoIHeads and isinstance(module.mask_predictor, MaskRCNNPredictor):
                module.__class__ = _MaskRoIHeads


class _RPNHead(nn.Module):
    """The RPN's head with one convolution for objectness and deltas.

    Args:
        head: The head.
    """

    def __init__(self, head: Float32RPNHead) -> None:
        super().__init__()
        parts = (head.cls_logits, head.bbox_pred)
        self.conv = head.conv
        self.anchors = head.cls_logits.out_channels
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness ``(B, A, H, W)`` and deltas ``(B, 4 A, H, W)`` per level, float32."""
        outputs = []
        for level in x:
            y = self.conv(level)
            outputs.append(F.conv2d(y, self.weight.to(y.dtype), self.bias.to(y.dtype)).float())
        return [y[:, : self.anchors] for y in outputs], [y[:, self.anchors :] for y in outputs]


class _BoxHead(nn.Module):
    """The two-layer box head for features that lie in memory as NHWC, which are then not copied.

    Args:
        head: The head.
        size: Side of the pooled features.
    """

    def __init__(self, head: TwoMLPHead, size: int) -> None:
        super().__init__()
        weight = head.fc6.weight
        # From (channel, row, column) to (row, column, channel).
        order = torch.arange(weight.shape[1]).view(-1, size, size).permute(1, 2, 0).flatten()
        self.fc6, self.fc7 = head.fc6, head.fc7
        self.fc6.weight = nn.Parameter(weight[:, order.to(weight.device)], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to ``(R, box_channels)``."""
        y: Tensor = F.relu(self.fc7(F.relu(self.fc6(x.permute(0, 2, 3, 1).flatten(1)))))
        return y


class _BoxPredictor(nn.Module):
    """A box predictor that computes in float32 whatever the rest does: it decides, and costs little.

    Args:
        predictor: The predictor.
    """

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas, see :class:`a2fpn.heads.Float32BoxPredictor`."""
        with torch.autocast(x.device.type, enabled=False):
            logits, deltas = self.predictor(x.float())
        return logits, deltas


class _MaskRoIHeads(DetectionRoIHeads):
    """RoI heads that predict masks of the classes found instead of all classes."""

    def mask_probabilities(self, x: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`DetectionRoIHeads.mask_probabilities`."""
        return _masks(self.mask_predictor, x, labels)


def _masks(predictor: MaskRCNNPredictor, x: Tensor, labels: Tensor) -> Tensor:
    """Probabilities ``(R, 1, M, M)`` float32 of the class of each RoI."""
    y = predictor.relu(predictor.conv5_mask(x)).permute(0, 2, 3, 1)
    last = predictor.mask_fcn_logits
    weight = last.weight.flatten(1)[labels].to(y.dtype)
    logits = torch.bmm(y.flatten(1, 2), weight[:, :, None]).float() + last.bias[labels].float()[:, None, None]
    probabilities: Tensor = logits.sigmoid().view(len(y), 1, *y.shape[1:3])
    return probabilities


# Types


def _convert_weights(detector: Detector, dtype: torch.dtype) -> None:
    """Store the weights in the type that autocast would otherwise convert them to in every call."""
    decide = {part for module in detector.modules() if isinstance(module, _BoxPredictor) for part in module.modules()}
    for module in detector.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, _ActivatedConv)) and module not in decide:
            module.to(dtype)
