"""Detectors exported by ``a2fpn export``, run by ONNX Runtime, OpenVINO or torch."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from a2fpn._serialize import from_dict, migrate_keys
from a2fpn.config import ModelConfig
from a2fpn.detectors.keypoint_rcnn import resize_keypoints
from a2fpn.errors import CheckpointError, ConfigError, MissingFileError
from a2fpn.heads.batched import split_images
from a2fpn.heads.keypoints import find_keypoints
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.masks.paste import PasteRule
from a2fpn.masks.paste import paste_masks as pasted
from a2fpn.preprocess import Preprocess, resize_boxes

Runtime = Literal["onnxruntime", "openvino", "torch"]
RUNTIMES: tuple[str, ...] = typing.get_args(Runtime)
SUFFIXES = {".onnx": ("onnxruntime", "openvino"), ".pt2": ("torch",)}
"""File name suffixes of exported files, and their runtimes, the default first."""
METADATA_VERSION = 1
"""Newest supported version of the metadata."""
FACTS = (
    *("a2fpn_export", "a2fpn_version", "architecture", "categories", "category_ids", "config", "detections_per_image"),
    *("input", "mask_paste", "nms_threshold", "outputs", "score_threshold", "weights_sha256"),
)
"""Keys of a file's metadata."""

Columns = dict[str, Tensor]
Run = Callable[[Tensor], Columns]


def is_exported(source: object) -> bool:
    """Return whether a source is a file of ``a2fpn export``, by its suffix."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix in SUFFIXES


class ExportedDetector(nn.Module):
    """An exported detector, called like a detector in evaluation mode.

    Args:
        path: An ``.onnx`` or ``.pt2`` file of :func:`a2fpn.export_model`.
        runtime: The runtime; None for ONNX Runtime for ``.onnx`` and torch for ``.pt2``. It runs on the CPU, with
            torch's number of threads.

    Attributes:
        config: Configuration of the exported model.
        facts: The file's metadata.
        rule: Its post-processing, which is fixed.

    Raises:
        MissingFileError: If there is no such file.
        CheckpointError: If it is not a file of :func:`a2fpn.export_model`.
        ConfigError: For a runtime that is unknown, not installed, or not for this kind of file.
    """

    def __init__(self, path: str | os.PathLike[str], *, runtime: Runtime | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        known = SUFFIXES.get(self.path.suffix, ())
        if not known:
            raise ConfigError(f"{self.path.name}: expected a name that ends in {' or '.join(SUFFIXES)}.")
        if runtime is not None and runtime not in known:
            raise ConfigError(f"{self.path.name} is run by {' or '.join(known)}, got runtime={runtime!r}.")
        if not self.path.is_file():
            raise MissingFileError(f"{self.path}: no such file.")
        chosen = runtime or known[0]
        opened: dict[str, Callable[[Path], tuple[Run, Mapping[str, str]]]] = {
            "onnxruntime": _open_onnxruntime,
            "openvino": _open_openvino,
            "torch": _open_torch,
        }
        self._run, self.facts = opened[chosen](self.path)
        self.config = _config(self.facts, self.path)
        self.preprocess = Preprocess(self.config.preprocess, divisor=1)
        self.rule = PostprocessConfig(
            float(self.facts["score_threshold"]),
            float(self.facts["nms_threshold"]),
            int(self.facts["detections_per_image"]),
        )
        self.input_dtype = torch.uint8 if self.facts["input"] == "uint8" else torch.float32
        self.eval()

    @property
    def target_keys(self) -> tuple[str, ...]:
        """Keys of a target that it predicts, see :attr:`a2fpn.detectors.Detector.target_keys`."""
        outputs = json.loads(self.facts["outputs"])
        kinds = {"boxes": "boxes", "labels": "labels", "masks": "masks", "keypoints": "heatmaps"}
        return tuple(key for key, output in kinds.items() if output in outputs)

    @property
    def mask_paste(self) -> PasteRule:
        """Method of pasting masks into the image."""
        return typing.cast(PasteRule, self.facts["mask_paste"])

    def run(self, images: Tensor) -> Columns:
        """Run the file on images of one size.

        Args:
            images: ``(N, C, H, W)``, uint8, or float in [0, 1]; converted to the file's input type.

        Returns:
            Its outputs by name, see :func:`a2fpn.export_model`.
        """
        return self._run(self.to_input(images))

    def to_input(self, images: Tensor) -> Tensor:
        """Convert images, uint8 or float in [0, 1], to the file's input type."""
        if self.input_dtype == torch.uint8:
            images = images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)
        else:
            images = images.float() if images.is_floating_point() else images.float() / 255
        return images.contiguous()

    def forward(
        self,
        images: Sequence[Tensor],
        *,
        resize: bool = True,
        paste_masks: bool = True,
        rule: PostprocessConfig | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detect objects; see :meth:`a2fpn.detectors.Detector.forward`.

        Raises:
            ConfigError: For options that are fixed in the file: the resized image size, the NMS threshold, a lower
                score threshold, or a higher number of detections.
        """
        if not resize:
            raise ConfigError(
                f"{self.path.name} resizes images by itself; test-time augmentation needs the checkpoint."
            )
        self._check(rule or self.rule)
        results = []
        for image in images:
            found = self.run(image[None])
            found["images"] = found.pop("image_index")
            (own,) = split_images(found, 1)
            own = {name: x[: (rule or self.rule).detections_per_image] for name, x in own.items()}
            size = (image.shape[-2], image.shape[-1])
            if "heatmaps" in own:
                inner = self.preprocess.target_size(*size)
                boxes = resize_boxes(own["boxes"], size, inner)
                keypoints, own["keypoint_scores"] = find_keypoints(own.pop("heatmaps"), boxes)
                own["keypoints"] = resize_keypoints(keypoints, inner, size)
            if "masks" in own:
                masks = own["masks"][:, None]
                own["masks"] = pasted(masks, own["boxes"], size, rule=self.mask_paste) if paste_masks else masks
            results.append(own)
        return results

    def _check(self, rule: PostprocessConfig) -> None:
        """Check the post-processing of a call against that of the file."""
        own = self.rule
        below = torch.tensor(rule.score_threshold).nextafter(torch.tensor(1.0)) < torch.tensor(own.score_threshold)
        problems = {
            "soft_nms": (rule.soft_nms is not None, False, rule.soft_nms),
            "nms_threshold": (rule.nms_threshold != own.nms_threshold, own.nms_threshold, rule.nms_threshold),
            "score_threshold": (bool(below), f">= {own.score_threshold}", rule.score_threshold),
            "detections_per_image": (
                rule.detections_per_image > own.detections_per_image,
                f"<= {own.detections_per_image}",
                rule.detections_per_image,
            ),
        }
        for name, (bad, wanted, got) in problems.items():
            if bad:
                raise ConfigError(
                    f"{self.path.name} was exported with {name} {wanted}, got {got}; leave it out, or export the "
                    "checkpoint again with other settings."
                )

    def train(self, mode: bool = True) -> ExportedDetector:
        """Refuse training mode.

        Raises:
            ConfigError: If training mode is requested.
        """
        if mode:
            raise ConfigError("An exported detector can't be trained; train the original checkpoint.")
        return super().train(False)


def _config(facts: Mapping[str, str], path: Path) -> ModelConfig:
    try:
        version = int(facts["a2fpn_export"])
        if not 1 <= version <= METADATA_VERSION:
            raise CheckpointError(
                f"{path} has metadata of version {version}, this version of a2fpn reads 1 to {METADATA_VERSION}."
            )
        return from_dict(ModelConfig, migrate_keys(json.loads(facts["config"])), where=str(path))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        _refuse(path, error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    """Raise the error for a file that was not written by this package."""
    reason = " ".join(str(error).split())[:200]
    raise CheckpointError(
        f"{path} was not written by a2fpn export, or is damaged ({type(error).__name__}: {reason}). Make one with "
        "`a2fpn export MODEL --output FILE`."
    ) from error


def _open_onnxruntime(path: Path) -> tuple[Run, Mapping[str, str]]:
    try:
        import onnxruntime as runtime
    except ModuleNotFoundError as error:
        raise ConfigError('onnxruntime is not installed: pip install "a2fpn[onnx]".') from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: a user can't act on the warnings
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        _refuse(path, error)
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Columns:
        arrays = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run, session.get_modelmeta().custom_metadata_map


def _open_openvino(path: Path) -> tuple[Run, Mapping[str, str]]:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ConfigError('openvino is not installed: pip install "a2fpn[openvino]".') from error
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"})
    try:
        network = core.read_model(path)
        facts = {key: value.astype(str) for key, value in network.get_rt_info()["framework"].items()}
        if "precision" in facts:
            raise ConfigError(f"{path.name} is an int8 file, in which OpenVINO finds no objects; use ONNX Runtime.")
        compiled = core.compile_model(network, "CPU")
    except (RuntimeError, KeyError) as error:
        _refuse(path, error)
    names = [output.any_name for output in compiled.outputs]

    def run(images: Tensor) -> Columns:
        arrays = compiled(images.numpy()).values()
        return {name: torch.from_numpy(array.copy()) for name, array in zip(names, arrays, strict=True)}

    return run, facts


def _open_torch(path: Path) -> tuple[Run, Mapping[str, str]]:
    facts = dict.fromkeys(FACTS, "")
    try:
        with path.open("rb") as file:
            program = torch.export.load(file, extra_files=facts)
    except Exception as error:  # torch raises errors of any type
        _refuse(path, error)
    module = program.module()

    def run(images: Tensor) -> Columns:
        with torch.inference_mode():
            found: Columns = module(images)
        return dict(found)

    return run, {key: value.decode() if isinstance(value, bytes) else value for key, value in facts.items()}
