"""The commands of docs/switching.md, run in order on files such as its readers have."""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from plain_pytc import Form, plain_unet
from scipy.ndimage import binary_dilation
from tracking_tools import migrated_store

from synmlops.cli import main
from synmlops.params import load_params
from synmlops.synapses.cremi_scores import score_cremi
from synmlops.volumes.cremi import Layer, annotations_of, write_cremi
from synmlops.volumes.exporters.points import export_points
from synmlops.volumes.phantom import Phantom, make_phantom
from synmlops.volumes.store import write_hdf5
from synmlops.volumes.table import read_table, write_table

PAGE = Path(__file__).parents[1] / "docs" / "switching.md"
COMMANDS = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    synmlops ")]


def _write_a_labs_files(folder: Path) -> Phantom:
    """Write what a lab brings along: a config, a checkpoint, volumes, points, a CREMI file."""
    phantom = make_phantom(size_zyx=(16, 96, 96), voxel_nm=(40.0, 8.0, 8.0), seed=2)
    write_hdf5(folder / "em.h5", {"main": phantom.image}, grid=phantom.grid)
    write_hdf5(folder / "neurons.h5", {"main": phantom.neurons}, grid=phantom.grid)
    write_table(phantom.partners, folder / "true.parquet")
    export_points(folder / "true.parquet", folder / "synapses.csv", like="synful")
    pre, post = ((phantom.labels > 0) & (phantom.labels % 2 == odd) for odd in (1, 0))
    contact = binary_dilation(pre, np.ones((1, 3, 3))) & binary_dilation(post, np.ones((1, 3, 3)))
    clefts = np.where(contact, (phantom.labels.astype(np.uint64) + 1) // 2, 0)
    layers = {"raw": phantom.image, "neurons": phantom.neurons, "clefts": clefts}
    made = {name: Layer(of.shape, phantom.grid, [(0, of)]) for name, of in layers.items()}
    write_cremi(folder / "sample.hdf", annotations=annotations_of(phantom.partners), **made)

    form = Form(plus=True, excite=True, norm="gn")
    torch.manual_seed(0)
    torch.save({"iteration": 7, "state_dict": plain_unet(form).state_dict()}, folder / "checkpoint.pth.tar")
    config = form.config()
    config["MODEL"]["INPUT_SIZE"] = [9, 65, 65]
    config["DATASET"] |= {"IMAGE_NAME": "em.h5", "LABEL_NAME": "label.h5"}
    config["INFERENCE"] = {"INPUT_SIZE": [9, 65, 65], "STRIDE": [4, 32, 32], "BLENDING": "gaussian"}
    (folder / "synapse.yaml").write_text(yaml.safe_dump(config))
    return phantom


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
def test_every_command_of_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom = _write_a_labs_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".synmlops").mkdir()
    shutil.copy(migrated_store(), tmp_path / ".synmlops" / "mlflow.db")
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, f"{command}\n{capsys.readouterr().err}"

    assert load_params(tmp_path / "pytc.yaml").infer.blend == "gaussian"
    assert (tmp_path / "predicted" / "em.h5").exists()
    assert (tmp_path / "decoded" / "instances.h5").exists()
    points = read_table(tmp_path / "labels" / "synapses_partners.parquet")
    assert len(points) == len(phantom.partners)
    scores = score_cremi(tmp_path / "sample.hdf", tmp_path / "predicted.hdf", threshold_nm=400)
    assert scores.flat()["fscore"] == 1


def test_the_page_shows_every_importer_exporter_and_scorer() -> None:
    from synmlops.cli.exchange import exporters, importers, scorers

    for group, app in {"import": importers, "export": exporters, "score": scorers}.items():
        for command in app.registered_commands:
            name = command.name or command.callback.__name__  # type: ignore[union-attr]
            shown = any(one.startswith(f"synmlops {group} {name} ") for one in COMMANDS)
            assert shown or name == "vnc", f"synmlops {group} {name}"
