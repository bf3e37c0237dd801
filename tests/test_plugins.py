"""Necks from packages outside: by --import, by an entry point, and in checkpoints."""

import json
import textwrap
from pathlib import Path

import pytest

import a2fpn
from tests.helpers import tiny_model
from tests.processes import run_a2fpn, run_python

PACKAGE = """
import a2fpn

@a2fpn.register_neck("outside")
class Outside(a2fpn.Neck):
    def __init__(self, in_spec, *, out_channels=16):
        super().__init__(in_spec, out_channels=out_channels)
        from torch import nn
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, out_channels, 1) for level in in_spec.values())

    def fuse(self, features, valid):
        return [layer(x) for layer, x in zip(self.lateral, features)]
"""
SAVE = """
import sys, a2fpn, necks_from_outside
a2fpn.save_pretrained(a2fpn.create_model("fasterrcnn_outside", backbone="test_resnet", num_classes=2), sys.argv[1])
"""


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with a package that nothing has imported yet."""
    folder = tmp_path / "site" / "necks_from_outside"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    return folder.parent


def test_a_checkpoint_names_the_package_and_never_imports_it(site, tmp_path):
    saved = run_python(SAVE, tmp_path / "saved", path=[site])
    assert saved.returncode == 0, saved.stderr
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["metadata"]["packages"] == [
        "necks_from_outside"
    ]
    command = ("info", tmp_path / "saved")
    refused = run_a2fpn(*command, path=[site])
    assert refused.returncode == 2
    assert "needs necks_from_outside" in refused.stderr
    assert "--import necks_from_outside" in refused.stderr
    imported = run_a2fpn("--import", "necks_from_outside", *command, path=[site])
    assert imported.returncode == 0, imported.stderr
    assert "outside" in imported.stdout
    missing = run_a2fpn("--import", "necks_from_inside", *command, path=[site])
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "--import necks_from_inside: module 'necks_from_inside' not found." in missing.stderr


def test_an_entry_point_is_found_when_its_name_is_asked_for(site):
    info = site / "necks_from_outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: necks-from-outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[a2fpn.plugins]\nnecks = necks_from_outside\nbroken = no_such_module\n")
    code = """
        import sys, a2fpn
        assert "necks_from_outside" not in sys.modules
        model = a2fpn.create_model("fasterrcnn_outside_r18", num_classes=2)
        assert type(model.neck).__module__ == "necks_from_outside"
        assert "outside" in a2fpn.list_necks()
    """
    done = run_python(textwrap.dedent(code), path=[site])
    assert done.returncode == 0, done.stderr
    assert "no_such_module" in done.stderr  # a plugin that fails says so, once, and stops nobody
    assert done.stderr.count("The plugin broken") == 1


def test_models_of_the_package_name_none(tmp_path):
    folder = a2fpn.save_pretrained(tiny_model(), tmp_path)
    assert "packages" not in json.loads((folder / "config.json").read_text())["metadata"]
