from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from synmlops.params import (
    DataParams,
    NetworkParams,
    Params,
    PhantomParams,
    SynmlopsError,
    flatten,
    load_params,
    sections,
)

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "params.yaml", *sorted(ROOT.glob("examples/*/params.yaml"))]
VOLUMES = {"image": "a.h5@b.h5", "label": ["c.h5", "d.h5"], "label_kind": "pairs"}
WIDE_SPLIT = {"axis": "y", "bands": 4, "guard": 500}
DROP = object()

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a complete params.yaml with some dotted keys changed, or dropped."""

    def changed(changes: dict[str, Any] | None = None) -> Path:
        tree = yaml.safe_load(yaml.safe_dump(Params(data=_phantom()).model_dump(mode="json")))
        for dotted, value in (changes or {}).items():
            node = tree
            *sections, leaf = dotted.split(".")
            for section in sections:
                node = node[section]
            if value is DROP:
                del node[leaf]
            else:
                node[leaf] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return changed


def _phantom() -> DataParams:
    return DataParams(phantom=PhantomParams())


def _complaint(path: Path) -> str:
    with pytest.raises(SynmlopsError) as caught:
        load_params(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    for noise in (
        "pydantic",
        "Input should",
        "literal[",
        "tuple[",
        "constrained",
        "Value error",
        "Field requ",
    ):
        assert noise not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_files_of_the_repository_load_and_are_complete(path: Path) -> None:
    params = load_params(path)
    stands = flatten(yaml.safe_load(path.read_text()))
    assert set(flatten(params)) - set(stands) <= {  # a set of volumes needs only what it has
        f"data.{role}.{name}"
        for role in ("train", "validation", "test")
        for name in ("neurons", "mask", "partners")
    }


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("evaluate.treshold", "evaluate.threshold"),
        ("sampling.batchsize", "sampling.batch_size"),
        ("data.phantom.sise_zyx", "data.phantom.size_zyx"),
        ("train.validation.windows_zyx", "train.validation.window_zyx"),
        ("learning_rate", "train.learning_rate"),  # at the wrong level
        ("train.patch_zyx", "sampling.patch_zyx"),  # in the wrong section
        ("trian", "train"),
    ],
)
def test_unknown_key_names_the_nearest_known(write: Write, key: str, meant: str) -> None:
    assert _complaint(write({key: 1})) == f"{key}: unknown key; did you mean {meant}?"


def test_misspelt_key_is_one_problem_not_two(write: Write) -> None:
    path = write({"train.steps": DROP, "train.stepz": 5})
    assert _complaint(path) == "train.stepz: unknown key; did you mean train.steps?"


def test_unknown_key_like_no_other_gets_no_advice(write: Write) -> None:
    assert _complaint(write({"loss.qqqqq": 1})) == "loss.qqqqq: unknown key"
    assert _complaint(write({"7": 1})) == "7: unknown key"


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("seed", "0"),
        ("train.steps", str(Params(data=_phantom()).train.steps)),
        ("network.stem_zyx", str(list(NetworkParams().stem_zyx))),
        ("network.norm", "group"),
        ("data.split", "null"),
        ("evaluate.threshold", "auto"),
        ("augment.rotate", "{probability: 0.0, degrees: 180.0}"),
        ("augment.noise.deviation", "0.5"),
    ],
)
def test_missing_key_gives_its_default(write: Write, key: str, default: str) -> None:
    assert _complaint(write({key: DROP})) == f"{key} is missing; add it (default: {default})"


def test_missing_data_has_no_default(write: Write) -> None:
    assert _complaint(write({"data": DROP})) == "data is missing; add it"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("seed", "x", "seed: must be a whole number, got 'x'"),
        ("seed", -1, "seed: must be at least 0, got -1"),
        ("train.steps", 1.5, "train.steps: must be a whole number, got 1.5"),
        ("train.steps", 0, "train.steps: must be at least 1, got 0"),
        ("train.learning_rate", 0, "train.learning_rate: must be more than 0, got 0"),
        ("train.learning_rate", "fast", "train.learning_rate: must be a number, got 'fast'"),
        ("train.learning_rate", float("inf"), "train.learning_rate: must be a finite number, got inf"),
        ("train.learning_rate", float("nan"), "train.learning_rate: must be a finite number, got nan"),
        ("augment.flip", None, "augment.flip: must be a number, got null"),
        ("infer.overlap", 0.9, "infer.overlap: must be at most 0.75, got 0.9"),
        ("network.norm", "grup", "network.norm: must be 'group', 'batch' or 'instance', got 'grup'"),
        ("augment.scale.factor", 3, "augment.scale.factor: must be at most 2, got 3"),
        ("augment.elastic", 0.5, "augment.elastic: must be a section of keys, got 0.5"),
        ("augment.rotat", {}, "augment.rotat: unknown key; did you mean augment.rotate?"),
        ("train.optimizer", "lion", "train.optimizer: must be 'adamw', 'adam' or 'sgd', got 'lion'"),
        ("train.ema", 1, "train.ema: must be less than 1, got 1"),
        ("sampling.centred", 2, "sampling.centred: must be at most 1, got 2"),
        ("train.precision", "half", "train.precision: must be 'auto', 'bf16' or 'float32', got 'half'"),
        ("sampling.patch_zyx", 8, "sampling.patch_zyx: must be a list, got 8"),
        ("sampling.patch_zyx", [8], "sampling.patch_zyx: must be a list of 3, got [8]"),
        ("sampling.patch_zyx", [8, 8, 8, 8], "sampling.patch_zyx: must be a list of 3, got [8, 8, 8, 8]"),
        ("sampling.patch_zyx", [8, "b", 8], "sampling.patch_zyx[1]: must be a whole number, got 'b'"),
        ("network.widths", [], "network.widths: must be a list of at least 1, got []"),
        ("network.pools", [[1, 2]], "network.pools[0]: must be a list of 3, got [1, 2]"),
        ("data.voxel_nm", [40, 8, -8], "data.voxel_nm[2]: must be more than 0, got -8"),
        ("data.phantom.train_seeds", [], "data.phantom.train_seeds: must be a list of at least 1, got []"),
        ("loss.foreground_weight_clip", [0.1], "loss.foreground_weight_clip: must be a list of 2, got [0.1]"),
        (
            "loss.foreground_weight_clip",
            [0, 0.9],
            "loss.foreground_weight_clip[0]: must be more than 0, got 0",
        ),
        ("loss", None, "loss: must be a section of keys, got null"),
        ("train", [1, 2], "train: must be a section of keys, got [1, 2]"),
        ("evaluate.threshold", "aut", "evaluate.threshold: must be 'auto' or a number, got 'aut'"),
        ("evaluate.threshold", 1.5, "evaluate.threshold: must be 'auto' or at most 1, got 1.5"),
    ],
)
def test_wrong_value_is_one_line_with_key_allowed_and_got(
    write: Write, key: str, value: object, complaint: str
) -> None:
    assert _complaint(write({key: value})) == complaint


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image": 5}, "data.train.image: must be text or a list, got 5"),
        ({"image": ["a.h5", 5]}, "data.train.image[1]: must be text, got 5"),
        (
            {"label_kind": "pears"},
            "data.train.label_kind: must be 'pairs', 'semantic' or 'union' or a list, got 'pears'",
        ),
        (
            {"label_kind": ["pairs", "pears"]},
            "data.train.label_kind[1]: must be 'pairs', 'semantic' or 'union', got 'pears'",
        ),
        ({"lable": "a.h5"}, "data.train.lable: unknown key; did you mean data.train.label?"),
    ],
)
def test_volume_sets_are_explained_without_the_branches_of_a_union(
    write: Write, changes: dict[str, Any], complaint: str
) -> None:
    volumes = {"data.phantom": None, "data.split": WIDE_SPLIT}
    assert _complaint(write(volumes | {"data.train": VOLUMES | changes})) == complaint


def test_volume_set_without_image(write: Write) -> None:
    path = write({"data.phantom": None, "data.train": {"label": "a.h5"}})
    assert _complaint(path) == "data.train.image is missing; add it"


def test_every_problem_is_named_at_once(write: Write) -> None:
    path = write({"seed": "x", "train.stepz": 1, "loss.bce": DROP, "network.pools": [[1, 2, 2]]})
    first, *rest = _complaint(path).splitlines()
    assert first == "4 problems"
    assert [line.strip().split(":")[0].split(" ")[0] for line in rest] == [
        "seed",
        "network",
        "train.stepz",
        "loss.bce",
    ]


def test_a_long_value_is_cut_short(write: Write) -> None:
    assert len(_complaint(write({"seed": "x" * 500}))) < 120


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data.phantom": None}, "data: set either phantom or train"),
        ({"data.train": VOLUMES}, "data: set either phantom or train"),
        ({"data.test": VOLUMES}, "data: a phantom brings its own validation and test"),
        ({"data.phantom": None, "data.train": VOLUMES}, "data: give validation and test volumes, or a split"),
        (
            {
                "data.phantom": None,
                "data.train": VOLUMES,
                "data.test": VOLUMES,
                "data.split": WIDE_SPLIT,
            },
            "data: split takes its test regions from train",
        ),
        ({"data.phantom.test_seeds": [1]}, "data.phantom: seed 1 stands more than once"),
        ({"data.phantom.train_seeds": [3, 3]}, "data.phantom: seed 3 stands more than once"),
        ({"network.widths": [8, 8]}, "network: 2 widths want 2 kernels and 1 pools, got 3 and 2"),
        ({"network.kernels": [[1, 3, 3]] * 4}, "network: 3 widths want 3 kernels and 2 pools, got 4 and 2"),
        ({"network.kernels": [[1, 3, 4]] * 3}, "network.kernels: sizes must be odd, got [1, 3, 4]"),
        (
            {"loss.bce": 0, "loss.dice": 0, "loss.overlap": 1},
            "loss: bce, dice, focal, tversky and cross_entropy",
        ),
        ({"loss.tversky": 1, "loss.tversky_weights": [0, 0]}, "loss.tversky_weights: both are 0"),
        (
            {"loss.cross_entropy": 1},
            "loss.cross_entropy: wants background, pre and post to exclude each other",
        ),
        ({"network.deep_supervision": 3}, "network.deep_supervision: 3 levels, but 3 widths have 2 coarser"),
        ({"train.schedule": "multistep"}, "train.milestones: multistep needs some; use [1466]"),
        ({"train.milestones": [20, 10]}, "train.milestones: [20, 10] must rise"),
        (
            {"train.warmup_steps": 5000},
            "train.warmup_steps: 5000 are more than all 2200 steps; use 220 or less",
        ),
        (
            {"train.early_stop": 2, "data.phantom": None, "data.train": VOLUMES, "data.split": WIDE_SPLIT},
            "train.early_stop: 2, but a cross-validation has no validation region",
        ),
        ({"loss.foreground_weight_clip": [0.9, 0.1]}, "loss.foreground_weight_clip: 0.9 is more than 0.1"),
        ({"loss.bce": 0, "loss.foreground_margin": 1}, "loss.foreground_margin: 1 is read by bce alone"),
        ({"infer.blend": "bump", "infer.fade": 0.5}, "infer.fade: 0.5 and infer.blend: bump are two ways"),
        (
            {"evaluate.rule": "polarity", "evaluate.polarity.exclusive": True},
            "evaluate.polarity.exclusive: takes the likeliest of background, pre and post",
        ),
        ({"evaluate.polarity.dilate_yx": 6}, "evaluate.polarity.dilate_yx: 6 is even"),
    ],
)
def test_rules_that_span_fields(write: Write, changes: dict[str, Any], complaint: str) -> None:
    assert _complaint(write(changes)).startswith(complaint)


@pytest.mark.parametrize("key", ["sampling.patch_zyx", "infer.window_zyx", "train.validation.window_zyx"])
def test_window_must_be_a_multiple_of_the_pooling_and_the_next_is_named(write: Write, key: str) -> None:
    _, pool_y, _ = NetworkParams().total_pool_zyx()
    good = 10 * pool_y
    path = write({key: [8, good - 3, good]})
    wanted = f"{key}: y={good - 3} is not a multiple of {pool_y}, the total pooling along y; next: {good}"
    assert _complaint(path) == wanted
    assert load_params(write({key: [8, good, good]}))


def test_all_windows_that_do_not_fit_are_named(write: Write) -> None:
    lines = _complaint(write({"sampling.patch_zyx": [7, 100, 128], "infer.window_zyx": [8, 128, 129]}))
    assert [line.split("=")[0].strip() for line in lines.splitlines()[1:]] == [
        "sampling.patch_zyx: z",
        "sampling.patch_zyx: y",
        "infer.window_zyx: x",
    ]


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_guard_must_span_the_receptive_field(write: Write, axis: str) -> None:
    field = NetworkParams().receptive_field_zyx()["zyx".index(axis)]
    split = {"data.phantom": None, "data.train": VOLUMES}
    narrow = write(split | {"data.split": {"axis": axis, "bands": 4, "guard": field - 1}})
    complaint = _complaint(narrow)
    assert complaint.startswith(f"data.split.guard: {field - 1} voxels along {axis} is narrower")
    assert complaint.endswith(f"use {field} or more")
    assert load_params(write(split | {"data.split": {"axis": axis, "bands": 4, "guard": field}}))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"", "holds no keys"),
        (b"- 1\n- 2\n", "holds no keys"),
        (b"1: 2\n", "1: unknown key"),
    ],
)
def test_a_file_that_is_no_params_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert complaint in _complaint(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in _complaint(tmp_path / "no.yaml")
    assert "Is a directory" in _complaint(tmp_path)


def test_overrides_come_before_validation(write: Write) -> None:
    changes = {
        "data.phantom": None,
        "data.train": VOLUMES,
        "data.split": {"axis": "y", "bands": 2, "guard": 999},
    }
    params = load_params(write(), overrides=changes)
    assert params.data.train is not None
    assert params.data.train.label == ("c.h5", "d.h5")
    assert load_params(write(), overrides={"data.voxel_nm": [1, 2, 3]}).data.voxel_nm == (1, 2, 3)
    assert load_params(write({"data.phantom": None}), overrides={"data.phantom.noise": 2.0} | _rest()).data


def _rest() -> dict[str, Any]:
    """All keys of a phantom but its noise."""
    tree = PhantomParams().model_dump(mode="json", exclude={"noise"})
    return {f"data.phantom.{name}": value for name, value in tree.items()}


def test_numbers_as_yaml_writes_them(write: Write) -> None:
    """YAML reads 1e-3 as text; it is a number all the same."""
    assert load_params(write({"train.learning_rate": "1e-3"})).train.learning_rate == 0.001
    assert load_params(write({"evaluate.threshold": 0})).evaluate.threshold == 0


def test_params_cannot_be_changed() -> None:
    params = Params(data=_phantom())
    with pytest.raises(ValueError, match="frozen"):
        params.train.steps = 5  # type: ignore[misc]


def test_flatten_gives_every_leaf_a_dotted_key() -> None:
    flat = flatten(Params(data=_phantom()))
    assert flat["sampling.patch_zyx"] == str(list(Params(data=_phantom()).sampling.patch_zyx))
    assert flat["train.validation.overlap"] == 0.25
    assert flat["data.train"] is None
    assert all(not isinstance(value, dict | list) for value in flat.values())


def test_sections_divide_the_flattened_params() -> None:
    params = Params(data=_phantom())
    some, rest = ("seed", "data", "train"), ("network", "sampling", "augment", "loss", "infer", "evaluate")
    assert set(sections(params, *some)).isdisjoint(sections(params, *rest))
    assert sections(params, *some) | sections(params, *rest) == flatten(params)


def test_receptive_field_grows_with_blocks_and_pools() -> None:
    one = NetworkParams(stem_zyx=(1, 1, 1), widths=(4,), kernels=((1, 3, 3),), pools=())
    assert one.receptive_field_zyx() == (1, 7, 7)  # the stem's convolution and two of the block
    assert one.model_copy(update={"blocks": 2}).receptive_field_zyx() == (1, 11, 11)
    assert one.model_copy(update={"stem_zyx": (1, 2, 2)}).receptive_field_zyx() == (1, 14, 14)
    assert one.model_copy(update={"stem_zyx": (1, 2, 2)}).total_pool_zyx() == (1, 2, 2)
