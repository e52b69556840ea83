"""Plots of a run, in colours that colour-blind readers can tell apart: training, precision and recall."""

import io
import math
import re
from collections.abc import Mapping
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from synmlops.volumes.tint import COLOURS

Floats = NDArray[np.float64]

_INK = "#606468"  # axes and text; replaced by `svg_of` where the reader's screen is dark
_GRID = "#a0a4a8"
_DARK_STYLE = (
    "<style>@media (prefers-color-scheme: dark){"
    f'[style*="fill: {_INK}"]{{fill:#c9cdd1!important}}[style*="stroke: {_INK}"]{{stroke:#c9cdd1!important}}'
    "}</style>"
)
_LOSS_COLOURS = {"loss": COLOURS["union"], "bce": COLOURS["pre"], "dice": COLOURS["post"]}
_MOST_POINTS = 800  # of a line; more are averaged
_DASHES = ("-", "--", "-.", ":")  # folds


def training_curves(curves: pd.DataFrame) -> Figure | None:
    """Plot loss and validation F1 by step.

    Parameters
    ----------
    curves : DataFrame
        As in history.csv: step, and any of loss, bce, dice, validation_f1 and fold; sparse columns are fine.

    Returns
    -------
    figure : Figure or None
        A panel for the loss and, with one fold, its terms; another for the validation score. None if there
        is nothing to plot.

    Examples
    --------
    >>> history = pd.DataFrame({"step": [1, 2], "loss": [0.9, 0.5], "validation_f1": [float("nan"), 0.7]})
    >>> len(training_curves(history).axes)
    2
    >>> training_curves(pd.DataFrame()) is None
    True
    """
    panels = [
        columns
        for columns in (tuple(_LOSS_COLOURS), ("validation_f1",))
        if any(_has(curves, name) for name in columns)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    for axes, columns in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _style(axes, x="step", y="loss" if columns[0] == "loss" else "validation F1")
        if columns[0] == "loss":
            _plot_losses(axes, curves)
        else:
            _plot_validation(axes, curves)
    return figure


def precision_recall(curve: pd.DataFrame, thresholds: Mapping[str, float]) -> Figure | None:
    """Plot precision against recall, and F1 against the threshold, with the operating points marked.

    Parameters
    ----------
    curve : DataFrame
        Columns channel, threshold, precision, recall, f1.
    thresholds : mapping
        Fold to its operating point, 0 to 1.

    Returns
    -------
    figure : Figure or None
        None if the curve has no rows.

    Examples
    --------
    >>> curve = pd.DataFrame({"channel": ["union"] * 2, "threshold": [0.2, 0.8], "precision": [0.5, 0.9],
    ...                       "recall": [0.9, 0.4], "f1": [0.64, 0.55]})
    >>> len(precision_recall(curve, {"all": 0.2}).axes)
    2
    """
    if curve.empty:
        return None
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _style(left, x="recall", y="precision")
    _style(right, x="threshold", y="F1")
    _draw_equal_f1(left)
    chosen = sorted(set(thresholds.values()))
    for channel, rows in curve.sort_values("threshold").groupby("channel", sort=False):
        colour = COLOURS.get(str(channel), _INK)
        left.plot(rows["recall"], rows["precision"], color=colour, label=str(channel))
        right.plot(rows["threshold"], rows["f1"], color=colour, label=str(channel))
        near = rows.iloc[[_nearest(rows["threshold"].to_numpy(float), value) for value in chosen]]
        marker = {"color": colour, "marker": "o", "markersize": 7, "linestyle": "", "markeredgecolor": _INK}
        left.plot(near["recall"], near["precision"], **marker)
        right.plot(near["threshold"], near["f1"], **marker)
    for value in chosen:
        right.axvline(value, color=_INK, linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.set(xlim=(0, 1.01), ylim=(0, 1.01))
    _legend(left, loc="lower left")
    return figure


def svg_of(figure: Figure) -> bytes:
    """Give a figure as SVG without background, whose ink turns light where the reader's screen is dark.

    Examples
    --------
    >>> svg = svg_of(precision_recall(pd.DataFrame({"channel": ["union"], "threshold": [0.5],
    ...              "precision": [1.0], "recall": [1.0], "f1": [1.0]}), {}))
    >>> svg[:5], b"prefers-color-scheme" in svg
    (b'<?xml', True)
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "synmlops"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r"(<svg\b[^>]*>)", rf"\1{_DARK_STYLE}", text, count=1).encode()


def _has(curves: pd.DataFrame, name: str) -> bool:
    return name in curves and bool(curves[name].notna().any())


def _by_fold(curves: pd.DataFrame, name: str) -> list[tuple[str, Floats, Floats]]:
    """Give fold, step and value where the value is known; the fold is empty if there is only one."""
    known = curves[curves[name].notna()]
    step: Floats = np.asarray(known["step"] if "step" in known else range(len(known)), np.float64)
    value: Floats = np.asarray(known[name], np.float64)
    folds = known["fold"].astype(str).to_numpy(object) if "fold" in known else np.full(len(known), "")
    names = list(dict.fromkeys(folds.tolist()))
    return [(fold if len(names) > 1 else "", step[folds == fold], value[folds == fold]) for fold in names]


def _plot_losses(axes: Axes, curves: pd.DataFrame) -> None:
    names = [name for name in _LOSS_COLOURS if _has(curves, name)]
    several_folds = len(_by_fold(curves, names[0])) > 1
    for name in names[:1] if several_folds else names:
        colour = _LOSS_COLOURS[name]
        for place, (fold, step, value) in enumerate(_by_fold(curves, name)):
            label = f"{name}, fold {fold}" if fold else name
            mean_step, mean = _averaged(step, value, points=60)
            if len(step) > len(mean) and not several_folds:
                axes.plot(
                    *_averaged(step, value, points=_MOST_POINTS), color=colour, alpha=0.25, linewidth=0.7
                )
            axes.plot(mean_step, mean, color=colour, linestyle=_DASHES[place % 4], linewidth=1.5, label=label)
    axes.set_ylim(bottom=0)
    _legend(axes, loc="upper right")


def _plot_validation(axes: Axes, curves: pd.DataFrame) -> None:
    series = _by_fold(curves, "validation_f1")
    for place, (fold, step, value) in enumerate(series):
        best = int(np.argmax(value))
        axes.plot(
            step,
            value,
            color=COLOURS["union"],
            linestyle=_DASHES[place % 4],
            marker="o" if len(step) < 60 else "",
            markersize=3.5,
            label=f"fold {fold}" if fold else None,
        )
        axes.plot(step[best], value[best], marker="o", markersize=8, color="none", markeredgecolor=_INK)
        if len(series) == 1:
            axes.set_title(f"best {value[best]:.3f} at step {step[best]:.0f}", fontsize=9, color=_INK)
    axes.set_ylim(0, 1.01)
    if len(series) > 1:
        _legend(axes, loc="lower right")


def _averaged(step: Floats, value: Floats, *, points: int) -> tuple[Floats, Floats]:
    """Average a long line over runs of equal length, to at most `points` points.

    Examples
    --------
    >>> _averaged(np.arange(4.0), np.array([1.0, 3.0, 5.0, 7.0]), points=2)
    (array([0.5, 2.5]), array([2., 6.]))
    """
    width = math.ceil(len(step) / points)
    starts = np.arange(0, len(step), max(width, 1))
    n = np.diff(starts, append=len(step))
    return np.add.reduceat(step, starts) / n, np.add.reduceat(value, starts) / n


def _nearest(values: Floats, wanted: float) -> int:
    return int(np.argmin(np.abs(values - wanted)))


def _draw_equal_f1(axes: Axes) -> None:
    """Draw the lines of equal F1 behind the curve: precision = f1 recall / (2 recall - f1)."""
    for f1 in (0.2, 0.4, 0.6, 0.8):
        recall = np.linspace(f1 / (2 - f1), 1, 100)
        axes.plot(
            recall, f1 * recall / (2 * recall - f1), color=_GRID, linewidth=0.6, linestyle=":", zorder=1
        )
        axes.text(1.0, f1 / (2 - f1), f"F1 {f1}", color=_INK, fontsize=7, ha="right", va="bottom")


def _style(axes: Axes, *, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color=_GRID, alpha=0.3, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _legend(axes: Axes, *, loc: Literal["lower left", "lower right", "upper right"]) -> None:
    axes.legend(loc=loc, frameon=False, fontsize=8, labelcolor=_INK)
