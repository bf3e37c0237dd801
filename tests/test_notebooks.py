"""The notebooks run from top to bottom on a CPU without a network, within five minutes in all."""

import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_four_and_the_site_lists_them() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert f"`{path.name}`" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_committed_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    assert "pip install" in cells[1].source


def test_a_site_that_a_repository_builds_leads_to_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    change = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    text = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    page, other = (SimpleNamespace(file=SimpleNamespace(src_uri=name)) for name in ("notebooks.md", "index.md"))
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert change(text, page=page) == text
    monkeypatch.setenv("GITHUB_REPOSITORY", "me/fork")
    assert change(text, page=other) == text
    changed = change(text, page=page)
    for path in NOTEBOOKS:
        assert f"(https://colab.research.google.com/github/me/fork/blob/main/notebooks/{path.name})" in changed


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # folders of the notebooks go with it
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s")  # noqa: T201
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in shown)
    assert "error:" not in text, text[-2000:]
    assert "Traceback" not in text, text[-2000:]
    assert any("image/png" in output.get("data", {}) for output in shown)
