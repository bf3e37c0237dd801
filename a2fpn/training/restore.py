"""State of the optimizer and of the weights, by the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import load_weights
from a2fpn.training.generations import Generation


def optimizer_tensors(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimizer as ``PARAMETER:NAME`` -> tensor; without rates and decays, which are settings.

    Args:
        optimizer: Torch's, or Accelerate's wrapper.
        model: The model whose parameters it changes.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state of :func:`optimizer_tensors`; its own rates and decays stay in force.

    Parameters are found by name: which group holds them depends on settings.

    Raises:
        CheckpointError: If a tensor belongs to no trained parameter, or has another shape.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {parameter: place for place, parameter in enumerate(trained)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in number}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(":")
        parameter = parameters.get(owner)
        if parameter is None or (value.ndim and value.shape != parameter.shape):
            raise CheckpointError(f"The state of the optimizer does not fit the model: {name} {tuple(value.shape)}.")
        if value.ndim:  # in the memory format of the parameter
            value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(number[parameter], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_generation(source: Generation, *, model: nn.Module, average: nn.Module | None, optimizer: Any) -> None:
    """Put the tensors of a generation where they belong.

    A moving average that is new begins with the trained weights.

    Args:
        source: The generation.
        model: What is trained.
        average: The moving average of it, if there is one.
        optimizer: The optimizer.
    """
    trained = source.trained()
    load_weights(model, trained)
    if average is not None:
        load_weights(average, source.evaluated() if source.averages else trained)
    load_optimizer(optimizer, model, source.optimizer())
