"""Choice of settings from the data: ``--config auto``.

Shape shorthand: K objects, N images; sizes are square roots of box areas.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from a2fpn.config import PreprocessConfig
from a2fpn.data import CocoFile, read_coco
from a2fpn.data.check.classes import scales
from a2fpn.data.check.sizes import covered, each_class_alike
from a2fpn.errors import ConfigError
from a2fpn.preprocess import Preprocess
from a2fpn.training.config import DataSection

_WHOLE = 0.95  # share of the objects that fit in a training crop
_CELLS = 6  # target size of the lower quartile of objects, in pixels of the finest map (stride 4)
_ENLARGED = 3.0  # maximum upscaling of images
_LEAST_SIDE = 384  # short side in pixels below which images are never shrunk
_ONE_SIZE = 1.25  # ratio of large to small images' short sides below which all count as one size
_RARE = 0.05  # share of the images below which a class is rare
_BASES = (8, 12, 16, 24, 32)  # sizes of the smallest anchor
_LEVELS = 5
_RATIOS = ((0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, 4.0))
_GAIN = 0.05  # minimum additional share of objects that more ratios must fit
_FEW = 100  # images below which the backbone's first stages stay frozen
_EVALUATIONS = 12
_SAMPLE = 5000  # objects whose sizes are compared
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_Value = TypeVar("_Value", int, str)


@dataclass(frozen=True)
class Choice:
    """A setting and its reason.

    Args:
        setting: Its dotted name.
        value: Its value.
        reason: A sentence.
    """

    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}={self.value}: {self.reason}"


@dataclass(frozen=True)
class Machine:
    """Limits set by the device.

    Args:
        name: Display name.
        short_side: Maximum short side of an image, pixels.
        crop: Side of training crops, pixels.
        largest_crop: Side of training crops for large objects.
        batch: Images per step.
        seen: Minimum number of images seen in a training run, however small the data set.
        proposals: Minimum number of proposals per image in training.
    """

    name: str
    short_side: int
    crop: int
    largest_crop: int
    batch: int
    seen: int
    proposals: int


GPU = Machine("a GPU", 800, 512, 800, 8, 12_000, 1000)
CPU = Machine("a CPU", 800, 320, 512, 2, 2_000, 300)


@dataclass(frozen=True)
class Look:
    """Statistics of the training annotations.

    Args:
        coco: The annotations.
        sides: (K, 2) width and height of the boxes, pixels.
        classes: (K,) category ids.
        relative: (K,) sizes relative to the short sides of their images.
        shorts: (N,) short sides of the images, pixels.
        longs: (N,) long sides.
        counts: (N,) objects per image.
        shares: Share of images with each class, by name.
        has_keypoints: Whether any object has a keypoint.
    """

    coco: CocoFile
    sides: NDArray[np.float64]
    classes: NDArray[np.int64]
    relative: NDArray[np.float64]
    shorts: NDArray[np.float64]
    longs: NDArray[np.float64]
    counts: NDArray[np.int64]
    shares: Mapping[str, float]
    has_keypoints: bool

    @classmethod
    def at(cls, file: Path) -> Look:
        """Read a COCO file.

        Raises:
            DataError: If it is not a COCO file.
            ConfigError: If it has no objects.
        """
        coco = read_coco(file)
        objects = {key: [a for a in members if not a.iscrowd] for key, members in coco.annotations.items()}
        images = list(coco.images.values())
        sides = np.array([a.bbox[2:] for image in images for a in objects[image.id]], dtype=np.float64).reshape(-1, 2)
        if not len(sides):
            raise ConfigError(f"{file} has no object, so nothing can be chosen by it; see a2fpn check-data.")
        counts = np.array([len(objects[image.id]) for image in images])
        shorts = np.array([min(image.height, image.width) for image in images], dtype=np.float64)
        holders = Counter(category for members in objects.values() for category in {a.category_id for a in members})
        return cls(
            coco,
            sides,
            np.array([a.category_id for image in images for a in objects[image.id]]),
            np.sqrt(sides.prod(1)) / np.repeat(shorts, counts),
            shorts,
            np.array([max(image.height, image.width) for image in images], dtype=np.float64),
            counts,
            {category.name: holders[category.id] / len(images) for category in coco.categories},
            any(seen > 0 for members in objects.values() for a in members for *_, seen in a.keypoints or ()),
        )


def choose(data: DataSection, *, given: Mapping[str, Any] = _NOTHING, machine: Machine | None = None) -> list[Choice]:
    """Choose settings for a data set.

    Args:
        data: The data set, in COCO format.
        given: Settings that are already decided, by name; the others are chosen to fit them.
        machine: The device's limits; None detects the device.

    Raises:
        DataError: If the training annotations can't be read.
        ConfigError: If they have no objects.
    """
    if data.stream.shards or data.stream.dataset:
        raise ConfigError("--config auto looks at a folder; for a stream take a recipe of --list.")
    if machine is None:
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
        machine = GPU if torch.cuda.is_available() and not on_cpu else CPU
    look = Look.at(Path(data.root) / data.train_annotations)
    parts = (_model, _sizes, _objects, _length)
    choices = [choice for part in parts for choice in part(look, machine, given)]
    return [choice for choice in choices if choice.setting not in given]


def _decided(given: Mapping[str, Any], name: str, chosen: _Value) -> _Value:
    """Return a given setting, or else the chosen one; a value of another type is left to the validation."""
    value = given.get(name)
    return value if isinstance(value, type(chosen)) and value else chosen


def _model(look: Look, machine: Machine, given: Mapping[str, Any]) -> Iterator[Choice]:
    detector, why = "fasterrcnn", "the objects have boxes only"
    if look.has_keypoints:
        detector, why = "keypointrcnn", "the objects have keypoints"
    elif look.coco.count_masks()[0]:
        detector, why = "maskrcnn", "the objects have masks"
    own = "model.name" in given or "model.backbone_weights" in given
    if machine is GPU and not own:
        yield Choice("model.name", f"{detector}_a2fpn_r50", f"{why}; a GPU trains a ResNet-50 in minutes")
        yield Choice("model.pretrained", True, "COCO weights transfer better to photos than ImageNet's")
    else:
        yield Choice("model.name", f"{detector}_fpn_lite0", f"{why}; the smallest backbone and neck")
        if "model.name" not in given and not given.get("model.pretrained"):
            yield Choice("model.overrides.roi_aligned", True, "the heads start anew: no shift by half a pixel to keep")
        if "model.backbone_weights" not in given:
            yield Choice("model.pretrained_backbone", True, "training a backbone from scratch needs many more images")
    if detector == "maskrcnn":
        reason = "the AP of small masks is decided at their boundaries"
        yield Choice("model.overrides.mask_boundary_weight", 2.0, reason)
    few = len(look.counts) < _FEW
    if few:
        reason = f"{len(look.counts)} images are too few to fine-tune the backbone's first stages"
        yield Choice("model.overrides.trainable_layers", 2, reason)
    rare = min(look.shares, key=lambda name: look.shares[name])
    if look.shares[rare] < _RARE:
        reason = f"{rare} is on {look.shares[rare]:.1%} of the images: images of rare classes are oversampled"
        yield Choice("data.repeat_threshold", _RARE, reason)
    strength = 0.4 if few else 0.2
    yield Choice("data.transforms.color_jitter", strength, "few images vary too little" if few else "usual")


def _sizes(look: Look, machine: Machine, given: Mapping[str, Any]) -> Iterator[Choice]:
    """Choose the resize rule, input size, crop and anchors."""
    sizes = np.sqrt(look.sides.prod(1))
    absolute, relative = float(np.log(sizes).std()), float(np.log(look.relative).std())
    chosen = each_class_alike(look.relative, look.classes, _SAMPLE)
    short, quartile = float(np.median(look.shorts)), float(np.quantile(sizes[chosen], 0.25))
    wanted = 4 * _CELLS / quartile
    least = min(1.0, _LEAST_SIDE / short)
    factor = max(least, min(wanted, _ENLARGED, machine.short_side / short))
    min_size = 32 * max(1, round(short * factor / 32))
    most = _decided(given, "model.overrides.max_size", min_size)
    long = max(1.67, float(np.median(look.longs / look.shorts)))
    max_size = 32 * math.ceil(long * _decided(given, "model.overrides.min_size", min_size) / 32)
    low, high = np.quantile(look.shorts, (0.05, 0.95))
    vary = f"sizes of objects vary by {absolute:.2f} (of their logarithm) in pixels and by {relative:.2f} beside their "
    vary += "images"
    if high < _ONE_SIZE * low:
        kind, reason = "shortest_edge", "the images have about one size"
    elif absolute <= relative:
        kind, reason = "at_least", f"{vary}: large images show more at the same scale, and keep their size"
        max_size = max(max_size, min(2 * machine.short_side, 32 * math.ceil(float(look.longs.max()) / 32)))
    else:
        kind, reason = "shortest_edge", f"{vary}: large images show the same at a larger scale"
    yield Choice("model.overrides.resize", kind, reason)
    kind = _decided(given, "model.overrides.resize", kind)
    alike = ", each class counted alike," if len(np.unique(look.classes)) > 1 else ""
    reason = f"a quarter of the objects{alike} is below {quartile:.0f} pixels on images of {short:.0f}; target: "
    reason += f"{4 * _CELLS}"
    if factor > wanted:
        reason += "; smaller images would take less time, but lose detail"
    elif factor < 0.9 * wanted:
        limit = "three times the image's size" if factor == _ENLARGED else f"what {machine.name} can train in time"
        reason += f"; this is {limit}"
    if min_size > most > 0:
        min_size, reason = most, f"{reason}; limited by max_size"
    if kind == "none":
        rule, longest = PreprocessConfig(resize="none"), math.ceil(look.longs.max())
    else:
        yield Choice("model.overrides.min_size", min_size, reason)
        min_size = _decided(given, "model.overrides.min_size", min_size)
        yield Choice("model.overrides.max_size", max_size, "fits the long sides of images at that size")
        longest = _decided(given, "model.overrides.max_size", max_size)
        rule = PreprocessConfig(resize=cast(Any, kind), min_size=min_size, max_size=longest)
    target_size = Preprocess(rule, divisor=1).target_size
    factors = np.repeat(scales(list(look.coco.images.values()), target_size), look.counts, axis=0)
    shown = (look.sides * factors)[chosen]
    large = float(np.quantile(shown.max(1), _WHOLE))
    crop = min(max(machine.crop, 32 * math.ceil(large / 32)), machine.largest_crop)
    if longest > crop:
        reason = f"training on crops of {crop} pixels takes the same time however large images are"
        if crop > machine.crop:
            reason += f"; smaller ones would cut objects, {1 - _WHOLE:.0%} of which{alike} are longer than {large:.0f}"
        yield Choice("data.transforms.crop_size", crop, reason)

    usual, more = (max(_fit(shown, base, ratios) for base in _BASES) for ratios in _RATIOS)
    wide = more[0] > usual[0] + _GAIN
    share, _, base = more if wide else usual
    reason = f"they match {share:.0%} of the objects{alike} at IoU 0.5; other sizes match fewer"
    yield Choice("model.overrides.anchor_sizes", _anchors(base), reason)
    if wide:
        reason = f"the usual three match {usual[0]:.0%} at best: objects are long and narrow"
        yield Choice("model.overrides.anchor_ratios", list(_RATIOS[1]), reason)


def _fit(sides: NDArray[np.float64], base: int, ratios: tuple[float, ...]) -> tuple[float, float, int]:
    """Shares of boxes (K, 2) with an anchor at IoU 0.5, in steps of 1 %, and at the positives' 0.7; and the base."""
    anchors = _anchors(base)
    return round(covered(sides, anchors, ratios), 2), covered(sides, anchors, ratios, iou=0.7), base


def _anchors(base: int) -> list[list[int]]:
    return [[base << level] for level in range(_LEVELS)]


def _objects(look: Look, machine: Machine, given: Mapping[str, Any]) -> Iterator[Choice]:
    """Choose the limits of objects and proposals."""
    most, median = int(look.counts.max()), float(np.median(look.counts))
    detections = max(100, 100 * math.ceil(1.5 * most / 100))
    reason = f"an image holds up to {most} objects, 1.5 times as many are kept"
    yield Choice("model.overrides.detections_per_image", detections, reason)
    detections = _decided(given, "model.overrides.detections_per_image", detections)
    yield Choice("run.max_detections", detections, "the evaluation counts as many")
    proposals = min(2000, max(machine.proposals, 4 * detections))
    for phase in ("train", "test"):
        reason = f"four for each of these, within {machine.proposals} to 2000"
        yield Choice(f"model.overrides.rpn_pre_nms_top_n_{phase}", max(1000, proposals), "no fewer than are kept")
        yield Choice(f"model.overrides.rpn_post_nms_top_n_{phase}", proposals, reason)
    sample = 128 if median < 8 else 256
    yield Choice("model.overrides.box_batch_size", sample, f"a typical image holds {median:.0f} objects")


def _length(look: Look, machine: Machine, given: Mapping[str, Any]) -> Iterator[Choice]:
    """Choose batch size, learning rate and length."""
    images = len(look.counts)
    batch = min(machine.batch, images)
    yield Choice("data.batch_size", batch, f"fits {machine.name}")
    batch = _decided(given, "data.batch_size", batch)
    passes = max(_EVALUATIONS, round(machine.seen / images))
    each = _decided(given, "data.passes", max(1, round(passes / _EVALUATIONS)))
    evaluations = _decided(given, "run.epochs", _EVALUATIONS)
    steps = _decided(given, "run.max_steps", evaluations * -(-each * images // batch))
    reason = f"{images:,} images are seen {steps * batch / images:.3g} times in {steps:,} steps"
    if not given.get("run.max_steps"):
        yield Choice("run.epochs", _EVALUATIONS, f"{reason}, evaluated {_EVALUATIONS} times")
    yield Choice("data.passes", each, "passes over the data per epoch")
    warmup = min(200, max(20, steps // 20), steps // 4)
    yield Choice("optim.warmup_steps", warmup, f"a twentieth of {steps:,} steps, within 20 to 200")
    if machine is GPU:
        yield Choice("run.mixed_precision", "bf16", "a GPU is twice as fast in it, without loss of accuracy")
