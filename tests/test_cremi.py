"""CREMI files come in as pairs labels, and what they leave open is masked; tables and volumes go out."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import synmlops
from synmlops.cli import app
from synmlops.params import SynmlopsError
from synmlops.volumes.cremi import (
    CLEFTS,
    NEURONS,
    NOTHING,
    POST_TYPE,
    PRE_TYPE,
    RAW,
    Annotations,
    Layer,
    annotations_of,
    open_layer,
    read_annotations,
    write_cremi,
)
from synmlops.volumes.exporters.cremi import CremiParts, export_cremi
from synmlops.volumes.importers.cremi import CremiLabels, label_cremi
from synmlops.volumes.inspect import inspect_volume
from synmlops.volumes.phantom import make_phantom
from synmlops.volumes.preparing import Source, prepare_volume
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.table import read_table

SHAPE = (6, 24, 30)
VOXEL = (40.0, 8.0, 8.0)
PRE, POST, OTHER = 11, 22, 33  # neurons: left, right above, right below
THICKNESS = 16.0  # two voxels to either side, none along z


class Tissue:
    """Three neurons with a cleft between the first and the others, and annotations to add to."""

    def __init__(self) -> None:
        self.raw = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
        self.neurons = np.full(SHAPE, PRE, np.uint64)
        self.neurons[:, :12, 15:] = POST
        self.neurons[:, 12:, 15:] = OTHER
        self.clefts = np.zeros(SHAPE, np.uint64)
        self.clefts[2:5, 4:20, 14:16] = 5
        self.points: dict[int, tuple[str, tuple[float, ...]]] = {}
        self.partners: list[tuple[int, int]] = []
        self.comments: dict[int, str] = {}
        self.grid, self.raw_grid, self.offset_nm = Grid(VOXEL), Grid(VOXEL), (0.0, 0.0, 0.0)

    def pair(self, pre: int, pre_zyx: tuple[float, ...], post: int, post_zyx: tuple[float, ...]) -> "Tissue":
        self.points[pre], self.points[post] = (PRE_TYPE, pre_zyx), (POST_TYPE, post_zyx)
        self.partners.append((pre, post))
        return self

    @property
    def annotations(self) -> Annotations:
        places = np.array([at for _, at in self.points.values()], np.float64).reshape(-1, 3)
        return Annotations(
            ids=np.array(list(self.points), np.uint64),
            types=tuple(kind for kind, _ in self.points.values()),
            locations_nm=places * VOXEL,
            partners=np.array(self.partners, np.uint64).reshape(-1, 2),
            comments=self.comments,
            offset_nm=self.offset_nm,
        )

    def write(self, path: Path) -> Path:
        layers = {"raw": (self.raw, self.raw_grid), "neurons": (self.neurons, self.grid)}
        layers["clefts"] = (self.clefts, self.grid)
        made = {name: Layer(of.shape, grid, [(0, of)]) for name, (of, grid) in layers.items()}
        write_cremi(path, annotations=self.annotations, **made)
        return path


def polyadic() -> Tissue:
    """Give one site with two posts."""
    return Tissue().pair(1, (3, 12, 10), 2, (3, 8, 19)).pair(1, (3, 12, 10), 3, (3, 16, 19))


def labels_of(tissue: Tissue, folder: Path, **options: Any) -> CremiLabels:
    return label_cremi(tissue.write(folder / "t.hdf"), **{"thickness_nm": THICKNESS} | options)


def kinds(made: CremiLabels) -> Counter[str]:
    return Counter(doubt.kind for doubt in made.doubts)


def test_the_tissue_beside_the_cleft_on_either_side(tmp_path: Path) -> None:
    made = labels_of(polyadic(), tmp_path)
    row = made.label[3, 12]
    assert row[10:20].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 0, 0]
    assert not made.label[:2].any()
    assert not made.label[5:].any()
    assert np.unique(made.label[2:5, 4:20, 12:18]).tolist() == [1, 2]
    assert made.mask.all()
    assert not made.doubts


def test_tissue_past_the_rim_of_the_cleft_is_not_beside_it(tmp_path: Path) -> None:
    made = labels_of(polyadic(), tmp_path, thickness_nm=48.0)
    assert made.label[3, 12, 7:16].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 2]
    assert made.label[3, 20, 14] == 1  # 8 nm past it
    assert not made.label[3, 23].any()  # 32 nm past it, and within 48 nm of the cleft


def test_a_polyadic_site_is_one_instance_and_a_row_for_each_partner(tmp_path: Path) -> None:
    table = labels_of(polyadic(), tmp_path).partners
    shown = ["site", "partner", "pre_neuron", "post_neuron", "pre_annotation", "post_annotation"]
    assert table[shown].to_numpy().tolist() == [[1, 1, PRE, POST, 1, 2], [1, 2, PRE, OTHER, 1, 3]]
    assert table.pre_neuron.dtype == np.uint64
    assert table[["post_z", "post_y", "post_x", "post_z_nm", "post_x_nm"]].to_numpy().tolist() == [
        [3, 8, 19, 120, 152],
        [3, 16, 19, 120, 152],
    ]
    assert (table.pre_voxels > 0).all()
    assert table.post_voxels.tolist() == [table.post_voxels[0]] * 2  # the cleft is as long beside either
    assert table.labelled.all()
    assert table[["z0", "z1"]].to_numpy().tolist() == [[2, 5], [2, 5]]


def test_several_pre_points_of_a_neuron_at_one_cleft_are_one_site(tmp_path: Path) -> None:
    tissue = Tissue().pair(1, (3, 8, 10), 2, (3, 8, 19)).pair(7, (3, 16, 10), 3, (3, 16, 19))
    assert labels_of(tissue, tmp_path).partners.site.tolist() == [1, 1]


def test_pieces_of_one_id_are_clefts_of_their_own(tmp_path: Path) -> None:
    tissue = Tissue().pair(1, (3, 7, 10), 2, (3, 7, 19)).pair(7, (3, 16, 10), 3, (3, 16, 19))
    tissue.clefts[:, 10:14] = 0
    made = labels_of(tissue, tmp_path, thickness_nm=8.0)
    assert made.partners.site.tolist() == [1, 2]
    assert set(np.unique(made.label)) == {0, 1, 2, 3, 4}


def test_a_fragment_of_the_pairs_own_cleft_belongs_to_its_site(tmp_path: Path) -> None:
    tissue = Tissue().pair(1, (3, 5, 10), 2, (3, 5, 19))
    tissue.clefts[:, 8:9] = 0
    tissue.clefts[:, 12:] = 0  # two pieces between the same neurons, the pair at one of them
    made = labels_of(tissue, tmp_path)
    assert made.label[3, 10, 13:17].tolist() == [1, 1, 2, 2]
    assert not made.doubts


def test_a_cleft_without_a_pair_is_masked_and_listed(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.clefts[0, 2:6, 3:5] = 9
    made = labels_of(tissue, tmp_path)
    assert [(doubt.kind, doubt.what) for doubt in made.doubts] == [
        ("clefts without an annotated pair", "cleft 9, 8 voxels")
    ]
    assert made.doubts[0].at_nm == (0.0, 28.0, 28.0)
    assert (made.mask[0, 2:6, 2:6] == 0).all()
    assert made.mask[3].all()


def test_a_pair_without_a_cleft_is_masked_and_stays_in_the_table(tmp_path: Path) -> None:
    tissue = polyadic().pair(4, (0, 20, 2), 5, (0, 20, 6))
    tissue.neurons[0, 18:, 5:8] = POST
    made = labels_of(tissue, tmp_path, reach_nm=60.0)
    assert kinds(made) == {"pairs with no cleft near": 1}
    assert not made.mask[0, 20, 2:7].any()
    last = made.partners.iloc[2]
    assert (last.site, last.labelled, last.post_voxels, last.post_neuron) == (2, False, 0, POST)


def test_a_pair_whose_nearest_cleft_is_that_of_others(tmp_path: Path) -> None:
    tissue = polyadic().pair(4, (3, 12, 3), 5, (3, 12, 8))
    tissue.neurons[:, :, :6] = 44
    made = labels_of(tissue, tmp_path)
    assert kinds(made) == {"pairs whose nearest cleft does not lie between their neurons": 1}
    assert not made.mask[3, 12, 3:9].any()
    assert made.partners.labelled.tolist() == [True, True, False]


def test_two_sites_at_one_cleft_are_not_told_apart(tmp_path: Path) -> None:
    tissue = Tissue().pair(1, (3, 12, 10), 2, (3, 8, 19)).pair(4, (3, 10, 20), 5, (3, 13, 20))
    tissue.clefts[0:2, 4:20, 2:3] = 6  # a second cleft, so that something is left
    tissue.neurons[:, :, :2] = 44
    tissue.pair(8, (1, 10, 1), 9, (1, 10, 6))
    made = labels_of(tissue, tmp_path)
    assert kinds(made)["pairs with a side that cannot be told from those of others"] == 2
    assert made.partners.labelled.tolist() == [False, False, True]
    assert not made.mask[3, 4:20, 14:18].any()


def test_a_pair_within_one_neuron_is_masked(tmp_path: Path) -> None:
    tissue = Tissue().pair(1, (3, 12, 10), 2, (3, 8, 19)).pair(6, (3, 18, 8), 7, (3, 19, 12))
    made = labels_of(tissue, tmp_path)
    assert kinds(made) == {"pairs within one neuron": 1}
    assert not made.mask[3, 18, 8]
    assert made.partners.self_contact.tolist() == [False, True]


def test_a_point_without_a_partner_is_masked_and_listed(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.points[40] = (POST_TYPE, (0.0, 20.0, 25.0))
    made = labels_of(tissue, tmp_path)
    assert [doubt.what for doubt in made.doubts] == ["40, a postsynaptic_site"]
    assert made.mask[0, 20, 25] == 0
    assert made.mask[3].all()


def test_voxels_as_near_to_two_sites_are_masked(tmp_path: Path) -> None:
    tissue = Tissue()
    tissue.clefts[:] = 0
    tissue.clefts[2:5, 4:20, 14:16] = 5
    tissue.neurons[:, :, 20:] = 44
    tissue.clefts[2:5, 4:20, 20:21] = 6  # POST is post of the first and pre of the second
    tissue.neurons[:, :, 15:20] = POST
    tissue.pair(1, (3, 12, 10), 2, (3, 12, 17)).pair(3, (3, 12, 18), 4, (3, 12, 25))
    made = labels_of(tissue, tmp_path, thickness_nm=32.0)
    assert kinds(made)["sites that lost voxels which are as near to another cleft"] >= 1
    assert (made.label[3, 12, 16:20] == 0).all()
    assert not made.mask[3, 12, 16:20].any()


def test_the_nearer_cleft_has_the_voxel(tmp_path: Path) -> None:
    tissue = Tissue()
    tissue.raw_grid = tissue.grid = Grid((8.0, 8.0, 8.0))
    tissue.neurons[:, :, 20:] = 44
    tissue.neurons[:, :, 15:20] = POST
    tissue.clefts[2:5, 4:20, 20:21] = 6
    tissue.pair(1, (3, 12, 10), 2, (3, 12, 17)).pair(3, (3, 12, 18), 4, (3, 12, 25))
    path = tissue.write(tmp_path / "t.hdf")
    with h5py.File(path, "a") as file:
        file["annotations/locations"][:, 0] /= 5
    made = label_cremi(path, thickness_nm=24.0)
    assert made.label[3, 12, 13:22].tolist() == [1, 1, 2, 2, 0, 0, 3, 4, 4]  # in between: to within a voxel


def test_a_pair_that_lost_its_side_to_what_is_masked_is_masked_itself(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.neurons[:, :, 15:] = OTHER
    tissue.neurons[3, 6:10, 15:20] = POST
    tissue.points[40] = (POST_TYPE, (3.0, 8.0, 17.0))  # no partner, right at the first post
    made = labels_of(tissue, tmp_path, thickness_nm=40.0)
    assert kinds(made)["pairs with a side that cannot be told from those of others"] == 1
    assert made.partners.labelled.tolist() == [False, True]
    assert not made.mask[3, 8, [10, 19]].any()
    assert {1, 2} <= set(np.unique(made.label))


def test_tissue_of_no_neuron_beside_a_cleft_is_masked(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.neurons[:, :, 14:16] = 2**64 - 1
    made = labels_of(tissue, tmp_path)
    assert made.label[3, 12, 12:18].tolist() == [1, 1, 0, 0, 2, 2]
    assert made.mask[3, 12, 12:18].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("special", [2**64 - 2, 2**64 - 3])
def test_what_was_not_looked_at_is_masked(special: int, tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.neurons[0], tissue.clefts[5] = special, special
    made = labels_of(tissue, tmp_path)
    assert made.mask.any(axis=(1, 2)).tolist() == [False, True, True, True, True, False]
    assert not made.neurons[0].any()


def test_a_padded_raw_volume_is_kept_for_context(tmp_path: Path) -> None:
    tissue = polyadic()
    plain = labels_of(tissue, tmp_path)
    tissue.raw = np.pad(tissue.raw, ((2, 1), (4, 4), (3, 5)))
    tissue.raw_grid = Grid(VOXEL, (400.0, 0.0, 80.0))
    tissue.offset_nm = (480.0, 32.0, 104.0)
    tissue.grid = Grid(VOXEL, tissue.offset_nm)
    _import(tissue, tmp_path)
    with h5py.File(tmp_path / "out/t.h5") as file:
        assert {name: file[name].shape for name in file} == dict.fromkeys(
            ("image", "label", "mask", "neurons"), (9, 32, 38)
        )
        inner = slice(2, 8), slice(4, 28), slice(3, 33)
        assert (file["label"][inner] == plain.label).all()
        assert file["mask"][inner].all()
        assert file["mask"][()].sum() == np.prod(SHAPE)
        assert file["image"].attrs["offset"].tolist() == [400.0, 0.0, 80.0]
    table = read_table(tmp_path / "out/t_partners.parquet")
    assert table[["pre_z", "pre_y", "pre_x", "z0"]].to_numpy().tolist() == [[5, 16, 13, 4]] * 2
    assert table.pre_x_nm.tolist() == [104 + 80] * 2


def _import(tissue: Tissue, folder: Path, *options: str) -> str:
    path = tissue.write(folder / "t.hdf")
    command = ["import", "cremi", str(path), str(folder / "out"), "--thickness-nm", str(THICKNESS), *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_and_what_it_wrote_go_through_prepare(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.clefts[0, 2:6, 3:5] = 9
    said = _import(tissue, tmp_path)
    out = tmp_path / "out"
    assert "2 pairs in 1 sites, 1 of them polyadic" in said
    assert "masked: 1 clefts without an annotated pair" in said
    assert f"  partners: {out}/t_partners.parquet" in said
    doubts = pd.read_csv(out / "t_doubts.csv")
    assert doubts.to_numpy().tolist() == [
        ["clefts without an annotated pair", "cleft 9, 8 voxels", 0.0, 28.0, 28.0]
    ]
    parts = {part: f"{out}/t.h5::{part}" for part in ("image", "label", "neurons", "mask")}
    source = Source("t", **parts, kind="pairs", partners=str(out / "t_partners.parquet"))
    prepared = prepare_volume(source, tmp_path / "prepared", voxel_nm=None, pool_zyx=(1, 1, 1))
    assert prepared.label is not None
    assert prepared.label.sites == 1
    assert not prepared.notes


def test_the_volume_says_how_it_was_made(tmp_path: Path) -> None:
    _import(polyadic(), tmp_path, "--reach-nm", "99")
    with open_volume(tmp_path / "out" / "t.h5::label") as volume:
        assert volume.attrs["made_by"] == f"synmlops {synmlops.__version__} import cremi"
        assert json.loads(volume.attrs["made_with"]) == {
            "source": f"{tmp_path}/t.hdf",
            "thickness_nm": THICKNESS,
            "reach_nm": 99.0,
            "leave_out_faulty": False,
        }
    report = inspect_volume(f"{tmp_path}/out/t.h5::mask")
    assert f"thickness_nm {THICKNESS}, reach_nm 99.0, leave_out_faulty false" in report.origin


def test_a_dry_run_draws_and_writes_nothing_else(tmp_path: Path) -> None:
    said = _import(polyadic(), tmp_path, "--dry-run", "--name", "a")
    assert "nothing odd found" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_survey.png"]


def _set(dataset: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[dataset]
        file[dataset] = value

    return change


def _drop(name: str, attribute: str | None = None) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if attribute is None:
            del file[name]
        else:
            del file[name].attrs[attribute]

    return change


def _move(row: int, at: tuple[float, ...]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["annotations/locations"][row] = at

    return change


def _no_neuron(file: h5py.File) -> None:
    file[NEURONS][3, 8, 19] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _move(1, (120, 64, 240)),
            r"annotation 2 lies outside the labels, at voxel \[3, 8, 30\].*1 of 2 pairs",
        ),
        (_move(0, (-21, 64, 24)), r"annotation 1 lies outside the labels, at voxel \[-1, 8, 3\]"),
        (_move(0, (np.nan, 64, 24)), "annotation 1 lies at no finite place"),
        (_no_neuron, r"annotation 2 lies in no neuron .*--leave-out-faulty"),
        (_set("annotations/presynaptic_site/partners", [[1, 2], [1, 8]]), "1 -> 8 the post side is missing"),
        (
            _set("annotations/presynaptic_site/partners", [[2, 1]]),
            "2 -> 1 needs annotation 2 as a presynaptic",
        ),
        (_set("annotations/ids", np.array([1, 2, 2], np.uint64)), "id 2 stands 2 times"),
        (_set("annotations/ids", np.array([1, 2], np.uint64)), "2 ids, 3 types"),
        (_drop("annotations/types"), "annotations lacks types"),
        (_drop("annotations"), "has no annotated partners"),
        (
            _drop(CLEFTS, "resolution"),
            "clefts: does not say its voxel size; write the attribute `resolution`",
        ),
        (_drop(NEURONS), "has no volumes/labels/neuron_ids"),
        (_drop(RAW), "has no volumes/raw"),
        (lambda file: file[NEURONS].attrs.update(offset=[20.0, 0, 0]), "both must cover the same voxels"),
        (lambda file: file[RAW].attrs.update(offset=[20.0, 0, 0]), "labels must lie on whole voxels inside"),
        (
            lambda file: file[RAW].attrs.update(resolution=[50.0, 4, 4]),
            r"the raw volume of \(50.0, 4.0, 4.0\)",
        ),
        (lambda file: file["annotations"].attrs.update(offset=[1.0]), "offset of annotations is"),
        (
            lambda file: file[CLEFTS].write_direct(np.full(SHAPE, NOTHING)),
            "none of its 2 pairs lies at a cleft",
        ),
    ],
)
def test_files_that_contradict_themselves(
    change: Callable[[h5py.File], None], message: str, tmp_path: Path
) -> None:
    path = polyadic().write(tmp_path / "t.hdf")
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(SynmlopsError, match=message):
        CliRunner().invoke(app, ["import", "cremi", str(path), str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_of_the_challenges(tmp_path: Path) -> None:
    path = polyadic().write(tmp_path / "t.hdf")
    short, other, text = tmp_path / "short.hdf", tmp_path / "other.h5", tmp_path / "text.hdf"
    short.write_bytes(path.read_bytes()[:4000])
    write_hdf5(other, {"main": np.zeros((2, 2, 2), np.uint8)}, grid=None)
    text.write_text("no HDF5")
    for each, message in (
        (short, "is truncated, 4000 of"),
        (other, "is no CREMI file, it holds neither volumes/ nor annotations/ but main"),
        (text, "is no HDF5 file"),
        (tmp_path / "none.hdf", "there is no such file"),
    ):
        with pytest.raises(SynmlopsError, match=message):
            label_cremi(each)


def test_faulty_pairs_can_be_left_out(tmp_path: Path) -> None:
    tissue = polyadic().pair(4, (0, 20, 2), 5, (0, 20, 31))
    made = labels_of(tissue, tmp_path, leave_out_faulty=True)
    assert [(doubt.kind, doubt.what) for doubt in made.doubts] == [
        ("pairs with an end outside the labels or in no neuron", "pair 4 -> 5")
    ]
    assert made.mask[0, 20, 2] == 0
    assert made.partners.labelled.tolist() == [True, True, False]


def _same(one: Annotations, other: Annotations) -> bool:
    arrays = ("ids", "locations_nm", "partners")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays) and (
        (one.types, one.comments, one.offset_nm) == (other.types, other.comments, other.offset_nm)
    )


def test_annotations_come_back_as_they_were_written(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.comments = {3: "unsure: två", 1: "T-bar"}
    tissue.points[2**63 + 5] = (POST_TYPE, (1 / 3, 0.1, 0.7))
    tissue.offset_nm = (80.0, 0.1, 0.3)
    path = tissue.write(tmp_path / "t.hdf")
    assert _same(read_annotations(path), tissue.annotations)
    with h5py.File(path) as file:
        assert file.attrs["file_format"] == "0.2"
        assert file[RAW].attrs["resolution"].tolist() == list(VOXEL)
        assert np.unique(file[CLEFTS][()]).tolist() == [5, NOTHING]


def test_an_imported_table_goes_out_with_its_ids_places_and_comments(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.points = {100 + n: place for n, place in tissue.points.items()}
    tissue.partners = [(101, 102), (101, 103)]
    tissue.points[101] = (PRE_TYPE, (3.1, 12.3, 10.7))
    tissue.comments = {103: "unsure"}
    _import(tissue, tmp_path)
    export_cremi(tmp_path / "out/t_partners.parquet", tmp_path / "out.hdf", CremiParts())
    assert _same(read_annotations(tmp_path / "out.hdf"), tissue.annotations)


def test_a_predicted_table_is_numbered_and_sites_share_their_pre_point(tmp_path: Path) -> None:
    made = labels_of(polyadic(), tmp_path)
    table = made.partners.drop(columns=["pre_annotation", "post_annotation"])
    other = table.assign(site=2, pre_x_nm=8.0, confidence=0.2)
    pd.concat((table, other), ignore_index=True).to_parquet(tmp_path / "t.parquet")
    written = export_cremi(tmp_path / "t.parquet", tmp_path / "all.hdf", CremiParts())
    assert written.partners.tolist() == [[1, 2], [1, 3], [4, 5], [4, 6]]
    assert read_annotations(tmp_path / "all.hdf").pairs_nm()[2, 0].tolist() == [120.0, 96.0, 8.0]
    sure = export_cremi(tmp_path / "t.parquet", tmp_path / "sure.hdf", CremiParts(), least_confidence=0.5)
    assert len(sure.partners) == 2
    with pytest.raises(SynmlopsError, match="annotation 1 at two places"):
        annotations_of(table.assign(pre_annotation=1, post_annotation=1))


def test_clefts_of_instances_and_of_probabilities(tmp_path: Path) -> None:
    _import(polyadic(), tmp_path)
    table, volume = tmp_path / "out/t_partners.parquet", tmp_path / "out/t.h5"
    parts = CremiParts(clefts=f"{volume}::label", neurons=f"{volume}::neurons", raw=f"{volume}::image")
    export_cremi(table, tmp_path / "a.hdf", parts)
    with open_volume(f"{volume}::label") as label, open_layer(tmp_path / "a.hdf", CLEFTS) as clefts:
        assert ((clefts.read() == 1) == (label.read() != 0)).all()
        assert clefts.grid == Grid(VOXEL)
    probable = tmp_path / "p.h5"
    channels = ("pre", "union")
    with probabilities_writer(probable, SHAPE, channels=channels, grid=Grid(VOXEL, (40.0, 0, 0))) as out:
        out[1] = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 256
    export_cremi(table, tmp_path / "b.hdf", CremiParts(clefts=str(probable), threshold=0.2))
    with open_layer(tmp_path / "b.hdf", CLEFTS) as clefts:
        assert ((clefts.read() == 1) == (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 256 >= 51)).all()
        assert clefts.grid == Grid(VOXEL, (40.0, 0.0, 0.0))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    _import(polyadic(), tmp_path)
    table, volume = tmp_path / "out/t_partners.parquet", tmp_path / "out/t.h5"
    bare = tmp_path / "bare.h5"
    write_hdf5(bare, {"main": np.zeros(SHAPE, np.uint16)}, grid=None)
    probable = tmp_path / "p.h5"
    with probabilities_writer(probable, SHAPE, channels=("union",), grid=Grid(VOXEL)):
        pass
    for source, parts, message in (
        (volume, CremiParts(), "not a readable partner table"),
        (table, CremiParts(raw=str(bare)), "does not say its voxel size, which CREMI's files must"),
        (table, CremiParts(clefts=str(probable)), "--threshold None: clefts from probabilities need one"),
    ):
        with pytest.raises(SynmlopsError, match=message):
            export_cremi(source, tmp_path / "x.hdf", parts)
    assert not (tmp_path / "x.hdf").exists()


def test_score_prints_json(tmp_path: Path) -> None:
    path = polyadic().write(tmp_path / "t.hdf")
    done = CliRunner().invoke(app, ["score", "cremi", str(path), str(path), "--json", "--threshold-nm", "50"])
    found = json.loads(done.output)
    assert (found["fscore"], found["matches"], found["cleft_mean_distance_false_positives_nm"]) == (
        1.0,
        2,
        0.0,
    )
    assert "fscore" in CliRunner().invoke(app, ["score", "cremi", str(path), str(path)]).output


def _contact(labels: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Give as clefts the voxels of a site with a face to its other side."""
    site = (labels.astype(np.int64) + 1) // 2
    clefts = np.zeros(labels.shape, np.uint64)
    for axis in range(3):
        one = tuple(slice(0, -1) if n == axis else slice(None) for n in range(3))
        next_one = tuple(slice(1, None) if n == axis else slice(None) for n in range(3))
        met = (site[one] == site[next_one]) & (site[one] > 0) & (labels[one] != labels[next_one])
        clefts[one][met] = clefts[next_one][met] = site[one][met]
    return clefts


def test_a_phantoms_labels_come_back_from_its_clefts_and_partners(tmp_path: Path) -> None:
    phantom = make_phantom(size_zyx=(24, 120, 120), voxel_nm=(40, 8, 8), seed=2)
    layers = {"raw": phantom.image, "neurons": phantom.neurons, "clefts": _contact(phantom.labels)}
    made = {name: Layer(of.shape, phantom.grid, [(0, of)]) for name, of in layers.items()}
    write_cremi(tmp_path / "p.hdf", annotations=annotations_of(phantom.partners), **made)
    found = label_cremi(tmp_path / "p.hdf", thickness_nm=76.0)
    keys = ["pre_neuron", "post_neuron", "pre_z_nm", "post_x_nm", "pre_y", "site"]
    assert found.partners[keys].equals(phantom.partners[keys])
    assert found.partners.labelled.all()
    for side in (0, 1):
        true = (phantom.labels > 0) & (phantom.labels % 2 == side) & (found.mask > 0)
        ours = (found.label > 0) & (found.label % 2 == side)
        assert (true & ours).sum() > 0.6 * (true | ours).sum()
        assert (found.label[true & ours] == phantom.labels[true & ours]).mean() > 0.99


def test_ids_beyond_32_bits(tmp_path: Path) -> None:
    tissue = polyadic()
    tissue.neurons[tissue.neurons == POST] = 2**40 + 7
    made = labels_of(tissue, tmp_path)
    assert made.neurons.dtype == np.uint64
    assert made.partners.post_neuron.tolist() == [2**40 + 7, OTHER]
    assert replace(made, doubts=()).sides((slice(3, 4), slice(12, 13), slice(12, 18))).tolist() == [
        [[1, 1, 1, 2, 2, 2]]
    ]
