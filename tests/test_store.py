"""Volumes are read by region from every format, and a bad file is one message that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from volume_tools import aged, seen_elsewhere

from synmlops.params import SynmlopsError
from synmlops.volumes.store import Grid, hdf5_writer, open_volume, split_joined, write_hdf5

REGION = (slice(1, 4), slice(3, 9), slice(None, 7))


@pytest.fixture
def image() -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 60_000, (5, 12, 14)).astype(np.uint16)


def _h5(path: Path, image: NDArray[Any]) -> Path:
    write_hdf5(path / "a.h5", {"main": image}, grid=Grid((40, 8, 8), (1, 2, 3)))
    return path / "a.h5"


def _h5_chunked(path: Path, image: NDArray[Any]) -> Path:
    write_hdf5(path / "a.h5", {"raw": image}, grid=None, compression="gzip")
    return path / "a.h5"


def _h5_big_endian(path: Path, image: NDArray[Any]) -> Path:
    write_hdf5(path / "a.h5", {"main": image.astype(">u2")}, grid=None)
    return path / "a.h5"


def _tiff(**options: Any) -> Callable[[Path, NDArray[Any]], Path]:
    def write(path: Path, image: NDArray[Any]) -> Path:
        tifffile.imwrite(path / "a.tif", image, photometric="minisblack", **options)
        return path / "a.tif"

    return write


def _tiff_lzw(path: Path, image: NDArray[Any]) -> Path:
    pages = [Image.fromarray(section) for section in image]
    pages[0].save(path / "a.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    return path / "a.tif"


def _folder(suffix: str) -> Callable[[Path, NDArray[Any]], Path]:
    def write(path: Path, image: NDArray[Any]) -> Path:
        for z, section in enumerate(image):
            Image.fromarray(section).save(path / f"s{z + 8}{suffix}")  # s8, s9, s10: natural order
        (path / ".DS_Store").write_text("")
        (path / "notes.txt").write_text("")
        return path

    return write


FOLDERS = (_png_sections, _tiff_sections) = (_folder(".png"), _folder(".TIF"))
FORMATS = {
    "hdf5": _h5,
    "hdf5 chunked, one dataset": _h5_chunked,
    "hdf5 big-endian": _h5_big_endian,
    "tiff": _tiff(),
    "tiff deflate": _tiff(compression="zlib"),
    "tiff big-endian": _tiff(byteorder=">"),
    "tiff bigtiff without metadata": _tiff(bigtiff=True, metadata=None),
    "tiff tiled": _tiff(tile=(16, 16)),
    "tiff imagej": _tiff(imagej=True),
    "tiff lzw": _tiff_lzw,
    "png sections": _png_sections,
    "tiff sections": _tiff_sections,
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_region_asked_for(
    tmp_path: Path, image: NDArray[np.uint16], write: Callable[[Path, NDArray[Any]], Path]
) -> None:
    with open_volume(write(tmp_path, image)) as volume:
        assert volume.shape == image.shape
        assert volume.dtype == np.uint16
        np.testing.assert_array_equal(volume[REGION], image[REGION])
        np.testing.assert_array_equal(volume[2:3], image[2:3])
        np.testing.assert_array_equal(volume.read(), image)
        assert volume[2:2].shape == (0, 12, 14)
        mapped = volume.memmap()
        if mapped is not None:
            np.testing.assert_array_equal(mapped[REGION], image[REGION])


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_another_volume_in_its_place_has_another_identity(
    tmp_path: Path, image: NDArray[np.uint16], write: Callable[[Path, NDArray[Any]], Path]
) -> None:
    def identity(*, of: NDArray[np.uint16] | None = None, later: float = 0) -> dict[str, Any]:
        if of is not None:
            write(tmp_path, of)
            aged(tmp_path, later)
        with open_volume(tmp_path if write in FOLDERS else next(tmp_path.glob("a.*"))) as volume:
            return volume.identity()

    before = identity(of=image)
    assert json.loads(json.dumps(before)) == before
    assert before["source"].startswith(str(tmp_path))
    seen_elsewhere(tmp_path)
    assert identity() == before
    assert identity(of=image, later=0.5) == before
    assert identity(of=image, later=60) != before
    assert identity(of=image ^ 1) != before


@pytest.mark.parametrize(
    ("write", "mappable"), [(_h5, True), (_h5_chunked, False), (_tiff(), True), (_folder(".png"), False)]
)
def test_only_plain_files_can_be_mapped(
    tmp_path: Path, image: NDArray[np.uint16], write: Callable[..., Path], mappable: bool
) -> None:
    with open_volume(write(tmp_path, image)) as volume:
        assert (volume.memmap() is not None) == mappable


def test_slabs_cover_the_volume_once(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    with open_volume(_h5(tmp_path, image)) as volume:
        section = image[0].nbytes
        assert [(z, len(slab)) for z, slab in volume.slabs(2 * section)] == [(0, 2), (2, 2), (4, 1)]
        assert [z for z, _ in volume.slabs(1, multiple=3)] == [0, 3]
        np.testing.assert_array_equal(np.concatenate([s for _, s in volume.slabs(1)]), image)


def test_the_grid_comes_from_dataset_or_root(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    with open_volume(_h5(tmp_path, image)) as volume:
        assert volume.grid == Grid((40, 8, 8), (1, 2, 3))
    for on_root in (True, False):
        with h5py.File(tmp_path / "b.h5", "w") as file:
            data = file.create_dataset("main", data=image)
            (file if on_root else data).attrs["resolution"] = (50, 4, 4)
        with open_volume(tmp_path / "b.h5") as volume:
            assert volume.grid == Grid((50.0, 4.0, 4.0))
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        del file["main"].attrs["resolution"]
    with open_volume(tmp_path / "b.h5") as volume:
        assert volume.grid is None


def test_imagej_says_its_voxel_size(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    notes = {"spacing": 0.04, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, resolution=(125, 250), metadata=notes)
    with open_volume(tmp_path / "a.tif") as volume:
        assert volume.grid is not None
        assert volume.grid.voxel_nm == pytest.approx((40, 4, 8))


def test_four_axes_and_attributes(tmp_path: Path) -> None:
    write_hdf5(
        tmp_path / "p.h5",
        {"probabilities": np.zeros((3, 4, 5, 6), np.uint8)},
        grid=Grid((1, 1, 1)),
        attrs={"scale": 255, "channels": ["pre", "post", "union"]},
    )
    with open_volume(tmp_path / "p.h5", ndim=4) as volume:
        assert volume.attrs["channels"] == ["pre", "post", "union"]
        assert volume.attrs["scale"] == 255
        assert [z for z, _ in volume.slabs(1)] == [0, 1, 2, 3]
    with pytest.raises(SynmlopsError, match=r"has 4 axes.*axes z, y, x"):
        open_volume(tmp_path / "p.h5")


def test_booleans_are_read_as_numbers(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", {"main": np.ones((1, 2, 2), bool)}, grid=None)
    with open_volume(tmp_path / "a.h5") as volume:
        assert volume.read().dtype == volume.dtype == np.uint8


def test_a_file_is_written_by_block_and_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.h5"
    with hdf5_writer(target, {"main": ((4, 2, 2), np.uint8)}, grid=None) as made:
        for z in range(4):
            made["main"][z] = z
        assert not target.exists()
    with open_volume(target) as volume:
        assert volume.read()[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    target = _h5(tmp_path, image)
    with (
        pytest.raises(ZeroDivisionError),
        hdf5_writer(target, {"main": ((1, 1, 1), np.uint8)}, grid=None),
    ):
        raise ZeroDivisionError
    with open_volume(target) as volume:
        assert volume.shape == image.shape
    assert list(tmp_path.iterdir()) == [target]


def _bad_files(path: Path) -> dict[str, tuple[str, str]]:
    """Make one bad input of each sort; give what to open and what the message must say."""
    image = np.random.default_rng(0).integers(0, 255, (4, 40, 50)).astype(np.uint8)
    whole = path / "whole.h5"
    write_hdf5(whole, {"main": image, "other/labels": image[:2]}, grid=None)
    data = whole.read_bytes()
    (path / "cut.h5").write_bytes(data[: len(data) // 2])
    (path / "stub.h5").write_bytes(data[:20])
    (path / "empty.h5").write_bytes(b"")
    (path / "text.h5").write_text("not HDF5 at all, whatever its name says")
    (path / "a.nrrd").write_text("NRRD0004")
    with h5py.File(path / "several.h5", "w") as file:
        file["volumes/raw"], file["volumes/labels"] = image, image.astype(np.uint32)
    h5py.File(path / "none.h5", "w").close()
    for name, value in {
        "words.h5": np.full((2, 2, 2), b"ab"),
        "flat.h5": image[0],
        "void.h5": image[:0],
    }.items():
        with h5py.File(path / name, "w") as file:
            file["main"] = value
    for name, resolution in {"res2.h5": (4, 4), "res0.h5": (0, 4, 4), "restext.h5": "4 nm"}.items():
        with h5py.File(path / name, "w") as file:
            file["main"] = image
            file["main"].attrs["resolution"] = resolution
    tifffile.imwrite(path / "whole.tif", image, photometric="minisblack")
    tif = (path / "whole.tif").read_bytes()
    (path / "cut.tif").write_bytes(tif[: len(tif) // 2])
    (path / "stub.tif").write_bytes(tif[:3])
    with tifffile.TiffWriter(path / "pages.tif") as writer:
        for section in image:
            writer.write(section, contiguous=False, metadata=None)
    with tifffile.TiffFile(path / "pages.tif") as tiff:
        third = tiff.pages[2].offset  # pages follow each other: the first two are whole
    (path / "fewer.tif").write_bytes((path / "pages.tif").read_bytes()[:third])
    tifffile.imwrite(path / "zipped.tif", image, photometric="minisblack", compression="zlib")
    (path / "cutzip.tif").write_bytes((path / "zipped.tif").read_bytes()[:-900])
    tifffile.imwrite(path / "colour.tif", np.zeros((40, 50, 3), np.uint8))
    tifffile.imwrite(path / "one.tif", image[0])
    with tifffile.TiffWriter(path / "ragged.tif") as writer:
        writer.write(image[0])
        writer.write(image[1, :20])
    for name in ("hollow", "ragged", "mixed", "cutpng", "rgb", "cuttif"):
        (path / name).mkdir()
    for folder, name, section in [
        ("ragged", "0.png", image[0]),
        ("ragged", "1.png", image[1, :20]),
        ("mixed", "0.png", image[0]),
        ("mixed", "1.tif", image[1]),
        ("cutpng", "0.png", image[0]),
        ("rgb", "0.png", np.zeros((4, 4, 3), np.uint8)),
        ("cuttif", "0.tif", image[0]),
    ]:
        Image.fromarray(section).save(path / folder / name)
    for name in ("cutpng/0.png", "cuttif/0.tif"):
        (path / name).write_bytes((path / name).read_bytes()[:-500])
    return {
        "missing": ("nowhere.h5", "nowhere.h5: there is no such file"),
        "truncated": ("cut.h5", r"cut.h5: is truncated, \d+ of \d+ bytes"),
        "cut in the header": ("stub.h5", "stub.h5: is no HDF5 file or is damaged"),
        "empty": ("empty.h5", r"is empty \(0 bytes\)"),
        "not HDF5": ("text.h5", "is no HDF5 file"),
        "unknown format": ("a.nrrd", "unknown format; give HDF5"),
        "several datasets": ("several.h5", r"2 datasets .*volumes/raw \(4, 40, 50\) uint8.*name one: "),
        "no dataset": ("none.h5", "holds no dataset"),
        "wrong dataset": ("whole.h5::raw", r"has no dataset raw; it holds main \(4, 40, 50\) uint8, other"),
        "a group": ("whole.h5::other", "has no dataset other"),
        "text": ("words.h5", "not numbers"),
        "two axes": ("flat.h5", r"main: has 2 axes, shape \(40, 50\); give a volume with axes z, y, x"),
        "no voxels": ("void.h5", "has no voxels"),
        "two sizes": ("res2.h5", r"attribute resolution is \[4, 4\]; it must be three numbers"),
        "a size of zero": ("res0.h5", "must be positive"),
        "a size in words": ("restext.h5", "must be three numbers"),
        "truncated TIFF": ("cut.tif", "cut.tif: is truncated"),
        "TIFF cut between pages": ("fewer.tif", "fewer.tif: is truncated after 2 pages"),
        "cut in the TIFF header": ("stub.tif", "stub.tif: is truncated or damaged"),
        "truncated compressed TIFF": ("cutzip.tif", "is truncated in page 4"),
        "colour": ("colour.tif", "is a colour image"),
        "one section": ("one.tif", "has 2 axes"),
        "pages that differ": ("ragged.tif", "its pages differ"),
        "dataset of a TIFF": ("whole.tif::main", "only HDF5, Zarr and N5 have datasets"),
        "folder without sections": ("hollow", "holds no TIFF or PNG section"),
        "sections that differ": ("ragged", r"1.png: is \(20, 50\) uint8, but 0.png is \(40, 50\) uint8"),
        "both kinds of sections": ("mixed", "holds both TIFF and PNG"),
        "truncated PNG": ("cutpng", "0.png: is truncated"),
        "truncated section TIFF": ("cuttif", "0.tif: is truncated"),
        "colour PNG": ("rgb", "is a colour image"),
    }


def test_each_bad_file_is_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (source, message) in _bad_files(tmp_path).items():
        with pytest.raises(SynmlopsError, match=message):  # noqa: SIM117
            with open_volume(f"{tmp_path}/{source}") as volume:
                volume.read()
        assert "\n" not in message, name
    assert capfd.readouterr().err == ""  # libraries add no lines of their own


def test_a_png_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    """Also where only the checksum is cut off, which the decoder lets pass."""
    label = np.zeros((64, 64), bool)
    label[3:5, 3:9] = True
    path = tmp_path / "0.png"
    Image.fromarray(label).save(path)
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SynmlopsError, match=r"0\.png: is truncated"):  # noqa: SIM117
            with open_volume(tmp_path) as volume:
                volume.read()


def test_voxels_that_end_early_are_named(tmp_path: Path) -> None:
    """The header is whole, but the data of an external file ends before its last voxel."""
    raw = tmp_path / "voxels.raw"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("main", (4, 32, 32), np.uint8, external=[(str(raw), 0, 4096)])
        file["main"][...] = 1
    raw.unlink()
    with open_volume(tmp_path / "a.h5") as volume:
        with pytest.raises(SynmlopsError, match=r"a\.h5"):
            volume.read()
        assert volume.memmap() is None


def test_damaged_chunks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    noise = np.random.default_rng(0).integers(0, 255, (16, 128, 128)).astype(np.uint8)
    write_hdf5(path, {"main": noise}, grid=None, compression="gzip")
    with h5py.File(path) as file:
        at = file["main"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[at : at + 2000] = bytes(2000)
    path.write_bytes(data)
    with open_volume(path) as volume, pytest.raises(SynmlopsError, match=r"a\.h5: .*damaged"):
        volume.read()


def test_paths_between_at_signs() -> None:
    assert split_joined(["a.h5@b.h5", "c.tif"]) == ["a.h5", "b.h5", "c.tif"]
    with pytest.raises(SynmlopsError, match="empty path"):
        split_joined("a.h5@")


@pytest.mark.parametrize("region", [(0,), (slice(0, 4, 2),), (slice(None),) * 4])
def test_a_region_is_made_of_slices(tmp_path: Path, image: NDArray[np.uint16], region: Any) -> None:
    with open_volume(_h5(tmp_path, image)) as volume, pytest.raises(ValueError, match="slices"):
        volume[region]
