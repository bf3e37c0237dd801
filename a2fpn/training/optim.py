"""Optimizer with per-group weight decay and learning rate, and the learning-rate schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from a2fpn.errors import ConfigError
from a2fpn.training.config import OptimSection


def scaled_lr(config: OptimSection, batch_size: int) -> float:
    """Peak learning rate for a number of images per step (Goyal et al., 2017: linear scaling).

    Example:
        >>> scaled_lr(OptimSection(lr=0.02, lr_batch_size=16), 4)
        0.005
    """
    ratio = batch_size / config.lr_batch_size
    return config.lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]


def parameter_groups(model: nn.Module, config: OptimSection, *, lr: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate (depth in the backbone) and weight decay (matrix or not).

    Biases, norm weights and every other parameter of fewer than two dimensions get no weight decay.

    Args:
        model: A detector.
        config: The settings.
        lr: Peak learning rate of this run.

    Returns:
        Torch parameter groups with ``params``, ``lr``, ``peak_lr`` and ``weight_decay``.

    Raises:
        ValueError: If nothing is trainable.
    """
    factors: dict[str, float] = {}
    if config.layer_decay != 1:
        layers: dict[str, int] = model.get_submodule("backbone").layer_ids()  # type: ignore[operator]
        depth = 1 + max(layers.values())
        factors = {f"backbone.{name}": config.layer_decay ** (depth - layer) for name, layer in layers.items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_lr = lr * (config.backbone_lr_factor if name.startswith("backbone.") else 1.0) * factors.get(name, 1.0)
            groups[own_lr, config.weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
    if not groups:
        raise ConfigError("No parameter of the model is trainable; raise the backbone's trainable_layers.")
    return [
        {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimSection, *, lr: float) -> Optimizer:
    """Build SGD with momentum or AdamW over :func:`parameter_groups`; on CUDA each step takes a few kernels."""
    groups = parameter_groups(model, config, lr=lr)
    fused = True if groups[0]["params"][0].device.type == "cuda" else None
    if config.name == "sgd":
        return SGD(groups, lr=lr, momentum=config.momentum, fused=fused)
    return AdamW(groups, lr=lr, fused=fused)


def lr_factor(step: int, *, total_steps: int, config: OptimSection, updates: int | None = None) -> float:
    """Learning rate of an optimizer step relative to the peak.

    Args:
        step: Position in the schedule of ``total_steps``, from 0.
        total_steps: Optimizer steps of the whole run.
        config: The schedule.
        updates: Steps taken, which determine the warm-up; differs from ``step`` in a run that was resumed with another
            batch size.

    Example:
        >>> config = OptimSection(schedule="cosine", warmup_steps=10, warmup_factor=0.1, final_factor=0.01)
        >>> [round(lr_factor(step, total_steps=110, config=config), 3) for step in (0, 5, 10, 60, 110)]
        [0.1, 0.55, 1.0, 0.505, 0.01]
    """
    updates = step if updates is None else updates
    if updates < config.warmup_steps:
        return config.warmup_factor + (1 - config.warmup_factor) * updates / config.warmup_steps
    if config.schedule == "step":
        return config.gamma ** bisect_right([milestone * total_steps for milestone in config.milestones], step)
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, max(0.0, progress))
    return config.final_factor + (1 - config.final_factor) * (1 + math.cos(math.pi * progress)) / 2


def set_rate(optimizer: Any, factor: float) -> float:
    """Set the learning rate of every group to a factor of its peak; return the highest."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return max(float(group["lr"]) for group in optimizer.param_groups)
