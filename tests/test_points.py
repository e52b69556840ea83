"""Points in: whose columns, how they are read, the balls they become; and out again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

import synmlops
from synmlops.cli import app
from synmlops.params import SynmlopsError, VolumeSet
from synmlops.volumes import balls
from synmlops.volumes.exporters.points import export_points
from synmlops.volumes.importers.point_columns import LAYOUTS, read_points
from synmlops.volumes.importers.points import PointSource, import_points, params_lines, survey_points
from synmlops.volumes.inspect import inspect_volume
from synmlops.volumes.labels import unmatched_ids
from synmlops.volumes.phantom import make_phantom
from synmlops.volumes.preparing import list_sources, prepare_volume, write_phantom
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.table import points_nm, read_table

GRID = Grid((40.0, 8.0, 8.0), (400.0, 80.0, 0.0))
SHAPE = (10, 60, 90)
HALVES = (np.arange(SHAPE[1]) // 30)[None, :, None] + np.zeros(SHAPE, np.uint32) + 1
"""Two neurons: 1 for y below 30, 2 from there on."""


def _nm(*voxel_zyx: float) -> list[float]:
    return [at + n * size for at, n, size in zip(GRID.offset_nm, voxel_zyx, GRID.voxel_nm, strict=True)]


PAIRS = np.array(
    [
        [_nm(4, 26, 20), _nm(4, 33, 20)],
        [_nm(4, 26, 20), _nm(4, 33, 30)],  # the first site has two posts
        [_nm(5, 40.25, 60), _nm(6, 22, 60)],
    ]
)


def _synful(pairs: NDArray[np.float64] = PAIRS, **more: Any) -> pd.DataFrame:
    names = [f"{side}_{axis}" for side in ("pre", "post") for axis in "zyx"]
    return pd.DataFrame(pairs.reshape(-1, 6), columns=names).assign(**more)


@pytest.fixture
def source(tmp_path: Path) -> PointSource:
    """Write image, segmentation and a table like Synful's."""
    image = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
    write_hdf5(tmp_path / "em.h5", {"image": image, "neurons": HALVES}, grid=GRID)
    _synful().to_csv(tmp_path / "syn.csv", index=False)
    return PointSource(tmp_path / "syn.csv", f"{tmp_path}/em.h5::image", 60.0, f"{tmp_path}/em.h5::neurons")


def _label(path: Path) -> NDArray[Any]:
    with open_volume(path) as volume:
        assert volume.grid == GRID
        return volume.read()


def _distances(point_zyx_nm: NDArray[np.float64]) -> NDArray[np.float64]:
    index = np.moveaxis(np.indices(SHAPE), 0, -1)
    return np.asarray(np.linalg.norm(index * GRID.voxel_nm + GRID.offset_nm - point_zyx_nm, axis=-1))


def test_balls_are_clipped_to_neurons(source: PointSource, tmp_path: Path) -> None:
    written = import_points(source, tmp_path / "out")
    assert (written.sites, written.rows, written.mask, written.notes) == (2, 3, None, ())
    label = _label(written.label)
    expected = np.zeros(SHAPE, np.uint8)
    for (pre, post), site in zip(PAIRS, (1, 1, 2), strict=True):
        sides = ((pre, 2 * site - 1), (post, 2 * site))
        for point, number in sides:
            own = HALVES[tuple(balls.voxels_of(point, GRID))]
            expected[(_distances(point) <= 60) & (own == HALVES)] = number
    assert np.array_equal(label, expected)
    report = inspect_volume(str(written.label))
    assert report.readable
    assert not report.problems


def test_the_partner_table_comes_along(source: PointSource, tmp_path: Path) -> None:
    written = import_points(source, tmp_path / "out")
    table, label = read_table(written.partners), _label(written.label)
    assert np.array_equal(points_nm(table), PAIRS)
    assert table.site.tolist() == [1, 1, 2]
    assert table[["pre_neuron", "post_neuron"]].values.tolist() == [[1, 2], [1, 2], [2, 1]]
    assert table.pre_voxels.tolist() == [(label == n).sum() for n in (1, 1, 3)]
    assert table.post_voxels[:2].sum() == (label == 2).sum()  # of the two posts of a site, each has its own
    assert table[["pre_z", "pre_y", "pre_x"]].values[2].tolist() == [5, 40, 60]
    box = table.loc[2]
    inside = label[box.z0 : box.z1, box.y0 : box.y1, box.x0 : box.x1]
    assert np.isin(inside, (3, 4)).sum() == np.isin(label, (3, 4)).sum()
    assert all(np.isin(inside, (3, 4)).any(axis=axes)[[0, -1]].all() for axes in ((1, 2), (0, 2), (0, 1)))


def test_half_balls_lie_on_either_side_of_the_middle(source: PointSource, tmp_path: Path) -> None:
    _synful(PAIRS[2:]).to_csv(source.table, index=False)
    written = import_points(replace(source, neurons=None, shape="half-ball"), tmp_path / "out")
    label, (pre, post) = _label(written.label), PAIRS[2]
    ball = _distances((pre + post) / 2) <= 60
    assert np.array_equal(label > 0, ball)
    near_pre = _distances(pre) < _distances(post)
    assert np.array_equal(label == 1, ball & near_pre)


@pytest.mark.parametrize("block", [(3, 17, 23), (4, 100, 100)])
@pytest.mark.parametrize("shape", ["ball", "half-ball"])
def test_blocks_equal_the_whole(
    source: PointSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: tuple[int, int, int],
    shape: Any,
) -> None:
    rng = np.random.default_rng(1)
    pre = rng.uniform(_nm(0, 0, 0), _nm(9, 59, 89), (40, 3))
    post = np.clip(pre + rng.normal(0, 60, (40, 3)), _nm(0, 0, 0), _nm(9, 59, 89))
    _synful(np.stack([pre, post], axis=1)).to_csv(source.table, index=False)
    some = replace(source, shape=shape)
    whole = import_points(some, tmp_path / "whole")
    monkeypatch.setattr(balls, "BLOCK_ZYX", block)
    monkeypatch.setattr("synmlops.volumes.importers.point_labels.BLOCK_ZYX", block)
    blocks = import_points(some, tmp_path / "blocks")
    assert np.array_equal(_label(whole.label), _label(blocks.label))
    pd.testing.assert_frame_equal(read_table(whole.partners), read_table(blocks.partners))
    assert whole.notes == blocks.notes
    assert any("balls of several sites" in note for note in whole.notes)
    assert (whole.mask is None) == (blocks.mask is None)
    if whole.mask is not None and blocks.mask is not None:
        assert np.array_equal(_label(whole.mask), _label(blocks.mask))


def test_a_ball_holds_the_voxel_of_its_point(source: PointSource, tmp_path: Path) -> None:
    """Though the middle of that voxel is farther away than the radius."""
    image = f"{tmp_path}/fine.h5"
    fine = Grid((36.0, 30.0, 30.0), GRID.offset_nm)
    write_hdf5(image, {"image": np.zeros(SHAPE, np.uint8)}, grid=fine)
    pairs = np.array([[4.45, 10.4, 20.4], [4.45, 40.4, 20.4]]) * fine.voxel_nm + fine.offset_nm
    _synful(pairs[None]).to_csv(source.table, index=False)
    written = import_points(replace(source, image=image, neurons=None, radius_nm=18.0), tmp_path / "out")
    with open_volume(written.label) as label:
        assert np.argwhere(label.read()).tolist() == [[4, 10, 20], [4, 40, 20]]


def test_of_two_sites_the_nearer_point_wins(source: PointSource, tmp_path: Path) -> None:
    pairs = np.array([[_nm(4, 10, 20), _nm(4, 40, 20)], [_nm(4, 10, 26), _nm(4, 40, 60)]])
    _synful(pairs).to_csv(source.table, index=False)
    written = import_points(replace(source, neurons=None), tmp_path / "out")
    label = _label(written.label)
    first, second = _distances(pairs[0, 0]), _distances(pairs[1, 0])
    assert np.array_equal(label == 3, (second <= 60) & (second < first))
    shared = int(((first <= 60) & (second <= 60)).sum())
    assert written.notes == (f"{shared} voxels lie in balls of several sites: each is of the nearest point",)


@pytest.mark.parametrize("background", [0, -1])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_an_end_in_the_background_is_masked(
    source: PointSource, tmp_path: Path, background: int, compression: str | None
) -> None:
    neurons = HALVES.astype(np.int64)
    neurons[6, 20:24, 55:65] = background  # about the post of the last row
    write_hdf5(tmp_path / "em2.h5", {"neurons": neurons}, grid=GRID, compression=compression)
    written = import_points(replace(source, neurons=f"{tmp_path}/em2.h5"), tmp_path / "out")
    assert (written.sites, written.rows) == (1, 2)
    assert "1 of 3 rows have an end in the background" in written.notes[0]
    assert written.mask is not None
    label, mask = _label(written.label), _label(written.mask)
    assert set(np.unique(label)) == {0, 1, 2}
    unsure = (_distances(PAIRS[2, 0]) <= 60) | (_distances(PAIRS[2, 1]) <= 60)
    assert np.array_equal(mask == 0, unsure & (label == 0))
    assert any(line.strip() == f"mask: {written.mask}" for line in params_lines(source, written))
    assert import_points(source, tmp_path / "out").mask is None
    assert not written.mask.exists()  # it was that of another label


def test_a_site_that_loses_a_side_is_taken_out(source: PointSource, tmp_path: Path) -> None:
    """Of two posts at one place only the first gets voxels."""
    pairs = np.array([[_nm(4, 10, 20), _nm(4, 40, 40)], [_nm(4, 10, 60), _nm(4, 40, 40)]])
    _synful(pairs).to_csv(source.table, index=False)
    written = import_points(source, tmp_path / "out")
    label = _label(written.label)
    assert (written.sites, written.rows) == (1, 1)
    assert unmatched_ids(np.unique(label[label > 0])) == ()
    assert "1 of 2 rows have a side without a voxel of its own" in written.notes[0]
    assert written.mask is not None
    assert (_label(written.mask)[_distances(pairs[1, 0]) <= 60] == 0).all()


def test_pairs_that_leave_the_image_are_cropped_on_demand(source: PointSource, tmp_path: Path) -> None:
    pairs = np.concatenate([PAIRS, [[_nm(5, 58, 20), _nm(5, 64, 20)], [_nm(5, 580, 20), _nm(5, 640, 20)]]])
    _synful(pairs).to_csv(source.table, index=False)
    with pytest.raises(
        SynmlopsError, match=r"3 of 10 points lie outside the image, first the post of row 4.*--crop"
    ):
        import_points(source, tmp_path / "out")
    written = import_points(replace(source, crop=True), tmp_path / "out")
    assert (written.sites, written.rows) == (2, 3)
    assert written.mask is not None
    assert np.array_equal(
        _label(written.mask) == 0, (_distances(pairs[3, 0]) <= 60) | (_distances(pairs[3, 1]) <= 60)
    )


def test_what_another_site_says_stays_trusted(source: PointSource, tmp_path: Path) -> None:
    pairs = np.concatenate([PAIRS, [[_nm(4, 26, 26), _nm(4, 60.5, 26)]]])
    _synful(pairs).to_csv(source.table, index=False)
    written = import_points(replace(source, crop=True), tmp_path / "out")
    assert written.mask is not None
    label, mask = _label(written.label), _label(written.mask)
    beyond = (_distances(pairs[3, 0]) <= 60) | (_distances(pairs[3, 1]) <= 60)
    assert (beyond & (label > 0)).any()
    assert np.array_equal(mask == 0, beyond & (label == 0))


def test_rows_that_stand_twice_count_once(source: PointSource, tmp_path: Path) -> None:
    _synful(PAIRS[[0, 1, 1, 2]]).to_csv(source.table, index=False)
    written = import_points(source, tmp_path / "out")
    assert (written.rows, written.notes) == (3, ("1 of 4 rows stand there twice and count once",))


def _jittered() -> NDArray[np.float64]:
    """Give a site of which each row has a pre point of its own, and one across the border of its neuron."""
    posts = [_nm(4, 40, 20), _nm(4, 40, 30), _nm(4, 40, 40), _nm(4, 24, 20)]
    pres = [_nm(4, 28, 20), _nm(4, 28, 22), _nm(4, 28, 24), _nm(4, 30, 22)]  # 16 nm apart along the row
    return np.array([[pre, post] for pre, post in zip(pres, posts, strict=True)])


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize(
    ("merge_nm", "sites"), [(0.0, [1, 2, 3, 4]), (15.0, [1, 2, 3, 4]), (16.0, [1, 1, 1, 2])]
)
def test_near_pre_points_of_a_neuron_are_one_site_on_demand(
    source: PointSource, tmp_path: Path, clipped: bool, merge_nm: float, sites: list[int]
) -> None:
    """Whether the neurons are those of a segmentation or of the table."""
    _synful(_jittered(), segmentid_pre=[1, 1, 1, 2], segmentid_post=[2, 2, 2, 1]).to_csv(
        source.table, index=False
    )
    given = source if clipped else replace(source, neurons=None)
    written = import_points(replace(given, merge_nm=merge_nm, radius_nm=20.0), tmp_path / "out")
    table, label = read_table(written.partners), _label(written.label)
    assert table.site.tolist() == sites
    assert np.array_equal(points_nm(table), _jittered())  # each row keeps its own
    assert np.array_equal(_label_at(written.label, table)[:, 0], 2 * np.array(sites) - 1)
    assert written.sites == max(sites) == len(np.unique((label[label > 0] + 1) // 2))
    said = ("4 pre points became 2 sites (--merge-nm 16)",) if max(sites) == 2 else ()
    assert [note for note in written.notes if "became" in note] == list(said)


def test_a_table_that_names_its_sites_is_not_merged(source: PointSource, tmp_path: Path) -> None:
    _synful(_jittered(), cleft=[1, 1, 2, 3]).to_csv(source.table, index=False)
    named = replace(source, columns={"site": "cleft"}, radius_nm=20.0)
    assert import_points(named, tmp_path / "out").sites == 3
    with pytest.raises(
        SynmlopsError, match="its column cleft says which rows are one site; leave out --merge"
    ):
        import_points(replace(named, merge_nm=16.0), tmp_path / "out")


IDS = np.array([[720575940621039145, 3], [720575940621039145, 4], [2**63 + 7, 5]], np.uint64)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".parquet", ".feather"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path, frame = tmp_path / f"a{suffix}", _synful(segmentid_pre=IDS[:, 0], segmentid_post=IDS[:, 1])
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".feather":
        frame.to_feather(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    read = read_points(path)
    assert (read.name, read.units) == ("synful", "nm")
    assert np.array_equal(read.raw, PAIRS)
    assert read.neurons is not None
    assert np.array_equal(read.neurons, IDS)


def test_ids_keep_their_digits_beside_missing_ones(tmp_path: Path) -> None:
    lines = ["pre_pt_position,post_pt_position,pre_pt_root_id,post_pt_root_id"]
    lines += ['"[1, 2, 3]","[4, 5.5, 6]",720575940621039145,', "[1 2 3],[ 7 8 9 ],,-1"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    read = read_points(tmp_path / "a.csv")
    assert (read.name, read.units) == ("cave", None)
    assert read.raw.tolist() == [[[3, 2, 1], [6, 5.5, 4]], [[3, 2, 1], [9, 8, 7]]]
    assert read.neurons is not None
    assert read.neurons.tolist() == [[720575940621039145, 0], [0, 0]]


def test_the_lower_of_two_confidences_counts_and_scores_are_kept(source: PointSource, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            f"{axis}_{side}": PAIRS[:, k, i]
            for k, side in enumerate(("pre", "post"))
            for i, axis in enumerate("zyx")
        }
    )
    frame.assign(confidence_pre=[0.9, 0.5, 1.0], confidence_post=[0.7, 0.6, 1.0]).to_csv(
        source.table, index=False
    )
    written = import_points(replace(source, units="nm"), tmp_path / "out")
    assert read_table(written.partners).confidence.tolist() == [0.7, 0.5, 1.0]
    _synful(scores=[3.0, 140.0, 0.5]).to_csv(source.table, index=False)
    written = import_points(source, tmp_path / "out")
    table = read_table(written.partners)
    assert (table.confidence.tolist(), table.score.tolist()) == ([1, 1, 1], [3.0, 140.0, 0.5])


def test_named_columns(source: PointSource, tmp_path: Path) -> None:
    renamed = {f"{side}_{axis}": f"{axis}{n}" for n, side in enumerate(("pre", "post")) for axis in "zyx"}
    _synful().rename(columns=renamed).assign(cleft=[7, 9, 9]).to_csv(source.table, index=False)
    some = replace(source, columns=renamed | {"site": "cleft"}, units="nm")
    table = read_table(import_points(some, tmp_path / "out").partners)
    assert np.array_equal(points_nm(table), PAIRS)
    assert table.site.tolist() == [1, 2, 2]


@pytest.mark.parametrize("how", ["voxel", "point_nm", "swap"])
def test_positions_in_other_units(source: PointSource, tmp_path: Path, how: str) -> None:
    pairs = {
        "voxel": (PAIRS - GRID.offset_nm) / GRID.voxel_nm,
        "point_nm": PAIRS / (20.0, 4.0, 4.0),
        "swap": PAIRS[..., ::-1],
    }[how]
    _synful(pairs).to_csv(source.table, index=False)
    changes: dict[str, Any] = {
        "voxel": {"units": "voxel"},
        "point_nm": {"point_nm": (20.0, 4.0, 4.0)},
        "swap": {"swap_xz": True},
    }[how]
    table = read_table(import_points(replace(source, **changes), tmp_path / "out").partners)
    assert np.allclose(points_nm(table), PAIRS, atol=1e-9)


def _with_nan(frame: pd.DataFrame) -> pd.DataFrame:
    frame.loc[1, "post_y"] = np.nan
    return frame


MANY = np.random.default_rng(0).uniform(_nm(0, 0, 0), _nm(9, 59, 89), (30, 2, 3))
FAULTS: dict[str, tuple[Callable[[], pd.DataFrame], str]] = {
    "swapped": (
        lambda: _synful(MANY[..., ::-1]),
        r"lie outside the image as they are read, but 60 lie inside with x and z swapped; add --swap-xz",
    ),
    "voxels": (
        lambda: _synful((MANY - GRID.offset_nm) / GRID.voxel_nm),
        r"points lie outside the image as they are read, but 60 lie inside as voxels.*; use --units voxel",
    ),
    "swapped voxels": (
        lambda: _synful(((MANY - GRID.offset_nm) / GRID.voxel_nm)[..., ::-1]),
        r"with x and z swapped and as voxels of the image; add --swap-xz and use --units voxel",
    ),
    "elsewhere": (lambda: _synful(PAIRS + 1e6), r"6 of 6 points lie outside.*the image of the same tissue"),
    "no column": (
        lambda: _synful().rename(columns={"post_y": "post_yy"}),
        r"synful's columns but has no post_y \(nearest: post_yy\); name the column: --columns post_y=NAME",
    ),
    "other columns": (
        lambda: pd.DataFrame({"a": [1], "b": [2]}),
        r"its columns a, b are none that are known",
    ),
    "nan": (lambda: _with_nan(_synful()), r"post_y of row 2 is nan; 1 of 3 rows"),
    "text": (lambda: _synful(post_x=["1", "two", "3"]), r"row 2 has 'two' in post_x, not a number"),
    "one point": (
        lambda: _synful(PAIRS[:, [0, 0]]),
        r"pre and post of row 1 are one point, as in 3 of 3 rows",
    ),
    "no rows": (lambda: _synful()[:0], r"has a header and no rows"),
    "cave": (
        lambda: pd.DataFrame({"pre_pt_position": ["[1, 2, 3]"], "post_pt_position": ["[1, 2, 4]"]}),
        r"nm or voxels\? CAVE .*add --units nm, --units voxel .* or --point-nm",
    ),
    "short list": (
        lambda: pd.DataFrame({"pre_pt_position": ["[1, 2, 3]"], "post_pt_position": ["[1, 2]"]}),
        r"row 1 has '\[1, 2\]' in post_pt_position, not three numbers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_writes_nothing(source: PointSource, tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    make().to_csv(source.table, index=False)
    with pytest.raises(SynmlopsError, match=message):
        import_points(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_voxels_that_are_taken_for_nm(source: PointSource, tmp_path: Path) -> None:
    """Where the image begins at the origin they all lie inside, in its corner."""
    write_hdf5(tmp_path / "at0.h5", {"image": np.zeros(SHAPE, np.uint8)}, grid=Grid(GRID.voxel_nm))
    voxels = np.random.default_rng(0).integers((0, 0, 0), SHAPE, (30, 2, 3)).astype(float)
    _synful(voxels).to_csv(source.table, index=False)
    some = replace(source, image=f"{tmp_path}/at0.h5", neurons=None)
    with pytest.raises(SynmlopsError, match=r"all 60 points lie in a corner of the image.*--units voxel"):
        import_points(some, tmp_path / "out")
    said = survey_points(replace(some, point_nm=(1.0, 1.0, 1.0)), None)  # they are nm indeed
    assert dict(said.rows)["pairs"] == "30 of 30 rows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius_nm": 10.0}, "--radius-nm 10: must be at least 20, half of the image's longest voxel side"),
        ({"units": "nm", "point_nm": (40.0, 4.0, 4.0)}, "--point-nm is the size of the voxels"),
        ({"merge_nm": -1.0}, "--merge-nm -1: must be a number of nm, 0 or more"),
        ({"merge_nm": float("nan")}, "--merge-nm nan: must be"),
        ({"point_nm": (40.0, 0.0, 4.0)}, "--point-nm .* must be positive"),
        ({"columns": {"pre_z": "zz"}}, "--columns pre_z=zz: .* has no column zz"),
        ({"columns": {"z": "pre_z"}}, "--columns z=pre_z: z is none of pre_z, pre_y"),
        ({"table": Path("none.csv")}, "none.csv: there is no such file"),
    ],
)
def test_faulty_options(source: PointSource, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SynmlopsError, match=message):
        import_points(replace(source, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_file_and_one_of_another_kind(source: PointSource, tmp_path: Path) -> None:
    source.table.write_bytes(b"")
    with pytest.raises(SynmlopsError, match=r"syn.csv: is empty \(0 bytes\)"):
        import_points(source, tmp_path / "out")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(SynmlopsError, match=r"unknown format; give \.csv"):
        import_points(replace(source, table=tmp_path / "a.xlsx"), tmp_path / "out")
    (tmp_path / "a.parquet").write_bytes(b"x" * 100)
    with pytest.raises(SynmlopsError, match=r"a.parquet: cannot be read as a table"):
        import_points(replace(source, table=tmp_path / "a.parquet"), tmp_path / "out")


def test_a_segmentation_of_other_voxels(source: PointSource, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "s.h5", {"a": HALVES[1:], "b": HALVES.astype(np.float32)}, grid=GRID)
    write_hdf5(tmp_path / "t.h5", {"a": HALVES}, grid=Grid(GRID.voxel_nm))
    for name, message in (
        ("s.h5::a", "voxels, the image"),
        ("s.h5::b", "whole numbers"),
        ("t.h5::a", "lies at"),
    ):
        with pytest.raises(SynmlopsError, match=message):
            import_points(replace(source, neurons=f"{tmp_path}/{name}"), tmp_path / "out")


def test_a_survey_writes_a_picture_alone(source: PointSource, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    _synful(PAIRS[[0, 1, 1, 2]], segmentid_pre=[1, 1, 1, 9]).to_csv(source.table, index=False)
    survey = survey_points(source, tmp_path / "picture.png")
    rows = dict(survey.rows)
    assert rows["pairs"] == "3 of 4 rows"
    assert rows["sites"].startswith("2, with 1.50 posts on average, 2 at most")
    assert rows["columns"].startswith("synful's: pre: pre_z, pre_y, pre_x")
    assert len(survey.odd) == 2
    assert "1 of 4 rows name another neuron than the segmentation" in survey.odd[1]
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "picture.png"}


@pytest.mark.parametrize(
    ("like", "options"),
    [
        ("synful", {}),
        ("neuprint", {"point_nm": (40.0, 4.0, 4.0)}),
        ("neuprint", {}),
        ("cave", {}),
        ("cave", {"point_nm": (20.0, 1.0, 1.0)}),
        ("synmlops", {}),
    ],
)
def test_a_round_trip_keeps_positions(source: PointSource, tmp_path: Path, like: str, options: Any) -> None:
    first = import_points(source, tmp_path / "first")
    out = tmp_path / ("out.parquet" if options else "out.csv")
    exported = export_points(first.partners, out, like=like, **options)
    assert exported.rows == 3
    read = read_points(out)
    assert read.name == like
    again: dict[str, Any] = options or {"units": "voxel" if like == "neuprint" else "nm"}
    second = import_points(replace(source, table=out, **again), tmp_path / "second")
    a, b = read_table(first.partners), read_table(second.partners)
    if like == "neuprint" and not options:  # whole voxels of the volume
        assert a[["pre_z", "pre_y", "pre_x", "post_z"]].equals(b[["pre_z", "pre_y", "pre_x", "post_z"]])
    else:
        assert np.allclose(points_nm(a), points_nm(b), atol=1e-9)
        assert np.array_equal(_label(first.label), _label(second.label))
    assert a[["site", "confidence", "pre_neuron", "post_neuron"]].equals(
        b[["site", "confidence", "pre_neuron", "post_neuron"]]
    )


def test_faulty_exports(source: PointSource, tmp_path: Path) -> None:
    table = import_points(source, tmp_path / "out").partners
    for options, message in (
        ({"like": "catmaid"}, "--like catmaid: must be synful"),
        ({"like": "synful", "units": "um"}, "--units um: must be nm or voxel"),
        ({"like": "synmlops", "units": "nm"}, "leave out --units"),
        ({"like": "synful", "units": "nm", "point_nm": (1.0, 1.0, 1.0)}, "not with --units nm"),
    ):
        with pytest.raises(SynmlopsError, match=message):
            export_points(table, tmp_path / "x.csv", **options)  # type: ignore[arg-type]
    with pytest.raises(SynmlopsError, match=r"must end in \.csv"):
        export_points(table, tmp_path / "x.doc", like="synful")
    with pytest.raises(SynmlopsError, match="is no partner table in Parquet"):
        export_points(source.table, tmp_path / "x.csv", like="synful")
    assert not list(tmp_path.glob("x.*"))


def test_every_kind_has_units_or_asks() -> None:
    assert {(layout.name, layout.units) for layout in LAYOUTS} == {
        ("synmlops", "nm"),
        ("synful", "nm"),
        ("neuprint", "voxel"),
        ("cave", None),
    }


def test_the_commands(source: PointSource, tmp_path: Path) -> None:
    given = ["import", "points", str(source.table), str(tmp_path / "out"), "--image", source.image]
    given += ["--neurons", str(source.neurons), "--radius-nm", "60"]
    dry = CliRunner().invoke(app, [*given, "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["syn_survey.png"]
    real = CliRunner().invoke(app, [*given, "--name", "a"], catch_exceptions=False)
    assert "2 sites, 3 pairs" in real.output
    assert f"    label: {tmp_path}/out/a_label.h5" in real.output.splitlines()
    CliRunner().invoke(app, [*given, "--merge-nm", "30"], catch_exceptions=False)
    assert "merge_nm 30.0" in inspect_volume(f"{tmp_path}/out/syn_label.h5").origin
    table = str(tmp_path / "out" / "a_partners.parquet")
    command = ["export", "points", table, str(tmp_path / "b.csv"), "--like", "synful"]
    assert "3 pairs, positions in nm" in CliRunner().invoke(app, command, catch_exceptions=False).output
    for options, message in (
        (["--shape", "cube"], "--shape cube: must be ball or half-ball"),
        (["--columns", "pre_z"], "give what it is and the column"),
    ):
        with pytest.raises(SynmlopsError, match=message):
            CliRunner().invoke(app, [*given, *options], catch_exceptions=False)


def test_label_and_mask_say_how_they_were_made(source: PointSource, tmp_path: Path) -> None:
    background = HALVES.copy()
    background[tuple(balls.voxels_of(PAIRS[0, 0], GRID))] = 0
    write_hdf5(tmp_path / "n.h5", {"main": background}, grid=GRID)
    written = import_points(replace(source, neurons=f"{tmp_path}/n.h5"), tmp_path / "out")
    assert written.mask is not None
    for path in (written.label, written.mask):
        with open_volume(path) as volume:
            assert volume.attrs["made_by"] == f"synmlops {synmlops.__version__} import points"
            assert json.loads(volume.attrs["made_with"]) == {
                "table": f"{tmp_path}/syn.csv",
                "image": f"{tmp_path}/em.h5::image",
                "neurons": f"{tmp_path}/n.h5",
                "radius_nm": 60.0,
                "shape": "ball",
                "units": "nm",  # as Synful has them: what was chosen, not what was given
                "swap_xz": False,
                "columns": {},
                "crop": False,
                "merge_nm": 0.0,
            }
        assert "radius_nm 60.0, neurons" in inspect_volume(str(path)).origin


def test_a_phantom_goes_out_and_in_and_is_prepared(tmp_path: Path) -> None:
    phantom = make_phantom(size_zyx=(16, 96, 96), voxel_nm=(40, 8, 8), seed=1, offset_nm=(400.0, 80.0, 8.0))
    made = write_phantom(phantom, tmp_path, "a")
    assert made.partners is not None
    export_points(Path(made.partners), tmp_path / "a.csv", like="synful")
    source = PointSource(tmp_path / "a.csv", made.image, 120.0, made.neurons)
    written = import_points(source, tmp_path / "out")
    assert np.allclose(points_nm(read_table(written.partners)), points_nm(phantom.partners), atol=1e-9)
    params = yaml.safe_load("\n".join(params_lines(source, written)))["data"]["train"]
    assert params.keys() == {"image", "label", "label_kind", "neurons", "partners"}
    (taken,) = list_sources(VolumeSet(**params), role="train")
    prepared = prepare_volume(taken, tmp_path, voxel_nm=None, pool_zyx=(1, 1, 1))
    assert prepared.notes == ()
    assert prepared.label is not None
    assert len(prepared.label.ids) == 2 * written.sites
    under = _label_at(written.label, phantom.partners)
    assert np.array_equal(under, np.stack([2 * phantom.partners.site - 1, 2 * phantom.partners.site], axis=1))


def _label_at(path: Path, table: pd.DataFrame) -> NDArray[Any]:
    """Give the label under the pre and the post point of each row."""
    with open_volume(path) as volume:
        label = volume.read()
    ends = ([table[f"{side}_{axis}"] for axis in "zyx"] for side in ("pre", "post"))
    return np.stack([label[tuple(end)] for end in ends], axis=1)
