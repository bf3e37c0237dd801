"""Base class of detectors: images to results or losses, by backbone -> neck -> heads.

Shape shorthand: ``B`` images, ``N`` objects of an image, ``M`` side of a predicted mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from a2fpn._registry import Registry
from a2fpn.backbones import TimmBackbone
from a2fpn.config import HEADS, HeadsConfig, ModelConfig
from a2fpn.detectors.elsewhere import Elsewhere
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads.batched import split_images
from a2fpn.heads.loss_normalizer import normalize_losses_globally
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.layers.checkpointing import set_checkpointing
from a2fpn.masks import InstanceMasks
from a2fpn.masks.paste import PasteRule
from a2fpn.necks import Neck
from a2fpn.preprocess import Batch, Preprocess, resize_boxes, resize_target
from a2fpn.pyramid import Features, PyramidSpec

Detection = dict[str, Tensor]


class Detector(Elsewhere, ABC):
    """Base of the detectors: preprocessing, validation of targets, grouping of images.

    Subclasses add heads and implement :meth:`losses` and :meth:`objects`. Everything that depends on a stride comes
    from :attr:`spec`. Labels are ``0..num_classes - 1`` in training and in results.

    Args:
        config: Configuration of the model, kept for saving.
        backbone: The backbone.
        neck: The neck.

    Attributes:
        preprocess: The resize, normalization and padding rule.
        has_masks: Whether it trains on masks and predicts them.
        box_only_variant: Box-only counterpart, suggested in error messages.
        target_keys: Keys that it reads from a target.
        class_dependent: Name prefixes of the tensors that depend on the number of classes.
        strides: Default strides of the backbone's maps.
        neck_args: Default arguments of the neck.
        provenance: Provenance stored in the checkpoint it was loaded from, see :mod:`a2fpn.pretrained.provenance`;
            None for a model without one.
    """

    has_masks = False
    box_only_variant = "fasterrcnn"
    target_keys: tuple[str, ...] = ("boxes", "labels")
    class_dependent: tuple[str, ...] = ()
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)
    neck_args: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__()
        self.config = config
        self.provenance: object | None = None
        # Padding need not cover levels that are used for proposals only or added by the detector.
        coarsest = max(neck.out_spec[name].stride for name in neck.roi_levels)
        self.preprocess = Preprocess(config.preprocess, divisor=coarsest)
        self.backbone = backbone
        self.neck = neck

    @property
    def spec(self) -> PyramidSpec:
        """Levels that the heads run on."""
        return self.neck.out_spec

    @property
    @abstractmethod
    def dense_head(self) -> nn.Module:
        """Dense head (RPN or one-stage), called with the list of feature maps."""

    @abstractmethod
    def losses(self, features: Features, batch: Batch, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute the heads' losses, with the same keys on every step.

        Args:
            features: The pyramid.
            batch: The images.
            targets: Per image the entries of :attr:`target_keys`, in pixels of the batch.
        """

    @property
    def rule(self) -> PostprocessConfig:
        """Post-processing of the model as configured."""
        heads = self.config.heads
        return PostprocessConfig(heads.score_threshold, heads.nms_threshold, heads.detections_per_image)

    @abstractmethod
    def objects(self, features: Features, batch: Batch, *, rule: PostprocessConfig) -> Detection:
        """Detect objects in the whole batch, in pixels of the batch, grouped by image, by descending score.

        Args:
            features: The pyramid.
            batch: The images.
            rule: Post-processing of this call.

        Returns:
            ``images`` (N,), the image index of each, ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) from 0, and
            further outputs of the detector.
        """

    def detect(self, features: Features, batch: Batch, *, rule: PostprocessConfig) -> list[Detection]:
        """Detections per image, see :meth:`objects`."""
        return split_images(self.objects(features, batch, rule=rule), batch.tensor.shape[0])

    def detect_stack(self, images: Tensor) -> Detection:
        """Detect objects in images of one size, by operations that can be traced for any batch and image size.

        Args:
            images: ``(B, C, H, W)``, float in [0, 1] or uint8 in [0, 255]; values are not checked.

        Returns:
            The detections of the batch, see :meth:`objects`, with boxes in pixels of the original images, and masks
            and heatmaps relative to their boxes.
        """
        batch = self.preprocess.stack(images)
        found = self.objects(self.features(batch), batch, rule=self.rule)
        return {**found, "boxes": resize_boxes(found["boxes"], batch.sizes[0], batch.original_sizes[0])}

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Mapping[str, Any]] | None = None,
        *,
        resize: bool = True,
        paste_masks: bool = True,
        rule: PostprocessConfig | None = None,
    ) -> dict[str, Tensor] | list[Detection]:
        """Detect objects, or compute the losses in training mode.

        Args:
            images: ``(C, H, W)`` each, float in [0, 1] or uint8 in [0, 255], any sizes; or a batch ``(B, C, H, W)``.
            targets: In training mode, per image ``boxes`` (N, 4) float xyxy pixels, ``labels`` (N,) int64 in
                ``0..num_classes - 1``, the other entries of :attr:`target_keys` (``masks``
                :class:`~a2fpn.masks.InstanceMasks`, or dense (N, H, W) in {0, 1}, ``keypoints`` (N, K, 3)), optionally
                ``has_mask`` (N,) bool, False for objects that train boxes only, and ``image_id``.
            resize: Whether to resize images (and targets) by the model's rule; False if they are resized already.
            paste_masks: Whether to paste masks into the image, ``(N, 1, H, W)``, or to return them relative to their
                boxes, ``(N, 1, M, M)``.
            rule: Post-processing of this call; None for :attr:`rule`, the model's own.

        Returns:
            In training mode a dict of scalar losses, with the same keys on every step. Otherwise per image
            ``boxes`` (N, 4) float32 xyxy in pixels of the original image, ``scores`` (N,) descending, ``labels`` (N,),
            for mask detectors ``masks`` as float32 probabilities, for keypoint detectors ``keypoints`` (N, K, 3).

        Raises:
            ValueError: For invalid images, boxes, labels, masks or keypoints.
            TypeError: For values that are not tensors.
        """
        images = self._as_list(images)
        if not images:
            raise ConfigError("Expected at least one image, got none.")
        if self.training:
            if targets is None:
                raise ConfigError("In training mode targets must be given; call model.eval() to detect.")
            return self._losses(images, targets, resize)
        return self._detect(images, resize, paste_masks, self.rule if rule is None else rule)

    def _as_list(self, images: Any) -> Sequence[Tensor]:
        """Return images as a list, after checks of their type and of the model's ability to process them."""
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ConfigError(
                    f"Expected a list of images (C, H, W) or a batch (B, C, H, W), got a tensor {tuple(images.shape)}. "
                    "For one image: model([image])."
                )
            images = list(images)
        if not isinstance(images, (list, tuple)) or not all(isinstance(image, Tensor) for image in images):
            kinds = {type(item).__name__ for item in images} if isinstance(images, (list, tuple)) else ()
            got = f"a {type(images).__name__}" + (f" of {' and '.join(sorted(kinds))}" if kinds else "")
            raise ConfigTypeError(
                f"A detector takes a list of tensors (C, H, W), got {got}. Files, arrays and PIL images go to "
                "a2fpn.Predictor(model)(...)."
            )
        dtype = next(self.parameters()).dtype
        kind = images[0].device.type if images else "cpu"
        if dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(kind):
            raise ConfigTypeError(
                f"The model's weights are {dtype}, but boxes and norms need float32. Keep the weights in float32 "
                "(model.float()) and use mixed precision: torch.autocast('cuda', torch.bfloat16), or "
                "a2fpn.optimize_for_inference(model, dtype=torch.bfloat16)."
            )
        return images

    def features(self, batch: Batch) -> Features:
        """Compute the pyramid of a batch, named as in :attr:`spec`."""
        maps = self.backbone(batch.tensor)
        return self.add_levels(maps, self.neck(maps, batch.sizes))

    def add_levels(self, maps: Features, pyramid: Features) -> Features:
        """Add the detector's own levels to the neck's pyramid; none by default.

        Args:
            maps: Output of the backbone.
            pyramid: Output of the neck.
        """
        return pyramid

    def compile_maps(self, **options: Any) -> None:
        """Compile backbone, neck and dense head by :func:`torch.compile`, in place.

        Weights and state dict do not change. The first step of each kind of batch, and the first evaluation, take
        minutes; varying image sizes trigger one recompilation with dynamic shapes.

        Args:
            **options: Arguments of :func:`torch.compile`, e.g. ``mode``.
        """
        for part in (self.backbone, self.neck, self.dense_head):
            part.compile(**options)

    def checkpoint_neck(self, enabled: bool | None) -> None:
        """Choose whether the neck's activations are recomputed in the backward pass, see ``run.checkpoint_neck``.

        Args:
            enabled: True takes less memory, False less time on a GPU; None recomputes unless the neck is compiled.
        """
        set_checkpointing(self.neck, enabled)

    @property
    def mask_paste(self) -> PasteRule:
        """Method of pasting masks into the image, see :class:`~a2fpn.config.RCNNConfig`."""
        return "exact"

    def normalize_losses_globally(self, *, enabled: bool = True) -> None:
        """Normalize losses over all ranks, see :class:`~a2fpn.heads.GlobalLossNormalizer`.

        Every process then has to compute losses in step, as in training.
        """
        normalize_losses_globally(self, enabled=enabled)

    def check_data(self, name: str, keys: Collection[str]) -> None:
        """Check before training that a data set has the targets that the detector needs.

        Args:
            name: The data set, for messages.
            keys: Keys of its targets, e.g. :attr:`a2fpn.data.CocoDataset.target_keys`.

        Raises:
            ValueError: With the detector to use instead.
        """
        for key in self.target_keys:
            if key not in keys:
                raise ConfigError(f"{name} has no {key}, which {self.config.detector} trains on. {self._instead(key)}")

    def _instead(self, key: str) -> str:
        """Return advice for targets that lack ``key``."""
        return f"Without {key} use {self.box_only_variant}."

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], resize: bool
    ) -> dict[str, Tensor]:
        self._check_targets(images, targets)
        batch = self.preprocess(images, resize=resize)
        inner = []
        for target, old, new in zip(targets, batch.original_sizes, batch.sizes, strict=True):
            own = {key: _plain(target[key]).to(batch.tensor.device, non_blocking=True) for key in self.target_keys}
            own |= {"boxes": own["boxes"].float(), "labels": own["labels"].long()}
            if "masks" in own and not isinstance(own["masks"], InstanceMasks):
                own["masks"] = InstanceMasks.from_dense(own["masks"])
            if "masks" in own and "has_mask" in target:
                own["has_mask"] = target["has_mask"].to(batch.tensor.device, non_blocking=True)
            inner.append(self._inner_target(own, old, new))
        return {**self.losses(self.features(batch), batch, inner), **self.neck.losses()}

    def _inner_target(self, target: dict[str, Any], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
        """Convert a checked target for the heads, from one image size (height, width) to another."""
        return resize_target(target, old, new)

    def _check_targets(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        if len(images) != len(targets):
            raise ConfigError(f"Expected one target per image, got {len(images)} images and {len(targets)} targets.")
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            where = place(target, index)
            if "boxes" not in target or "labels" not in target:
                raise ConfigError(f"{where}: a target needs boxes and labels, got {', '.join(sorted(target))}.")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise ConfigError(
                    f"{where}: expected boxes (N, 4) and labels (N,), got {tuple(boxes.shape)}, {tuple(labels.shape)}."
                )
            good = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)
            if not good.all():
                bad = int(torch.where(~good)[0][0])
                raise ConfigError(
                    f"{where}: box {bad} {boxes[bad].tolist()} has no positive width and height, or is not finite."
                )
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise ConfigError(f"{where}: labels must be whole numbers (int64), got {labels.dtype}.")
            wrong = torch.where((labels < 0) | (labels >= self.config.num_classes))[0]
            if len(wrong):
                raise ConfigError(
                    f"{where}: label {int(labels[wrong[0]])} is out of 0..{self.config.num_classes - 1}; labels are "
                    "contiguous and there is no background class."
                )
            if self.has_masks and ("masks" not in target or target["masks"].shape != (len(boxes), *image.shape[1:])):
                got = tuple(target["masks"].shape) if "masks" in target else "none"
                raise ConfigError(
                    f"{where}: {self.config.detector} trains on masks (N, H, W) = {(len(boxes), *image.shape[1:])}, "
                    f"got {got}. {self._instead('masks')}"
                )
            has_mask = target.get("has_mask")
            if has_mask is not None and (has_mask.shape != labels.shape or has_mask.dtype != torch.bool):
                got = f"{has_mask.dtype} of shape {tuple(has_mask.shape)}"
                raise ConfigError(f"{where}: has_mask must be bool ({len(boxes)},), one for each box, got {got}.")

    def _detect(
        self, images: Sequence[Tensor], resize: bool, paste_masks: bool, rule: PostprocessConfig
    ) -> list[Detection]:
        results: list[Detection] = [{}] * len(images)
        for group in self._groups(images, resize):
            batch = self.preprocess([images[i] for i in group], resize=resize)
            features = self.features(batch)
            detections = self.detect(features, batch, rule=rule)
            for i, raw, size, original in zip(group, detections, batch.sizes, batch.original_sizes, strict=True):
                results[i] = self._result(raw, size, original, paste_masks)
        return results

    def _groups(self, images: Sequence[Tensor], resize: bool) -> Iterator[list[int]]:
        """Indices of images that pad to the same size.

        Images of different padded sizes never share a batch: padding beyond the divisor would influence the features
        through convolutions, and predictions would depend on the other images of the batch.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            target = self.preprocess.target_size(*size) if resize else size
            groups.setdefault(tuple(-(-side // self.preprocess.divisor) for side in target), []).append(index)
        yield from groups.values()

    def _result(self, raw: Detection, size: tuple[int, int], original: tuple[int, int], paste: bool) -> Detection:
        """Map a detection from pixels of the batch to those of the original image; sizes are (height, width)."""
        return {**raw, "boxes": resize_boxes(raw["boxes"], size, original)}


def _plain(value: Any) -> Any:
    """Convert a tensor subclass, such as torchvision's, to a plain tensor."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def place(target: Mapping[str, Any], index: int) -> str:
    """Return the name of an image of the batch for messages."""
    return f"image_id {target['image_id']}" if "image_id" in target else f"image {index} of the batch"


DETECTORS: Registry[type[Detector]] = Registry("detector")
DetectorT = TypeVar("DetectorT", bound=Detector)


def register_detector(
    name: str, *, heads: type[HeadsConfig] | None = None
) -> Callable[[type[DetectorT]], type[DetectorT]]:
    """Return a decorator that registers a detector class under a name.

    Args:
        name: First part of the names of its models.
        heads: Configuration class of its heads; None for the one known for the name, or else
            :class:`~a2fpn.config.RCNNConfig`.

    Raises:
        ValueError: If the name is taken.
    """

    def decorator(detector: type[DetectorT]) -> type[DetectorT]:
        DETECTORS.register(name)(detector)
        if heads is not None:
            HEADS[name] = heads
        return detector

    return decorator
