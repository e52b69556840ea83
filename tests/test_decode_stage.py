"""The decode command: files that other tools read, a threshold that says where it is from, plain refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from volume_tools import aged, files_of

from synmlops.blockwise.grid import Block
from synmlops.cli import main
from synmlops.params import EvaluateParams, SynmlopsError
from synmlops.stages import decode
from synmlops.synapses import decoding
from synmlops.synapses.blocks import Source, Summary, Task, label_block
from synmlops.synapses.instances import decode_pairs, decode_union
from synmlops.synapses.partners import partners_of
from synmlops.volumes.prepared import Box
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.table import edges_of, moved_voxels, read_table
from synmlops.volumes.zarr import create_zarr

GRID = Grid((40.0, 8.0, 8.0), (80.0, 0.0, 16.0))
SHAPE = (8, 40, 48)
PARAMS = EvaluateParams(min_voxels=20, side_threshold=0.5, min_side_voxels=3, split="none")


def made_up(seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((3, *SHAPE)), (0, 1, 2, 2))
    return (127 + 50 * ((smooth - smooth.mean()) / smooth.std() - 0.8)).clip(0, 255).astype(np.uint8)


def written(path: Path, values: NDArray[np.uint8], *channels: str) -> Path:
    with probabilities_writer(path, SHAPE, channels=channels or ("pre", "post", "union"), grid=GRID) as data:
        data[...] = values
    return path


def neurons_file(path: Path, shape: tuple[int, int, int] = SHAPE) -> Path:
    ids = np.add.outer(np.arange(shape[1]) // 9 * 6, np.arange(shape[2]) // 8).astype(np.uint64) + 1
    write_hdf5(path, {"main": np.broadcast_to(ids, shape).copy()}, grid=GRID)
    return path


def expected(
    values: NDArray[np.uint8], neurons: NDArray[Any] | None, start_zyx: tuple[int, int, int] = (0, 0, 0)
) -> tuple[NDArray[Any], pd.DataFrame]:
    ids = decode_pairs(values, threshold=0.5, side_threshold=0.5, min_voxels=20)
    table = partners_of(
        ids,
        voxel_nm=GRID.voxel_nm,
        offset_nm=GRID.cropped(start_zyx).offset_nm,
        probabilities_czyx=values,
        neurons=neurons,
        min_side_voxels=3,
    )
    return ids, table


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_files_hold_what_the_whole_volume_gives(tmp_path: Path, suffix: str) -> None:
    values = made_up()
    source, neurons = written(tmp_path / "p.h5", values), neurons_file(tmp_path / "n.h5")
    for _ in range(2):  # a second time over the first
        outcome = decode.run(
            source,
            out=tmp_path / "out",
            params=PARAMS,
            threshold=0.5,
            neurons=str(neurons),
            block_zyx=(4, 16, 32),
            suffix=suffix,
        )
    with open_volume(neurons) as volume:
        ids, table = expected(values, volume.read())
    assert len(table) > 5
    with open_volume(tmp_path / "out" / f"instances{suffix}") as volume:
        assert (volume.grid, volume.attrs["label_kind"]) == (GRID, "pairs")
        np.testing.assert_array_equal(volume.read(), ids)
    pd.testing.assert_frame_equal(read_table(tmp_path / "out" / "partners.parquet"), table)
    assert len(pd.read_csv(tmp_path / "out" / "partners.csv")) == len(table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "edges.parquet"), edges_of(table))
    assert outcome.summary == f"{outcome.n_sites} sites, {len(table)} partners, {outcome.n_edges} edges"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["edges.csv", "edges.parquet", f"instances{suffix}", "partners.csv", "partners.parquet"]
    )


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_a_region_lies_where_it_does_in_the_volume(tmp_path: Path, suffix: str) -> None:
    values, roi = made_up(), Box((2, 8, 11), (8, 40, 44))
    neurons = neurons_file(tmp_path / "n.h5")
    decode.run(
        written(tmp_path / "p.h5", values),
        out=tmp_path / "out",
        params=PARAMS,
        threshold=0.5,
        neurons=str(neurons),
        roi=roi,
        block_zyx=(4, 16, 32),
        suffix=suffix,
    )
    with open_volume(neurons) as volume:
        ids, table = expected(values[(slice(None), *roi.slices)], volume.read()[roi.slices], roi.start_zyx)
    assert len(table) > 5
    with open_volume(tmp_path / "out" / f"instances{suffix}") as volume:
        assert volume.grid == GRID.cropped(roi.start_zyx)
        np.testing.assert_array_equal(volume.read(), ids)
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "out" / "partners.parquet"), moved_voxels(table, roi.start_zyx)
    )


def test_regions_with_a_margin_give_the_table_of_the_whole(tmp_path: Path) -> None:
    """Rows are kept by where their pre end lies; no site is larger than the margin."""
    values = made_up()
    values[..., 12:16] = values[..., 32:36] = 0  # so that what lies at 24 ends within 10
    source = written(tmp_path / "p.h5", values)
    _, whole = expected(values, None)
    assert ((whole.x0 < 24) & (whole.x1 > 24)).any()
    kept = []
    for number, (low, high, start, stop) in enumerate([(0, 24, 0, 34), (24, 48, 14, 48)]):
        out = tmp_path / f"out{number}"
        roi = Box((0, 0, start), (*SHAPE[:2], stop))
        decode.run(source, out=out, params=PARAMS, threshold=0.5, roi=roi)
        table = read_table(out / "partners.parquet")
        kept.append(table[(table.pre_x >= low) & (table.pre_x < high)])
    columns = [name for name in whole.columns if name not in ("site", "partner")]
    joined = pd.concat(kept)[columns].sort_values(columns, ignore_index=True)
    pd.testing.assert_frame_equal(joined, whole[columns].sort_values(columns, ignore_index=True))


def test_a_region_beyond_the_volume_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "p.h5", made_up())
    with pytest.raises(SynmlopsError, match=r"--roi ends at \(8, 40, 49\), beyond"):
        decode.run(
            source, out=tmp_path / "out", params=PARAMS, threshold=0.5, roi=Box((0, 0, 0), (8, 40, 49))
        )


def test_two_processes_write_zarr(tmp_path: Path) -> None:
    values = made_up(1)
    decode.run(
        written(tmp_path / "p.h5", values),
        out=tmp_path / "out",
        params=PARAMS,
        threshold=0.5,
        block_zyx=(4, 32, 32),
        processes=2,
    )
    ids, table = expected(values, None)
    with open_volume(tmp_path / "out" / "instances.zarr") as volume:
        np.testing.assert_array_equal(volume.read(), ids)
    pd.testing.assert_frame_equal(read_table(tmp_path / "out" / "partners.parquet"), table)


def test_an_interrupted_decoding_mixes_in_nothing_of_a_zarr_that_was_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = (_zarr(tmp_path / f"{name}.zarr", made_up(seed)) for seed, name in enumerate("pq"))
    aged(other, 60)
    how: dict[str, Any] = {"params": PARAMS, "threshold": 0.5, "block_zyx": (4, 16, 32)}
    n_read = []

    def label(task: Task, block: Block, probabilities: Source) -> Summary:
        n_read.append(block.index)
        if len(n_read) == 5:
            raise KeyboardInterrupt
        return label_block(task, block, probabilities)

    monkeypatch.setattr(decoding, "label_block", label)
    with pytest.raises(KeyboardInterrupt):
        decode.run(source, out=tmp_path / "out", **how)
    for file in files_of(other):  # as `cp -r` does, which leaves the folder as it was
        shutil.copy2(file, source / file.relative_to(other))
    decode.run(source, out=tmp_path / "out", **how)
    ids, _ = expected(made_up(1), None)
    with open_volume(tmp_path / "out" / "instances.h5") as volume:
        np.testing.assert_array_equal(volume.read(), ids)


def _zarr(path: Path, values: NDArray[np.uint8]) -> Path:
    whole, channels = values.shape, ("pre", "post", "union")
    create_zarr(path, whole, np.uint8, shard=whole, chunk=whole, grid=GRID, channels=channels).write(
        (slice(None),) * 4, values
    )
    return path


def test_a_union_has_no_partners_and_that_is_said(tmp_path: Path) -> None:
    values = made_up()[2:]
    source = written(tmp_path / "p.h5", values, "union")
    outcome = decode.run(source, out=tmp_path / "out", params=PARAMS, threshold=0.5)
    assert "no partners" in outcome.notes[0]
    assert outcome.summary == f"{outcome.n_sites} sites"
    with open_volume(tmp_path / "out" / "instances.h5") as volume:
        assert volume.attrs["label_kind"] == "union"
        np.testing.assert_array_equal(volume.read(), decode_union(values[0], threshold=0.5, min_voxels=20))
    assert not (tmp_path / "out" / "partners.parquet").exists()


def test_the_threshold_says_where_it_is_from(tmp_path: Path) -> None:
    point = tmp_path / "operating_point.json"

    def chosen(given: float | None, params: EvaluateParams = PARAMS) -> decode.Threshold:
        return decode.choose_threshold(given, params=params, operating_point=point)

    assert chosen(None).value == 0.5
    assert "there is no" in chosen(None).source
    point.write_text(json.dumps({"all": {"threshold": 0.3}}))
    assert chosen(None) == decode.Threshold(0.3, str(point))
    assert chosen(None, EvaluateParams(threshold=0.7)) == decode.Threshold(0.7, "evaluate.threshold")
    assert chosen(0.9, EvaluateParams(threshold=0.7)) == decode.Threshold(0.9, "--threshold")
    for broken in ("{", "[]", '{"0": {"threshold": 0.3}}', '{"all": {"threshold": 3}}', '{"all": {}}'):
        point.write_text(broken)
        with pytest.raises(SynmlopsError, match="--threshold"):
            chosen(None)


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command in this process, in an empty folder with params."""
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    tree["evaluate"] |= {"min_voxels": 20, "min_side_voxels": 3}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))

    def run_command(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["synmlops", "decode", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return run_command


def test_the_command_says_what_it_did(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    source = written(tmp_path / "p.h5", made_up())
    outcome = run(source, "--block", "4,16,16")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("threshold 0.5 (there is no data/evaluated/operating_point.json")
    assert lines[1].endswith("partners")
    assert lines[2] == "data/decoded/instances.h5"
    assert all(Path(line).exists() for line in lines[2:])


def _truncated(path: Path) -> Path:
    written(path, made_up())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


def _without(attribute: str, path: Path) -> Path:
    written(path, made_up())
    with h5py.File(path, "r+") as file:
        del file.attrs[attribute]
    return path


REFUSED: dict[str, tuple[Callable[[Path], list[Any]], tuple[str, ...]]] = {
    "no file": (lambda folder: [folder / "none.h5"], ("none.h5", "no such file")),
    "no scale": (lambda folder: [_without("scale", folder / "p.h5")], ("p.h5", "scale")),
    "no channels": (lambda folder: [_without("channels", folder / "p.h5")], ("p.h5", "channels")),
    "ends early": (lambda folder: [_truncated(folder / "p.h5")], ("p.h5", "truncated")),
    "two channels": (
        lambda folder: [written(folder / "p.h5", made_up()[1:], "post", "union")],
        ("post, union", "union alone"),
    ),
    "threshold": (
        lambda folder: [written(folder / "p.h5", made_up()), "--threshold", "1.5"],
        ("--threshold 1.5", "from 0 to 1"),
    ),
    "neurons of another shape": (
        lambda folder: [
            written(folder / "p.h5", made_up()),
            "--neurons",
            neurons_file(folder / "n.h5", (8, 40, 47)),
        ],
        ("n.h5", "(8, 40, 47)", "(8, 40, 48)"),
    ),
    "block": (lambda folder: [written(folder / "p.h5", made_up()), "--block", "4,4"], ("--block 4,4",)),
    "format": (lambda folder: [written(folder / "p.h5", made_up()), "--format", "tif"], ("--format tif",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_is_one_message(
    name: str, tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    arguments, words = REFUSED[name]
    outcome = run(*arguments(tmp_path))
    assert outcome.code == 2
    assert outcome.err.startswith("synmlops: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert not list((tmp_path / "data").rglob("*.*")) if (tmp_path / "data").exists() else True
