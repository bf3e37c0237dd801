"""The three attentions of the A2-FPN paper behind one function.

Source: supplement of Hu et al., "A2-FPN", CVPR 2021, Eq. 1 and Eq. 6; Wang et al., "Non-local Neural
Networks", CVPR 2018, for the unscaled dot product.

Shape shorthand: ``B`` batch, ``n`` queries, ``m`` keys, ``d_k`` key channels, ``d_v`` value channels.
"""

from __future__ import annotations

import math
import typing
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2fpn.device import is_exported, is_on_accelerator
from a2fpn.errors import ConfigError
from a2fpn.layers.precision import autocast_off

AttentionKind = Literal["dot", "scaled_dot", "scaled_cosine"]
ATTENTION_KINDS: tuple[str, ...] = typing.get_args(AttentionKind)

# Lower bound of a norm in a denominator: far below any activation, and its inverse is still finite in float16.
_EPS = 1e-4

_KEYS_PER_QUERY = 4
"""Keys per query from which a GPU computes matrix products instead of a fused kernel."""

_MANY_QUERIES, _MOST_PARTS = 1024, 16
"""Number of queries from which a GPU splits them, and the maximum number of parts."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kind: AttentionKind = "scaled_cosine",
    valid: Tensor | None = None,
) -> Tensor:
    r"""Attention of queries over keys.

    * ``"dot"``: :math:`softmax(q k^T) v` (non-local networks)
    * ``"scaled_dot"``: :math:`softmax(q k^T / \sqrt{d_k}) v` (Eq. 1)
    * ``"scaled_cosine"``: :math:`softmax(\sqrt{d_k} \cdot norm(q) norm(k)^T) v` (Eq. 6), norm = L2

    All three run in a fused kernel, which does not store the ``n x m`` attention map where the backend can avoid it.
    On a GPU, few queries over many keys run as two matrix products instead: fused kernels parallelize over queries
    only and would leave most of the GPU idle. L2 norms are computed in float32 (float64 for float64 inputs) and have a
    finite gradient at a zero vector.

    Args:
        query: ``(B, n, d_k)``.
        key: ``(B, m, d_k)``.
        value: ``(B, m, d_v)``.
        kind: Kind of attention.
        valid: ``(B, m)`` bool, False for masked keys (padding); None if all are valid.

    Returns:
        ``(B, n, d_v)``.

    Raises:
        ValueError: For an unknown kind.

    Example:
        >>> q, k, v = torch.eye(2)[None], torch.eye(2)[None], torch.tensor([[[1.0], [0.0]]])
        >>> attend(q, k, v, kind="scaled_cosine").squeeze()  # softmax of sqrt(2) * identity
        tensor([0.8044, 0.1956])
    """
    if is_on_accelerator(query) and _KEYS_PER_QUERY * query.shape[1] <= key.shape[1]:
        return _attend_by_products(query, key, value, kind, valid)
    query, key, scale = _scaled(query, key, kind)
    if is_exported():
        # Export decomposes the fused kernel into these products, plus head dimensions and copies.
        logits = (query * scale) @ key.transpose(1, 2)
        if valid is not None:
            logits = torch.where(valid[:, None], logits, torch.finfo(logits.dtype).min)
        return logits.softmax(-1) @ value
    parts = 1
    if is_on_accelerator(query) and query.shape[1] >= _MANY_QUERIES:
        # The backward pass parallelizes over keys and heads only, so the queries are split into heads.
        parts = next(part for part in range(_MOST_PARTS, 0, -1) if query.shape[1] % part == 0)
    attended = F.scaled_dot_product_attention(
        query.to(value.dtype).unflatten(1, (parts, -1)),
        key.to(value.dtype)[:, None].expand(-1, parts, -1, -1),
        value[:, None].expand(-1, parts, -1, -1),
        attn_mask=None if valid is None else valid[:, None, None],
        scale=scale,
    )
    return attended.flatten(1, 2)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind, valid: Tensor | None) -> Tensor:
    """Attend by matrix products, with float32 logits.

    Keys are not normalized: dividing the columns of the logits by the norms touches less memory.
    """
    with autocast_off(query):
        wide = torch.promote_types(query.dtype, torch.float32)
        factor: float | Tensor
        if kind == "scaled_cosine":
            norm = torch.linalg.vector_norm(key, dim=-1, dtype=torch.promote_types(key.dtype, torch.float32))
            query, factor = _l2_normalize(query), math.sqrt(query.shape[-1]) / norm.clamp(min=_EPS)[:, None]
        else:
            query, key, factor = _scaled(query, key, kind)
        logits = (query.to(wide) @ key.to(wide).transpose(1, 2)) * factor
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None], -torch.inf)
        return logits.softmax(-1).to(value.dtype) @ value


def attention_map(query: Tensor, key: Tensor, *, kind: AttentionKind = "scaled_cosine") -> Tensor:
    """Attention weights of :func:`attend`, for visualization; the whole map is materialized.

    Args:
        query: ``(B, n, d_k)``.
        key: ``(B, m, d_k)``.
        kind: Kind of attention.

    Returns:
        ``(B, n, m)``, rows sum to one.

    Raises:
        ValueError: For an unknown kind.

    Example:
        >>> attention_map(torch.eye(2)[None], torch.eye(2)[None])[0, 0]
        tensor([0.8044, 0.1956])
    """
    query, key, scale = _scaled(query, key, kind)
    return (scale * query @ key.transpose(-2, -1)).softmax(-1)


def _scaled(query: Tensor, key: Tensor, kind: AttentionKind) -> tuple[Tensor, Tensor, float]:
    """Query, key and scale whose product is the logits."""
    if kind not in ATTENTION_KINDS:
        raise ConfigError(f"Unknown attention {kind!r}; expected one of {', '.join(ATTENTION_KINDS)}.")
    d_k = query.shape[-1]
    if kind == "scaled_cosine":
        return _l2_normalize(query), _l2_normalize(key), math.sqrt(d_k)
    return query, key, 1.0 if kind == "dot" else 1.0 / math.sqrt(d_k)


def _l2_normalize(x: Tensor) -> Tensor:
    with autocast_off(x):
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if torch.compiler.is_compiling():
            traced: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_EPS)
            return traced
        unit: Tensor = _L2Normalize.apply(x)
        return unit


class _L2Normalize(torch.autograd.Function):
    """:func:`torch.nn.functional.normalize` over the last dim; backward allocates one tensor instead of five."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=_EPS)
        unit: Tensor = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors  # type: ignore[attr-defined]
        # Norms below the bound are clamped to a constant, which has no gradient.
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).masked_fill_(norm <= _EPS, 0.0)
        result: Tensor = torch.addcmul(grad, unit, along, value=-1).div_(norm)
        return result
