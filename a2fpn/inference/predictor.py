"""Prediction on files, folders, PIL images, arrays and tensors.

Shape shorthand: N objects of K keypoints, an image of H x W pixels, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

import logging
import os
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from a2fpn.config import MAX_PIXELS, SCORE_THRESHOLD, HeadsConfig
from a2fpn.data.images import read_image
from a2fpn.data.slides import Slide, SlideOptions, Window, open_slide
from a2fpn.errors import ConfigError, ConfigTypeError, ImageError
from a2fpn.inference.eval_view import EvalViews
from a2fpn.inference.exported import ExportedDetector, Runtime, is_exported
from a2fpn.inference.inputs import ImageInMemory, to_tensor
from a2fpn.inference.options import PredictOptions, with_options
from a2fpn.inference.result import Result, to_array
from a2fpn.inference.sources import ImagePath, check_source, is_pattern, list_images
from a2fpn.inference.tiled import MemorySlide, detect_tiles
from a2fpn.inference.tiling import TileDetections, merge_tiles, tile_windows
from a2fpn.inference.tta import detect_augmented, detect_resized
from a2fpn.masks.rle import encode_box_masks

if TYPE_CHECKING:
    from a2fpn.detectors import Detector
    from a2fpn.inference.optimize import OptimizedDetector


_CANDIDATES = 4  # per object; with fewer, some objects may have none
_logger = logging.getLogger(__name__)
_MOST_PIXELS = 2**32 - 1  # of a tiled image: pycocotools counts run lengths in 32 bits


class Predictor:
    """Runs a detector on images: files, folders, PIL images, arrays, tensors.

    Calls are stateless: their options apply to that call only, and they modify neither the predictor nor the model,
    whose training flags and buffers are kept, even during training. So threads may share a predictor, and predictors a
    model, without affecting results. The model is moved to ``device``, not copied.

    Args:
        model: A detector of :func:`a2fpn.create_model`, :func:`a2fpn.from_pretrained` or
            :func:`a2fpn.optimize_for_inference`; or a file of :func:`a2fpn.export_model`, whose thresholds are fixed.
        device: Device to run on, for example ``"cuda"``; None keeps the model's. Files run on the CPU.
        runtime: Runtime of a file: ``"onnxruntime"``, ``"openvino"`` or ``"torch"``; None for the file's default.
        max_pixels: Maximum number of pixels of an image file that is decoded whole; None for no limit. Tiled TIFF and
            large PNG files are not decoded whole.
        gray_bits: Bits used by gray values of image files, see :func:`a2fpn.data.read_image`.
        channels_last: Whether to convert the model to channels-last, which is faster on CPUs and tensor cores, with
            equal results up to rounding.
        **options: Default fields of :class:`PredictOptions` for all calls: ``score_threshold``, ``nms_threshold``,
            ``max_objects``, ``tile`` and others.

    Raises:
        TypeError: If the model is not one of this package's detectors, or for an unknown option.
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
            raise ConfigError(
                f"{model.path.name} supports the CPU only, got device={str(device)!r}; load the checkpoint."
            )
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
        """Detect objects in images, one by one.

        Objects with a score below 0.5 are dropped unless ``score_threshold`` is set, here or in the constructor.

        Args:
            images: An image, a folder (its images sorted by name, without subfolders), a pattern such as
                ``photos/*.jpg``, or a sequence of images. An image is a path, a PIL image (EXIF orientation is applied
                to files only), a uint8 array (H, W, 3) in RGB order or (H, W) in gray (OpenCV reads BGR: pass
                ``image[..., ::-1]``), a tensor (3, H, W), uint8 or float in [0, 1], or the bytes of a file.
            **options: Fields of :class:`PredictOptions` for this call, e.g. ``tile=1024``.

        Returns:
            A result for one image, a list of results for a folder, a pattern or a sequence.

        Raises:
            ValueError: If a file is not a readable image, a folder has none, or an array has another shape or type.
            TypeError: For any other type.
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
        """Detect objects in a batch of tensors, for evaluation and training.

        The default ``score_threshold`` is the model's own, since average precision uses objects of all scores.

        Args:
            images: (3, H, W) tensors of any sizes, float32 in [0, 1] or uint8 in [0, 255].
            **options: Fields of :class:`PredictOptions` for this call.

        Returns:
            A result per image, without image and path.

        Raises:
            ValueError: For an option out of range, or one that a keypoint detector does not support.
        """
        chosen = self.options.but(options)
        if chosen.tile is not None:
            return [self._tiled(MemorySlide(image), chosen) for image in images]
        outputs = self._detect(images, chosen)
        return [self._result(output, _size(image), chosen) for output, image in zip(outputs, images, strict=True)]

    def tiles(
        self, slide: Slide, *, skip: Collection[int] = (), **options: Any
    ) -> Iterator[tuple[int, TileDetections]]:
        """Detect objects tile by tile, so that the detections of long runs can be saved as they are produced.

        :func:`~a2fpn.inference.tiling.merge_tiles` merges them into one result.

        Args:
            slide: An image of :func:`a2fpn.data.slides.open_slide`.
            skip: Indices of finished tiles.
            **options: Fields of :class:`PredictOptions` for this call; ``tile`` is required.

        Yields:
            Index of a tile, row-major from 0, and its detections.
        """
        chosen = self.options.but(options)
        windows = dict(enumerate(self.windows(slide, **options)))
        limited: Counter[str] = Counter()

        def encode(output: Mapping[str, Tensor], size: tuple[int, int]) -> TileDetections:
            limited.update(self._limits(output, chosen))
            return _as_tile(self._result(output, size, chosen))

        yield from detect_tiles(
            lambda images: self._detect(images, chosen, slide),
            encode,
            slide,
            {number: window for number, window in windows.items() if number not in skip},
            batch=chosen.batch,
            workers=chosen.workers,
        )
        for limit, number in limited.items():
            _logger.warning("%s: in %s of %s tiles %s", slide.name, number, len(windows), limit)

    def windows(self, slide: Slide, **options: Any) -> list[Window]:
        """Tiles of a slide in the order of their indices in :meth:`tiles`."""
        chosen = self.options.but(options)
        return tile_windows(slide.size, chosen.tile or max(*slide.size, 16), chosen.overlap)

    def join(self, slide: Slide, tiles: Sequence[TileDetections]) -> Result:
        """Merge the detections of all tiles of a slide into one result."""
        merged = merge_tiles(tiles, slide.size)
        return Result(
            boxes=merged.boxes,
            scores=merged.scores,
            labels=merged.labels,
            size=slide.size,
            categories=self.categories,
            rles=merged.rles,
            microns_per_pixel=slide.microns_per_pixel,
        )

    def reading(self, **options: Any) -> SlideOptions:
        """Return the options for reading image files, from the model and the call's options."""
        chosen, channels = self.options.but(options), self.model.config.backbone.in_chans
        return chosen.reading(
            in_channels=channels,
            max_pixels=self.max_pixels,
            gray_bits=self.gray_bits,
            whole=chosen.tile is None and channels == 3 and chosen.channels is None and chosen.intensity is None,
        )

    def open(self, path: ImagePath, **options: Any) -> Slide:
        """Open an image file for reading by windows, with the options of the model and the call.

        Raises:
            ValueError: If the file is not a readable image, its channels don't match the model's, or it is too large:
                for ``max_pixels`` without tiles, for run lengths of 32 bits with tiles.
        """
        chosen = self.options.but(options)
        slide = open_slide(Path(path), self.reading(**options))
        pixels = slide.size[0] * slide.size[1]
        limit = _MOST_PIXELS if chosen.tile is not None else self.max_pixels
        if limit is not None and pixels > limit:
            slide.close()
            advice = "cut it into parts" if chosen.tile else "predict it in tiles, or raise max_pixels (--max-pixels)"
            raise ImageError(f"{slide.name}: its {pixels} pixels exceed the limit of {limit}; {advice}.")
        return slide

    def _detect(
        self, images: Sequence[Tensor], options: PredictOptions, slide: Slide | None = None
    ) -> Sequence[Mapping[str, Tensor]]:
        """Detect objects in each image, by the model alone or by fusing its views."""
        changes = options.changes
        if "score_threshold" in changes:
            # The heads keep scores above their threshold, a result scores at or above it.
            below = float(np.nextafter(np.float32(changes["score_threshold"]), np.float32(-1)))
            changes["score_threshold"] = max(0.0, below)
        rule = replace(self.model.rule, **changes)
        device = next((x.device for x in self.model.parameters()), torch.device("cpu"))
        images = [image.to(device) for image in images]
        scale = _scale(options, slide)
        with self._views.lend(self.model) as model, torch.inference_mode():
            if scale is None and (options.augmentation is None or not all(image.ndim == 3 for image in images)):
                found: Sequence[Mapping[str, Tensor]] = model(images, paste_masks=False, rule=rule)
                return found
            sizes = [
                model.preprocess.target_size(*_size(image)) if scale is None else _scaled(_size(image), scale)
                for image in images
            ]
            interpolation = model.preprocess.config.interpolation

            def detect(views: Sequence[Tensor]) -> Sequence[dict[str, Tensor]]:
                detections: Sequence[dict[str, Tensor]] = model(views, resize=False, paste_masks=False, rule=rule)
                return detections

            if options.augmentation is None:
                return detect_resized(detect, images, sizes, interpolation=interpolation)
            return [
                detect_augmented(
                    lambda view: detect([view])[0], image, size, options.augmentation, rule, interpolation=interpolation
                )
                for image, size in zip(images, sizes, strict=True)
            ]

    def _tiled(self, slide: Slide, options: PredictOptions) -> Result:
        chosen = {field.name: getattr(options, field.name) for field in fields(options)}
        windows = self.windows(slide, **chosen)
        if len(windows) == 1:
            # A single window needs no merging, so keypoints are possible.
            (output,) = self._detect([slide.read(windows[0])], options, slide)
            for limit in self._limits(output, options):
                _logger.warning("%s: %s", slide.name, limit)
            result = self._result(output, slide.size, options)
            return replace(result, microns_per_pixel=slide.microns_per_pixel)
        joined = self.join(slide, [tile for _, tile in self.tiles(slide, **chosen)])
        return replace(joined, score_threshold=options.score_threshold)

    def _predict_one(self, image: ImageInMemory | ImagePath, given: Mapping[str, Any]) -> Result:
        options = dict(given)
        if options.get("score_threshold", self.options.score_threshold) is None:
            options["score_threshold"] = _shown_threshold(self.model.rule.score_threshold)
        chosen = self.options.but(options)
        if isinstance(image, bytes):  # the content of a file
            image = read_image(image, max_pixels=self.max_pixels, gray_bits=self.gray_bits)
        if not isinstance(image, (str, os.PathLike)):
            tensor = to_tensor(image)
            return replace(self._tiled(MemorySlide(tensor), chosen), image=to_array(tensor))
        with self.open(image, **options) as slide:
            return replace(self._tiled(slide, chosen), path=os.fspath(image), reading=self.reading(**options))

    def _limits(self, output: Mapping[str, Tensor], options: PredictOptions) -> Iterator[str]:
        """Yield warnings about limits that may have dropped objects."""
        count, heads = len(output["scores"]), self.model.config.heads
        most = options.max_objects or self.model.rule.detections_per_image
        own = getattr(heads, "rpn_post_nms_top_n_test", 0) or getattr(heads, "candidates_per_level", 0)
        if count >= most:
            yield f"the limit of {most} objects is reached; raise max_objects (--max-objects)."
        elif options.max_objects is None and count * _CANDIDATES >= own:
            yield (
                f"{count} objects were found among the model's {own} candidates; there may be more; "
                "give max_objects (--max-objects), which raises all limits."
            )

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
            rles=None if masks is None else tuple(encode_box_masks(masks, boxes, size, rule=self.model.mask_paste)),
            keypoint_names=getattr(self.model.config.heads, "keypoint_names", ()),
            **points,
        )
        return result if options.score_threshold is None else result.above(options.score_threshold)


def _shown_threshold(configured: float) -> float | None:
    """Default threshold for display; None for the configured one.

    Models are configured with 0.05 or less to keep nearly everything for average precision; others are deliberate.
    """
    return SCORE_THRESHOLD if 0 < configured <= HeadsConfig.score_threshold else None


def _as_tile(result: Result) -> TileDetections:
    """Convert a tile's result, in pixels of the tile."""
    height, width = result.size
    return TileDetections((0, 0, width, height), result.boxes, result.scores, result.labels, result.rles)


def _scale(options: PredictOptions, slide: Slide | None) -> float | None:
    """Network input pixels per image pixel; None for the model's own rule."""
    if options.microns_per_pixel is None:
        return options.scale
    if slide is None or slide.microns_per_pixel is None:
        name = "an image in memory" if slide is None else slide.name
        raise ConfigError(f"{name} does not state its pixel size; give scale instead of microns_per_pixel.")
    return slide.microns_per_pixel / options.microns_per_pixel


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return int(image.shape[-2]), int(image.shape[-1])
