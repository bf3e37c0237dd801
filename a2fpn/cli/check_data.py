"""``a2fpn check-data``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from a2fpn.cli.fixing import check_output, write_fixed
from a2fpn.cli.format import progress_bar, say, write_json
from a2fpn.cli.options import Json, Quiet
from a2fpn.errors import ConfigError, DataError

T = TypeVar("T")

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_data(
    *,
    annotations: Annotated[Path, typer.Option(help="COCO annotation file to check.", metavar="JSON")],
    images: Annotated[
        Path | None, typer.Option(help="Image folder; if omitted, check the JSON only.", metavar="DIR")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Annotations of another split, such as validation; classes must match.", metavar="JSON"),
    ] = None,
    duplicates: Annotated[
        bool,
        typer.Option("--duplicates", help="Find near-duplicate images across splits (needs --images and --against)."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or name from `a2fpn list`: match its classes, if any, and check object sizes "
            "against its input size and anchors.",
            metavar="NAME_OR_PATH",
        ),
    ] = None,
    min_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Input size, short side; default: the model's, else 800."),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Input size, maximum long side; default: the model's, else 1333."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Open only N image files, evenly spaced over the list.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode images fully, not just headers, to detect truncated files.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Save a plot of 12 annotated images, those with findings first."),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.json",
            help="Write a repaired copy and a list of changes: areas, boxes from masks, boxes clipped to the image, "
            "invalid mask parts, duplicate ids, iscrowd, byte order mark, paths. Report on the copy.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Allow --fix to overwrite existing files.")] = False,
    save: Json = None,
    quiet: Quiet = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 on warnings too.")] = False,
) -> None:
    """Check a data set for errors before training.

    Example: `a2fpn check-data --images cells/train --annotations cells/train.json --against cells/val.json`

    Check against a model and plot samples: `... --model maskrcnn_a2fpn_r50 --plot look.png`

    Finds mismatched categories, classes without objects or with crowds only, boxes and masks that are empty, outside
    the image or inconsistent, duplicate ids, image files that are missing, corrupt, rotated by EXIF or of another size,
    and objects too small for the input or the anchors. Lists the number of objects per class.

    Repair unambiguous errors: `... --fix repaired.json` writes a copy and a list of changes.

    Exit codes: 0 no errors, 1 errors found, 2 wrong usage.
    """
    from a2fpn import data

    if plot is not None and images is None:
        raise ConfigError("--plot draws on the images: give --images too.")
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {plot}: expected a name that ends in {', '.join(PICTURES)}.")
    if duplicates and (images is None or against is None):
        raise ConfigError("--duplicates compares the images of two splits: give --images and --against too.")
    if fix is not None:
        check_output(annotations, fix, overwrite=overwrite)
    _check_format(annotations)
    facts = _model_facts(model, min_size, max_size)
    quiet = quiet or str(save) == "-"
    if fix is not None:
        write_fixed(annotations, images, fix, quiet=quiet)
        annotations = fix
    with progress_bar(quiet=quiet) as progress:

        def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
            return progress.track(items, total=total, description=description)

        report = data.check_data(
            images,
            annotations,
            against=against,
            sample=sample,
            decode=decode,
            examples=12 if plot else 0,
            duplicates=duplicates,
            track=track,
            **facts,
        )
    text = Text(str(report))
    for word, style in {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}.items():
        text.highlight_regex(rf"(?m)^{word}\b", style)
    if not quiet:
        Console().print(text, soft_wrap=True)
    write_json(report.to_dict(), save)
    if save is not None:
        say(f"The report is in {save}", quiet=quiet)
    if plot is not None and images is not None and report.examples:
        from a2fpn.inference.report import draw_report

        draw_report(report, images).save(plot)
        say(f"Open {plot}", quiet=quiet)
    if report.errors or (strict and report.warnings):
        raise typer.Exit(1)


def _check_format(annotations: Path) -> None:
    """Stop at labels of another format, and say how to import them.

    Raises:
        ConfigError: With the format and the command.
    """
    from a2fpn.data.importers import detect

    if annotations.is_file() and annotations.suffix.lower() == ".json":
        try:
            head = json.loads(annotations.read_bytes())
        except (ValueError, RecursionError):
            return
        if not isinstance(head, dict) or {"images", "annotations", "categories"} & set(head):
            return  # a COCO file, or one that means to be
    elif not annotations.exists():
        return
    try:
        found = detect(annotations)
    except DataError:
        found = ""
    kind = "is a folder" if annotations.is_dir() else "is not a COCO file"
    if found and found != "coco":
        kind = f"holds {found} labels" if annotations.is_dir() else f"belongs to {found} labels"
    source = annotations if annotations.is_dir() else annotations.parent
    raise ConfigError(
        f"{annotations} {kind}; this command reads COCO JSON. Import the data set first: "
        f"a2fpn data import {source} --output {source.resolve().name}_coco"
    )


def _model_facts(name: str | None, min_size: int | None, max_size: int | None) -> dict[str, Any]:
    """Return the arguments of :func:`a2fpn.data.check_data` that depend on a model."""
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
