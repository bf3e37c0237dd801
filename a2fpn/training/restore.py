"""Saving and restoring of weights and optimizer state, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import load_weights
from a2fpn.training.generations import Generation


def optimizer_tensors(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimizer as ``PARAMETER:NAME`` -> tensor, without learning rates and weight decays.

    Args:
        optimizer: Torch's, or Accelerate's wrapper.
        model: The model that it optimizes.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the state of :func:`optimizer_tensors` into an optimizer; its learning rates and decays are kept.

    Parameters are matched by name, since their groups depend on settings.

    Raises:
        CheckpointError: If a tensor matches no trained parameter, or has another shape.
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
    """Load the tensors of a generation.

    A new moving average starts from the trained weights.

    Args:
        source: The generation.
        model: The trained model.
        average: Its moving average, if there is one.
        optimizer: The optimizer.
    """
    trained = source.trained()
    load_weights(model, trained)
    if average is not None:
        load_weights(average, source.evaluated() if source.averages else trained)
    load_optimizer(optimizer, model, source.optimizer())
