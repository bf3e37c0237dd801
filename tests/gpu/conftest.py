"""The device of these tests: CUDA, or what ``A2FPN_GPU_TESTS_DEVICE`` names (``cpu`` shows that they run at all)."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    chosen = torch.device(os.environ.get("A2FPN_GPU_TESTS_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; A2FPN_GPU_TESTS_DEVICE=cpu runs the same on the CPU")
    return chosen


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the ways of a GPU on the CPU too, where these tests run for their own sake."""
    if os.environ.get("A2FPN_GPU_TESTS_DEVICE") == "cpu":
        monkeypatch.setattr("a2fpn.device.runs_ahead", lambda _: True)


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """No TF32, unless a test asks for it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
