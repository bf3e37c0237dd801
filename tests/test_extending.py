"""docs/extending.md as it stands: the package that it makes registers a neck, a detector and a data source."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import run_a2fpn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
TINY = (
    *("model.pretrained=false", "model.overrides.min_size=64", "model.overrides.max_size=64", "data.batch_size=1"),
    *("data.workers=0", "data.transforms.min_sizes=[64]", "run.max_steps=1", "run.trackers=[]", "run.pictures=0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the page, and photos with labels of its format."""
    root = tmp_path_factory.mktemp("extending")
    (root / "orchard").mkdir()
    files = re.findall(r"```python\n# orchard/(\w+\.py)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in files] == ["neck.py", "detector.py", "source.py", "__init__.py"]
    for name, text in files:
        (root / "orchard" / name).write_text(text, encoding="utf-8")
    (root / "photos").mkdir()
    rows = ["image,class,x,y,width,height"]
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        rows += [f"{number}.png,apple,{4 + number},6,20,18", f"{number}.png,pear,30,{8 + number},16,24"]
    (root / "photos" / "boxes.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def run(folder: Path, line: str, *further: str) -> str:
    command = shlex.split(line)
    assert command[0] == "a2fpn"
    result = run_a2fpn(*command[1:], *further, cwd=folder, path=[folder])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_page_works_as_it_stands(folder: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    bring, info, train = block.strip().splitlines()
    run(folder, bring)
    labels = [json.loads((folder / f"coco/annotations/instances_{part}.json").read_text()) for part in ("train", "val")]
    assert [len(part["images"]) for part in labels] == [2, 2]
    boxes = sorted(tuple(a["bbox"]) for part in labels for a in part["annotations"])
    assert boxes == sorted(
        [(4.0 + n, 6.0, 20.0, 18.0) for n in range(4)] + [(30.0, 8.0 + n, 16.0, 24.0) for n in range(4)]
    )
    assert {c["name"] for c in labels[0]["categories"]} == {"apple", "pear"}
    assert "pooledrcnn" in run(folder, info)
    run(folder, train, *TINY)
    saved = json.loads((folder / "runs/finetune_folder/last/config.json").read_text())
    assert saved["metadata"]["packages"] == ["orchard"]
    assert saved["model"]["neck"]["name"] == "mean_fpn"
