"""Frozen norms in one pass, and detectors whose maps torch's compiler makes."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from a2fpn.inference.eval_view import eval_view
from a2fpn.layers import GACARAFE
from a2fpn.layers.checkpointing import set_checkpointing
from a2fpn.layers.frozen_norm import FrozenNorm2d, FrozenNormAct2d, fuse_frozen_norms
from a2fpn.necks import NECKS
from tests.helpers import random_target, tiny_model


def lively(norm: nn.Module) -> nn.Module:
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_norm_is_the_one_that_it_replaces(kind: type, eps: float, layout: torch.memory_format) -> None:
    theirs = lively(kind(6, eps=eps))
    ours = fuse_frozen_norms(nn.Sequential(copy.deepcopy(theirs)))[0]
    assert type(ours) is {FrozenBatchNorm2d: FrozenNorm2d, FrozenBatchNormAct2d: FrozenNormAct2d}[kind]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, direction = (torch.randn(2, 6, 5, 7).to(memory_format=layout) for _ in range(2))
    found = []
    for norm in (theirs, ours):
        own = x.clone().requires_grad_()
        y = norm(own)
        y.backward(direction)
        found.append((y, own.grad))
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].is_contiguous(memory_format=layout)
    assert found[1][1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_frozen_norm_keeps_the_dtype_of_the_map(dtype: torch.dtype) -> None:
    norm = lively(FrozenNorm2d(4)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(1, 4, 3, 3, dtype=dtype, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    wanted = (x.double() - norm.running_mean.double()[:, None, None]) * scale[:, None, None]
    torch.testing.assert_close(y.double(), wanted + norm.bias[:, None, None], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("neck", ["fpn", "a2fpn", pytest.param("bifpn", marks=pytest.mark.slow)])
def test_compiled_maps_give_the_same_losses_and_keep_the_state_dict(neck: str) -> None:
    targets = [random_target([[4.0, 4.0, 30.0, 40.0]], size) for size in ((64, 96), (64, 80))]
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 80)]
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_model(f"maskrcnn_{neck}", backbone="test_resnet", norm="frozen").train()
        keys = list(model.state_dict())
        if compiled:
            model.compile_maps(backend="eager")
        torch.manual_seed(1)
        losses = model(images, targets, resize=False)
        torch.stack(list(losses.values())).sum().backward()
        assert list(model.state_dict()) == keys
        found.append((losses, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("neck", sorted(set(NECKS) - {"bifpn", "simple_fpn"}))  # crops compile; needs a transformer
def test_no_level_is_a_strided_view(neck: str) -> None:
    """A compiled module that receives one of dynamic size can't be compiled anew for it."""
    model = tiny_model(f"maskrcnn_{neck}", backbone="test_resnet").eval()
    with torch.no_grad():
        pyramid = model.neck(model.backbone(torch.rand(1, 3, 64, 96)))
    assert [name for name, x in pyramid.items() if x._base is not None and not x.is_contiguous()] == []


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled_maps_take_images_of_any_size(training: bool) -> None:
    """The second size is compiled anew with dynamic shapes, which must hold for the others."""
    model = tiny_model("maskrcnn_fpn", backbone="test_resnet", min_size=64, max_size=256).train(training)
    model.compile_maps(backend="aot_eager")
    for size in ((64, 96), (64, 80), (96, 64), (130, 190)):
        image = torch.rand(3, *size)
        if training:
            target = random_target([[4.0, 4.0, 30.0, 40.0]], size)
            torch.stack(list(model([image], [target]).values())).sum().backward()
        else:
            with torch.no_grad():
                assert len(model([image], paste_masks=False)) == 1


@pytest.mark.parametrize(
    ("enabled", "compiled", "recomputes"),
    [(None, False, True), (False, False, False), (None, True, False), (True, True, True)],
)
def test_a_fusion_recomputes_if_told_to_and_by_default_unless_compiled(
    enabled: bool | None, compiled: bool, recomputes: bool
) -> None:
    fusion = GACARAFE(16).train()
    maps = [torch.randn(2, 16, *size, requires_grad=True) for size in ((8, 9), (16, 18))]
    run = torch.compile(fusion, backend="eager") if compiled else fusion
    found, stored = [], []
    for choice in (False, enabled):
        set_checkpointing(fusion, choice)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            merged = run(*maps)
        found.append(torch.autograd.grad(merged.square().mean(), maps))
        stored.append(sum(sizes))
    torch.testing.assert_close(found[1], found[0])
    assert (stored[1] < 0.9 * stored[0]) == recomputes


def test_a_copy_of_a_compiled_detector_computes_with_its_own_weights() -> None:
    model = tiny_model("fasterrcnn_fpn", backbone="test_resnet").train()
    model.compile_maps(backend="eager")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.neck.parameters():
            parameter.zero_()
    maps = {
        name: torch.randn(1, level.channels, 64 // level.stride, 64 // level.stride)
        for name, level in model.neck.in_spec.items()
    }
    assert all(x.abs().max() == 0 for x in other.neck(maps).values())
    assert all(x.abs().max() > 0 for x in model.neck(maps).values())
    assert not eval_view(model).neck.training
    assert model.neck.training
