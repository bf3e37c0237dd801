"""Errors at every door: one line for what the user can mend, a traceback for bugs, and with --debug for everything."""

import pytest
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli import hub as publishing
from a2fpn.cli.app import app
from a2fpn.errors import A2FPNError, message_for_users
from a2fpn.necks import NECKS, register_neck
from a2fpn.training.cli import main as train
from tests.helpers import tiny_model
from tests.training import tiny_run


@pytest.fixture
def buggy_neck(monkeypatch):
    """A neck of somebody else whose constructor has an ordinary bug."""
    before = dict(NECKS._items)

    @register_neck("buggy")
    class Buggy(a2fpn.Neck):
        def __init__(self, in_spec, *, out_channels=256):
            super().__init__(in_spec)
            self.width = out_channels + {True: "a"}.get(out_channels > 0, 0)

        def fuse(self, features, valid):
            return features

    yield "fasterrcnn_buggy_r18"
    NECKS._items = before


def test_a_bug_in_a_neck_shows_its_traceback_at_every_door(buggy_neck, tmp_path):
    result = CliRunner().invoke(app, ["info", buggy_neck])
    assert isinstance(result.exception, TypeError)
    with pytest.raises(TypeError, match="unsupported operand"):
        train([*tiny_run(tmp_path), f"model.name={buggy_neck}", "model.overrides={}", "data.check_images=0"])
    folder = a2fpn.save_pretrained(tiny_model("maskrcnn_fpn"), tmp_path / "saved")
    text = (folder / "config.json").read_text().replace('"name": "fpn"', '"name": "buggy"')
    (folder / "config.json").write_text(text)
    result = CliRunner().invoke(publishing.app, ["backbone", str(folder), "--output", str(tmp_path / "bb")])
    assert isinstance(result.exception, TypeError)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("by_variable", [False, True])
def test_input_errors_are_lines_unless_asked_otherwise(debug, by_variable, tmp_path, monkeypatch, capsys):
    if debug and by_variable:
        monkeypatch.setenv("A2FPN_DEBUG", "1")
    flag = ["--debug"] if debug and not by_variable else []
    for group, command in ((app, ["info", "maskrcnn_fpm_r50"]), (publishing.app, ["card", "nowhere", "--repo", "a/b"])):
        result = CliRunner().invoke(group, [*flag, *command])
        assert isinstance(result.exception, A2FPNError if debug else SystemExit)
        assert (": error: " in result.output) is not debug
    nested = CliRunner().invoke(app, ["hub", *flag, "card", "nowhere", "--repo", "a/b"])
    assert isinstance(nested.exception, A2FPNError if debug else SystemExit)
    arguments = [*tiny_run(tmp_path), "model.name=maskrcnn_fpm_r50", "data.check_images=0", *flag]
    if debug:
        with pytest.raises(A2FPNError):
            train(arguments)
    else:
        assert train(arguments) == 2
        assert "train: error: Unknown model 'maskrcnn_fpm_r50'" in capsys.readouterr().err


def test_errors_of_the_system_are_about_input_only_if_they_name_a_file(tmp_path):
    with pytest.raises(OSError, match="No such file") as missing:
        (tmp_path / "gone").read_text()
    assert "gone" in message_for_users(missing.value)
    assert message_for_users(OSError("somewhere")) is None
    assert message_for_users(ConnectionResetError(104, "Connection reset")) is None
