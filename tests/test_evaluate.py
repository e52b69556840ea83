"""Train, infer and evaluate on labels of different kinds, and the choice of the operating point."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import make_blobs, tiny_params

from synmlops.layout import RUN_FILE
from synmlops.learning.checkpoint import read_meta
from synmlops.learning.volume_prediction import Engine
from synmlops.params import (
    CHANNELS,
    DataParams,
    EvaluateParams,
    Params,
    PolarityParams,
    SplitParams,
    SynmlopsError,
    VolumeSet,
)
from synmlops.stages import evaluate, infer, prepare, train
from synmlops.volumes.prepared import Box, PreparedVolume, Region
from synmlops.volumes.preparing import Source, prepare_volume
from synmlops.volumes.probabilities import Probabilities
from synmlops.volumes.store import Grid, open_volume, write_hdf5

ROLES = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, with a store that is never there: tracking has tests of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "params.yaml").touch()


def _volume(name: str, seed: int, kind: str, *, width: int = 48) -> VolumeSet:
    blobs = make_blobs(seed, shape=(10, 48, width), n=width // 8)
    label = {
        "pairs": blobs.pairs,
        "semantic": (blobs.pairs > 0).astype(np.uint8) + ((blobs.pairs > 0) & (blobs.pairs % 2 == 0)),
        "union": (blobs.pairs > 0).astype(np.uint8),
    }[kind].astype(np.uint16)
    path = blobs.write(Path(f"{name}.h5"), label=label)
    return VolumeSet(image=f"{path}::image", label=f"{path}::label", label_kind=kind)  # type: ignore[arg-type]


def _both(one: VolumeSet, other: VolumeSet) -> VolumeSet:
    joined = {name: f"{getattr(one, name)}@{getattr(other, name)}" for name in ("image", "label")}
    return VolumeSet(**joined, label_kind=(one.label_kind, other.label_kind))  # type: ignore[arg-type]


def _run(
    data: DataParams, *, exclusive: bool = False, **evaluation: object
) -> tuple[Params, evaluate.Evaluation]:
    params = tiny_params(data)
    network = params.network.model_copy(update={"exclusive": exclusive})
    params = params.model_copy(update={"network": network})
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update=evaluation)})
    folders = {name: Path(name) for name in ("prepared", "models", "predicted", "evaluated")}
    prepare.run(data, out=folders["prepared"])
    train.run(params, prepared=folders["prepared"], out=folders["models"], gpus=0)
    infer.run(
        params,
        prepared=folders["prepared"],
        models=folders["models"],
        out=folders["predicted"],
        engine=Engine(gpus=0),
    )
    found = evaluate.run(
        params,
        prepared=folders["prepared"],
        predicted=folders["predicted"],
        curves=folders["models"] / "history.csv",
        out=folders["evaluated"],
    )
    return params, found


def test_labels_of_all_kinds_mix_in_one_training() -> None:
    data = DataParams(
        train=_both(_volume("a", 1, "pairs"), _volume("b", 2, "union")),
        validation=_volume("c", 3, "semantic"),
        test=_both(_volume("d", 4, "union"), _volume("e", 5, "pairs")),
    )
    _, found = _run(data)
    assert read_meta(Path("models/model.safetensors")).channels == ("pre", "post", "union")
    counts = found.scores.voxels
    n = {name: int((make_blobs(seed).pairs > 0).sum()) for name, seed in (("d", 4), ("e", 5))}
    assert counts["union"].true == n["d"] + n["e"]
    assert counts["pre"].true + counts["post"].true == n["e"]  # the union label knows no sides
    assert "partner_f1" in found.metrics
    assert found.operating_points["all"].source == "validation"


def test_a_union_model_predicts_decodes_and_scores_the_union_alone() -> None:
    data = DataParams(**{role: _volume(role, n, "union") for n, role in enumerate(ROLES)})
    _, found = _run(data)
    assert read_meta(Path("models/model.safetensors")).channels == ("union",)
    with open_volume("predicted/all/test/test.h5", ndim=4) as volume:
        assert volume.shape[0] == 1
        assert volume.attrs["channels"] == ["union"]
    assert set(found.scores.voxels) == {"union"}
    assert not {"partner_f1", "direction_accuracy", "voxel_pre_f1"} & set(found.metrics)
    assert not Path("evaluated/partners").exists()
    assert "Direction" not in Path("evaluated/report.html").read_text()


def test_folds_pool_their_scores_and_choose_thresholds_on_each_other() -> None:
    whole = _volume("a", 1, "union", width=160)
    data = DataParams(train=whole, split=SplitParams(axis="x", bands=2, guard=40))
    _, found = _run(data)
    assert set(found.operating_points) == {"1", "2"}
    assert {point.source for point in found.operating_points.values()} == {"test regions of the other folds"}
    with open_volume("a.h5::label") as label:
        assert found.scores.voxels["union"].true == np.count_nonzero(label.read())
    assert sorted(path.name for path in Path("models").glob("model_*")) == [
        "model_1.safetensors",
        "model_2.safetensors",
    ]
    assert set(pd.read_csv("models/history.csv")["fold"]) == {1, 2}


def test_a_given_threshold_is_taken_and_a_stored_one_names_its_model() -> None:
    data = DataParams(**{role: _volume(role, n, "pairs") for n, role in enumerate(ROLES)})
    _, found = _run(data, threshold=0.25)
    point = json.loads(Path("evaluated/operating_point.json").read_text())["all"]
    assert point["threshold"] == found.metrics["threshold"] == 0.25
    assert point["source"] == "given"
    assert len(point["model_sha256"]) == 64
    assert (
        json.loads(Path("predicted", RUN_FILE).read_text())["data"]["model.safetensors"]
        == point["model_sha256"]
    )


def test_auto_refuses_where_nothing_but_the_test_region_is_labelled() -> None:
    unlabelled = VolumeSet(image=_volume("v", 1, "pairs").image)
    data = DataParams(train=_volume("a", 0, "pairs"), validation=unlabelled, test=_volume("t", 2, "pairs"))
    with pytest.raises(SynmlopsError, match=r"evaluate\.threshold: auto"):
        _run(data)
    assert not Path("evaluated").exists()


def test_an_exclusive_model_writes_pre_and_post_that_add_up_to_the_union() -> None:
    data = DataParams(**{role: _volume(role, n, "pairs") for n, role in enumerate(ROLES)})
    _, found = _run(data, exclusive=True)
    with open_volume("predicted/all/test/test.h5", ndim=4) as volume:
        pre, post, union = volume.read().astype(int)
    assert np.abs(pre + post - union).max() <= 1  # each is rounded by itself
    assert union.std() > 0
    assert "partner_f1" in found.metrics


def _perfect(region: Region, volume: PreparedVolume, extra: tuple[slice, slice, slice]) -> Probabilities:
    """Predict just what the label says, and a synapse too many."""
    label = volume.read("label", region.box)
    assert label is not None
    planes = np.stack([label % 2 == 1, (label > 0) & (label % 2 == 0), label > 0])
    z, y, x = extra
    planes[:, z, y, x] = True
    planes[0, z, y, x.start : x.start + 4] = False
    planes[1, z, y, x.start + 4 : x.stop] = False
    return Probabilities((planes * 255).astype(np.uint8), CHANNELS, volume.grid)


def _prepared(label: np.ndarray, kind: str, **parts: np.ndarray) -> tuple[Region, PreparedVolume]:
    arrays = {"image": make_blobs(0, shape=label.shape).image, "label": label, **parts}
    write_hdf5("v.h5", arrays, grid=Grid((40.0, 8.0, 8.0)))
    named = {name: f"v.h5::{name}" for name in arrays}
    source = Source(name="v_prepared", kind=kind, **named)  # type: ignore[arg-type]
    volume = prepare_volume(source, Path(), voxel_nm=None, pool_zyx=(1, 1, 1)).volume
    return Region("v", "v_prepared", Box((0, 0, 0), volume.shape_zyx)), volume


def _two_sites() -> np.ndarray:
    """Sites 1 and 2, one in each half along x; 3 x 6 x 8 voxels each."""
    label = np.zeros((6, 24, 48), np.uint16)
    for site, x in ((1, 6), (2, 34)):
        label[1:4, 8:14, x : x + 4], label[1:4, 8:14, x + 4 : x + 8] = 2 * site - 1, 2 * site
    return label


LIMITS = EvaluateParams(min_voxels=10, min_side_voxels=4)


def test_what_lies_outside_the_valid_mask_counts_in_no_score() -> None:
    """A true site and a false prediction in the untrusted half: neither is missed or false, nor shown."""
    mask = np.ones((6, 24, 48), np.uint8)
    mask[:, :, 24:] = 0
    region, volume = _prepared(_two_sites(), "pairs", mask=mask)
    probabilities = _perfect(region, volume, (slice(1, 4), slice(18, 23), slice(36, 44)))
    one = evaluate._evaluate_region(region, volume, probabilities, fold="all", threshold=0.5, params=LIMITS)
    assert one.scores is not None
    flat = one.scores.flat()
    for name in ("voxel_union", "voxel_pre", "detection", "detection_centroid", "partner"):
        assert flat[f"{name}_f1"] == 1
    assert flat["partner_true"] == flat["partner_predicted"] == flat["detection_true"] == 1
    assert one.partners is not None
    assert len(one.partners) == 3  # the table that is written holds all that was found
    assert one.view.predicted_partners is not None
    assert len(one.view.predicted_partners) == 1
    assert one.view.true is not None
    assert not one.view.predicted[:, :, 24:].any()
    assert not one.view.true[:, :, 24:].any()


def test_a_model_with_sides_is_compared_with_a_union_label_by_whole_synapses() -> None:
    pairs = _two_sites()
    region, volume = _prepared((pairs > 0).astype(np.uint16), "union")
    planes = np.stack([pairs % 2 == 1, (pairs > 0) & (pairs % 2 == 0), pairs > 0])
    probabilities = Probabilities((planes * 255).astype(np.uint8), CHANNELS, volume.grid)
    one = evaluate._evaluate_region(region, volume, probabilities, fold="all", threshold=0.5, params=LIMITS)
    assert one.scores is not None
    assert one.scores.flat()["detection_f1"] == 1
    assert not one.view.sides
    assert one.view.true is not None
    assert np.array_equal(one.view.predicted, one.view.true)
    assert np.array_equal(np.unique(one.instances), [0, 1, 2, 3, 4])  # what is written keeps the sides


def test_the_rule_polarity_is_scored_like_any_other() -> None:
    region, volume = _prepared(_two_sites(), "pairs")
    probabilities = _perfect(region, volume, (slice(1, 4), slice(18, 23), slice(36, 44)))
    rule = EvaluateParams(rule="polarity", polarity=PolarityParams(min_voxels=61, dilate_yx=1))
    one = evaluate._evaluate_region(region, volume, probabilities, fold="all", threshold=0.5, params=rule)
    assert one.scores is not None
    assert one.scores.flat()["detection_f1"] == one.scores.flat()["partner_f1"] == 1
    np.testing.assert_array_equal(one.instances, _two_sites())  # the sides of the one too many have 60 voxels


def test_what_leaves_nothing_to_score_is_refused_before_anything_is_read() -> None:
    params = tiny_params(DataParams(train=_volume("v", 0, "pairs"), split=SplitParams(guard=40)))
    rule = EvaluateParams(rule="polarity", polarity=PolarityParams(semantic=True))
    with pytest.raises(SynmlopsError, match=r"evaluate\.polarity\.semantic: true leaves no instances"):
        evaluate.run(
            params.model_copy(update={"evaluate": rule}),
            prepared=Path("nowhere"),
            predicted=Path("nowhere"),
            curves=Path("nowhere"),
            out=Path("evaluated"),
        )
    assert not Path("evaluated").exists()


def test_predictions_of_other_folds_are_one_message() -> None:
    data = DataParams(**{role: _volume(role, n, "pairs") for n, role in enumerate(ROLES)})
    params, _ = _run(data)
    record = json.loads(Path("predicted", RUN_FILE).read_text())
    record["data"] = {"model_1.safetensors": "0" * 64}
    Path("predicted", RUN_FILE).write_text(json.dumps(record))
    folders = {name: Path(name) for name in ("prepared", "predicted")}
    with pytest.raises(SynmlopsError, match="synmlops infer"):
        evaluate.run(params, **folders, curves=Path("none"), out=Path("other"))
