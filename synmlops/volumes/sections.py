"""Readers of volumes kept as sections: multi-page TIFF, and folders of TIFF or PNG files.

They know files and pixels only; `synmlops.volumes.store.open_volume` chooses one and wraps it.
"""

import logging
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from synmlops.params import SynmlopsError
from synmlops.volumes.files import identity_of
from synmlops.volumes.mapped import mapped_zeros

TIFF_SUFFIXES = (".tif", ".tiff")
SECTION_SUFFIXES = (*TIFF_SUFFIXES, ".png")
_BROKEN = (OSError, ValueError, SyntaxError, struct.error, zlib.error, EOFError, IndexError)
_UNIT_NM = {"nm": 1.0, "um": 1e3, "µm": 1e3, "\\u00B5m": 1e3, "micron": 1e3, "microns": 1e3}
_PILLOW_LIMIT = threading.Lock()

Region = tuple[slice, ...]
Nm = tuple[float, float, float]


class TiffStack:
    """A multi-page TIFF; an uncompressed one is memory-mapped, others are read page by page."""

    attrs: dict[str, Any]
    name: str | None = None
    offset_nm: Nm | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attrs = {}
        with _plainly(path):
            self._tiff = tifffile.TiffFile(path)
        try:
            with _plainly(path):
                self._series = _only_series(path, self._tiff)
                self.voxel_nm = _imagej_voxel_nm(self._tiff)
                self._map = self._open_map()
        except BaseException:
            self._tiff.close()
            raise
        self.shape: tuple[int, ...] = tuple(self._series.shape)
        self.dtype = _plain(self._series.dtype)

    def _open_map(self) -> NDArray[Any] | None:
        series = self._series
        if series.dataoffset is None or not series.keyframe.is_memmappable:
            return None
        stored = np.dtype(series.dtype).newbyteorder(self._tiff.byteorder)
        return np.memmap(self.path, stored, "r", series.dataoffset, tuple(series.shape))

    def read(self, region: Region) -> NDArray[Any]:
        """Give the voxels of a region; one slice per axis."""
        with _plainly(self.path):
            if self._map is not None:
                out = mapped_zeros(size_of(self.shape, region), self.dtype)
                out[...] = self._map[region]
                return out
            if len(self._series.pages) != self.shape[0] or len(self.shape) != 3:
                return np.asarray(self._series.asarray(), self.dtype)[region]
            rows = range(self.shape[0])[region[0]]
            out = mapped_zeros((len(rows), *size_of(self.shape[1:], region[1:])), self.dtype)
            for section, z in zip(out, rows, strict=True):
                section[...] = _tiff_page(self.path, self._series, z)[region[1:]]
            return out

    def memmap(self) -> NDArray[Any] | None:
        """Give the whole volume as a read-only memory map; None if compressed or of foreign byte order."""
        return self._map if self._map is not None and self._map.dtype == self.dtype else None

    def identity(self) -> dict[str, Any]:
        """Tell the file from another that takes its place."""
        return identity_of([self.path])

    def close(self) -> None:
        """Close the file."""
        self._map = None
        self._tiff.close()


class SectionFolder:
    """A folder of TIFF or PNG files, one section each, in natural order of their names."""

    attrs: dict[str, Any]
    name: str | None = None
    voxel_nm: Nm | None = None
    offset_nm: Nm | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attrs = {}
        self.files = section_files(path)
        first, self.dtype = _section_form(self.files[0])
        for file in self.files[1:]:
            shape, dtype = _section_form(file)
            if (shape, dtype) != (first, self.dtype):
                raise SynmlopsError(
                    f"{file}: is {shape} {dtype}, but {self.files[0].name} is {first} {self.dtype}; "
                    "all sections of a volume need one shape and type"
                )
        self.shape: tuple[int, ...] = (len(self.files), *first)

    def read(self, region: Region) -> NDArray[Any]:
        """Give the voxels of a region; one slice per axis."""
        files = self.files[region[0]]
        out = mapped_zeros((len(files), *size_of(self.shape[1:], region[1:])), self.dtype)
        for section, file in zip(out, files, strict=True):
            section[...] = read_section(file)[region[1:]]
        return out

    def memmap(self) -> None:
        """Give None: many files are not one map."""

    def identity(self) -> dict[str, Any]:
        """Tell the files from others that take their place."""
        return identity_of(self.files)

    def close(self) -> None:
        """Do nothing: no file stays open."""


def section_files(folder: Path) -> list[Path]:
    """Give the TIFF or PNG files of a folder in natural order (2 before 10), hidden files left out.

    Raises
    ------
    SynmlopsError
        If there is none, or there are both TIFF and PNG.
    """
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in SECTION_SUFFIXES and p.name[0] != "."]
    except OSError as error:
        raise SynmlopsError(f"{folder}: {error.strerror}; check the path") from error
    if not found:
        raise SynmlopsError(f"{folder}: holds no TIFF or PNG section; check the path")
    if len({p.suffix.lower() == ".png" for p in found}) > 1:
        raise SynmlopsError(f"{folder}: holds both TIFF and PNG files; keep one volume's sections per folder")
    return sorted(found, key=lambda p: natural_key(p.name))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Give a sorting key by which numbers in a name count as numbers.

    Examples
    --------
    >>> sorted(["s10.png", "s2.png"], key=natural_key)
    ['s2.png', 's10.png']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_section(path: Path) -> NDArray[Any]:
    """Read one grey section as (y, x); a black-and-white one becomes uint8 of 0 and 1.

    Raises
    ------
    SynmlopsError
        If the file is truncated, damaged or no single grey image.
    """
    with _plainly(path):
        if path.suffix.lower() in TIFF_SUFFIXES:
            with tifffile.TiffFile(path) as tiff:
                page = _tiff_page(path, _only_section(path, tiff), 0)
        else:
            _refuse_cut_png(path)
            with _pillow(path) as image:
                _refuse_colour(path, image)
                page = np.asarray(image)
    return page.astype(_plain(page.dtype), copy=False)


def size_of(shape: tuple[int, ...], region: Region) -> tuple[int, ...]:
    """Give the shape of a region.

    Examples
    --------
    >>> size_of((4, 10), (slice(1, 3), slice(None)))
    (2, 10)
    """
    return tuple(len(range(n)[s]) for n, s in zip(shape, region, strict=True))


def _section_form(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with _plainly(path):
        if path.suffix.lower() in TIFF_SUFFIXES:
            with tifffile.TiffFile(path) as tiff:
                series = _only_section(path, tiff)
                return tuple(series.shape), _plain(series.dtype)
        with _pillow(path) as image:
            _refuse_colour(path, image)
            dtype = {"1": np.uint8, "L": np.uint8, "P": np.uint8, "I": np.int32, "F": np.float32}
            return (image.height, image.width), np.dtype(dtype.get(image.mode, np.uint16))


def _only_series(path: Path, tiff: tifffile.TiffFile) -> Any:
    _refuse_truncated(path, tiff)
    if len(tiff.series) != 1:
        forms = sorted({f"{s.shape} {s.dtype}" for s in tiff.series})
        raise SynmlopsError(
            f"{path}: its pages differ ({', '.join(forms)}); all sections need one shape and type"
        )
    series = tiff.series[0]
    if "S" in series.axes:
        raise SynmlopsError(f"{path}: is a colour image {series.shape}; save it as grey values")
    if len(series.shape) == 4 and series.axes[0] not in "CQI":
        raise SynmlopsError(f"{path}: its axes are {series.axes}; save it with channels first (CZYX)")
    return series


def _only_section(path: Path, tiff: tifffile.TiffFile) -> Any:
    series = _only_series(path, tiff)
    if len(series.shape) != 2:
        raise SynmlopsError(
            f"{path}: is {series.shape}, not one section; name the file itself if it holds the volume"
        )
    return series


def _refuse_truncated(path: Path, tiff: tifffile.TiffFile) -> None:
    size = tiff.filehandle.size
    n_pages = len(tiff.pages)  # walks the chain of pages, which ends with a zero
    tiff.filehandle.seek(tiff.pages.next_page_offset or 0)
    link = tiff.filehandle.read(tiff.tiff.offsetsize)
    if any(link) or len(link) < tiff.tiff.offsetsize:
        raise SynmlopsError(f"{path}: is truncated after {n_pages} pages; copy or download it again")
    for number, page in enumerate(tiff.pages):
        ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
        if max(ends, default=0) > size:
            raise SynmlopsError(f"{path}: is truncated in page {number + 1}; copy or download it again")


def _refuse_cut_png(path: Path) -> None:
    """Walk the chunks to the last: the decoder takes a file without its end, checksum unread."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at, kind = 8, b""  # behind the signature
        while kind != b"IEND" and at < size:
            file.seek(at)
            header = file.read(8)
            at += 12 + int.from_bytes(header[:4])
            kind = header[4:]
    if kind != b"IEND" or at > size:
        raise SynmlopsError(f"{path}: is truncated; copy or download it again")


def _tiff_page(path: Path, series: Any, z: int) -> NDArray[Any]:
    try:
        return np.asarray(series.pages[z].asarray())
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
    with _pillow(path) as image:  # tifffile leaves LZW and some others to a further package
        image.seek(z)
        return np.asarray(image)


def _imagej_voxel_nm(tiff: tifffile.TiffFile) -> Nm | None:
    """Read ImageJ's voxel size, None where it is not given in full."""
    notes = tiff.imagej_metadata or {}
    unit = _UNIT_NM.get(str(notes.get("unit")))
    tags = tiff.pages.first.tags
    if unit is None or "spacing" not in notes or "XResolution" not in tags or "YResolution" not in tags:
        return None
    (nx, dx), (ny, dy) = tags["XResolution"].value, tags["YResolution"].value  # pixels per unit
    sizes = (float(notes["spacing"]) * unit, dy / ny * unit, dx / nx * unit) if nx and ny else (0.0, 0.0, 0.0)
    return sizes if min(sizes) > 0 else None


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """Open an image without Pillow's limit of pixels, which a section of EM may well pass."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _refuse_colour(path: Path, image: Image.Image) -> None:
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        raise SynmlopsError(f"{path}: is a colour image (mode {image.mode}); save it as grey values")


def _plain(dtype: Any) -> np.dtype[Any]:
    """Give the native dtype; booleans become uint8."""
    native = np.dtype(dtype).newbyteorder("=")
    return np.dtype(np.uint8) if native == np.bool_ else native


@contextmanager
def _plainly(path: Path) -> Iterator[None]:
    """Turn what decoders raise on damaged files into one SynmlopsError, and keep their log quiet."""
    log = logging.getLogger("tifffile")
    log.addFilter(_refuse_record)
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise SynmlopsError(f"{path}: {error.strerror}; check the path and its permissions") from error
        raise SynmlopsError(
            f"{path}: is truncated or damaged ({error}); copy or download it again"
        ) from error
    finally:
        log.removeFilter(_refuse_record)


def _refuse_record(_: logging.LogRecord) -> bool:
    return False
