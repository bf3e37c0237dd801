import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from a2fpn.layers import ATTENTION_KINDS, attend, attention
from tests.helpers import attention_weights

kinds = pytest.mark.parametrize("kind", ATTENTION_KINDS)


def random_inputs(n: int = 5, m: int = 7, d_k: int = 6, d_v: int = 3, **options: object) -> list[Tensor]:
    options = {"dtype": torch.float64, **options}
    return [torch.randn(2, rows, columns, **options) for rows, columns in ((n, d_k), (m, d_k), (m, d_v))]


def weights_of(query: Tensor, key: Tensor, kind: str) -> Tensor:
    """The attention weights themselves: what comes back when the values are unit vectors."""
    identity = torch.eye(key.shape[1], dtype=key.dtype).expand(len(key), -1, -1)
    return attend(query, key, identity, kind=kind)


@kinds
def test_equals_the_written_out_formula(kind: str) -> None:
    inputs = random_inputs(requires_grad=True)
    query, key, value = inputs
    expected = attention_weights(query, key, kind) @ value
    got = attend(query, key, value, kind=kind)
    assert got.shape == (2, 5, 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("queries", [1, 5, 6, 13])
def test_a_gpus_forms_are_the_same(kind: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products for few queries over many keys, with padding too; parts of many queries, also of a prime number."""
    inputs = [torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True) for n in (queries, 7, 7)]
    valid = torch.tensor([[True] * 7, [False, True] * 3 + [True]])
    direction = torch.randn(2, queries, 4, dtype=torch.float64)
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(attention, "is_on_accelerator", lambda _, ahead=ahead: ahead)
        monkeypatch.setattr(attention, "_MANY_QUERIES", 6)
        for mask in (None, valid) if queries == 1 else (None,):
            got = attend(*inputs, kind=kind, valid=mask)
            found.append((got.detach(), *torch.autograd.grad(got, inputs, direction)))
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], rtol=0, atol=1e-12)


@kinds
def test_is_traced_for_any_number_of_keys(kind: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key, value, kind=kind)

    keys = torch.export.Dim("keys", min=2)
    example = (torch.randn(1, 3, 4), torch.randn(1, 40, 4), torch.randn(1, 40, 2))
    traced = torch.export.export(Attend(), example, dynamic_shapes=({}, {1: keys}, {1: keys})).module()
    for count in (5, 12, 13, 90):
        inputs = (example[0], torch.randn(1, count, 4), torch.randn(1, count, 2))
        torch.testing.assert_close(traced(*inputs), attend(*inputs, kind=kind))


@kinds
def test_gradcheck(kind: str) -> None:
    inputs = random_inputs(requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, kind=kind), inputs)


@kinds
def test_keys_that_are_not_valid_might_as_well_be_missing(kind: str) -> None:
    query, key, value = random_inputs()
    valid = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [True]])
    key[~valid], value[~valid] = 1e6, -1e6
    got = attend(query, key, value, kind=kind, valid=valid)
    for i in range(2):
        kept = attend(query[i, None], key[i, None, valid[i]], value[i, None, valid[i]], kind=kind)
        torch.testing.assert_close(got[i, None], kept, rtol=0, atol=1e-12)


@kinds
def test_all_keys_valid_is_no_mask(kind: str) -> None:
    query, key, value = random_inputs()
    masked = attend(query, key, value, kind=kind, valid=torch.ones(2, 7, dtype=torch.bool))
    torch.testing.assert_close(masked, attend(query, key, value, kind=kind), rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_zero_vectors(kind: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(dtype=dtype)
    for x in inputs:
        x[0] = 0
        x.requires_grad_()
    attend(*inputs, kind=kind).square().sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 1e6


@pytest.mark.parametrize("norm", [0.0, 1e-5, 1e-3, 1.0])
def test_unit_vectors_and_their_gradients_are_those_of_torch(norm: float) -> None:
    x = (norm * F.normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1)).requires_grad_()
    weight = torch.randn(2, 5, 8, dtype=torch.float64)
    theirs, ours = F.normalize(x, dim=-1, eps=attention._EPS), attention._l2_normalize(x, x.dtype)
    torch.testing.assert_close(ours, theirs)
    expected, got = (torch.autograd.grad(y, x, weight)[0] for y in (theirs, ours))
    torch.testing.assert_close(got, expected)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(kind: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in random_inputs(n=16, m=64, d_k=32, d_v=8)]
    got = attend(*inputs, kind=kind)
    assert got.dtype == dtype
    expected = attend(*[x.float() for x in inputs], kind=kind)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_cosine_norms_neither_overflow_nor_vanish_in_half_precision(dtype: torch.dtype, size: float) -> None:
    # The square of 1e3 is beyond float16, that of 1e-3 below its normal range.
    query, key, value = (x.to(dtype) for x in random_inputs())
    expected = attend(query.float(), key.float(), value.float())
    got = attend((query * size), (key * size), value)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@kinds
def test_autocast_stays_close(kind: str) -> None:
    query, key, value = (x.float() for x in random_inputs(n=16, m=64, d_k=32, d_v=8))
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(query, key, value, kind=kind)
    # Logits of the plain dot product reach 15: rounded to 8 bits they are off by up to 0.06.
    torch.testing.assert_close(got.float(), attend(query, key, value, kind=kind), rtol=0, atol=0.1)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Unknown attention 'cosine'; expected one of dot, scaled_dot, scaled_cosine"):
        attend(*random_inputs(), kind="cosine")


# The supplement's appendix A, by measurement.


@pytest.mark.parametrize("d_k", [16, 64, 128])
@pytest.mark.parametrize(
    ("kind", "variance"), [("dot", lambda d_k: d_k), ("scaled_dot", lambda _: 1.0), ("scaled_cosine", lambda _: 1.0)]
)
def test_variance_of_the_logits(kind: str, variance: object, d_k: int) -> None:
    """Eq. 2 and the two scalings: d_k for the dot product, 1 where it is scaled."""
    query, key, _ = random_inputs(n=200, m=200, d_k=d_k)
    # log(softmax) is the logits up to a constant per query, which the variance over keys does not see.
    measured = weights_of(query, key, kind).log().var(-1).mean().item()
    assert measured == pytest.approx(variance(d_k), rel=0.05)


@pytest.mark.parametrize("d_k", [16, 64, 128])
def test_variance_of_the_cosine_itself(d_k: int) -> None:
    """Eq. 4 and 5: components and cosine similarity of normalized vectors have variance 1 / d_k."""
    query, key, _ = random_inputs(n=200, m=200, d_k=d_k)
    assert F.normalize(query, dim=-1).var().item() == pytest.approx(1 / d_k, rel=0.05)
    cosine = weights_of(query, key, "scaled_cosine").log() / math.sqrt(d_k)
    assert cosine.var(-1).mean().item() == pytest.approx(1 / d_k, rel=0.05)


def test_a_large_key_drags_the_dot_product_but_not_the_cosine() -> None:
    """Eq. 3: with a large norm a key takes the weight wherever its cosine is positive."""
    query, key, _ = random_inputs(n=200, m=50, d_k=64)
    larger = key.clone()
    larger[:, 7] *= 100
    towards = torch.einsum("bnd,bd->bn", F.normalize(query, dim=-1), F.normalize(key[:, 7], dim=-1)) > 0.05
    assert 0.2 < towards.double().mean() < 0.5

    before, after = (weights_of(query, k, "scaled_dot") for k in (key, larger))
    assert before[..., 7][towards].max() < 0.5
    assert after[..., 7][towards].min() > 0.99

    before, after = (weights_of(query, k, "scaled_cosine") for k in (key, larger))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_have_the_gradients_of_float32(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autocast gives them: entities in float32, pixels and values of a channels-last map in half precision."""
    monkeypatch.setattr(attention, "is_on_accelerator", lambda _: True)
    query = torch.nn.init.orthogonal_(torch.empty(1, 4, 32)).requires_grad_()
    key, value = (torch.randn(1, 32, 40).transpose(1, 2).to(dtype).requires_grad_() for _ in range(2))
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    valid = torch.arange(40)[None] < 30
    got, expected = attend(query, key, value, kind=kind, valid=valid), attend(*wide, kind=kind, valid=valid)
    assert got.dtype == dtype
    direction = torch.randn_like(expected)
    found = [got, *torch.autograd.grad(got, (query, key, value), direction.to(dtype))]
    exact = [expected, *torch.autograd.grad(expected, wide, direction)]
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype]
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.float() - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm()
    assert found[2][:, ~valid[0]].abs().max() == 0
