"""The Triton kernels: on a CUDA device where there is one, and on the CPU in Triton's interpreter.

The interpreter is chosen before Triton is imported, so a process of its own runs this file again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2fpn.layers import reassemble
from tests.test_reassemble import naive

pytest.importorskip("triton", reason="needs Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_CUDA = torch.cuda.is_available()
on_device = [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
only_cuda = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not HAS_CUDA, reason="needs a CUDA device")]

# The largest relative error (rms). The interpreter has no products of bfloat16.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3} | ({} if INTERPRETED else {torch.bfloat16: 6e-3})

Size = tuple[int, int]


def marked(marks):
    def mark(test):
        for each in marks:
            test = each(test)
        return test

    return mark


def inputs(
    source: Size, target: Size, k: int, *, channels: int = 3, batch: int = 1, dtype=torch.float32, last: bool = True
) -> tuple[Tensor, Tensor]:
    """Any weights will do, not only such that sum to one."""
    x = torch.randn(batch, channels, *source).to(DEVICE, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.requires_grad_(), torch.randn(batch, k * k, *target, device=DEVICE).requires_grad_()


def relative(got: Tensor, expected: Tensor) -> float:
    got = got.detach().double().cpu()
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def check(x: Tensor, kernels: Tensor, target: Size, *, reference=naive) -> tuple[Tensor, ...]:
    """Compares values and both gradients with float64, the inputs as the op rounds them, and returns them."""
    from a2fpn.layers.reassemble_triton import reassemble_triton

    out = reassemble_triton(x, kernels)
    direction = torch.randn(out.shape).to(out)
    got = (out, *torch.autograd.grad(out, (x, kernels), direction))
    assert [y.dtype for y in got] == [x.dtype, x.dtype, kernels.dtype]
    assert [y.shape for y in got] == [(*x.shape[:2], *target), x.shape, kernels.shape]
    wide = [y.detach().to(x.dtype).double().cpu().requires_grad_() for y in (x, kernels)]
    expected = reference(*wide, target)
    gradients = torch.autograd.grad(expected, wide, direction.double().cpu())
    errors = [relative(a, b) for a, b in zip(got, (expected.detach(), *gradients), strict=True)]
    limits = [TOLERANCE[y.dtype] for y in got]
    assert all(error < limit for error, limit in zip(errors, limits, strict=True)), errors
    return got


CASES = {
    "double": ((5, 7), (10, 14), 5),
    "one less": ((5, 7), (9, 13), 3),
    "half": ((10, 14), (5, 7), 3),
    "half, rounded down": ((9, 13), (4, 6), 5),
    "equal": ((5, 7), (5, 7), 1),
    "several tiles": ((9, 5), (17, 9), 3),
    "one row, wide windows": ((1, 6), (2, 12), 7),
    "one pixel to many": ((1, 1), (3, 5), 5),
    "many to one pixel": ((3, 5), (1, 1), 3),
    "far apart": ((40, 3), (2, 3), 3),
}
if INTERPRETED:  # a second each: only those that differ most
    CASES = {
        name: CASES[name]
        for name in sorted(CASES.keys() - {"one less", "half", "one pixel to many", "many to one pixel"})
    }


@marked(on_device)
@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d != torch.float16 or not INTERPRETED])
@pytest.mark.parametrize(("source", "target", "k"), CASES.values(), ids=CASES)
def test_values_and_gradients(source: Size, target: Size, k: int, dtype: torch.dtype) -> None:
    check(*inputs(source, target, k, dtype=dtype), target)


@marked(on_device)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts_and_dtypes(dtype: torch.dtype, last: bool) -> None:
    x, kernels = inputs((3, 4), (5, 8), 3, channels=20, batch=2, dtype=dtype, last=last)
    out, of_x, of_kernels = check(x, kernels, (5, 8))
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert (of_x.stride(), of_kernels.stride()) == (x.stride(), kernels.stride())


@marked(on_device)
@pytest.mark.parametrize("channels", [1, 16, 130])
def test_channels_need_not_fill_a_block(channels: int) -> None:
    check(*inputs((3, 4), (4, 6), 3, channels=channels), (4, 6))


@marked(on_device)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_lower_than_the_map(dtype: torch.dtype) -> None:
    from a2fpn.layers.reassemble_triton import reassemble_triton

    x, kernels = inputs((3, 4), (6, 8), 3)
    low = kernels.detach().to(dtype).requires_grad_()
    out = reassemble_triton(x, low)
    assert relative(out, naive(x.detach().double().cpu(), low.detach().double().cpu(), (6, 8))) < TOLERANCE[x.dtype]
    assert torch.autograd.grad(out.sum(), low)[0].dtype == dtype


@marked(on_device)
def test_any_strides() -> None:
    x, kernels = inputs((6, 8), (5, 7), 3, last=False)
    halves = x.detach()[:, :, ::2, ::2].requires_grad_()
    last = kernels.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    check(halves, last, (5, 7))


@marked(on_device)
def test_only_the_wanted_gradient() -> None:
    from a2fpn.layers.reassemble_triton import reassemble_triton

    x, kernels = inputs((3, 4), (6, 8), 3)
    reassemble_triton(x, kernels.detach()).sum().backward()
    assert kernels.grad is None
    reassemble_triton(x.detach(), kernels).sum().backward()
    assert kernels.grad is not None
    # Of a sum over everything, the gradient of the map is the sum of its weights.
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(), 3 * kernels.detach().sum(), rtol=1e-4, atol=1e-4)


side = st.integers(1, 9)


@marked(on_device)
@settings(deadline=None, max_examples=2 if INTERPRETED else 5)
@given(h=side, w=side, height=side, width=side)
def test_any_sizes(h: int, w: int, height: int, width: int) -> None:
    check(*inputs((h, w), (height, width), 3, channels=16), (height, width))


@marked(only_cuda)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("source", "target"), [((25, 42), (50, 84)), ((50, 83), (25, 42)), ((25, 42), (49, 83))])
def test_maps_of_a_pyramid(source: Size, target: Size, dtype: torch.dtype) -> None:
    check(*inputs(source, target, 5, channels=256, batch=2, dtype=dtype), target, reference=reassemble)


@marked(only_cuda)
def test_the_op_runs_them_on_cuda_with_the_same_bits_each_time() -> None:
    x, kernels = inputs((25, 42), (50, 84), 5, channels=64, batch=2)
    runs = []
    for _ in range(3):
        out = reassemble(x, kernels, (50, 84))
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, kernels))))
    assert sys.modules[type(out.grad_fn)._forward_cls.__module__].__name__.endswith("reassemble_triton")
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@marked(only_cuda)
def test_what_they_do_not_take_goes_to_the_bags() -> None:
    x, kernels = inputs((5, 7), (10, 14), 3, dtype=torch.float64)
    assert relative(reassemble(x, kernels, (10, 14)), naive(x.cpu(), kernels.cpu().double(), (10, 14)).detach()) < 1e-12


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """The tests of all kernels, in a process whose Triton is the interpreter."""
    files = sorted(Path(__file__).parent.glob("test_*_triton.py"))
    assert len(files) == 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
