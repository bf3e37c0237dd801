import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import a2fpn
from a2fpn.data import write_shards
from a2fpn.device import without_values
from a2fpn.training import keeper
from a2fpn.training.cli import main, parse
from a2fpn.training.config import OptimSection, RunSection, TrainConfig
from a2fpn.training.monitor import LossWindow
from a2fpn.training.optim import build_optimizer, lr_factor, parameter_groups, scaled_lr, set_rate
from a2fpn.training.processes import check_processes
from a2fpn.training.recipes import list_recipes
from a2fpn.training.settings import setting_names
from a2fpn.training.trainer import Trainer
from tests.training import metrics, tiny_run

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [ROOT / "a2fpn" / "training" / "recipes" / f"{name}.yaml" for name in list_recipes() if name != "auto"]


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Each run starts like a new process, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a tiny run: 4 training and 3 validation images."""
    return tiny_run(tmp_path)


# The command line


def test_the_command_line_overrides_the_recipe_which_overrides_the_defaults(arguments):
    config = parse([*arguments, "optim.lr=0.5", "--run.epochs", "7", "--model.overrides.min_size=96"])
    assert (config.optim.lr, config.run.epochs) == (0.5, 7)  # the command line, in both spellings
    assert config.optim.name == "adamw"  # the recipe
    assert config.optim.weight_decay == OptimSection().weight_decay  # the default
    assert config.model.overrides["min_size"] == 96
    assert config.model.overrides["box_channels"] == 32  # an override leaves its neighbors alone


def test_an_argument_after_an_option_is_its_value_even_with_an_equals_sign():
    assert parse(["data.root=x", "--run.output", "a=b"]).run.output == "a=b"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.lrr=0.1", "optim.lr"),
        ("optm.lr=0.1", "optim.lr"),
        ("--data.transforms.crop", "data.transforms.crop_size"),
        ("batchsize=4", "data.batch_size"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_the_right_one(wrong, right, capsys):
    assert main(["data.root=x", wrong]) == 2
    error = capsys.readouterr().err
    assert f"Did you mean '{right}'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("optim: {lrr: 1}", "unknown setting 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("data: {transforms: {crop: 3}}", "'data.transforms.crop'. Did you mean 'data.transforms.crop_size'?"),
        ("nothing_alike: 3", "unknown setting 'nothing_alike'. See --help"),
        ("optim: {lr: high}", "optim.lr: expected float, got 'high'"),
        ("optim: {name: adam}", "optim.name: expected one of 'sgd', 'adamw', got 'adam'"),
        ("optim: {", "recipe.yaml: invalid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(recipe, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["--config", str(tmp_path / "recipe.yaml"), "data.root=x"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_annotations=nothing.json", "holds coco labels and no nothing.json"),
        ("data.val_annotations=nothing.json", "has no nothing.json. Split the training set: a2fpn data split"),
        ("data.val_images=nothing", "nothing: no such folder"),
        ("data.train_annotations=recipe.yaml", "not valid JSON"),
        ("model.name=maskrcnn_a2fpm_r50", "Did you mean 'maskrcnn_a2fpn_r50'"),
        ("model.overrides.min_siez=3", "Did you mean 'min_size'"),
        ("model.backbone_weights=nothing.safetensors", "'nothing.safetensors' do not exist"),
        ("data.transforms.crop_size=0", "crop_size must be at least 1"),
        ("run.resume=true", "no training state"),
        ("run.mixed_precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_input_that_does_not_fit_is_one_line_and_exit_code_2(override, message, arguments, capsys):
    assert main([*arguments, override]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert not any("Traceback" in line for line in error)


def test_started_as_a_folder_it_finds_the_repository(arguments):
    command = [sys.executable, ROOT / "train", *arguments, "--print_config"]
    shown = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout)
    assert shown["run"]["name"] == "tiny"


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name in setting_names():
        assert f"--{name} " in text
    assert "Peak learning rate" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_builds_its_model(recipe):
    config = parse(["--config", str(recipe), "data.root=x"])
    with without_values():
        model = a2fpn.create_model(config.model.name, num_classes=1, **config.model.overrides)
    assert config.run.name == recipe.stem
    assert config.run.max_detections == model.config.heads.detections_per_image


# Optimizer and schedule

SCHEDULES = st.builds(
    OptimSection,
    schedule=st.sampled_from(["step", "cosine"]),
    warmup_steps=st.integers(0, 20),
    warmup_factor=st.floats(0, 1),
    final_factor=st.floats(0, 1),
)


@given(config=SCHEDULES, total=st.integers(1, 200), data=st.data())
def test_the_learning_rate_stays_between_zero_and_its_peak_and_never_rises_after_the_warm_up(config, total, data):
    step = data.draw(st.integers(0, total - 1))
    here, after = (lr_factor(s, total_steps=total, config=config) for s in (step, step + 1))
    assert 0 <= here <= 1 + 1e-9
    assert (
        (here <= after + 1e-9)
        if step < config.warmup_steps - 1
        else (after <= here + 1e-9 or step + 1 == config.warmup_steps)
    )


def test_the_step_schedule_falls_at_its_milestones():
    config = OptimSection(schedule="step", milestones=(0.5, 0.9), gamma=0.1, warmup_steps=0)
    rates = [lr_factor(step, total_steps=10, config=config) for step in range(10)]
    assert rates == pytest.approx([1] * 5 + [0.1] * 4 + [0.01])


def test_matrices_decay_vectors_do_not_and_the_backbone_has_its_own_rate():
    model = a2fpn.create_model("fasterrcnn_fpn", backbone="test_resnet", num_classes=2, trainable_layers=2)
    config = OptimSection(lr=0.1, weight_decay=0.05, backbone_lr_factor=0.5)
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config, lr=config.lr)
        for parameter in group["params"]
    }
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(settings) == len(trainable) < len(list(model.parameters()))
    for name, parameter in trainable.items():
        lr = 0.05 if name.startswith("backbone.") else 0.1
        assert settings[id(parameter)] == (lr, 0.05 if parameter.ndim > 1 else 0.0), name


def test_rates_decay_layer_by_layer_towards_the_image():
    model = a2fpn.create_model("fasterrcnn_fpn", backbone="test_resnet", num_classes=2)
    groups = parameter_groups(model, OptimSection(layer_decay=0.5), lr=0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    of = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    layers = model.backbone.layer_ids()
    depth = 1 + max(layers.values())
    assert depth > 2
    for name, layer in layers.items():
        assert of[f"backbone.{name}"] == pytest.approx(0.1 * 0.5 ** (depth - layer)), name
    assert {rate for name, rate in of.items() if not name.startswith("backbone.")} == {0.1}


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 0.25), ("sqrt", 0.5), ("none", 1.0)])
def test_the_rate_follows_the_images_per_step(scaling, factor):
    assert scaled_lr(OptimSection(lr=0.02, lr_scaling=scaling), 4) == pytest.approx(0.02 * factor)


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), OptimSection(), lr=1.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_each_optimizer_follows_the_schedule(name):
    config = OptimSection(name=name, lr=0.1, schedule="cosine", warmup_steps=2, warmup_factor=0.5, final_factor=0.0)
    optimizer = build_optimizer(nn.Linear(2, 2), config, lr=config.lr)
    rates = [set_rate(optimizer, lr_factor(step, total_steps=4, config=config)) for step in range(4)]
    assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}
    assert rates == pytest.approx([0.05, 0.075, 0.1, 0.05])


# Runs


def test_a_run_learns_evaluates_and_leaves_loadable_checkpoints(arguments, tmp_path, capsys):
    arguments += ["model.name=maskrcnn_a2fpn", "run.epochs=12", "run.evaluate_every=6", "optim.lr=3e-3"]
    assert main(arguments) == 0
    output = tmp_path / "run"
    records = metrics(output)
    assert [record["epoch"] for record in records] == list(range(1, 13))
    assert [record["epoch"] for record in records if "segm/ap" in record] == [6, 12]
    assert records[-1]["step"] == 24
    assert records[-1]["images_evaluated"] == 3
    losses = [record["train/loss"] for record in records]
    assert sum(losses[-4:]) / 4 < 0.65 * losses[0]
    parts = sum(value for name, value in records[0].items() if name.startswith("train/loss_"))
    assert parts == pytest.approx(records[0]["train/loss"], rel=1e-4)
    assert list((output / "tiny").glob("events*"))
    assert parse(["--config", str(output / "config.yaml")]) == parse(arguments)

    best = max((r for r in records if "segm/ap" in r), key=lambda record: record["segm/ap"])
    last_lines = capsys.readouterr().out.splitlines()[-3:]
    assert last_lines[0].endswith(f"(segm/ap {best['segm/ap']:.4f} after epoch {best['epoch']})")
    assert last_lines[1].endswith(f'model = a2fpn.from_pretrained("{output / "best"}")')
    model = a2fpn.from_pretrained(output / "best")
    assert [category.id for category in model.config.categories] == [7, 23, 90]
    metadata = json.loads((output / "best" / "config.json").read_text())["metadata"]
    assert (metadata["recipe"], metadata["epochs"], metadata["seed"]) == ("tiny", best["epoch"], 3)
    assert metadata["metrics"]["segm/ap"] == best["segm/ap"]


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """As an FSDP configuration of Accelerate starts them without a GPU."""
    accelerator = Accelerator(cpu=True)
    check_processes(accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each knows of 1 only"):
        check_processes(accelerator)


def test_an_existing_run_is_not_overwritten(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_gradient_accumulation_counts_steps_and_max_steps_ends_the_run(arguments, tmp_path):
    trainer = Trainer(parse([*arguments, "data.batch_size=1", "run.grad_accumulation=2", "run.max_steps=3"]))
    trainer.run()
    assert [(record["epoch"], record["step"]) for record in metrics(tmp_path / "run")] == [(1, 2), (2, 3)]
    assert (trainer.state.step, trainer.state.images) == (3, 6)


def test_the_moving_average_is_what_is_evaluated_and_saved(arguments, tmp_path):
    trainer = Trainer(parse([*arguments, "run.ema=0.9", "run.epochs=1"]))
    trainer.run()
    saved = a2fpn.from_pretrained(tmp_path / "run" / "last").state_dict()
    average, trained = trainer.ema.module.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in average.items())
    assert any(not torch.allclose(saved[name], value) for name, value in trained.items())


def test_the_moving_average_warms_up_with_the_steps(arguments):
    """Its decay in step k is ``1 - k ** (-2 / 3)``, at most the one set: a short run is not averaged with its start."""
    trainer = Trainer(parse([*arguments, "run.ema=0.5", "run.epochs=2"]))
    name, weight = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    after: list[torch.Tensor] = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: after.append(weight.detach().clone()))
    trainer.run()
    assert len(after) == 4
    expected = after[0]
    for decay, value in zip([0.3700, 0.5, 0.5], after[1:], strict=True):
        expected = decay * expected + (1 - decay) * value
    average = trainer.ema.module.get_parameter(name)
    torch.testing.assert_close(average, expected, rtol=0, atol=float((after[1] - after[0]).abs().max()) / 100)
    assert not torch.allclose(average, after[-1], rtol=0, atol=float((after[1] - after[0]).abs().max()) / 10)


def test_bf16_and_a_box_detector_train(arguments, tmp_path):
    overrides = ["model.name=fasterrcnn_fpn", "run.mixed_precision=bf16", "run.max_steps=1", "optim.name=sgd"]
    assert main([*arguments, *overrides]) == 0
    (record,) = metrics(tmp_path / "run")
    assert math.isfinite(record["train/loss"])
    assert "bbox/ap" in record
    assert "segm/ap" not in record
    assert all(
        v.dtype != torch.bfloat16 for v in a2fpn.from_pretrained(tmp_path / "run" / "best").state_dict().values()
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(arguments, capsys):
    assert main([*arguments, "optim.lr=1e25", "optim.name=sgd", "optim.clip_norm=null", "optim.warmup_steps=0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The loss is not finite in step 2" in error
    assert any(f"{image_id}" in error for image_id in (100, 103, 106, 109))


def test_a_bad_image_is_skipped_and_counted(arguments, tmp_path, capsys):
    (tmp_path / "train" / "images" / "1.png").write_bytes(b"no image")
    (tmp_path / "val" / "images" / "0.png").unlink()
    assert main([*arguments, "run.epochs=1", "data.workers=1"]) == 0
    assert capsys.readouterr().out.startswith("Skipped 2 unreadable images: 0.png, 1.png\n")
    assert metrics(tmp_path / "run")[-1]["images_evaluated"] == 2


def test_a_bad_image_stops_a_strict_run(arguments, tmp_path, capsys):
    (tmp_path / "train" / "images" / "1.png").write_bytes(b"no image")
    assert main([*arguments, "run.epochs=1", "--strict-data", "data.workers=1"]) == 2
    assert "1.png: not a readable image" in capsys.readouterr().err.splitlines()[-1]


def test_a_keypoint_detector_learns_the_names_and_is_measured_by_its_keypoints(arguments, tmp_path):
    for part in ("train", "val"):
        path = tmp_path / part / "annotations.json"
        document = json.loads(path.read_text())
        for category in document["categories"]:
            category["keypoints"] = ["left corner", "right corner"]
        for annotation in document["annotations"]:
            x, y, width, _ = annotation["bbox"]
            annotation["keypoints"] = [x, y, 2, x + width, y, 2]
        path.write_text(json.dumps(document))
    recipe = tmp_path / "recipe.yaml"
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if "mask_" not in line))
    more = ["model.name=keypointrcnn_fpn", "model.overrides.keypoint_layers=1", "model.overrides.keypoint_channels=16"]
    assert main([*arguments, *more, "run.epochs=1"]) == 2  # 2 keypoints, 17 sigmas
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments, *more, "run.epochs=1", "data.oks_sigmas=[0.1,0.1]"]) == 0
    (record,) = metrics(tmp_path / "run")
    assert "keypoints/ap" in record
    model = a2fpn.from_pretrained(tmp_path / "run" / "best")
    assert list(model.config.heads.keypoint_names) == ["left corner", "right corner"]


def test_the_log_says_to_what_the_rate_was_scaled(arguments, tmp_path):
    assert main([*arguments, "run.max_steps=1", "optim.lr=0.16", "optim.lr_batch_size=16"]) == 0
    assert (
        "learning rate 0.02, which is 0.16 for 16 images, scaling: linear" in (tmp_path / "run/train.log").read_text()
    )


def test_images_of_both_splits_are_named(arguments, tmp_path):
    both = ["data.val_images=train/images", "data.val_annotations=train/annotations.json", "run.max_steps=1"]
    assert main([*arguments, *both]) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "the training and the validation set have 4 images in common, such as 0.png: the metrics will be" in log


def test_data_as_people_have_it_trains_and_is_named_in_the_log(arguments, tmp_path):
    """Few masks, a byte order mark, free text for metadata, and settings that can have no effect."""
    path = tmp_path / "train" / "annotations.json"
    document = json.loads(path.read_text())
    for annotation in document["annotations"][1:]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(document | {"info": "made by a script", "licenses": "mine"}), encoding="utf-8-sig")
    assert main([*arguments, "run.max_steps=2", "optim.warmup_steps=2", "run.evaluate_every=9"]) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert re.search(r"train/annotations\.json: 1 of \d+ objects have masks; the others are used for boxes only", log)
    assert "optim.warmup_steps=2: the run has 2 steps, so the learning rate never reaches optim.lr" in log
    assert "run.max_detections=100: the model finds at most 10 objects in an image" in log
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["run.max_steps=3", "optim.warmup_steps=2", "run.max_detections=10", f"run.output={tmp_path / 'quiet'}"]
    assert main([*arguments, *more]) == 0
    log = (tmp_path / "quiet/train.log").read_text()
    assert "warmup_steps" not in log
    assert "max_detections" not in log


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_that_would_end_in_an_ap_of_0_is_stopped_with_the_reason(part, arguments, tmp_path, capsys):
    path = tmp_path / part / "annotations.json"
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(document))
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{part}/annotations.json: Every one of the" in error
    assert "is a crowd" in error
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments, "data.check_images=0", "run.max_steps=1"]) == 0


def test_a_run_stops_when_it_gets_no_better(arguments, tmp_path):
    assert main([*arguments, "run.epochs=9", "run.patience=2", "optim.lr=1e-30", "optim.warmup_steps=0"]) == 0
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
    assert "Stopping early: no better segm/ap in 2 evaluations." in (tmp_path / "run/train.log").read_text()


def test_validation_losses_fall_with_training_and_change_nothing(arguments, tmp_path):
    more = ["run.epochs=6", "run.evaluate_every=3", "optim.lr=3e-3"]
    assert main([*arguments, *more, "run.val_loss=true"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    with_losses = [record for record in metrics(tmp_path / "run") if "val/loss" in record]
    assert [record["epoch"] for record in with_losses] == [3, 6]
    first, last = with_losses
    assert {name.removeprefix("val/") for name in first if name.startswith("val/")} == {
        name.removeprefix("train/") for name in first if name.startswith("train/")
    }
    assert 0 < last["val/loss"] < first["val/loss"]
    arguments[-1] = f"run.output={tmp_path / 'without'}"
    assert main([*arguments, *more]) == 0
    ours, theirs = (a2fpn.from_pretrained(tmp_path / run / "last").state_dict() for run in ("run", "without"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture
def plotted(monkeypatch):
    """Numbers of epochs in the plots that are drawn."""
    epochs = []
    plot = keeper.plot_metrics
    monkeypatch.setattr(
        keeper, "plot_metrics", lambda records, path: (epochs.append(len(records)), plot(records, path))
    )
    return epochs


def test_the_plot_is_drawn_after_each_evaluation_that_takes_its_time(arguments, plotted, monkeypatch):
    monkeypatch.setattr(keeper, "PLOT_SECONDS", 0)
    assert main([*arguments, "run.epochs=3", "run.evaluate_every=2", "run.pictures=0", "run.trackers=[]"]) == 0
    assert plotted == [2, 3]


def test_a_loader_process_that_is_missed_while_cleaning_up_is_named_too(arguments, monkeypatch, capsys):
    """Torch raises its error in a signal handler, so also behind the epochs."""

    def close(self):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(keeper.Keeper, "close", close)
    assert main([*arguments, "run.epochs=1", "run.trackers=[]"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "DataLoader worker (pid 7) is killed by signal: Killed. If memory ran out, lower data.workers" in message


def test_a_run_leaves_pictures_a_plot_a_log_and_tracked_images(arguments, tmp_path, plotted):
    assert main([*arguments, "run.epochs=2", "run.pictures=2"]) == 0
    for name, least in {
        "predictions/epoch_001.jpg": 300,
        "predictions/epoch_002.jpg": 300,
        "metrics.png": 1000,
    }.items():
        with Image.open(tmp_path / "run" / name) as picture:
            picture.load()
            assert picture.width > least
    assert plotted == [2]  # of a short run once, at its end
    log = (tmp_path / "run" / "train.log").read_text()
    assert "images per step" in log
    assert "Epoch 2/2: loss" in log
    events = EventAccumulator(str(tmp_path / "run" / "tiny"))
    events.Reload()
    assert events.Tags()["images"] == ["val/predictions"]
    assert {"train/loss", "val/segm/ap", "lr", "waiting_for_data"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_trackio_takes_the_numbers_and_pictures(arguments, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    arguments += ["run.epochs=1", "run.trackers=[trackio]"]
    code = f"import sys; from a2fpn.training.cli import main; sys.exit(main({arguments!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert trackio
    assert list((tmp_path / "trackio").rglob("*.db"))
    assert list((tmp_path / "trackio").rglob("*.jpg")) + list((tmp_path / "trackio").rglob("*.png"))


@pytest.mark.parametrize("kind", ["shards", "datasets"])
def test_a_streamed_run_is_cut_off_and_ends_as_if_nothing_had_happened(kind, arguments, tmp_path, monkeypatch):
    source = (tmp_path / "train" / "images", tmp_path / "train" / "annotations.json")
    if kind == "shards":
        write_shards(*source, tmp_path / "shards", samples_per_shard=2)
        stream = [f"data.stream.shards={tmp_path / 'shards'}", "model.name=maskrcnn_a2fpn"]
    else:
        datasets = pytest.importorskip("datasets", reason="pip install datasets")
        from tests.test_streams import features, rows  # a module that is skipped without datasets

        names = datasets.ClassLabel(names=["shape 7", "shape 23", "shape 90"])
        table = datasets.Dataset.from_list(rows(source, category="labels"), features=features(names))
        table.save_to_disk(str(tmp_path / "table"))
        stream = [f"data.stream.dataset={tmp_path / 'table'}"]
    more = [*stream, "data.group_by_aspect=false", "run.epochs=2", "run.checkpoint_every=1", "run.resume=auto"]
    more += ["run.evaluate_every=2", "run.pictures=0"]
    assert main([*arguments, *more]) == 0
    whole = a2fpn.from_pretrained(tmp_path / "run" / "last").state_dict()
    assert [record["step"] for record in metrics(tmp_path / "run")] == [2, 4]

    arguments[-1] = f"run.output={tmp_path / 'again'}"
    for stop in (1, 3, None):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(Trainer, "_step", interrupted_at(stop))
            assert main([*arguments, *more]) == (130 if stop else 0)
    resumed = a2fpn.from_pretrained(tmp_path / "again" / "last").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def interrupted_at(step: int):
    original = Trainer._step

    def interrupt(trainer, *arguments):
        if trainer.state.step == step:
            raise KeyboardInterrupt
        original(trainer, *arguments)

    return interrupt


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "data.group_by_aspect needs a folder of images; set it to False"),
        (["data.group_by_aspect=false", "data.copy_paste=0.5"], "data.copy_paste needs a folder of images"),
        (["data.stream.dataset=x"], "are mutually exclusive"),
    ],
)
def test_what_a_stream_cannot_do_is_an_error(more, message, arguments, tmp_path, capsys):
    assert main([*arguments, f"data.stream.shards={tmp_path}", *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_masks_are_needed_for_a_mask_detector(arguments, tmp_path, capsys):
    path = tmp_path / "train" / "annotations.json"
    document = json.loads(path.read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(document))
    assert main(arguments) == 2
    assert "has no masks, which maskrcnn trains on. Without masks use fasterrcnn." in capsys.readouterr().err


# Small parts


def test_a_loss_window_is_the_mean_since_the_last_reading():
    window = LossWindow(Accelerator(cpu=True))
    for value in (1.0, 3.0):
        window.add({"loss": torch.tensor(value)}, images=2)
    assert window.read()[0] == {"loss": 2.0}
    window.add({"loss": torch.tensor(5.0)}, images=2)
    assert window.read()[0] == {"loss": 5.0}


def test_settings_are_immutable():
    config = TrainConfig(data=parse(["data.root=x"]).data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run = RunSection()
