"""Images in, detections out: files, folders, PIL images, arrays and tensors.

Shape shorthand: N objects of K keypoints, an image of H x W pixels, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn.config import MAX_PIXELS, SCORE_THRESHOLD, HeadsConfig
from a2fpn.data.images import read_image, to_rgb
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.inference.eval_view import EvalViews
from a2fpn.inference.exported import ExportedDetector, Runtime, is_exported
from a2fpn.inference.options import PredictOptions, with_options
from a2fpn.inference.result import Result, to_array
from a2fpn.inference.sources import ImagePath, check_source, is_pattern, list_images
from a2fpn.inference.tiling import TileDetections, merge_tiles, tile_windows
from a2fpn.inference.tta import detect_augmented
from a2fpn.masks.rle import Rle, encode_box_masks

if TYPE_CHECKING:
    from a2fpn.detectors import Detector
    from a2fpn.inference.optimize import OptimizedDetector


ImageInMemory = Image.Image | NDArray[np.uint8] | Tensor | bytes


class _Call(NamedTuple):
    """Model and options of one call.

    Args:
        model: The detector in evaluation mode.
        options: Those of the call.
        rule: The model's post-processing with the call's changes.
    """

    model: Detector | OptimizedDetector | ExportedDetector
    options: PredictOptions
    rule: PostprocessConfig


class Predictor:
    """Runs a detector on images as people have them: files, folders, PIL images, arrays, tensors.

    A call keeps nothing: its options are its own, and it changes neither the predictor nor the model, whose training
    flags and buffers stay as they are, also in the midst of training. So threads may share a predictor, and predictors
    a model; each call gives what it gives alone. Building one moves the model to ``device``, it is not copied.

    Args:
        model: A detector of :func:`a2fpn.create_model`, :func:`a2fpn.from_pretrained` or
            :func:`a2fpn.optimize_for_inference`; or a file of :func:`a2fpn.export_model`, whose thresholds are fixed.
        device: Where to run, for example ``"cuda"``; None leaves the model where it is. Files run on the CPU.
        runtime: What runs a file: ``"onnxruntime"``, ``"openvino"`` or ``"torch"``; None goes by the file.
        max_pixels: Most pixels of an image file, see :func:`a2fpn.data.read_image`; None sets no limit.
        gray_bits: Bits that gray values of image files use, see :func:`a2fpn.data.read_image`.
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

    @with_options
    def __init__(
        self,
        model: Detector | OptimizedDetector | ExportedDetector | ImagePath,
        *,
        device: torch.device | str | None = None,
        runtime: Runtime | None = None,
        channels_last: bool = True,
        max_pixels: int | None = MAX_PIXELS,
        gray_bits: int = 16,
        **options: Any,
    ) -> None:
        if is_exported(model):
            model = ExportedDetector(typing.cast(ImagePath, model), runtime=runtime)
        elif runtime is not None:
            raise ConfigError(f"runtime={runtime!r} is for files of a2fpn.export_model, got {type(model).__name__}.")
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            named = isinstance(model, (str, os.PathLike))
            kind = type(model).__name__
            got = f"{kind} {str(model)!r}; load it: a2fpn.from_pretrained({str(model)!r})" if named else kind
            raise ConfigTypeError(
                f"Predictor expects a detector of a2fpn.create_model(...) or a2fpn.from_pretrained(...), or an .onnx "
                f"or .pt2 file of a2fpn.export_model(...), got {got}."
            )
        if isinstance(model, ExportedDetector) and device is not None and torch.device(device).type != "cpu":
            raise ConfigError(f"{model.path.name} is run on the CPU, got device={str(device)!r}; load the checkpoint.")
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(f"max_pixels must be at least 1 or None, got {max_pixels}.")
        self.options = PredictOptions.of(options)
        if not 9 <= gray_bits <= 16:
            raise ConfigError(f"gray_bits must be between 9 and 16, got {gray_bits}.")
        self.max_pixels = max_pixels
        self.gray_bits = gray_bits
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

    @with_options
    def __call__(
        self, images: ImageInMemory | ImagePath | Sequence[ImageInMemory | ImagePath], **options: Any
    ) -> Result | list[Result]:
        """Detect objects, one image after the other.

        Objects that score less than 0.5 are left out unless ``score_threshold`` says otherwise, here or when the
        predictor was made.

        Args:
            images: An image, a folder (its images in order of their names, without sub-folders), a pattern such as
                ``photos/*.jpg``, or a sequence of images. An image is a path, a PIL image (taken as it is; EXIF
                orientation is applied to files), a uint8 array (H, W, 3) in RGB order or (H, W) in gray (OpenCV reads
                BGR: pass ``image[..., ::-1]``), a tensor (3, H, W), uint8 or float in [0, 1], or the bytes of a file.
            **options: Fields of :class:`PredictOptions` for this call, e.g. ``tile=1024``.

        Returns:
            A result for one image, a list of results for a folder, a pattern or a sequence.

        Raises:
            ValueError: If a file is no readable image, a folder holds none, or an array has another shape or type.
            TypeError: If something else is given.
            OSError: If there is no such file.
        """
        if isinstance(images, (str, os.PathLike)):
            check_source(images)
            if Path(images).is_dir() or is_pattern(images):
                return [self._predict_one(path, options) for path in list_images(images)]
        if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
            return [self._predict_one(image, options) for image in images]
        return self._predict_one(images, options)

    @with_options
    def predict(self, images: Sequence[Tensor], **options: Any) -> list[Result]:
        """Detect objects in a batch of tensors: the call for evaluation and training.

        Without a ``score_threshold`` the model's own holds: average precision takes objects of all scores.

        Args:
            images: (3, H, W) tensors of any sizes, float32 in [0, 1] or uint8 in [0, 255].
            **options: Fields of :class:`PredictOptions` for this call.

        Returns:
            A result per image, without image and path.

        Raises:
            ValueError: For an option out of its range, or one that a detector of keypoints has no answer to.
        """
        chosen = self.options.but(options)
        device = next((x.device for x in self.model.parameters()), torch.device("cpu"))
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
        if isinstance(model, ExportedDetector):
            raise ConfigError(
                f"{model.path.name} resizes images by itself; test-time augmentation needs the checkpoint."
            )
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

    def _predict_one(self, image: ImageInMemory | ImagePath, given: Mapping[str, Any]) -> Result:
        options = dict(given)
        if options.get("score_threshold", self.options.score_threshold) is None:
            options["score_threshold"] = _shown_threshold(self.model.rule.score_threshold)
        if isinstance(image, bytes):  # the content of a file
            image = read_image(image, max_pixels=self.max_pixels, gray_bits=self.gray_bits)
        if isinstance(image, (str, os.PathLike)):
            pixels = read_image(Path(image), max_pixels=self.max_pixels, gray_bits=self.gray_bits)
            (result,) = self.predict([pixels], **options)
            # Read again with other bits it would be another picture.
            return replace(result, path=os.fspath(image), image=to_array(pixels) if self.gray_bits != 16 else None)
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


def _shown_threshold(configured: float) -> float | None:
    """Threshold of what people are shown; None for the configured one.

    Models are configured to keep nearly everything for average precision, with 0.05 or less; another value is a choice.
    """
    return SCORE_THRESHOLD if 0 < configured <= HeadsConfig.score_threshold else None


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return int(image.shape[-2]), int(image.shape[-1])


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
