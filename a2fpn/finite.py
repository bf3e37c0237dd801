"""Search for the module that produced the first NaN or infinity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """A module with NaN or infinity in its output."""


@contextlib.contextmanager
def check_finite(model: nn.Module) -> Iterator[None]:
    """Context in which a forward pass raises at the first module whose output has a NaN or an infinity.

    Every output of every module is read, which synchronizes with a GPU: this is for debugging. A value from a plain
    function between modules is reported at the next module that receives it, or at the enclosing module.

    Args:
        model: Any module: a detector, a neck, a backbone.

    Raises:
        NonFiniteError: From the forward pass: the module's name and class, and whether it received or produced the
            value.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> model[0].bias.data.fill_(float("inf"))
        tensor([inf, inf])
        >>> with check_finite(model):
        ...     model(torch.zeros(1, 2))
        Traceback (most recent call last):
        ...
        a2fpn.finite.NonFiniteError: 0 (Linear) is the first module with a non-finite output: 2 of 2 values of ...
    """
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            label = f"{name or 'the model itself'} ({type(module).__name__})"
            hooks.callback(module.register_forward_pre_hook(_Check(label, "input"), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(_Check(label, "output")).remove)
        yield


class _Check:
    """Hook that reads a module's inputs or outputs."""

    def __init__(self, label: str, what: str) -> None:
        self.label, self.what = label, what

    def __call__(self, module: nn.Module, *values: object) -> None:
        # A forward hook receives inputs and output; the pre-hook has read the inputs.
        for tensor in _tensors(values if self.what == "input" else values[-1]):
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise NonFiniteError(
                    f"{self.label} is the first module with a non-finite {self.what}: {bad} of {tensor.numel()} "
                    f"values of a tensor {tuple(tensor.shape)}, {tensor.dtype}. {_ADVICE[self.what]}"
                )


_ADVICE = {
    "input": "No module before it made them: look at the images, and at the functions called between modules.",
    "output": "Its inputs were finite: look at its weights, and at the range of its dtype.",
}


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point() and values.device != torch.device("meta"):
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif hasattr(values, "tensors"):  # torchvision's ImageList
        yield from _tensors(values.tensors)
