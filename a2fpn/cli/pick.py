"""``a2fpn data pick``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from a2fpn._text import count_of
from a2fpn.cli.format import progress_bar
from a2fpn.cli.options import Device, Model, Output, Tile, build_predictor, load_detector
from a2fpn.errors import ConfigError

_TABLE = "picked.csv"
_SHOWN = 0.3  # score from which an object is drawn: the unsure ones are what matters


def pick(
    *,
    model: Model,
    images: Annotated[Path, typer.Option(help="Folder of images to pick from.", metavar="DIR")],
    number: Annotated[int, typer.Option(min=1, help="Number of images to pick.")] = 20,
    labeled: Annotated[
        list[Path] | None,
        typer.Option(
            help="COCO file of already labeled images: exclude them, and rank images similar to them last. Repeatable.",
            metavar="JSON",
        ),
    ] = None,
    output: Output = Path("picked"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Allow an output folder that is not empty.")] = False,
    tile: Tile = None,
    device: Device = None,
) -> None:
    """Pick the images most worth labeling: uncertain detections, and content unlike the other picks.

    Example: `a2fpn data pick --model runs/cells/best --images photos --number 20 --output picked`

    Writes to DIR: links to the images in `images/`, the table `picked.csv` in order of picking, and the picture
    `grid.png` of the detections (score 0.3 or higher).

    From the 4 N most uncertain images (sum of squared 1-vs-2 margins, Brust et al. 2019), picks N one by one, each the
    least similar to those before (greedy k-center on backbone features, Sener and Savarese 2018), in two stages as in
    PPAL (Yang et al. 2024). To pre-label them: `a2fpn predict DIR/images --format labelme`.
    """
    from a2fpn.data import read_coco
    from a2fpn.data.importers.placing import check_output, place
    from a2fpn.inference import list_images
    from a2fpn.inference.picking import pick_images
    from a2fpn.report.compare import show
    from a2fpn.report.sheet import save_gallery

    files = list_images(images)
    check_output(output, overwrite=overwrite)
    listed = [entry.file_name for file in labeled or () for entry in read_coco(file).images.values()]
    done = {(images / name).resolve() for name in listed}
    rest = [path for path in files if path.resolve() not in done]
    if number > len(rest):
        raise ConfigError(f"{images} holds {count_of(len(rest), 'image')} without labels, but --number is {number}.")
    predictor = build_predictor(load_detector(model), device, optimize=False, dtype="float32", tile=tile)
    known = [path for path in files if path.resolve() in done]
    with progress_bar() as progress:

        def track(paths: Sequence[Path], description: str) -> Iterable[Path]:
            return progress.track(paths, description=description)

        picked = pick_images(predictor, rest, number, labeled=known, track=track)
    (output / "images").mkdir(parents=True, exist_ok=True)
    if (output / _TABLE).is_file():  # of the picks before; other links in the folder are not ours
        with (output / _TABLE).open(encoding="utf-8", newline="") as file:
            links = [output / "images" / Path(row.get("image") or "").name for row in csv.DictReader(file)]
        for link in filter(Path.is_symlink, links):
            link.unlink()
    for one in picked:
        place(one.path, output / "images" / one.path.name, "link")
    with (output / _TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "uncertainty", "distance", "objects"])
        for one in picked:
            table.writerow([one.path.name, f"{one.uncertainty:.3f}", f"{one.distance:.4f}", len(one.result)])
    note = f"Images to label: the most uncertain and most diverse of {count_of(len(rest), 'image')}, in "
    note += "picking order. Uncertainty is 1 for an object of score 0.5, and 0 for one of score 0 or 1."
    remarks = [f"uncertainty {one.uncertainty:.1f}" for one in picked]
    sheet = show(Path(model).name, [one.result.above(_SHOWN) for one in picked], remarks, note)
    grid, *_ = save_gallery(sheet, output / "grid")
    typer.echo(
        f"Picked {len(picked)} of {count_of(len(rest), 'image')}; links are in {output / 'images'}.\nOpen {grid}"
    )
