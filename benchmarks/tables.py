"""Tables of README.md and docs/ that are made from the measurements in benchmarks/results.

A region between ``<!-- table:NAME -->`` and ``<!-- /table -->`` holds what :data:`TABLES` makes of NAME:

    python -m benchmarks.tables --check    # exit code 1 if a region is not what the measurements say
    python -m benchmarks.tables --write
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from a2fpn import list_pretrained
from benchmarks import round_trips as trips

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"<!-- table:(?P<name>[\w-]+) -->\n(?:(?!<!-- table:).)*?<!-- /table -->", re.DOTALL)
OPENING = "<!-- table:"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are numbers.

    Example:
        >>> print(markdown(("side", "ms"), [("ours", "12.5")]))
        | side | ms |
        | --- | ---: |
        | ours | 12.5 |
    """
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows))


def inference(document: Mapping[str, Any]) -> str:
    """Return times of detectors in evaluation mode beside torchvision's, with the goals as recorded."""
    return _beside_torchvision(document, "images to objects")


def training(document: Mapping[str, Any]) -> str:
    """Return times of training steps beside torchvision's, with the goals as recorded."""
    return _beside_torchvision(document, "training step")


def cpu_inference(document: Mapping[str, Any]) -> str:
    """Return times of detectors beside torchvision's at each size, with the goals as recorded."""
    columns = [(f"{size.replace('x', '×')}, ms", "of torchvision's", "of its same output") for size in document]
    rows = []
    for same_side in zip(*(part["rows"] for part in document.values()), strict=True):
        name, comma, how = same_side[0]["side"].partition(", ")
        cells = [f"`{name}`{comma}{how}" if name != "torchvision" else f"{name}{comma}{how}"]
        for row in same_side:
            low, high = row["range"]
            plain = f"{row['ratio']:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")
            cells += [f"{row['ms']:.0f}", plain, f"{row['same_output']:.2f} {row['same_output_goal']}".rstrip()]
        rows.append(cells)
    parts = []
    for size, part in document.items():
        versions = ", ".join(f"{name} {part['versions'][name]}" for name in ("torch", "torchvision"))
        where = f"{part['threads']} threads, {part['capability']}"
        parts.append(f"{size.replace('x', '×')}: {where}; {versions}; commit `{part['commit'][:12]}`")
    return f"{markdown(('one image to objects', *sum(columns, ())), rows)}\n\n{'. '.join(parts)}."


def throughput(document: Mapping[str, Any]) -> str:
    """Return images per second of one training and of several that share the GPU."""
    runs = [(document["one"], 1.0), (document["several"], document["ratio"])]
    rows = [(str(run["jobs"]), f"{run['images_per_second']:.1f}", f"{ratio:.2f}") for run, ratio in runs]
    return markdown(("trainings at a time", "images/s", "ratio"), rows)


def zoo(document: Mapping[str, Any]) -> str:
    """Return all pretrained weights: what is known of them, and the time of their architecture."""
    times = {row["side"]: row["ms"] for row in document["rows"] if "ms" in row}
    notes: dict[str, int] = {}
    rows = []
    for model in sorted(list_pretrained(), key=lambda one: not one.trained):  # grafts last
        values = (model.box_ap, model.mask_ap, model.keypoint_ap)
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        time = times.get(model.name.partition(".")[0])
        measured = model.measured if model.trained else "a graft, to be fine-tuned: AP is that of its source"
        note = notes.setdefault(f"{measured}; license of the weights: {model.license}.", len(notes) + 1)
        rows.append((f"`{model.name}`", *numbers, "" if time is None else f"{time:.1f}", f"{note}"))
    case = _case(next(row for row in document["rows"] if "ms" in row))
    table = markdown(("name", "box AP", "mask AP", "keypoint AP", "ms", "note"), rows)
    lines = [f"{number}. {text}" for text, number in notes.items()]
    where = f"ms: an image of {case}, on one {document['device'].partition(',')[0]}, where the architecture was timed."
    return "\n".join([table, "", *lines, "", where])


def dense_recall(document: Mapping[str, Any]) -> str:
    """Return how many objects are found of mosaics and of their parts, with memory and the exponent of time."""
    part = document["recall"]
    *mosaics, facts = part["rows"]
    rows = [
        (
            str(row["images"]),
            f"{row['objects']:,}",
            f"{row['found']:,} / {row['found_alone']:,}",
            f"{row['ratio']:.3f}",
            f"{row['seconds']:.1f}",
            f"{1000 * row['seconds'] / row['objects']:.0f}",
        )
        for row in mosaics
    ]
    few, many = (f"{number:,}" for number in facts["detections"])
    note = (
        f"Time grows with the {facts['exponent']:.2f}th power of the objects. Of {facts['images']} images side by side "
        f"{many} detections take {facts['bytes'] / 2**20:,.0f} MiB at the peak, {few} take "
        f"{facts['bytes_few'] / 2**20:,.0f}: {facts['bytes'] / facts['bytes_few']:.2f} times as much."
    )
    headings = ("images side by side", "objects", "found in the whole / alone", "ratio", "s", "ms an object")
    return f"{markdown(headings, rows)}\n\n{note} {_cpu(part)}"


def dense_tiles(document: Mapping[str, Any]) -> str:
    """Return seams, time and memory of tiles beside other slicers."""
    rows = [
        (
            f"tiles of {row['tile']}: {row['side']}",
            f"{row['objects']:,}",
            f"{100 * row['duplicates']:.2f}",
            f"{100 * row['misses']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes'] / 2**20:,.0f}",
            f"{row['memory']:.2f}",
        )
        for row in document["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in document["sides"].items())
    headings = ("", "objects", "duplicates, %", "misses, %", "s", "ours / its", "peak MiB", "ours / its")
    note = (
        f"{document['side']}×{document['side']} pixels at {document['scale']:g}×, objects of {document['extent']:.0f} "
        f"pixels; untiled {document['untiled']}, of which {document['sure']} are sure; {versions}."
    )
    return f"{markdown(headings, rows)}\n\n{note} {_cpu(document)}"


def export_times(document: Mapping[str, Any]) -> str:
    """Return times of exported files beside the detectors that they were made of, and what they find."""
    rows = []
    for record in document.values():
        sides = {row["side"]: row for row in record["rows"]}
        files = [sides[runtime] for runtime in ("onnxruntime", "openvino")]
        rows.append(
            (
                "`{}` {}".format(*record["case"].replace("x", "×").partition(" ")[::2]).rstrip(),
                str(record["threads"]),
                *(f"{sides[side]['ms']:.0f}" for side in ("eager", "optimized")),
                *(f"{row['ms']:.0f} ({row['to_optimized']:.2f})" for row in files),
                *(f"{row['objects']} / {row['expected']}" for row in files),
                f"{record['nodes']:,}",
            )
        )
    headings = (
        *("one image to objects", "threads", "eager, ms", "optimized", "ONNX Runtime", "OpenVINO"),
        *("objects, ONNX Runtime", "OpenVINO", "nodes"),
    )
    record = next(iter(document.values()))
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "torchvision"))
    note = "In brackets the share of the optimized detector's time; the goal is 1.00."
    return f"{markdown(headings, rows)}\n\n{note} {record['capability']}; {versions}; commit `{record['commit'][:12]}`."


def compiled(document: Mapping[str, Any]) -> str:
    """Return times of compiled detectors beside optimized ones, and of each size's first call."""
    rows = [
        (
            f"`{row['model']}`",
            "{}×{}".format(*row["size"]),
            f"{row['first_s']:.0f}",
            *(f"{1e3 * row[side]:.0f}" for side in ("as it is", "optimized", "compiled")),
            f"{row['to_optimized']:.2f} ({row['range'][0]:.2f}–{row['range'][1]:.2f})",
        )
        for row in document["rows"]
    ]
    headings = ("detector", "image", "first call, s", "as it is, ms", "optimized", "compiled", "compiled / optimized")
    return f"{markdown(headings, rows)}\n\nImages in this order; {_cpu(document)}"


def dense_area(document: Mapping[str, Any]) -> str:
    """Return times and memory of slides in tiles; the largest ones were measured in runs of their own."""
    parts = [document[name] for name in ("area", "area_64") if name in document]
    rows = [
        (
            str(row["megapixels"]),
            str(row["tiles"]),
            f"{row['objects']:,}",
            *(f"{row['seconds'][name]:.1f}" if name in row["seconds"] else "" for name in ("tiles", "0", "1", "2")),
            f"{row['seconds']['1'] / row['megapixels']:.2f}",
            f"{1000 * row['seconds']['1'] / max(1, row['objects']):.0f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes'] / 2**20:,.0f}",
        )
        for part in parts
        for row in part["rows"]
    ]
    readers = ("s, tiles one by one", "read by none", "1 thread", "2 threads")
    headings = ("MP", "tiles", "objects", *readers, "s/MP", "ms an object", "of the tiles' time", "peak MiB")
    return f"{markdown(headings, rows)}\n\n{' '.join(dict.fromkeys(map(_cpu, parts)))}"


def dense_torchvision(document: Mapping[str, Any]) -> str:
    """Return times and memory of many masks beside torchvision's; a later run of a case replaces the first."""
    parts = [document[name] for name in ("torchvision", "torchvision_768") if name in document]
    cases = {(row["side"], row["objects"]): row for part in parts for row in part["rows"]}
    rows = [
        (
            f"{side}×{side}, {objects:,} objects",
            *(f"{row['seconds'][whose]:.2f}" for whose in ("torchvision", "a2fpn")),
            f"{row['time']:.2f} ({row['range'][0]:.2f}–{row['range'][1]:.2f})",
            *(f"{row['bytes'][whose] / 2**20:,.0f}" for whose in ("torchvision", "a2fpn")),
            f"{row['memory']:.2f}",
        )
        for (side, objects), row in cases.items()
    ]
    headings = ("image", "torchvision, s", "ours", "ratio", "torchvision, peak MiB", "ours", "ratio")
    return f"{markdown(headings, rows)}\n\n{' '.join(dict.fromkeys(map(_cpu, parts)))}"


def reassembly(document: Mapping[str, Any]) -> str:
    """Return times of reassembly beside a copy of as many bytes."""
    rows = [
        (
            f"{row['side']}, {row['what']}, {row['dtype']}",
            f"{1000 * row['ms']:.0f}",
            f"{row['to_copy']:.1f} {row.get('goal') or ''}".rstrip(),
            f"{row['gb_per_s']:,.0f}",
            f"{row['peak_mib']:,}" if row.get("peak_mib") else "",
        )
        for row in document["rows"]
        if "ms" in row
    ]
    headings = ("pass", "µs", "of the copy's time", "GB/s", "peak MiB")
    case = next(row["case"] for row in document["rows"] if "ms" in row)
    note = f"Map {case} to twice its size, 5 × 5 kernels; {document['device']}; commit `{document['commit'][:12]}`."
    return f"{markdown(headings, rows)}\n\n{note}"


def neck_diagnostics(document: Mapping[str, Any]) -> str:
    """Return what trained necks compute: contexts, attention maps, gates and kernels."""
    rows = []
    for name, report in document.items():
        levels = [
            f"{min(values.values()):.2g}–{max(values.values()):.2g}" if values else ""
            for values in (
                report["map_distance"].get(report["attention"], {}),
                report["context_size"],
                report["gate_change"],
                report["kernel_entropy"],
            )
        ]
        going_up = {key: x for key, x in report["kernel_center"].items() if key.startswith("bottom_up")}
        rows.append((name, str(report["images"]), *levels, f"{max(going_up.values()):.2g}" if going_up else ""))
    headings = (
        *("trained neck", "images", "distance of attention maps", "context / lateral", "gates' change"),
        *("kernels' entropy", "weight of the bottom-up kernels' center, at most"),
    )
    return markdown(headings, rows)


def label_curve(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return mask AP over labeled images, a side a column."""
    seeds = sorted({line["seed"] for line in lines})

    def cell(side: str, images: int) -> str:
        runs = {line["seed"]: line["segm/ap"] for line in lines if (line["side"], line["images"]) == (side, images)}
        return ", ".join(f"{100 * runs[seed]:.1f}" if seed in runs else "–" for seed in seeds)

    sides = ("a2fpn", "torchvision")
    rows = [
        (str(images), *(cell(side, images) for side in sides)) for images in sorted({line["images"] for line in lines})
    ]
    headings = ("labeled images", "mask AP of `maskrcnn_fpn_lite0`", "torchvision, v2 heads")
    where = Counter(f"{line['device']} at commit `{line['commit'][:12]}`" for line in lines)
    first, number = lines[0], ", ".join(map(str, seeds))
    note = f"{first['steps']} steps of {first['batch']} images in bfloat16, seeds {number}; "
    note += ", ".join(f"{count} run{'s' * (count > 1)} on {device}" for device, count in where.items())
    return f"{markdown(headings, rows)}\n\n{note}."


def auto_recipe(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return mask AP of the automatic recipe and of those by hand, a data set a row."""
    rows = []
    for line in lines:
        auto, hand = (line[side] for side in ("auto", "hand"))
        recipe = line["settings"]["hand"][0].removesuffix(".yaml")
        minutes = [f"{side['train_seconds'] / 60:.0f}" for side in (auto, hand)]
        ap = [100 * side["segm/ap"] for side in (auto, hand)]
        difference = f"{ap[0] - ap[1]:+.1f}"
        steps = [f"{side['steps']:,}" for side in (auto, hand)]
        rows.append(
            (
                line["data"],
                *(f"{x:.1f}" for x in ap),
                difference,
                *map(" in ".join, zip(steps, minutes, strict=True)),
                f"`{recipe}`",
            )
        )
    columns = ("data", "`auto`", "by hand", "difference", "steps of `auto` in minutes", "by hand", "recipe by hand")
    commits = ", ".join(dict.fromkeys(f"`{line['commit'][:12]}`" for line in lines))
    return f"{markdown(columns, rows)}\n\nMask AP in %, one run per side on one CPU thread; commit {commits}."


def round_trips(document: Mapping[str, Any]) -> str:
    """Return what libraries keep of a COCO file in the formats that two or more of them write."""
    writers = Counter(row["format"] for row in document["rows"])
    rows = [row for row in document["rows"] if writers[row["format"]] > 1]
    notes = [f"{name} {version}" for name, version in document["versions"].items() if name != "a2fpn"]
    notes.append(f"commit `{document['commit'][:12]}`")
    notes += [f"{row['library']} fails on {row['format']} with `{row['error']}`" for row in rows if "error" in row]
    return f"{markdown(trips.HEADINGS, [trips.cells(row) for row in rows])}\n\n{'; '.join(notes)}."


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "gpu-inference": ("gpu_inference.json", inference),
    "gpu-inference-more": ("gpu_inference_more.json", inference),
    "gpu-training": ("gpu_training.json", training),
    "gpu-throughput": ("throughput_h100.json", throughput),
    "cpu-inference": ("inference_cpu.json", cpu_inference),
    "dense-recall": ("dense_cpu.json", dense_recall),
    "export-times": ("export_cpu.json", export_times),
    "compiled": ("compiled_cpu.json", compiled),
    "dense-area": ("dense_cpu.json", dense_area),
    "dense-torchvision": ("dense_cpu.json", dense_torchvision),
    "dense-tiles": ("tiles_cpu.json", dense_tiles),
    "zoo": ("gpu_inference.json", zoo),
    "gpu-reassembly": ("gpu_reassembly.json", reassembly),
    "neck-diagnostics": ("neck_diagnostics.json", neck_diagnostics),
    "auto-recipe": ("auto_recipe_cpu.jsonl", auto_recipe),
    "round-trips": ("round_trips_coco128.json", round_trips),
    "label-curve": ("label_curve_nuclei.jsonl", label_curve),
}


def _cpu(part: Mapping[str, Any]) -> str:
    """Return where a benchmark ran, as a sentence."""
    versions = ", ".join(f"{name} {part['versions'][name]}" for name in ("torch", "torchvision"))
    return f"{part['threads']} CPU threads, {part['capability']}; {versions}; commit `{part['commit'][:12]}`."


def _beside_torchvision(document: Mapping[str, Any], what: str) -> str:
    measured = [row for row in document["rows"] if "ms" in row]
    tables = []
    for case in dict.fromkeys(map(_case, measured)):
        rows = [_cells(row) for row in measured if _case(row) == case]
        headings = (f"{what}, {case}", "ms", "of torchvision's", "of `fpn`'s", "peak MiB", "goal")
        tables.append(markdown(headings, rows))
    versions = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "torchvision"))
    note = f"{document['device']}; {versions}; commit `{document['commit'][:12]}`."
    if left_out := [_case(row) for row in document["rows"] if row["side"].startswith("left out")]:
        note += f" Not measured, for time ran out: {'; '.join(left_out)}."
    if failed := [f"{row['side']} ({_case(row)})" for row in document["rows"] if "error" in row and "batch" in row]:
        note += f" Failed in this run: {'; '.join(failed)}."
    return "\n\n".join([*tables, note])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name, comma, how = row["side"].partition(", ")
    own = name != "torchvision"
    neck = row.get("neck_goal") and f"neck {row['neck_goal']}"
    return (
        f"`{name}`{comma}{how}" if own else name,
        f"{row['ms']:.1f}",
        f"{row['ratio']:.2f}" + (f" ({row['range'].replace('-', '–')})" if own else ""),
        "" if row["to_fpn"] is None else f"{row['to_fpn']:.2f}",
        f"{row['peak_mib']:,}",
        row["goal"] or neck or "",
    )


def _case(row: Mapping[str, Any]) -> str:
    size = f"{row['size'].replace('x', '×')}, " if "size" in row else ""
    return f"{size}batch {row['batch']}, {row['precision']}"


def filled(text: str, results: Path = RESULTS) -> str:
    """Return a page with its regions made anew.

    Args:
        text: The page.
        results: Folder of the measurements.

    Raises:
        ValueError: For the name of no table, or a region without an end.

    Example:
        >>> filled("No region.")
        'No region.'
    """

    def region(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; there are {', '.join(TABLES)}.")
        file, make = TABLES[name]
        text = (results / file).read_text(encoding="utf-8")
        table = make([json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text))
        return f"{OPENING}{name} -->\n{table}\n<!-- /table -->"

    made, ended = REGION.subn(region, text)
    if ended != (begun := text.count(OPENING)):
        raise ValueError(f"{begun} tables begin with {OPENING}NAME -->, {ended} end with <!-- /table -->.")
    return made


def main(
    check: Annotated[bool, typer.Option("--check", help="Only say what is not up to date.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write it.")] = False,
    root: Annotated[Path, typer.Option(help="Folder of README.md and docs.")] = ROOT,
) -> None:
    """Compare or write the tables of README.md and docs."""
    if check == write:
        raise typer.BadParameter("Give --check or --write.")
    pages = {
        page: page.read_text(encoding="utf-8") for page in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]
    }
    old = {page: made for page, text in pages.items() if (made := filled(text)) != text}
    for page, made in old.items():
        if write:
            page.write_text(made, encoding="utf-8")
        said = "written" if write else "out of date; run `python -m benchmarks.tables --write`"
        typer.echo(f"{page.relative_to(root)}: {said}")
    raise typer.Exit(bool(old) and check)


if __name__ == "__main__":
    typer.run(main)
