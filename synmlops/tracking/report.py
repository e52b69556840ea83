"""The report of a run: one HTML file that needs nothing else, to be read by whoever knows the tissue."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from synmlops.tracking.figures import precision_recall, svg_of, training_curves
from synmlops.tracking.gallery import Gallery, RegionView, gallery_of
from synmlops.tracking.overlays import data_uri
from synmlops.volumes.files import atomic_path

__all__ = ["RegionView", "ReportContent", "write_report"]

_DEFAULT_IOU = 0.5
_UNKNOWN = "\N{EN DASH}"
_SCORE_NAMES = {  # prefix in Scores.flat() -> group, row
    "voxel_union": ("Voxels", "union"),
    "voxel_pre": ("Voxels", "pre"),
    "voxel_post": ("Voxels", "post"),
    "detection": ("Synapses", "matched by overlap"),
    "detection_centroid": ("Synapses", "matched by centroid"),
    "partner": ("Partners", "by position"),
    "partner_neurons": ("Partners", "by position and neurons"),
}
_MEASURES = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "average_precision": "average precision",
    "true": "true",
    "predicted": "predicted",
}
_TILES = {
    "voxel_union_f1": "Synapse voxel F1",
    "detection_f1": "Detection F1",
    "direction_accuracy": "Direction accuracy",
    "partner_f1": "Partner F1",
    "partner_neurons_f1": "Partner F1 with neurons",
}


@dataclass(frozen=True, eq=False)
class ReportContent:
    """What a report shows; whatever is empty is left out of it.

    Attributes
    ----------
    title : str
    run : mapping
        Lineage: run key, MLflow id, commit, dirty, DVC experiment, created ...
    scores : mapping
        Names as `synmlops.synapses.scores.Scores.flat` gives them; others are listed below them.
    thresholds : mapping
        Fold to its operating point, 0 to 1.
    threshold_source : str
        How it was chosen.
    per_region : DataFrame
        One row per region; columns named as the scores.
    params : mapping
        Flattened: dotted key to value. `evaluate.iou` decides what counts as a mistake.
    curves : DataFrame
        As in history.csv: step, loss, bce, dice, learning_rate, validation_f1, fold; sparse.
    precision_recall : DataFrame
        Columns channel, threshold, precision, recall, f1.
    regions : sequence of RegionView
        To draw sections and mistakes from.
    notes : sequence of str
        What a reader must know: what was left out, what could not be scored.
    """

    title: str
    run: Mapping[str, str]
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]
    threshold_source: str
    per_region: pd.DataFrame
    params: Mapping[str, object]
    curves: pd.DataFrame
    precision_recall: pd.DataFrame
    regions: Sequence[RegionView]
    notes: Sequence[str]


@dataclass(frozen=True)
class Tile:
    """A score at the top of the page."""

    label: str
    text: str
    percent: float  # of the best there can be
    details: tuple[str, ...]  # lines


@dataclass(frozen=True)
class Cell:
    """A table's cell; `share` is the number from 0 to 1 that it shows, if it is one."""

    text: str
    share: float | None = None
    number: bool = True


@dataclass(frozen=True)
class ScoreRow:
    """A row of the score table."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Page:
    """What the template lays out."""

    title: str
    run: Mapping[str, str]
    notes: Sequence[str]
    thresholds: Mapping[str, float]
    threshold_source: str
    tiles: tuple[Tile, ...]
    measures: tuple[str, ...]
    score_groups: Mapping[str, Sequence[ScoreRow]]
    direction: Cell | None
    other_scores: Mapping[str, str]
    region_columns: tuple[str, ...]
    region_rows: tuple[tuple[Cell, ...], ...]
    figures: Mapping[str, str]  # name -> data URI
    params: Mapping[str, Mapping[str, str]]  # section -> key -> value
    gallery: Gallery = field(default_factory=Gallery)


def write_report(content: ReportContent, path: Path) -> None:
    """Write a report as one self-contained HTML file, which appears only when complete.

    Parameters
    ----------
    content : ReportContent
    path : Path
        A file ending in .html.

    Raises
    ------
    SynmlopsError
        If the file cannot be written.
    ValueError
        If the volumes of a region differ in shape.
    """
    html = _template().render(page=_page(content))
    with atomic_path(path) as partial:
        partial.write_text(html, encoding="utf-8")


def _template() -> jinja2.Template:
    source = files("synmlops.tracking").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _page(content: ReportContent) -> Page:
    iou = content.params.get("evaluate.iou", _DEFAULT_IOU)
    columns = tuple(str(name) for name in content.per_region.columns)
    scores = content.scores
    groups, others = _score_groups(scores)
    return Page(
        title=content.title,
        run=content.run,
        notes=content.notes,
        thresholds=content.thresholds,
        threshold_source=content.threshold_source,
        tiles=_tiles(scores),
        measures=tuple(_MEASURES.values()),
        score_groups=groups,
        direction=_cell(scores["direction_accuracy"], "") if "direction_accuracy" in scores else None,
        other_scores=others,
        region_columns=tuple(_words(name) for name in columns),
        region_rows=tuple(
            tuple(_cell(value, name) for name, value in zip(columns, row, strict=True))
            for row in content.per_region.itertuples(index=False, name=None)
        ),
        figures=_figures(content),
        params=_by_section(content.params),
        gallery=gallery_of(content.regions, iou=float(iou) if isinstance(iou, int | float) else _DEFAULT_IOU),
    )


def _tiles(scores: Mapping[str, float]) -> tuple[Tile, ...]:
    tiles = []
    for name, label in _TILES.items():
        if name in scores:
            value = scores[name]
            percent = 100 * value if math.isfinite(value) else 0.0
            tiles.append(Tile(label, _number(value), percent, _details(scores, name.removesuffix("_f1"))))
    return tuple(tiles)


def _details(scores: Mapping[str, float], prefix: str) -> tuple[str, ...]:
    """Say what lies behind a headline score."""
    if prefix == "direction_accuracy":
        return ("of matched synapses",)
    lines = (("precision {}", "recall {}"), ("{} true", "{} predicted"))
    keys = (("precision", "recall"), ("true", "predicted"))
    return tuple(
        " · ".join(
            text.format(_number(scores[f"{prefix}_{key}"], key)) for text, key in zip(*line, strict=True)
        )
        for line in zip(lines, keys, strict=True)
        if all(f"{prefix}_{key}" in scores for key in line[1])
    )


def _score_groups(scores: Mapping[str, float]) -> tuple[dict[str, list[ScoreRow]], dict[str, str]]:
    """Lay the scores out by what they count, and give those that have no place there."""
    groups: dict[str, list[ScoreRow]] = {}
    placed = {"direction_accuracy"}
    for prefix, (group, name) in _SCORE_NAMES.items():
        keys = [f"{prefix}_{measure}" for measure in _MEASURES]
        if scores.keys().isdisjoint(keys):
            continue
        placed |= set(keys)
        cells = tuple(_cell(scores[key], key) if key in scores else Cell("") for key in keys)
        groups.setdefault(group, []).append(ScoreRow(name, cells))
    others = {_words(name): _number(value, name) for name, value in scores.items() if name not in placed}
    return groups, others


def _figures(content: ReportContent) -> dict[str, str]:
    drawn: dict[str, Figure | None] = {
        "precision_recall": precision_recall(content.precision_recall, content.thresholds),
        "training": training_curves(content.curves),
    }
    return {
        name: data_uri(svg_of(figure), "image/svg+xml")
        for name, figure in drawn.items()
        if figure is not None
    }


def _by_section(params: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Group dotted keys by their first part; what has no dot stands under an empty name.

    Examples
    --------
    >>> _by_section({"seed": 0, "train.steps": 600})
    {'': {'seed': '0'}, 'train': {'steps': '600'}}
    """
    sections: dict[str, dict[str, str]] = {}
    for key, value in params.items():
        section, dot, rest = key.partition(".")
        sections.setdefault(section if dot else "", {})[rest if dot else key] = (
            _UNKNOWN if value is None else str(value)
        )
    return sections


def _cell(value: object, name: str) -> Cell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(_UNKNOWN if value is None or value is pd.NA else str(value), number=False)
    text = _number(float(value), name)
    is_share = isinstance(value, float) and 0 <= value <= 1 and not _is_count(name)
    return Cell(text, share=float(value) if is_share else None)


def _number(value: float, name: str = "") -> str:
    """Give a score with three digits, a count without; NaN is a dash.

    Examples
    --------
    >>> _number(0.87654), _number(12345.0, "partner_true"), _number(float("nan")), _number(3.0, "n")
    ('0.877', '12\u202f345', '–', '3.000')
    """
    if not math.isfinite(value):
        return _UNKNOWN
    if _is_count(name):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3f}"


def _is_count(name: str) -> bool:
    return name.rpartition("_")[2] in ("true", "predicted", "tp", "fp", "fn", "voxels", "matched", "right")


def _words(name: str) -> str:
    """Give a score's name in words.

    Examples
    --------
    >>> _words("voxel_union_f1"), _words("partner_neurons_f1")
    ('voxel union F1', 'partner neurons F1')
    """
    return " ".join("F1" if word == "f1" else word for word in name.split("_"))
