"""What is in a volume file, and what is wrong with it, before anything is trained on it.

Every voxel is read once or twice, slab by slab. What a file does not say is guessed and called a guess;
training never guesses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from synmlops.params import SynmlopsError
from synmlops.volumes.hdf5 import HDF5_SUFFIXES, list_datasets
from synmlops.volumes.labels import count_components, unmatched_ids
from synmlops.volumes.origin import origin_of
from synmlops.volumes.store import Grid, Volume, open_volume, split_joined

Role = Literal["image", "label", "mask", "probabilities", "unreadable"]
BINS = 16
PERCENTS = (0, 1, 50, 99, 100)
_BARS = " ▁▂▃▄▅▆▇█"
_FINE_BINS = 1 << 12  # multiple of BINS
_BESIDE_LABEL = ("image", "neurons", "mask", "sides")  # datasets that the root's `label_kind` is not said of
_TABLES = ("foreground_sum", "trusted_sum")  # datasets of prepare that are no voxels
_SATURATED = 0.01  # share of voxels at an end of the range from which it is worth saying
_SAME_NEIGHBOUR = 0.6  # share of non-zero voxels equal to a neighbour in x from which it is a label


@dataclass(frozen=True)
class VolumeReport:
    """What `inspect_volume` found."""

    source: str
    role: Role
    shape: tuple[int, ...] = ()
    dtype: str = ""
    grid: Grid | None = None
    origin: str = ""  # how it was made, where the file says so
    label: str = ""  # label kind and counts, or the share that a mask takes in, in words
    histogram: tuple[int, ...] = ()  # voxels in BINS equal bins from the lowest to the highest value
    percentiles: tuple[float, ...] = ()  # at PERCENTS
    problems: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether every voxel could be read."""
        return self.role != "unreadable"

    @property
    def size_um(self) -> tuple[float, ...] | None:
        """Extent along z, y, x in micrometres."""
        if self.grid is None:
            return None
        return tuple(n * nm / 1000 for n, nm in zip(self.shape[-3:], self.grid.voxel_nm, strict=True))


@dataclass
class _Tally:
    """What one pass over the slabs gives for any volume."""

    lowest: float = np.inf
    highest: float = -np.inf
    unusable: int = 0  # NaN or infinite voxels
    nonzero: int = 0
    least: float = np.inf  # of those that are not zero
    same: int = 0  # non-zero voxels equal to a neighbour in x
    constant_sections: list[int] = field(default_factory=list)


def inspect_volumes(sources: Sequence[str]) -> list[VolumeReport]:
    """Inspect files, and every volume of an HDF5 file that holds several.

    Parameters
    ----------
    sources : sequence of str
        As `open_volume` takes them; `@` may join several in one string.

    Returns
    -------
    reports : list of VolumeReport
        One per volume. A file that cannot be read gives a report too, with role "unreadable".
    """
    reports = [inspect_volume(name) for source in split_joined(list(sources)) for name in _volumes_in(source)]
    images = {report.shape for report in reports if report.role == "image"}
    return [_with_lonely_shape(report, images) for report in reports]


def inspect_volume(source: str) -> VolumeReport:
    """Read a volume through and describe it; what is wrong stands in `problems`."""
    try:
        with open_volume(source, ndim=None) as volume:
            return _describe(volume)
    except SynmlopsError as error:
        return VolumeReport(source, "unreadable", problems=(str(error),))


def render(report: VolumeReport) -> RenderableType:
    """Lay a report out for a terminal."""
    table = Table.grid(padding=(0, 2))
    if report.readable:
        table.add_row("role", report.role)
        table.add_row("shape", f"{' x '.join(map(str, report.shape))} {report.dtype}")
    if report.grid is not None:
        table.add_row("voxel size", f"{_numbers(report.grid.voxel_nm)} nm (z y x)")
        table.add_row("offset", f"{_numbers(report.grid.offset_nm)} nm")
        table.add_row("extent", f"{_numbers(report.size_um or ())} um")
    if report.origin:
        table.add_row("made by", report.origin)
    if report.label:
        table.add_row(report.role, report.label)
    if report.histogram:
        ends = f"{report.percentiles[0]:g} to {report.percentiles[-1]:g}"
        table.add_row("histogram", f"{bars(report.histogram)}  {ends}")
        shown = zip(PERCENTS, report.percentiles, strict=True)
        table.add_row("percentiles", "  ".join(f"{percent}%: {value:g}" for percent, value in shown))
    problems = [Text(f"  ! {problem}", style="yellow") for problem in report.problems]
    return Group(
        Text(report.source, style="bold"), table, *problems or [Text("  nothing wrong found")], Text()
    )


def bars(counts: Sequence[int]) -> str:
    """Draw counts as one line of bars; only zero is blank.

    Examples
    --------
    >>> bars([0, 1, 50, 100])
    ' ▁▄█'
    """
    top = max(max(counts), 1)
    return "".join(_BARS[max(count * 8 // top, int(count > 0))] for count in counts)


def _volumes_in(source: str) -> list[str]:
    """Name each volume of an HDF5 file of several; otherwise the source itself."""
    path = Path(source)
    if path.suffix.lower() not in HDF5_SUFFIXES or not path.is_file():
        return [source]
    try:
        found = list_datasets(path)
    except SynmlopsError:
        return [source]  # opening it gives the message
    volumes = [name for name, (shape, _) in found.items() if len(shape) in (3, 4) and name not in _TABLES]
    return [f"{source}::{name}" for name in volumes] if len(volumes) > 1 else [source]


def _describe(volume: Volume) -> VolumeReport:
    tally = _tally(volume)
    role = _guess_role(volume, tally)
    form = volume.shape, str(volume.dtype), volume.grid
    report = VolumeReport(volume.name, role, *form, origin=origin_of(volume.attrs))
    problems = _common_problems(volume, tally)
    if role == "mask":
        label, odd = _describe_mask(volume, tally)
        return replace(report, label=label, problems=(*problems, *odd))
    if role == "label":
        label, odd = _describe_label(volume, tally)
        return replace(report, label=label, problems=(*problems, *odd))
    if tally.lowest > tally.highest:  # not one usable voxel
        return replace(report, problems=tuple(problems))
    counts, edges = _grey_levels(volume, tally)
    histogram = tuple(int(part.sum()) for part in np.array_split(counts, BINS))
    reached = np.cumsum(counts)
    places = np.searchsorted(reached, np.array(PERCENTS) / 100 * reached[-1])
    percentiles = tuple(float(edges[place]) for place in places)
    odd = _image_problems(volume, tally, counts) if role == "image" else _probability_problems(volume)
    return replace(report, histogram=histogram, percentiles=percentiles, problems=(*problems, *odd))


def _tally(volume: Volume) -> _Tally:
    tally = _Tally()
    for z, slab in volume.slabs():
        usable = np.isfinite(slab)
        tally.unusable += slab.size - int(np.count_nonzero(usable))
        if usable.any():
            tally.lowest = min(tally.lowest, slab.min(where=usable, initial=slab[usable][0]).item())
            tally.highest = max(tally.highest, slab.max(where=usable, initial=slab[usable][0]).item())
        nonzero = slab != 0
        if nonzero.any():
            tally.nonzero += int(np.count_nonzero(nonzero))
            tally.least = min(tally.least, slab[nonzero].min().item())
        like_next = slab[..., :-1] == slab[..., 1:]
        like_a_neighbour = np.zeros(slab.shape, bool)
        like_a_neighbour[..., 1:], like_a_neighbour[..., :-1] = like_next, like_next
        like_a_neighbour[..., 1:-1] |= like_next[..., :-1]
        tally.same += int(np.count_nonzero(like_a_neighbour & nonzero))
        if slab.ndim == 3:
            constant = (slab == slab[:, :1, :1]).all(axis=(1, 2))
            tally.constant_sections += [z + int(i) for i in np.flatnonzero(constant)]
    return tally


def _guess_role(volume: Volume, tally: _Tally) -> Role:
    if len(volume.shape) == 4:
        return "probabilities"
    if volume.dtype.kind == "f":
        return "image"
    if _is_mask(volume, tally):
        return "mask"
    if volume.dtype.itemsize > 2:
        return "label"
    if tally.nonzero == 0 or tally.lowest == tally.highest:
        return "label" if _stated_kind(volume) else "image"
    return "label" if tally.same > _SAME_NEIGHBOUR * tally.nonzero else "image"


def _stated_kind(volume: Volume) -> str | None:
    """Give the label kind that the file says, which is not that of what lies beside the label."""
    return None if volume.dataset in _BESIDE_LABEL else volume.attrs.get("label_kind")


def _is_named_mask(volume: Volume) -> bool:
    return volume.dataset == "mask" or volume.path.stem.lower().endswith("mask")


def _is_mask(volume: Volume, tally: _Tally) -> bool:
    """Tell a mask: 0 and one other value at most, and its name, or that it takes in most of the volume."""
    if _stated_kind(volume) or tally.lowest < 0 or (tally.nonzero and tally.least != tally.highest):
        return False
    most = tally.lowest == 0 and tally.nonzero > math.prod(volume.shape) / 2
    return most or _is_named_mask(volume)


def _describe_mask(volume: Volume, tally: _Tally) -> tuple[str, list[str]]:
    """Give what a mask takes in, in words, and what is wrong."""
    how = "" if _is_named_mask(volume) else "looks like one: "
    share = tally.nonzero / math.prod(volume.shape)
    odd = [] if tally.nonzero else ["takes in nothing: every voxel is 0"]
    return f"{how}{tally.highest:g} in {share:.2%} of the voxels, else 0", odd


def _common_problems(volume: Volume, tally: _Tally) -> list[str]:
    problems = []
    if volume.grid is None:
        problems.append("no voxel size in the file: set data.voxel_nm in params.yaml")
    if tally.unusable:
        problems.append(f"{tally.unusable} voxels are NaN or infinite: replace them")
    if volume.dtype.kind == "f":
        problems.append(f"{volume.dtype} voxels: convert an image to uint8, a label to an unsigned integer")
    return problems


def _grey_levels(volume: Volume, tally: _Tally) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count values in bins of equal width from the lowest to the highest; give counts and lower edges."""
    low, high = tally.lowest, tally.highest
    if volume.dtype.kind in "ui" and high - low < 1 << 16:
        n = -(-int(high - low + 1) // BINS) * BINS  # so that the bars are of equal width
        counts = np.zeros(n, np.int64)
        for _, slab in volume.slabs():
            counts += np.bincount(slab.ravel().astype(np.int64) - int(low), minlength=n)
        return counts, low + np.arange(n, dtype=np.float64)
    counts, width = np.zeros(_FINE_BINS, np.int64), max((high - low) / _FINE_BINS, np.finfo(np.float64).tiny)
    for _, slab in volume.slabs():
        values = slab[np.isfinite(slab)].astype(np.float64)
        places = ((values - low) / width).clip(0, _FINE_BINS - 1).astype(np.int64)
        counts += np.bincount(places, minlength=_FINE_BINS)
    return counts, np.linspace(low, high, _FINE_BINS)


def _image_problems(volume: Volume, tally: _Tally, counts: NDArray[np.int64]) -> list[str]:
    problems = []
    if tally.lowest == tally.highest:
        return [f"every voxel is {tally.lowest:g}: check that it is the right file"]
    if tally.constant_sections:
        shown = ", ".join(map(str, tally.constant_sections[:8]))
        more = ", ..." if len(tally.constant_sections) > 8 else ""
        problems.append(
            f"{len(tally.constant_sections)} empty sections (z = {shown}{more}): mask them or cut them off"
        )
    if volume.dtype.kind not in "ui":
        return problems
    if volume.dtype.name not in ("uint8", "uint16"):
        problems.append(f"{volume.dtype}: an image must be uint8 or uint16")
    for value in (0, int(np.iinfo(volume.dtype).max)):
        place = value - int(tally.lowest)
        share = counts[place] / counts.sum() if 0 <= place < len(counts) else 0
        if share > _SATURATED:
            problems.append(f"{share:.1%} of the voxels are saturated at {value}, an end of the range")
    levels = int(np.count_nonzero(counts))
    if levels <= BINS:
        problems.append(f"only {levels} grey levels: is it a label, or an image whose range was cut?")
    return problems


def _probability_problems(volume: Volume) -> list[str]:
    lacking = [name for name in ("scale", "channels") if name not in volume.attrs]
    return [
        f"attribute {name} is missing: infer writes it, and evaluate refuses a file without"
        for name in lacking
    ]


def _describe_label(volume: Volume, tally: _Tally) -> tuple[str, list[str]]:
    """Give label kind and counts in words, and what is wrong."""
    if tally.lowest < 0:
        return "negative values", [f"values down to {tally.lowest:g}: a label holds 0 and positive ids"]
    if tally.nonzero == 0:
        return "empty", ["no foreground: every voxel is 0"]
    ids, sizes, centres = _instances(volume)
    share = tally.nonzero / np.prod(volume.shape, dtype=np.int64)
    problems = []
    if ids[-1] >= 2**31:
        problems.append(f"ids up to {ids[-1]}, which wrap in programs that use 32-bit signed ids")
    stated = _stated_kind(volume)
    kind = stated or _guess_kind(ids, centres, volume.grid, share)
    if kind == "pairs":
        problems += unmatched_ids(ids)
    if kind == "semantic" and ids[-1] > 2:
        problems.append(f"says semantic but holds {ids[-1]}: semantic knows 0, 1 (pre) and 2 (post)")
    if kind in ("pairs", "semantic") and not (ids % 2 == 0).any():
        problems.append(f"a {kind} label without any post side: set label_kind to union")
    how = "" if stated else "looks like "
    return f"{how}{kind}: {_count_words(kind, ids, sizes, volume)}, foreground {share:.2%}", problems


def _count_words(kind: str, ids: NDArray[np.uint64], sizes: NDArray[np.int64], volume: Volume) -> str:
    if kind == "pairs":
        return f"{len(np.unique((ids + 1) // 2))} sites, ids up to {ids[-1]}"
    if kind == "semantic":
        pre, post = (int(sizes[ids == value].sum()) for value in (1, 2))
        return f"{pre} voxels pre, {post} post"
    if kind == "union":
        n = count_components(slab for _, slab in volume.slabs())
        return f"{n} connected synapses, {len(ids)} values up to {ids[-1]}"
    return f"{len(ids)} ids up to {ids[-1]}, median {int(np.median(sizes))} voxels"


def _guess_kind(
    ids: NDArray[np.uint64], centres: NDArray[np.float64], grid: Grid | None, share: float
) -> str:
    """Tell what a label looks like; for the reader's eyes only, training must be told."""
    if len(ids) == 1:
        return "union"
    if ids.tolist() == [1, 2]:
        return "semantic"
    matched = int(ids[-1]) <= 4 * len(ids) and len(unmatched_ids(ids)) == 0
    if matched and _sides_are_close(ids, centres, grid):
        return "pairs"
    return "a segmentation" if share > 0.5 else "instances"


def _sides_are_close(ids: NDArray[np.uint64], centres: NDArray[np.float64], grid: Grid | None) -> bool:
    """Tell whether 2n-1 and 2n lie together, and 2n and 2n+1 apart."""
    steps = np.linalg.norm(np.diff(centres, axis=0) * (grid.voxel_nm if grid else (1, 1, 1)), axis=1)
    next_id = np.diff(ids) == 1
    within, across = steps[next_id & (ids[:-1] % 2 == 1)], steps[next_id & (ids[:-1] % 2 == 0)]
    return len(across) == 0 or bool(np.median(within) < 0.5 * np.median(across))


def _instances(
    volume: Volume,
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.float64]]:
    """Give ids, ascending, with their voxels and centres of mass in voxels, (N, 3)."""
    all_ids, all_sizes, all_sums = [], [], []
    for first_z, slab in volume.slabs():
        zyx = np.nonzero(slab)
        found, place, sizes = np.unique(slab[zyx], return_inverse=True, return_counts=True)
        sums = [np.bincount(place, axis, len(found)) for axis in zyx]
        all_ids.append(found.astype(np.uint64))
        all_sizes.append(sizes)
        all_sums.append(np.stack([sums[0] + first_z * sizes, sums[1], sums[2]], axis=1))
    ids, place = np.unique(np.concatenate(all_ids), return_inverse=True)
    sizes, totals = np.zeros(len(ids), np.int64), np.zeros((len(ids), 3))
    np.add.at(sizes, place, np.concatenate(all_sizes))
    np.add.at(totals, place, np.concatenate(all_sums))
    return ids, sizes, totals / sizes[:, None]


def _with_lonely_shape(report: VolumeReport, images: set[tuple[int, ...]]) -> VolumeReport:
    """Say so if no image given along with a label has its shape."""
    if report.role != "label" or not images or report.shape in images:
        return report
    problem = f"no image given has this shape; they are {', '.join(map(str, sorted(images)))}"
    return replace(report, problems=(*report.problems, problem))


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
