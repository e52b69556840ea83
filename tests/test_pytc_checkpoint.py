import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from plain_pytc import Form, plain_unet
from rich.console import Console
from torch import Tensor

from synmlops.cli import main
from synmlops.learning.checkpoint import load_model
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import predict_array
from synmlops.learning.pytc_checkpoint import Imported, import_checkpoint
from synmlops.learning.pytc_weights import from_pytc
from synmlops.params import InferParams
from synmlops.section import SynmlopsError
from synmlops.volumes.importers.survey import render
from synmlops.volumes.phantom import make_phantom

VOXEL = (40.0, 8.0, 8.0)
GOLDEN = ("unet_3d_residual_bn", "unet_plus_3d_residual_bn_swa", "unet_plus_3d_residual_se_gn")


def _written(folder: Path, form: Form, *, change: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write checkpoint and config of a network; `change` is what the config's MODEL says otherwise."""
    checkpoint, config = folder / "checkpoint_00007.pth.tar", folder / "config.yaml"
    state = plain_unet(form).state_dict()
    torch.save({"iteration": 7, "state_dict": state, "optimizer": {}, "lr_scheduler": {}}, checkpoint)
    sections = form.config()
    sections["MODEL"] |= change or {}
    config.write_text(yaml.safe_dump(sections))
    return checkpoint, config


def _imported(folder: Path, form: Form, **options: Any) -> Imported:
    return import_checkpoint(*_written(folder, form, **options), voxel_nm=VOXEL)


def _logits(imported: Imported, folder: Path, image: Tensor) -> Tensor:
    imported.save(folder / "model.safetensors")
    model = load_model(folder / "model.safetensors")
    with torch.no_grad():
        return model.network(image)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_the_incumbents(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = shared("golden/pytc")
    imported = import_checkpoint(folder / f"{name}.pth.tar", folder / f"{name}.yaml", voxel_nm=VOXEL)
    state = torch.load(folder / f"{name}.pth.tar", weights_only=True)
    state = state.get("state_dict", state)
    assert imported.taken + sum(key in state for key in imported.left) == len(state)
    assert not imported.made
    with np.load(folder / f"{name}_io.npz") as arrays:
        for size in ("", "_odd"):
            image, logits = (torch.from_numpy(arrays[key + size]) for key in ("input", "logits"))
            torch.testing.assert_close(_logits(imported, tmp_path, image), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "form",
    [
        Form(norm="gn", act="leaky_relu", pad="zeros", excite=True),
        Form(norm="in", act="gelu", pad="circular"),
        Form(norm="sync_bn", act="efficient_swish", pooling=True, excite=True),
        Form(is_isotropic=True, act="none"),
        Form(isotropy=(True, True, True), pad="reflect"),
        Form(plus=True, norm="gn", act="swish", pad="reflect", pooling=True),
        Form(plus=True, norm="gn", act="relu", pad="zeros", isotropy=(True, False, True)),
        Form(plus=True, is_isotropic=True, pad="circular", excite=True),
    ],
    ids=str,
)
def test_every_choice_gives_the_same_logits(tmp_path: Path, form: Form) -> None:
    imported = _imported(tmp_path, form)
    for size in ((8, 16, 24), (9, 17, 23)):
        image = torch.randn(2, 1, *size)
        with torch.no_grad():
            plain = plain_unet(form)(image)
        torch.testing.assert_close(_logits(imported, tmp_path, image), plain, atol=1e-4, rtol=1e-5)
    assert all("instance norm" in why for why in imported.made.values())
    assert bool(imported.made) == (form.norm == "in")


def test_exclusive_planes_become_probabilities_of_pre_and_post(tmp_path: Path) -> None:
    imported = _imported(tmp_path, Form(), change={"TARGET_OPT": ["1-1"]})
    assert imported.meta.network.exclusive
    image = torch.randn(1, 1, 4, 16, 16)
    with torch.no_grad():
        _, pre, post = plain_unet(Form())(image).softmax(1).unbind(1)
    wanted = torch.stack([pre, post, pre + post], 1)
    torch.testing.assert_close(_logits(imported, tmp_path, image).sigmoid(), wanted, atol=1e-5, rtol=0)


def test_one_plane_is_a_union(tmp_path: Path) -> None:
    imported = _imported(tmp_path, Form(planes=1), change={"TARGET_OPT": ["0"]})
    assert imported.meta.channels == ("union",)
    image = torch.randn(1, 1, 4, 16, 16)
    with torch.no_grad():
        plain = plain_unet(Form(planes=1))(image)
    torch.testing.assert_close(_logits(imported, tmp_path, image)[:, 2:], plain, atol=1e-5, rtol=1e-5)


def test_keys_that_are_no_weights_are_named(tmp_path: Path) -> None:
    """An averaged model under data parallelism, alone in its file."""
    checkpoint, config = _written(tmp_path, Form())
    state = {f"module.module.{key}": value for key, value in plain_unet(Form()).state_dict().items()}
    torch.save(state | {"n_averaged": torch.tensor(12)}, checkpoint)
    imported = import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    assert imported.left == {"n_averaged": "count of averaged models (12)"}
    assert imported.taken == len(state)
    assert imported.meta.step == 0
    whole = _imported(tmp_path, Form())
    assert set(whole.left) == {"iteration", "optimizer", "lr_scheduler"}
    assert whole.meta.step == 7
    for name, value in whole.weights.items():
        assert torch.equal(value, imported.weights[name])


def test_counts_that_old_versions_did_not_keep_are_made(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    state = {key: value for key, value in plain_unet(Form()).state_dict().items() if "tracked" not in key}
    torch.save(state, checkpoint)
    imported = import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    assert imported.made
    assert all(name.endswith("num_batches_tracked") and "count" in why for name, why in imported.made.items())


def test_intensity_voxel_size_and_origin_come_along(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    tree = yaml.safe_load(config.read_text())
    tree["DATASET"] |= {"MEAN": 0.4, "STD": 0.2}
    tree["MODEL"]["INPUT_SIZE"] = "(17, 129, 129)"
    config.write_text(yaml.safe_dump(tree))
    imported = import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    meta = imported.meta
    assert (meta.mean, meta.std, meta.voxel_nm) == (pytest.approx(102), pytest.approx(51), VOXEL)
    assert meta.imported.startswith("checkpoint_00007.pth.tar sha256 ")
    assert imported.window_zyx == (17, 129, 129)
    imported.save(tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").meta == meta


def test_a_base_is_overridden(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form(pad="zeros"), change={"PAD_MODE": "zeros"})
    base = tmp_path / "base.yaml"
    config.rename(base)
    config.write_text("DATASET: {MEAN: 0.25}\nMODEL: {PAD_MODE: reflect}\n")
    meta = import_checkpoint(checkpoint, config, base=base, voxel_nm=VOXEL).meta
    assert (meta.network.padding, meta.network.widths, meta.mean) == ("reflect", (8, 16, 24), 63.75)


def test_a_config_that_wants_its_base_says_so(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    config.write_text("MODEL: {TARGET_OPT: ['1-1'], OUT_PLANES: 3}\n")
    with pytest.raises(SynmlopsError, match=r"does not fit(.|\n)*config\.yaml names neither.*--base"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)


def test_the_survey_accounts_for_every_key(tmp_path: Path) -> None:
    console = Console(width=200, file=StringIO())
    console.print(render(_imported(tmp_path, Form(norm="in")).survey()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("pytc_unet", "40 x 8 x 8 nm", "optimizer", "instance norm", "8 of 1 x 3 x 3", "TARGET_OPT"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ARCHITECTURE": "fpn_3d"}, r"MODEL\.ARCHITECTURE: 'fpn_3d'.*unet_3d, unet_plus_3d"),
        ({"ARCHITECTURE": "unet_residual_3d"}, r"MODEL\.ARCHITECTURE: 'unet_residual_3d'"),
        ({"BLOCK_TYPE": "residual_pa"}, r"MODEL\.BLOCK_TYPE: 'residual_pa'.*residual, residual_se"),
        ({"NORM_MODE": "none"}, r"MODEL\.NORM_MODE: 'none'.*bn, sync_bn, gn, in"),
        ({"ACT_MODE": "tanh"}, r"MODEL\.ACT_MODE: 'tanh'"),
        ({"PAD_MODE": "constant"}, r"MODEL\.PAD_MODE: 'constant'.*circular"),
        ({"POOLING_LAYER": 1}, r"MODEL\.POOLING_LAYER.*1"),
        ({"IN_PLANES": 3}, r"MODEL\.IN_PLANES.*3"),
        ({"OUT_PLANES": 12}, r"MODEL\.OUT_PLANES: 12.*supported"),
        ({"TARGET_OPT": ["2"]}, r"MODEL\.TARGET_OPT \['2'\]"),
        ({"ISOTROPY": [False, True]}, r"MODEL\.ISOTROPY: 2 levels.*3"),
        ({"ISOTROPY": "no"}, r"MODEL\.ISOTROPY.*'no'"),
        ({"FILTERS": [8]}, r"MODEL\.FILTERS.*\[8\]"),
        ({"FILTERS": [8, 12, 16], "NORM_MODE": "gn"}, r"MODEL\.FILTERS.*12.*multiples of 8"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(SynmlopsError, match=match):
        _imported(tmp_path, Form(), change=change)


@pytest.mark.parametrize(
    ("form", "change", "match"),
    [
        (
            Form(),
            {"FILTERS": [8, 16, 32]},
            r"down_layers\.2\.1\.0\.weight \(24 x 16 .* file, 32 x 16 .* config",
        ),
        (Form(), {"ISOTROPY": [False] * 3}, r"down_layers\.2\.1\.0\.weight \(24 x 16 x 3.* 24 x 16 x 1"),
        (Form(plus=True), {"ARCHITECTURE": "unet_3d"}, r"ARCHITECTURE unet_plus_3d(.|\n)*feat_layers"),
        (Form(), {"ARCHITECTURE": "unet_plus_3d"}, r"ARCHITECTURE unet_3d(.|\n)*non_local"),
        (Form(excite=True), {"BLOCK_TYPE": "residual"}, r"BLOCK_TYPE residual_se(.|\n)*\.fc\.0"),
        (
            Form(norm="gn"),
            {"NORM_MODE": "bn"},
            r"NORM_MODE gn or in(.|\n)*our network alone: stem\.norm\.running_mean",
        ),
        (Form(planes=2), {"OUT_PLANES": 3}, r"conv_out\.0\.weight \(2 x 8 .* 3 x 8"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, form: Form, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(SynmlopsError, match=match):
        _imported(tmp_path, form, change=change)


def test_a_flag_of_the_dataset_that_is_none_is_named(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    config.write_text(config.read_text().replace("IS_ISOTROPIC: false", "IS_ISOTROPIC: 2"))
    with pytest.raises(SynmlopsError, match=r"DATASET\.IS_ISOTROPIC.*2"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)


def test_a_foreign_block_is_named(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    state = plain_unet(Form()).state_dict() | {"down_layers.0.2.conv.0.2.weight": torch.zeros(8, 8, 1, 3, 3)}
    torch.save(state, checkpoint)
    with pytest.raises(SynmlopsError, match=r"down_layers\.0\.2\.conv\.0\.2\.weight.*residual_se"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    with pytest.raises(SynmlopsError, match=r"encoder\.weight.*unet_plus_3d"):
        from_pytc({"encoder.weight": torch.zeros(1)})


class _Ran(Exception):
    pass


class _Bomb:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise _Ran


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    torch.save({"state_dict": plain_unet(Form()).state_dict(), "cfg": _Bomb()}, checkpoint)
    with pytest.raises(SynmlopsError, match=r"more than tensors \(.*_explode\).*refused.*weights alone"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    checkpoint.write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    with pytest.raises(SynmlopsError, match="checkpoint_00007"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    checkpoint, config = _written(tmp_path, Form())
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SynmlopsError, match=r"checkpoint_00007.*not a whole checkpoint"):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ([1], "no state dict"),
        ({"iteration": 3}, "no state dict"),
        ({"state_dict": {}}, "no state dict"),
        ({"conv_in.0.weight": torch.full((1,), torch.nan)}, r"conv_in\.0\.weight.*not finite"),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path: Path, tree: Any, match: str) -> None:
    checkpoint, config = _written(tmp_path, Form())
    torch.save(tree, checkpoint)
    with pytest.raises(SynmlopsError, match=match):
        import_checkpoint(checkpoint, config, voxel_nm=VOXEL)


def test_missing_files_and_foreign_configs_are_refused(tmp_path: Path) -> None:
    checkpoint, config = _written(tmp_path, Form())
    for bad in ("[1, 2]", "MODEL: 3", "a: [", ""):
        config.write_text(bad)
        with pytest.raises(SynmlopsError, match=r"config\.yaml"):
            import_checkpoint(checkpoint, config, voxel_nm=VOXEL)
    with pytest.raises(SynmlopsError, match=r"none\.yaml.*No such file"):
        import_checkpoint(checkpoint, tmp_path / "none.yaml", voxel_nm=VOXEL)
    checkpoint, config = _written(tmp_path, Form())
    with pytest.raises(SynmlopsError, match=r"none\.pth.*no such file"):
        import_checkpoint(tmp_path / "none.pth", config, voxel_nm=VOXEL)


def test_the_reference_can_differ() -> None:
    """What the conversions are compared with depends on every setting of the form."""
    image = torch.randn(1, 1, 4, 16, 16)
    plain = Form(norm="gn", isotropy=(True, True, True))
    changes = [{"pad": "zeros"}, {"act": "relu"}, {"pooling": True}, {"excite": True}, {"plus": True}]
    with torch.no_grad():
        logits = plain_unet(plain)(image)
        for change in changes:
            assert not torch.allclose(plain_unet(replace(plain, **change))(image), logits, atol=1e-2), change


def test_a_network_of_the_config_alone_has_the_files_weights(tmp_path: Path) -> None:
    imported = _imported(tmp_path, Form(plus=True, excite=True, norm="gn"))
    assert list(build_network(imported.meta.network).state_dict()) == list(imported.weights)


def test_the_command_writes_a_model_that_predicts_and_a_dry_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> int:
        given = ["import", "checkpoint", *arguments, "--voxel-nm", "40,8,8"]
        monkeypatch.setattr(sys, "argv", ["synmlops", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    form = Form(plus=True, norm="gn")
    checkpoint, config = _written(tmp_path, form)
    before = set(tmp_path.iterdir())
    out = tmp_path / "model.safetensors"
    assert run(checkpoint, "--config", config, "--out", out, "--dry-run") == 0
    assert "plus_unet, group norm" in capsys.readouterr().out
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config.read_text().replace("- 24", "- 32"))
    assert run(checkpoint, "--config", wrong, "--out", out) == 2
    assert capsys.readouterr().err.startswith(f"synmlops: {checkpoint}: does not fit the config")
    wrong.unlink()
    assert set(tmp_path.iterdir()) == before
    assert run(checkpoint, "--config", config, "--out", out) == 0

    phantom = make_phantom(size_zyx=(8, 48, 40), voxel_nm=VOXEL, seed=1)
    params = InferParams(window_zyx=(9, 33, 33), precision="float32")
    probabilities = predict_array(load_model(out), phantom.image, params=params)
    assert probabilities.shape == (3, 8, 48, 40)
    whole = InferParams(window_zyx=(9, 49, 41), overlap=0, precision="float32")
    seen = np.pad(phantom.image, [(0, 1)] * 3, mode="edge")
    with torch.no_grad():
        plain = plain_unet(form)((torch.from_numpy(seen)[None, None] / 255 - 0.5) / 0.5).sigmoid()
    exact = (255 * plain[0, :, :8, :48, :40]).numpy()
    whole_found = predict_array(load_model(out), phantom.image, params=whole)
    assert np.abs(whole_found - exact).max() <= 0.51
