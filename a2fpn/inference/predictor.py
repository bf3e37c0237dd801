"""Images in, detections out: files, folders, PIL images, arrays and tensors.

Shape shorthand: N objects of K keypoints, an image of H x W pixels, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn.config import MAX_PIXELS
from a2fpn.data.images import SUFFIXES, read_image, to_rgb
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads.postprocess import PostprocessConfig, SoftNms
from a2fpn.inference.eval_view import EvalViews
from a2fpn.inference.result import Result, to_array
from a2fpn.inference.tiling import TileDetections, merge_tiles, tile_windows
from a2fpn.inference.tta import Augmentation, detect_augmented
from a2fpn.masks.rle import Rle, encode_box_masks

if TYPE_CHECKING:
    from a2fpn.detectors import Detector
    from a2fpn.inference.optimize import OptimizedDetector


ImageInMemory = Image.Image | NDArray[np.uint8] | Tensor
ImagePath = str | os.PathLike[str]


@dataclass(frozen=True)
class PredictOptions:
    """Options of prediction; None leaves a limit to the model's own configuration.

    Args:
        score_threshold: Objects that score less are dropped, between 0 and 1. Below the model's own threshold (0.05
            unless configured) there are more objects than it gives by itself.
        nms_threshold: IoU above which an object removes a worse one of its class, between 0 and 1.
        detections_per_image: Most objects of an image, or of a tile.
        soft_nms: ``"linear"`` or ``"gaussian"`` lowers the scores of objects that overlap better ones, where NMS
            removes them; see :func:`a2fpn.heads.soft_nms`. False removes.
        tile: Side in pixels of the overlapping tiles in which larger images are predicted one by one, and whose
            objects are merged; None predicts images whole. Each tile is resized by the model's own rule. Keypoints
            can't be merged, nor fused by ``tta``: with a detector of keypoints both are errors.
        overlap: Least share of a tile that the next one shows too. Objects up to this size are seen whole.
        tta: True sees each image, or tile, at three sizes and mirrored, and fuses what is found; an
            :class:`~a2fpn.inference.tta.Augmentation` says which views to take. Takes several times as long.

    Raises:
        ValueError: For a value out of its range.
    """

    score_threshold: float | None = None
    nms_threshold: float | None = None
    detections_per_image: int | None = None
    soft_nms: SoftNms | Literal[False] = False
    tile: int | None = None
    overlap: float = 0.2
    tta: bool | Augmentation = False

    def __post_init__(self) -> None:
        PostprocessConfig(**self.changes)
        tile_windows((1, 1), self.tile or 16, self.overlap)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the model's rule that are replaced."""
        limits = ("score_threshold", "nms_threshold", "detections_per_image")
        given = {name: getattr(self, name) for name in limits if getattr(self, name) is not None}
        return {**given, "soft_nms": self.soft_nms or None}

    @property
    def augmentation(self) -> Augmentation | None:
        """Views of test-time augmentation, if there are more than one."""
        return (Augmentation() if self.tta else None) if isinstance(self.tta, bool) else self.tta


class _Call(NamedTuple):
    """Model and options of one call.

    Args:
        model: The detector in evaluation mode.
        options: Those of the call.
        rule: The model's post-processing with the call's changes.
    """

    model: Detector | OptimizedDetector
    options: PredictOptions
    rule: PostprocessConfig


class Predictor:
    """Runs a detector on images as people have them: files, folders, PIL images, arrays, tensors.

    A call keeps nothing: its options are its own, and it changes neither the predictor nor the model, whose training
    flags and buffers stay as they are, also in the midst of training. So threads may share a predictor, and predictors
    a model; each call gives what it gives alone. Building one moves the model to ``device``, it is not copied.

    Args:
        model: A detector of :func:`a2fpn.create_model`, :func:`a2fpn.from_pretrained` or
            :func:`a2fpn.optimize_for_inference`.
        device: Where to run, for example ``"cuda"``; None leaves the model where it is.
        max_pixels: Most pixels of an image file, see :func:`a2fpn.data.read_image`; None sets no limit.
        channels_last: Whether to lay out the model's weights for convolutions on NHWC memory, which is faster on
            CPUs and on tensor cores, with the same results up to rounding.
        **options: Fields of :class:`PredictOptions`, for every call that doesn't say otherwise: ``score_threshold``,
            ``nms_threshold``, ``detections_per_image``, ``soft_nms``, ``tile``, ``overlap``, ``tta``.

    Raises:
        TypeError: If the model is none of this package's detectors, or for an unknown option.
        ValueError: If an option is out of range.

    Example:
        >>> import a2fpn
        >>> model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=2, min_size=64)
        >>> predictor = Predictor(model, score_threshold=0.5)
        >>> result = predictor(np.zeros((64, 96, 3), dtype=np.uint8))
        >>> result.size, result.boxes.shape == (len(result), 4)
        ((64, 96), True)
    """

    def __init__(
        self,
        model: Detector | OptimizedDetector,
        *,
        device: torch.device | str | None = None,
        channels_last: bool = True,
        max_pixels: int | None = MAX_PIXELS,
        **options: Any,
    ) -> None:
        if not hasattr(model, "config") or not hasattr(model, "preprocess"):
            raise ConfigTypeError(
                f"Predictor expects a detector of a2fpn.create_model(...) or a2fpn.from_pretrained(...), "
                f"got {type(model).__name__}."
            )
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(f"max_pixels must be at least 1 or None, got {max_pixels}.")
        self.options = PredictOptions(**options)
        self.max_pixels = max_pixels
        self._views = EvalViews()
        self.model = model.to(device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.categories = model.config.labeled_categories

    @overload
    def __call__(self, images: ImageInMemory, **options: Any) -> Result: ...
    @overload
    def __call__(self, images: ImagePath, **options: Any) -> Result | list[Result]: ...
    @overload
    def __call__(self, images: Sequence[ImageInMemory | ImagePath], **options: Any) -> list[Result]: ...

    def __call__(
        self, images: ImageInMemory | ImagePath | Sequence[ImageInMemory | ImagePath], **options: Any
    ) -> Result | list[Result]:
        """Detect objects, one image after the other.

        Args:
            images: An image, a folder (its images in order of their names, without sub-folders) or a sequence of
                images. An image is a path, a PIL image (taken as it is; EXIF orientation is applied to files), a
                uint8 array (H, W, 3) in RGB order or (H, W) in gray (OpenCV reads BGR: pass
                ``image[..., ::-1]``), or a tensor (3, H, W), uint8 or float in [0, 1].
            **options: Fields of :class:`PredictOptions` for this call, e.g. ``tile=1024``.

        Returns:
            A result for one image, a list of results for a folder or a sequence.

        Raises:
            ValueError: If a file is no readable image, a folder holds none, or an array has another shape or type.
            TypeError: If something else is given.
            OSError: If there is no such file.
        """
        if isinstance(images, (str, os.PathLike)) and Path(images).is_dir():
            return [self._predict_one(path, options) for path in list_images(images)]
        if isinstance(images, Sequence) and not isinstance(images, str):
            return [self._predict_one(image, options) for image in images]
        return self._predict_one(images, options)

    def predict(self, images: Sequence[Tensor], **options: Any) -> list[Result]:
        """Detect objects in a batch of tensors: the call for evaluation and training.

        Args:
            images: (3, H, W) tensors of any sizes, float32 in [0, 1] or uint8 in [0, 255].
            **options: Fields of :class:`PredictOptions` for this call.

        Returns:
            A result per image, without image and path.

        Raises:
            ValueError: For an option out of its range, or one that a detector of keypoints has no answer to.
        """
        chosen = replace(self.options, **options)
        device = next(self.model.parameters()).device
        images = [image.to(device) for image in images]
        changes = chosen.changes
        if "score_threshold" in changes:
            # The heads keep what scores more than their threshold, a result what scores no less.
            below = float(np.nextafter(np.float32(changes["score_threshold"]), np.float32(-1)))
            changes["score_threshold"] = max(0.0, below)
        rule = replace(self.model.rule, **changes)
        with self._views.lend(self.model) as model, torch.inference_mode():
            call = _Call(model, chosen, rule)
            if chosen.tile is not None:
                return [self._tiled(image, call) for image in images]
            return [
                self._result(output, _size(image), chosen)
                for output, image in zip(self._detect(images, call), images, strict=True)
            ]

    def _detect(self, images: Sequence[Tensor], call: _Call) -> Sequence[Mapping[str, Tensor]]:
        """Detect objects in each image, by the model alone or by fusing its views."""
        model, options, rule = call
        augmentation = options.augmentation
        if augmentation is None or not all(image.ndim == 3 for image in images):
            found: Sequence[Mapping[str, Tensor]] = model(images, paste_masks=False, rule=rule)
            return found
        return [
            detect_augmented(
                lambda view: model([view], resize=False, paste_masks=False, rule=rule)[0],
                image,
                model.preprocess.target_size(*_size(image)),
                augmentation,
                rule,
                interpolation=model.preprocess.config.interpolation,
            )
            for image in images
        ]

    def _tiled(self, image: Tensor, call: _Call) -> Result:
        size, options = _size(image), call.options
        results = []
        windows = tile_windows(size, options.tile or max(size), options.overlap)
        # One by one: a batch of tiles takes several times the memory and saves no time on a CPU.
        for x0, y0, x1, y1 in windows:
            (output,) = self._detect([image[..., y0:y1, x0:x1]], call)
            if "keypoints" in output and len(windows) > 1:
                raise ConfigError("Keypoints of several tiles can't be merged; predict without tile.")
            moved = {**output, "boxes": output["boxes"] + output["boxes"].new_tensor([x0, y0, x0, y0])}
            results.append(self._result(moved, size, options))
        if len(results) == 1:
            return results[0]
        tiles = [
            TileDetections(window, result.boxes, result.scores, result.labels, result.rles)
            for window, result in zip(windows, results, strict=True)
        ]
        merged = merge_tiles(tiles, size)
        return replace(results[0], boxes=merged.boxes, scores=merged.scores, labels=merged.labels, rles=merged.rles)

    def _predict_one(self, image: ImageInMemory | ImagePath, options: Mapping[str, Any]) -> Result:
        if isinstance(image, (str, os.PathLike)):
            (result,) = self.predict([read_image(Path(image), max_pixels=self.max_pixels)], **options)
            return replace(result, path=os.fspath(image))
        tensor = _to_tensor(image)
        (result,) = self.predict([tensor], **options)
        return replace(result, image=to_array(tensor))

    def _result(self, output: Mapping[str, Tensor], size: tuple[int, int], options: PredictOptions) -> Result:
        boxes, masks = output["boxes"], output.get("masks")
        points: dict[str, Any] = {
            name: output[name].cpu().numpy() for name in ("keypoints", "keypoint_scores") if name in output
        }
        result = Result(
            boxes=boxes.cpu().numpy(),
            scores=output["scores"].cpu().numpy(),
            labels=output["labels"].cpu().numpy(),
            size=size,
            categories=self.categories,
            rles=None if masks is None else self._encode(masks, boxes, size),
            keypoint_names=getattr(self.model.config.heads, "keypoint_names", ()),
            **points,
        )
        return result if options.score_threshold is None else result.above(options.score_threshold)

    def _encode(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Rle, ...]:
        return tuple(encode_box_masks(masks, boxes, size, rule=self.model.mask_paste))


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return int(image.shape[-2]), int(image.shape[-1])


def list_images(folder: ImagePath) -> list[Path]:
    """Return the image files of a folder in order of their names, without those of sub-folders.

    Raises:
        ValueError: If there are none.
        OSError: If there is no such folder.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not paths:
        raise ConfigError(
            f"No image lies in the folder {os.fspath(folder)} itself; expected names that end in "
            f"{', '.join(SUFFIXES)} (sub-folders are not searched)."
        )
    return paths


def _to_tensor(image: ImageInMemory) -> Tensor:
    """(3, H, W) tensor of an image, uint8 or float in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            raise ConfigError(
                f"Expected an image as a uint8 array (H, W, 3) in RGB order or (H, W) in gray, got {image.dtype} of "
                f"shape {image.shape}. Convert it, or pass a PIL image or the path of the file."
            )
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    if isinstance(image, Tensor):
        return image
    raise ConfigTypeError(
        f"Expected an image as a path, PIL image, uint8 array or tensor, or a folder or list of images, "
        f"got {type(image).__name__}."
    )
