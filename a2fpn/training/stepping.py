"""Optimizer step, which has no effect if its losses or gradient are not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor

from a2fpn.training.config import TrainConfig
from a2fpn.training.feed import Batch
from a2fpn.training.health import total_norm
from a2fpn.training.monitor import HostCopy
from a2fpn.training.processes import gather_number
from a2fpn.training.seeding import derived_seed


@dataclass(frozen=True)
class BatchLosses:
    """Losses of one batch of a step.

    Args:
        losses: Losses by name, including their sum.
        images: Number of images.
        waited: Seconds spent waiting for the batch.
    """

    losses: Mapping[str, Tensor]
    images: int
    waited: float


class Stepper:
    """Runs steps: forward, backward, check for non-finite values, and optimizer.

    Args:
        accelerator: The accelerator of the run.
        model: The model, prepared.
        optimizer: The optimizer, prepared.
        average: The moving average, if there is one.
        config: The settings.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, optimizer: Any, average: ModelEmaV3 | None, config: TrainConfig
    ) -> None:
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._average, self._config = average, config

    def step(self, parts: Sequence[tuple[Batch, float]], step: int) -> tuple[list[BatchLosses], str | None]:
        """Run a step; every process has to call it.

        Args:
            parts: Batches of this process, and the seconds spent waiting for each.
            step: Steps taken before.

        Returns:
            Losses of each batch; and None, or a description of non-finite values and their images, in which case
            weights, statistics and optimizer are unchanged.
        """
        accelerator, config = self._accelerator, self._config
        before = self._statistics() if config.run.nonfinite == "skip" else []
        done: list[BatchLosses] = []
        bad: list[tuple[str, list[int]]] = []
        for number, ((images, targets), waited) in enumerate(parts):
            # Random numbers of a step do not depend on earlier steps.
            place = (config.run.seed, step, number, accelerator.process_index)
            torch.manual_seed(derived_seed("step", *place))
            is_last = number == len(parts) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self._model):
                losses = self._model(images, targets, resize=False)
                losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
                total = HostCopy(losses["loss"])
                accelerator.backward(losses["loss"])
            # Checked while the backward pass runs, so that the device does not idle.
            if not math.isfinite(float(total.value())):
                values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
                bad.append((f"The loss is not finite in step {step + 1} ({values})", _ids(targets)))
            done.append(BatchLosses({name: x.detach() for name, x in losses.items()}, len(images), waited))
        norm = self._gradient_norm()
        if not bad and not math.isfinite(norm):
            ids = [image_id for (_, targets), _ in parts for image_id in _ids(targets)]
            bad.append((f"The gradient is not finite in step {step + 1} (norm {norm}, finite losses)", ids))
        problem = self._described(bad)
        if problem is None or accelerator.scaler is not None:  # fp16's loss scaling skips such gradients itself
            self._optimizer.step()
        for x, value in before if problem else ():
            x.copy_(value)
        self._optimizer.zero_grad()
        if self._average and problem is None:
            self._average.update(accelerator.unwrap_model(self._model), step=step + 1)
        return done, problem

    def _gradient_norm(self) -> float:
        """Norm of the gradient before clipping; 0 if fp16's loss scaling checks it."""
        clip, parameters = self._config.optim.clip_norm, self._model.parameters()
        if clip:
            norm = self._accelerator.clip_grad_norm_(parameters, clip)
        elif self._accelerator.scaler is None:
            norm = total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        if self._accelerator.scaler is not None:
            return 0.0
        return float(HostCopy(norm).value())

    def _described(self, bad: Sequence[tuple[str, list[int]]]) -> str | None:
        """Describe non-finite values of any process, on all processes."""
        if not any(gather_number(self._accelerator, float(bool(bad)))):
            return None
        found = gather_object(list(bad))
        ids = sorted({image_id for _, images in found for image_id in images})
        return f"{found[0][0]} on the images with ids {', '.join(map(str, ids))}."

    @torch.no_grad()
    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Copy the buffers, which a forward pass may change."""
        return [(x, x.clone()) for x in self._model.buffers()]


def _ids(targets: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(target["image_id"]) for target in targets]
