"""Figures of a report, drawn by matplotlib, as data URIs of SVG pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2fpn._text import shorten
from a2fpn.report.analysis import BINS, Analysis, Group
from a2fpn.report.matching import Ints
from a2fpn.report.precision import RECALLS
from a2fpn.report.tide import DESCRIPTIONS

MODEL_COLORS = ("#0072B2", "#D55E00")
_GRAY = "#777777"
_SHOWN_CLASSES = 20  # rows of a confusion matrix; more are not readable


def precision_recall(analysis: Analysis) -> str:
    """Precision-recall curves: the mean over classes at three IoU thresholds, and each class at 0.50 in gray."""
    figure, axes = _axes(4.6, 3.6)
    curve = analysis.precision.curve
    measured = ~np.isnan(curve[0, 0])
    if measured.sum() > 1:
        axes.plot(RECALLS, curve[0][:, measured], color="#BBBBBB", lw=0.7)
    for threshold, color, label in ((0, "#0072B2", "0.50"), (5, "#D55E00", "0.75"), (8, "#009E73", "0.90")):
        if measured.any():
            axes.plot(RECALLS, curve[threshold][:, measured].mean(1), color=color, lw=1.8, label=f"IoU {label}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower left", frameon=False)
    return _svg(figure)


def operating_curve(analysis: Analysis, *, score_threshold: float) -> str:
    """Precision, recall and F1 over the score threshold."""
    figure, axes = _axes(4.6, 3.6)
    curve = analysis.operating
    for values, color, label in (
        (curve.precision, "#0072B2", "precision"),
        (curve.recall, "#D55E00", "recall"),
        (curve.f1, "#009E73", "F1"),
    ):
        axes.plot(curve.threshold, values, color=color, lw=1.6, label=label)
    axes.axvline(score_threshold, color=_GRAY, lw=0.8, ls="--")
    if curve.best is not None:
        axes.plot(curve.threshold[curve.best], curve.f1[curve.best], "o", color="#009E73", ms=5)
    axes.set(xlabel="score threshold", ylabel="", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower left", frameon=False)
    return _svg(figure)


def confusion(matrix: Ints, names: Sequence[str]) -> str:
    """Confusion matrix with background: counts, colored by their share of the row.

    With many classes, only those with the most confusions are shown.
    """
    mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    order = np.argsort(-mistakes[:-1], kind="stable")[:_SHOWN_CLASSES]
    shown = np.append(np.sort(order), len(names))
    part = matrix[np.ix_(shown, shown)]
    labels = [*(shorten(names[label], 18) for label in shown[:-1]), "background"]
    side = min(1.9 + 0.42 * len(labels), 10.0)
    figure, axes = _axes(side + 0.6, side)
    share = part / np.maximum(matrix.sum(1)[shown], 1)[:, None]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(part > 0).tolist():
        color = "white" if share[row, column] > 0.55 else "#222222"
        size = 9 if len(labels) < 12 else 6
        axes.text(column, row, f"{part[row, column]}", ha="center", va="center", color=color, fontsize=size)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 4 else 0, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set(xlabel="detected", ylabel="annotated")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return _svg(figure)


def group_bars(groups: Sequence[Sequence[Group]]) -> str:
    """AP of groups of objects, with a bar for each model."""
    figure, axes = _axes(4.9, 0.9 + 0.45 * len(groups[0]))
    places = np.arange(len(groups[0]))
    height = 0.75 / len(groups)
    for number, own in enumerate(groups):
        values = [group.ap for group in own]
        at = places + (number - (len(groups) - 1) / 2) * height
        axes.barh(at, values, height, color=MODEL_COLORS[number])
        for y, value in zip(at, values, strict=True):
            axes.text(value + 0.01, y, f"{value:.3f}", va="center", fontsize=8, color="#222222")
    axes.set_yticks(places, [f"{group.label}\n{group.objects} objects" for group in groups[0]], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.0), xlabel="AP")
    return _svg(figure)


def error_bars(analyses: Sequence[Analysis]) -> str:
    """Cost of each error type in AP, with a bar for each model."""
    figure, axes = _axes(6.2, 3.6)
    places = np.arange(len(DESCRIPTIONS))
    height = 0.75 / len(analyses)
    most = max(max(a.errors.cost.values()) for a in analyses)
    for number, analysis in enumerate(analyses):
        values = [analysis.errors.cost[name] for name in DESCRIPTIONS]
        at = places + (number - (len(analyses) - 1) / 2) * height
        axes.barh(at, values, height, color=MODEL_COLORS[number])
        for y, value in zip(at, values, strict=True):
            axes.text(value + 0.01 * most, y, f"{value:.3f}", va="center", fontsize=8, color="#222222")
    axes.axhline(5.5, color=_GRAY, lw=0.6, ls=":")
    axes.set_yticks(places, list(DESCRIPTIONS))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.15 * most or 1), xlabel="AP50 that an oracle would gain")
    return _svg(figure)


def reliability(analysis: Analysis) -> str:
    """Reliability diagram: share of true positives over the score, and number of detections per score."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centers = (np.arange(BINS) + 0.5) / BINS
    bins = analysis.calibration
    axes.plot([0, 1], [0, 1], color=_GRAY, lw=0.8, ls="--")
    axes.bar(centers, np.nan_to_num(bins.right), 0.9 / BINS, color="#56B4E9")
    axes.plot(bins.score, bins.right, "o-", color="#0072B2", lw=1.2, ms=4)
    axes.set(ylabel="share that is right", ylim=(0, 1.02))
    counts.bar(centers, bins.count, 0.9 / BINS, color="#AAAAAA")
    counts.set(xlabel="score", ylabel="detections", xlim=(0, 1))
    for each in (axes, counts):
        each.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "a2fpn", "font.family": "DejaVu Sans"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
