"""`inspect` tells what a file holds and what is wrong with it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from rich.console import Console

from synmlops.volumes.inspect import VolumeReport, inspect_volume, inspect_volumes, render
from synmlops.volumes.store import Grid, write_hdf5
from synmlops.volumes.zarr import create_zarr

GRID = Grid((40, 8, 8), (0, 8, 0))


def _image(dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).normal(120, 30, (6, 40, 40)).clip(1, 254).astype(dtype)


def _pairs(dtype: Any = np.uint16) -> NDArray[Any]:
    """Give three sites far from each other, pre beside post."""
    label = np.zeros((6, 40, 40), dtype)
    for site, (y, x) in enumerate([(2, 2), (30, 4), (12, 30)], 1):
        label[2:4, y : y + 4, x : x + 2] = 2 * site - 1
        label[2:4, y : y + 4, x + 3 : x + 5] = 2 * site
    return label


def _report(path: Path, array: NDArray[Any], grid: Grid | None = GRID, **attrs: Any) -> VolumeReport:
    write_hdf5(path / "a.h5", {"main": array}, grid=grid, attrs=attrs)
    return inspect_volume(str(path / "a.h5"))


def _shown(report: VolumeReport) -> str:
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_an_image(tmp_path: Path) -> None:
    report = _report(tmp_path, _image())
    assert (report.role, report.shape, report.dtype, report.problems) == ("image", (6, 40, 40), "uint8", ())
    assert report.size_um == pytest.approx((0.24, 0.32, 0.32))
    assert sum(report.histogram) == 6 * 40 * 40
    assert len(report.histogram) == 16
    assert report.percentiles[2] == np.median(_image())
    text = _shown(report)
    for part in ("6 x 40 x 40 uint8", "40 x 8 x 8 nm", "█", "nothing wrong found"):
        assert part in text


def _as(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.where(_pairs() > 0, values, 0).astype(np.uint8)


_CELLS = np.arange(1, 10).repeat(8).reshape(1, 9, 8).repeat(3, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (_pairs(), "looks like pairs: 3 sites, ids up to 6, foreground 1.00%"),
        (_as(np.array(255)), "looks like union: 6 connected synapses, 1 values"),
        (_as(2 - _pairs() % 2), "looks like semantic: 48 voxels pre, 48"),
        (_CELLS, "looks like a segmentation"),
        (_as(_pairs() // 2 * 3 + 1), "looks like instances"),
        (_as((_pairs() * 5) % 7), "looks like instances"),  # ids 1 to 6, but 2n-1 not beside 2n
    ],
    ids=["pairs", "union", "semantic", "segmentation", "ids with gaps", "ids in another order"],
)
def test_a_label_is_guessed_and_called_a_guess(tmp_path: Path, label: NDArray[Any], words: str) -> None:
    report = _report(tmp_path, label)
    assert report.role == "label"
    assert report.label.startswith(words)
    assert report.label in _shown(report)


def test_a_stated_kind_is_no_guess(tmp_path: Path) -> None:
    report = _report(tmp_path, _pairs(), label_kind="pairs")
    assert report.label.startswith("pairs: 3 sites")


MOST = (np.arange(6 * 40 * 40).reshape(6, 40, 40) % 40 > 9).astype(np.uint8)
FEW = 1 - MOST


@pytest.mark.parametrize(
    ("name", "mask", "attrs", "words"),
    [
        ("a.h5", MOST, {}, "looks like one: 1 in 75.00% of the voxels, else 0"),
        ("a.h5", MOST.astype(np.uint32) * 255, {}, "looks like one: 255 in 75.00%"),
        ("tissue_mask.h5", FEW, {}, "1 in 25.00% of the voxels, else 0"),
        ("a.h5::mask", FEW, {"label_kind": "pairs"}, "1 in 25.00%"),  # which is said of another dataset
        ("a.h5::mask", np.ones((6, 40, 40), np.uint8), {"label_kind": "pairs"}, "1 in 100.00%"),
    ],
)
def test_a_mask_is_no_label(
    tmp_path: Path, name: str, mask: NDArray[Any], attrs: dict[str, Any], words: str
) -> None:
    file, _, dataset = name.partition("::")
    write_hdf5(tmp_path / file, {dataset or "main": mask}, grid=GRID, attrs=attrs)
    report = inspect_volume(f"{tmp_path}/{name}")
    assert (report.role, report.problems) == ("mask", ())
    assert report.label.startswith(words)
    assert re.search(rf"mask +{re.escape(words)}", _shown(report))


def test_what_is_no_mask(tmp_path: Path) -> None:
    assert _report(tmp_path, FEW).label.startswith("looks like union")
    assert _report(tmp_path, MOST, label_kind="union").label.startswith("union")
    assert _report(tmp_path, np.where(MOST > 0, _image(), 0).astype(np.uint8)).role == "image"
    write_hdf5(tmp_path / "mask.h5", {"main": np.zeros_like(MOST)}, grid=GRID)
    assert inspect_volume(f"{tmp_path}/mask.h5").problems == ("takes in nothing: every voxel is 0",)


def test_the_kind_of_the_label_is_not_that_of_the_neurons_beside_it(tmp_path: Path) -> None:
    parts = {"label": _pairs(), "neurons": np.ones((6, 40, 40), np.uint32) + (MOST > 0)}
    write_hdf5(tmp_path / "a.h5", parts, grid=GRID, attrs={"label_kind": "pairs"})
    label, neurons = inspect_volumes([f"{tmp_path}/a.h5"])
    assert label.label.startswith("pairs: 3 sites")
    assert neurons.label.startswith("looks like")


def test_how_it_was_made_is_shown(tmp_path: Path) -> None:
    report = _report(
        tmp_path, _pairs(), made_by="synmlops 0.1.0 import points", made_with='{"radius_nm": 60}'
    )
    assert "synmlops 0.1.0 import points: radius_nm 60" in _shown(report)
    assert "made by" not in _shown(_report(tmp_path, _pairs()))


def _lonely() -> NDArray[Any]:
    label = _pairs()
    label[label == 4] = 0
    return label


@pytest.mark.parametrize(
    ("array", "attrs", "problem"),
    [
        (_image(np.float32), {}, "float32 voxels"),
        (np.where(_image() > 200, np.nan, 1).astype(np.float32), {}, "are NaN or infinite"),
        (np.full((2, 4, 4), np.nan, np.float32), {}, "32 voxels are NaN or infinite"),
        (np.full((2, 4, 4), 5, np.uint8), {}, "every voxel is 5"),
        (np.where(np.arange(6)[:, None, None] == 3, 0, _image()).astype(np.uint8), {}, r"1 empty .*z = 3\)"),
        (np.where(_image() > 150, 255, _image()).astype(np.uint8), {}, "saturated at 255"),
        (_image(np.int16), {}, "int16: an image must be"),
        (_pairs(np.int32) - (_pairs(np.int32) == 0), {}, "values down to -1"),
        (_pairs(np.uint64) + np.uint64(2**31) * (_pairs() > 0), {}, "wrap in programs"),
        (np.zeros((2, 4, 4), np.uint32), {}, "no foreground"),
        (_lonely(), {"label_kind": "pairs"}, "1 of 3 sites have a pre but no post side"),
        (_pairs(), {"label_kind": "semantic"}, "says semantic but holds 6"),
        ((_pairs() % 2).astype(np.uint8), {"label_kind": "semantic"}, "without any post side"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, array: NDArray[Any], attrs: dict[str, Any], problem: str
) -> None:
    report = _report(tmp_path, array, **attrs)
    assert report.readable
    assert any(re.search(problem, p) for p in report.problems), report.problems
    assert report.problems[0] in _shown(report)


def test_a_missing_voxel_size_is_said(tmp_path: Path) -> None:
    report = _report(tmp_path, _image(), None)
    assert report.problems == ("no voxel size in the file: set data.voxel_nm in params.yaml",)


def test_probabilities_need_scale_and_channels(tmp_path: Path) -> None:
    report = _report(tmp_path, np.stack([_image()] * 3))
    assert report.role == "probabilities"
    assert len(report.problems) == 2
    report = _report(tmp_path, np.stack([_image()] * 3), scale=255, channels=["pre", "post", "union"])
    assert report.problems == ()


def test_several_files_and_datasets(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", {"image": _image(), "label": _pairs()}, grid=GRID)
    write_hdf5(tmp_path / "b.h5", {"main": _pairs()[:5]}, grid=GRID)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:5000])
    reports = inspect_volumes(
        [f"{tmp_path}/a.h5@{tmp_path}/b.h5", f"{tmp_path}/cut.h5", f"{tmp_path}/no.tif"]
    )
    assert [r.role for r in reports] == ["image", "label", "label", "unreadable", "unreadable"]
    assert reports[1].problems == ()
    assert reports[2].problems == ("no image given has this shape; they are (6, 40, 40)",)
    assert "is truncated" in reports[3].problems[0]
    assert "there is no such file" in _shown(reports[4])


def test_damage_found_while_reading_is_reported(tmp_path: Path) -> None:
    import h5py

    noise = np.random.default_rng(0).integers(0, 255, (16, 128, 128)).astype(np.uint8)
    write_hdf5(tmp_path / "a.h5", {"main": noise}, grid=GRID, compression="gzip")
    with h5py.File(tmp_path / "a.h5") as file:
        at = file["main"].id.get_chunk_info(0).byte_offset
    data = bytearray((tmp_path / "a.h5").read_bytes())
    data[at : at + 2000] = bytes(2000)
    (tmp_path / "a.h5").write_bytes(data)
    report = inspect_volume(str(tmp_path / "a.h5"))
    assert not report.readable
    assert "damaged" in report.problems[0]


def test_chunked_volumes(tmp_path: Path) -> None:
    writer = create_zarr(
        tmp_path / "p.zarr",
        (3, 6, 40, 40),
        np.uint8,
        shard=(3, 6, 40, 40),
        chunk=(1, 6, 20, 20),
        grid=GRID,
        channels=["pre", "post", "union"],
    )
    writer.write((slice(None),) * 4, np.stack([_image()] * 3))
    zarr.create_array(tmp_path / "label", data=_pairs(), attributes={"label_kind": "pairs"})
    probabilities, label, wrong = inspect_volumes(
        [f"{tmp_path}/{name}" for name in ("p.zarr", "label", "p.zarr::7")]
    )
    assert (probabilities.role, probabilities.grid, probabilities.problems) == ("probabilities", GRID, ())
    assert label.label.startswith("pairs: 3 sites")
    assert "has no scale level 7" in wrong.problems[0]
    shard = tmp_path / "p.zarr/0/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "is truncated or damaged" in inspect_volume(f"{tmp_path}/p.zarr").problems[0]
