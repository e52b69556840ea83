"""Reader of chunked volumes: Zarr, OME-Zarr, N5 and neuroglancer precomputed, in folders and on servers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.chunk_headers import (
    SPACE,
    Level,
    choose_level,
    default_axes,
    n5_level,
    ome_levels,
    plain_level,
    precomputed_levels,
)
from synmlops.volumes.chunk_stores import Place, plain_errors
from synmlops.volumes.mapped import mapped_zeros
from synmlops.volumes.sections import Region, size_of

_OF_N5 = ("dimensions", "blockSize", "dataType", "compression")
_OF_OME = ("ome", "multiscales", "omero")
_PARENTS = 2  # the path of an array in its multiscale group rarely has more parts


@dataclass(frozen=True)
class _Found:
    """An array and what its header and those above say."""

    place: Place
    spec: dict[str, Any]
    level: Level
    attrs: dict[str, Any]
    name: str | None = None  # of the array within the source


class ChunkedArray:
    """An array of chunks in files or objects of their own, of which only the header is read at opening.

    Parameters
    ----------
    source : str
        A path or URL, with a format before it or not.
    dataset : str or None
        Scale level by number, or path of an array within a group.
    ndim : int or None
        Axes wanted. Leading axes of length one beyond them are left out; if None, all but z, y, x, but not
        the axis of channels that an attribute `channels` names.
    """

    def __init__(self, source: str, dataset: str | None, *, ndim: int | None) -> None:
        where = source if dataset is None else f"{source}::{dataset}"
        place = Place(source)
        if not place.remote and not Path(place.address).is_dir():
            raise SynmlopsError(f"{source}: there is no such folder; check the path")
        found = _find(where, place, dataset)
        self._where, self._place = where, found.place
        self.name, self.attrs = found.name, found.attrs
        self.voxel_nm, self.offset_nm = found.level.voxel_nm, found.level.offset_nm
        with plain_errors(where):
            array = found.place.wait(ts.open(found.spec, open=True, read=True, context=found.place.context))
        stored = np.dtype(array.dtype.numpy_dtype)
        if stored.kind not in "buif":
            raise SynmlopsError(f"{where}: holds {array.dtype.name}, not numbers")
        self.dtype = np.dtype(np.uint8) if stored == np.bool_ else stored
        keep = 3 if ndim is None and "channels" not in self.attrs else ndim or 4
        self._array = _czyx(where, array, found.level.axes, keep=keep)
        self.shape: tuple[int, ...] = tuple(self._array.shape)

    def read(self, region: Region) -> NDArray[Any]:
        """Give the voxels of a region; one slice per axis. Chunks that are not there are the fill value."""
        bounds = [range(n)[s] for n, s in zip(self.shape, region, strict=True)]
        size = size_of(self.shape, region)
        voxels = mapped_zeros(size, self.dtype)
        if 0 in size:
            return voxels
        part = "region [" + ", ".join(f"{b.start}:{b.stop}" for b in bounds) + "]"
        with plain_errors(self._where, part):
            stored = self._array[tuple(slice(b.start, b.stop) for b in bounds)][ts.d[:].translate_to[0]]
            target = ts.array(voxels.view(stored.dtype.numpy_dtype), copy=False, write=True)
            self._place.wait(target.write(stored).commit)
        return voxels

    def memmap(self) -> NDArray[Any] | None:
        """Give None: chunks cannot be mapped."""
        return None

    def identity(self) -> dict[str, Any]:
        """Tell the array from another that takes its place, by its own headers: chunks may be millions."""
        return self._place.identity(self._where)

    def close(self) -> None:
        """Do nothing; files are open only while they are read."""


def _find(where: str, place: Place, dataset: str | None) -> _Found:
    """Find the array that a source names, by the headers that are there."""
    headers = place.headers(where)
    try:
        if "info" in headers and "scales" in headers["info"]:
            return _precomputed(where, place, headers["info"], dataset)
        found = _array(place, headers)
        if found is None:
            return _in_group(where, place, headers, dataset)
        if dataset is not None:
            raise SynmlopsError(f"{where}: is one array; leave out ::{dataset}")
        return found if "attributes.json" in headers else _with_parents(where, found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise SynmlopsError(
            f"{where}: its header is damaged or of an unknown version ({type(error).__name__}: {error})"
        ) from error


def _array(place: Place, headers: Mapping[str, Any]) -> _Found | None:
    """Take the place for an array; None if its headers are a group's."""
    three, two, n5 = (headers.get(name) for name in ("zarr.json", ".zarray", "attributes.json"))
    if three is not None and three.get("node_type") == "array":
        attrs = dict(three.get("attributes") or {})
        return _Found(place, _spec(place, "zarr3"), plain_level(attrs, three.get("dimension_names")), attrs)
    if two is not None:
        _refuse_records(place, two["dtype"])
        attrs = dict(headers.get(".zattrs") or {})
        return _Found(place, _spec(place, "zarr"), plain_level(attrs, attrs.get("_ARRAY_DIMENSIONS")), attrs)
    if n5 is not None and "dimensions" in n5:
        attrs = {key: value for key, value in n5.items() if key not in _OF_N5}
        return _Found(place, _spec(place, "n5"), n5_level(n5), attrs)
    return None


def _precomputed(where: str, place: Place, info: dict[str, Any], dataset: str | None) -> _Found:
    levels = precomputed_levels(info)
    chosen = choose_level(where, levels, dataset)
    if chosen is None:
        listed = ", ".join(level.path for level in levels)
        raise SynmlopsError(f"{where}: has no scale {dataset}; it has {listed}")
    spec = _spec(place, "neuroglancer_precomputed") | {"scale_index": chosen}
    return _Found(place, spec, levels[chosen], {}, str(chosen))


def _in_group(where: str, place: Place, headers: Mapping[str, Any], dataset: str | None) -> _Found:
    attrs = _group_attributes(headers)
    levels = ome_levels(attrs)
    chosen = choose_level(where, levels, dataset) if levels else None
    if chosen is not None:
        level = levels[chosen]
        inner = _array(place / level.path, (place / level.path).headers(where))
        if inner is None:
            raise SynmlopsError(
                f"{where}: lists a scale level {level.path}, but there is no array; copy it again"
            )
        own = {key: value for key, value in attrs.items() if key not in _OF_OME}
        return replace(inner, level=level, attrs=own | inner.attrs, name=level.path)
    if dataset is not None:
        path = dataset.strip("/")
        inside = (place / path).headers(where)
        array = _array(place / path, inside)
        inner = _with_parents(where, array) if array else _in_group(where, place / path, inside, None)
        return replace(inner, name=f"{path}/{inner.name or ''}".rstrip("/"))
    arrays = place.arrays(dict(headers))
    if len(arrays) == 1:
        return replace(_find(where, place / arrays[0], None), name=arrays[0])
    if not headers and not arrays:
        raise SynmlopsError(
            f"{where}: there is no Zarr, N5 or neuroglancer precomputed volume there; check the path"
        )
    listed = f"holds {len(arrays)} arrays ({', '.join(arrays)})" if arrays else "is a group"
    raise SynmlopsError(f"{where}: {listed}; name one: {where}::{arrays[0] if arrays else 'PATH'}")


def _with_parents(where: str, found: _Found) -> _Found:
    """Add what a multiscale group above says of one of its arrays."""
    for group, path in found.place.parents(_PARENTS):
        try:
            attrs = _group_attributes(group.headers(where))
        except SynmlopsError:  # what lies above need not be readable
            continue
        for level in ome_levels(attrs):
            if level.path == path:
                own = {key: value for key, value in attrs.items() if key not in _OF_OME}
                return replace(found, level=level, attrs=own | found.attrs)
    return found


def _group_attributes(headers: Mapping[str, Any]) -> dict[str, Any]:
    attrs = headers.get("zarr.json", {}).get("attributes") or headers.get(".zattrs")
    return dict(attrs or {})


def _spec(place: Place, driver: str) -> dict[str, Any]:
    return {"driver": driver, "kvstore": place.kvstore}


def _refuse_records(place: Place, dtype: Any) -> None:
    """Name the type of an array of Zarr v2 that tensorstore would refuse with a page of text."""
    if not isinstance(dtype, str) or dtype.lstrip("<>|=")[0] not in "buif":
        raise SynmlopsError(f"{place.address}: holds {dtype}, not numbers")


def _czyx(where: str, array: Any, axes: tuple[str, ...] | None, *, keep: int) -> Any:
    """Turn an array to (c, z, y, x), its first voxel 0; drop leading axes of length one beyond `keep`."""
    names = axes or default_axes(array.rank)
    if len(names) != array.rank:
        raise SynmlopsError(f"{where}: its header names {len(names)} axes, the array has {array.rank}")
    last = ("c", *SPACE)
    order = sorted(range(array.rank), key=lambda at: last.index(names[at]) if names[at] in last else -1)
    turned = array.transpose(order)[ts.d[:].translate_to[0]]
    for name in [names[at] for at in order]:
        if turned.rank > max(keep, 3) and turned.shape[0] == 1 and name not in SPACE:
            turned = turned[0]
    return turned
