"""What a user sees who gives a command something wrong: one message, exit code 2, earlier outputs kept."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from tiny import TinyProject, make_blobs

from synmlops.cli import main
from synmlops.volumes import files


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["synmlops", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return run_command


def refused(outcome: Outcome, *words: str) -> None:
    """Expect exit code 2 and one message, without a traceback, that holds all the words."""
    assert outcome.code == 2
    assert outcome.err.startswith("synmlops: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def write_params(path: Path, tiny: TinyProject, **sections: object) -> Path:
    """Write the tiny params as a user's file, with sections replaced."""
    tree = tiny.params.model_dump(mode="json")
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(tree))
    return path


def blobs_as_files(folder: Path, **changes: np.ndarray) -> Path:
    """Write a good volume, with datasets replaced, and name it for params."""
    return make_blobs(0).write(folder / "volume.h5", **changes)


def prepare_volume(run: Run, tmp_path: Path, tiny: TinyProject, path: Path, kind: str = "pairs") -> Outcome:
    """Run prepare with one volume in all three roles' stead: a split of it."""
    data = {
        "train": {"image": f"{path}::image", "label": f"{path}::label", "label_kind": kind},
        "validation": None,
        "test": None,
        "split": {"axis": "y", "bands": 2, "guard": 0},
    }
    guard = tiny.params.network.receptive_field_zyx()[1]
    data["split"] = {"axis": "y", "bands": 2, "guard": guard}
    params = write_params(tmp_path / "params.yaml", tiny, data=data)
    return run("prepare", "--params", params, "--out", tmp_path / "prepared")


def test_a_good_volume_passes(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    outcome = prepare_volume(run, tmp_path, tiny_project, blobs_as_files(tmp_path))
    assert outcome.code == 0, outcome.err
    assert "2 fold(s)" in outcome.out


BLOBS = make_blobs(0)
WITHOUT_POST = np.where(BLOBS.pairs % 2 == 1, BLOBS.pairs, 0)
WITH_NAN = BLOBS.image.astype(np.float32)
WITH_NAN[3, 4, 5] = np.nan
FAULTS = {
    "another shape": ({"label": BLOBS.pairs[:-1]}, ("label", "(9, 48, 48)", "(10, 48, 48)")),
    "no post side": ({"label": WITHOUT_POST}, ("label", "post")),
    "float label": ({"label": BLOBS.pairs.astype(np.float32)}, ("label", "float32")),
    "negative label": ({"label": BLOBS.pairs.astype(np.int32) - 1}, ("label", "-1")),
    "NaN in the image": ({"image": WITH_NAN}, ("image", "NaN")),
    "no foreground": ({"label": np.zeros_like(BLOBS.pairs)}, ("label", "foreground")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_volume_is_refused_by_name(
    run: Run, tmp_path: Path, tiny_project: TinyProject, fault: str
) -> None:
    kept = tmp_path / "prepared" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("of an earlier run")
    changes, words = FAULTS[fault]
    path = blobs_as_files(tmp_path, **changes)
    refused(prepare_volume(run, tmp_path, tiny_project, path), str(path), *words)
    assert kept.read_text() == "of an earlier run"
    assert [item.name for item in kept.parent.iterdir()] == ["kept.txt"]


def test_a_missing_file(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    refused(
        prepare_volume(run, tmp_path, tiny_project, tmp_path / "absent.h5"), "absent.h5", "check the path"
    )


def test_a_truncated_file(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    path = blobs_as_files(tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    refused(prepare_volume(run, tmp_path, tiny_project, path), str(path), "truncated")


def test_a_full_disk(
    run: Run, tmp_path: Path, tiny_project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = blobs_as_files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    refused(prepare_volume(run, tmp_path, tiny_project, path), "disk is full")
    assert not (tmp_path / "prepared").exists()


def test_an_output_place_that_cannot_be_written(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    path = blobs_as_files(tmp_path)
    (tmp_path / "prepared").write_text("a file is in the way")
    refused(prepare_volume(run, tmp_path, tiny_project, path), "prepared")


def test_a_volume_smaller_than_the_patch(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project, sampling={"patch_zyx": [12, 24, 24]})
    outcome = run("train", "--params", params, "--prepared", tiny_project.prepared, "--gpus", "0")
    refused(outcome, "sampling.patch_zyx", "(10, 48, 48)")
    assert not (tmp_path / "models").exists()


def test_more_gpus_than_there_are(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project)
    refused(run("train", "--params", params, "--gpus", "99"), "--gpus 99", "GPU")


def test_nothing_prepared(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project)
    refused(run("train", "--params", params), "manifest.json", "synmlops prepare")
    refused(run("infer", "--params", params), "manifest.json", "synmlops prepare")
    refused(run("evaluate", "--params", params), "manifest.json", "synmlops prepare")


def test_nothing_trained(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project)
    refused(run("infer", "--params", params, "--prepared", tiny_project.prepared), "run.json", "dvc repro")


def test_no_params_file(run: Run) -> None:
    refused(run("prepare"), "params.yaml", "--params")


def test_an_unknown_key_names_the_nearest(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project, train={"learning_rat": 1})
    refused(run("prepare", "--params", params), "learning_rat", "learning_rate")


def test_params_checks_the_file_or_prints_its_schema(
    run: Run, tmp_path: Path, tiny_project: TinyProject
) -> None:
    params = write_params(tmp_path / "params.yaml", tiny_project)
    assert "nothing wrong" in run("params", "--params", params).out
    schema = json.loads(run("params", "--schema").out)
    assert schema["properties"]["train"]["$ref"].endswith("TrainParams")
    assert "learning_rate" in schema["$defs"]["TrainParams"]["properties"]


def test_volumes_on_the_command_line(run: Run, tmp_path: Path, tiny_project: TinyProject) -> None:
    """The list of volumes may stand on the command line, joined with @."""
    for name in ("a", "b"):
        shutil.copy(blobs_as_files(tmp_path), tmp_path / f"{name}.h5")
    params = write_params(
        tmp_path / "params.yaml",
        tiny_project,
        data={"train": None, "validation": None, "test": None, "phantom": _default_phantom()},
    )
    both = ("--image", "a.h5::image@b.h5::image", "--label", "a.h5::label@b.h5::label")
    refused(run("prepare", "--params", params, *both), "--label-kind")
    outcome = run("prepare", "--params", params, *both, "--label-kind", "pairs")
    assert outcome.code == 0, outcome.err
    assert "2 volumes, 4 fold(s)" in outcome.out


def _default_phantom() -> dict[str, object]:
    root = Path(__file__).parents[1]
    tree = yaml.safe_load((root / "params.yaml").read_text())
    return dict(tree["data"]["phantom"])


def test_inspect_reports_a_broken_file_beside_a_good_one(run: Run, tmp_path: Path) -> None:
    good = blobs_as_files(tmp_path)
    broken = tmp_path / "broken.h5"
    broken.write_bytes(good.read_bytes()[:3000])
    outcome = run("inspect", good, broken)
    assert outcome.code == 2
    assert "10 x 48 x 48" in outcome.out
    assert "broken.h5" in outcome.out.replace("\n", "")  # which wraps long paths
    assert run("inspect", good).code == 0


def test_phantom_on_its_own(run: Run, tmp_path: Path) -> None:
    small = {**_default_phantom(), "size_zyx": [14, 96, 96]}
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    tree["data"]["phantom"] = small
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(tree))
    outcome = run("phantom", tmp_path / "made", "--seed", "5", "--params", tmp_path / "p.yaml")
    assert outcome.code == 0
    with h5py.File(tmp_path / "made" / "phantom_5.h5") as file:
        assert file["image"].shape == (14, 96, 96)
        assert file["label"][()].max() >= 2
    assert (tmp_path / "made" / "phantom_5.partners.parquet").exists()
