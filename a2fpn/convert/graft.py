"""Warm start: a detector with a new neck, initialized to compute the same as, or close to, an FPN detector.

The function is exactly the same for ``pafpn`` and ``pafpn_mgc``, and nearly so for necks with content-aware upsampling.

Laterals and output convolutions are copied. The additions of the new neck are initialized to have no effect:

* global context (MGC) is zero and gates are one, as in any new neck;
* the bottom-up path's last convolution before the addition is zero, and its output convolution a Dirac delta.
  A zero factor after a random convolution would be as exact, but leave that convolution without a gradient;
* content-aware upsampling starts with the logit ``center_bias`` at the nearest source pixel. Only this part is
  not exact: a softmax never assigns all its weight to one pixel. Kernels of the bottom-up path keep their default
  initialization, which learns faster; they do not affect the output yet. CARAFE is zero-padded and has no such
  scale, as in its paper: it is slightly further from the FPN at borders, and learns more slowly.

The default ``center_bias`` of 8 puts 99.2 % of the weight on the nearest pixel. ``python -m benchmarks.graft``
measures the effect on a trained detector, and that the predictor still learns from this start, thanks to the fixed
scale of :class:`~a2fpn.layers.fusion.KernelPredictor`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from a2fpn._registry import did_you_mean
from a2fpn.config import ModelConfig, NeckConfig
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import ConfigError
from a2fpn.layers import GACAP, ConvNormAct
from a2fpn.layers.fusion import KernelPredictor
from a2fpn.necks import PyramidNeck, create_neck
from a2fpn.necks.neck import StridedFusion
from a2fpn.pretrained.checkpoint import load_weights
from a2fpn.pyramid import PyramidSpec

TARGETS = ("a2fpn", "a2fpn_lite", "carafe_fpn", "pafpn", "pafpn_mgc")
"""Necks that can be initialized to an FPN."""


def graft(
    state: Mapping[str, Tensor],
    *,
    target: str = "a2fpn",
    center_bias: float = 8.0,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Convert the state dict of an FPN detector to that of the same detector with another neck.

    Args:
        state: State dict of a detector with neck ``fpn``; not modified.
        target: One of :data:`TARGETS`.
        center_bias: Initial logit of the nearest source pixel relative to its neighbors in content-aware upsampling; a
            higher value is closer to the FPN and learns more slowly.
        seed: Seed of the new parts' random weights, which do not affect the output yet.
        **options: The target neck's own arguments (``attention``, ``nodes``, ...), and ``norm_layer`` and
            ``act_layer`` if the FPN has them; ``out_channels`` is read from the state.

    Returns:
        State dict of the new detector. Common tensors are shared with ``state``, not copied; new ones have their dtype
        and device.

    Raises:
        ValueError: For an unknown target, a state that is not of an FPN detector, or a norm or activation after the
            bottom-up path, which no preceding convolution can undo.

    Example:
        >>> from a2fpn import create_model
        >>> model = create_model("fasterrcnn_fpn", backbone="test_resnet", neck_args={"out_channels": 16})
        >>> grafted = graft(model.state_dict(), target="pafpn")
        >>> sorted({key.split(".")[1] for key in grafted if key.startswith("neck.")})
        ['bottom_up', 'bottom_up_output', 'lateral', 'output']
        >>> int(grafted["neck.bottom_up.p3.down.conv.weight"].count_nonzero())
        0
    """
    if target not in TARGETS:
        raise ConfigError(f"An FPN cannot be grafted onto neck {target!r}. {did_you_mean(target, TARGETS)}")
    fpn = {key.removeprefix("neck."): x for key, x in state.items() if key.startswith("neck.")}
    found = [match for key in fpn if (match := re.fullmatch(r"lateral\.p(\d+)\w*\.conv\.weight", key))]
    laterals, strides = [fpn[match[0]] for match in found], [2 ** int(match[1]) for match in found]
    if not laterals:
        raise _not_an_fpn(f"it has no 'neck.lateral.p<i>.conv.weight'; its first tensors are {list(state)[:3]}")
    spec = PyramidSpec.from_channels([x.shape[1] for x in laterals], strides=strides)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        neck = create_neck(target, spec, **{**options, "out_channels": laterals[0].shape[0]})
    assert isinstance(neck, PyramidNeck)  # like all of TARGETS
    new = _begin_as_fpn(neck, center_bias).to(laterals[0]).state_dict()
    expected = {key: x.shape for key, x in new.items() if key.startswith(("lateral.", "output."))}
    difference = expected.items() ^ {key: x.shape for key, x in fpn.items()}.items()
    if difference:
        names = sorted({f"neck.{key}" for key, _ in difference})
        raise _not_an_fpn(f"it differs in {len(names)} tensors: {', '.join(names[:5])}")
    return {**state, **{f"neck.{key}": x for key, x in (new | fpn).items()}}


def graft_model(
    model: Detector, *, target: str = "a2fpn", center_bias: float = 8.0, seed: int = 0, **options: Any
) -> Detector:
    """Build the detector with the weights of :func:`graft`.

    Args:
        model: A detector with neck ``fpn``; not modified, and nothing is shared with it.
        target: One of :data:`TARGETS`.
        center_bias: See :func:`graft`.
        seed: See :func:`graft`.
        **options: The target neck's own arguments, in addition to those of the FPN.

    Returns:
        The detector, on the same device, in the same mode and with the same frozen parts.

    Raises:
        ValueError: See :func:`graft`.

    Example:
        >>> from a2fpn import create_model
        >>> model = create_model("fasterrcnn_fpn", backbone="test_resnet", neck_args={"out_channels": 16})
        >>> graft_model(model, target="a2fpn_lite", attention="dot").config.neck
        NeckConfig(name='a2fpn_lite', args={'out_channels': 16, 'attention': 'dot'})
    """
    spec = model.neck.in_spec
    config = graft_config(model.config, target=target, **options)
    args = config.neck.args
    state = graft(model.state_dict(), target=target, center_bias=center_bias, seed=seed, **args)
    grafted = DETECTORS[config.detector](config, copy.deepcopy(model.backbone), create_neck(target, spec, **args))
    load_weights(grafted, state)
    return grafted.to(next(model.parameters())).train(model.training)


def graft_config(config: ModelConfig, *, target: str = "a2fpn", **options: Any) -> ModelConfig:
    """Configuration of the detector with the weights of :func:`graft`.

    Args:
        config: Configuration of a detector with neck ``fpn``.
        target: One of :data:`TARGETS`.
        **options: The target neck's own arguments, in addition to those of the FPN.

    Example:
        >>> from a2fpn.config import BackboneConfig
        >>> config = ModelConfig("fasterrcnn_fpn_r18", "fasterrcnn", BackboneConfig("resnet18"), NeckConfig("fpn"))
        >>> graft_config(config, target="pafpn").architecture
        'fasterrcnn_pafpn_r18'
    """
    stem = f"{config.detector}_{{}}".format
    return dataclasses.replace(
        config,
        architecture=config.architecture.replace(stem(config.neck.name), stem(target), 1),
        neck=NeckConfig(target, {**config.neck.args, **options}),
    )


def _not_an_fpn(found: str) -> ValueError:
    return ValueError(
        "Expected the state dict of a detector of this package with neck 'fpn': neck.lateral.p<i>.conv.* and "
        "neck.output.p<i>.conv.* for each level and no other neck.* (with norm.* where the FPN has norm_layer=, which "
        f"must then be given); {found}."
    )


def _begin_as_fpn(neck: PyramidNeck, center_bias: float) -> PyramidNeck:
    """Initialize the parts that an FPN lacks to have no effect, and return the neck."""
    for module in neck.top_down.modules():
        if isinstance(module, KernelPredictor):
            module.reset_center(center_bias)
    if neck.bottom_up is None or neck.bottom_up_output is None:
        return neck
    for merge, output in zip(neck.bottom_up, neck.bottom_up_output, strict=True):
        assert isinstance(merge, GACAP | StridedFusion)
        assert isinstance(output, ConvNormAct)
        if not isinstance(output.norm, nn.Identity) or not isinstance(output.act, nn.Identity):
            raise ConfigError(
                "A neck with a bottom-up path cannot be initialized from an FPN with norm_layer or act_layer: after "
                "the bottom-up convolutions they would change the features. Use 'a2fpn_lite' or 'carafe_fpn'."
            )
        last = merge.project if isinstance(merge, GACAP) else merge.down.conv
        for parameter in (*last.parameters(), *output.conv.parameters()):
            nn.init.zeros_(parameter)
        nn.init.dirac_(output.conv.weight)
    return neck
