"""The command line: ``a2fpn demo | predict | evaluate | check-data | list | info``.

What a user got wrong ends with one line and exit code 2; a traceback means that the package is to blame.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch.utils.flop_counter import FlopCounterMode
from typer.core import TyperGroup

from a2fpn._version import __version__
from a2fpn.config import KeypointRCNNConfig

if TYPE_CHECKING:
    from a2fpn.data import CocoDataset
    from a2fpn.detectors import Detector
    from a2fpn.evaluation import CocoMetrics
    from a2fpn.inference import Predictor
    from a2fpn.weights import PretrainedModel

T = TypeVar("T")

DEMO_MODEL = "maskrcnn_a2fpn_lite0.nuclei"
DEMO_DATA = Path(str(resources.files("a2fpn"))) / "assets" / "nuclei_demo"
INFO_SIZE = (480, 640)  # height and width of the image for which `info` counts operations

METRICS = {
    "ap": "AP, mean of IoU 0.50 to 0.95",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects",
    "ar1": "AR, 1 detection per image",
    "ar10": "AR, 10 detections per image",
    "ar100": "AR, {max_detections} detections per image",
    "ar": "AR of keypoints, mean of OKS 0.50 to 0.95",
    "ar50": "AR of keypoints at OKS 0.50",
    "ar75": "AR of keypoints at OKS 0.75",
    "ar_small": "AR, small objects",
    "ar_medium": "AR, medium objects",
    "ar_large": "AR, large objects",
}


class _Commands(TyperGroup):
    """Turns what is the user's to mend into one line; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, TypeError, ValueError) as error:
            if ctx.params["debug"] or not _is_for_users(error):
                raise
            typer.echo(f"a2fpn: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


def _is_for_users(error: Exception) -> bool:
    """Whether the message was written by this package or is about files."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in: str = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, OSError) or raised_in.startswith("a2fpn.")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Option(help="A checkpoint folder, or a name of `a2fpn list --pretrained`.", metavar="NAME_OR_PATH")
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
MostObjects = Annotated[
    int | None,
    typer.Option(
        "--detections-per-image", min=1, help="Most objects of an image, or of a tile; by default the model's."
    ),
]
Optimize = Annotated[
    bool, typer.Option("--optimize", help="Fold the model for speed first: same results up to rounding.")
]
Precision = Annotated[
    Literal["float32", "bf16"],
    typer.Option(help="bf16 (implies --optimize) is up to twice as fast where the processor knows it, and rounds."),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    app(args=argv, prog_name="a2fpn")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"a2fpn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="A2FPN_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Object detection and instance segmentation with A²-FPN and other pyramids on any backbone of timm.

    Start with `a2fpn demo`.
    """


@app.command()
def demo(
    *,
    output: Output = Path("a2fpn_demo"),
    score_threshold: Threshold = 0.5,
    device: Device = None,
) -> None:
    """Segment the nuclei in microscopy images that come with the package.

    Example: `a2fpn demo --output a2fpn_demo`
    """
    import a2fpn
    from a2fpn.data import read_coco
    from a2fpn.evaluation import evaluate_coco
    from a2fpn.inference import Predictor

    coco = read_coco(DEMO_DATA / "annotations.json")
    predictor = Predictor(a2fpn.create_model(DEMO_MODEL, pretrained=True), device=_device(device))
    limit = predictor.model.config.heads.detections_per_image
    output.mkdir(parents=True, exist_ok=True)

    table = _table("image", "objects found", "annotated", "mask AP", "ms")
    records: list[dict[str, Any]] = []
    found: dict[Path, int] = {}
    with _progress() as progress:
        for entry in progress.track(list(coco.images.values()), description="segmenting"):
            path = DEMO_DATA / "images" / entry.file_name
            if not found:
                predictor(path)  # the first run of a process also sets up kernels and memory
            start = time.perf_counter()
            (result,) = predictor([path])
            milliseconds = 1000 * (time.perf_counter() - start)
            detections = result.to_coco(entry.id)
            truth = coco.annotations[entry.id]
            alone = dataclasses.replace(coco, images={entry.id: entry}, annotations={entry.id: truth})
            metrics = evaluate_coco(alone, detections, iou_types=["segm"], max_detections=limit)
            picture = output / f"{path.stem}.png"
            result.plot(score_threshold=score_threshold).save(picture)
            found[picture] = len(result.above(score_threshold))
            table.add_row(path.name, str(found[picture]), str(len(truth)), _ap(metrics, "segm"), f"{milliseconds:.0f}")
            records += detections
    metrics = evaluate_coco(coco, records, iou_types=["segm"], max_detections=limit)
    annotated = sum(map(len, coco.annotations.values()))
    table.add_section()
    table.add_row("all", str(sum(found.values())), str(annotated), _ap(metrics, "segm"), "")
    Console().print(table)
    typer.echo(f"{DEMO_MODEL}; objects found with a score of {score_threshold} or more. Pictures are in {output}")
    typer.echo(f"Open {max(found, key=lambda picture: found[picture])}")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.", metavar="IMAGE_OR_FOLDER")],
    *,
    model: Model,
    output: Output = Path("predictions"),
    score_threshold: Threshold = 0.5,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    detections_per_image: MostObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    device: Device = None,
) -> None:
    """Find objects in images: a picture for each, and all results as COCO JSON.

    Example: `a2fpn predict photos/ extra.jpg --model runs/cells --output found`

    A slide of many thousand pixels: `a2fpn predict slide.png --model runs/cells --tile 1024`

    The file `predictions.json` is a list of COCO results, to which `file_name` is added. Where all file names are
    numbers, as in COCO, these are the image ids; otherwise images count from 1.
    """
    from a2fpn.data import ImageError

    paths = _image_files(images)
    if output.resolve() in {path.resolve().parent for path in paths}:
        raise ValueError(f"--output {output} is a folder that images are read from; choose another one.")
    predictor = _predictor(
        _load(model),
        device,
        optimize=optimize,
        dtype=dtype,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        soft_nms=soft_nms or False,
        detections_per_image=detections_per_image,
        tile=tile,
        overlap=overlap,
        tta=tta,
    )
    output.mkdir(parents=True, exist_ok=True)
    jobs = list(zip(paths, _image_ids(paths), _picture_files(paths, output), strict=True))

    records: list[dict[str, Any]] = []
    found: dict[Path, int] = {}
    seconds: list[float] = []
    with _progress() as progress:
        for path, image_id, picture in progress.track(jobs, description="predicting"):
            start = time.perf_counter()
            try:
                (result,) = predictor([path])
            except ImageError as error:
                if len(jobs) == 1:
                    raise
                typer.echo(f"a2fpn: skipped {error}", err=True)
                continue
            seconds.append(time.perf_counter() - start)
            records += [record | {"file_name": path.name} for record in result.to_coco(image_id)]
            result.plot(score_threshold=0).save(picture)
            found[picture] = len(result)
    if not found:
        raise ValueError(f"None of the {len(jobs)} images could be read.")
    results = output / "predictions.json"
    results.write_text(json.dumps(records), encoding="utf-8")
    skipped = len(jobs) - len(found)
    typer.echo(
        f"Found {_count(len(records), 'object')} in {_count(len(found), 'image')}"
        f"{f' ({skipped} more could not be read)' if skipped else ''}, "
        f"{1000 * statistics.median(seconds):.0f} ms per image. All results are in {results}\n"
        f"Open {max(found, key=lambda picture: found[picture])}"
    )


@app.command()
def evaluate(
    *,
    model: Model,
    images: Annotated[Path, typer.Option(help="Folder of the images.", metavar="DIR")],
    annotations: Annotated[Path, typer.Option(help="COCO file with the ground truth.", metavar="JSON")],
    max_detections: Annotated[
        int, typer.Option(min=1, help="Best detections that count per image and class; COCO says 100.")
    ] = 100,
    save: Annotated[Path | None, typer.Option("--json", help="File to write the numbers to.", metavar="OUT")] = None,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    detections_per_image: MostObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    device: Device = None,
    oks_sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="How precisely people place each keypoint, in units of the object's size; by default those of COCO's "
            "17 keypoints.",
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "hotcoco", "faster-coco-eval", "pycocotools"],
        typer.Option(help="What counts: by default hotcoco. All agree; pycocotools is the reference, and slow."),
    ] = "auto",
) -> None:
    """Measure a model on annotated images: the COCO numbers for boxes, masks and keypoints, and AP per class.

    Example: `a2fpn evaluate --model runs/cells --images cells/val --annotations cells/val.json`

    What the model predicts and the file has annotated is measured. Categories are matched by id. An image that can't
    be read is an error: left out, it would count as missed.
    """
    from a2fpn.data import CocoDataset, read_image
    from a2fpn.evaluation import COCO_SIGMAS, common_iou_types, evaluate_coco

    detector = _load(model)
    dataset = CocoDataset(images, annotations, categories=detector.config.categories or None)
    _check_categories(detector, dataset)
    kinds = common_iou_types(dataset.coco, detector.target_keys)
    if "keypoints" in kinds:
        _check_keypoints(detector, dataset)
    predictor = _predictor(
        detector,
        device,
        optimize=optimize,
        dtype=dtype,
        nms_threshold=nms_threshold,
        soft_nms=soft_nms or False,
        detections_per_image=detections_per_image,
        tile=tile,
        overlap=overlap,
        tta=tta,
    )
    predictor.categories = dataset.categories
    known = {category.id for category in dataset.coco.categories}

    def records() -> Iterator[dict[str, Any]]:
        with _progress() as progress:
            for entry in progress.track(list(dataset.coco.images.values()), description="evaluating"):
                (result,) = predictor.predict([read_image(images / entry.file_name, size=(entry.height, entry.width))])
                yield from (record for record in result.to_coco(entry.id) if record["category_id"] in known)

    metrics = evaluate_coco(
        dataset.coco,
        records(),
        iou_types=kinds,
        max_detections=max_detections,
        oks_sigmas=COCO_SIGMAS if oks_sigmas is None else _numbers(oks_sigmas),
        backend=backend,
    )
    _print_metrics(metrics, title=f"{model} on {_count(len(dataset), 'image')}")
    if save is not None:
        numbers = {"max_detections": max_detections, **metrics.to_dict(per_class=True)}
        save.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"The numbers are in {save}")


@app.command(name="check-data")
def check_data(
    *,
    annotations: Annotated[Path, typer.Option(help="COCO file to check.", metavar="JSON")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; without it only the JSON is checked.", metavar="DIR")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The other split, say of validation: classes must agree.", metavar="JSON")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint folder or a name of `a2fpn list`: its classes, if it has any, must fit, and sizes are "
            "judged by its input size and anchors.",
            metavar="NAME_OR_PATH",
        ),
    ] = None,
    min_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Short side of the input; by default the model's, or 800."),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Limit of the long side; by default the model's, or 1333."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Open only so many image files, evenly spread over the list.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every pixel, which finds truncated files, instead of headers only.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw 12 annotated images, those with findings first, into this file."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--json", help="File to write the report to.", metavar="OUT")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
) -> None:
    """Find what is wrong with a data set before training on it.

    Example: `a2fpn check-data --images cells/train --annotations cells/train.json --against cells/val.json`

    Would training see the right thing? `... --model maskrcnn_a2fpn_r50 --plot look.png`

    Looks for categories that mean different things, classes without objects, objects that are all crowds, boxes and
    masks that lie elsewhere or hold nothing, ids used twice, files that are missing, broken, turned or of another
    size, and objects too small for the input or the anchors. Lists what there is of each class.

    Exit code: 0 without errors, 1 with errors, 2 if the command was wrong.
    """
    from a2fpn import data

    if plot is not None and images is None:
        raise ValueError("--plot draws on the images: give --images too.")
    facts = _model_facts(model, min_size, max_size)
    with _progress() as progress:

        def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
            return progress.track(items, total=total, description=description)

        report = data.check_data(
            images,
            annotations,
            against=against,
            sample=sample,
            decode=decode,
            examples=12 if plot else 0,
            track=track,
            **facts,
        )
    text = Text(str(report))
    for word, style in {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}.items():
        text.highlight_regex(rf"(?m)^{word}\b", style)
    Console().print(text, soft_wrap=True)
    if save is not None:
        save.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        typer.echo(f"The report is in {save}")
    if plot is not None and images is not None and report.examples:
        from a2fpn.visualize import draw_report

        draw_report(report, images).save(plot)
        typer.echo(f"Open {plot}")
    if report.errors or (strict and report.warnings):
        raise typer.Exit(1)


def _model_facts(name: str | None, min_size: int | None, max_size: int | None) -> dict[str, Any]:
    """What a check of data needs to know of a model, as arguments of :func:`a2fpn.data.check_data`."""
    import a2fpn
    from a2fpn.config import PreprocessConfig
    from a2fpn.heads import StrideAnchors
    from a2fpn.preprocess import Preprocess

    facts: dict[str, Any] = {}
    preprocess = PreprocessConfig()
    if name is not None:
        detector = a2fpn.from_pretrained(name) if Path(name).is_dir() else a2fpn.create_model(name)
        preprocess = detector.config.preprocess
        facts["categories"] = detector.config.categories
        if hasattr(detector.config.heads, "anchor_sizes"):  # FCOS has no anchors, only points
            anchors = next(module for module in detector.modules() if isinstance(module, StrideAnchors))
            facts |= {"anchor_sizes": anchors.sizes, "anchor_ratios": anchors.aspect_ratios[0]}
    preprocess = dataclasses.replace(
        preprocess, min_size=min_size or preprocess.min_size, max_size=max_size or preprocess.max_size
    )
    return facts | {"target_size": Preprocess(preprocess, divisor=1).target_size}


@app.command(name="list")
def list_names(
    pattern: Annotated[
        str, typer.Argument(help='Part of a name, or a pattern such as "mask*_r50".', metavar="FILTER")
    ] = "",
    *,
    necks: Annotated[bool, typer.Option("--necks", help="List necks.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="List models with pretrained weights.")] = False,
) -> None:
    """List models, necks or pretrained weights, one a line.

    Example: `a2fpn list "maskrcnn_a2fpn_*"`

    With `--pretrained` each line also says where the weights come from, whether they were trained as they are or
    grafted on another neck (to be fine-tuned), their AP on the data of their source, and their licence.

    The backbone may also be any other model of timm, written out: `maskrcnn_a2fpn_convnext_small.fb_in22k`.
    """
    import a2fpn

    if pretrained:
        names = _columns(map(_pretrained_line, a2fpn.list_pretrained(pattern)))
    else:
        names = a2fpn.list_necks(pattern) if necks else a2fpn.list_models(pattern)
    if not names:
        raise ValueError(f"Nothing here matches {pattern!r}; without a filter everything is listed.")
    typer.echo("\n".join(names))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A name of `a2fpn list`, or a checkpoint folder.", metavar="MODEL")],
) -> None:
    """Show what a model is made of and what it costs. Nothing is downloaded.

    Example: `a2fpn info maskrcnn_a2fpn_r50`
    """
    import a2fpn
    from a2fpn.checkpoint import read_checkpoint
    from a2fpn.weights import PRETRAINED, WeightsConfig

    weights = PRETRAINED.get(model)
    folder = weights.folder if isinstance(weights, WeightsConfig) else Path(model)
    detector = a2fpn.from_pretrained(folder) if folder.is_dir() else a2fpn.create_model(model).eval()
    config = detector.config
    preprocess = config.preprocess
    categories = [category.name for category in config.labelled_categories]
    facts = {
        "detector": config.detector,
        "neck": f"{config.neck.name} {_as_text(config.neck.args)}",
        "backbone": config.backbone.name,
        "resize": f"{preprocess.resize}, sides of {preprocess.min_size} to {preprocess.max_size} px, "
        f"padded to multiples of {detector.preprocess.divisor}",
        "mean": _as_text(preprocess.mean),
        "std": _as_text(preprocess.std),
        "categories": f"{len(categories)}: {_as_text(categories[:10])}{', ...' if len(categories) > 10 else ''}",
    }
    if folder.is_dir():
        facts |= {key: _as_text(value) for key, value in read_checkpoint(folder).metadata.items()}
    elif weights is not None:
        row = next(row for row in a2fpn.list_pretrained(model) if row.name == model)
        facts |= {
            "weights": row.origin,
            "kind": "trained" if row.trained else "grafted, to be fine-tuned",
            "AP": f"{', '.join(filter(None, _aps(row)))} ({row.measured})",
            "licence": row.licence,
        }
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for key, text in facts.items():
        grid.add_row(key, escape(text))
    typer.echo(config.architecture)
    console.print(grid)
    _print_cost(detector)
    typer.echo("\nPyramid")
    pyramid = _table("level", "stride", "channels")
    for name in detector.neck.out_spec.names:
        level = detector.neck.out_spec[name]
        pyramid.add_row(name, str(level.stride), str(level.channels))
    console.print(pyramid)


def _aps(row: PretrainedModel) -> list[str]:
    """Box, mask and keypoint AP of pretrained weights; empty where there is none."""
    values = {"box": row.box_ap, "mask": row.mask_ap, "keypoint": row.keypoint_ap}
    return ["" if ap is None else f"{kind} {ap:.3f}" for kind, ap in values.items()]


def _pretrained_line(row: PretrainedModel) -> list[str]:
    return [row.name, row.source, "trained" if row.trained else "grafted", *_aps(row), f"licence: {row.licence}"]


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text with the columns one below the other."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _progress() -> Progress:
    """A progress bar on standard error, so that standard output stays clean."""
    return Progress(console=Console(stderr=True))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _load(source: str) -> Detector:
    """A detector with its weights."""
    import a2fpn

    return a2fpn.from_pretrained(source)


def _predictor(detector: Detector, device: str | None, *, optimize: bool, dtype: str, **options: Any) -> Predictor:
    """The detector, optimised if that is wanted, with the options of a command."""
    import a2fpn

    where = _device(device)
    if optimize or dtype == "bf16":
        ready = a2fpn.optimize_for_inference(
            detector.to(where), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        return a2fpn.Predictor(ready, channels_last=False, **options)
    return a2fpn.Predictor(detector, device=where, **options)


def _device(name: str | None) -> torch.device:
    """The device of that name, or the best there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} can't be used here ({reason}); leave it out, or say cpu.") from error
    return device


def _image_files(sources: Sequence[Path]) -> list[Path]:
    """The given files, and the images of the given folders."""
    from a2fpn.inference import list_images

    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder.")
    groups = [list_images(source) if source.is_dir() else [source] for source in sources]
    return list(itertools.chain.from_iterable(groups))


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """COCO image ids: the file names where they are different numbers, else 1, 2, ..."""
    numbers = {int(path.stem) for path in paths if path.stem.isdecimal()}
    return [int(path.stem) for path in paths] if len(numbers) == len(paths) else list(range(1, len(paths) + 1))


def _picture_files(paths: Sequence[Path], output: Path) -> list[Path]:
    """Where the pictures go: named as the images, numbered where names repeat."""
    names: dict[str, str] = {}  # by lower case: some file systems take both for one
    for path in paths:
        numbered = (f"{path.stem}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([path.stem], numbered) if name.lower() not in names)
        names[name.lower()] = name
    return [output / f"{name}.png" for name in names.values()]


def _check_categories(detector: Detector, dataset: CocoDataset) -> None:
    """Stops where model and data mean different things by the same category."""
    if not detector.config.categories and detector.config.num_classes != len(dataset.categories):
        raise ValueError(
            f"The model was saved without categories and has {detector.config.num_classes} classes, "
            f"{dataset.coco.name} has {len(dataset.categories)}: which is which can't be told."
        )
    names = {category.id: category.name for category in dataset.categories}
    for category in dataset.coco.categories:
        if names.get(category.id, category.name).casefold() != category.name.casefold():
            raise ValueError(
                f"Category {category.id} is {category.name!r} in {dataset.coco.name} and {names[category.id]!r} for "
                f"the model; give both the same ids and names."
            )


def _check_keypoints(detector: Detector, dataset: CocoDataset) -> None:
    """Stops where model and data have other keypoints."""
    heads, coco = detector.config.heads, dataset.coco
    assert isinstance(heads, KeypointRCNNConfig)
    if heads.num_keypoints != coco.num_keypoints:
        raise ValueError(f"The model gives {heads.num_keypoints} keypoints, {coco.name} has {coco.num_keypoints}.")
    if heads.keypoint_names and coco.keypoint_names and heads.keypoint_names != coco.keypoint_names:
        raise ValueError(
            f"The model's keypoints are {_as_text(heads.keypoint_names)}, those of {coco.name} are "
            f"{_as_text(coco.keypoint_names)}; give both the same names in the same order."
        )


def _numbers(text: str) -> list[float]:
    """Numbers of an option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected numbers with commas between, such as 0.026,0.025, got {text!r}.") from None


def _ap(metrics: CocoMetrics, kind: str, name: str = "ap") -> str:
    """A number of an evaluation for people; nothing for one that the kind of IoU doesn't have."""
    value = metrics.to_dict(per_class=True).get(f"{kind}/{name}")
    return "" if value is None else "-" if value < 0 else f"{value:.3f}"


def _print_metrics(metrics: CocoMetrics, *, title: str) -> None:
    measured = metrics.measured
    columns = [{"bbox": "boxes", "segm": "masks", "keypoints": "keypoints (OKS)"}[kind] for kind in measured]
    tables = [(title, {label.format(max_detections=metrics.max_detections): key for key, label in METRICS.items()})]
    classes = next(iter(measured.values())).per_class
    if len(classes) > 1:
        tables.append(("AP per class", {name: f"ap/{name}" for name in classes}))
    for heading, keys in tables:
        table = _table("", *columns)
        for label, key in keys.items():
            cells = [_ap(metrics, kind, key) for kind in measured]
            if any(cells):
                table.add_row(escape(label), *cells)
        typer.echo(heading)
        Console().print(table)


def _print_cost(detector: Detector) -> None:
    """Parameters of all parts, and operations of those whose work doesn't depend on what is in the image."""
    batch = detector.preprocess([torch.zeros(len(detector.config.preprocess.mean), *INFO_SIZE)])
    operations: dict[str, float] = {}

    def run(name: str, module: Callable[..., Any], *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = module(*args)
        operations[name] = counter.get_total_flops() / 2e9
        return out

    with torch.inference_mode():
        features = run("backbone", detector.backbone, batch.tensor)
        pyramid = run("neck", detector.neck, features, batch.sizes)
        pyramid = run("top", detector.add_levels, features, pyramid)
        dense = next(name for name, part in detector.named_children() if detector.dense_head in part.modules())
        run(dense, detector.dense_head, list(pyramid.values()))
    table = _table("part", "parameters", "GMACs")
    parts = dict(detector.named_children())
    roi_heads = parts.pop("roi_heads", None)
    if roi_heads is not None:
        parts |= dict(roi_heads.named_children())
    for name, module in {**parts, "all": detector}.items():
        parameters = sum(parameter.numel() for parameter in module.parameters())
        gmacs = sum(operations.values()) if name == "all" else operations.get(name)
        if parameters:
            table.add_row(name.replace("_", " "), f"{parameters / 1e6:.2f} M", f"{gmacs:.2f}" if gmacs else "")
    image, resized, padded = (
        f"{width} x {height}" for height, width in (INFO_SIZE, batch.sizes[0], batch.tensor.shape[-2:])
    )
    typer.echo(f"\nCost for an image of {image}, resized to {resized}, padded to {padded}")
    Console().print(table)
    more = "; the heads' grow with the number of proposals" if roi_heads is not None else ""
    typer.echo(f"GMACs are those of convolutions and matrix products{more}.")


def _table(label: str, *numbers: str) -> Table:
    """A table with a column of labels and columns of numbers."""
    table = Table(label)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _as_text(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_as_text, value))
    return str(value)
