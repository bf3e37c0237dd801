"""Reasoning over the nodes of global context: by attention, or over a learned graph.

Shape shorthand: ``B`` batch, ``N`` nodes, ``d`` channels.
"""

from __future__ import annotations

import typing
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers.attention import AttentionKind, attend

ReasoningKind = Literal["attention", "gcn"]
REASONING_KINDS: tuple[str, ...] = typing.get_args(ReasoningKind)


class SelfAttention(nn.Module):
    """Reasoning over nodes: ``X + attend(X W_q, X W_k, X W_v)``.

    Args:
        channels: Channels of the nodes.
        attention: Kind of attention.
    """

    def __init__(self, channels: int, *, attention: AttentionKind) -> None:
        super().__init__()
        self.attention: AttentionKind = attention
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)

    def forward(self, nodes: Tensor) -> Tensor:
        """Maps nodes ``(B, N, d)`` to ``(B, N, d)``."""
        return nodes + attend(self.query(nodes), self.key(nodes), self.value(nodes), kind=self.attention)


class GraphConvolution(nn.Module):
    """Reasoning over nodes: ``X + relu((I - A) X) W``, where the adjacency ``A`` is learned.

    Source: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, Eq. 4, with its ReLU between the two
    products. A node stands for the same learned entity in every image, so one graph serves them all.

    Args:
        nodes: ``N``.
        channels: ``d``.

    Example:
        >>> import torch
        >>> GraphConvolution(6, 8)(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
    """

    def __init__(self, nodes: int, channels: int) -> None:
        super().__init__()
        self.adjacency = nn.Linear(nodes, nodes, bias=False)
        self.state = nn.Linear(channels, channels, bias=False)

    def forward(self, nodes: Tensor) -> Tensor:
        """Maps nodes ``(B, N, d)`` to ``(B, N, d)``."""
        neighbors = self.adjacency(nodes.transpose(1, 2)).transpose(1, 2)
        reasoned: Tensor = nodes + self.state(F.relu(nodes - neighbors))
        return reasoned


def create_reasoning(kind: ReasoningKind, nodes: int, channels: int, *, attention: AttentionKind) -> nn.Module:
    """Build a module that maps nodes ``(B, N, d)`` to ``(B, N, d)``.

    Args:
        kind: :class:`SelfAttention` or :class:`GraphConvolution`.
        nodes: ``N``.
        channels: ``d``.
        attention: Kind of attention, if reasoning by attention.
    """
    return SelfAttention(channels, attention=attention) if kind == "attention" else GraphConvolution(nodes, channels)
