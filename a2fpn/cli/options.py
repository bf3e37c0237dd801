"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from a2fpn.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from a2fpn.detectors import Detector
    from a2fpn.inference import Predictor
    from a2fpn.inference.exported import ExportedDetector, Runtime


Model = Annotated[
    str,
    typer.Option(
        help="Checkpoint folder, name from `a2fpn list --pretrained`, or file from `a2fpn export`.",
        metavar="NAME_OR_PATH",
    ),
]
RuntimeName = Annotated[
    Literal["onnxruntime", "openvino", "torch"] | None,
    typer.Option("--runtime", help="Runtime for an exported model; default: onnxruntime for .onnx, torch for .pt2."),
]
Output = Annotated[Path, typer.Option(help="Output folder; created if missing.", metavar="DIR")]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="Confidence threshold: drop objects with a lower score.")]
Device = Annotated[
    str | None, typer.Option(help="Device, such as cpu or cuda:1; default: cuda if available, else cpu.")
]
Tile = Annotated[
    int | None,
    typer.Option(
        min=16,
        metavar="PIXELS",
        help="Tile size: predict larger images in overlapping tiles and merge the objects. Default: predict images "
        "whole.",
    ),
]
Overlap = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.9,
        help="With --tile: minimum overlap, as a fraction of the tile size; objects up to that size stay whole.",
    ),
]
Tta = Annotated[
    bool,
    typer.Option("--tta", help="Use test-time augmentation: fuse three scales, each also flipped; six times the work."),
]
Nms = Annotated[
    float | None,
    typer.Option(
        "--nms-threshold", min=0, max=1, help="IoU threshold for non-maximum suppression (NMS); default: the model's."
    ),
]
SoftNmsKind = Annotated[
    Literal["linear", "gaussian"] | None,
    typer.Option("--soft-nms", help="Use Soft-NMS: lower the scores of overlapping objects instead of removing them."),
]
MaxObjects = Annotated[
    int | None,
    typer.Option(
        "--max-objects",
        min=1,
        help="Maximum detections per image or tile; raises earlier limits too. Default: the model's.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, metavar="TILES", help="With --tile: batch size, in tiles.")]
Workers = Annotated[
    int, typer.Option(min=0, metavar="THREADS", help="With --tile: threads that prefetch tiles; 0 disables.")
]
Scale = Annotated[
    str | None,
    typer.Option(
        metavar="FACTOR|MICRONSum|auto",
        help="Input scale instead of the model's resize rule: a factor, a pixel size in µm such as 0.5um (for files "
        "that state theirs), or auto for the checkpoint's pixel size.",
    ),
]
Channels = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        help="TIFF channels to feed the model, counted from 0; a single one is used as gray. Default: all.",
    ),
]
Intensity = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH|auto",
        help="TIFF values mapped to black and white; auto uses percentiles of the image. Default: full 8- or 16-bit "
        "range.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option("--max-pixels", min=1, help="Maximum pixels of a file decoded whole; raise only for trusted files."),
]
GrayBits = Annotated[
    int,
    typer.Option(
        "--gray-bits", min=9, max=16, help="Bit depth of gray values in 16-bit files; 12 for many microscopes."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and summary; still report errors.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="OUT", help="Write the numbers to a JSON file; - is standard output and implies --quiet."
    ),
]
Optimize = Annotated[
    bool, typer.Option("--optimize", help="Optimize the model for inference; same results up to rounding.")
]
Precision = Annotated[
    Literal["float32", "bf16"],
    typer.Option(help="Precision; bf16 implies --optimize: up to twice as fast on hardware with bf16, less exact."),
]


def parse_scale(text: str | None, detector: Detector | ExportedDetector) -> dict[str, float | None]:
    """Options of prediction that --scale means for a detector."""
    if text is None:
        return {}
    if text == "auto":
        microns = getattr(getattr(detector, "provenance", None), "metadata", {}).get("microns_per_pixel")
        if microns is None:
            raise ConfigError(
                "--scale auto: the checkpoint does not store its training scale. Give the scale, such as 0.5um, or "
                "store it: a2fpn.pretrained.checkpoint.add_metadata(folder, microns_per_pixel=0.5)."
            )
        return {"microns_per_pixel": microns}
    number = text.lower().replace("µ", "u").removesuffix("um").strip()
    try:
        value = float(number)
    except ValueError:
        expected = "a factor such as 0.5, the µm of a pixel such as 0.5um, or auto"
        raise ConfigError(f"--scale must be {expected}, got {text!r}.") from None
    return {"microns_per_pixel" if len(number) < len(text.strip()) else "scale": value}


def parse_channels(text: str | None) -> tuple[int, ...] | None:
    """Channels of --channels."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--channels must be comma-separated integers such as 2,0,1, got {text!r}.") from None


def parse_intensity(text: str | None) -> tuple[float, float] | Literal["auto"] | None:
    """Range of --intensity."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--intensity must be two numbers such as 0,4095, or auto, got {text!r}.") from None
    return low, high


def load_detector(source: str, *, runtime: Runtime | None = None) -> Detector | ExportedDetector:
    """A detector with its weights, or the one in an exported file."""
    import a2fpn
    from a2fpn.inference.exported import ExportedDetector, is_exported

    if is_exported(source):
        return ExportedDetector(source, runtime=runtime)
    if runtime is not None:
        raise ConfigError(f"--runtime is for files of a2fpn export, got --model {source}.")
    return a2fpn.from_pretrained(source)


def weights_hash(detector: Detector | ExportedDetector) -> str:
    """Say by 16 digits which weights a detector has."""
    import torch

    from a2fpn.inference.exported import ExportedDetector
    from a2fpn.pretrained.checkpoint import file_sha256

    if isinstance(detector, ExportedDetector):
        return file_sha256(Path(detector.path))[:16]
    digest = hashlib.sha256()
    for name, x in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_checkpoint(source: str) -> Detector:
    """A detector with its weights, for what an exported file can't do."""
    import a2fpn
    from a2fpn.inference.exported import is_exported

    if is_exported(source):
        raise ConfigError(f"{source} is an exported file; give the checkpoint that it was made from.")
    return a2fpn.from_pretrained(source)


def build_predictor(
    detector: Detector | ExportedDetector, device: str | None, *, optimize: bool, dtype: str, **options: Any
) -> Predictor:
    """The detector, optimized if that is wanted, with the options of a command."""
    import torch

    import a2fpn
    from a2fpn.inference.exported import ExportedDetector

    if isinstance(detector, ExportedDetector):
        if optimize or dtype != "float32":
            raise ConfigError(f"--optimize and --dtype are for checkpoints, got --model {detector.path}.")
        return a2fpn.Predictor(detector, device=device, **options)
    where = pick_device(device)
    if optimize or dtype == "bf16":
        ready = a2fpn.optimize_for_inference(
            detector.to(where), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        return a2fpn.Predictor(ready, channels_last=False, **options)
    return a2fpn.Predictor(detector, device=where, **options)


def short_names(models: Sequence[str]) -> list[str]:
    """Short names of models, all different: the last parts of their paths, as many as it takes.

    Raises:
        ConfigError: If two are the same.

    Example:
        >>> short_names(["runs/fpn/best", "runs/a2fpn/best"])
        ['fpn/best', 'a2fpn/best']
    """
    parts = [Path(model).parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"The same model was given twice: {', '.join(models)}.")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # meta tensors have no values
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name} is not available ({reason}); omit it, or use --device cpu.") from error
    return device
