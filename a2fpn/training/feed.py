"""Batch sources: the batches of every step, in an order that depends only on the seed and the step.

An optimizer *step* takes one global batch. It is divided into equal parts, one for each process, and each part
into ``grad_accumulation`` batches. The images of a step and their augmentation do not depend on the number of processes
or loader workers: two processes with two images each see the same as one process with four, and a run that resumes at
a step sees the same as without the interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from a2fpn.data import CocoDataset, Sample, aspect_ratio_groups, collate, epoch_order, repeat_factors
from a2fpn.errors import ConfigError
from a2fpn.training.seeding import seeded
from a2fpn.training.signals import leave_stopping_to_the_run

T = TypeVar("T")
Batch = tuple[list[Tensor], list[dict[str, Any]]]
Slot = tuple[int, int, int]  # epoch, position within it, sample index


class Feed(Protocol):
    """Protocol of batch sources."""

    def steps(self, epoch: int) -> int:
        """Number of steps of an epoch, the same on every process."""

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield this process's batches of an epoch, ``grad_accumulation`` for every step.

        Args:
            epoch: From 0.
            start: The step to start with.
        """


def data_loader(dataset: Dataset[T], *, workers: int, pin_memory: bool, **options: Any) -> DataLoader[T]:
    """Build a loader that does not consume torch's global random numbers.

    Args:
        dataset: The data set, whose random numbers depend only on the position in the run.
        workers: Persistent loader processes; 0 loads in this process.
        pin_memory: Whether to pin the memory of batches, for a GPU.
        **options: Batching options of :class:`torch.utils.data.DataLoader`.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=leave_stopping_to_the_run,
        generator=torch.Generator(),
        **options,
    )


class SeededSamples(Dataset[Sample]):
    """Samples whose augmentation depends on their position in the run, not on the worker.

    Args:
        dataset: Samples by index, augmented with torch's random numbers.
        seed: The run's seed.
    """

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, slot: Slot) -> Sample:
        epoch, position, index = slot
        with seeded("sample", self.seed, epoch, position):
            return self.dataset[index]


class SlotBatches:
    """Batch sampler of one process: its slots of the most recently set epoch."""

    def __init__(self) -> None:
        self._batches: Sequence[list[Slot]] = ()

    def set(self, batches: Sequence[list[Slot]]) -> None:
        """Set the batches of the next iteration."""
        self._batches = batches

    def __iter__(self) -> Iterator[list[Slot]]:
        return iter(self._batches)


class FolderFeed:
    """Feed of a map-style data set.

    Args:
        dataset: The samples, augmented with torch's random numbers.
        coco: The same data set without wrappers, from which groups and repeats are computed.
        batch_size: Images per batch and process.
        grad_accumulation: Batches per step and process.
        workers: Loader processes; 0 loads in this process.
        seed: The run's seed.
        rank: Index of this process.
        world_size: Number of processes.
        group_by_aspect: Whether a step has only portrait or only landscape images.
        passes: Passes over the data set per epoch.
        repeat_threshold: Images of classes that occur in less than this share of the images are repeated; 0 is off.
        pin_memory: Whether to pin the memory of batches, for a GPU.

    Raises:
        ValueError: For less than one pass.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        coco: CocoDataset,
        *,
        batch_size: int,
        grad_accumulation: int = 1,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group_by_aspect: bool = False,
        passes: int = 1,
        repeat_threshold: float = 0.0,
        pin_memory: bool = False,
    ) -> None:
        if passes < 1:
            raise ConfigError(f"data.passes must be at least 1, got {passes}.")
        self._passes = passes
        self._num_samples = len(coco)
        self._batch_size, self._seed = batch_size, seed
        self._per_process = batch_size * grad_accumulation
        self._rank, self._world_size = rank, world_size
        self._groups = aspect_ratio_groups(coco) if group_by_aspect else None
        self._repeats = repeat_factors(coco, threshold=repeat_threshold) if repeat_threshold else None
        self._slots = SlotBatches()
        samples = SeededSamples(dataset, seed)
        self._loader = data_loader(
            samples, workers=workers, pin_memory=pin_memory, batch_sampler=self._slots, collate_fn=collate
        )

    def steps(self, epoch: int) -> int:
        """See :meth:`Feed.steps`."""
        return len(self._order(epoch))

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """See :meth:`Feed.batches`."""
        size, mine = self._batch_size, []
        for step, indices in enumerate(self._order(epoch)):
            first = step * len(indices)
            slots = [(epoch, first + place, index) for place, index in enumerate(indices)]
            part = slots[self._rank * self._per_process : (self._rank + 1) * self._per_process]
            mine += [part[at : at + size] for at in range(0, self._per_process, size)] if step >= start else []
        self._slots.set(mine)
        yield from self._loader

    def _order(self, epoch: int) -> list[list[int]]:
        """Samples of every step of an epoch."""
        first = epoch * self._passes
        return [step for number in range(first, first + self._passes) for step in self._pass(number)]

    def _pass(self, epoch: int) -> list[list[int]]:
        """Samples of every step of a pass over the data set.

        Leftovers of the groups form mixed steps; less than one step of images is dropped.
        """
        size = self._per_process * self._world_size
        batches = epoch_order(
            seed=self._seed,
            epoch=epoch,
            num_samples=self._num_samples,
            batch_size=size,
            groups=self._groups,
            repeats=self._repeats,
            drop_last=False,
        )
        full = [batch for batch in batches if len(batch) == size]
        rest = [index for batch in batches if len(batch) < size for index in batch]
        with seeded("rest", self._seed, epoch):  # else images of the last group would always be dropped
            rest = [rest[place] for place in torch.randperm(len(rest)).tolist()]
        full += [rest[at : at + size] for at in range(0, len(rest) - size + 1, size)]
        return full or [(rest * size)[:size]]
