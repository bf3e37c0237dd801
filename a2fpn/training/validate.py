"""Evaluation on the validation images, distributed over all processes, with the results of a single process."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import a2fpn
from a2fpn.data import CocoDataset, Sample, collate
from a2fpn.evaluation import COCO_SIGMAS, Backend, CocoMetrics, common_iou_types, evaluate_coco
from a2fpn.training.monitor import get_logger, grid, track_picture
from a2fpn.training.progress import ProgressLine
from a2fpn.training.seeding import seeded
from a2fpn.training.signals import leave_stopping_to_the_run

logger = get_logger(__name__)
Poll = Callable[[], None]


def sharded_loader(
    dataset: CocoDataset, *, batch_size: int, workers: int, rank: int, world_size: int
) -> DataLoader[Sample]:
    """Build a loader of this process's share of the batches, which do not depend on the number of processes.

    Args:
        dataset: All the images.
        batch_size: Images per batch.
        workers: Loader processes.
        rank: Index of this process.
        world_size: Number of processes.
    """
    batches = [list(range(at, min(at + batch_size, len(dataset)))) for at in range(0, len(dataset), batch_size)]
    mine = [index for batch in batches[rank::world_size] for index in batch]
    # Only the last batch of all may be smaller, and it is also the last one of its process.
    return DataLoader(
        Subset(dataset, mine),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_stopping_to_the_run,
    )


class Validator:
    """Evaluates a model during training.

    Args:
        dataset: The validation images.
        accelerator: The accelerator of the run.
        target_keys: Outputs of the detector, see its ``target_keys``.
        batch_size: Images per batch and process.
        workers: Loader processes per process.
        max_detections: Maximum number of detections per image and class.
        backend: Evaluation backend, see :func:`a2fpn.evaluation.evaluate_coco`.
        channels_last: Whether the network runs channels-last.
        pictures: Number of images to draw.
        seed: Seed of the randomness in the losses.
        global_losses: Whether training normalizes losses over all processes.
        oks_sigmas: See :func:`a2fpn.evaluation.evaluate_coco`; COCO's if empty.
        quiet: Whether to hide progress.

    Raises:
        ValueError: If the images can't be evaluated in this way.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        accelerator: Accelerator,
        *,
        batch_size: int,
        workers: int,
        max_detections: int,
        backend: Backend,
        channels_last: bool,
        pictures: int,
        seed: int,
        global_losses: bool,
        target_keys: Collection[str],
        oks_sigmas: Sequence[float] = (),
        quiet: bool = False,
    ) -> None:
        self.dataset = dataset
        self.accelerator = accelerator
        self._shown = accelerator.is_main_process and not quiet
        self.max_detections, self.backend = max_detections, backend
        self.iou_types = common_iou_types(dataset.coco, target_keys)
        self.oks_sigmas = tuple(oks_sigmas) or COCO_SIGMAS
        if "keypoints" in self.iou_types:
            self._compare([])  # detects mismatched sigmas before training, not after
        self.channels_last, self.seed, self._global_losses = channels_last, seed, global_losses
        # Spread over the data set, preferring images with objects.
        full = [i for i, image_id in enumerate(dataset.image_ids) if dataset.coco.annotations[image_id]]
        full = full or list(range(len(dataset)))
        self._drawn = {dataset.image_ids[full[i * len(full) // pictures]] for i in range(pictures)}
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self._rounds = -(-len(dataset) // (batch_size * world_size))
        self.loader = sharded_loader(dataset, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)

    def record(self, model: Any, poll: Poll, *, losses: bool, step: int, picture: Path) -> dict[str, Any]:
        """Evaluate, and log metrics and pictures to the trackers; every process has to call it.

        Args:
            model: The detector.
            poll: Called between batches on all processes; may raise to stop.
            losses: Whether to compute the losses as well.
            step: Steps of the run.
            picture: File for the drawn images.

        Returns:
            The metrics on the main process, else nothing.
        """
        accelerator, start = self.accelerator, time.perf_counter()
        if accelerator.num_processes > 1:
            # Batch norm statistics differ between processes; checkpoints have those of rank 0.
            broadcast(list(model.buffers()))
        values: dict[str, float] = {}
        if losses:
            model.normalize_losses_globally(enabled=False)  # processes may have different numbers of batches
            values = self.losses(model, poll)
            model.normalize_losses_globally(enabled=self._global_losses)
        metrics, drawn = self.evaluate(model, poll)
        if not accelerator.is_main_process:
            return {}
        accelerator.log({**values, **{f"val/{name}": value for name, value in metrics.items()}}, step=step)
        if drawn:
            page = grid(drawn)
            try:
                picture.parent.mkdir(exist_ok=True)
                page.save(picture, quality=88)
                track_picture(accelerator, "val/predictions", page, picture, step)
            except OSError as error:  # the picture is optional
                logger.warning("%s can't be written: %s", picture, error)
        return {"eval_seconds": round(time.perf_counter() - start, 1), **values, **metrics}

    def evaluate(self, model: Any, poll: Poll) -> tuple[dict[str, float], list[Image.Image]]:
        """Predict and evaluate all images; every process has to call it.

        Args:
            model: The detector.
            poll: Called between batches on all processes; may raise to stop.

        Returns:
            On the main process the COCO metrics, with ``images_evaluated``, and pictures of predictions; elsewhere
            nothing.
        """
        accelerator = self.accelerator
        predictor = a2fpn.Predictor(model, device=accelerator.device, channels_last=self.channels_last)
        found: list[tuple[int, list[dict[str, Any]]]] = []
        drawn: list[tuple[int, Image.Image]] = []
        with ProgressLine("Evaluation", len(self.loader), shown=self._shown) as line:
            for images, targets in self._batches(poll):
                ids = [int(target["image_id"]) for target in targets]
                for image_id, image, result in zip(ids, images, predictor.predict(images), strict=True):
                    found.append((image_id, result.to_coco(image_id)))
                    if image_id in self._drawn:
                        drawn.append((image_id, result.plot(image=image.permute(1, 2, 0).numpy())))
                line.advance()
        by_image = dict(gather_object(found))
        pictures = dict(gather_object(drawn))
        if not accelerator.is_main_process:
            return {}, []
        known = {category.id for category in self.dataset.coco.categories}  # the training set may have more categories
        hits = [hit for i in self.dataset.image_ids for hit in by_image.get(i, ()) if hit["category_id"] in known]
        metrics = self._compare(hits).to_dict(per_class=True)
        return {**metrics, "images_evaluated": len(by_image)}, [pictures[i] for i in sorted(pictures)]

    def _batches(self, poll: Poll) -> Iterator[Any]:
        """Yield this process's batches; all processes poll equally often, though some have one batch less."""
        batches = iter(self.loader)
        for _ in range(self._rounds):
            try:
                batch, failure = next(batches, None), None
            except RuntimeError as error:
                batch, failure = None, error
            poll()  # if a signal ended the loader processes, stop instead of failing
            if failure:
                raise failure
            if batch is not None:
                yield batch

    def _compare(self, detections: Sequence[Mapping[str, Any]]) -> CocoMetrics:
        return evaluate_coco(
            self.dataset.coco,
            detections,
            iou_types=self.iou_types,
            max_detections=self.max_detections,
            oks_sigmas=self.oks_sigmas,
            backend=self.backend,
        )

    def losses(self, model: Any, poll: Poll) -> dict[str, float]:
        """Mean losses over the validation images, as ``val/<loss>``; every process has to call it.

        Args:
            model: The detector.
            poll: Called between batches on all processes; may raise to stop.
        """
        sums: dict[str, float] = {}
        count = 0
        with (
            torch.no_grad(),
            _computing_losses(model),
            ProgressLine("Losses", len(self.loader), shown=self._shown) as line,
        ):
            for images, targets in self._batches(poll):
                with seeded("validation", self.seed, int(targets[0]["image_id"])):
                    values: Mapping[str, Tensor] = model(images, targets)
                for name, value in {"loss": torch.stack(list(values.values())).sum(), **values}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(images)
                count += len(images)
                line.advance()
        parts: Sequence[tuple[dict[str, float], int]] = gather_object([(sums, count)])
        total = sum(images for _, images in parts)
        return {f"val/{name}": sum(part.get(name, 0.0) for part, _ in parts) / total for name in parts[0][0]}


@contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    """Make a detector compute losses while its norms and dropouts stay in evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        drops = "Drop" in type(module).__name__ and not any(True for _ in module.children())
        module.training = not (drops or isinstance(module, nn.modules.batchnorm._BatchNorm))
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
