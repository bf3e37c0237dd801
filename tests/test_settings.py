"""Settings of a training run: from text, from files, from Python; types, ranges and help."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.training.cli import main, parse
from a2fpn.training.config import DataSection, ModelSection, OptimSection, RunSection, TransformsSection
from a2fpn.training.settings import dump_yaml, load_yaml, setting_names
from a2fpn.training.state import write_config

OVERRIDES = "model: {overrides: {neck: a2fpn, neck_args: {out_channels: 64, nodes: [4, 2]}}}"


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(OVERRIDES)
    return str(file)


@pytest.mark.parametrize("as_option", [False, True])
def test_a_dotted_override_leaves_its_neighbors_alone(as_option, recipe):
    name = "model.overrides.neck_args.out_channels"
    more = [f"--{name}", "96"] if as_option else [f"{name}=96"]
    overrides = parse(["--config", recipe, "data.root=x", *more]).model.overrides
    assert overrides == {"neck": "a2fpn", "neck_args": {"out_channels": 96, "nodes": [4, 2]}}


def test_a_whole_dictionary_is_replaced_and_a_section_is_not(recipe):
    arguments = ["--config", recipe, "data.root=x", "optim.lr=0.5"]
    assert parse([*arguments, "model.overrides={}"]).model.overrides == {}
    assert parse([*arguments, "model.overrides.neck_args={x: 1}"]).model.overrides["neck_args"] == {"x": 1}
    optim = parse([*arguments, "optim={name: adamw}"]).optim
    assert (optim.name, optim.lr) == ("adamw", 0.5)


def test_a_later_recipe_goes_before_an_earlier_one_and_the_command_line_before_both(recipe, tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text("model: {overrides: {neck_args: {out_channels: 32}}}\noptim.lr: 1e-3\nrun: {epochs: 3}")
    for order in ([f"--config={recipe}", f"--config={later}"], ["--config", recipe, "--config", str(later)]):
        config = parse(["run.epochs=5", *order, "data.root=x"])
        assert config.model.overrides["neck_args"] == {"out_channels": 32, "nodes": [4, 2]}
        assert (config.optim.lr, config.run.epochs) == (1e-3, 5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optim.lr=1e-3", 0.001),
        ("optim.lr=1", 1.0),
        ("optim.clip_norm=null", None),
        ("data.root=2026", "2026"),
        ("run.name=2026-01-01", "2026-01-01"),
        ("run.output=a: b=[c", "a: b=[c"),
        ("run.name=1e3", "1e3"),
        ("run.resume=auto", "auto"),
        ("run.resume=true", True),
        ("run.mixed_precision=none", "none"),
        ("run.trackers=[]", ()),
        ("data.train_semantic=null", None),
        ("data.transforms.scale_range=[1, 2.5]", (1.0, 2.5)),
    ],
)
def test_a_value_has_the_type_of_its_setting(argument, value):
    name = argument.partition("=")[0]
    for spelling in ([argument], [f"--{argument}"], [f"--{name}", argument.partition("=")[2]]):
        found = parse(["data.root=x", *spelling])
        for part in name.split("."):
            found = getattr(found, part)
        assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run.epochs=1.5", "run.epochs: expected int, got 1.5"),
        ("run.val_loss=1", "run.val_loss: expected bool, got 1"),
        ("optim.lr=true", "optim.lr: expected float, got True"),
        ("data.transforms.scale_range=[1]", "data.transforms.scale_range: expected a list of 2, got [1]"),
        ("data.oks_sigmas=[x]", "data.oks_sigmas[0]: expected float, got 'x'"),
        ("model.overrides=3", "model.overrides: expected an object, got 3"),
        ("optim=3", "optim: expected an object with the fields of OptimSection, got int"),
        ("run.epochs=[1", "run.epochs: invalid YAML"),
        ("optim.lr.x=1", "unknown setting 'optim.lr.x'. Did you mean 'optim.lr'?"),
        ("--run.epochs", "--run.epochs needs a value"),
        ("epochs", "unexpected argument 'epochs'"),
        ("--resume", "expected one argument"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_setting_and_value(argument, message, capsys):
    assert main(["data.root=x", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["[1, 2]", "text", "3"])
def test_a_recipe_holds_sections(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigTypeError, match=r"recipe.yaml: expected settings by section"):
        parse(["--config", str(tmp_path / "recipe.yaml"), "data.root=x"])


@pytest.mark.parametrize(
    ("section", "name", "good", "bad"),
    [
        (DataSection, "data.batch_size", 1, 0),
        (DataSection, "data.eval_batch_size", 1, 0),
        (DataSection, "data.workers", 0, -1),
        (DataSection, "data.copy_paste", 1.0, 1.01),
        (TransformsSection, "data.transforms.horizontal_flip", 0.0, -0.01),
        (TransformsSection, "data.transforms.crop_size", 1, 0),
        (TransformsSection, "data.transforms.min_sizes", (1, 2), (1, 0)),
        (OptimSection, "optim.lr", 1e-300, 0.0),
        (OptimSection, "optim.lr", 1.0, math.nan),
        (OptimSection, "optim.momentum", 1.0, 1.1),
        (OptimSection, "optim.milestones", (0.0, 1.0), (0.5, 1.1)),
        (OptimSection, "optim.clip_norm", None, -1.0),
        (RunSection, "run.epochs", 1, 0),
        (RunSection, "run.max_steps", None, 0),
        (RunSection, "run.ema", 0.0, 1.1),
        (RunSection, "run.seed", 0, -1),
    ],
)
def test_a_setting_has_a_range_in_python_and_as_text(section, name, good, bad):
    key = name.rpartition(".")[2]
    more = {"root": "x"} if section is DataSection else {}
    assert getattr(section(**more, **{key: good}), key) == good
    as_yaml = [dump_yaml(list(v) if isinstance(v, tuple) else v).removesuffix("...\n") for v in (good, bad)]
    assert parse(["data.root=x", f"{name}={as_yaml[0]}"])
    for build in (lambda: section(**more, **{key: bad}), lambda: parse(["data.root=x", f"{name}={as_yaml[1]}"])):
        with pytest.raises(ConfigError, match=rf"{name} must be (at least \d|more than 0)( and at most 1)?, got "):
            build()


def test_types_are_checked_in_python_too():
    assert OptimSection(lr=1, milestones=[0.5]) == OptimSection(lr=1.0, milestones=(0.5,))
    with pytest.raises(ConfigTypeError, match=r"run.epochs: expected int, got '3'"):
        RunSection(epochs="3")
    with pytest.raises(ConfigError, match=r"optim.name: expected one of 'sgd', 'adamw', got 'adam'"):
        OptimSection(name="adam")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), inner),
    max_leaves=6,
)


@given(value=json_values)
def test_values_survive_yaml(value):
    assert load_yaml(dump_yaml(value), "here") == value


@pytest.mark.parametrize("text", ["1e-3", "2026-01-01", "null", "1", "yes", "1.5e+3", ".5e1"])
def test_text_that_looks_like_something_else_survives_a_written_config(text, tmp_path):
    config = parse(["data.root=x", f"run.name={text}", f"model.overrides={{neck: '{text}'}}", "optim.lr=1e-7"])
    assert config.model == ModelSection(overrides={"neck": text})
    write_config(config, tmp_path)
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_the_printed_settings_are_a_recipe(recipe, tmp_path, capsys):
    arguments = ["--config", recipe, "data.root=x", "--strict-data", "--resume", "auto"]
    assert main([*arguments, "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = parse(["--config", str(printed)])
    assert config == parse(arguments)
    assert (config.data.strict, config.run.resume) == (True, "auto")
    assert set(yaml.safe_load(printed.read_text())) == {"data", "model", "optim", "run"}


def test_the_help_shows_type_default_and_sentence_of_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in setting_names():
        (at,) = (index for index, line in enumerate(lines) if line.startswith(f"  --{name} "))
        assert ", default " in lines[at] or lines[at].endswith(", required"), name
        assert len(lines[at + 1].split()) > 0, name
        assert lines[at + 1].startswith(" " * 6), name
    assert '  --optim.name sgd | adamw, default "sgd"' in lines
    assert "  --data.root str, required" in lines


def test_without_arguments_the_usage_is_shown(capsys):
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: train [--config RECIPE] data.root=DIR")
    assert main(["optim.lr=1"]) == 2
    assert "the setting data.root is missing" in capsys.readouterr().err
