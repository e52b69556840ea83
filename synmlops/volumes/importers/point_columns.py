"""Tables of pre and post points: whose columns they are, and what stands in them."""

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from synmlops.params import SynmlopsError

Units = Literal["nm", "voxel"]
Ends = tuple[tuple[str, ...], tuple[str, ...]]

ROLES = ("pre_z", "pre_y", "pre_x", "post_z", "post_y", "post_x")
"""What `--columns` may name a column for; one column of lists is `pre` or `post`."""

_MORE_ROLES = ("pre", "post", "pre_neuron", "post_neuron", "confidence", "site")
_TABLES = {".csv": ",", ".txt": ",", ".tsv": "\t", ".tab": "\t"}
_ARROW = (".parquet", ".pq", ".feather", ".arrow")


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of table."""

    name: str
    ends: Ends  # of pre and of post: the columns of z, y, x, or one column of lists x, y, z
    units: Units | None  # of the positions; None where tables of this kind differ
    neurons: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of pre and of post, the first that is there
    confidence: tuple[str, ...] = ()  # the least of those that are there
    site: tuple[str, ...] = ()  # rows of one number are one synapse

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that the table must have."""
        return self.ends[0] + self.ends[1]


def _axes(pattern: str) -> Ends:
    pre, post = (tuple(pattern.format(side=side, axis=axis) for axis in "zyx") for side in ("pre", "post"))
    return pre, post


_CAVE_NEURONS = (("pre_pt_root_id",), ("post_pt_root_id",))
LAYOUTS = (
    Layout(
        "synmlops",
        _axes("{side}_{axis}_nm"),
        "nm",
        neurons=(("pre_neuron",), ("post_neuron",)),
        confidence=("confidence",),
        site=("site",),
    ),
    Layout(
        "synful",
        _axes("{side}_{axis}"),
        "nm",
        neurons=(("segmentid_pre", "pre_root_id"), ("segmentid_post", "post_root_id")),
        confidence=("scores", "score"),
    ),
    Layout(
        "neuprint",
        _axes("{axis}_{side}"),
        "voxel",
        neurons=(("bodyId_pre",), ("bodyId_post",)),
        confidence=("confidence_pre", "confidence_post"),
    ),
    Layout("cave", (("pre_pt_position",), ("post_pt_position",)), None, neurons=_CAVE_NEURONS),
    Layout("cave", _axes("{side}_pt_position_{axis}"), None, neurons=_CAVE_NEURONS),
)
"""The kinds of tables that are recognised, the first that fits."""


@dataclass(frozen=True, eq=False)
class PointTable:
    """Pre and post points as a table gives them, a row for each pair.

    Attributes
    ----------
    name : str
        Of the table's kind; "columns" where all was named.
    raw : (N, 2, 3) array of float
        Pre and post, z y x, in the table's own units.
    units : "nm", "voxel" or None
    neurons : (N, 2) array of uint64, or None
    confidence : (N,) array of float, or None
        As it stands there.
    site : (N,) array of int, or None
    columns : dict
        What was read from which column.
    """

    name: str
    raw: NDArray[np.float64]
    units: Units | None
    neurons: NDArray[np.uint64] | None = None
    confidence: NDArray[np.float64] | None = None
    site: NDArray[np.int64] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def read_points(path: Path, *, columns: Mapping[str, str] | None = None) -> PointTable:
    """Read a table of points: CSV, TSV (also compressed), Parquet or Feather.

    Parameters
    ----------
    path : Path
    columns : mapping, optional
        A column for each of `ROLES`, `pre`, `post`, `pre_neuron`, `post_neuron`, `confidence` or `site`,
        instead of those that are recognised.

    Raises
    ------
    SynmlopsError
        If the file is missing, empty or no such table, a column is missing (with the nearest there is), or a
        position is no finite number (with its row).
    """
    frame = _read_frame(path)
    layout = layout_of(list(frame.columns), columns or {}, where=str(path))
    if frame.empty:
        raise SynmlopsError(f"{path}: has a header and no rows; give a table of synapses")
    raw = np.stack([_positions(path, frame, names) for names in layout.ends], axis=1)
    _refuse_unknown_numbers(path, raw, layout)
    present = [next(filter(frame.columns.__contains__, names), None) for names in layout.neurons]
    neurons = None
    if any(present):
        none = np.zeros(len(frame), np.uint64)
        neurons = np.stack([none if name is None else _ids(path, frame[name]) for name in present], axis=1)
    scores = [_numbers(path, frame[name]) for name in layout.confidence if name in frame]
    site = next((name for name in layout.site if name in frame), None)
    return PointTable(
        layout.name,
        raw,
        layout.units,
        neurons=neurons,
        confidence=np.min(scores, axis=0) if scores else None,
        site=None if site is None else _ids(path, frame[site]).astype(np.int64),
        columns=_used(layout, present, [name for name in layout.confidence if name in frame], site),
    )


def layout_of(names: Iterable[str], columns: Mapping[str, str], *, where: str) -> Layout:
    """Recognise the kind of a table by its columns; those given go before.

    Raises
    ------
    SynmlopsError
        If no kind fits, or a given column is not there.

    Examples
    --------
    >>> names = ["x_pre", "y_pre", "z_pre", "x_post", "y_post", "z_post", "bodyId_pre"]
    >>> layout_of(names, {}, where="a.csv").name
    'neuprint'
    >>> layout_of(["a", "b"], {"pre": "a", "post": "b"}, where="a.csv").ends
    (('a',), ('b',))
    """
    there = list(names)
    _refuse_unknown_columns(there, columns, where)
    fits = [one for one in LAYOUTS if set(_with(one, columns).needed) <= set(there)]
    if fits:
        return _with(fits[0], columns)
    bare = _with(Layout("columns", ((), ()), None), columns)
    if all(len(end) in (1, 3) and all(end) for end in bare.ends):
        return bare
    raise SynmlopsError(f"{where}: {_missing(there, columns)}")


def _with(layout: Layout, columns: Mapping[str, str]) -> Layout:
    """Give a layout with columns of the user's in place of its own."""
    ends: list[tuple[str, ...]] = []
    for side, own in zip(("pre", "post"), layout.ends, strict=True):
        given = tuple(columns.get(f"{side}_{axis}", "") for axis in "zyx")
        if side in columns:
            ends.append((columns[side],))
        elif any(given):
            spare = own if len(own) == 3 else ("", "", "")
            ends.append(tuple(new or old for new, old in zip(given, spare, strict=True)))
        else:
            ends.append(own)
    pre, post = (
        (columns[key],) if key in columns else own
        for key, own in zip(("pre_neuron", "post_neuron"), layout.neurons, strict=True)
    )
    return replace(
        layout,
        ends=(ends[0], ends[1]),
        units=layout.units if (ends[0], ends[1]) == layout.ends else None,
        neurons=(pre, post),
        confidence=(columns["confidence"],) if "confidence" in columns else layout.confidence,
        site=(columns["site"],) if "site" in columns else layout.site,
    )


def _refuse_unknown_columns(there: list[str], columns: Mapping[str, str], where: str) -> None:
    for role, name in columns.items():
        if role not in ROLES + _MORE_ROLES:
            raise SynmlopsError(
                f"--columns {role}={name}: {role} is none of {', '.join(ROLES + _MORE_ROLES)}"
            )
        if name not in there:
            raise SynmlopsError(
                f"--columns {role}={name}: {where} has no column {name}{_nearest(name, there)}"
            )


def _missing(there: list[str], columns: Mapping[str, str]) -> str:
    """Say what the table lacks of the kind that it is nearest to."""
    best = max(LAYOUTS, key=lambda layout: len(set(layout.needed) & set(there)))
    lacking = [name for name in best.needed if name not in there]
    if len(lacking) == len(best.needed):
        return (
            f"its columns {', '.join(there[:12])} are none that are known; name them: "
            "--columns pre_z=...,pre_y=...,pre_x=...,post_z=...,post_y=...,post_x=... --units nm"
        )
    name = lacking[0]
    role = (
        ROLES[best.needed.index(name)] if len(best.needed) == 6 else ("pre", "post")[best.needed.index(name)]
    )
    return (
        f"looks like a table of {best.name}'s columns but has no {', '.join(lacking)}"
        f"{_nearest(name, [one for one in there if one not in best.needed])}; name the column: "
        f"--columns {role}=NAME"
    )


def _nearest(name: str, there: list[str]) -> str:
    lower = {one.lower(): one for one in there}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (nearest: {lower[near[0]]})" if near else f"; it has {', '.join(there[:12])}" if there else ""


def _read_frame(path: Path) -> pd.DataFrame:
    """Read a table; whole numbers keep all digits, which ids need that a float cannot hold."""
    if not path.exists():
        raise SynmlopsError(f"{path}: there is no such file; check the path")
    if path.stat().st_size == 0:
        raise SynmlopsError(f"{path}: is empty (0 bytes); copy or make it again")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        if suffixes and suffixes[-1] in _ARROW:
            read = pd.read_feather if suffixes[-1] in _ARROW[2:] else pd.read_parquet
            return read(path)
        known = [_TABLES[suffix] for suffix in suffixes if suffix in _TABLES]
        if not known:
            raise SynmlopsError(
                f"{path}: unknown format; give {', '.join([*_TABLES, *_ARROW])} (text may be "
                ".gz, .bz2, .xz, .zip)"
            )
        frame = pd.read_csv(path, sep=known[0], dtype_backend="numpy_nullable")
    except pd.errors.EmptyDataError as error:
        raise SynmlopsError(f"{path}: holds no table; copy or make it again") from error
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise SynmlopsError(f"{path}: cannot be read as a table ({error}); copy or make it again") from error
    return frame.rename(columns=lambda name: str(name).strip())


def _positions(path: Path, frame: pd.DataFrame, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Give z, y, x of one end."""
    if len(names) == 3:
        return np.stack([_numbers(path, frame[name]) for name in names], axis=1)
    return _lists(path, frame[names[0]])[:, ::-1]


def _lists(path: Path, column: "pd.Series[Any]") -> NDArray[np.float64]:
    """Give x, y, z of a column of lists, or of text such as "[1, 2, 3]" or "[1 2 3]"."""
    if isinstance(column.iloc[0], str):
        trimmed = pc.utf8_trim(pa.array(column.fillna("").astype("str")), "[]() \t")
        plain = pc.replace_substring_regex(trimmed, r"[,\s]+", " ")
        lengths = pc.count_substring(plain, " ").to_numpy(zero_copy_only=False) + 1
        values = itertools.chain.from_iterable(text.split(" ") for text in plain.to_pylist())
    else:
        lengths = column.map(
            lambda one: len(one) if isinstance(one, list | tuple | np.ndarray) else 0
        ).to_numpy()
        values = itertools.chain.from_iterable(column)
    wrong = np.flatnonzero(lengths != 3)
    if len(wrong):
        raise SynmlopsError(
            f"{path}: row {wrong[0] + 1} has {column.iloc[wrong[0]]!r} in {column.name}, not three "
            "numbers x, y, z"
        )
    try:
        return np.fromiter(map(float, values), np.float64, 3 * len(column)).reshape(-1, 3)
    except ValueError as error:
        raise SynmlopsError(f"{path}: {column.name} holds what is no number ({error})") from error


def _numbers(path: Path, column: "pd.Series[Any]") -> NDArray[np.float64]:
    found = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if not np.isnan(found).any():
        return found
    wrong = np.flatnonzero(np.isnan(found) & column.notna().to_numpy(bool))
    if len(wrong):
        value = column.iloc[wrong[0]]
        if not (isinstance(value, float) and np.isnan(value)):
            raise SynmlopsError(f"{path}: row {wrong[0] + 1} has {value!r} in {column.name}, not a number")
    return found


def _ids(path: Path, column: "pd.Series[Any]") -> NDArray[np.uint64]:
    """Give ids; a missing or negative one is 0, which is none."""
    try:
        values = pa.array(column, from_pandas=True)
        # beyond int64 where some are missing, they come as text
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = pc.replace_with_mask(values, pc.equal(values, ""), None).cast(pa.uint64())
        if pa.types.is_uint64(values.type):
            return np.asarray(values.fill_null(0).to_numpy(zero_copy_only=False))
        found = values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise SynmlopsError(f"{path}: {column.name} holds what is no whole number ({error})") from error
    return np.asarray(found.clip(0).astype(np.uint64))


def _refuse_unknown_numbers(path: Path, raw: NDArray[np.float64], layout: Layout) -> None:
    wrong = ~np.isfinite(raw)
    if not wrong.any():
        return
    row, side, axis = (int(n) for n in np.argwhere(wrong)[0])
    names = layout.ends[side]
    raise SynmlopsError(
        f"{path}: {names[axis] if len(names) == 3 else names[0]} of row {row + 1} is {raw[row, side, axis]}; "
        f"{int(wrong.any(axis=(1, 2)).sum())} of {len(raw)} rows have such positions; remove them"
    )


def _used(
    layout: Layout, neurons: list[str | None], confidence: list[str], site: str | None
) -> dict[str, str]:
    """Give what is read from which columns, for people."""
    found = {side: ", ".join(names) for side, names in zip(("pre", "post"), layout.ends, strict=True)}
    if any(neurons):
        found["neurons"] = ", ".join(name for name in neurons if name)
    if confidence:
        found["confidence"] = ", ".join(confidence)
    if site:
        found["site"] = site
    return found
