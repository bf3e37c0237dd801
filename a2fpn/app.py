"""Web page to try a model: upload images, move sliders, download the results.

``a2fpn app`` opens it. The same file is the ``app.py`` of a Space on the Hub, where ``A2FPN_MODEL`` names the model.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

import a2fpn
from a2fpn import Predictor, Result
from a2fpn.data import ImageError
from a2fpn.writers import write_results

MODEL = "maskrcnn_a2fpn_lite0.nuclei"
EXAMPLES = Path(str(resources.files("a2fpn"))) / "assets" / "nuclei_demo" / "images"
_FIRST_THRESHOLD = 0.5
_WIDEST = 2048  # pixels of a tile
_SHOWN = 1600  # pixels of a picture on the page


def build(predictor: Predictor, name: str, *, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Lay out the page.

    Args:
        predictor: The model; it runs one request at a time, others wait.
        name: Name of the model, for the heading.
        examples: Images that can be tried with a click.
    """
    classes = [category.name for category in predictor.categories]
    written = tempfile.TemporaryDirectory(prefix="a2fpn_")  # deleted with the page

    def predict(files: list[str] | None, tile: float) -> tuple[list[Result], str]:
        """Predict the pictures whole; sliders then choose among all objects."""
        if not files:
            raise gr.Error("Drop at least one picture first.", print_exception=False)
        results, refused = [], []
        for file in files:
            try:
                (result,) = predictor([file], tile=int(tile) or None)
            except (ImageError, OSError, ValueError) as error:
                refused.append(f"{Path(file).name} was skipped: {_sentence(error, file)}")
            else:
                results.append(result)
        if not results:
            raise gr.Error(" ".join(refused), print_exception=False)
        for remark in refused:
            gr.Warning(remark)
        return results, " ".join(refused)

    def show(results: list[Result], threshold: float, smallest: float, kept: list[str]) -> tuple[Any, Any, str, Any]:
        chosen = [select(result, threshold, smallest, kept) for result in results]
        pictures = [(draw(result), f"{_name(result)}: {len(result)}") for result in chosen]
        rows: list[list[Any]] = [
            [_name(result), *(Counter(result.names)[label] for label in classes)] for result in chosen
        ]
        if len(rows) > 1:
            rows.append(["all", *(sum(row[column] for row in rows) for column in range(1, len(classes) + 1))])
        total = sum(map(len, chosen))
        text = (
            f"**{total} object{'' if total == 1 else 's'}** in {len(chosen)} picture{'' if len(chosen) == 1 else 's'}"
        )
        wide = gr.update(value=pictures, columns=min(2, max(1, len(pictures))))
        return wide, rows, text if results else "", gr.update(value=None, visible=False)

    def files_of(results: list[Result], threshold: float, smallest: float, kept: list[str]) -> Any:
        if not results:
            raise gr.Error("There is nothing to download yet: find objects first.", print_exception=False)
        chosen = [select(result, threshold, smallest, kept) for result in results]
        return gr.update(value=[str(path) for path in write_files(chosen, written.name)], visible=True)

    def try_example(event: gr.SelectData) -> list[str]:
        return [str(examples[event.index])]

    page: gr.Blocks
    with gr.Blocks(title=f"a2fpn: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# Find objects with `{name}`\nDrop pictures, press the button, then adjust the sliders.")
        found = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="pictures")
                go = gr.Button("Find objects", variant="primary", elem_id="go")
                threshold = gr.Slider(
                    0, 1, _FIRST_THRESHOLD, step=0.01, label="Confidence threshold", elem_id="threshold"
                )
                smallest = gr.Slider(0, 200, 0, step=1, label="Minimum object size, pixels (square root of box area)")
                tile = gr.Slider(
                    *(0, _WIDEST, 0),
                    step=128,
                    label="Tile size for large pictures, pixels",
                    info="0 predicts each picture whole. Takes effect when you press the button.",
                )
                kept = gr.CheckboxGroup(classes, value=classes, label="Classes", elem_id="classes")
            with gr.Column(scale=2, min_width=320):
                status = gr.Markdown(elem_id="status")
                remarks = gr.Markdown(elem_id="remarks")
                pictures = gr.Gallery(
                    label="Detections", columns=2, object_fit="contain", height="auto", elem_id="found"
                )
                table = gr.Dataframe(headers=["picture", *classes], label="Counts", interactive=False, elem_id="table")
                prepare = gr.Button("Prepare downloads: PNG, COCO, GeoJSON, CSV", elem_id="prepare")
                downloads = gr.File(label="Downloads", file_count="multiple", visible=False, elem_id="downloads")
        if examples:
            gallery = gr.Gallery(
                [str(path) for path in examples],
                label="Examples: click one to try it",
                columns=8,
                height="auto",
                object_fit="cover",
                allow_preview=False,
                interactive=False,
                elem_id="examples",
            )
        chosen = [found, threshold, smallest, kept]
        shown = [pictures, table, status, downloads]
        # All visitors share one model, which handles one request at a time.
        alone: Any = {"concurrency_limit": 1, "concurrency_id": "model"}
        go.click(predict, [files, tile], [found, remarks], **alone).success(show, chosen, shown)
        if examples:
            picked = gallery.select(try_example, None, files)
            picked.then(predict, [files, tile], [found, remarks], **alone).success(show, chosen, shown)
        for control in (threshold, smallest, kept):
            control.change(show, chosen, shown, show_progress="hidden", trigger_mode="always_last")
        prepare.click(files_of, chosen, downloads)
    return page


def select(result: Result, threshold: float, smallest: float, names: Sequence[str]) -> Result:
    """Filter objects by score, box size and class.

    Args:
        result: All objects.
        threshold: Minimum score.
        smallest: Minimum square root of the box's area, in pixels.
        names: The classes to keep.
    """
    sides = result.boxes[:, 2:] - result.boxes[:, :2]
    wanted = (np.sqrt(sides.prod(1)) >= smallest) & np.isin(result.names, list(names)) & (result.scores >= threshold)
    rows = np.flatnonzero(wanted)
    return replace(
        result,
        boxes=result.boxes[rows],
        scores=result.scores[rows],
        labels=result.labels[rows],
        rles=None if result.rles is None else tuple(result.rles[row] for row in rows),
        keypoints=None if result.keypoints is None else result.keypoints[rows],
        keypoint_scores=None if result.keypoint_scores is None else result.keypoint_scores[rows],
    )


def draw(result: Result) -> Image.Image:
    """Draw the objects on the image, downscaled to what a page can show."""
    picture = result.plot(score_threshold=0)
    picture.thumbnail((_SHOWN, _SHOWN))
    return picture


def write_files(results: Sequence[Result], parent: str | Path) -> list[Path]:
    """Write images, COCO, GeoJSON and CSV to a new folder; formats with one file per image are zipped.

    Args:
        results: One for each picture, at least one.
        parent: Where the folder is made.
    """
    folder = Path(tempfile.mkdtemp(dir=parent))
    named = [replace(result, path=_name(result), image=result.load_image()) for result in results]
    files = []
    for form, archive in (("overlay", "pictures.zip"), ("geojson", "geojson.zip")):
        members = write_results(named, folder, [form])
        if len(members) == 1:
            files += members
            continue
        with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for member in members:
                packed.write(member, member.name)
        files.append(folder / archive)
    return files + write_results(named, folder, ["coco-dataset", "csv"])


def launch(
    model: str = MODEL, *, host: str = "127.0.0.1", port: int | None = None, device: str | None = None, **options: Any
) -> gr.Blocks:
    """Serve the page until it is stopped, and return it.

    Args:
        model: A checkpoint folder or a name of :func:`a2fpn.list_pretrained`.
        host: Address to listen on; "0.0.0.0" for every one.
        port: None takes the first free one from 7860 on.
        device: Where to run.
        **options: Further arguments of Gradio's ``launch``.
    """
    detector = a2fpn.from_pretrained(model)
    # The sliders filter everything that the model finds.
    predictor = Predictor(detector, device=device, score_threshold=detector.rule.score_threshold)
    fits = model == MODEL
    page: gr.Blocks = build(predictor, Path(model).name, examples=sorted(EXAMPLES.glob("*.jpg")) if fits else ())
    fonts = ["system-ui", "sans-serif"]  # system fonts, so that none is downloaded
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        allowed_paths=[str(EXAMPLES)],
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        **options,
    )
    return page


def space_files(model: str) -> dict[str, str]:
    """Files of a Space that shows a model of the Hub, by name: this page, what it needs, and the card.

    Args:
        model: ``org/name`` of the model.
    """
    card = f"---\ntitle: {model.rpartition('/')[2]}\nsdk: gradio\nsdk_version: {gr.__version__}\napp_file: app.py\n"
    card += f"license: apache-2.0\nmodels:\n- {model}\n---\n\nTry [{model}](https://huggingface.co/{model}).\n"
    code = Path(__file__).read_text(encoding="utf-8").replace(f'MODEL = "{MODEL}"', f'MODEL = "{model}"')
    return {"app.py": code, "requirements.txt": f"a2fpn[app]=={a2fpn.__version__}\n", "README.md": card}


def _name(result: Result) -> str:
    return Path(result.path).name if result.path else "picture"


def _sentence(error: Exception, file: str) -> str:
    """Return the error's message without the server's path of the image."""
    return str(error).replace(f"{file}: ", "").replace(file, Path(file).name)


if __name__ == "__main__":
    launch(os.environ.get("A2FPN_MODEL", MODEL), host="0.0.0.0")
