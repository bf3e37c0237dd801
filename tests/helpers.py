"""What several test modules need: small models, random pyramids and targets, formulas written out."""

import contextlib
import dataclasses
import io
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import a2fpn
from a2fpn.cli.hub import main
from a2fpn.config import HEADS, RCNNConfig, heads_type
from a2fpn.detectors import Detector
from a2fpn.necks import Neck
from a2fpn.pyramid import Features, PyramidSpec, level_size


def torch_from(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skips a test with older versions of torch."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return pytest.mark.skipif(version < (major, minor), reason=f"torch {torch.__version__}: {reason}")


@contextlib.contextmanager
def at_once(usual: Callable[[], object]) -> Iterator[None]:
    """Fails where something waits for a network, which takes 10 seconds and more, however busy the machine is.

    Args:
        usual: The same without a wait; how long it takes says how busy the machine is.
    """
    start = time.perf_counter()
    usual()
    limit = 4 + 10 * (time.perf_counter() - start)
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < limit


TINY: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "neck_args": {"out_channels": 16},
    "num_classes": 3,
    "resize": "none",
    "anchor_sizes": [[8], [16], [32], [64], [128]],
    "rpn_pre_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 30,
    "rpn_batch_size": 32,
    "box_batch_size": 16,
    "box_channels": 16,
    "mask_channels": 8,
    "mask_layers": 1,
    "num_keypoints": 3,
    "keypoint_channels": 8,
    "keypoint_layers": 1,
    "head_layers": 1,
    "candidates_per_level": 20,
    "score_threshold": 0.0,
    "detections_per_image": 10,
}
"""Overrides that make any detector small enough to be built and run in a fraction of a second."""


def tiny_options(name: str) -> dict[str, Any]:
    """Those of :data:`TINY` that a detector has a field for."""
    own = {f.name for f in dataclasses.fields(heads_type(name.partition("_")[0]))}
    others = {f.name for kind in (RCNNConfig, *HEADS.values()) for f in dataclasses.fields(kind)} - own
    return {key: value for key, value in TINY.items() if key not in others}


def tiny_model(name: str = "maskrcnn_a2fpn", **overrides: Any) -> Detector:
    """A detector of some hundred thousand parameters, with random weights."""
    options = tiny_options(name) | overrides
    options["neck_args"] = TINY["neck_args"] | overrides.get("neck_args", {})
    levels = 4 + options["neck_args"].get("extra_levels", 1)
    if "anchor_sizes" in options and "anchor_sizes" not in overrides and levels < 5:
        options["anchor_sizes"] = TINY["anchor_sizes"][:levels]
    return a2fpn.create_model(name, **options)


def random_target(boxes: Sequence[Sequence[float]], size: tuple[int, int], *, classes: int = 3) -> dict[str, Tensor]:
    """A training target with masks that fill the boxes (xyxy pixels), and three keypoints: one is not labeled."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = 1
    keypoints = [[[x0 + 1, y0 + 1, 2], [(x0 + x1) / 2, (y0 + y1) / 2, 1], [0, 0, 0]] for x0, y0, x1, y1 in boxes]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "keypoints": torch.tensor(keypoints, dtype=torch.float32).reshape(-1, 3, 3),
        "labels": torch.arange(len(boxes)) % classes,
        "masks": masks,
    }


def random_features(spec: PyramidSpec, size: tuple[int, int], *, batch: int = 2, **options: Any) -> Features:
    """Normal maps of the sizes that a backbone gives for an image of the given height and width."""
    return {
        name: torch.randn(batch, level.channels, *level_size(size, level.stride), **options)
        for name, level in spec.items()
    }


def randomize(module: nn.Module, *, std: float = 0.1) -> None:
    """Moves every parameter away from where it starts, zeros above all."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a detector with an FPN on a ResNet under the names that torchvision gives them."""
    levels = list(dict.fromkeys(re.findall(r"neck\.lateral\.(p\d)\.", " ".join(state))))
    renames = {r"^top\.": "backbone.fpn.extra_blocks."}
    for position, level in enumerate(levels):
        renames[rf"^neck\.lateral\.{level}\.conv\."] = rf"backbone.fpn.inner_blocks.{position}.0."
        renames[rf"^neck\.output\.{level}\.conv\."] = rf"backbone.fpn.layer_blocks.{position}.0."
    named = {}
    for key, value in state.items():
        for pattern, replacement in renames.items():
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def in_our_layout(twin: nn.Module) -> nn.Module:
    """A detector of torchvision whose batches are channels-last as ours are: other layouts round differently."""

    def relayout(module: nn.Module, inputs: Any, output: Any) -> None:
        images, _ = output
        images.tensors = images.tensors.contiguous(memory_format=torch.channels_last)

    twin.get_submodule("transform").register_forward_hook(relayout)
    return twin


def without_gradient(module: nn.Module) -> list[str]:
    """Names of trainable parameters to which no backward pass came."""
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def with_zero_gradient(module: nn.Module) -> list[str]:
    """Names of trainable parameters whose gradient is zero, missing or not finite."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]


def weighted_sum(maps: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """A scalar that depends on every value in its own way."""
    tensors = maps.values() if isinstance(maps, Mapping) else maps
    return torch.stack([(x * torch.randn_like(x)).sum() for x in tensors]).sum()


def largest_difference(a: Mapping[str, Tensor] | Sequence[Tensor], b: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    """Largest absolute difference over all maps; infinite where shapes differ."""
    pairs = itertools.zip_longest(
        a.values() if isinstance(a, Mapping) else a, b.values() if isinstance(b, Mapping) else b
    )
    return max((x - y).abs().max().item() if x.shape == y.shape else math.inf for x, y in pairs)


def attention_weights(query: Tensor, key: Tensor, kind: str, valid: Tensor | None = None) -> Tensor:
    """The paper's formulas as they stand, ``(B, n, m)``; no eps, no fused kernel."""
    d_k = query.shape[-1]
    if kind == "scaled_cosine":
        query = query / query.square().sum(-1, keepdim=True).sqrt()
        key = key / key.square().sum(-1, keepdim=True).sqrt()
    logits = query @ key.transpose(1, 2) * {"dot": 1, "scaled_dot": d_k**-0.5, "scaled_cosine": d_k**0.5}[kind]
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], -math.inf)
    return logits.softmax(-1)


def pyramid_spec(levels: int = 4, *, finest: int = 2) -> PyramidSpec:
    """A narrow pyramid with channels that differ from level to level."""
    return PyramidSpec.from_channels(
        [8 + 4 * level for level in range(levels)], strides=[2 ** (finest + level) for level in range(levels)]
    )


def build_neck(name: str, spec: PyramidSpec | None = None, **options: Any) -> Neck:
    """A registered neck with few channels, on :func:`pyramid_spec` unless told otherwise."""
    return a2fpn.create_neck(name, spec or pyramid_spec(), **{"out_channels": 16, **options})


def run_hub(*arguments: object) -> str | None:
    """Error that ``python -m hub`` shows, or None."""
    with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return shown.getvalue().splitlines()[-1] if ended.value.code else None
