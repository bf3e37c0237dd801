"""Slides tile by tile: the same objects whatever reads them, stops them and goes on with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli.app import app
from a2fpn.cli.tile_journal import TileJournal
from a2fpn.data.slides import Slide
from a2fpn.inference import Predictor, Result
from a2fpn.inference.tiling import TileDetections
from a2fpn.pretrained.checkpoint import add_metadata
from tests.helpers import tiny_model

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed; it comes with the extra 'slides'")

SIZE = (210, 330)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return a2fpn.save_pretrained(tiny_model("maskrcnn_fpn"), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(a2fpn.from_pretrained(str(checkpoint)), tile=96, score_threshold=0.0)


def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiled TIFF of 15 tiles at a side of 96 pixels."""
    path = tmp_path_factory.mktemp("slides") / "slide.tif"
    scale = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels(), tile=(64, 64), photometric="rgb", compression="zlib", **scale)
    return path


def assert_same(first: Result, second: Result) -> None:
    assert first.size == second.size
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-3)
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)
    masks, others = first.masks, second.masks
    assert masks is not None
    assert others is not None
    assert (masks != others).mean() < 1e-3


def test_threads_and_batches_change_nothing(predictor: Predictor, slide: Path) -> None:
    expected = predictor(pixels())
    assert len(expected) > 50
    for options in ({}, {"workers": 1}, {"workers": 4, "batch": 2}, {"batch": 100}):
        (result,) = predictor([slide], **options)
        assert_same(expected, result)
        assert result.microns_per_pixel == 0.25


def test_an_error_of_a_reading_thread_is_the_callers(predictor: Predictor, slide: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    with tifffile.TiffFile(slide) as file:
        start = file.pages[0].dataoffsets[9]
    content = bytearray(slide.read_bytes())
    content[start : start + 4] = b"oops"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.tif: part 9 can't be decoded"):
        predictor(broken, workers=2)


def test_the_scale_of_the_network_is_a_factor_or_micrometers(predictor: Predictor, slide: Path) -> None:
    (half,) = predictor([slide], scale=0.5)
    assert half.size == SIZE
    assert half.boxes.max() > 200
    (microns,) = predictor([slide], microns_per_pixel=0.5)
    assert_same(half, microns)
    (whole,) = predictor([slide], scale=0.5, tile=None)
    reduced = torch.nn.functional.interpolate(
        torch.from_numpy(pixels()).permute(2, 0, 1).contiguous()[None].float() / 255, size=(105, 165), mode="bilinear"
    )[0]
    seen = predictor(reduced, tile=None)
    np.testing.assert_allclose(whole.scores, seen.scores, atol=1e-3)
    assert whole.boxes[:, 2].max() > 165
    with pytest.raises(ValueError, match="an image in memory does not state its pixel size; give scale"):
        predictor(pixels(), microns_per_pixel=0.5)
    with pytest.raises(ValueError, match="give one of them"):
        predictor(pixels(), microns_per_pixel=0.5, scale=1.0)
    with pytest.raises(ValueError, match=r"scale must be between 0.015625 and 64.0, got 100"):
        predictor(pixels(), scale=100)


def test_an_image_without_tiles_has_the_limit_of_pixels(checkpoint: Path, slide: Path) -> None:
    predictor = Predictor(a2fpn.from_pretrained(str(checkpoint)), max_pixels=210 * 330 - 1)
    for options in ({}, {"channels": (0, 1, 2)}):
        with pytest.raises(ValueError, match="pixels exceed the limit of 69299"):
            predictor(slide, **options)
    assert predictor(slide, tile=96).size == SIZE


def predict(checkpoint: Path, *arguments: object, code: int = 0) -> str:
    command = ["predict", *map(str, arguments), "--model", str(checkpoint), "--score-threshold", "0", "--tile", "96"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_a_slide_goes_on_behind_its_last_tile(
    how: str, checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict(checkpoint, slide, "--output", whole, "--format", "jsonl")
    assert {path.name for path in whole.iterdir()} == {"manifest.json", "predictions.jsonl"}
    done: list[int] = []
    add = TileJournal.add

    def counted(self: TileJournal, number: int, found: TileDetections) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        add(self, number, found)
        done.append(number)

    with monkeypatch.context() as patched:
        patched.setattr(TileJournal, "add", counted)
        output = predict(checkpoint, slide, "--output", out, "--format", "jsonl", code=130)
    assert "Stopped within slide.tif, after 4 tiles" in output
    assert "--resume" in output
    journal = out / "slide.tiles.jsonl"
    assert [line["tile"] for line in lines(journal)[1:]] == done
    if how == "kill":
        with journal.open("a") as file:
            file.write('{"tile": 4, "boxes": [[1')
    later: list[int] = []

    def noted(self: TileJournal, number: int, found: TileDetections) -> None:
        later.append(number)
        add(self, number, found)

    monkeypatch.setattr(TileJournal, "add", noted)
    assert "--resume continues that run" in predict(checkpoint, slide, "--output", out, code=2)
    predict(checkpoint, slide, "--output", out, "--format", "jsonl", "--resume")
    assert sorted([*done, *later]) == list(range(15))
    assert not journal.exists()
    assert lines(out / "predictions.jsonl") == lines(whole / "predictions.jsonl")


def test_tiles_of_another_file_or_run_do_not_count(checkpoint: Path, slide: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "slide.tif", tmp_path / "out"
    image.write_bytes(slide.read_bytes())
    windows = [(0, 0, 96, 96), (0, 0, 48, 96)]
    none = TileDetections(windows[1], np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ())
    out.mkdir()
    first = TileJournal(out / "slide.tiles.jsonl", image, windows)
    first.add(1, none)
    assert TileJournal(out / "slide.tiles.jsonl", image, windows).tiles.keys() == {1}
    assert TileJournal(out / "slide.tiles.jsonl", image, windows[:1]).tiles == {}
    first = TileJournal(out / "slide.tiles.jsonl", image, windows)
    first.add(1, none)
    image.write_bytes(slide.read_bytes() + b" ")
    assert TileJournal(out / "slide.tiles.jsonl", image, windows).tiles == {}
    assert "slide.tiles.jsonl, not made by this run" in predict(checkpoint, image, "--output", out, code=2)
    predict(checkpoint, image, "--output", out, "--overwrite", "--format", "csv")
    assert {path.name for path in out.iterdir()} == {"manifest.json", "predictions.jsonl", "objects.csv"}


def test_pictures_of_slides_are_drawn_on_a_thumbnail(
    checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slide.thumbnail, "__defaults__", (100,))
    predict(checkpoint, slide, "--output", tmp_path / "out", "--format", "overlay")
    with Image.open(tmp_path / "out" / "slide.png") as picture:
        assert picture.width >= 768


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Five channels, one after the other."""
    path = tmp_path / "stack.tif"
    values = np.concatenate([pixels(), pixels()[..., :2]], 2).transpose(2, 0, 1)
    tifffile.imwrite(path, values, photometric="minisblack", metadata={"axes": "CYX"})
    return path


@pytest.mark.parametrize("tile", [None, 96, 1000])
def test_pictures_show_what_the_model_saw(tile: int | None, predictor: Predictor, stack: Path, tmp_path: Path) -> None:
    chosen = predictor(stack, channels=(2, 0, 1), tile=tile)
    np.testing.assert_array_equal(chosen.load_image(), pixels()[..., [2, 0, 1]])
    gray = predictor(stack, channels=(1,), tile=tile)
    np.testing.assert_array_equal(gray.load_image(), pixels()[..., [1, 1, 1]])
    dark = tmp_path / "dark.tif"
    tifffile.imwrite(dark, pixels().astype(np.uint16) * 4, photometric="rgb")
    ranged = predictor(dark, intensity=(0, 1020), tile=tile)
    np.testing.assert_array_equal(ranged.load_image(), pixels())
    assert chosen.plot().width >= SIZE[1]


@pytest.mark.parametrize("count", [2, 5])
def test_pictures_of_other_channels_than_colors(count: int, stack: Path, tmp_path: Path) -> None:
    model = tiny_model("maskrcnn_fpn", in_chans=count, mean=[0.5] * count, std=[0.2] * count)
    path = tmp_path / "channels.tif"
    tifffile.imwrite(path, tifffile.imread(stack)[:count], photometric="minisblack", metadata={"axes": "CYX"})
    result = Predictor(model, score_threshold=0.0)(path, tile=96)
    shown = pixels() if count == 5 else pixels()[..., [0, 0, 0]]
    np.testing.assert_array_equal(result.load_image(), shown)
    assert result.plot().width >= SIZE[1]


def test_pictures_asked_for_later_are_those_of_the_run(checkpoint: Path, stack: Path, tmp_path: Path) -> None:
    options = ("--channels", "2,0,1", "--format")
    predict(checkpoint, stack, "--output", tmp_path / "now", *options, "overlay,jsonl")
    predict(checkpoint, stack, "--output", tmp_path / "later", *options, "jsonl")
    predict(checkpoint, stack, "--output", tmp_path / "later", *options, "overlay", "--resume")
    now, later = (np.asarray(Image.open(tmp_path / name / "stack.png")) for name in ("now", "later"))
    np.testing.assert_array_equal(now, later)


def test_options_of_reading_on_the_command_line(checkpoint: Path, slide: Path, stack: Path, tmp_path: Path) -> None:
    output = predict(checkpoint, stack, "--output", tmp_path / "out", code=2)
    assert "has 5 channels, the model 3; set channels=(...) (--channels)" in output
    chosen = ("--channels", "2,0,1", "--intensity", "0,255", "--scale", "0.5")
    predict(checkpoint, stack, "--output", tmp_path / "out", "--format", "jsonl", *chosen)
    (line,) = lines(tmp_path / "out" / "predictions.jsonl")
    assert (line["height"], line["width"]) == SIZE
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["channels"] == [2, 0, 1]
    for wrong, message in (
        (("--channels", "red"), "comma-separated integers such as 2,0,1, got 'red'"),
        (("--intensity", "5"), "two numbers such as 0,4095, or auto, got '5'"),
        (("--scale", "half"), "a factor such as 0.5, the µm of a pixel such as 0.5um, or auto, got 'half'"),
        (("--scale", "0.5um"), "does not state its pixel size"),
    ):
        more = ("--channels", "0") if "--channels" not in wrong else ()
        assert message in predict(checkpoint, stack, "--output", tmp_path / "new", *wrong, *more, code=2)


def test_the_scale_of_training_is_a_fact_of_the_checkpoint(checkpoint: Path, slide: Path, tmp_path: Path) -> None:
    scaled, texts = tmp_path / "checkpoint", []
    shutil.copytree(checkpoint, scaled)
    for model, scale in ((checkpoint, "0.5"), (checkpoint, "0.5um"), (scaled, "auto")):
        if scale == "auto":
            message = "--scale auto: the checkpoint does not store its training scale"
            assert message in predict(model, slide, "--output", tmp_path / scale, "--scale", scale, code=2)
            add_metadata(model, microns_per_pixel=0.5)
        predict(model, slide, "--output", tmp_path / scale, "--format", "csv", "--scale", scale)
        texts.append((tmp_path / scale / "objects.csv").read_text())
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0].splitlines()) > 10
    with pytest.raises(ValueError, match="microns_per_pixel must be above 0, got 0"):
        add_metadata(scaled, microns_per_pixel=0)


def test_slides_are_counted(checkpoint: Path, stack: Path, tmp_path: Path) -> None:
    options = ["--tile", "96", "--channels", "2,0,1", "--scale", "0.5"]
    predict(checkpoint, stack, "--output", tmp_path / "out", "--format", "csv", *options)
    found = (tmp_path / "out" / "objects.csv").read_text().count("\n") - 1
    command = ["count", str(stack), "--model", str(checkpoint), "--score-threshold", "0", *options]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{found} objects in 1 image" in result.output
    assert found > 10
