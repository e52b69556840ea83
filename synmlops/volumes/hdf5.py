"""Reader of HDF5 datasets; `synmlops.volumes.store.open_volume` chooses and wraps it."""

import math
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import identity_of
from synmlops.volumes.mapped import mapped_zeros
from synmlops.volumes.sections import Nm, Region, size_of

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")


class Hdf5Dataset:
    """A dataset of an HDF5 file."""

    def __init__(self, path: Path, name: str | None) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise _damaged(path, error) from error
        try:
            self.name = _choose_dataset(path, self._file, name)
            self._data = self._file[self.name]
            if self._data.dtype.kind not in "buif":
                raise SynmlopsError(f"{path}::{self.name}: holds {self._data.dtype}, not numbers")
            self.attrs = _attributes(self._file) | _attributes(self._data)
            where = f"{path}::{self.name}"
            self.voxel_nm = _nm_attribute(where, self.attrs, "resolution", positive=True)
            self.offset_nm = _nm_attribute(where, self.attrs, "offset", positive=False)
        except (OSError, RuntimeError, KeyError) as error:
            self._file.close()
            raise _damaged(path, error) from error
        except SynmlopsError:
            self._file.close()
            raise
        self.shape: tuple[int, ...] = tuple(self._data.shape)
        native = self._data.dtype.newbyteorder("=")
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if native == np.bool_ else native

    def read(self, region: Region) -> NDArray[Any]:
        """Give the voxels of a region; one slice per axis."""
        size = size_of(self.shape, region)
        voxels = mapped_zeros(size, self.dtype)
        if 0 in size:
            return voxels
        try:
            self._data.read_direct(voxels.view(self._data.dtype.newbyteorder("=")), region)
            return voxels
        except (OSError, RuntimeError) as error:
            raise _damaged(self.path, error) from error

    def memmap(self) -> NDArray[Any] | None:
        """Give the whole dataset as a read-only memory map; None if compressed or of foreign byte order."""
        offset = self._data.id.get_offset()
        if offset is None or self._data.dtype != self.dtype or self._data.external:
            return None
        if offset + self._data.nbytes > self.path.stat().st_size:
            raise SynmlopsError(
                f"{self.path}::{self.name}: is truncated, its voxels end early; copy or make it again"
            )
        return np.memmap(self.path, self.dtype, "r", offset, self.shape)

    def identity(self) -> dict[str, Any]:
        """Tell the file from another that takes its place."""
        return identity_of([self.path])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def list_datasets(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Give shape and dtype of every dataset of an HDF5 file by name.

    Raises
    ------
    SynmlopsError
        If the file is truncated or no HDF5 file.
    """
    try:
        with h5py.File(path, "r") as file:
            return _datasets(file)
    except (OSError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _datasets(file: Any) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found[name] = (tuple(node.shape or ()), node.dtype)

    file.visititems(visit)
    return found


def _choose_dataset(path: Path, file: Any, name: str | None) -> str:
    found = _datasets(file)
    listed = ", ".join(f"{key} {shape} {dtype}" for key, (shape, dtype) in found.items())
    if not found:
        raise SynmlopsError(f"{path}: holds no dataset; copy or make it again")
    wanted = name.strip("/") if name is not None else ("main" if "main" in found else None)
    if wanted is None and len(found) == 1:
        return next(iter(found))
    if wanted is None:
        raise SynmlopsError(
            f"{path}: holds {len(found)} datasets ({listed}); name one: {path}::{next(iter(found))}"
        )
    if wanted not in found:
        raise SynmlopsError(f"{path}: has no dataset {wanted}; it holds {listed}")
    return wanted


def _attributes(node: Any) -> dict[str, Any]:
    return {
        key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for key, value in node.attrs.items()
    }


def _nm_attribute(where: str, attrs: dict[str, Any], key: str, *, positive: bool) -> Nm | None:
    if key not in attrs:
        return None
    try:
        z, y, x = (float(value) for value in attrs[key])
    except (TypeError, ValueError) as error:
        raise SynmlopsError(
            f"{where}: attribute {key} is {attrs[key]}; it must be three numbers (nm, z y x)"
        ) from error
    if not all(map(math.isfinite, (z, y, x))) or (positive and min(z, y, x) <= 0):
        raise SynmlopsError(f"{where}: attribute {key} is {attrs[key]}; sizes in nm must be positive numbers")
    return z, y, x


def _damaged(path: Path, error: BaseException) -> SynmlopsError:
    text = str(error)
    if "errno = 13" in text or isinstance(error, PermissionError):
        return SynmlopsError(f"{path}: may not be read; change its permissions")
    short = re.search(r"truncated file: eof = (\d+), .*stored_eof = (\d+)", text)
    if short is not None:
        return SynmlopsError(
            f"{path}: is truncated, {short[1]} of {short[2]} bytes are there; copy or make it again"
        )
    cause = "is truncated or damaged" if "read" in text else "is no HDF5 file or is damaged"
    return SynmlopsError(f"{path}: {cause} ({text}); copy or make it again")
