"""Paired comparisons: arms, settings, intervals, records, and processes that are stopped in time."""

import json
import math
import random
import re
import statistics
import sys

import pytest
import typer

from a2fpn import list_necks
from a2fpn.training.cli import parse
from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation.arms import ARMS, Arm, choose, parse_arm, with_detectors
from benchmarks.ablation.paired import difference, t_quantile
from benchmarks.ablation.plan import RECIPES, Plan, find_recipe
from benchmarks.ablation.pool import Pool, environment, multi_process_service
from benchmarks.ablation.records import Record, append_record, check_fingerprint, read_records, seen
from benchmarks.ablation.report import Comparison, findings, print_report, write_page
from tests.coco_data import write_coco
from tests.training import TINY_RECIPE, tiny_run


@pytest.mark.parametrize(
    ("degrees", "expected"),  # tables of Student's t
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (29, 2.0452), (200, 1.9719)],
)
def test_quantiles_of_students_t(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-5)


def test_the_interval_holds_the_true_difference_in_19_of_20_cases():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        control = {seed: draw.gauss(30, 5) for seed in range(4)}
        delta = difference({seed: x + draw.gauss(0.7, 0.4) for seed, x in control.items()}, control)
        held += abs(delta.mean - 0.7) <= delta.half
    assert 0.935 <= held / 2000 <= 0.965


def test_a_single_pair_has_no_interval_and_none_no_difference():
    assert str(difference({0: 2.0}, {0: 1.0, 1: 5.0})) == "+1.00 (n = 1, no interval)"
    assert difference({0: 2.0}, {0: 1.0}).includes_zero
    assert str(difference({0: 2.0}, {1: 1.0})) == "no pair"


@pytest.mark.parametrize(("values", "zero"), [([1.0, 1.1], False), ([1.0, -0.9], True), ([-1.0, -1.1], False)])
def test_intervals_with_and_without_zero(values, zero):
    assert difference(dict(enumerate(values)), {0: 0.0, 1: 0.0}).includes_zero is zero


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_arms_are_settings_of_the_training_and_keep_those_of_the_recipe(arm, tmp_path):
    plan = Plan(find_recipe("facades"), tmp_path, tmp_path / "out", settings=("run.epochs=3",))
    command = plan.command(plan.run(arm, 4))
    config = parse(command[command.index("--config") :])
    assert config.run.seed == 4
    assert config.run.epochs == 3
    assert config.model.overrides["neck_args"]["out_channels"] == 128  # beside what the arm adds
    assert config.model.overrides["neck"] in arm.settings[0]


def test_arms_name_necks():
    names = {setting.partition("neck=")[2] for arm in ARMS.values() for setting in arm.settings[:1]}
    assert names - set(list_necks()) <= {"dysample_fpn"}
    assert len({arm.settings for arm in ARMS.values()}) == len(ARMS)


def test_the_control_comes_first_and_seeds_are_completed_one_by_one(tmp_path):
    arms = choose(["pafpn", "fpn"], [parse_arm("own=model.overrides.neck=a2fpn")], control="fpn")
    runs = Plan(find_recipe("facades"), tmp_path, tmp_path).runs(arms, 2)
    assert [str(run) for run in runs] == ["fpn/0", "pafpn/0", "own/0", "fpn/1", "pafpn/1", "own/1"]


def test_each_detector_has_its_own_control():
    arms = with_detectors(choose(["fpn", "a2fpn"], [], control="fpn"), ["maskrcnn", "htc"], "maskrcnn_fpn_lite0")
    assert [(arm.name, arm.control) for arm in arms[2:]] == [("htc.fpn", "htc.fpn"), ("htc.a2fpn", "htc.fpn")]
    assert arms[3].settings == ("model.overrides.neck=a2fpn", "model.name=htc_fpn_lite0")


def plan_with(*settings):
    return Plan(find_recipe("facades"), RECIPES, RECIPES, settings=settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose(["fpn", "nosuch"], [], control="fpn"), "Unknown arm 'nosuch'; there are fpn"),
        (lambda: choose(["pafpn"], [], control="fpn"), "The control 'fpn' is not among the arms pafpn"),
        (lambda: choose(["fpn", "fpn"], [], control="fpn"), "Arm 'fpn' is given twice"),
        (lambda: parse_arm("own"), "An arm reads NAME=section.key=value"),
        (lambda: parse_arm("own=neck"), "must read section.key=value, got 'neck'"),
        (lambda: parse_arm("../x=model.name=y"), "named with letters"),
        (lambda: with_detectors([ARMS["fpn"]], ["yolo"], "maskrcnn_fpn_lite0"), "Unknown detector 'yolo'"),
        (lambda: with_detectors([ARMS["fpn"]], ["htc"], "tiny"), "'tiny' does not begin with a detector"),
        (lambda: find_recipe("nosuch"), "No recipe 'nosuch'; give a file or one of facades, nuclei, nwpu_vhr10"),
        (lambda: plan_with("epochs=3").fingerprint(), "unknown setting 'epochs'"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_settings_are_joined_with_those_of_the_recipe_and_lists_replaced(tmp_path):
    settings = ("model.overrides.neck_args.attention=dot", "model.overrides.anchor_sizes=[[4]]", "optim.lr=4e-4")
    plan = Plan(find_recipe("facades"), tmp_path, tmp_path, settings=settings)
    got = plan.config(plan.run(ARMS["fpn"], 0))
    assert got["model"]["overrides"]["neck_args"] == {"out_channels": 128, "attention": "dot"}
    assert got["model"]["overrides"]["anchor_sizes"] == [[4]]
    assert got["optim"]["lr"] == 4e-4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_settings_that_end_at_rate_zero_and_evaluate_before_the_end(path):
    config = parse(["--config", str(path), "data.root=x"])
    assert config.optim.final_factor == 0
    assert config.run.epochs / config.run.evaluate_every >= 2
    assert config.run.trackers == ()
    assert config.data.eval_batch_size > 1


def test_what_a_training_sees_depends_on_seed_and_data_settings_and_on_nothing_of_the_arm(tmp_path):
    arguments = tiny_run(tmp_path)

    def of(*settings, epochs=2):
        return seen(parse([*arguments, *settings]), epochs=epochs)

    assert of() == of("model.overrides.neck=fpn", "run.name=other", "data.workers=3", "optim.lr=1")
    others = [
        of(x) for x in ("run.seed=4", "data.batch_size=1", "data.transforms.horizontal_flip=0", "data.copy_paste=1")
    ]
    assert len({of(), of(epochs=1), *others}) == 6


@pytest.fixture
def plan(tmp_path):
    write_coco(tmp_path / "train", images=4, seed=0, size=(64, 80))
    write_coco(tmp_path / "val", images=3, seed=1, size=(64, 80))
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    return Plan(tmp_path / "recipe.yaml", tmp_path, tmp_path / "out", workers=0)


def test_records_of_other_settings_data_or_weights_are_not_added_to(plan, tmp_path):
    weights = tmp_path / "weights"
    weights.write_text("w")
    plans = [
        plan,
        Plan(plan.recipe, plan.data, plan.output, settings=("run.epochs=3",)),
        Plan(plan.recipe, plan.data, plan.output, weights=weights),
    ]
    (tmp_path / "train" / "annotations.json").write_text("{}")
    assert len({*(p.fingerprint() for p in plans), plan.fingerprint()}) == 3  # the first two changed with the file
    record = example("fpn", 0, [1.0], fingerprint=plans[1].fingerprint())
    check_fingerprint([record], plans[1], plan.records)
    with pytest.raises(ValueError, match=r"another recipe, other settings, .*choose another --output"):
        check_fingerprint([record], plan, plan.records)


def example(arm, seed, curve, *, control="fpn", status="done", fingerprint="f", seen="", metric="segm/ap"):
    config = {
        "model": {"name": "maskrcnn_fpn_lite0"},
        "data": {"batch_size": 8},
        "optim": {"name": "adamw", "lr": 4e-4, "schedule": "cosine"},
        "run": {"mixed_precision": "bf16", "ema": 0.99},
    }
    return Record(
        arm=arm,
        seed=seed,
        control=control,
        status=status,
        settings=(),
        fingerprint=fingerprint,
        circumstances={"commit": "c0ffee", "device": "D", "jobs": 4, "mps": False, "versions": {"torch": "2"}},
        plan={"recipe": "facades", "data": "facades", "settings": [], "config": config},
        seen=seen or f"seen{seed}",
        curve=[{"step": 10 * (i + 1), metric: x, f"{metric}_large": -1.0} for i, x in enumerate(curve)],
        costs={
            "parameters": 1e6,
            "gmacs": 2.5,
            "gmacs_size": 384,
            "seconds_per_step": 0.1,
            "train_seconds": 50.0,
            "eval_seconds": 10.0,
        },
        log=["one", "the reason"] if status == "failed" else [],
    )


def test_records_survive_a_line_that_was_cut_off_and_the_latest_counts(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    for record in (example("fpn", 0, [], status="failed"), example("fpn", 0, [0.5]), example("fpn", 1, [0.6])):
        append_record(record, path)
    path.write_text(path.read_text() + '{"arm": "fpn", "se')
    records = read_records(path)
    assert {key: record.status for key, record in records.items()} == {("fpn", 0): "done", ("fpn", 1): "done"}
    assert records["fpn", 1].value("segm/ap") == 60.0
    assert records["fpn", 1].value("segm/ap_large") is None


def test_pairs_share_a_seed_and_what_they_saw(capsys):
    comparison = Comparison.of(
        [
            *(example("fpn", seed, [0.1, 0.20 + seed / 100]) for seed in range(3)),
            *(example("a2fpn", seed, [0.1, 0.21 + seed / 100 + seed / 1000]) for seed in range(2)),
            example("a2fpn", 2, [0.1, 0.9], seen="another order"),
            example("pafpn", 7, [0.1, 0.3]),
            example("bad", 0, [], status="failed"),
        ]
    )
    arm, unpaired = comparison.find("a2fpn"), comparison.find("pafpn")
    delta = comparison.against_control(arm, "segm/ap")
    assert delta.pairs == 2
    assert delta.mean == pytest.approx(statistics.fmean([1.0, 1.1]))
    assert comparison.unpaired() == ["a2fpn, seed 2"]
    assert comparison.against_control(unpaired, "segm/ap").pairs == 0
    print_report(comparison)
    out = capsys.readouterr().out
    assert "Failed: bad, seed 0: the reason" in out
    assert "a2fpn, seed 2" in out


def test_the_page_says_what_the_numbers_say(tmp_path):
    up = [example("a2fpn", seed, [0.2, x]) for seed, x in enumerate((0.31, 0.32, 0.33))]
    same = [example("pafpn", seed, [0.2, x]) for seed, x in enumerate((0.31, 0.29, 0.30))]
    control = [example("fpn", seed, [0.2, x]) for seed, x in enumerate((0.29, 0.30, 0.31))]
    comparison = Comparison.of([*up, *same, *control])
    said = "\n".join(findings(comparison))
    assert "`a2fpn` against `fpn`: mask AP +2.00 (+2.00 to +2.00, n = 3); the interval is above zero." in said
    assert re.search(r"`pafpn` .* \+0\.00 \(-4\.30 to \+4\.30, n = 3\); the interval includes zero", said)
    assert "changed by +10.00 mask AP from step 10 to step 20" in said
    one = Comparison.of([record for record in (*up, *control) if record.seed == 0])
    assert "one pair says nothing about chance" in "\n".join(findings(one))
    write_page([comparison], tmp_path / "page.md")
    write_page([comparison], tmp_path / "again" / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text == (tmp_path / "again" / "page.md").read_text()
    assert "| a2fpn | 3 | 32.0 ± 1.0 |" in text
    assert "](page_facades.svg)" in text
    pictures = [(folder / "page_facades.svg").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert pictures[0] == pictures[1]


def test_box_detectors_are_judged_by_boxes():
    comparison = Comparison.of(
        [example("fpn", 0, [0.1], metric="bbox/ap"), example("a2fpn", 0, [0.2], metric="bbox/ap")]
    )
    assert comparison.metric == "bbox/ap"
    assert comparison.against_control(comparison.find("a2fpn"), "bbox/ap").mean == pytest.approx(10.0)


# A training that makes a step every 10 ms, and on SIGTERM ends as the trainer does, or does not care.
TRAINING = """
import signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("100 steps in 4 epochs.", flush=True)
for step in range(1, int(sys.argv[1]) + 1):
    print(f"step {step} ", flush=True)
    time.sleep(0.01)
    if stop and sys.argv[2] == "heeds":
        sys.exit(143)
sys.exit(int(sys.argv[3]))
"""


def work(plan, cases, **options):
    """Runs such trainings: per name the steps, whether it heeds a signal, and the exit code."""
    ended = {}

    def command(run):
        run.folder.mkdir(parents=True, exist_ok=True)
        steps, manners, code = cases[run.arm.name]
        return [sys.executable, "-c", TRAINING, str(steps), manners, str(code)]

    runs = [plan.run(Arm(name, ()), 0) for name in cases]
    left = Pool(2, environment(), **options).work(runs, command, lambda run, ok: ended.update({run.arm.name: ok}))
    return ended, [run.arm.name for run in left]


def test_a_failed_run_does_not_stop_the_others(plan):
    cases = {"good": (3, "heeds", 0), "bad": (3, "heeds", 1), "killed": (3, "heeds", 137), "late": (5, "heeds", 0)}
    ended, left = work(plan, cases)
    assert ended == {"good": True, "bad": False, "killed": False, "late": True}
    assert left == []


def test_runs_are_stopped_in_time_and_those_that_do_not_stop_are_killed(plan, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.ablation.pool.LEAST", 0.1)
    cases = {"polite": (10000, "heeds", 0), "stubborn": (10000, "ignores", 0), "waiting": (1, "heeds", 0)}
    ended, left = work(plan, cases, seconds=5.0, grace=2.0, every=1.0)
    assert ended == {}
    assert left == ["polite", "stubborn", "waiting"]
    assert re.search(r"0 done, 1 waiting, .*polite/0 \d+/(100|\?)  stubborn/0 \d+/(100|\?)", capsys.readouterr().out)


def test_nothing_is_started_that_could_not_do_anything_in_the_time(plan):
    assert work(plan, {"run": (1, "heeds", 0)}, seconds=100.0, grace=60.0) == ({}, ["run"])


def test_without_the_service_programs_share_the_gpu_in_turns(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with multi_process_service({"A": "b"}, wanted=True) as env:
        assert env == {"A": "b"}
    assert "there is no nvidia-cuda-mps-control" in capsys.readouterr().out


@pytest.mark.slow  # trains in two processes; what users install trains in test_train.py
def test_a_comparison_is_made_once_and_reported_from_its_records(plan, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = {
        "data": plan.data,
        "recipe": str(plan.recipe),
        "arm": ["bad=optim.name=nosuch"],
        "settings": ["run.trackers=[]", "run.pictures=0", "run.epochs=1"],
        "seeds": 1,
        "jobs": 2,
        "workers": 0,
        "output": plan.output,
    }
    page = plan.output / "page.md"
    ablation.main(**options, arms="fpn,a2fpn", page=page)
    lines = [json.loads(line) for line in plan.records.read_text().splitlines()]
    records = {line["arm"]: line for line in lines}
    assert {name: record["status"] for name, record in records.items()} == {
        "fpn": "done",
        "a2fpn": "done",
        "bad": "failed",
    }
    assert records["fpn"]["seen"] == records["a2fpn"]["seen"] != ""
    assert "optim.name" in records["bad"]["log"][-1]
    assert records["a2fpn"]["costs"]["gmacs"] > records["fpn"]["costs"]["gmacs"] > 0
    assert records["fpn"]["curve"][-1]["step"] == 2
    assert not math.isnan(records["fpn"]["curve"][-1]["segm/ap"])
    assert "one pair says nothing about chance" in page.read_text()
    assert (plan.output / "curves.png").stat().st_size > 0
    capsys.readouterr()
    ablation.main(**options, arms="fpn,a2fpn")  # nothing is left to do, failures wait for --retry-failed
    assert len(plan.records.read_text().splitlines()) == 3
    with pytest.raises(typer.BadParameter, match="choose another --output"):
        ablation.main(**{**options, "settings": ["run.epochs=2"]}, arms="fpn,a2fpn")
    ablation.main(report=[plan.records])
    assert "n = 1, no interval" in re.sub(r"[│\s]+", " ", capsys.readouterr().out)
