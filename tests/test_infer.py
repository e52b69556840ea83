"""Volumes predicted by block: whoever computes, whatever ends it, the same probabilities."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from distributed import LocalCluster
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from tracking_tools import migrated_store
from volume_tools import aged, seen_elsewhere

from synmlops.blockwise.folder import JobFolder
from synmlops.cli import main
from synmlops.learning import block_prediction
from synmlops.learning.block_prediction import Mask, measure_grey
from synmlops.learning.checkpoint import ModelMeta, load_model, save_model
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import predict_array
from synmlops.learning.volume_prediction import Engine
from synmlops.params import CHANNELS, InferParams, NetworkParams, SynmlopsError
from synmlops.stages.infer import View, run_on_images
from synmlops.synapses.instances import decode_pairs, sites_of
from synmlops.synapses.matching import match_overlaps, overlaps_of
from synmlops.volumes.files import sha256_of
from synmlops.volumes.prepared import Box
from synmlops.volumes.probabilities import read_probabilities
from synmlops.volumes.resampled import Resampled
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.zarr import create_zarr

NETWORK = NetworkParams(stem_zyx=(1, 2, 2), widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((1, 2, 2),))
PARAMS = InferParams(window_zyx=(4, 32, 32), overlap=0.25, precision="float32")
GRID = Grid((40.0, 8.0, 8.0), (400.0, 80.0, 0.0))
BLOCK = (6, 48, 48)


@dataclass(frozen=True)
class Case:
    """An image on disk and a model with random weights."""

    image: NDArray[np.uint8]
    path: Path
    model: Path

    def whole(self, params: InferParams = PARAMS) -> NDArray[np.uint8]:
        return predict_array(load_model(self.model), self.image, params=params)


def write_model(path: Path, seed: int, **meta: Any) -> Path:
    torch.manual_seed(seed)
    facts = {"channels": CHANNELS, "mean": 128.0, "std": 40.0, "voxel_nm": GRID.voxel_nm, "network": NETWORK}
    made = ModelMeta(**(facts | meta))
    network = build_network(made.network)
    with torch.no_grad():
        network.head.weight *= 8  # type: ignore[union-attr, operator]
    save_model(path, network.state_dict(), made)
    return path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("infer")
    noise = np.random.default_rng(0).normal(size=(14, 100, 90))
    smooth = gaussian_filter(noise, (0.5, 2, 2))
    image = (128 + 40 * smooth / smooth.std()).clip(1, 254).astype(np.uint8)
    write_hdf5(root / "em.h5", {"main": image}, grid=GRID)
    return Case(image, root / "em.h5", write_model(root / "model.safetensors", 1))


def infer(case: Case, out: Path, **more: Any) -> list[Path]:
    given: dict[str, Any] = {"params": PARAMS, "engine": Engine(gpus=0, block_zyx=BLOCK)} | more
    return run_on_images(str(case.path), models=[str(case.model)], out=out, **given)


def same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Within a grey level, as the order of windows in a batch may change."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
@pytest.mark.parametrize("block", [None, (1, 1, 1), (6, 48, 48), (14, 40, 1000)])
def test_blocks_are_the_whole(
    case: Case, tmp_path: Path, suffix: str, block: tuple[int, int, int] | None
) -> None:
    [path] = infer(case, tmp_path, suffix=suffix, engine=Engine(gpus=0, block_zyx=block))
    assert path == tmp_path / f"em{suffix}"
    found = read_probabilities(path)
    assert (found.grid, found.channels) == (GRID, CHANNELS)
    assert np.ptp(found.values_czyx) > 100
    assert same(found.values_czyx, case.whole())
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_memory_is_given_back_twice_for_each_block(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[None] = []
    monkeypatch.setattr(block_prediction, "give_back_freed_memory", lambda: given.append(None))
    [path] = infer(case, tmp_path, suffix=".zarr")
    shards = [one for one in path.joinpath("0", "c").rglob("*") if one.is_file()]  # one for each block
    assert len(given) == 2 * len(shards) > 8


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_several_processes_are_one(case: Case, tmp_path: Path, suffix: str) -> None:
    [path] = infer(case, tmp_path, suffix=suffix, engine=Engine(gpus=0, processes=2, block_zyx=BLOCK))
    assert same(read_probabilities(path).values_czyx, case.whole())


def test_dask_workers_are_one(case: Case, tmp_path: Path) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0", host="127.0.0.1") as cluster:
        engine = Engine(gpus=0, scheduler=cluster.scheduler_address, block_zyx=BLOCK)
        [path] = infer(case, tmp_path, engine=engine)
    assert path.suffix == ".zarr"
    assert same(read_probabilities(path).values_czyx, case.whole())


def test_the_output_appears_with_the_last_part(case: Case, tmp_path: Path) -> None:
    for number in (2, 1, 3):
        engine = Engine(gpus=0, part=(number, 3), block_zyx=BLOCK)
        written = infer(case, tmp_path, engine=engine)
        assert bool(written) == (number == 3)
        assert (tmp_path / "em.zarr").exists() == (number == 3)
    assert same(read_probabilities(tmp_path / "em.zarr").values_czyx, case.whole())
    with pytest.raises(SynmlopsError, match="is there already"):
        infer(case, tmp_path, engine=engine)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
def test_a_tracked_prediction_is_a_run_with_progress(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is a point: what was predicted rises to the whole region, what is left falls to nothing."""
    monkeypatch.setattr("synmlops.stages.infer.METRICS_EVERY_S", 0)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tmp_path / ".synmlops" / "mlflow.db"
    store.parent.mkdir()
    shutil.copy(migrated_store(), store)
    infer(case, tmp_path / "out", tracked=True)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    [run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["model"] == str(case.model)
    assert run.data.params["infer.overlap"] == str(PARAMS.overlap)
    assert run.data.tags["synmlops.data.model"] == sha256_of(case.model)
    done, left = (
        [metric.value for metric in client.get_metric_history(run.info.run_id, name)]
        for name in ("infer_megavoxels", "infer_seconds_left")
    )
    assert len(done) > 3
    assert done == sorted(done)
    assert done[-1] == pytest.approx(case.image.size / 1e6)
    assert left[-1] == 0 < left[0]


def test_parts_of_an_hdf5_file_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match="use --format zarr"):
        infer(case, tmp_path, suffix=".h5", engine=Engine(part=(1, 2)))


def test_work_that_was_ended_goes_on(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from synmlops.learning.predict import Predictor

    calls: list[Box] = []
    compute = Predictor.begin

    def dies(self: Predictor, image: Any, box: Box, **more: Any) -> Any:
        calls.append(box)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, image, box, **more)

    monkeypatch.setattr(Predictor, "begin", dies)
    with pytest.raises(KeyboardInterrupt):
        infer(case, tmp_path)
    assert not (tmp_path / "em.h5").exists()
    before = len(calls)
    [path] = infer(case, tmp_path)
    assert same(read_probabilities(path).values_czyx, case.whole())
    again = [box for box in calls[before:] if box in calls[: before - 2]]
    assert not again  # what was finished is not computed again; what waited to be written may be
    assert len({box.start_zyx for box in calls}) > 4


def test_nothing_is_mixed(case: Case, tmp_path: Path) -> None:
    """An output that was begun with another model, input or setting is refused, and says what differs."""
    folder = JobFolder(tmp_path / "em.h5")
    infer(case, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "kept")
    with pytest.raises(SynmlopsError, match="0 of a part"):
        _end_at_once(case, tmp_path)
    other = write_model(tmp_path / "other.safetensors", 2)
    for change, word in (
        ({"params": PARAMS.model_copy(update={"overlap": 0.5})}, "(params.overlap: 0.25 then, 0.5 now"),
        ({"view": View(roi=Box((0, 0, 0), (4, 64, 64)))}, "region: "),
        ({"view": View(voxel_nm=(41.0, 8.0, 8.0))}, "voxel_nm: "),
        ({"models": [str(other)]}, "models: "),
        ({"engine": Engine(gpus=0, block_zyx=(14, 100, 90))}, "block_zyx: "),
    ):
        given = {"models": [str(case.model)], "params": PARAMS, "engine": Engine(gpus=0, block_zyx=BLOCK)}
        with pytest.raises(SynmlopsError, match="was begun otherwise") as error:
            run_on_images(str(case.path), out=tmp_path, **(given | change))  # type: ignore[arg-type]
        assert word in str(error.value)
        assert str(folder.path) in str(error.value)
    assert infer(case, tmp_path) == [tmp_path / "em.h5"]


@pytest.mark.parametrize("kind", ["image.h5", "image.zarr", "image", "mask.zarr"])
def test_an_input_that_took_anothers_place_is_not_mixed_in(case: Case, tmp_path: Path, kind: str) -> None:
    given = tmp_path / kind

    def put(image: NDArray[np.uint8], *, seconds: float) -> None:
        if kind == "image":
            given.mkdir(exist_ok=True)
            for z, section in enumerate(image):
                tifffile.imwrite(given / f"{z}.tif", section)
        elif kind == "image.h5":
            write_hdf5(given, {"main": image}, grid=GRID)
        else:
            shutil.rmtree(given, ignore_errors=True)
            _zarr_of(Case(image, given, case.model), given)
        aged(given, seconds)

    def infer_it(**more: Any) -> list[Path]:
        is_mask = kind == "mask.zarr"
        view = View(voxel_nm=GRID.voxel_nm, mask=str(given) if is_mask else None)
        return infer(
            Case(case.image, case.path if is_mask else given, case.model), tmp_path / "out", view=view, **more
        )

    put(case.image, seconds=0)
    with pytest.raises(SynmlopsError, match="0 of a part"):
        infer_it(engine=_Ends(gpus=0, block_zyx=BLOCK))
    put(case.image[::-1], seconds=60)
    what = kind.partition(".")[0]
    with pytest.raises(SynmlopsError, match=rf"begun otherwise \({what}.changed: 2001-.* then, 2001-.* now"):
        infer_it()
    put(case.image, seconds=0)
    seen_elsewhere(given)
    assert len(infer_it()) == 1


def test_a_model_is_read_where_blocks_are_computed_alone(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies before that needs none of its weights, and yet a broken one is told of before all else."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("synmlops.learning.checkpoint.load_model", refuse)
    monkeypatch.setattr("synmlops.learning.volume_prediction.load_model", refuse, raising=False)
    with pytest.raises(SynmlopsError, match="0 of a part"):
        _end_at_once(case, tmp_path / "out")
    model, other = load_model(case.model), NETWORK.model_copy(update={"widths": (4, 8)})
    misfit = tmp_path / "misfit.safetensors"
    save_model(misfit, model.network.state_dict(), model.meta.model_copy(update={"network": other}))
    with pytest.raises(SynmlopsError, match=r"misfit.safetensors: the weights do not fit"):
        infer(Case(case.image, case.path, misfit), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_an_earlier_version_began_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match="0 of a part"):
        _end_at_once(case, tmp_path)
    file = JobFolder(tmp_path / "em.h5").path / "job.json"
    facts = json.loads(file.read_text())
    state = case.path.stat()
    earlier = {"image": str(case.path), "bytes_and_time": [state.st_size, state.st_mtime_ns]}
    file.write_text(json.dumps(facts | earlier))
    with pytest.raises(SynmlopsError, match=f"was begun otherwise .*remove {file.parent} to begin anew"):
        infer(case, tmp_path)


def _end_at_once(case: Case, out: Path) -> None:
    """Begin, and end before any block is done."""
    infer(case, out, engine=_Ends(gpus=0, block_zyx=BLOCK))


class _Ends(Engine):
    def run(self, *_: Any) -> None:
        raise SynmlopsError("0 of a part")


def test_a_region_sees_the_tissue_around_it(case: Case, tmp_path: Path) -> None:
    """Where no norm spans the window, a region comes out as in the whole."""
    roi, wide = Box((4, 30, 32), (10, 80, 80)), InferParams(window_zyx=(14, 96, 96), overlap=0.25)
    path = write_model(
        tmp_path / "batch.safetensors", 1, network=NETWORK.model_copy(update={"norm": "batch"})
    )
    local = Case(case.image, case.path, path)
    [written] = infer(local, tmp_path, view=View(roi=roi), params=wide)
    found = read_probabilities(written)
    assert found.grid == GRID.cropped(roi.start_zyx)
    alone = predict_array(load_model(path), case.image[roi.slices], params=wide).astype(int)
    within = local.whole(wide)[(slice(None), *roi.slices)]
    assert same(found.values_czyx, within)
    assert np.abs(alone - within).max() > 20
    with pytest.raises(SynmlopsError, match="beyond"):
        infer(case, tmp_path / "b", view=View(roi=Box((0, 0, 0), (15, 10, 10))))


def test_a_mask_of_another_voxel_size(case: Case, tmp_path: Path) -> None:
    coarse = np.zeros((14, 25, 23), np.uint8)
    coarse[3:9, 5:12, 2:20] = 1
    write_hdf5(tmp_path / "mask.h5", {"main": coarse}, grid=Grid((40.0, 32.0, 32.0), (400.0, 92.0, 12.0)))
    [path] = infer(case, tmp_path, view=View(mask=str(tmp_path / "mask.h5")))
    inside = np.zeros(case.image.shape, bool)
    inside[3:9, 20:48, 8:80] = True
    found, whole = read_probabilities(path).values_czyx, case.whole()
    assert not found[:, ~inside].any()
    assert same(found[:, inside], whole[:, inside])


def test_a_mask_without_a_voxel_size_lies_over_the_volume(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "mask.h5", {"main": np.array([[[0, 1], [1, 0]]], np.uint8)}, grid=None)
    with open_volume(tmp_path / "mask.h5") as volume:
        mask = Mask(volume, GRID, shape_zyx=(3, 4, 6))
        whole = mask.read(Box((0, 0, 0), (3, 4, 6)))
        assert whole[2].tolist() == [[False] * 3 + [True] * 3] * 2 + [[True] * 3 + [False] * 3] * 2
        np.testing.assert_array_equal(mask.read(Box((1, 1, 2), (2, 3, 5))), whole[1:2, 1:3, 2:5])


def test_another_voxel_size_is_resampled_on_the_fly(case: Case, tmp_path: Path) -> None:
    fine = np.repeat(np.repeat(case.image, 2, axis=1), 2, axis=2)
    grid = Grid((40.0, 4.0, 4.0), (400.0, 78.0, -2.0))
    write_hdf5(tmp_path / "fine.h5", {"main": fine}, grid=grid)
    finer = Case(fine, tmp_path / "fine.h5", case.model)
    with pytest.raises(SynmlopsError, match="add --resample"):
        infer(finer, tmp_path / "out")
    [path] = infer(finer, tmp_path / "out", view=View(resample=True))
    found = read_probabilities(path)
    assert found.grid == GRID
    assert same(found.values_czyx, case.whole())
    roi = Box((0, 64, 64), (14, 128, 128))
    [part] = infer(finer, tmp_path / "roi", view=View(resample=True, roi=roi))
    assert read_probabilities(part).grid == GRID.cropped((0, 32, 32))
    assert read_probabilities(part).values_czyx.shape == (3, 14, 32, 32)


@pytest.mark.parametrize("factor", [(1, 2, 3), (1, 1.37, 2.5), (2, 0.5, 0.7), (1, 1, 1)])
def test_resampled_parts_are_the_resampled_whole(factor: tuple[float, float, float]) -> None:
    image = np.random.default_rng(0).integers(0, 60_000, (6, 31, 40), np.uint16)
    seen = Resampled(image, factor)
    whole = seen[(slice(None),) * 3]
    assert whole.shape == seen.shape
    assert whole.dtype == np.uint16
    for z, y, x in np.ndindex(2, 2, 2):
        part = tuple(
            slice(n // 2, n) if second else slice(0, n // 2)
            for second, n in zip((z, y, x), seen.shape, strict=True)
        )
        assert np.abs(seen[part].astype(int) - whole[part]).max() <= 1
    if factor == (1, 2, 3):
        means = image[:, :30, :39].reshape(6, 15, 2, 13, 3).mean((2, 4))
        assert np.abs(whole - means).max() <= 0.51
    ramp = np.broadcast_to(np.arange(40) * 100.0 + 50, (6, 31, 40)).astype(np.uint16)
    world = Grid((1, 1, 1)).pooled(factor)
    at = world.offset_nm[2] + np.arange(seen.shape[2]) * world.voxel_nm[2]
    inner = (at > 0.5) & (at < 38.5)
    middle = Resampled(ramp, factor)[(slice(None),) * 3][0, 0]
    assert np.abs(middle[inner] - (at[inner] * 100 + 50)).max() <= 20  # a value stays where it is


def test_an_ensemble_is_the_mean_of_its_models(case: Case, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.safetensors", 2)
    models = [str(case.model), str(other)]
    [path] = run_on_images(
        str(case.path), models=models, out=tmp_path, params=PARAMS, engine=Engine(gpus=0, block_zyx=BLOCK)
    )
    second = predict_array(load_model(other), case.image, params=PARAMS)
    mean = (case.whole().astype(float) + second) / 2
    assert np.abs(read_probabilities(path).values_czyx - mean).max() <= 1
    assert np.abs(second.astype(int) - case.whole()).max() > 50


def test_grey_levels_of_the_volume(case: Case, tmp_path: Path) -> None:
    """A darker volume of less contrast is predicted as the one that the model knows."""
    image = case.image.astype(np.uint16) * 40 + 3000
    write_hdf5(tmp_path / "deep.h5", {"main": image}, grid=GRID)
    deep = Case(case.image, tmp_path / "deep.h5", case.model)
    own = PARAMS.model_copy(update={"intensity": "volume"})
    [one] = infer(deep, tmp_path / "own", params=own)
    [two] = infer(case, tmp_path / "own", params=own)
    [three] = infer(deep, tmp_path / "training")
    values = [read_probabilities(path).values_czyx.astype(int) for path in (one, two, three)]
    assert np.abs(values[0] - values[1]).max() <= 2
    assert np.abs(values[0] - values[2]).mean() > 10


def test_grey_levels_leave_out_what_is_no_tissue() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(120, 20, (16, 600, 600)).clip(1, 254).astype(np.uint8)
    box = Box((0, 0, 0), image.shape)
    plain = measure_grey(image, box)
    image[:, :, 300:] = 0
    image[3, :100] = 255
    np.testing.assert_allclose(measure_grey(image, box), plain, rtol=0.1)
    assert abs(plain[0] - 120) < 1
    assert measure_grey(np.zeros((2, 4, 4), np.uint8), Box((0, 0, 0), (2, 4, 4))) == (0.0, 1.0)


BORDERLINE = """
import torch
from torch import nn

class Smoothed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.AvgPool3d((1, 5, 5), 1, (0, 2, 2), count_include_pad=False)
        self.levels = nn.Conv3d(1, 3, 1)
        self.levels.weight.data = torch.tensor([-0.3, 0.3, 0.3]).reshape(3, 1, 1, 1, 1)
        self.levels.bias.data = torch.tensor([0.3 * 205, -0.3 * 205, -0.3 * 140])

    def forward(self, image):
        return self.levels(self.mean(image))

def build(params):
    return Smoothed()
"""


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_synapses_on_the_borders_of_blocks_are_found_once_and_whole(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lies across an edge or a corner of blocks, pre on one side and post on the other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "borderline.py").write_text(BORDERLINE)
    own = NetworkParams(name="borderline:build")
    meta = ModelMeta(network=own, channels=CHANNELS, mean=0.0, std=1.0, voxel_nm=GRID.voxel_nm)
    save_model(tmp_path / "model.safetensors", build_network(own).state_dict(), meta)
    image = np.random.default_rng(0).integers(60, 90, (16, 144, 144), np.uint8)
    true = np.zeros(image.shape, np.uint16)
    corners = [(z, y, x) for z in (4, 8, 12) for y in (48, 96) for x in (48, 96)]
    for site, (z, y, x) in enumerate(corners, start=1):
        rows = slice(z - 1, z + 1), slice(y - 6, y + 6)
        image[(*rows, slice(x - 9, x))], image[(*rows, slice(x, x + 9))] = 180, 230
        true[(*rows, slice(x - 9, x))], true[(*rows, slice(x, x + 9))] = 2 * site - 1, 2 * site
    write_hdf5(tmp_path / "em.h5", {"main": image}, grid=GRID)
    params = InferParams(window_zyx=(4, 64, 64), overlap=0.25, precision="float32")
    [path] = run_on_images(
        str(tmp_path / "em.h5"),
        models=[str(tmp_path / "model.safetensors")],
        out=tmp_path / "out",
        params=params,
        engine=Engine(gpus=0, block_zyx=(4, 48, 48)),
        suffix=suffix,
    )
    found = decode_pairs(
        read_probabilities(path).values_czyx, threshold=0.5, side_threshold=0.5, min_voxels=50
    )
    assert len(np.unique(found[found > 0])) == 2 * len(corners)
    assert len(match_overlaps(overlaps_of(sites_of(found), sites_of(true)), iou=0.8)) == len(corners)
    both = (found > 0) & (true > 0)
    assert (found[both] % 2 == true[both] % 2).mean() > 0.7  # post is seen as pre along its edge


def _zarr_of(case: Case, path: Path) -> Path:
    writer = create_zarr(path, case.image.shape, np.uint8, shard=(7, 50, 45), chunk=(7, 50, 45), grid=GRID)
    writer.write((slice(0, 14), slice(0, 100), slice(0, 90)), case.image)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["synmlops", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    tree["infer"] = PARAMS.model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_damaged_chunk_costs_its_blocks_and_says_so(
    case: Case,
    tmp_path: Path,
    params_file: Path,
    processes: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _zarr_of(case, tmp_path / "em.zarr")
    chunk = source / "0/c/1/1/1"
    good = chunk.read_bytes()
    chunk.write_bytes(good[: len(good) // 2])
    given = ["infer", "--params", params_file, "--image", source, "--model", case.model, "--gpus", "0"]
    given += ["--block", "6,48,48", "--out", tmp_path / "out", "--format", "h5", "--processes", processes]
    assert command(monkeypatch, *given) == 3
    said = capsys.readouterr().err
    assert "incomplete" in said
    assert "block " in said
    assert "at z y x = " in said
    assert "em.zarr" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out/em.h5").exists()
    chunk.write_bytes(good)
    assert command(monkeypatch, *given) == 0
    assert same(read_probabilities(tmp_path / "out/em.h5").values_czyx, case.whole())
    assert command(monkeypatch, *given) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "5/4"], "--part 5/4: give a share"),
        (["--roi", "0:4,0:4"], "--roi 0:4,0:4: give voxels"),
        (["--roi", "0:4,5:5,0:4"], "holds no voxel"),
        (["--block", "4,x,4"], "--block 4,x,4: give three whole numbers"),
        (["--format", "tif"], "--format tif: must be h5 or zarr"),
        (["--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers there"),
        (["--mask", "nothing.h5"], "nothing.h5: there is no such file"),
        (["--model", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    case: Case,
    tmp_path: Path,
    params_file: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("synmlops.blockwise.cluster.CONNECT_S", 1)
    given = ["infer", "--params", params_file, "--image", case.path, "--out", tmp_path / "out", "--gpus", "0"]
    if "--model" not in arguments:
        given += ["--model", case.model]
    assert command(monkeypatch, *given, *arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_full_disk_is_told_of_before_anything_is_computed(
    case: Case, tmp_path: Path, params_file: Path
) -> None:
    """On a real disk with too little room for the output."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no namespaces for users here")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=250k tmpfs {disk} && "$@"; echo left with $?'
    command = [sys.executable, "-m", "synmlops", "infer", "--params", str(params_file), "--gpus", "0"]
    command += ["--image", str(case.path), "--model", str(case.model), "--out", str(disk)]
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command], capture_output=True, text=True, check=False
    )
    assert ended.stdout == "left with 2\n"
    assert "cannot be written (No space left on device): the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr
