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

_HAS_WIDE_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()
"""Support of this torch for products of half precision matrices in float32 (from 2.8 on)."""

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
    query, key, scale = _scaled(query, key, kind, value.dtype)
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

    Keys are not normalized: dividing the columns of the logits by the norms touches less memory. So does adding minus
    infinity to masked columns in the same pass.
    """
    with autocast_off(query):
        factor: float | Tensor
        if kind == "scaled_cosine":
            wide = torch.promote_types(key.dtype, torch.float32)
            norm = torch.linalg.vector_norm(key, dim=-1, dtype=wide).clamp(min=_EPS)
            query, factor = _l2_normalize(query, key.dtype), math.sqrt(query.shape[-1]) / norm[:, None]
        else:
            query, key, factor = _scaled(query.to(key.dtype), key, kind, key.dtype)
        logits = _products(query, key)
        if valid is None:
            logits = logits * factor
        else:
            masked = logits.new_zeros(()).masked_fill(~valid[:, None], -torch.inf)
            if isinstance(factor, Tensor):
                logits = torch.addcmul(masked, logits, factor)
            else:
                logits = torch.add(masked, logits, alpha=factor)
        return logits.softmax(-1).to(value.dtype) @ value


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Dot products ``(B, n, m)`` of queries ``(B, n, d)`` and keys ``(B, m, d)``, accumulated and kept in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return query.to(wide) @ key.to(wide).transpose(1, 2)
    products: Tensor = _Products.apply(query, key)
    return products


class _Products(torch.autograd.Function):
    """Matrix product with the transposed keys, whose gradient keeps the layout of the keys.

    The gradient of ``matmul`` has the layout of the transposed keys, and adding it to that of a channels-last map
    strides through memory.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        transposed = key.transpose(1, 2)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _HAS_WIDE_PRODUCTS:
            return torch.bmm(query, transposed, out_dtype=torch.float32)
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.to(wide) @ transposed.to(wide)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grad.to(query.dtype)
        return grad @ key, grad.transpose(1, 2) @ query


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
    query, key, scale = _scaled(query, key, kind, torch.promote_types(query.dtype, torch.float32))
    return (scale * query @ key.transpose(-2, -1)).softmax(-1)


def _scaled(query: Tensor, key: Tensor, kind: AttentionKind, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Query, key and scale whose product is the logits; unit vectors have the given dtype."""
    if kind not in ATTENTION_KINDS:
        raise ConfigError(f"Unknown attention {kind!r}; expected one of {', '.join(ATTENTION_KINDS)}.")
    d_k = query.shape[-1]
    if kind == "scaled_cosine":
        return _l2_normalize(query, dtype), _l2_normalize(key, dtype), math.sqrt(d_k)
    return query, key, 1.0 if kind == "dot" else 1.0 / math.sqrt(d_k)


def _l2_normalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors along the last dim in a dtype, computed in at least float32."""
    with autocast_off(x):
        if torch.compiler.is_compiling():
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            traced: Tensor = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=_EPS)
            return traced.to(dtype)
        unit: Tensor = _L2Normalize.apply(x, dtype)
        return unit


class _L2Normalize(torch.autograd.Function):
    """:func:`torch.nn.functional.normalize` over the last dim; backward allocates one tensor instead of five.

    No tensor of the size of ``x`` is wider than ``x`` or the result.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_(min=_EPS)
        unit = torch.div(x, norm, out=torch.empty_like(x, dtype=dtype))
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        unit, norm = ctx.saved_tensors  # type: ignore[attr-defined]
        # Norms below the bound are clamped to a constant, which has no gradient.
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).masked_fill_(norm <= _EPS, 0.0)
        return torch.addcmul(grad, unit, along, value=-1).div_(norm), None
