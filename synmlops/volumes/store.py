"""Volumes: HDF5, TIFF, folders of sections, Zarr, N5 and neuroglancer precomputed in, HDF5 out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.chunk_headers import is_chunked
from synmlops.volumes.files import atomic_path, plain_write_errors
from synmlops.volumes.hdf5 import HDF5_SUFFIXES, Hdf5Dataset
from synmlops.volumes.sections import TIFF_SUFFIXES, Nm, Region, SectionFolder, TiffStack

SLAB_BYTES = 64 << 20
_CHUNK_ZYX = (16, 128, 128)  # voxels; used where a dataset is compressed


@dataclass(frozen=True)
class Grid:
    """Where voxels lie in the world: world nm = offset_nm + voxel index * voxel_nm; z y x.

    Examples
    --------
    >>> Grid((40, 4, 4), (400, 0, 0)).cropped((1, 2, 0))
    Grid(voxel_nm=(40, 4, 4), offset_nm=(440, 8, 0))
    """

    voxel_nm: Nm
    offset_nm: Nm = (0.0, 0.0, 0.0)

    def cropped(self, start_zyx: tuple[int, int, int]) -> "Grid":
        """Give the grid of a region that begins at this voxel."""
        z, y, x = (
            at + n * size for at, n, size in zip(self.offset_nm, start_zyx, self.voxel_nm, strict=True)
        )
        return Grid(self.voxel_nm, (z, y, x))

    def pooled(self, pool_zyx: tuple[float, float, float]) -> "Grid":
        """Give the grid of voxels so many times as large; a new voxel lies in the middle of those it covers.

        Examples
        --------
        >>> Grid((40.0, 4.0, 4.0)).pooled((1, 2, 2))
        Grid(voxel_nm=(40.0, 8.0, 8.0), offset_nm=(0.0, 2.0, 2.0))
        """
        z, y, x = (size * n for size, n in zip(self.voxel_nm, pool_zyx, strict=True))
        oz, oy, ox = (
            at + (n - 1) / 2 * size
            for at, n, size in zip(self.offset_nm, pool_zyx, self.voxel_nm, strict=True)
        )
        return Grid((z, y, x), (oz, oy, ox))


class _Reader(Protocol):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: dict[str, Any]
    voxel_nm: Nm | None
    offset_nm: Nm | None

    @property
    def name(self) -> str | None: ...  # within the file
    def read(self, region: Region) -> NDArray[Any]: ...
    def memmap(self) -> NDArray[Any] | None: ...
    def identity(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Volume:
    """An open volume of which any region can be read; made by `open_volume`, closed by `with`.

    Attributes
    ----------
    path : Path
        Of a URL, the URL as if it were one: of use for its name only.
    dataset : str or None
        Name within an HDF5 file, or of the array within a group or pyramid.
    shape : tuple of int
        z, y, x, or c, z, y, x.
    dtype : numpy.dtype
        In native byte order; booleans are read as uint8.
    grid : Grid or None
        None if the file does not give the voxel size.
    attrs : dict
        Attributes of the dataset and, where it lacks them, of the HDF5 file's root or the OME-Zarr group.
    """

    def __init__(self, source: str | Path, reader: _Reader) -> None:
        self._source, self._reader = str(source), reader
        self.path, self.dataset = Path(source), reader.name
        self.shape, self.dtype, self.attrs = reader.shape, reader.dtype, reader.attrs
        self.grid = None
        if reader.voxel_nm is not None:
            self.grid = Grid(reader.voxel_nm, reader.offset_nm or (0.0, 0.0, 0.0))

    @property
    def name(self) -> str:
        """The source as one would type it."""
        return self._source if self.dataset is None else f"{self._source}::{self.dataset}"

    def __getitem__(self, region: Region | slice) -> NDArray[Any]:
        """Read a region: slices with step 1, one per axis; missing trailing ones mean the whole axis."""
        slices = region if isinstance(region, tuple) else (region,)
        if len(slices) > len(self.shape) or any(
            not isinstance(s, slice) or s.step not in (None, 1) for s in slices
        ):
            raise ValueError(f"a region of {self.shape} is up to {len(self.shape)} slices, got {region}")
        whole = (slice(None),) * (len(self.shape) - len(slices))
        return self._reader.read((*slices, *whole))

    def read(self) -> NDArray[Any]:
        """Read the whole volume."""
        return self[()]

    def slabs(self, max_bytes: int = SLAB_BYTES, *, multiple: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
        """Give the volume as slabs along z, each with its first z.

        A slab is a multiple of `multiple` sections deep (the last one may be less), and may pass
        `max_bytes` only if that many sections do.
        """
        depth = self.shape[-3]
        group = self.dtype.itemsize * math.prod(self.shape) // depth * multiple
        step = max(1, max_bytes // group) * multiple
        for z in range(0, depth, step):
            yield z, self[(*(slice(None),) * (len(self.shape) - 3), slice(z, z + step))]

    def memmap(self) -> NDArray[Any] | None:
        """Give the volume as a read-only memory map, None where it is compressed or in many files."""
        return self._reader.memmap()

    def identity(self) -> dict[str, Any]:
        """Tell this volume from another that takes its place, without reading it through.

        What counts of files stands in `synmlops.volumes.files.identity_of`. Of a chunked volume these are the
        array's headers, on a server what they say: other voxels under the same headers go unnoticed.

        Returns
        -------
        identity : dict
            What JSON can hold, the same on every machine that finds the volume under this path: its `source`
            and what `identity_of` gives.

        Raises
        ------
        SynmlopsError
            If the volume is gone.
        """
        source = self.name if "://" in self.name else str(Path(self.name).absolute())
        return {"source": source, **self._reader.identity()}

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


def open_volume(source: str | Path, *, ndim: int | None = 3) -> Volume:
    """Open a volume for reading; nothing but its header is read.

    Parameters
    ----------
    source : str or Path
        An HDF5 file, `a.h5::dataset` (default: `main`, else the only dataset); a multi-page TIFF; a folder
        of TIFF or PNG sections; or the folder or URL (http, https, gs, s3) of a Zarr or N5 array, an OME-Zarr
        group or a neuroglancer precomputed volume, `a.zarr::1` (scale level, default 0, or an array's path).
        `zarr://`, `n5://` or `precomputed://` before it say what to look for, but need not be there.
    ndim : int or None
        3 for z, y, x; 4 for c, z, y, x; None for either. Of chunked volumes, leading axes of length one are
        left out where they are too many.

    Raises
    ------
    SynmlopsError
        If the file is missing, empty, truncated or of another format, the dataset is not there or not
        the only one, the sections differ, a server does not answer, or the volume has another number of axes
        or no voxels.
    """
    text, _, dataset = str(source).partition("::")
    if is_chunked(text):
        from synmlops.volumes.chunked import ChunkedArray  # tensorstore takes a while to import

        volume = Volume(text, ChunkedArray(text, dataset or None, ndim=ndim))
    else:
        volume = Volume(Path(text), _open_reader(Path(text), dataset or None))
    axes = {3: "z, y, x", 4: "c, z, y, x", None: "z, y, x or c, z, y, x"}[ndim]
    if len(volume.shape) not in ((3, 4) if ndim is None else (ndim,)) or 0 in volume.shape:
        volume.close()
        problem = "has no voxels" if 0 in volume.shape else f"has {len(volume.shape)} axes"
        raise SynmlopsError(f"{volume.name}: {problem}, shape {volume.shape}; give a volume with axes {axes}")
    return volume


def split_joined(paths: str | Sequence[str] | None) -> list[str]:
    """Give paths as a list, from a list or one string with `@` between them.

    Raises
    ------
    SynmlopsError
        If a path between two `@` is empty.

    Examples
    --------
    >>> split_joined("a.h5@b.h5::raw"), split_joined(["a.h5"]), split_joined(None)
    (['a.h5', 'b.h5::raw'], ['a.h5'], [])
    """
    if paths is None:
        return []
    names = [
        part.strip() for text in ([paths] if isinstance(paths, str) else paths) for part in text.split("@")
    ]
    if "" in names:
        raise SynmlopsError(f"{paths!r}: holds an empty path; write a.h5@b.h5")
    return names


def write_hdf5(
    path: str | Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    grid: Grid | None,
    attrs: Mapping[str, Any] | None = None,
    compression: str | None = None,
) -> None:
    """Write arrays as an HDF5 file that appears under its name when complete; see `hdf5_writer`."""
    forms = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with hdf5_writer(path, forms, grid=grid, attrs=attrs, compression=compression) as datasets:
        for name, array in arrays.items():
            datasets[name][...] = array


@contextmanager
def hdf5_writer(
    path: str | Path,
    datasets: Mapping[str, tuple[tuple[int, ...], DTypeLike]],
    *,
    grid: Grid | None,
    attrs: Mapping[str, Any] | None = None,
    compression: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Give writable HDF5 datasets to fill by block; the file appears under its name when complete.

    Parameters
    ----------
    path : str or Path
        The file; an earlier one stays untouched until the new one is complete.
    datasets : mapping of name to (shape, dtype)
    grid : Grid or None
        Written as attributes `resolution` and `offset` (nm, z y x) of the file's root and of each dataset
        of three or four axes.
    attrs : mapping, optional
        Further attributes of the root.
    compression : str, optional
        "gzip" or "lzf". By default datasets are contiguous, so that `Volume.memmap` can map them.

    Raises
    ------
    SynmlopsError
        If the place is full or cannot be written.
    """
    with atomic_path(path) as partial, plain_write_errors(Path(path), partial), ExitStack() as stack:
        file = stack.enter_context(h5py.File(partial, "w"))
        made = {}
        for name, (shape, dtype) in datasets.items():
            chunks = None
            if compression is not None:
                want = (1,) * (len(shape) - 3) + _CHUNK_ZYX[-len(shape) :]
                chunks = tuple(min(n, c) for n, c in zip(shape, want, strict=True))
            made[name] = file.create_dataset(name, shape, dtype, chunks=chunks, compression=compression)
            if grid is not None and len(shape) in (3, 4):
                _write_grid(made[name], grid)
        if grid is not None:
            _write_grid(file, grid)
        file.attrs.update(attrs or {})
        yield made


def _write_grid(node: Any, grid: Grid) -> None:
    node.attrs["resolution"] = np.array(grid.voxel_nm, np.float64)
    node.attrs["offset"] = np.array(grid.offset_nm, np.float64)


def _open_reader(path: Path, dataset: str | None) -> _Reader:
    if not path.exists():
        raise SynmlopsError(f"{path}: there is no such file or folder; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise SynmlopsError(f"{path}: is empty (0 bytes); copy or make it again")
    suffix = path.suffix.lower()
    if not path.is_dir() and (suffix in HDF5_SUFFIXES or h5py.is_hdf5(path)):
        return Hdf5Dataset(path, dataset)
    if dataset is not None:
        raise SynmlopsError(f"{path}::{dataset}: only HDF5, Zarr and N5 have datasets; leave out ::{dataset}")
    if path.is_dir():
        return SectionFolder(path)
    if suffix in TIFF_SUFFIXES:
        return TiffStack(path)
    raise SynmlopsError(
        f"{path}: unknown format; give HDF5 ({', '.join(HDF5_SUFFIXES)}), a multi-page TIFF "
        f"({', '.join(TIFF_SUFFIXES)}), a folder of TIFF or PNG sections, or Zarr, N5 or precomputed"
    )
