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
        help="A checkpoint folder, a name of `a2fpn list --pretrained`, or a file of `a2fpn export`.",
        metavar="NAME_OR_PATH",
    ),
]
RuntimeName = Annotated[
    Literal["onnxruntime", "openvino", "torch"] | None,
    typer.Option(
        "--runtime", help="What runs a file of `a2fpn export`; by default what fits it, of .onnx onnxruntime."
    ),
]
Output = Annotated[Path, typer.Option(help="Folder for what is written; made if need be.", metavar="DIR")]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="Objects that score less are left out.")]
Device = Annotated[
    str | None, typer.Option(help="Where to run, such as cpu or cuda:1; by default cuda where there is one.")
]
Tile = Annotated[
    int | None,
    typer.Option(
        min=16,
        metavar="PIXELS",
        help="Side of the overlapping tiles in which larger images are predicted, and whose objects are merged: for "
        "images far larger than those of the training. By default an image is predicted whole.",
    ),
]
Overlap = Annotated[
    float,
    typer.Option(
        min=0, max=0.9, help="With --tile: least share of a tile that the next shows too. Objects up to it stay whole."
    ),
]
Tta = Annotated[
    bool,
    typer.Option(
        "--tta", help="See each image at three sizes, each also mirrored, and fuse what is found: six times the work."
    ),
]
Nms = Annotated[
    float | None,
    typer.Option(
        "--nms-threshold", min=0, max=1, help="IoU above which an object removes a worse one; by default the model's."
    ),
]
SoftNmsKind = Annotated[
    Literal["linear", "gaussian"] | None,
    typer.Option("--soft-nms", help="Lower the scores of objects that overlap better ones instead of removing them."),
]
MaxObjects = Annotated[
    int | None,
    typer.Option(
        "--max-objects",
        min=1,
        help="Most objects of an image, or of a tile, and all limits on the way to them; by default the model's.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, metavar="TILES", help="With --tile: tiles predicted at once.")]
Workers = Annotated[
    int, typer.Option(min=0, metavar="THREADS", help="With --tile: threads that read and decode tiles ahead.")
]
Scale = Annotated[
    str | None,
    typer.Option(
        metavar="FACTOR|MICRONSum|auto",
        help="Scale at which the network sees images in place of the model's own rule: a factor, or the µm of a pixel, "
        "such as 0.5um, of files that say what their pixels measure; auto takes the µm that the checkpoint names.",
    ),
]
Channels = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        help="Channels of TIFF files that the model gets, counted from 0, or one to be shown as gray; by default all.",
    ),
]
Intensity = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH|auto",
        help="Values of TIFF files that become black and white; auto looks at the image. By default the full range of "
        "8 or 16 bits.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels", min=1, help="Files with more pixels are not decoded whole; raise it for files you trust."
    ),
]
GrayBits = Annotated[
    int,
    typer.Option(
        "--gray-bits", min=9, max=16, help="Bits that gray values of 16-bit files use: 12 for many microscopes."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no closing words; errors are told.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="OUT", help="File to write the numbers to, for machines; - is standard output, and no words."
    ),
]
Optimize = Annotated[
    bool, typer.Option("--optimize", help="Fold the model for speed first: same results up to rounding.")
]
Precision = Annotated[
    Literal["float32", "bf16"],
    typer.Option(help="bf16 (implies --optimize) is up to twice as fast where the processor knows it, and rounds."),
]


def parse_scale(text: str | None, detector: Detector | ExportedDetector) -> dict[str, float | None]:
    """Options of prediction that --scale means for a detector."""
    if text is None:
        return {}
    if text == "auto":
        microns = getattr(getattr(detector, "provenance", None), "metadata", {}).get("microns_per_pixel")
        if microns is None:
            raise ConfigError(
                "--scale auto: the checkpoint doesn't say at which scale it was trained. Give it, such as 0.5um, or "
                "store it: a2fpn.pretrained.checkpoint.add_metadata(folder, microns_per_pixel=0.5)."
            )
        return {"microns_per_pixel": microns}
    number = text.lower().replace("µ", "u").removesuffix("um").strip()
    try:
        value = float(number)
    except ValueError:
        expected = "a factor such as 0.5, the µm of a pixel such as 0.5um, or auto"
        raise ConfigError(f"--scale is {expected}, got {text!r}.") from None
    return {"microns_per_pixel" if len(number) < len(text.strip()) else "scale": value}


def parse_channels(text: str | None) -> tuple[int, ...] | None:
    """Channels of --channels."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--channels are whole numbers with commas between, such as 2,0,1, got {text!r}.") from None


def parse_intensity(text: str | None) -> tuple[float, float] | Literal["auto"] | None:
    """Range of --intensity."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--intensity is two numbers such as 0,4095, or auto, got {text!r}.") from None
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
        raise ConfigError(f"--device {name} can't be used here ({reason}); leave it out, or say cpu.") from error
    return device
