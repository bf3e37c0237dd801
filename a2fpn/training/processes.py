"""Processes of a run: checks of their setup, and collective operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list

from a2fpn._registry import did_you_mean
from a2fpn.errors import ConfigError

T = TypeVar("T")


def check_processes(accelerator: Accelerator) -> None:
    """Refuse unsupported ways of starting several processes.

    Raises:
        ValueError: If weights would be sharded, or the processes would not form one group.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{kind.value} shards weights, which checkpoints and the moving average here don't support; detectors of "
            "this size train with plain data parallelism: choose MULTI_GPU in `accelerate config`, or use torchrun."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but each knows of {accelerator.num_processes} only and would write to "
            "the same folder. Without a GPU use ACCELERATE_USE_CPU=true torchrun --nproc-per-node N train/ ..., and no "
            "FSDP or DeepSpeed configuration."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate would silently ignore.

    Raises:
        ConfigError: If one is unknown or not installed.
    """
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"run.trackers: unknown tracker {name!r}. {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise ConfigError(f"run.trackers: {name} is not installed; install it, or remove it from run.trackers.")


def on_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """Run a call on the main process, and return its result or raise its error on every process."""
    if accelerator.num_processes == 1:
        return call()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            outcome = [(call(), None)]
        except Exception as error:
            outcome = [(None, error)]
    result, failure = broadcast_object_list(outcome)[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def gather_number(accelerator: Accelerator, value: float) -> list[float]:
    """Gather one number from every process."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[float] = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    return values
