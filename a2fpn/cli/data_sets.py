"""``a2fpn data import | convert | split | merge | subset | rename | stats``: data sets brought into shape."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from a2fpn._text import count_of
from a2fpn.cli.format import progress_bar, say, write_json
from a2fpn.cli.options import Json as SaveJson
from a2fpn.cli.options import Quiet
from a2fpn.errors import DataError

T = TypeVar("T")

_OPENED = 200  # image files that the check after a command looks into

Source = Annotated[Path, typer.Argument(help="Data set folder, or a file such as data.yaml.", metavar="DIR")]
Json = Annotated[Path, typer.Argument(help="COCO annotation file.", metavar="JSON")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Output folder.", metavar="DIR")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="Output COCO file.", metavar="JSON")]
Format = Annotated[str, typer.Option("--from", help="Source format; auto detects it.", metavar="FORMAT")]
Images = Annotated[Literal["link", "copy"], typer.Option(help="Link or copy the images.")]
Val = Annotated[float, typer.Option(min=0, max=1, help="Fraction of images for validation.")]
Test = Annotated[float, typer.Option(min=0, max=1, help="Fraction of images for testing.")]
GroupBy = Annotated[
    str,
    typer.Option(
        metavar="REGEX",
        help="Keep images in one split if this matches the same text in their names, such as "
        r"`site_(\d+)`.",
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Classes = Annotated[
    Path | None,
    typer.Option("--categories", help="Class list: a COCO file, or one name per line.", metavar="FILE"),
]
Category = Annotated[str, typer.Option(help="Class name for mask formats without classes.", metavar="NAME")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if any information would be lost.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files.")]
ImageFolder = Annotated[
    Path | None, typer.Option("--images", help="Image folder, for the check after writing.", metavar="DIR")
]


def import_(
    source: Source,
    *,
    output: OutputFolder,
    format: Format = "auto",
    images: Images = "link",
    val: Val = 0.0,
    test: Test = 0.0,
    group_by: GroupBy = "",
    seed: Seed = 0,
    categories: Classes = None,
    category: Category = "",
    unlabeled: Annotated[
        Literal["auto", "keep", "skip"],
        typer.Option(help="Keep images without labels as background, or skip them; auto keeps them for YOLO only."),
    ] = "auto",
    box_masks: Annotated[
        bool, typer.Option("--box-masks", help="Convert boxes to rectangular masks if other objects have masks.")
    ] = False,
    strict: Strict = False,
    overwrite: Overwrite = False,
    check: Annotated[bool, typer.Option(help="Check the result, including near-duplicates across splits.")] = True,
    quiet: Quiet = False,
    save: SaveJson = None,
) -> None:
    r"""Import labels from another format as a COCO data set.

    Formats: coco, cvat, datumaro, geojson (QuPath), labelme, labels (label images), labelstudio, mask_files,
    panoptic, via, voc, yolo.

    Example: `a2fpn data import labels/ --output coco/ --val 0.2 --group-by 'site_(\d+)'`

    Prints what was imported and what was lost; `import_report.json` has the details per file.
    """
    from a2fpn.data.importers import import_data

    quiet = quiet or str(save) == "-"
    with progress_bar(quiet=quiet, transient=True) as progress:
        report = import_data(
            source,
            output,
            format=format,
            images=images,
            val=val,
            test=test,
            group_by=group_by,
            seed=seed,
            categories=categories,
            category=category,
            unlabeled=unlabeled,
            box_masks=box_masks,
            strict=strict,
            overwrite=overwrite,
            track=_Track(progress),
        )
    write_json(report.to_dict(), save)
    say(report, quiet=quiet)
    if check and not quiet:
        files = {split: output / "annotations" / f"instances_{split}.json" for split in report.splits}
        _check(files, output / "images")


def convert(
    source: Source,
    *,
    to: Annotated[str, typer.Option(help="Target format.", metavar="FORMAT")],
    output: OutputFolder,
    format: Format = "auto",
    images: Images = "link",
    categories: Classes = None,
    category: Category = "",
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a data set, usually a COCO folder, to another format.

    Formats: cvat, datumaro, labelme, labels (label images), labelstudio, mask_files, panoptic, voc, yolo.

    Example: `a2fpn data convert coco/ --to labelme --output labelme/`
    """
    from a2fpn.data.exporters import convert_data

    with progress_bar(transient=True) as progress:
        report = convert_data(
            source,
            output,
            to=to,
            format=format,
            images=images,
            categories=categories,
            category=category,
            strict=strict,
            overwrite=overwrite,
            track=_Track(progress),
        )
    typer.echo(report)


def split(
    source: Json,
    *,
    output: OutputFolder,
    val: Val = 0.2,
    test: Test = 0.0,
    group_by: GroupBy = "",
    seed: Seed = 0,
    images: ImageFolder = None,
    overwrite: Overwrite = False,
) -> None:
    r"""Split a COCO file by image into instances_train.json, instances_val.json and instances_test.json.

    Example: `a2fpn data split all.json --output coco/annotations --val 0.2 --group-by 'site_(\d+)'`

    The split depends only on image names, not on their order.
    """
    from a2fpn.data.operations import save_coco, split_coco

    parts = split_coco(source, val=val, test=test, group_by=group_by, seed=seed)
    files = {name: output / f"instances_{name}.json" for name in parts}
    for name, part in parts.items():
        save_coco(part, files[name], overwrite=overwrite)
        typer.echo(f"{files[name]}: {len(part['images'])} images, {len(part['annotations'])} annotations")
    _check(files, images)


def merge(
    sources: Annotated[list[Path], typer.Argument(help="COCO annotation files.", metavar="JSON JSON ...")],
    *,
    output: OutputFile,
    rename: Annotated[
        list[str] | None,
        typer.Option(help="Rename a class before merging; repeatable.", metavar="OLD=NEW"),
    ] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(help="Prefix for file names; give one per input file.", metavar="FOLDER/")
    ] = None,
    images: ImageFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge COCO files; classes with the same name are combined.

    Example: `a2fpn data merge a.json b.json --rename automobile=car --prefix a/ --prefix b/ --output all.json`
    """
    from a2fpn.data.operations import merge_coco, save_coco

    merged = merge_coco(sources, rename=_pairs(rename or []), prefixes=prefix or ())
    _save(merged, output, images, overwrite=overwrite, save=save_coco)


def subset(
    source: Json,
    *,
    output: OutputFile,
    category: Annotated[list[str] | None, typer.Option(help="Class to keep; repeatable.", metavar="NAME")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image to keep, or a pattern such as 'site_1/*'; repeatable.", metavar="NAME"),
    ] = None,
    number: Annotated[int | None, typer.Option(min=1, help="Number of images to keep, chosen by name.")] = None,
    seed: Seed = 0,
    min_size: Annotated[
        float, typer.Option(min=0, help="Minimum object size in pixels (square root of box area).")
    ] = 0.0,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Drop images without objects.")] = False,
    images: ImageFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Extract classes or images from a COCO file.

    Example: `a2fpn data subset train.json --category car --number 50 --output few.json`
    """
    from a2fpn.data.operations import save_coco, subset_coco

    part = subset_coco(
        source, categories=category, images=image, number=number, seed=seed, min_size=min_size, drop_empty=drop_empty
    )
    _save(part, output, images, overwrite=overwrite, save=save_coco)


def rename(
    source: Json,
    names: Annotated[list[str], typer.Argument(help="Classes to rename.", metavar="OLD=NEW ...")],
    *,
    output: OutputFile,
    images: ImageFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Rename classes in a COCO file; classes given the same name are combined.

    Example: `a2fpn data rename train.json van=car automobile=car --output renamed.json`
    """
    from a2fpn.data.operations import rename_categories, save_coco

    renamed = rename_categories(source, _pairs(names))
    _save(renamed, output, images, overwrite=overwrite, save=save_coco)


def stats(
    source: Json,
    *,
    plot: Annotated[Path | None, typer.Option(help="Save a plot of the histograms.", metavar="PNG")] = None,
    save: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to a JSON file.", metavar="OUT")
    ] = None,
) -> None:
    """Show statistics of a COCO file: objects per class, object sizes and objects per image.

    Example: `a2fpn data stats coco/annotations/instances_train.json --plot stats.png`
    """
    from a2fpn.data.stats import coco_stats

    found = coco_stats(source)
    record = found.to_dict()
    typer.echo(f"{source}: {found.images} images, {found.annotations} objects, {found.crowds} crowds")
    table = Table("class")
    table.add_column("objects", justify="right")
    for name, count in found.classes.items():
        table.add_row(name, str(count))
    Console().print(table)
    table = Table("share of all below")
    for heading in record["sizes"]:
        table.add_column(f"{float(heading):.0%}", justify="right")
    for label, key in {"size, pixels": "sizes", "objects in an image": "densities"}.items():
        table.add_row(label, *("" if value is None else f"{value:g}" for value in record[key].values()))
    Console().print(table)
    if save is not None:
        save.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from a2fpn.data.plots import draw_stats

        draw_stats(found, plot, title=str(source))
        typer.echo(f"Open {plot}")


def register(app: typer.Typer) -> None:
    """Add the commands to ``a2fpn data``."""
    app.command(name="import")(import_)
    for command in (convert, split, merge, subset, rename, stats):
        app.command()(command)


class _Track:
    """Shows loops on a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Give the items on, one by one."""
        tracked: Iterable[T] = self.progress.track(items, total=total or None, description=description)
        return tracked


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise DataError(f"expected OLD=NEW, such as van=car, got {text!r}.")
        pairs[old] = new
    return pairs


def _save(data: Any, output: Path, images: Path | None, *, overwrite: bool, save: Any) -> None:
    save(data, output, overwrite=overwrite)
    nouns = {"images": "image", "annotations": "annotation", "categories": "class"}
    counts = ", ".join(count_of(len(data[key]), noun) for key, noun in nouns.items())
    typer.echo(f"{output}: {counts}")
    _check({"": output}, images)


def _check(files: dict[str, Path], images: Path | None) -> None:
    """Check what was written; print errors and warnings."""
    from a2fpn.data import check_data

    train = files.get("train")
    with progress_bar(transient=True) as progress:
        for name, path in files.items():
            against = train if train is not None and name != "train" else None
            report = check_data(
                images,
                path,
                against=against,
                against_is="training",
                sample=_OPENED,
                duplicates=against is not None and images is not None,
                track=_Track(progress),
            )
            found = [*report.errors, *report.warnings]
            counts = f"{count_of(len(report.errors), 'error')}, {count_of(len(report.warnings), 'warning')}"
            typer.echo(f"check of {path}: {counts}")
            for finding in found:
                typer.echo(finding)
