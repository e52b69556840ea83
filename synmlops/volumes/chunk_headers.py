"""What headers of OME-Zarr, N5 and neuroglancer precomputed say: scale levels, axes and voxel size.

Pure reading of JSON; `synmlops.volumes.chunked` finds the headers and opens the arrays.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError
from synmlops.volumes.sections import Nm

ZARR_HEADERS = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
FORMATS = {  # by the prefix of an address, the headers that are asked for
    "zarr": ZARR_HEADERS,
    "zarr2": ZARR_HEADERS[1:],
    "zarr3": ZARR_HEADERS[:1],
    "n5": ("attributes.json",),
    "precomputed": ("info",),
}
SPACE = ("z", "y", "x")
_AXES = ("t", "c", *SPACE)
_UNIT_NM = {
    "angstrom": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "micron": 1e3,
    "micrometer": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "centimeter": 1e7,
    "m": 1e9,
    "meter": 1e9,
}


@dataclass(frozen=True)
class Level:
    """One array of a volume, and how its axes lie in the world.

    Attributes
    ----------
    path : str
        Within the group; of precomputed volumes, the key of the scale.
    axes : tuple of str or None
        Names in the order in which they are stored; None if the header does not say.
    voxel_nm, offset_nm : tuple of float or None
        z y x; None if the header does not say, or not in which unit.
    """

    path: str
    axes: tuple[str, ...] | None = None
    voxel_nm: Nm | None = None
    offset_nm: Nm | None = None


def is_chunked(source: str) -> bool:
    """Say whether a source is a URL, or a folder of Zarr, N5 or neuroglancer precomputed.

    Examples
    --------
    >>> is_chunked("https://example.org/a.zarr"), is_chunked("a.tif")
    (True, False)
    """
    if "://" in source:
        return True
    path = Path(source)
    if not path.is_dir():
        return False
    named = any(folder.suffix.lower() in (".zarr", ".n5") for folder in (path, *path.absolute().parents))
    return (
        named
        or any((path / header).is_file() for header in ZARR_HEADERS)
        or any(_is_header(path / header) for header in ("attributes.json", "info"))
    )


def bare_address(source: str) -> str:
    """Give the path or URL without the format before it.

    Examples
    --------
    >>> bare_address("precomputed://gs://bucket/em"), bare_address("zarr:///a.zarr"), bare_address("file:///a")
    ('gs://bucket/em', '/a.zarr', '/a')
    """
    prefix, _, rest = source.partition("://")
    return (rest if prefix in FORMATS else source).removeprefix("file://")


def default_axes(rank: int) -> tuple[str, ...]:
    """Name the axes of an array that does not name them.

    Examples
    --------
    >>> default_axes(4)
    ('c', 'z', 'y', 'x')
    """
    return _AXES[-rank:] if rank <= len(_AXES) else (*(f"axis{n}" for n in range(rank - 5)), *_AXES)


def ome_levels(attributes: Mapping[str, Any]) -> list[Level]:
    """Give the scale levels that the attributes of an OME-Zarr group list, the finest first.

    Versions before 0.4 give no voxel size, and those before 0.3 no axes.

    Returns
    -------
    levels : list of Level
        Empty if the group is none of OME-Zarr.

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError
        If the attributes are not as OME-Zarr lays them out.

    Examples
    --------
    >>> axes = [{"name": name, "unit": "micrometer"} for name in "zyx"]
    >>> scale = {"type": "scale", "scale": [0.04, 0.008, 0.008]}
    >>> shift = {"type": "translation", "translation": [0, 0.004, 0]}
    >>> dataset = {"path": "s1", "coordinateTransformations": [scale, shift]}
    >>> ome_levels({"multiscales": [{"axes": axes, "datasets": [dataset]}]})
    [Level(path='s1', axes=('z', 'y', 'x'), voxel_nm=(40.0, 8.0, 8.0), offset_nm=(0.0, 4.0, 0.0))]
    """
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        return []
    first = multiscales[0]
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in first.get("axes", [])]
    names = tuple(str(axis["name"]).lower() for axis in axes) or None
    units = [_UNIT_NM.get(str(axis.get("unit"))) for axis in axes]
    levels = []
    for dataset in first["datasets"]:
        steps = [*dataset.get("coordinateTransformations", []), *first.get("coordinateTransformations", [])]
        voxel_nm, offset_nm = _placed(names, units, steps)
        levels.append(Level(str(dataset["path"]).strip("/"), names, voxel_nm, offset_nm))
    return levels


def n5_level(attributes: Mapping[str, Any]) -> Level:
    """Read what the attributes of an N5 array say; N5 lists everything x first.

    Voxel size and offset are taken from `resolution` and `offset` (nm) or `pixelResolution`; the latter
    is left aside beside `downsamplingFactors`, since some writers give the finest level's size there.

    Examples
    --------
    >>> size = {"unit": "um", "dimensions": [0.004, 0.004, 0.04]}
    >>> n5_level({"dimensions": [5, 4, 3], "pixelResolution": size})
    Level(path='', axes=('x', 'y', 'z'), voxel_nm=(40.0, 4.0, 4.0), offset_nm=None)
    """
    axes = default_axes(len(attributes["dimensions"]))[::-1]
    size, unit = attributes.get("resolution"), 1.0
    given = attributes.get("pixelResolution")
    if size is None and isinstance(given, Mapping) and set(attributes.get("downsamplingFactors", [1])) == {1}:
        size, unit = given.get("dimensions"), _UNIT_NM.get(str(given.get("unit")), math.nan)
    voxel_nm = _nm(size and [value * unit for value in size[2::-1]], positive=True)
    offset = attributes.get("offset")
    return Level("", axes, voxel_nm, _nm(offset and offset[2::-1], positive=False))


def plain_level(attributes: Mapping[str, Any], names: Sequence[str | None] | None) -> Level:
    """Read what a Zarr array says of itself: `resolution` and `offset` (nm, z y x), names of axes.

    Examples
    --------
    >>> plain_level({"resolution": [40, 4, 4], "offset": [0, 0, 8]}, None)
    Level(path='', axes=None, voxel_nm=(40.0, 4.0, 4.0), offset_nm=(0.0, 0.0, 8.0))
    """
    lower = tuple(str(name).lower() for name in names or ())
    axes = lower if set(SPACE) <= set(lower) <= set(_AXES) else None
    voxel_nm = _nm(attributes.get("resolution"), positive=True)
    return Level("", axes, voxel_nm, _nm(attributes.get("offset"), positive=False))


def precomputed_levels(info: Mapping[str, Any]) -> list[Level]:
    """Give the scales of a neuroglancer precomputed volume, the finest first.

    A scale's offset is the middle of its first voxel, counted from the middle of the finest scale's
    voxel 0, as it is with `Grid.pooled`.

    Examples
    --------
    >>> scales = [{"key": "a", "resolution": [4, 4, 40], "voxel_offset": [0, 0, 10]},
    ...           {"key": "b", "resolution": [8, 8, 40], "voxel_offset": [0, 0, 10]}]
    >>> [(level.path, level.voxel_nm, level.offset_nm) for level in precomputed_levels({"scales": scales})]
    [('a', (40.0, 4.0, 4.0), (400.0, 0.0, 0.0)), ('b', (40.0, 8.0, 8.0), (400.0, 2.0, 2.0))]
    """
    finest = [float(size) for size in info["scales"][0]["resolution"][::-1]]
    levels = []
    for scale in info["scales"]:
        size = [float(value) for value in scale["resolution"][::-1]]
        first = scale.get("voxel_offset", [0, 0, 0])[::-1]
        middle = [n * nm + (nm - fine) / 2 for n, nm, fine in zip(first, size, finest, strict=True)]
        axes = ("x", "y", "z", "c")
        levels.append(Level(str(scale["key"]), axes, _nm(size, positive=True), _nm(middle, positive=False)))
    return levels


def choose_level(name: str, levels: Sequence[Level], wanted: str | None) -> int | None:
    """Give the index of the level of that path or number; None if there is none such.

    Raises
    ------
    SynmlopsError
        If a number is asked for that is neither a path nor that of a level.
    """
    if wanted is None:
        return 0
    paths = [level.path for level in levels]
    if wanted in paths:
        return paths.index(wanted)
    if wanted.isdecimal() and int(wanted) >= len(levels):
        raise SynmlopsError(f"{name}: has no scale level {wanted}; it has {len(levels)}: {', '.join(paths)}")
    return int(wanted) if wanted.isdecimal() else None


def _is_header(path: Path) -> bool:
    """Tell a header from another program's file of that name, which may lie beside sections."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and bool({"scales", "n5", "dimensions"} & set(tree))


def _placed(
    names: tuple[str, ...] | None, units: Sequence[float | None], steps: Sequence[Mapping[str, Any]]
) -> tuple[Nm | None, Nm | None]:
    """Apply scales and translations one after the other; give voxel size and offset in nm."""
    if names is None or not set(SPACE) <= set(names) or not steps:
        return None, None
    scale, offset = [1.0] * len(names), [0.0] * len(names)
    for step in steps:
        kind = step["type"]
        if kind == "identity":
            continue
        if kind not in ("scale", "translation"):
            raise ValueError(f"coordinate transformation of type {kind}")
        values = [float(value) for value in step[kind]]
        if kind == "scale":
            scale = [a * b for a, b in zip(scale, values, strict=True)]
            offset = [a * b for a, b in zip(offset, values, strict=True)]
        else:
            offset = [a + b for a, b in zip(offset, values, strict=True)]
    places = [names.index(axis) for axis in SPACE]
    nm = [units[place] or math.nan for place in places]  # without a unit a size says nothing
    voxel_nm = _nm([scale[at] * unit for at, unit in zip(places, nm, strict=True)], positive=True)
    return voxel_nm, _nm([offset[at] * unit for at, unit in zip(places, nm, strict=True)], positive=False)


def _nm(values: Sequence[Any] | None, *, positive: bool) -> Nm | None:
    """Give three numbers z y x; None if the unit is not known, which `nan` stands for."""
    if values is None or len(values) == 0:
        return None
    z, y, x = (float(value) for value in values)
    if any(map(math.isnan, (z, y, x))):
        return None
    if not all(map(math.isfinite, (z, y, x))) or (positive and min(z, y, x) <= 0):
        raise ValueError(f"a voxel size or offset of {[z, y, x]}; sizes must be positive")
    return z, y, x
