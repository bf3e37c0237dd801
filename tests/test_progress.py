"""Progress: the table of a run, rates, and commands that say nothing or speak to machines."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from PIL import Image
from rich.console import Console

from a2fpn.cli import main
from a2fpn.cli.format import progress_bar
from a2fpn.training.monitor import Throughput
from a2fpn.training.progress import RunBoard

EXAMPLE = Path(__file__).resolve().parent.parent / "a2fpn/assets/nuclei_demo/images/0208.jpg"
LOSSES = {"loss": 1.25, "loss_classifier": 0.5, "loss_mask": 0.75}
SPEED = Throughput(8.0, 0.1, 2**30)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def record(epoch: int, ap: float | None) -> dict[str, float]:
    numbers = {"epoch": epoch, "images_per_second": 8.0, **{f"train/{name}": x for name, x in LOSSES.items()}}
    return numbers if ap is None else {**numbers, "bbox/ap": ap, "segm/ap": ap / 2}


def text(board: RunBoard, current: dict[str, float] | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(board.table(current))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_shows_losses_and_ap_and_marks_the_best_epoch() -> None:
    board = RunBoard(False, total_steps=40)
    board.add(record(1, 0.25), best=True)
    board.add(record(2, None), best=False)
    lines = text(board, record(3, None)).splitlines()
    assert lines[0].split() == ["epoch", "loss", "classifier", "mask", "box", "AP", "mask", "AP", "images/s"]
    assert lines[1].split() == ["1", "1.2500", "0.5000", "0.7500", "0.2500", "0.1250", "8.0", "best"]
    assert lines[2].split() == ["2", "1.2500", "0.5000", "0.7500", "8.0"]
    assert lines[3].split()[0] == "3"
    board.add(record(3, 0.5), best=True)
    assert [line.split()[0] for line in text(board).splitlines() if "best" in line] == ["3"]


def test_a_long_run_shows_its_last_epochs_and_many_losses_their_sum() -> None:
    board = RunBoard(False, total_steps=40)
    for epoch in range(1, 12):
        board.add({**record(epoch, 0.1), **{f"train/loss_{i}": 0.1 for i in range(6)}}, best=epoch == 1)
    lines = text(board).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(epoch) for epoch in range(4, 12)]
    assert "classifier" not in lines[0]


def test_the_time_that_is_left_counts_what_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    board = RunBoard(False, total_steps=40, place=20)
    assert board.remaining(20) is None
    now[0] += 50
    assert board.remaining(30) == 50
    assert board.remaining(40) == 0


def test_a_terminal_gets_the_table_and_a_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    PartialState()  # which the loggers of a run ask whether they are the main process
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for stream, level in ((Terminal(), logging.DEBUG), (io.StringIO(), logging.INFO)):
        monkeypatch.setattr(sys, "stderr", stream)
        caplog.clear()
        board = RunBoard(True, total_steps=10)
        board.add(record(1, 0.25), best=True)
        with caplog.at_level(logging.DEBUG, "a2fpn"), board.training(1, 2, 5) as line:
            line.advance()
            line.show(6, 6, LOSSES, 1e-3, SPEED)
        written = stream.getvalue()
        assert ("mask AP" in written) == isinstance(stream, Terminal)
        assert ("1/5" in written) == isinstance(stream, Terminal)
        (said,) = caplog.records
        assert said.levelno == level
        assert said.getMessage().startswith("Epoch 2/2  step 6  loss 1.2500  lr 1.00e-03  8.0 images/s")
        assert said.getMessage().endswith(" left")


def test_nothing_is_drawn_where_it_is_not_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with RunBoard(False, total_steps=5).training(0, 1, 5) as line:
        line.advance()
    with progress_bar(quiet=True) as progress:
        list(progress.track(range(3), description="working"))
    assert stream.getvalue() == ""


def test_bars_show_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar() as progress:
        for _ in progress.track(range(300), description="working"):
            time.sleep(0.001)
    assert "300/300" in stream.getvalue()
    assert "/s" in stream.getvalue()


def test_predict_is_quiet_or_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(EXAMPLE).crop((0, 0, 256, 256)).save(tmp_path / "part.png")
    common = ["predict", str(tmp_path / "part.png"), "--model", "maskrcnn_a2fpn_lite0.nuclei", "--tile", "256"]
    for number, options in enumerate((["--quiet"], ["--json", "-"], ["--json", str(tmp_path / "out.json"), "-q"])):
        with pytest.raises(SystemExit) as end:
            main([*common, "--output", str(tmp_path / str(number)), *options])
        assert end.value.code in (0, None)
        shown = capsys.readouterr()
        assert shown.err == ""
        if "-" in options:
            numbers = json.loads(shown.out)
            assert numbers["images"] == 1
            assert numbers["objects"] > 0
            assert Path(numbers["results"]).is_file()
        else:
            assert shown.out == ""
    assert json.loads((tmp_path / "out.json").read_text())["objects"] == numbers["objects"]


def test_errors_are_told_to_the_quiet_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["predict", "gone.jpg", "--model", "maskrcnn_a2fpn_lite0.nuclei", "--quiet", "--output", str(tmp_path)])
    assert end.value.code == 2
    assert "gone.jpg: no such file" in capsys.readouterr().err


def test_the_shell_completes_commands() -> None:
    environment = {"_A2FPN_COMPLETE": "complete_bash", "COMP_WORDS": "a2fpn pre", "COMP_CWORD": "1", "PATH": "/usr/bin"}
    environment["PYTHONPATH"] = str(EXAMPLE.parents[4])
    result = subprocess.run(
        [sys.executable, "-m", "a2fpn"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.split() == ["predict"]
