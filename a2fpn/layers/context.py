"""Multi-level global context (MGC): collect, reason, distribute.

Source: the A2-FPN supplement, section B and Eq. 7, and the paper's abstract; node counts, the orthogonality
weight and the three steps follow public descriptions of the main text. Two exact rewritings save 12 of 52 GMACs at
800 x 1088: attention weights sum to one, so an affine map of the values commutes with attention, and both
``phi`` (collect) and ``out`` (distribute) are applied to the few nodes instead of to every pixel.

Shape shorthand: ``B`` batch, ``C_i`` channels of level ``i``, ``d`` pyramid channels, ``N_i`` nodes of level
``i``, ``N`` nodes of all levels, ``L_i = H_i * W_i`` pixels.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from a2fpn.device import runs_ahead
from a2fpn.errors import ConfigError
from a2fpn.layers.attention import ATTENTION_KINDS, AttentionKind, attend
from a2fpn.layers.checkpointing import maybe_checkpoint
from a2fpn.layers.choices import check_choice
from a2fpn.layers.levels import LevelModules, LevelParameters
from a2fpn.layers.precision import autocast_off
from a2fpn.layers.reasoning import REASONING_KINDS, ReasoningKind, create_reasoning

Distribution = Literal["all", "own"]
DISTRIBUTIONS: tuple[str, ...] = typing.get_args(Distribution)
ContextInit = Literal["zero", "gate", "small"]
CONTEXT_INITS: tuple[str, ...] = typing.get_args(ContextInit)

_SMALL = 0.1
"""Factor on the default initialization of the last layer for ``context_init="small"``."""

_BAND_BYTES = 2**24
"""Size of a band of queries in inference: half the size from which glibc's allocator maps new pages for each block."""


class MGC(nn.Module):
    """Collects semantic nodes from every level, reasons over them, and distributes them to the pixels by attention.

    By default the last layer ``out`` is zero-initialized: a new MGC returns zeros and leaves the laterals unchanged.

    Args:
        in_channels: ``C_i`` per level.
        out_channels: ``d``.
        nodes: ``N_i`` per level; at most ``C_i``, or the entities could not be orthonormal.
        levels: Names of the levels in the state dict; None counts from 0.
        attention: Kind of attention for collecting, distributing, and reasoning by attention.
        reasoning: ``"attention"`` for self-attention among nodes, ``"gcn"`` for a graph convolution; both with a
            residual, within each level and then among all nodes.
        distribute: Nodes that a pixel attends to after reasoning over the nodes of all levels: ``"all"`` ``N`` of them,
            or its ``"own"`` level's ``N_i``, which costs less.
        context_init: Initialization of the last layer: ``"zero"``; ``"gate"`` for the default followed by a
            zero-initialized gate per channel; ``"small"`` for a tenth of the default, which changes the laterals from
            the first step on.

    Raises:
        ValueError: For ``N_i > C_i``, lengths that differ, or an unknown choice of an option.

    Example:
        >>> mgc = MGC([16, 32], 8, nodes=[16, 8])
        >>> maps = mgc([torch.randn(2, 16, 9, 7), torch.randn(2, 32, 5, 4)])
        >>> [tuple(x.shape) for x in maps], max(x.abs().max().item() for x in maps)
        ([(2, 8, 9, 7), (2, 8, 5, 4)], 0.0)
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        nodes: Sequence[int],
        levels: Sequence[str] | None = None,
        attention: AttentionKind = "scaled_cosine",
        reasoning: ReasoningKind = "attention",
        distribute: Distribution = "all",
        context_init: ContextInit = "zero",
    ) -> None:
        super().__init__()
        check_choice("reasoning", reasoning, REASONING_KINDS)
        check_choice("distribute", distribute, DISTRIBUTIONS)
        check_choice("context_init", context_init, CONTEXT_INITS)
        if attention not in ATTENTION_KINDS:
            raise ConfigError(f"Unknown attention {attention!r}; expected one of {', '.join(ATTENTION_KINDS)}.")
        if len(nodes) != len(in_channels):
            raise ConfigError(f"{len(nodes)} node counts were given for {len(in_channels)} levels.")
        for n, c in zip(nodes, in_channels, strict=True):
            if not 1 <= n <= c:
                raise ConfigError(
                    f"{n} nodes on a level of {c} channels: expected 1 to {c}, since the entities are "
                    f"rows of length {c} and must be orthonormal. Lower nodes={list(nodes)}."
                )
        self.attention: AttentionKind = attention
        self.distribute: Distribution = distribute
        levels = [str(position) for position in range(len(nodes))] if levels is None else levels
        self.entities = LevelParameters(
            levels, (nn.init.orthogonal_(torch.empty(n, c)) for n, c in zip(nodes, in_channels, strict=True))
        )
        self.value = LevelModules(levels, (nn.Linear(c, out_channels) for c in in_channels))
        self.level_reasoning = LevelModules(
            levels, (create_reasoning(reasoning, n, out_channels, attention=attention) for n in nodes)
        )
        self.global_reasoning = create_reasoning(reasoning, sum(nodes), out_channels, attention=attention)
        self.query = LevelModules(levels, (nn.Conv2d(c, out_channels, 1) for c in in_channels))
        self.out = LevelModules(levels, (_last_map(out_channels, context_init) for _ in in_channels))
        self.gate: LevelParameters | None = None
        if context_init == "gate":
            self.gate = LevelParameters(levels, (torch.zeros(out_channels) for _ in in_channels))

    def forward(
        self,
        features: Sequence[Tensor],
        valid: Sequence[Tensor | None] | None = None,
        *,
        residual: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute the context of every pixel.

        Args:
            features: Maps ``(B, C_i, H_i, W_i)``.
            valid: Per level a bool map ``(B, 1, H_i, W_i)``, False on the batch's padding, or None.
            residual: Maps ``(B, d, H_i, W_i)`` that the context is added to, the laterals; modified in place if
                gradients are disabled.

        Returns:
            Maps ``(B, d, H_i, W_i)``: the context, or its sum with ``residual``.
        """
        base = [None] * len(features) if residual is None else residual
        return [
            self._distribute(i, x, nodes, y)
            for i, (x, nodes, y) in enumerate(zip(features, self.nodes(features, valid), base, strict=True))
        ]

    def nodes(self, features: Sequence[Tensor], valid: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Collect nodes and reason over them.

        Args:
            features: Maps ``(B, C_i, H_i, W_i)``.
            valid: See :meth:`forward`.

        Returns:
            Per level the nodes that its pixels attend to: ``(B, N, d)``, the same for every level, or ``(B, N_i, d)``.
        """
        masks = [None] * len(features) if valid is None else valid
        collected = [
            maybe_checkpoint(self, self._collect, i, x, mask)
            for i, (x, mask) in enumerate(zip(features, masks, strict=True))
        ]
        nodes: Tensor = self.global_reasoning(torch.cat(collected, 1))
        if self.distribute == "all":
            return [nodes] * len(features)
        return list(torch.split(nodes, [len(w) for w in self.entities], 1))

    def _collect(self, level: int, x: Tensor, valid: Tensor | None) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        entities = self.entities[level].expand(x.shape[0], -1, -1)
        collected = attend(
            entities, pixels, pixels, kind=self.attention, valid=None if valid is None else valid.flatten(1)
        )
        nodes: Tensor = self.level_reasoning[level](self.value[level](collected))
        return nodes

    def _distribute(self, level: int, x: Tensor, nodes: Tensor, residual: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # The sum is outside the checkpoint, since its backward pass needs no stored tensors.
            context = maybe_checkpoint(self, self._answer, level, x, nodes)
            return context if residual is None else residual + context
        values = self._values(level, nodes)
        batch, _, height, width = x.shape
        if residual is None:
            residual = _zeros_channels_last(values, height, width)
        # Band by band on a CPU, so that queries and outputs of the finest level stay in the cache.
        rows = (
            height
            if runs_ahead(x)
            else max(1, _BAND_BYTES // (batch * width * residual.shape[1] * residual.element_size()))
        )
        for start in range(0, height, rows):
            band = slice(start, start + rows)
            residual[:, :, band] += self._attend(level, x[:, :, band], nodes, values)
        return residual

    def _answer(self, level: int, x: Tensor, nodes: Tensor) -> Tensor:
        return self._attend(level, x, nodes, self._values(level, nodes))

    def _values(self, level: int, nodes: Tensor) -> Tensor:
        values: Tensor = self.out[level](nodes)
        return values if self.gate is None else values * self.gate[level]

    def _attend(self, level: int, x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
        query = self.query[level](x)
        context = attend(query.flatten(2).transpose(1, 2), nodes, values, kind=self.attention)
        return context.transpose(1, 2).reshape(query.shape)

    def orthogonal_loss(self) -> Tensor:
        """Sum of the entities' :func:`orthogonality` over the levels, an unweighted scalar.

        With ``scaled_cosine`` the rows must be orthonormal; the other two kinds do not constrain the norm (Eq. 7).
        """
        unit_norm = self.attention == "scaled_cosine"
        return torch.stack([orthogonality(w, unit_norm=unit_norm) for w in self.entities]).sum()


def _zeros_channels_last(like: Tensor, height: int, width: int) -> Tensor:
    """Create a channels-last map ``(B, C, height, width)`` of zeros for nodes ``(B, N, C)``."""
    return like.new_zeros(len(like), height, width, like.shape[2]).permute(0, 3, 1, 2)


def _last_map(channels: int, init: ContextInit) -> nn.Linear:
    linear = nn.Linear(channels, channels)
    if init == "gate":
        return linear
    nn.init.zeros_(linear.bias)
    if init == "zero":
        nn.init.zeros_(linear.weight)
    else:
        linear.weight.data.mul_(_SMALL)
    return linear


def orthogonality(weight: Tensor, *, unit_norm: bool) -> Tensor:
    r"""Return a matrix's squared deviation from orthogonal rows.

    :math:`\|W W^T - I\|_F^2` with ``unit_norm``, else :math:`\|W W^T \odot (1 - I)\|_F^2` (supplement, Eq. 7).

    Args:
        weight: ``(N, C)``.
        unit_norm: Whether rows must have norm one as well.

    Returns:
        A scalar, at least 0.

    Example:
        >>> orthogonality(2 * torch.eye(3), unit_norm=True), orthogonality(2 * torch.eye(3), unit_norm=False)
        (tensor(27.), tensor(0.))
    """
    with autocast_off(weight):
        gram = weight @ weight.T
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return (gram - identity if unit_norm else gram * (1 - identity)).square().sum()
