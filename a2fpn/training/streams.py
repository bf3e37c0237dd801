"""Feed from streamed data: shards, or a data set of the ``datasets`` library.

The training process reads in the order of the epoch; loader processes decode and augment. So the order does not depend
on the number or speed of workers, and random numbers depend on the sample's position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import Dataset

from a2fpn.data import ImageError, RawSample, Sample, SampleDecoder, StreamDataset, collate
from a2fpn.training.feed import Batch, data_loader
from a2fpn.training.seeding import seeded

T = TypeVar("T")


@dataclass(frozen=True)
class RawBatch:
    """Undecoded batch, input of a loader process.

    Args:
        epoch: The epoch.
        samples: The samples.
        spare: Another sample, used if none of them can be read.
    """

    epoch: int
    samples: Sequence[RawSample]
    spare: RawSample


class LoadedBatch(NamedTuple):
    """Decoded batch, output of a loader process.

    Args:
        images: Images, augmented.
        targets: Their targets.
        problems: A message for each dropped annotation.
        unreadable: The reason for each unreadable image, by name.
    """

    images: Sequence[Any]
    targets: Sequence[Any]
    problems: Sequence[str]
    unreadable: dict[str, str]


class RawBatches:
    """Sampler of one process, which reads its part of an epoch.

    It must not reference the loader: a loader in a reference cycle waits five seconds for each worker on deletion.

    Args:
        source: The data set.
        batch_size: Images per batch.
        per_step: Images of one step over all processes.
        seed: The run's seed.
        rank: Index of this process.
        world_size: Number of processes.

    Attributes:
        epoch: The epoch of the next iteration.
        start: The step that it starts with.
        steps: Steps of an epoch.
    """

    def __init__(
        self, source: StreamDataset, *, batch_size: int, per_step: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.epoch = self.start = 0
        self.steps = source.steps(per_step)
        self._batch_size = batch_size
        self._read = partial(source.read, batch=per_step, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield batches; spare samples come from the following step, for the last step from the previous one."""
        epoch, start = self.epoch, self.start
        if start >= self.steps:
            return
        first = min(start, max(self.steps - 2, 0))
        read = ahead(self._read(epoch=epoch, start=first), depth=2)
        before = part = next(read)
        for step in range(first, self.steps):
            after = next(read, before)
            if step >= start:
                for at in range(0, len(part), self._batch_size):
                    yield RawBatch(epoch, part[at : at + self._batch_size], after[at])
            before, part = part, after


class DecodedBatches(Dataset[LoadedBatch]):
    """Data set that decodes and augments in the loader processes.

    Args:
        decoder: Decoder of the source.
        transforms: Called as ``transforms(image, target)``.
        seed: The run's seed.
    """

    def __init__(self, decoder: SampleDecoder, transforms: Callable[..., Any] | None, seed: int) -> None:
        self._decoder = decoder
        self._transforms = transforms
        self._seed = seed

    def __getitem__(self, raw: RawBatch) -> LoadedBatch:
        samples: list[Sample] = []
        problems: list[str] = []
        unreadable: dict[str, str] = {}
        for place, wanted in enumerate(raw.samples):
            for candidate in (*raw.samples[place:], *raw.samples[:place], raw.spare):
                try:
                    with seeded("sample", self._seed, raw.epoch, wanted.position):
                        sample, found = self._decoder(candidate, self._transforms)
                except ImageError as error:
                    if self._decoder.strict:
                        raise
                    unreadable[candidate.name] = str(error)
                else:
                    samples.append(sample)
                    problems += found
                    break
            else:
                raise ImageError(f"{len(unreadable)} images in a row are unreadable: {'; '.join(unreadable.values())}")
        return LoadedBatch(*collate(samples), problems, unreadable)


class StreamFeed:
    """A :class:`~a2fpn.training.feed.Feed` of a streamed data set.

    An unreadable image is replaced by the next readable one of its batch, or one of a neighboring step; it is logged
    and added to the source's ``skipped``.

    Args:
        source: The data set.
        transforms: Random changes, called as ``transforms(image, target)``, with torch's random numbers.
        batch_size: Images per batch and process.
        grad_accumulation: Batches per step and process.
        workers: Loader processes; 0 loads in this process.
        seed: The run's seed.
        rank: Index of this process.
        world_size: Number of processes.
        pin_memory: Whether to pin the memory of batches, for a GPU.

    Raises:
        DataError: If the source has fewer images than one step.
    """

    def __init__(
        self,
        source: StreamDataset,
        *,
        transforms: Callable[..., Any] | None = None,
        batch_size: int,
        grad_accumulation: int = 1,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._raw = RawBatches(
            source,
            batch_size=batch_size,
            per_step=batch_size * grad_accumulation * world_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self._loader = data_loader(
            DecodedBatches(source.decoder, transforms, seed),
            workers=workers,
            pin_memory=pin_memory,
            batch_size=None,  # the sampler yields whole batches
            sampler=self._raw,
            collate_fn=_unchanged,
        )

    def steps(self, epoch: int) -> int:
        """See :meth:`a2fpn.training.feed.Feed.steps`."""
        return self._raw.steps

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """See :meth:`a2fpn.training.feed.Feed.batches`."""
        self._raw.epoch, self._raw.start = epoch, start
        for loaded in self._loader:
            self._source.note_annotations(loaded.problems)
            for name, reason in loaded.unreadable.items():
                self._source.note_images([name], reason)
            yield list(loaded.images), list(loaded.targets)


def ahead(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """Prefetch ``depth`` items in a thread; an error is raised in place of its item.

    Example:
        >>> list(ahead(iter("abc"), depth=2))
        ['a', 'b', 'c']
    """
    end = object()
    pool = ThreadPoolExecutor(1, "reader")
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # not the end
    finally:
        pool.shutdown(cancel_futures=True)


def _unchanged(batch: Any) -> Any:
    return batch
