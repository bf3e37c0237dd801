"""A2-FPN: Hu et al., "A2-FPN: Attention Aggregation based Feature Pyramid Network", CVPR 2021.

Three members share global context (MGC): ``pafpn_mgc`` is the ablation of the supplement's Table 1, ``a2fpn_lite``
adds content-aware upsampling, ``a2fpn`` content-aware pooling as well. Where the supplement and the abstract leave a
detail open or other descriptions differ, an option offers both readings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from a2fpn.layers import (
    GACAP,
    GACARAFE,
    MGC,
    AttentionKind,
    ContextInit,
    Distribution,
    KernelGrid,
    KernelInit,
    Pooling,
    ReasoningKind,
)
from a2fpn.necks.neck import NearestFusion, PyramidNeck, StridedFusion, register_neck
from a2fpn.pyramid import PyramidSpec

_logger = logging.getLogger(__name__)


class ContextNeck(PyramidNeck):
    """Pyramid whose laterals receive multi-level global context.

    Args:
        in_spec: Output levels of the backbone.
        top_down_options: For subclasses: options of their top-down fusion, None for none.
        bottom_up_options: Likewise for the bottom-up fusion.
        out_channels: Channels of every level.
        extra_levels: Coarser levels added by subsampling.
        attention: Kind of attention in all steps of MGC.
        nodes: Semantic nodes per level; None for ``node_budget * (6 - i)`` on level ``i`` (stride ``2**i``), at most
            the level's channels.
        node_budget: Nodes of the level of stride 32; finer levels have 2, 3, 4 times as many. None for the class's.
        orthogonal_weight: Weight of the orthogonal regularization.
        reasoning: Reasoning among nodes: ``"attention"``, or ``"gcn"``, a graph convolution.
        distribute: Nodes that a pixel attends to: ``"all"``, or those of its ``"own"`` level, which costs less.
        context_init: Initialization of MGC's last layer: ``"zero"``, a zero-initialized ``"gate"`` behind it, or
            ``"small"``, which changes the laterals from the first step on.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation after each convolution (timm name), or None.
    """

    default_node_budget: ClassVar[int] = 64

    def __init__(
        self,
        in_spec: PyramidSpec,
        top_down_options: Mapping[str, str] | None = None,
        bottom_up_options: Mapping[str, str] | None = None,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        attention: AttentionKind = "scaled_cosine",
        nodes: Sequence[int] | None = None,
        node_budget: int | None = None,
        orthogonal_weight: float = 1e-4,
        reasoning: ReasoningKind = "attention",
        distribute: Distribution = "all",
        context_init: ContextInit = "zero",
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__(
            in_spec,
            top_down_options,
            bottom_up_options,
            out_channels=out_channels,
            extra_levels=extra_levels,
            norm_layer=norm_layer,
            act_layer=act_layer,
        )
        if nodes is None:
            nodes = _default_nodes(in_spec, node_budget or self.default_node_budget)
        self.context = MGC(
            in_spec.channels,
            out_channels,
            nodes=nodes,
            levels=self.out_spec.names[: len(in_spec)],
            attention=attention,
            reasoning=reasoning,
            distribute=distribute,
            context_init=context_init,
        )
        self.orthogonal_weight = orthogonal_weight

    def losses(self) -> dict[str, Tensor]:
        """The weighted orthogonal regularization of the entities."""
        if self.context is None:
            raise RuntimeError("A ContextNeck has an MGC by construction.")
        return {"loss_orthogonal": self.orthogonal_weight * self.context.orthogonal_loss()}


def _default_nodes(in_spec: PyramidSpec, budget: int) -> list[int]:
    wanted = [budget * max(1, 6 - (stride.bit_length() - 1)) for stride in in_spec.strides]
    nodes = [min(n, channels) for n, channels in zip(wanted, in_spec.channels, strict=True)]
    if nodes != wanted:
        _logger.info("Narrow backbone: %s semantic nodes per level, not %s (at most its channels).", nodes, wanted)
    return nodes


@register_neck("pafpn_mgc")
class PAFPNMGC(ContextNeck):
    """PAFPN with MGC; ``attention`` selects the row of the supplement's Table 1.

    Takes the arguments of :class:`ContextNeck`.
    """

    top_down_fusion = NearestFusion
    bottom_up_fusion = StridedFusion


class GatedNeck(ContextNeck):
    """Pyramid with global context, content-aware fusion and channel reweighting.

    Takes the arguments of :class:`ContextNeck`, and:

    Args:
        kernels: Resolution at which top-down kernels are predicted: ``"fine"``, or ``"coarse"`` and pixel-shuffled,
            see :class:`~a2fpn.layers.GACARAFE`.
        kernel_init: Kernels at the start, top-down and bottom-up: near the ``"center"``, or ``"uniform"``.
        pool: Pooling for the channel gates: ``"mean"``, or ``"attention"``, initialized to the mean.
    """

    def __init__(
        self,
        in_spec: PyramidSpec,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        attention: AttentionKind = "scaled_cosine",
        nodes: Sequence[int] | None = None,
        node_budget: int | None = None,
        orthogonal_weight: float = 1e-4,
        reasoning: ReasoningKind = "attention",
        distribute: Distribution = "all",
        context_init: ContextInit = "zero",
        kernels: KernelGrid = "fine",
        kernel_init: KernelInit = "center",
        pool: Pooling = "mean",
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__(
            in_spec,
            {"kernels": kernels, "kernel_init": kernel_init, "pool": pool},
            {"kernel_init": kernel_init, "pool": pool},
            out_channels=out_channels,
            extra_levels=extra_levels,
            attention=attention,
            nodes=nodes,
            node_budget=node_budget,
            orthogonal_weight=orthogonal_weight,
            reasoning=reasoning,
            distribute=distribute,
            context_init=context_init,
            norm_layer=norm_layer,
            act_layer=act_layer,
        )


@register_neck("a2fpn_lite")
class A2FPNLite(GatedNeck):
    """MGC with half the nodes and GACARAFE, without a bottom-up path: our lighter variant of the paper's neck.

    Takes the arguments of :class:`GatedNeck`.
    """

    top_down_fusion = GACARAFE
    default_node_budget = 32


@register_neck("a2fpn")
class A2FPN(GatedNeck):
    """The full A2-FPN: MGC, GACARAFE in the top-down path, GACAP in the bottom-up path.

    Takes the arguments of :class:`GatedNeck`.

    Example:
        >>> import torch
        >>> neck = A2FPN(PyramidSpec.from_channels([16, 32], strides=[4, 8]), out_channels=32, nodes=[8, 8])
        >>> pyramid = neck({"c2": torch.randn(1, 16, 25, 17), "c3": torch.randn(1, 32, 13, 9)})
        >>> {name: tuple(x.shape) for name, x in pyramid.items()}
        {'p2': (1, 32, 25, 17), 'p3': (1, 32, 13, 9), 'p4': (1, 32, 7, 5)}
        >>> list(neck.losses())
        ['loss_orthogonal']
    """

    top_down_fusion = GACARAFE
    bottom_up_fusion = GACAP
