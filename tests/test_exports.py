"""The partner table in the formats of others, each read back by another reader than its writer."""

import json
import struct
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import tensorstore as ts
from numpy.typing import NDArray
from typer.testing import CliRunner

from synmlops.cli import app
from synmlops.params import SynmlopsError
from synmlops.volumes.exporters import precomputed
from synmlops.volumes.exporters.partners import export_partners
from synmlops.volumes.exporters.precomputed import write_precomputed
from synmlops.volumes.table import COLUMNS, points_nm, write_table

BIG = 720575940621039145  # an id that a float does not hold


def _partners(n: int, *, seed: int = 0) -> pd.DataFrame:
    """Make a partner table: two posts a site, a fifth of the ends in no neuron."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.integers(1, 500, n) for name in COLUMNS}
    pre = rng.uniform((0, 0, 0), (2000, 9000, 9000), (n, 3))
    for axis, name in enumerate("zyx"):
        columns |= {f"pre_{name}_nm": pre[:, axis], f"post_{name}_nm": pre[:, axis] + rng.normal(0, 80, n)}
    columns |= {"site": np.arange(n) // 2 + 1, "partner": np.arange(1, n + 1), "confidence": rng.random(n)}
    for name in ("pre_neuron", "post_neuron"):
        columns[name] = np.where(rng.random(n) < 0.2, 0, BIG + rng.integers(0, 12, n)).astype(np.uint64)
    columns["self_contact"] = (columns["pre_neuron"] == columns["post_neuron"]) & (columns["pre_neuron"] > 0)
    return pd.DataFrame(columns).astype(COLUMNS)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_table(_partners(60), tmp_path / "partners.parquet")
    return tmp_path / "partners.parquet"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".feather"])
def test_flat_tables(table: Path, tmp_path: Path, suffix: str) -> None:
    said = export_partners(table, tmp_path / f"out{suffix}")
    read = {
        ".csv": pd.read_csv,
        ".tsv": lambda path: pd.read_csv(path, sep="\t"),
        ".parquet": lambda path: pyarrow.parquet.read_table(path).to_pandas(),
        ".feather": pd.read_feather,
    }[suffix](tmp_path / f"out{suffix}")
    pd.testing.assert_frame_equal(read.astype(COLUMNS), _partners(60))
    assert said.endswith("60 partners")


def _wiring(partners: pd.DataFrame) -> dict[tuple[int, int], tuple[int, float]]:
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for pre, post, confidence in zip(
        partners.pre_neuron, partners.post_neuron, partners.confidence, strict=True
    ):
        if pre and post:
            count, total = found.get((pre, post), (0, 0.0))
            found[pre, post] = count + 1, total + confidence
    return found


def _read_graph(path: Path) -> Any:
    if path.suffix == ".graphml":
        return networkx.read_graphml(path, node_type=int)
    kinds = (("count", int), ("confidence_sum", float))
    return networkx.read_edgelist(path, create_using=networkx.DiGraph, nodetype=int, data=kinds)


@pytest.mark.parametrize("suffix", [".graphml", ".edges"])
def test_graphs(table: Path, tmp_path: Path, suffix: str) -> None:
    export_partners(table, tmp_path / f"out{suffix}")
    graph, expected = _read_graph(tmp_path / f"out{suffix}"), _wiring(_partners(60))
    assert graph.is_directed()
    assert set(graph.nodes) == {neuron for edge in expected for neuron in edge}
    assert {(pre, post): data["count"] for pre, post, data in graph.edges(data=True)} == {
        edge: count for edge, (count, _) in expected.items()
    }
    for pre, post, data in graph.edges(data=True):
        assert data["confidence_sum"] == pytest.approx(expected[pre, post][1])


def test_bound_points_as_json_lines(table: Path, tmp_path: Path) -> None:
    export_partners(table, tmp_path / "out.jsonl", point_nm=(40.0, 4.0, 4.0))
    rows, partners = (
        [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()],
        _partners(60),
    )
    assert [row["pre_pt"]["root_id"] for row in rows] == partners.pre_neuron.tolist()
    xyz = np.array([[row[end]["position"] for end in ("pre_pt", "post_pt")] for row in rows])
    assert np.allclose(xyz[..., ::-1] * (40, 4, 4), points_nm(partners))
    middle = np.array([row["ctr_pt"]["position"] for row in rows])
    assert np.allclose(middle, xyz.mean(axis=1))
    assert all(row["valid"] is True for row in rows)


def test_bound_points_flat(table: Path, tmp_path: Path) -> None:
    export_partners(table, tmp_path / "out.parquet", format="cave", units="voxel")
    rows, partners = pd.read_parquet(tmp_path / "out.parquet"), _partners(60)
    assert rows.post_pt_root_id.tolist() == partners.post_neuron.tolist()
    assert np.array_equal(np.stack(rows.pre_pt_position.tolist()), partners[["pre_x", "pre_y", "pre_z"]])


def _read_index(folder: Path, said: dict[str, Any]) -> dict[int, bytes]:
    """Read an index of uint64 keys, as files or in shards."""
    folder = folder / said["key"]
    if "sharding" not in said:
        return {int(path.name): path.read_bytes() for path in folder.iterdir()}
    spec = {
        "driver": "neuroglancer_uint64_sharded",
        "metadata": said["sharding"],
        "base": {"driver": "file", "path": f"{folder}/"},
    }
    store = ts.KvStore.open(spec).result()
    return {int.from_bytes(key, "big"): store[key] for key in store.list().result()}


def _properties(info: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Read the properties of one annotation, which follow its six coordinates; each type by its own size."""
    codes = {"float32": "<f", "uint32": "<I", "uint16": "<H", "uint8": "<B"}
    found, at = {}, 24
    for size in (4, 2, 1):
        for one in info["properties"]:
            if struct.calcsize(codes[one["type"]]) == size:
                (found[one["id"]],) = struct.unpack_from(codes[one["type"]], data, at)
                at += size
    found["end"] = at + -at % 4
    return found


def _several(info: dict[str, Any], data: bytes) -> dict[int, bytes]:
    """Read a list of annotations: each by its id."""
    (count,) = struct.unpack_from("<Q", data)
    size = (len(data) - 8 - 8 * count) // count
    assert len(data) == 8 + count * (size + 8)
    assert size == _properties(info, data[8 : 8 + size])["end"]
    ids = struct.unpack_from(f"<{count}Q", data, 8 + count * size)
    return {number: data[8 + n * size : 8 + (n + 1) * size] for n, number in enumerate(ids)}


def _cells_of(level: dict[str, Any], info: dict[str, Any], xyz: NDArray[np.float64]) -> set[tuple[int, ...]]:
    """Give the cells of a level that points lie in."""
    at = (xyz - info["lower_bound"]) // np.array(level["chunk_size"])
    return {tuple(int(n) for n in cell) for cell in np.minimum(at, np.array(level["grid_shape"]) - 1)}


@pytest.mark.parametrize("sharded", [False, True])
def test_annotations_hold_every_line(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Read by the format's description; the shards by tensorstore."""
    if sharded:
        monkeypatch.setattr(precomputed, "MOST_FILES", 5)
        monkeypatch.setattr(precomputed, "_SHARD_KEYS", 8)
    monkeypatch.setattr(precomputed, "CELL_LIMIT", 7)
    folder = tmp_path / "a.precomputed"
    export_partners(table, folder)
    info, partners = json.loads((folder / "info").read_text()), _partners(60)
    assert (info["@type"], info["annotation_type"]) == ("neuroglancer_annotations_v1", "LINE")
    assert list(info["dimensions"].items()) == [(axis, [1e-9, "m"]) for axis in "xyz"]
    assert ("sharding" in info["by_id"]) == sharded
    singles = _read_index(folder, info["by_id"])
    assert sorted(singles) == partners.partner.tolist()
    lines = np.array([struct.unpack_from("<6f", singles[key]) for key in sorted(singles)])
    assert np.allclose(lines.reshape(-1, 2, 3)[..., ::-1], points_nm(partners), atol=1e-3)
    assert (lines.reshape(-1, 3) >= info["lower_bound"]).all()
    assert (lines.reshape(-1, 3) < info["upper_bound"]).all()
    for row in partners.itertuples():
        said = _properties(info, singles[row.partner])
        assert said["confidence"] == pytest.approx(row.confidence, abs=1e-6)
        for name in ("site", "partner", "pre_voxels", "post_voxels", "self_contact"):
            assert said[name] == getattr(row, name)
        ends = b"".join(
            struct.pack("<IQ", 1, end) if end else bytes(4) for end in (row.pre_neuron, row.post_neuron)
        )
        assert singles[row.partner][said["end"] :] == ends


@pytest.mark.parametrize("sharded", [False, True])
def test_annotations_are_found_by_neuron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    monkeypatch.setattr(precomputed, "MOST_FILES", 5 if sharded else 1000)
    partners = _partners(60)
    write_precomputed(partners, tmp_path / "a")
    info = json.loads((tmp_path / "a" / "info").read_text())
    assert [one["id"] for one in info["relationships"]] == ["pre_neuron", "post_neuron"]
    for one in info["relationships"]:
        found = {key: set(_several(info, data)) for key, data in _read_index(tmp_path / "a", one).items()}
        rows = partners[partners[one["id"]] > 0].groupby(one["id"]).partner.agg(set)
        assert found == rows.to_dict()


def test_annotations_are_found_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line stands in one level, in all of its cells that it reaches, and a coarse level is a sample."""
    monkeypatch.setattr(precomputed, "CELL_LIMIT", 20)
    partners = _partners(400)
    write_precomputed(partners, tmp_path / "a")
    info = json.loads((tmp_path / "a" / "info").read_text())
    extent = np.subtract(info["upper_bound"], info["lower_bound"])
    seen: set[int] = set()
    for number, level in enumerate(info["spatial"]):
        assert np.allclose(np.multiply(level["grid_shape"], level["chunk_size"]), extent)
        cells: dict[tuple[int, ...], dict[int, bytes]] = {
            tuple(int(n) for n in path.name.split("_")): _several(info, path.read_bytes())
            for path in (tmp_path / "a" / level["key"]).iterdir()
        }
        assert max(map(len, cells.values())) == level["limit"]
        here = {key: data for cell in cells.values() for key, data in cell.items()}
        assert not seen & set(here)
        seen |= set(here)
        for key, data in here.items():
            ends = np.array(struct.unpack_from("<6f", data)).reshape(2, 3)
            assert all(key in cells[cell] for cell in _cells_of(level, info, ends))
        if number == 0:
            assert level["grid_shape"] == [1, 1, 1]
            assert 5 <= len(here) <= 45  # about the limit
    assert seen == set(partners.partner)
    assert len(info["spatial"]) > 2


def test_lines_move_to_the_middle_of_precomputed_voxels(table: Path, tmp_path: Path) -> None:
    export_partners(table, tmp_path / "a.precomputed", voxel_nm=(40.0, 8.0, 4.0))
    export_partners(table, tmp_path / "b.precomputed")
    a, b = (
        struct.unpack_from("<6f", (tmp_path / name / "by_id" / "7").read_bytes())
        for name in ("a.precomputed", "b.precomputed")
    )
    assert np.subtract(a, b) == pytest.approx([2, 4, 20, 2, 4, 20], abs=1e-3)


def test_annotations_replace_annotations_and_nothing_else(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a.precomputed"
    export_partners(table, folder)
    write_table(_partners(10), table)
    export_partners(table, folder)
    assert len(list((folder / "by_id").iterdir())) == 10
    (tmp_path / "data.precomputed").mkdir()
    (tmp_path / "data.precomputed" / "thesis.tex").write_text("x")
    with pytest.raises(SynmlopsError, match="holds something else than annotations"):
        export_partners(table, tmp_path / "data.precomputed")
    assert (tmp_path / "data.precomputed" / "thesis.tex").exists()


def test_one_place_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells do not shrink without end where lines lie on one another."""
    monkeypatch.setattr(precomputed, "CELL_LIMIT", 5)
    partners = (
        _partners(1).loc[[0] * 50].reset_index(drop=True).assign(partner=np.arange(50, dtype=np.uint64))
    )
    write_precomputed(partners, tmp_path / "a")
    info = json.loads((tmp_path / "a" / "info").read_text())
    found = [
        key
        for level in info["spatial"]
        for path in (tmp_path / "a" / level["key"]).iterdir()
        for key in _several(info, path.read_bytes())
    ]
    assert set(found) == set(range(50))


def test_cremi(table: Path, tmp_path: Path) -> None:
    cremi = pytest.importorskip("synmlops.volumes.cremi")
    export_partners(table, tmp_path / "out.hdf")
    read, partners = cremi.read_annotations(tmp_path / "out.hdf"), _partners(60)
    assert len(read.partners) == len(partners)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a.doc", {}, "its name stands for no format"),
        ("a.csv", {"format": "xml"}, "--format xml: must be table, cave"),
        ("a.csv", {"units": "nm"}, "--units and --point-nm are for CAVE"),
        ("a.csv", {"voxel_nm": (1.0, 1.0, 1.0)}, "--voxel-nm is for precomputed"),
        ("a.jsonl", {"units": "um"}, "--units um"),
    ],
)
def test_faulty_options(table: Path, tmp_path: Path, out: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SynmlopsError, match=message):
        export_partners(table, tmp_path / out, **options)
    assert not (tmp_path / out).exists()


def test_faulty_tables(tmp_path: Path) -> None:
    no_neurons = _partners(5).assign(pre_neuron=np.zeros(5, np.uint64))
    huge = _partners(5).assign(site=np.full(5, 2**32, np.uint64))
    for partners, out, message in (
        (no_neurons, "a.graphml", "none of its 5 partners has a neuron at both ends"),
        (_partners(0), "a.precomputed", "holds no partners"),
        (huge, "a.precomputed", "site 4294967296: neuroglancer's properties have 32 bits"),
    ):
        write_table(partners, tmp_path / "t.parquet")
        with pytest.raises(SynmlopsError, match=message):
            export_partners(tmp_path / "t.parquet", tmp_path / out)
    with pytest.raises(SynmlopsError, match="there is no such file"):
        export_partners(tmp_path / "none.parquet", tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_the_command(table: Path, tmp_path: Path) -> None:
    command = ["export", "partners", str(table), "--to", str(tmp_path / "x.graphml")]
    edges = len(_wiring(_partners(60)))
    assert f"{edges} edges of 60 partners" in CliRunner().invoke(app, command, catch_exceptions=False).output
