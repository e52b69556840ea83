"""The public Drosophila VNC data set, from its folder layout into HDF5 volumes.

Source: Gerhard, Funke, Martel, Cardona, Fetter (2013), "Segmented anisotropic ssTEM dataset of neural
tissue", figshare, doi 10.6084/m9.figshare.856713; CC BY-NC-SA 3.0 Unported.
"""

import hashlib
import re
import tarfile
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import plain_write_errors, sha256_of
from synmlops.volumes.importers.download import download
from synmlops.volumes.importers.survey import Survey, draw_synapses
from synmlops.volumes.prepared import SIDE_UNKNOWN
from synmlops.volumes.sections import read_section, section_files
from synmlops.volumes.sites import MIDDLE, find_sites
from synmlops.volumes.store import Grid, hdf5_writer

VOXEL_NM = (50.0, 4.6, 4.6)
"""Voxel size, z y x; the data set gives 45 to 50 nm between sections."""

_STACKS = ("stack1", "stack2")
_WANTED = re.compile(r"(^|/)stack[12]/(raw|synapses)/[^/]+\.(tif|tiff|png)$", re.IGNORECASE)
_BROKEN_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,  # encrypted zip; unknown compression
)
_ARCHIVE_SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class StackSummary:
    """What was written of one stack."""

    name: str
    image: Path
    label: Path | None  # None where the data set has no synapses marked
    shape_zyx: tuple[int, int, int]
    foreground_share: float  # of the voxels; 0 without a label
    synapses: int  # 26-connected components
    per_band: tuple[int, ...]  # the same by band of y, each counted where its centre of mass lies


@dataclass(frozen=True)
class VncSummary:
    """What an import wrote."""

    stacks: tuple[StackSummary, ...]
    archive: Path | None  # the downloaded or given archive
    sha256: str | None  # its digest


@dataclass(frozen=True)
class _Stack:
    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8] | None


def import_vnc(
    source: str | Path,
    dest: Path,
    *,
    sha256: str | None = None,
    bands: int = 4,
    show_progress: bool = True,
) -> VncSummary:
    """Turn the VNC data set into DEST/stackN_image.h5 and DEST/stackN_label.h5.

    Parameters
    ----------
    source : str or Path
        A folder with `stack1/raw/NN.tif` and `stack1/synapses/NN.png` (itself or one folder down), an
        archive of it (zip or tar), or the http(s) address of such an archive.
    dest : Path
        A folder; made if missing. A downloaded archive is kept beside it.
    sha256 : str, optional
        What the archive must have.
    bands : int
        Bands of y by which the synapses are counted.
    show_progress : bool
        Draw a bar while downloading.

    Returns
    -------
    VncSummary
        Images are uint8; labels are uint8 0 and 1 of kind `union`: any value above 0 was synapse.

    Raises
    ------
    SynmlopsError
        If the source cannot be had or read, a section is missing, or image and synapses do not fit.
        Nothing is written then.
    """
    archive = _archive_of(str(source), dest, sha256=sha256, show_progress=show_progress)
    stacks = _stacks_in(source, archive, beside=dest)
    summaries = _write_stacks(stacks, dest, bands)
    return VncSummary(summaries, archive, None if archive is None else sha256_of(archive))


def survey_vnc(
    source: str | Path, picture: Path | None, *, sha256: str | None = None, show_progress: bool = True
) -> Survey:
    """Say what an import would read, and draw a few synapses to `picture`; nothing else is written.

    An archive at an address is downloaded into a temporary place for it.

    Raises
    ------
    SynmlopsError
        As `import_vnc`.
    """
    with tempfile.TemporaryDirectory(prefix="synmlops-") as scratch:
        beside = Path(scratch) / "vnc"
        archive = _archive_of(str(source), beside, sha256=sha256, show_progress=show_progress)
        stacks = _stacks_in(source, archive, beside=beside)
        rows = [("voxels", f"{' x '.join(f'{n:g}' for n in VOXEL_NM)} nm, z y x; no offset")]
        rows += [] if archive is None else [("archive", f"sha256 {sha256_of(archive)}")]
    for stack in stacks:
        rows += _told(stack)
    marked = [stack for stack in stacks if stack.label is not None and stack.label.any()]
    if picture is not None and marked:
        _draw(marked[0], picture)
    return Survey(str(source), tuple(rows), tuple(_oddities(stacks)))


def _told(stack: _Stack) -> Iterator[tuple[str, str]]:
    yield f"{stack.name} image", f"{' x '.join(map(str, stack.image.shape))} voxels, {stack.image.dtype}"
    if stack.label is None:
        yield f"{stack.name} label", "none was published"
        return
    n = int(cc3d.connected_components(stack.label, connectivity=26, return_N=True)[1])
    yield (
        f"{stack.name} label",
        f"union: {n} synapses, {stack.label.mean():.2%} of the voxels; sides not known",
    )


def _oddities(stacks: list[_Stack]) -> Iterator[str]:
    if [stack.name for stack in stacks] != list(_STACKS):
        here = ", ".join(stack.name for stack in stacks)
        yield f"the data set has {' and '.join(_STACKS)}, here is {here} alone"
    for stack in stacks:
        if stack.label is not None and not stack.label.any():
            yield f"{stack.name}: no synapse is marked in its sections"
        flat = np.flatnonzero(np.ptp(stack.image, axis=(1, 2)) == 0)
        if len(flat):
            grey = stack.image[flat[0], 0, 0]
            yield f"{stack.name}: section {flat[0]} is {grey} everywhere ({len(flat)} such)"


def _draw(stack: _Stack, picture: Path) -> None:
    label = stack.label
    assert label is not None
    middles = find_sites(lambda: [(0, label)], "union", voxel_nm=VOXEL_NM)[:, MIDDLE]
    none = np.full(middles.shape, np.nan)
    draw_synapses(
        picture,
        image=stack.image,
        sides=lambda box: label[box] * np.uint8(SIDE_UNKNOWN),
        points_zyx=np.stack([middles.astype(float), none], axis=1),
        voxel_nm=VOXEL_NM,
        titles=[f"{stack.name}, z y x = {' '.join(map(str, at))}" for at in middles.tolist()],
    )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the raw and synapse sections of an archive, and nothing that would leave the folder.

    Raises
    ------
    SynmlopsError
        If the file is no whole zip or tar archive, or a member's path leads out of the folder.
    """
    try:
        with plain_write_errors(folder, folder):
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as packed:
                    names = _wanted(archive, packed.namelist())
                    packed.extractall(folder, names)
            else:
                with tarfile.open(archive) as packed_tar:
                    wanted = set(_wanted(archive, packed_tar.getnames()))
                    members = [m for m in packed_tar.getmembers() if m.name in wanted and m.isfile()]
                    packed_tar.extractall(folder, members, filter="data")
    except _BROKEN_ARCHIVE as error:
        raise SynmlopsError(
            f"{archive}: is truncated or no zip or tar archive ({error}); remove it and run again"
        ) from error


def _wanted(archive: Path, names: list[str]) -> list[str]:
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise SynmlopsError(
                f"{archive}: its member {name!r} leads out of the folder; this is not the VNC archive"
            )
    return [name for name in names if _WANTED.search(name)]


def _archive_of(source: str, dest: Path, *, sha256: str | None, show_progress: bool) -> Path | None:
    """Give the archive to unpack, downloaded if SOURCE is an address; None if SOURCE is a folder."""
    if "://" in source:
        path = PurePosixPath(urllib.parse.urlsplit(source).path)
        suffix = next((s for s in _ARCHIVE_SUFFIXES if path.name.lower().endswith(s)), ".archive")
        key = hashlib.sha256(source.encode()).hexdigest()[:8]  # another address is another file
        archive = dest.with_name(f"{dest.name}-{key}{suffix}")
        download(source, archive, sha256=sha256, show_progress=show_progress)
        return archive
    path_here = Path(source)
    if path_here.is_dir():
        if sha256 is not None:
            raise SynmlopsError(f"{source}: is a folder, a checksum is for an archive; leave it out")
        return None
    if not path_here.exists():
        raise SynmlopsError(f"{source}: there is no such folder or archive; check the path")
    found = sha256_of(path_here)
    if sha256 is not None and found != sha256.lower().strip():
        raise SynmlopsError(f"{source}: has SHA-256 {found}, not {sha256}; get the archive again")
    return path_here


def _stacks_in(source: str | Path, archive: Path | None, *, beside: Path) -> list[_Stack]:
    """Read the stacks of a folder, or of an archive that is unpacked for it into a temporary folder."""
    if archive is None:
        return _read_stacks(Path(source))
    with ExitStack() as cleanup:
        with plain_write_errors(beside, beside.parent):
            beside.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent)
        folder = cleanup.enter_context(temporary)
        unpack(archive, Path(folder))
        return _read_stacks(Path(folder), shown_as=str(source))


def _read_stacks(source: Path, *, shown_as: str | None = None) -> list[_Stack]:
    """Read every stack there is, so that nothing is written if one of them is faulty."""
    root = _find_root(source)
    if root is None:
        raise SynmlopsError(
            f"{shown_as or source}: holds no stack1/raw, itself or one folder down; "
            "give the folder that holds stack1"
        )
    return [_read_stack(root / name) for name in _STACKS if (root / name / "raw").is_dir()]


def _find_root(source: Path) -> Path | None:
    try:
        below = sorted(p for p in source.iterdir() if p.is_dir())
    except OSError as error:
        raise SynmlopsError(f"{source}: {error.strerror}; change its permissions") from error
    return next((p for p in (source, *below) if (p / "stack1" / "raw").is_dir()), None)


def _read_stack(folder: Path) -> _Stack:
    raw = _numbered(folder / "raw")
    image = _read_sections(raw, None)
    if image.dtype != np.uint8:
        raise SynmlopsError(f"{folder / 'raw'}: its sections are {image.dtype}, the data set has uint8")
    if not (folder / "synapses").is_dir():
        if folder.name == "stack1":  # stack2 was published without labels
            raise SynmlopsError(f"{folder / 'synapses'}: is missing; get the data set again")
        return _Stack(folder.name, image, None)
    marked = _numbered(folder / "synapses")
    for ours, theirs, at in ((raw, marked, "synapses"), (marked, raw, "raw")):
        alone = sorted(ours.keys() - theirs.keys())
        if alone:
            raise SynmlopsError(
                f"{folder / at}: has no section {', '.join(map(str, alone[:5]))}, which {ours[alone[0]]} "
                "belongs to; get the data set again"
            )
    synapses = _read_sections(marked, image.shape[1:])
    return _Stack(folder.name, image, (synapses > 0).astype(np.uint8))


def _numbered(folder: Path) -> dict[int, Path]:
    """Give the sections of a folder by the number in their names, which must leave no gap."""
    files: dict[int, Path] = {}
    for path in section_files(folder):
        digits = re.findall(r"\d+", path.stem)
        if not digits or int(digits[-1]) in files:
            raise SynmlopsError(f"{path}: its name gives no section number of its own; names are like 00.tif")
        files[int(digits[-1])] = path
    missing = sorted(set(range(min(files), max(files) + 1)) - files.keys())
    if missing:
        raise SynmlopsError(
            f"{folder}: section {', '.join(map(str, missing[:5]))} is missing; get the data set again"
        )
    return dict(sorted(files.items()))


def _read_sections(files: dict[int, Path], shape_yx: tuple[int, ...] | None) -> NDArray[Any]:
    sections = []
    for path in files.values():
        section = read_section(path)
        shape_yx = shape_yx or section.shape
        if section.shape != shape_yx:
            raise SynmlopsError(
                f"{path}: is {section.shape}, the other sections are {shape_yx}; get the data set again"
            )
        sections.append(section)
    return np.stack(sections)


def _write_stacks(stacks: list[_Stack], dest: Path, bands: int) -> tuple[StackSummary, ...]:
    """Write all files under temporary names first, so that they appear together or not at all."""
    grid = Grid(VOXEL_NM)
    summaries = []
    with ExitStack() as files:
        for stack in stacks:
            image, label = dest / f"{stack.name}_image.h5", None
            form = {"main": (stack.image.shape, np.uint8)}
            files.enter_context(hdf5_writer(image, form, grid=grid))["main"][...] = stack.image
            if stack.label is not None:
                label = dest / f"{stack.name}_label.h5"
                writer = hdf5_writer(label, form, grid=grid, attrs={"label_kind": "union"})
                files.enter_context(writer)["main"][...] = stack.label
            summaries.append(_summary(stack, image, label, bands))
    return tuple(summaries)


def _summary(stack: _Stack, image: Path, label: Path | None, bands: int) -> StackSummary:
    depth, height, width = stack.image.shape
    n, share, per_band = 0, 0.0, (0,) * bands
    if stack.label is not None:
        found, n = cc3d.connected_components(stack.label, connectivity=26, return_N=True)
        centres_y = cc3d.statistics(found)["centroids"][1 : n + 1, 1]
        edges = np.linspace(0, height, bands + 1)
        per_band = tuple(int(k) for k in np.histogram(centres_y, edges)[0])
        share = float(stack.label.mean())
    return StackSummary(
        name=stack.name,
        image=image,
        label=label,
        shape_zyx=(depth, height, width),
        foreground_share=share,
        synapses=int(n),
        per_band=per_band,
    )
