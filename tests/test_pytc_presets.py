"""The presets in examples/pytc: what the importer makes of its settings, and each run end to end."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytc_presets import FOLDER, PRESETS, imported, preset_file

from synmlops.learning.checkpoint import read_meta
from synmlops.learning.losses import compute_loss
from synmlops.learning.optim import learning_rate_at
from synmlops.learning.volume_prediction import Engine
from synmlops.params import CHANNELS, Params, load_params
from synmlops.stages import evaluate, infer, prepare, train
from synmlops.volumes.importers.pytc_config import as_yaml, params_of
from synmlops.volumes.importers.pytc_keys import settings_of
from synmlops.volumes.store import open_volume

NAMES = sorted(PRESETS)
PHANTOM = {
    "size_zyx": [16, 96, 96],
    "voxel_nm": [40.0, 8.0, 8.0],
    "train_seeds": [1],
    "validation_seeds": [2],
    "test_seeds": [3],
    "synapses_per_um3": 8.0,
    "polyadic": 0.6,
    "lookalikes": 0.0,
    "noise": 1.0,
    "jitter": 1.0,
}


def _small(name: str) -> Params:
    """Load a preset for a phantom, two steps and little windows; the recipe stays."""
    is_v0 = name == "synaptic_partner_segmentation"
    patch, window = ([8, 32, 32], [8, 48, 48]) if is_v0 else ([5, 33, 33], [9, 49, 49])
    overrides: dict[str, Any] = {
        "data.train": None,
        "data.split": None,
        "data.phantom": PHANTOM,
        "network.widths": [8, 8, 16, 16, 16],
        "sampling.patch_zyx": patch,
        "sampling.batch_size": 1,
        "sampling.reject_below": 1,
        "train.steps": 2,
        "train.warmup_steps": 1,
        "train.milestones": [2] if is_v0 else [],
        "train.validate_every": 2,
        "train.checkpoint_every": 2,
        "train.validation.window_zyx": window,
        "train.validation.overlap": 0.0,
        "infer.window_zyx": window,
        "infer.stride_zyx": window,
        "infer.views": 1,
        "evaluate.polarity.min_voxels": 4,
    }
    return load_params(preset_file(name), overrides=overrides)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's volumes, which are the same for every preset."""
    out = tmp_path_factory.mktemp("prepared") / "volumes"
    data = {_small(name).data for name in NAMES}
    assert len(data) == 1
    prepare.run(data.pop(), out=out)
    return out


def test_the_readme_names_every_preset_and_no_other() -> None:
    files = {path.stem for path in FOLDER.glob("*.yaml")}
    readme = (FOLDER / "README.md").read_text()
    assert files == set(NAMES)
    assert all(f"`{name}.yaml`" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_what_the_importer_makes_of_its_settings(name: str) -> None:
    assert preset_file(name).read_text() == as_yaml(imported(name)), "run `python tests/pytc_presets.py`"
    assert load_params(preset_file(name)) == imported(name).params


def test_the_presets_train_on_what_their_names_say() -> None:
    terms = {}
    for name in NAMES:
        loss = imported(name).params.loss
        terms[name] = (loss.bce, loss.dice, loss.overlap, loss.cross_entropy)
    assert terms == {
        "jwr15_bce": (1.0, 0.0, 0.0, 0.0),
        "jwr15_bce_dice": (1.0, 0.5, 0.0, 0.0),
        "jwr15_bce_dice_overlap": (1.0, 0.5, 1.0, 0.0),
        "jwr15_exclusive_ce": (0.0, 0.0, 0.0, 1.0),
        "synaptic_partner_segmentation": (1.0, 1.0, 0.0, 0.0),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_end_to_end(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "params.yaml").touch()
    params = _small(name)
    models, predicted, out = (tmp_path / part for part in ("models", "predicted", "evaluated"))
    train.run(params, prepared=prepared, out=models, gpus=0)
    infer.run(params, prepared=prepared, models=models, out=predicted, engine=Engine(gpus=0))
    evaluate.run(params, prepared=prepared, predicted=predicted, curves=models / "history.csv", out=out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert read_meta(models / "model.safetensors").channels == CHANNELS
    with open_volume(next(predicted.rglob("*test*/*.h5")), ndim=4) as probabilities:
        assert tuple(probabilities.attrs["channels"]) == CHANNELS
        assert probabilities.shape == (3, 16, 96, 96)


def test_the_rates_of_an_imported_schedule_are_theirs(shared: Callable[[str], Path]) -> None:
    golden = np.load(shared("golden/pytc/schedule_blend_windows.npz"))
    given = {
        "multistep": {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "BASE_LR": 0.01, "STEPS": [30, 35]},
        "cosine": {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR": 0.04},
    }
    for name, solver in given.items():
        solver |= {"ITERATION_TOTAL": 45, "WARMUP_ITERS": 10}
        params = params_of(settings_of({"SOLVER": solver}, source="config.yaml")).params
        rates = [learning_rate_at(step, params.train) for step in range(1, 46)]
        np.testing.assert_allclose(rates, golden[f"warmup_{name}"], rtol=1e-12)


def test_the_losses_of_the_presets_are_theirs(shared: Callable[[str], Path]) -> None:
    golden = np.load(shared("golden/pytc/losses.npz"))
    logits, target = (torch.from_numpy(golden[name]).float() for name in ("pred", "target"))
    for name, key in (("jwr15_bce_dice", "total"), ("jwr15_bce_dice_overlap", "total_with_nonoverlap_x4")):
        weighted = {"foreground_weight_clip": (0.2, 0.2)}  # 1 and 4, as the reference was computed with
        params = imported(name).params.loss.model_copy(update=weighted)
        loss = compute_loss(logits, target, torch.ones_like(target), params=params)
        assert float(loss.total) == pytest.approx(float(golden[key]), rel=1e-6)
