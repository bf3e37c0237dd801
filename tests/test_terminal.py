"""Terminals that can't show every character, and names that control them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a2fpn.errors import ConfigError, message_for_users
from tests.processes import run_a2fpn

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "a2fpn/assets/nuclei_demo/images/0208.jpg"


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = line.replace("a2fpn", f"{sys.executable} -m a2fpn", 1)
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=cwd, env=own, check=False)


@pytest.mark.parametrize("command", ["a2fpn --help", "a2fpn predict --help", "a2fpn hub --help"])
def test_help_in_an_encoding_without_our_characters(command: str, tmp_path: Path) -> None:
    result = shell(command, tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    assert shell("a2fpn list | head -n 1", tmp_path).stderr == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("check-data --images . --annotations x.json --plot look", "--plot look: expected a name that ends in"),
        ("predict x.png --model maskrcnn_a2fpn_lite0.nuclei --device meta", "--device meta is not available"),
    ],
)
def test_wrong_options_are_one_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(EXAMPLE.read_bytes())
    result = run_a2fpn(*line.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_control_characters_of_a_name_are_written_out() -> None:
    message = message_for_users(ConfigError("x\x1b[31m.png: no such file"))
    assert message == "x\\x1b[31m.png: no such file"
