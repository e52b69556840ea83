"""Configs of PyTorch Connectomics as params.yaml: nothing set there is dropped without a word."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from synmlops.cli import app
from synmlops.params import SynmlopsError, load_params
from synmlops.volumes.importers.pytc_config import (
    Imported,
    import_config,
    params_of,
    render_table,
    write_params,
)
from synmlops.volumes.importers.pytc_draft import Fate, Row
from synmlops.volumes.importers.pytc_keys import KNOWN_KEYS, V1_KEYS, settings_of
from synmlops.volumes.importers.pytc_survey import survey_volumes
from synmlops.volumes.store import Grid, write_hdf5

POLARITY: dict[str, dict[str, Any]] = {
    "MODEL": {
        "ARCHITECTURE": "unet_plus_3d",
        "BLOCK_TYPE": "residual_se",
        "INPUT_SIZE": [17, 257, 257],
        "OUT_PLANES": 3,
        "TARGET_OPT": ["1"],
        "NORM_MODE": "gn",
        "FILTERS": [32, 64, 96, 128, 192],
        "LOSS_OPTION": [["WeightedBCEWithLogitsLoss", "DiceLoss"]],
        "LOSS_WEIGHT": [[1.0, 0.5]],
        "WEIGHT_OPT": [["1", "0"]],
        "OUTPUT_ACT": [["none", "sigmoid"]],
    },
    "DATASET": {"IMAGE_NAME": "a.h5@b.h5", "LABEL_NAME": ["la.h5", "lb.h5"], "INPUT_PATH": "vol/"},
    "SOLVER": {"BASE_LR": 0.04, "LR_SCHEDULER_NAME": "WarmupCosineLR"},
    "INFERENCE": {"STRIDE": [8, 128, 128]},
}


def _write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def _changed(**sections: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(POLARITY)
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    return tree


def _import(folder: Path, **sections: dict[str, Any]) -> Imported:
    return import_config(_write(folder / "config.yaml", _changed(**sections)))


def _row(imported: Imported, key: str) -> Row:
    return next(row for row in imported.rows if row.key == key)


def test_a_polarity_config_becomes_params_that_load(tmp_path: Path) -> None:
    imported = _import(tmp_path)
    write_params(imported, tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    assert params == imported.params
    assert params.data.train is not None
    assert params.data.train.image == ("vol/a.h5", "vol/b.h5")
    assert params.data.train.label == ("vol/la.h5", "vol/lb.h5")
    assert params.data.train.label_kind == "pairs"
    assert params.data.grey == (127.5, 127.5)
    assert params.network.name == "plus_unet"
    assert (params.loss.bce, params.loss.dice, params.loss.dice_form) == (1.0, 0.5, "sample")
    assert params.loss.foreground_weight_clip == (0.05, 0.95)
    assert (params.train.optimizer, params.train.schedule) == ("sgd", "cosine")
    assert (params.train.warmup_steps, params.train.warmup_from, params.train.warmup_form) == (
        1000, 0.001, "within",
    )  # fmt: skip
    assert (params.infer.blend, params.infer.stride_zyx, params.infer.views) == ("gaussian", (8, 128, 128), 1)
    assert (params.evaluate.rule, params.evaluate.threshold) == ("polarity", 0.5)


def test_sizes_that_the_network_does_not_take_are_rounded_and_the_table_says_so(tmp_path: Path) -> None:
    odd = _import(tmp_path)
    assert odd.params.sampling.patch_zyx == (17, 257, 257)
    assert _row(odd, "MODEL.INPUT_SIZE").fate is Fate.CARRIED
    pooled = _import(tmp_path, MODEL={"ARCHITECTURE": "unet_3d", "POOLING_LAYER": True})
    assert pooled.params.sampling.patch_zyx == (16, 256, 256)
    assert _row(pooled, "MODEL.INPUT_SIZE").fate is Fate.CHANGED


DEFAULTS_OF_THE_REST = {
    "MODEL.BLOCK_TYPE": "residual",
    "MODEL.ISOTROPY": [False, False, False, True, True],
    "MODEL.POOLING_LAYER": False,
    "MODEL.OUT_PLANES": 1,
    "MODEL.OUTPUT_ACT": [["none"]],
}


def test_every_key_of_v1_stands_in_the_table(tmp_path: Path) -> None:
    settings = settings_of({}, source="")
    tree: dict[str, Any] = {}
    for key in V1_KEYS:
        try:
            value = settings.get(key)
        except KeyError:
            value = DEFAULTS_OF_THE_REST.get(key, [])
        *above, leaf = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[leaf] = value
    imported = import_config(_write(tmp_path / "all.yaml", tree))
    assert {row.key for row in imported.rows} == V1_KEYS
    assert all(row.ours or row.why for row in imported.rows)


def test_every_older_key_stands_in_the_table_as_it_is_spelled() -> None:
    values = {"SOLVER.MILESTONES": [10], "MODEL.POOING_LAYER": True}
    for key in KNOWN_KEYS - V1_KEYS:
        section, _, below = key.partition(".")
        tree = _changed()
        tree.setdefault(section, {})[below] = values.get(key, 1)
        if key == "INFERENCE.OUT_PLANES":
            del tree["MODEL"]["OUT_PLANES"]
        assert _row(params_of(settings_of(tree, source="old.yaml")), key).key == key


def test_the_table_names_all_four_fates_and_both_faults(tmp_path: Path) -> None:
    augmentor = {"GRAYSCALE": {"P": 0.5}}
    imported = _import(tmp_path, SYSTEM={"NUM_GPUS": 2}, DATASET={"REDUCE_LABEL": True}, AUGMENTOR=augmentor)
    console = Console(width=200, file=io.StringIO())
    console.print(render_table(imported))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for fate in Fate:
        assert fate.value in text
    assert "SYSTEM.NUM_GPUS: 2" in text
    assert _row(imported, "DATASET.REDUCE_LABEL").fate is Fate.NONE
    assert any("wrap above 127" in note for note in imported.notes)


def test_a_base_is_overridden_key_by_key(tmp_path: Path) -> None:
    base = _write(tmp_path / "base.yaml", _changed())
    over = _write(tmp_path / "over.yaml", {"SOLVER": {"BASE_LR": 0.01, "SAMPLES_PER_BATCH": 3}})
    params = import_config(over, base=base).params
    assert (params.train.learning_rate, params.sampling.batch_size) == (0.01, 3)
    assert params.train.schedule == "cosine"


def test_text_that_is_a_python_value_is_read_as_one(tmp_path: Path) -> None:
    solver = {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": "(300, 350)", "ITERATION_TOTAL": "400"}
    params = _import(tmp_path, SOLVER=solver, INFERENCE={"AUG_NUM": "None"}).params
    assert (params.train.schedule, params.train.milestones, params.infer.views) == (
        "multistep",
        (300, 350),
        1,
    )
    assert params.train.warmup_steps == 400  # no more than there are steps


def test_the_samples_of_all_gpus_count(tmp_path: Path) -> None:
    one = _import(tmp_path, SYSTEM={"NUM_GPUS": 4}, SOLVER={"SAMPLES_PER_BATCH": 3})
    each = _import(tmp_path, SYSTEM={"NUM_GPUS": 4, "DISTRIBUTED": True}, SOLVER={"SAMPLES_PER_BATCH": 3})
    assert (one.params.sampling.batch_size, each.params.sampling.batch_size) == (3, 12)


def test_exclusive_targets_and_their_class_weights(tmp_path: Path) -> None:
    model = {
        "TARGET_OPT": ["1-1"],
        "LOSS_OPTION": [["WeightedCE"]],
        "LOSS_WEIGHT": [[1.0]],
        "WEIGHT_OPT": [["0"]],
        "LOSS_KWARGS_KEY": [[["class_weight"]]],
        "LOSS_KWARGS_VAL": [[[[1.0, 10.0, 10.0]]]],
    }
    params = _import(tmp_path, MODEL=model).params
    low, high = params.loss.foreground_weight_clip
    assert params.network.exclusive
    assert params.evaluate.polarity.exclusive
    assert (params.loss.cross_entropy, params.loss.bce) == (1.0, 0.0)
    assert low == high
    assert (1 - low) / low == pytest.approx(10)  # what foreground weighs, against 1 of background


def test_the_penalty_on_overlap_has_its_factor_inside(tmp_path: Path) -> None:
    model = {"REGU_OPT": ["Nonoverlap"], "REGU_TARGET": [[0]], "REGU_WEIGHT": [4.0]}
    assert _import(tmp_path, MODEL=model).params.loss.overlap == 1.0


def test_of_several_targets_the_one_of_synapses_is_taken(tmp_path: Path) -> None:
    model = {
        "TARGET_OPT": ["6-2d-4-50", "0"],
        "LOSS_OPTION": [["WeightedMSE"], ["WeightedBCEWithLogitsLoss", "DiceLoss"]],
        "LOSS_WEIGHT": [[4.0], [2.0, 0.25]],
        "WEIGHT_OPT": [["0"], ["1", "0"]],
        "OUT_PLANES": 2,
    }
    imported = _import(tmp_path, MODEL=model)
    assert imported.params.data.train is not None
    assert imported.params.data.train.label_kind == "union"
    assert (imported.params.loss.bce, imported.params.loss.dice) == (2.0, 0.25)
    row = _row(imported, "MODEL.TARGET_OPT")
    assert row.fate is Fate.CHANGED
    assert "6-2d-4-50" in row.why


def test_what_is_enabled_is_augmented_and_nothing_else(tmp_path: Path) -> None:
    augmentor = {
        "RESCALE": {"ENABLED": False},
        "ROTATE": {"ROT90": False, "P": 0.4},
        "FLIP": {"P": 0.5},
        "MOTIONBLUR": {"P": 0.2, "KERNEL_SIZE": 7},
        "CUTBLUR": {"ENABLED": False, "P": 0.9},
    }
    augment = _import(tmp_path, AUGMENTOR=augmentor).params.augment
    assert augment.scale.probability == augment.cut_blur.probability == 0
    assert (augment.rotate.probability, augment.rotate.degrees) == (0.4, 180.0)
    assert (augment.flip, augment.quarter_turn) == (0.25, 0.25)
    assert (augment.motion_blur.probability, augment.motion_blur.length) == (0.2, 7)
    assert augment.noise.probability == augment.defocus.probability == augment.invert == 0
    off = _import(tmp_path, AUGMENTOR={"ENABLED": False}).params.augment
    assert off.flip == off.intensity.probability == off.missing_section.probability == 0


def test_v0_is_told_by_its_names_and_has_its_own_defaults(tmp_path: Path) -> None:
    model = {"ARCHITECTURE": "unet_residual_3d", "NORM_MODE": "bn", "PAD_MODE": "rep", "ACT_MODE": "leaky"}
    tree = _changed(MODEL=model)
    del tree["MODEL"]["BLOCK_TYPE"]
    imported = import_config(_write(tmp_path / "v0.yaml", tree))
    network = imported.params.network
    assert imported.version == "v0"
    assert (network.name, network.activation, network.pools[0]) == ("residual_unet", "leaky_relu", (1, 2, 2))
    assert imported.params.sampling.batch_size == 16
    assert _row(imported, "MODEL.ARCHITECTURE").fate is Fate.CHANGED


# paths


def test_names_in_a_list_file_are_joined_once(tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_text("one.h5\n\n/far/two.h5\n")
    dataset = {"IMAGE_NAME": str(tmp_path / "images.txt"), "LABEL_NAME": "l1.h5@l2.h5", "INPUT_PATH": "vol"}
    train = _import(tmp_path, DATASET=dataset).params.data.train
    assert train is not None
    assert train.image == ("vol/one.h5", "/far/two.h5")


def test_a_folder_for_each_file_and_absolute_paths(tmp_path: Path) -> None:
    each = _import(tmp_path, DATASET={"INPUT_PATH": "x@y"}).params.data.train
    assert each is not None
    assert (each.image, each.label) == (("x/a.h5", "y/b.h5"), ("x/la.h5", "y/lb.h5"))
    given = _import(tmp_path, DATASET={"IS_ABSOLUTE_PATH": True, "INPUT_PATH": "x"}).params.data.train
    assert given is not None
    assert given.image == ("a.h5", "b.h5")


def test_validation_and_test_where_both_are_named(tmp_path: Path) -> None:
    imported = _import(
        tmp_path,
        DATASET={"VAL_IMAGE_NAME": "v.h5", "VAL_LABEL_NAME": "lv.h5", "VALID_MASK_NAME": "ma.h5@mb.h5"},
        INFERENCE={"IMAGE_NAME": "t.h5", "INPUT_PATH": "elsewhere"},
    )
    data = imported.params.data
    assert data.split is None
    assert data.train is not None
    assert data.validation is not None
    assert data.test is not None
    assert (data.validation.image, data.validation.label) == ("vol/v.h5", "vol/lv.h5")
    assert (data.test.image, data.test.label) == ("elsewhere/t.h5", None)
    assert data.train.mask == ("vol/ma.h5", "vol/mb.h5")
    assert imported.params.sampling.min_trusted == 0.5


def test_without_them_scores_come_from_a_split_wider_than_the_network_sees(tmp_path: Path) -> None:
    imported = _import(tmp_path, INFERENCE={"IMAGE_NAME": "t.h5"})
    split = imported.params.data.split
    assert split is not None
    assert split.guard >= imported.params.network.receptive_field_zyx()[1]
    assert "infer --image vol/t.h5" in _row(imported, "INFERENCE.IMAGE_NAME").why


def test_the_first_dataset_of_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vol").mkdir()
    block = np.zeros((2, 2, 2), np.uint8)
    write_hdf5(tmp_path / "vol" / "a.h5", {"raw": block, "main": block, "image": block}, grid=None)
    train = _import(tmp_path).params.data.train
    assert train is not None
    assert train.image == ("vol/a.h5::image", "vol/b.h5")


def test_grey_of_wide_images_is_left_to_themselves(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "wide.h5", {"main": np.zeros((2, 2, 2), np.uint16)}, grid=None)
    dataset = {"IMAGE_NAME": "wide.h5@a.h5", "INPUT_PATH": str(tmp_path), "MEAN": 0.4}
    imported = _import(tmp_path, DATASET=dataset)
    assert imported.params.data.grey is None
    assert _row(imported, "DATASET.MEAN").fate is Fate.CHANGED
    assert _import(tmp_path, DATASET={"MEAN": 0.4, "STD": 0.2}).params.data.grey == (102.0, 51.0)


def test_scales_become_pooling(tmp_path: Path) -> None:
    half = _import(tmp_path, DATASET={"DATA_SCALE": [1.0, 0.5, 0.33]})
    assert half.params.data.pool_zyx == (1, 2, 3)
    odd = _import(tmp_path, DATASET={"DATA_SCALE": [1.0, 0.7, 0.7]})
    assert odd.params.data.pool_zyx == (1, 1, 1)
    assert _row(odd, "DATASET.DATA_SCALE").fate is Fate.NONE


# what cannot be


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"MODEL": {"FILTER": [8]}}, ("MODEL.FILTER (did you mean MODEL.FILTERS?)",)),
        ({"MONAI": {"USE_TRANSFORMS": True}}, ("MONAI.USE_TRANSFORMS", "do not know")),
        ({"MODEL": {"TARGET_OPT": ["2"]}}, ("MODEL.TARGET_OPT", "['2']", "of synapses")),
        ({"MODEL": {"LOSS_OPTION": [["WeightedMSE", "WeightedMAE"]]}}, ("MODEL.LOSS_OPTION", "WeightedMSE")),
        ({"MODEL": {"ARCHITECTURE": "fpn_3d"}}, ("MODEL.ARCHITECTURE", "fpn_3d", "unet_plus_3d")),
        ({"MODEL": {"IN_PLANES": 4}}, ("MODEL.IN_PLANES", "4")),
        ({"DATASET": {"DO_2D": True}}, ("DATASET.DO_2D",)),
        ({"DATASET": {"LABEL_NAME": "one.h5"}}, ("DATASET.LABEL_NAME", "1 files", "2")),
        ({"DATASET": {"INPUT_PATH": "x@y@z"}}, ("DATASET.INPUT_PATH", "3 folders")),
        ({"DATASET": {"IMAGE_NAME": "none.txt"}}, ("DATASET.IMAGE_NAME", "none.txt")),
        ({"SOLVER": {"BASE_LR": "high"}}, ("SOLVER.BASE_LR", "number", "high")),
        ({"SOLVER": {"LR_SCHEDULER_NAME": "Poly"}}, ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")),
        ({"SOLVER": {"BASE_LR": -1}}, ("train.learning_rate", "-1")),
        ({"INFERENCE": {"AUG_NUM": 5}}, ("INFERENCE.AUG_NUM", "4, 8 or 16")),
        ({"SOLVER": {"STEPS": [5], "MILESTONES": [5]}}, ("two names of one key",)),
    ],
)
def test_one_clear_error_and_nothing_written(
    tmp_path: Path, sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    config, out = _write(tmp_path / "config.yaml", _changed(**sections)), tmp_path / "params.yaml"
    with pytest.raises(SynmlopsError) as caught:
        write_params(import_config(config), out)
    for word in words:
        assert word in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model: {name: unet}\nsystem: {}\n", "PyTorch Connectomics 2"),
        ("lr: 0.1\n", "sections MODEL"),
        ("NET: {A: 1}\n", "another tool or version"),
        ("[1, 2", "not valid YAML"),
        ("{}", "sets nothing"),
    ],
)
def test_a_config_of_another_tool_or_version_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(SynmlopsError, match=word):
        import_config(path)
    with pytest.raises(SynmlopsError, match="No such file"):
        import_config(tmp_path / "missing.yaml")


# the command


def _volumes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((4, 24, 24), np.uint8)
    label[1:3, 4:8, 4:8], label[1:3, 4:8, 8:12] = 1, 2
    label[1:3, 14:18, 4:8], label[1:3, 14:18, 8:12] = 3, 4
    grid = Grid((40.0, 8.0, 8.0))
    write_hdf5(folder / "a.h5", {"main": rng.integers(0, 255, label.shape, np.uint8)}, grid=grid)
    write_hdf5(folder / "la.h5", {"main": label}, grid=None)


def test_a_dry_run_looks_at_the_volumes_and_writes_a_picture_alone(tmp_path: Path) -> None:
    _volumes(tmp_path)
    dataset = {"IMAGE_NAME": "a.h5", "LABEL_NAME": "la.h5", "INPUT_PATH": str(tmp_path)}
    config = _write(tmp_path / "config.yaml", _changed(DATASET=dataset, INFERENCE={"IMAGE_NAME": "t.h5"}))
    before, out = set(tmp_path.iterdir()), tmp_path / "params.yaml"
    arguments = ["import", "pytc", str(config), "--out", str(out), "--dry-run"]
    picture = tmp_path / "seen.png"
    done = CliRunner().invoke(app, [*arguments, "--picture", str(picture)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert "4 x 24 x 24 uint8, voxels of 40 x 8 x 8 nm" in done.output
    assert "pairs: 2 sites" in done.output
    assert set(tmp_path.iterdir()) - before == {picture}


def test_a_missing_volume_is_a_remark(tmp_path: Path) -> None:
    config = _write(tmp_path / "config.yaml", _changed())
    arguments = ["import", "pytc", str(config), "--dry-run", "--picture", str(tmp_path / "seen.png")]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert "vol/a.h5 is not there" in done.output
    assert not (tmp_path / "seen.png").exists()


def test_params_that_are_there_are_not_replaced_unless_told(tmp_path: Path) -> None:
    config, out = _write(tmp_path / "config.yaml", _changed()), tmp_path / "params.yaml"
    out.write_text("mine")
    arguments = ["import", "pytc", str(config), "--out", str(out), "--voxel-nm", "30,8,8"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, SynmlopsError)
    assert out.read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert load_params(out).data.voxel_nm == (30.0, 8.0, 8.0)


def test_a_label_that_looks_like_an_image_or_another_kind_is_odd(tmp_path: Path) -> None:
    _volumes(tmp_path)
    semantic = np.zeros((4, 24, 24), np.uint8)
    semantic[1:3, 4:8, 4:8], semantic[1:3, 4:8, 8:12] = 1, 2
    write_hdf5(tmp_path / "sem.h5", {"main": semantic}, grid=None)
    dataset = {"IMAGE_NAME": "a.h5@a.h5", "LABEL_NAME": "a.h5@sem.h5", "INPUT_PATH": str(tmp_path)}
    odd = survey_volumes(_import(tmp_path, DATASET=dataset).params.data).odd
    assert any("a.h5: is named as a label, but it looks like image" in sentence for sentence in odd)
    assert any("sem.h5: is taken for pairs, but it looks like semantic" in sentence for sentence in odd)
