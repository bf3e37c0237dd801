"""Recipes by name, by path and copied; the list of them."""

import pytest

from a2fpn.training.cli import main, parse
from a2fpn.training.recipes import find_recipe, list_recipes
from a2fpn.training.state import write_config


def test_all_are_listed_with_a_line_each(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_recipes())
    assert "nuclei_lite0" in list_recipes()
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name != "auto"])  # which looks at data
def test_a_name_is_a_recipe(name):
    assert parse(["--config", name, "data.root=x"]) == parse([f"--config={find_recipe(name)}", "data.root=x"])


def test_a_file_goes_before_a_recipe_and_the_old_path_still_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("train/recipes/nuclei_lite0.yaml") == find_recipe("nuclei_lite0")
    (tmp_path / "nuclei_lite0").write_text("run: {epochs: 3}")
    assert parse(["--config", "nuclei_lite0", "data.root=x"]).run.epochs == 3


def test_a_copy_is_the_recipe_and_replaces_nothing(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    assert main(["--copy", "nuclei_lite0", str(file)]) == 0
    assert parse(["--config", str(file), "data.root=x"]) == parse(["--config", "nuclei_lite0", "data.root=x"])
    file.write_text("mine")
    assert main(["--copy", "nuclei_lite0", str(file)]) == 2
    assert file.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_an_unknown_recipe_names_the_likely_one(capsys):
    assert main(["--config", "nuclei_lite1", "data.root=x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train: error: 'nuclei_lite1' is neither a file nor a recipe. Did you mean 'nuclei_lite0'")
    assert error.count("\n") == 1


def test_keys_of_older_recipes_are_renamed(tmp_path):
    text = find_recipe("nuclei_lite0").read_text()
    assert "color_jitter: 0.3" in text
    file = tmp_path / "old.yaml"
    file.write_text(text.replace("color_jitter", "colour_jitter"))
    current = parse(["--config", "nuclei_lite0", "data.root=x"])
    assert current.data.transforms.color_jitter == 0.3
    assert parse(["--config", str(file), "data.root=x"]) == parse([f"--config={file}", "data.root=x"]) == current
    write_config(current, tmp_path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(resolved.read_text().replace("color_jitter", "colour_jitter"))
    assert parse(["--config", str(resolved)]) == current
