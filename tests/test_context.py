import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers import ATTENTION_KINDS, MGC, attention_map, orthogonality
from a2fpn.layers.context import CONTEXT_INITS, DISTRIBUTIONS
from a2fpn.layers.reasoning import REASONING_KINDS, GraphConvolution, SelfAttention
from tests.helpers import attention_weights, largest_difference, randomize, weighted_sum, with_zero_gradient

kinds = pytest.mark.parametrize("kind", ATTENTION_KINDS)
OPTIONS: list[dict[str, str]] = [
    {"reasoning": reasoning, "distribute": distribute, "context_init": init}
    for reasoning, distribute, init in itertools.product(REASONING_KINDS, DISTRIBUTIONS, CONTEXT_INITS)
]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x.values()))
CHANNELS, NODES, SIZES = [12, 16, 20], [6, 4, 3], [(9, 13), (5, 7), (3, 4)]


def random_mgc(kind: str = "scaled_cosine", **options: Any) -> MGC:
    """In float64, with every parameter away from where it starts."""
    mgc = MGC(CHANNELS, 8, nodes=NODES, attention=kind, **options).double()
    randomize(mgc)
    return mgc


def random_maps(sizes: Sequence[tuple[int, int]] = SIZES, *, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, c, *size, dtype=torch.float64) for c, size in zip(CHANNELS, sizes, strict=True)]


def written_out(mgc: MGC, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The specification as it stands: phi on every pixel before collecting, out on every pixel after distributing."""

    def reason(nodes: Tensor, layer: SelfAttention | GraphConvolution) -> Tensor:
        if isinstance(layer, GraphConvolution):
            laplacian = torch.eye(nodes.shape[1], dtype=nodes.dtype) - layer.adjacency.weight
            return nodes + (laplacian @ nodes).relu() @ layer.state.weight.T
        query, key, value = (nodes @ w.weight.T for w in (layer.query, layer.key, layer.value))
        return nodes + attention_weights(query, key, mgc.attention) @ value

    nodes = []
    for i, x in enumerate(features):
        pixels = x.flatten(2).transpose(1, 2)
        values = pixels @ mgc.value[i].weight.T + mgc.value[i].bias
        entities = mgc.entities[i].expand(len(x), -1, -1)
        mask = None if valid is None else valid[i].flatten(1)
        collected = attention_weights(entities, pixels, mgc.attention, mask) @ values
        nodes.append(reason(collected, mgc.level_reasoning[i]))
    every = reason(torch.cat(nodes, 1), mgc.global_reasoning)
    context = []
    for i, x in enumerate(features):
        query = mgc.query[i](x).flatten(2).transpose(1, 2)
        asked = every if mgc.distribute == "all" else every[:, sum(NODES[:i]) : sum(NODES[: i + 1])]
        answer = attention_weights(query, asked, mgc.attention) @ asked
        answer = (answer @ mgc.out[i].weight.T + mgc.out[i].bias) * (1 if mgc.gate is None else mgc.gate[i])
        context.append(answer.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:]))
    return context


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in ATTENTION_KINDS), *(("scaled_cosine", x) for x in OPTIONS)]
)
def test_equals_the_specification_pixel_by_pixel(kind: str, options: dict[str, str]) -> None:
    mgc, features = random_mgc(kind, **options), [x.requires_grad_() for x in random_maps()]
    got, expected = mgc(features), written_out(mgc, features)
    assert [x.shape for x in got] == [(2, 8, *size) for size in SIZES]
    assert all(x.abs().max() > 0.01 for x in got)
    assert largest_difference(got, expected) < 1e-12
    inputs = [*features, *mgc.parameters()]
    directions = [torch.randn_like(x) for x in got]
    gradients = [torch.autograd.grad(maps, inputs, directions) for maps in (got, expected)]
    assert largest_difference(*gradients) < 1e-10


@options
@pytest.mark.parametrize("band", [1, 1000])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bands_of_any_size_give_the_same(
    band: int, memory_format: torch.memory_format, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a2fpn.layers.context._BAND_BYTES", band)
    mgc = random_mgc(**options)
    features = [x.contiguous(memory_format=memory_format) for x in random_maps()]
    expected = mgc(features)
    with torch.no_grad():
        assert largest_difference(mgc(features), expected) < 1e-12


def test_the_sum_is_written_in_place_only_where_no_gradient_is_recorded() -> None:
    mgc, features = random_mgc(), random_maps()
    laterals = [torch.randn(2, 8, *size, dtype=torch.float64) for size in SIZES]
    expected = [x + y for x, y in zip(laterals, mgc(features), strict=True)]
    before = [x.clone() for x in laterals]
    assert largest_difference(mgc(features, residual=laterals), expected) < 1e-12
    assert all(map(torch.equal, laterals, before))
    with torch.no_grad():
        got = mgc(features, residual=laterals)
    assert all(a is b for a, b in zip(got, laterals, strict=True))
    assert largest_difference(got, expected) < 1e-12


@kinds
def test_a_fresh_one_gives_exactly_nothing(kind: str) -> None:
    mgc = MGC(CHANNELS, 8, nodes=NODES, attention=kind).double()
    assert all((x == 0).all() for x in mgc(random_maps()))


@pytest.mark.parametrize(("init", "low", "high"), [("zero", 0, 0), ("gate", 0, 0), ("small", 1e-4, 0.2)])
def test_how_much_a_fresh_one_gives(init: str, low: float, high: float) -> None:
    mgc, features = MGC(CHANNELS, 8, nodes=NODES, context_init=init).double(), random_maps()
    full = MGC(CHANNELS, 8, nodes=NODES).double()
    full.load_state_dict(mgc.state_dict(), strict=False)
    for linear in full.out:
        linear.reset_parameters()
    rms = [x.square().mean().sqrt() for x in mgc(features)]
    usual = [x.square().mean().sqrt() for x in full(features)]
    assert all(low * y <= x <= high * y for x, y in zip(rms, usual, strict=True))


def test_a_gate_learns_before_the_map_behind_it() -> None:
    mgc = MGC(CHANNELS, 8, nodes=NODES, context_init="gate").double()
    weighted_sum(mgc(random_maps())).backward()
    assert all(gate.grad.any() for gate in mgc.gate)
    assert not any(layer.weight.grad.any() for layer in mgc.out)


def test_a_fresh_one_learns_from_the_first_step_on() -> None:
    mgc = MGC(CHANNELS, 8, nodes=NODES).double()
    weighted_sum(mgc(random_maps())).backward()
    assert all(layer.weight.grad.any() for layer in mgc.out)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mgc.parameters())


@options
@kinds
def test_gradient_to_every_parameter(kind: str, options: dict[str, str]) -> None:
    mgc = random_mgc(kind, **options)
    weighted_sum(mgc(random_maps())).backward()
    assert with_zero_gradient(mgc) == []


@options
@kinds
def test_padding_might_as_well_be_missing(kind: str, options: dict[str, str]) -> None:
    mgc, features = random_mgc(kind, **options), random_maps()
    # The first image fills the batch, the second is smaller and padded with garbage.
    inner = [(6, 7), (3, 4), (2, 2)]
    valid = [torch.ones(2, 1, *size, dtype=torch.bool) for size in SIZES]
    for mask, x, (height, width) in zip(valid, features, inner, strict=True):
        mask[1, :, height:] = mask[1, :, :, width:] = False
        x[1, :, ~mask[1, 0]] = 1e4
    got = mgc(features, valid)
    assert largest_difference([x[:1] for x in got], mgc([x[:1] for x in features])) < 1e-12
    cropped = [x[1:, :, :height, :width] for x, (height, width) in zip(features, inner, strict=True)]
    kept = [x[1:, :, :height, :width] for x, (height, width) in zip(got, inner, strict=True)]
    assert largest_difference(kept, mgc(cropped)) < 1e-11


def test_a_level_without_padding_may_have_no_mask() -> None:
    mgc, features = random_mgc(), random_maps()
    masks = [torch.ones(2, 1, *size, dtype=torch.bool) for size in SIZES]
    assert largest_difference(mgc(features, [None, masks[1], None]), mgc(features)) < 1e-12


def test_images_of_a_batch_do_not_see_each_other() -> None:
    mgc, features = random_mgc(), random_maps()
    alone = [mgc([x[i : i + 1] for x in features]) for i in range(2)]
    assert largest_difference(mgc(features), [torch.cat(maps) for maps in zip(*alone, strict=True)]) < 1e-12


@pytest.mark.parametrize("distribute", DISTRIBUTIONS)
def test_every_pixel_sees_every_level(distribute: str) -> None:
    """Also where it asks its own level's nodes, since all have been reasoned over together."""
    mgc, features = random_mgc(distribute=distribute), random_maps()
    before = mgc(features)
    features[2] = features[2] + 1
    after = mgc(features)
    assert all(((a - b).abs().amax((1, 2, 3)) > 1e-4).all() for a, b in zip(before, after, strict=True))


def test_inputs_stay_as_they_were() -> None:
    features = random_maps()
    copies = [x.clone() for x in features]
    random_mgc()(features)
    assert largest_difference(features, copies) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype: torch.dtype) -> None:
    mgc, features = random_mgc().float(), [x.float() for x in random_maps()]
    with torch.autocast("cpu", dtype):
        got = mgc(features)
    expected = mgc(features)
    size = max(x.abs().max().item() for x in expected)
    assert largest_difference([x.float() for x in got], expected) < 16 * torch.finfo(dtype).eps * size


def test_channels_last_is_the_same() -> None:
    mgc, features = random_mgc(), random_maps()
    last = mgc([x.contiguous(memory_format=torch.channels_last) for x in features])
    assert largest_difference(last, mgc(features)) < 1e-12


@kinds
def test_entities_start_orthonormal(kind: str) -> None:
    mgc = MGC(CHANNELS, 8, nodes=NODES, attention=kind)
    for weight in mgc.entities:
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    assert mgc.orthogonal_loss().item() == pytest.approx(0, abs=1e-8)


def test_orthogonality_with_and_without_the_norm() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64)
    squares = torch.tensor([[(a @ b).item() ** 2 for b in weight] for a in weight], dtype=torch.float64)
    across = squares.sum() - squares.diag().sum()
    norms = torch.tensor([(a @ a).item() for a in weight], dtype=torch.float64)
    torch.testing.assert_close(orthogonality(weight, unit_norm=False), across)
    torch.testing.assert_close(orthogonality(weight, unit_norm=True), across + (norms - 1).square().sum())


def test_orthogonality_is_a_float32_loss_under_autocast() -> None:
    weight = nn.init.orthogonal_(torch.empty(16, 32)) * 1.001
    with torch.autocast("cpu", torch.bfloat16):
        got = orthogonality(weight, unit_norm=True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, orthogonality(weight, unit_norm=True))


@kinds
def test_only_the_cosine_restricts_the_norm_of_the_entities(kind: str) -> None:
    mgc = MGC(CHANNELS, 8, nodes=NODES, attention=kind)
    with torch.no_grad():
        for weight in mgc.entities:
            weight.mul_(2)
    # Each of the 13 rows has a squared norm of 4 instead of 1.
    assert mgc.orthogonal_loss().item() == pytest.approx(13 * 9 if kind == "scaled_cosine" else 0, abs=1e-3)


@kinds
def test_orthogonal_loss_reaches_every_entity(kind: str) -> None:
    mgc = random_mgc(kind)
    mgc.orthogonal_loss().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in mgc.entities)


def test_gradient_steps_on_the_loss_make_entities_orthonormal() -> None:
    mgc = random_mgc()
    optimizer = torch.optim.SGD(mgc.entities, lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        mgc.orthogonal_loss().backward()
        optimizer.step()
    assert mgc.orthogonal_loss().item() < 1e-6


def test_more_nodes_than_channels_cannot_be_orthonormal() -> None:
    with pytest.raises(
        ValueError,
        match=r"13 nodes on a level of 12 channels: expected 1 to 12.* Lower nodes=\[13, 4, 3\]",
    ):
        MGC(CHANNELS, 8, nodes=[13, 4, 3])


def test_at_least_one_node_per_level() -> None:
    with pytest.raises(ValueError, match="0 nodes on a level of 16 channels"):
        MGC(CHANNELS, 8, nodes=[6, 0, 3])


def test_one_node_count_per_level() -> None:
    with pytest.raises(ValueError, match="2 node counts were given for 3 levels"):
        MGC(CHANNELS, 8, nodes=[6, 4])


def test_an_unknown_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match="Unknown attention 'cosine'; expected one of dot, scaled_dot, scaled_cosine"):
        MGC(CHANNELS, 8, nodes=NODES, attention="cosine")


@pytest.mark.parametrize(
    ("argument", "allowed"),
    [("reasoning", "attention, gcn"), ("distribute", "all, own"), ("context_init", "zero, gate, small")],
)
def test_an_unknown_option_is_an_error_with_those_that_are_known(argument: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown {argument}='none'; expected one of {allowed}"):
        MGC(CHANNELS, 8, nodes=NODES, **{argument: "none"})


@kinds
def test_the_map_of_attention_is_what_attends(kind: str) -> None:
    query, key = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    expected = attention_weights(query, key, kind)
    torch.testing.assert_close(attention_map(query, key, kind=kind), expected, rtol=0, atol=1e-12)


@kinds
def test_self_attention_is_a_residual(kind: str) -> None:
    layer = SelfAttention(8, attention=kind).double()
    nodes = torch.randn(2, 5, 8, dtype=torch.float64)
    weights = attention_weights(F.linear(nodes, layer.query.weight), F.linear(nodes, layer.key.weight), kind)
    expected = nodes + weights @ F.linear(nodes, layer.value.weight)
    torch.testing.assert_close(layer(nodes), expected, rtol=0, atol=1e-12)
