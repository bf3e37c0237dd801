"""Order of an epoch as pure functions, so that a run can be resumed anywhere without stored state.

Shape shorthand: ``N`` samples of a data set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from a2fpn.data.coco import CocoDataset
from a2fpn.errors import ConfigError

LANDSCAPE, PORTRAIT = 0, 1


def aspect_ratio_groups(dataset: CocoDataset) -> list[int]:
    """Aspect-ratio group of each sample: 0 for landscape and square images, 1 for portrait ones.

    Batches of one group need less padding.

    Args:
        dataset: N samples.

    Returns:
        N groups.
    """
    images = [dataset.coco.images[image_id] for image_id in dataset.image_ids]
    return [PORTRAIT if image.height > image.width else LANDSCAPE for image in images]


def repeat_factors(dataset: CocoDataset, *, threshold: float) -> Tensor:
    """Repeat factors of images, as in LVIS: Gupta et al., CVPR 2019.

    The factor of a class c on a share f(c) of the images is max(1, sqrt(t / f(c))), that of an image the highest of its
    classes' factors, or 1 without objects. Crowds don't count, since training ignores them.

    Args:
        dataset: N samples.
        threshold: Share t of the images below which a class is rare, above 0 and at most 1; LVIS uses 0.001.

    Returns:
        ``(N,)`` float64, at least 1.

    Raises:
        ValueError: For a threshold out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be above 0 and at most 1, got {threshold}.")
    classes = [
        {a.category_id for a in dataset.coco.annotations[image_id] if not a.iscrowd} for image_id in dataset.image_ids
    ]
    images_with = Counter(category for own in classes for category in own)
    factors = {category: max(1.0, (threshold * len(classes) / count) ** 0.5) for category, count in images_with.items()}
    return torch.tensor([max((factors[category] for category in own), default=1.0) for own in classes]).double()


def epoch_order(
    *,
    seed: int,
    epoch: int,
    num_samples: int,
    batch_size: int,
    groups: Sequence[int] | None = None,
    repeats: Tensor | None = None,
    drop_last: bool = True,
) -> list[list[int]]:
    """Batches of an epoch in a random order that depends only on the arguments.

    Args:
        seed: The run's seed.
        epoch: Index of the epoch.
        num_samples: N.
        batch_size: Images per batch, over all processes.
        groups: Group of each sample; a batch has images of one group. None for a single group.
        repeats: ``(N,)`` repeat factors. A fraction is the probability of one more repetition, drawn for each epoch.
            None for no repetition.
        drop_last: Whether to drop the incomplete batches, at most one for each group; otherwise they come last.

    Returns:
        Batches of sample indices.

    Raises:
        ValueError: If ``groups`` or ``repeats`` have another length than N, or the batch size is below 1.

    Example:
        >>> order = epoch_order(seed=0, epoch=3, num_samples=5, batch_size=2, groups=[0, 1, 0, 1, 1])
        >>> sorted(sorted(batch) for batch in order)[0]
        [0, 2]
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    for name, values in (("groups", groups), ("repeats", repeats)):
        if values is not None and len(values) != num_samples:
            raise ConfigError(f"{name} must have one entry for each of the {num_samples} samples, got {len(values)}.")
    # A digest, so that neighboring seeds and epochs give uncorrelated orders, the same on every machine.
    digest = hashlib.sha256(f"order of epoch {epoch} with seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    indices = torch.arange(num_samples)
    if repeats is not None:
        whole = repeats.double().floor()
        more = torch.rand(num_samples, generator=generator, dtype=torch.float64) < repeats.double() - whole
        indices = indices.repeat_interleave((whole + more).long())
    shuffled = indices[torch.randperm(len(indices), generator=generator)]

    batches: list[list[int]] = []
    open_batches: dict[int, list[int]] = {}
    for index in shuffled.tolist():
        group = 0 if groups is None else groups[index]
        batch = open_batches.setdefault(group, [])
        batch.append(index)
        if len(batch) == batch_size:
            batches.append(open_batches.pop(group))
    return batches if drop_last else batches + [open_batches[group] for group in sorted(open_batches)]
