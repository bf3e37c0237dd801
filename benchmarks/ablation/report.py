"""Report of the records: tables of paired differences, curves, and the page made of both."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _measure as measure
from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.paired import Difference, difference, spread
from benchmarks.ablation.records import Record

METRICS = {
    "bbox/ap": "box AP",
    "segm/ap": "mask AP",
    "segm/ap50": "AP50",
    "segm/ap75": "AP75",
    "segm/ap_small": "AP_S",
    "segm/ap_medium": "AP_M",
    "segm/ap_large": "AP_L",
}


@dataclass(frozen=True)
class Series:
    """The finished runs of one arm.

    Args:
        name: Name of the arm.
        control: Name of the arm it is compared with.
        runs: By seed.
    """

    name: str
    control: str
    runs: dict[int, Record]

    def values(self, metric: str) -> dict[int, float]:
        """Results in percent by seed."""
        found = {seed: run.value(metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def cost(self, name: str) -> float:
        """Median over the runs."""
        return statistics.median(run.costs[name] for run in self.runs.values())

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Step and mean over the seeds, in percent, of the evaluations that all seeds made."""
        steps: dict[int, list[float]] = {}
        for run in self.runs.values():
            for entry in run.curve:
                if entry.get(metric, -1.0) >= 0:
                    steps.setdefault(int(entry["step"]), []).append(100 * entry[metric])
        return [(step, statistics.fmean(v)) for step, v in sorted(steps.items()) if len(v) == len(self.runs)]


@dataclass(frozen=True)
class Comparison:
    """All records of one data set and recipe.

    Args:
        series: Arms with a finished run, in the order of their first record.
        failures: Runs that failed.
    """

    series: tuple[Series, ...]
    failures: tuple[Record, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Comparison:
        """Sort records by arm, controls first."""
        arms: dict[str, Series] = {}
        failures = []
        for record in records:
            if record.status == "failed":
                failures.append(record)
            else:
                arms.setdefault(record.arm, Series(record.arm, record.control, {})).runs[record.seed] = record
        ordered = sorted(arms.values(), key=lambda one: (one.control, one.name != one.control))
        return cls(tuple(ordered), tuple(failures))

    @property
    def metric(self) -> str:
        """Return the metric that is judged: mask AP where there are masks."""
        return "segm/ap" if any(one.values("segm/ap") for one in self.series) else "bbox/ap"

    @property
    def example(self) -> Record:
        """Any finished run."""
        return next(iter(self.series[0].runs.values()))

    def find(self, name: str) -> Series | None:
        """The series of an arm."""
        return next((one for one in self.series if one.name == name), None)

    def against_control(self, one: Series, metric: str) -> Difference:
        """Paired difference to the control, over the seeds in which both saw the same."""
        control = self.find(one.control)
        if control is None:
            return Difference(math.nan, math.nan, 0)
        same = {
            seed
            for seed in one.runs.keys() & control.runs.keys()
            if one.runs[seed].comparable == control.runs[seed].comparable
        }
        mine, theirs = one.values(metric), control.values(metric)
        return difference({s: v for s, v in mine.items() if s in same}, {s: v for s, v in theirs.items() if s in same})

    def unpaired(self) -> list[str]:
        """Runs whose data, order, backbone weights or steps are not the control's."""
        return [
            f"{one.name}, seed {seed}"
            for one in self.series
            for seed, run in sorted(one.runs.items())
            if (control := self.find(one.control)) is not None
            and seed in control.runs
            and run.comparable != control.runs[seed].comparable
        ]


def rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and one row per arm."""
    columns = [key for key in METRICS if any(one.values(key) for one in comparison.series)]
    judged = METRICS[comparison.metric]
    headings = ["arm", "seeds", *(METRICS[key] for key in columns), f"Δ {judged} (95 % interval)"]
    headings += ["params M", "GMACs", "s/step"]
    table = []
    for one in comparison.series:
        cells = [spread(list(found.values())) if (found := one.values(key)) else "none" for key in columns]
        delta = "control" if one.name == one.control else str(comparison.against_control(one, comparison.metric))
        parameters, gmacs, pace = (one.cost(name) for name in ("parameters", "gmacs", "seconds_per_step"))
        costs = [f"{parameters / 1e6:.2f}", f"{gmacs:.2f}", f"{pace:.3f}"]
        table.append([one.name, str(len(one.runs)), *cells, delta, *costs])
    return headings, table


def print_report(comparison: Comparison) -> None:
    """Print the table, and what could not be used."""
    if comparison.series:
        headings, table = rows(comparison)
        plan = comparison.example.plan
        title = f"{plan['data']}, recipe {plan['recipe']}; AP in %, mean ± standard deviation over the seeds"
        measure.print_table(title, headings, table)
    for line in comparison.unpaired():
        measure.console().print(UNPAIRED.format(line))
    for record in comparison.failures:
        last = record.log[-1] if record.log else "no output"
        measure.console().print(f"Failed: {record.arm}, seed {record.seed}: {last}", soft_wrap=True)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the average precision over the steps, a thick line for an arm's mean and thin ones for its runs.

    Args:
        comparison: What to draw.
        path: File to write; its suffix says the format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(comparison.series):
        color = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        for run in one.runs.values():
            points = [(p["step"], 100 * p[comparison.metric]) for p in run.curve if p.get(comparison.metric, -1) >= 0]
            axes.plot(*zip(*points, strict=True), style, color=color, lw=0.5, alpha=0.5) if points else None
        mean = one.curve(comparison.metric)
        if mean:
            axes.plot(*zip(*mean, strict=True), style, color=color, marker=".", lw=1.8, label=one.name)
    plan = comparison.example.plan
    axes.set(xlabel="step", ylabel=f"{METRICS[comparison.metric]}, %", title=f"{plan['data']}, recipe {plan['recipe']}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "a2fpn"}):  # the same picture gives the same file
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def write_page(comparisons: Sequence[Comparison], path: Path, *, title: str = "Table 1: necks compared") -> None:
    """Write the Markdown page, with its pictures beside it; what the page holds from :data:`NOTES` on is kept.

    Args:
        comparisons: One per data set and recipe.
        path: The page; ``table1.md`` gets ``table1_<data>.svg``.
        title: Its heading.
    """
    parts = [f"# {title}", INTRODUCTION]
    for comparison in comparisons:
        picture = path.with_name(f"{path.stem}_{comparison.example.plan['data']}.svg")
        if len(comparisons) > len({c.example.plan["data"] for c in comparisons}):
            picture = picture.with_stem(f"{picture.stem}_{comparison.example.plan['recipe']}")
        draw(comparison, picture)
        headings, table = rows(comparison)
        parts += [
            f"## {comparison.example.plan['data']}",
            circumstances(comparison),
            _markdown(headings, table),
            f"![{METRICS[comparison.metric]} over steps]({picture.name})",
            "\n".join(f"- {line}" for line in findings(comparison)),
        ]
    parts += ["## Limits of these runs", "\n".join(f"- {line}" for line in limits(comparisons))]
    _, marker, notes = path.read_text(encoding="utf-8").partition(NOTES) if path.exists() else ("", "", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*parts, marker + notes if marker else ""]).rstrip() + "\n", encoding="utf-8")


UNPAIRED = "Not paired, for it saw other data, another order or other weights than the control: {}."
NOTES = "<!-- notes: by hand, kept when the page is made again -->"
INTRODUCTION = """\
Generated by `python -m benchmarks.ablation --report RECORDS --page FILE` from the records of the runs; only notes at
the end are written by hand.

All arms of a comparison train with the same recipe. Runs with the same seed see the same images in the same order with
the same augmentation, and start from the same backbone weights; a hash of these is in every record, and only runs with
equal hashes are paired. AP is measured at the end of the schedule: no checkpoint is selected by it. Δ is the mean
difference from the control over the seeds that both finished, with a Student's t interval."""


def circumstances(comparison: Comparison) -> str:
    """Return how the runs took place, as sentences."""
    runs = [run for one in comparison.series for run in one.runs.values()]
    example = comparison.example
    config = example.plan["config"]

    def every(name: str) -> str:
        return ", ".join(sorted({str(run.circumstances[name]) for run in runs}))

    steps = ", ".join(sorted({f"{run.steps:,}" for run in runs}))
    versions = ", ".join(f"{name} {version}" for name, version in example.circumstances["versions"].items())
    shared = " ".join(f"`{setting}`" for setting in example.plan["settings"])
    optim, run, side = config["optim"], config["run"], f"{example.costs['gmacs_size']:.0f}"
    minutes = sum(one.costs["train_seconds"] + one.costs["eval_seconds"] for one in runs) / 60
    own = (one for one in comparison.series if one.name not in ARMS)
    defined = "".join(f" Arm `{a.name}`: `{' '.join(next(iter(a.runs.values())).settings)}`." for a in own)
    return (
        f"Recipe `{example.plan['recipe']}`{f' with {shared}' if shared else ''}: {steps} steps of "
        f"{config['data']['batch_size']} images, {optim['name']}, learning rate {optim['lr']:g}, "
        f"schedule {optim['schedule']}, precision {run['mixed_precision']}, EMA {run['ema']:g}. "
        f"Device {every('device')}; {every('jobs')} concurrent runs; commit {every('commit')}; {versions}. "
        f"GMACs are for backbone and neck on one image of {side} × {side} pixels; s/step was measured while other runs "
        f"shared the device. The {len(runs)} runs took {minutes:.0f} minutes in total, as if run one after another."
        f"{defined}"
    )


def findings(comparison: Comparison) -> list[str]:
    """Return what the numbers say, one sentence each."""
    name, lines = METRICS[comparison.metric], []
    for one in comparison.series:
        if one.name != one.control:
            lines.append(_finding(one, comparison.against_control(one, comparison.metric), name))
    for control in (one for one in comparison.series if one.name == one.control):
        curve = control.curve(comparison.metric)
        if len(curve) > 1:
            (before, low), (after, high) = curve[-2:]
            lines.append(
                f"The control `{control.name}` changed by {high - low:+.2f} {name} from step {before} to step {after}, "
                "its last two evaluations."
            )
    lines += [UNPAIRED.format(line) for line in comparison.unpaired()]
    lines += [f"`{record.arm}`, seed {record.seed}, failed and is left out." for record in comparison.failures]
    return lines


def _finding(one: Series, delta: Difference, name: str) -> str:
    start = f"`{one.name}` against `{one.control}`: {name} {delta}; "
    if not delta.pairs:
        return start + "nothing can be said."
    if math.isinf(delta.half):
        return start + "one pair says nothing about chance."
    if delta.includes_zero:
        return start + "the interval includes zero: no difference is shown."
    return start + f"the interval is {'above' if delta.mean > 0 else 'below'} zero."


def limits(comparisons: Sequence[Comparison]) -> list[str]:
    """Return what follows from the extent of the runs."""
    seeds = sorted({len(one.runs) for comparison in comparisons for one in comparison.series})
    compared = sum(one.name != one.control for comparison in comparisons for one in comparison.series)
    data = ", ".join(dict.fromkeys(str(comparison.example.plan["data"]) for comparison in comparisons))
    models = ", ".join(dict.fromkeys(_model(c.example.plan["config"]["model"]) for c in comparisons))
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return [
        f"Data, backbone and schedule: all runs are on {data}, with the model {models}. None is on COCO.",
        f"Few seeds: arms have {count} seed(s); the table shows how wide the intervals are.",
        f"Multiple comparisons: {compared} comparison(s), each at 95 %, without correction; one in twenty "
        "intervals misses the true difference by chance.",
        "Speed: runs shared a device, so s/step is not that of a run alone.",
    ]


def _model(section: dict[str, Any]) -> str:
    return f"`{section['name']}`"


def _markdown(headings: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    rule = ["---", *itertools.repeat("---:", len(headings) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *table))
