"""What `synmlops network` says of a network, against worked answers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TinyProject
from torch import Tensor, nn

from synmlops.cli import main
from synmlops.learning.networks.layers import Conv3d
from synmlops.learning.networks.registry import build_network
from synmlops.learning.networks.report import (
    NetworkReport,
    gflop_per_megavoxel,
    measured_field,
    report_on,
    training_memory,
)
from synmlops.params import NetworkParams, TrainParams

CPU = torch.device("cpu")
FLOAT32 = TrainParams(precision="float32")
PATCH = (4, 16, 16)
VOXELS = 4 * 16 * 16
SMALL = NetworkParams(
    stem_zyx=(1, 2, 2), widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((1, 2, 2),), squeeze_excite=True
)


class TwoConvolutions(nn.Module):
    def __init__(self, convolution: type[nn.Conv3d] = nn.Conv3d, *, wants_values: bool = False) -> None:
        super().__init__()
        self.first = convolution(1, 5, (1, 3, 3), padding=(0, 1, 1))
        self.second = convolution(5, 3, (3, 1, 1), padding=(1, 0, 0))
        self.wants_values = wants_values

    def forward(self, image: Tensor) -> Tensor:
        if self.wants_values and image.mean().item() > 1e9:  # which no shape can tell
            return image
        out: Tensor = self.second(torch.relu(self.first(image)))
        return out


@pytest.mark.parametrize("wants_values", [False, True], ids=["by shapes", "by values"])
@pytest.mark.parametrize("convolution", [nn.Conv3d, Conv3d])
def test_arithmetic_of_a_worked_network(convolution: type[nn.Conv3d], wants_values: bool) -> None:
    network = TwoConvolutions(convolution, wants_values=wants_values)
    per_voxel = 2 * (5 * 9 + 3 * 5 * 3)
    assert gflop_per_megavoxel(network, PATCH) == pytest.approx(per_voxel / 1e3)


def test_memory_of_a_worked_network_counts_each_storage_once() -> None:
    network = TwoConvolutions()
    memory = training_memory(network, train=FLOAT32, patch_zyx=PATCH, device=CPU)
    assert memory.patch == 4 * VOXELS * (1 + 5 + 3)  # image, after relu (kept twice), sigmoid
    weights = 5 * 9 + 5 + 3 * 5 * 3 + 3
    assert memory.fixed == 4 * weights * 5  # weights, gradients, averages, two moments of AdamW
    assert memory.of_batch(3) == memory.fixed + 3 * memory.patch
    assert memory.how.endswith("float32")
    assert all(weight.grad is None for weight in network.parameters())
    half = training_memory(
        network, train=TrainParams(precision="bf16", optimizer="sgd"), patch_zyx=PATCH, device=CPU
    )
    assert half.fixed == 4 * weights * 4
    assert half.how.endswith("bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_is_at_least_what_is_kept() -> None:
    network = TwoConvolutions()
    kept = training_memory(network, train=FLOAT32, patch_zyx=(16, 128, 128), device=CPU)
    peak = training_memory(network, train=FLOAT32, patch_zyx=(16, 128, 128), device=torch.device("cuda"))
    assert kept.patch <= peak.patch <= 4 * kept.patch


def test_the_measured_field_is_within_the_promised_one_whatever_norms_see() -> None:
    for norm in ("group", "instance", "batch"):
        params = SMALL.model_copy(update={"norm": norm})
        network = build_network(params)
        measured = measured_field(network, params, gflop_per_megavoxel=1.0)
        assert measured is not None
        assert all(m <= f for m, f in zip(measured, params.receptive_field_zyx(), strict=True))
        assert all(m > f // 2 for m, f in zip(measured, params.receptive_field_zyx(), strict=True))
        assert measured_field(network, params, gflop_per_megavoxel=1e9) is None


def test_the_field_of_plus_unet_bounds_what_is_measured() -> None:
    levels = {"widths": (8, 8), "kernels": ((1, 3, 3), (3, 3, 3)), "pools": ((1, 2, 2),)}
    params = NetworkParams(name="plus_unet", stem_zyx=(1, 1, 1), squeeze_excite=True, **levels)
    measured = measured_field(build_network(params), params, gflop_per_megavoxel=1.0)
    field = params.receptive_field_zyx()
    assert measured is not None
    assert all(m <= f for m, f in zip(measured, field, strict=True)), (measured, field)
    assert all(m > f // 2 for m, f in zip(measured, field, strict=True)), (measured, field)


def test_the_incumbents_network_costs_what_its_authors_code_costs() -> None:
    """270 GFLOP per megavoxel and 4.1 million parameters, as counted on the incumbent's own code."""
    params = NetworkParams(
        name="plus_unet",
        stem_zyx=(1, 1, 1),
        widths=(32, 64, 96, 128, 192),
        kernels=((1, 3, 3),) * 3 + ((3, 3, 3),) * 2,
        pools=((1, 2, 2),) * 2 + ((2, 2, 2),) * 2,
        activation="elu",
        squeeze_excite=True,
    )
    network = build_network(params)
    assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(4.1, abs=0.05)
    assert gflop_per_megavoxel(network, (8, 256, 256)) == pytest.approx(270, rel=0.02)


def _report(**changes: Any) -> NetworkReport:
    report = report_on(SMALL, train=FLOAT32, patch_zyx=(8, 64, 64), device=CPU)
    return NetworkReport(**{**vars(report), **changes})


def test_advice_names_what_does_not_go_together() -> None:
    assert _report().advice() == ()
    (small,) = _report(patch_zyx=(8, 16, 64)).advice()
    assert "smaller than the receptive field (y=16 of" in small
    (wide,) = _report(measured_zyx=(3, 30, 900)).advice()
    assert "reaches further than the params promise (x=900 of" in wide
    assert "network.options.receptive_field_zyx" in wide


def _params_file(folder: Path, tiny: TinyProject, network: dict[str, Any]) -> Path:
    tree = tiny.params.model_dump(mode="json")
    tree["network"] |= network
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_command_prints_lines_and_json(
    tiny_project: TinyProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = _params_file(tmp_path, tiny_project, {"squeeze_excite": True})
    monkeypatch.setattr(sys, "path", list(sys.path))

    def printed(*flags: str) -> str:
        command = ["synmlops", "network", "--params", str(params), "--gpus", "0", *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out

    lines = " ".join(printed("--prepared", str(tiny_project.prepared)).split())
    assert "network residual_unet" in lines
    assert "receptive field, at most 5 x 40 x 40 voxels, 200 x 320 x 320 nm" in lines
    tree = json.loads(printed("--prepared", "none", "--json", "--patch", "4,32,40"))
    assert tree["patch_zyx"] == [4, 32, 40]
    assert tree["receptive_field_nm"] is None
    assert tree["memory"]["batch"] == tree["memory"]["fixed"] + 2 * tree["memory"]["patch"]


OWN = """
from torch import nn

def build(params):
    return nn.Sequential(nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.Conv3d(4, 3, 1))
"""


@pytest.mark.slow
def test_a_module_beside_params_is_found_by_two_workers_and_by_infer(
    tiny_project: TinyProject, tmp_path: Path
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "net_beside_params.py").write_text(OWN)
    network = {"name": "net_beside_params:build", "options": {"receptive_field_zyx": [1, 3, 3]}}
    params = _params_file(project, tiny_project, network)
    text = (
        params.read_text().replace("steps: 12", "steps: 2").replace("validate_every: 6", "validate_every: 2")
    )
    params.write_text(text)

    def run(*command: str | Path) -> None:
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "DVC_ROOT": str(project),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
        }
        subprocess.run(
            [sys.executable, "-m", "synmlops", *map(str, command), "--params", str(params)],
            cwd=elsewhere,
            env=environment,
            check=True,
            timeout=300,
        )

    run("train", "--prepared", tiny_project.prepared, "--processes", "2", "--out", project / "models")
    volume = next(iter(tiny_project.manifest.volumes.values())).sources["image"]
    run("infer", "--image", volume, "--model", project / "models/model.safetensors", "--out", project / "out")
    assert list((project / "out").glob("*.h5"))
