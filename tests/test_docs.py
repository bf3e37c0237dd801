"""Pages of docs/ and the README: their code runs, their commands exist, tables and reference are whole."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from typer.main import get_command

import a2fpn
from a2fpn import convert, data, evaluation, inference, report
from a2fpn.cli.app import app
from a2fpn.config import (
    HEADS,
    BackboneConfig,
    PreprocessConfig,
    RCNNConfig,
)
from a2fpn.pretrained.catalog import PRETRAINED
from a2fpn.training.cli import parse
from a2fpn.training.recipes import list_recipes
from a2fpn.training.settings import setting_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ASSETS = ROOT / "a2fpn" / "assets" / "nuclei_demo"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<kind>python|sh)\n(?P<code>.*?)```", re.DOTALL)
ELSEWHERE = {"extending.md": "tests/test_extending.py", "streaming.md": "tests/test_streams.py"}
"""Pages whose code a test of their own runs, or whose data are too large."""
RUN = [page for page in PAGES if page.name not in ELSEWHERE and page.name != "README.md"]
COMMANDS_RUN = ("first_model.md", "dense.md", "hub.md", "zoo.md")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> list[tuple[str, str | None]]:
    """The code of a page, each with the reason for which it does not run."""
    text = page.read_text(encoding="utf-8")
    return [(match["code"], match["reason"]) for match in BLOCK.finditer(text) if match["kind"] == kind]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: an image, photos, labels of YOLO."""
    small = sorted(ASSETS.glob("images/*.jpg"), key=lambda path: path.stat().st_size)[:2]
    (tmp_path / "photos").mkdir()
    (tmp_path / "yolo" / "images").mkdir(parents=True)
    (tmp_path / "yolo" / "labels").mkdir()
    (tmp_path / "yolo" / "data.yaml").write_text("train: images\nnames: {0: nucleus}\n")
    for name, path in zip("ab", small, strict=True):
        with Image.open(path) as picture:
            picture.crop((0, 0, 128, 128)).save(tmp_path / "photos" / f"{name}.jpg")
            for number in range(4):
                tile = picture.crop((number * 32, 0, number * 32 + 64, 64))
                tile.save(tmp_path / "yolo" / "images" / f"{name}{number}.jpg")
                (tmp_path / "yolo" / "labels" / f"{name}{number}.txt").write_text("0 0.5 0.5 0.4 0.6\n")
    shutil.copy(tmp_path / "photos" / "a.jpg", tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(page: Path) -> dict[str, Any]:
    """Names that the code of a page takes for granted."""
    if page.name == "detectron2.md":
        from tests.test_convert_detectron2 import detectron2_state, small

        original = small("fasterrcnn_fpn_r18")
        return {"original": original, "detectron2_state": detectron2_state(original)}
    if page.name == "mmdetection.md":
        from tests.test_convert_mmdet import mmdet_state, small

        original = small("htc_fpn_r18")
        return {"original": original, "mmdet_state": mmdet_state(original)}
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = given(page)
    torch.manual_seed(0)
    for code, reason in blocks(page, "python"):
        if reason is None:
            exec(compile(code, name_of(page), "exec"), namespace)
    shown = capsys.readouterr().out
    assert "False" not in shown, shown
    if page.parent.name == "migration":
        assert "equal" in shown
        assert not re.search(r"\b0 objects", shown), shown


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS_RUN)
def test_commands_of_a_page_run_in_their_order(name: str, folder: Path) -> None:
    page = DOCS / name
    for code, reason in blocks(page, "python"):  # what they leave on the disk
        if reason is None and "save_pretrained" in code:
            exec(compile(code, name, "exec"), {})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for code, reason in blocks(page, "sh"):
        for line in code.strip().splitlines() if reason is None else ():
            _, *arguments = shlex.split(line, comments=True)
            command = [sys.executable, "-m", "a2fpn", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert result.returncode == 0, f"{line}\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}"


def commands(page: Path) -> list[list[str]]:
    """Arguments of every call of our command in the blocks of a page, whether they run or not."""
    lines = [line for code, _ in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
    calls = [part.strip() for line in lines for part in re.split(r"&&|\|", line.partition("  #")[0])]
    return [shlex.split(call)[1:] for call in calls if call.startswith("a2fpn ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for call in commands(page):
        command, names = get_command(app), list(call)
        if names[0] == "--import":
            names = names[2:]
        while getattr(command, "commands", None) and names and names[0] in command.commands:
            command = command.commands[names.pop(0)]
        assert not getattr(command, "commands", None), f"{page.name}: no such command in {call}"
        if command.name == "train":
            _check_training(names)
            continue
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        known |= {"--help"}
        for option in (name.partition("=")[0] for name in names if re.match(r"-{1,2}[a-z]", name)):
            assert option in known, f"{page.name}: {command.name} has no {option}"


def _check_training(names: list[str]) -> None:
    """Settings and recipes of a training command; words in capitals stand for something of the reader's."""
    if {"--help", "--list", "--copy"} & set(names):
        return
    # "auto" looks at the data, and files of the reader's are not there.
    own = [name if name in list_recipes() and name != "auto" else "finetune_folder" for name in recipes(names)]
    rest = [name for name in names if name not in recipes(names) and name != "--config" and "..." not in name]
    if "--import" in rest:
        at = rest.index("--import")
        del rest[at : at + 2]
    parse([*(part for recipe in own for part in ("--config", recipe)), "data.root=x", *rest])


def recipes(names: list[str]) -> list[str]:
    return [value for option, value in itertools.pairwise(names) if option == "--config"]


def test_what_does_not_run_says_why() -> None:
    reasons = [reason for page in PAGES for kind in ("python", "sh") for _, reason in blocks(page, kind) if reason]
    assert reasons
    assert all(re.match(r"it |they ", reason) for reason in reasons), reasons


# Migration


def rows(page: str) -> list[tuple[str, str]]:
    """Both columns of the table of names."""
    text = (DOCS / "migration" / f"{page}.md").read_text(encoding="utf-8")
    table = re.findall(r"<!-- names:\w+ -->\n(.*?)<!-- /names -->", text, re.DOTALL)[0]
    cells = [line.strip("|").split(" | ") for line in table.strip().splitlines()[2:]]
    return [(left.strip(), right.strip()) for left, right in cells]


NAMES = ("torchvision", "detectron2", "mmdetection")


def test_the_tables_hold_more_than_sixty_names_and_none_twice() -> None:
    for page in NAMES:
        left = [theirs for theirs, _ in rows(page)]
        assert len(set(left)) == len(left)
    assert sum(len(rows(page)) for page in NAMES) >= 60


@pytest.mark.parametrize("page", NAMES)
def test_our_side_of_the_tables_exists(page: str) -> None:
    parts = (BackboneConfig, PreprocessConfig, RCNNConfig, *HEADS.values())
    arguments = {field.name for part in parts for field in dataclasses.fields(part)}
    arguments |= set(inspect.signature(a2fpn.create_model).parameters)
    arguments |= {"neck_args", "categories", "backbone_weights"}
    known = arguments | set(setting_names()) | set(PRETRAINED) | set(a2fpn.list_models()) | set(a2fpn.list_necks())
    for theirs, ours in rows(page):
        (name,) = re.findall(r"`([^`]+)`", ours)
        assert name in known, (theirs, name)


def test_torchvisions_side_of_its_table_exists() -> None:
    from torchvision.models import detection

    kinds = (detection.MaskRCNN, detection.FasterRCNN, detection.mask_rcnn.maskrcnn_resnet50_fpn)
    arguments = {name for kind in kinds for name in inspect.signature(kind).parameters}
    for theirs, _ in rows("torchvision"):
        (name,) = re.findall(r"`([^`]+)`", theirs)
        assert name in arguments or name in torchvision.models.list_models(torchvision.models.detection), name


# README, reference, site


def test_the_readme_fits_a_screen_and_shows_the_table_of_the_site() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 85
    site = (DOCS / "comparison.md").read_text(encoding="utf-8")
    table = re.findall(r"(?m)^\|.*$", text)
    assert [line.replace("](docs/", "](") for line in table] == re.findall(r"(?m)^\|.*$", site)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = {entry.rpartition(".")[2] for entry in re.findall(r"(?m)^::: (\S+)$", pages)}
    for module in (a2fpn, convert, data, evaluation, inference, report):
        missing = set(module.__all__) - shown - {"__version__"}
        assert not missing, (module.__name__, sorted(missing))


def test_the_figures_of_necks_are_made_by_our_code() -> None:
    from benchmarks import neck_figures

    text = (DOCS / "necks.md").read_text(encoding="utf-8")
    images = set(re.findall(r"images/(\w+)\.jpg", text))
    model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=2, min_size=64).eval()
    drawn = neck_figures.draw(model, torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8))
    assert set(drawn) == images
    assert all((DOCS / "images" / f"{name}.jpg").is_file() for name in images)


def test_attention_by_way_of_nodes_is_a_distribution_over_pixels() -> None:
    from a2fpn.layers import ATTENTION_KINDS, MGC
    from benchmarks import neck_figures

    model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=2, min_size=64).eval()
    seen = neck_figures.look(model, torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8))
    mgc = next(module for module in model.neck.modules() if isinstance(module, MGC))
    for kind in ATTENTION_KINDS:
        weights = neck_figures.attention(mgc, seen, 1, kind, (2, 3))
        assert weights.shape == seen.sizes[1]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-4)
