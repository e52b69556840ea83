import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TinyProject, make_blobs

from synmlops.params import SynmlopsError
from synmlops.volumes.prepared import Box, Manifest, Region, read_manifest, write_manifest
from synmlops.volumes.store import open_volume


@pytest.fixture
def folder(tiny_project: TinyProject, tmp_path: Path) -> Path:
    """Give a copy of the prepared folder that may be broken."""
    for path in tiny_project.prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_manifest_comes_back_as_it_was_wherever_the_folder_lies(
    tiny_project: TinyProject, tmp_path: Path
) -> None:
    assert read_manifest(tiny_project.prepared) == tiny_project.manifest
    for volume in tiny_project.manifest.volumes.values():
        (tmp_path / volume.path.name).write_bytes(volume.path.read_bytes())
    first = next(iter(tiny_project.manifest.volumes.values()))
    with_table = replace(first, partners=tiny_project.prepared / "train.partners.parquet")
    manifest = Manifest({"train": with_table}, tiny_project.manifest.folds, mean=1 / 3, std=2.5)
    write_manifest(manifest, tmp_path)
    moved = read_manifest(tmp_path)
    assert moved.volumes["train"] == replace(
        with_table, path=tmp_path / "train.h5", partners=tmp_path / "train.partners.parquet"
    )
    assert (moved.folds, moved.mean, moved.std) == (manifest.folds, manifest.mean, manifest.std)


def test_manifest_names_no_folder_of_its_own(tiny_project: TinyProject) -> None:
    tree = json.loads((tiny_project.prepared / "manifest.json").read_text())
    assert tree["volumes"]["train"]["path"] == "train.h5"


def test_digests_name_volume_and_part(tiny_project: TinyProject) -> None:
    digests = tiny_project.manifest.digests
    assert set(digests) == {"train/image", "validation/image", "test/image"}  # the label is in the same file
    assert all(len(digest) == 64 for digest in digests.values())


def test_memory_maps_are_the_datasets_and_read_only(tiny_project: TinyProject) -> None:
    volume = tiny_project.manifest.volumes["train"]
    for name in ("image", "sides", "foreground_sum"):
        array = getattr(volume, name)
        with open_volume(f"{volume.path}::{name}") as stored:
            np.testing.assert_array_equal(array, stored.read())
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1


def test_a_box_is_read_alone(tiny_project: TinyProject) -> None:
    box = Box((1, 20, 3), (4, 30, 40))
    label = tiny_project.manifest.volumes["test"].read("label", box)
    np.testing.assert_array_equal(label, make_blobs(2).pairs[1:4, 20:30, 3:40])
    assert tiny_project.manifest.volumes["test"].read("neurons", box) is None


def test_box() -> None:
    box = Box((1, 2, 3), (4, 6, 8))
    assert box.shape_zyx == (3, 4, 5)
    assert np.zeros((9, 9, 9))[box.slices].shape == (3, 4, 5)
    assert Region("a", "a", box) == Region("a", "a", Box((1, 2, 3), (4, 6, 8)))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"volumes": {"a": {}}}', '{"volumes": {}, "folds": [1]}']
)
def test_broken_manifest_is_one_message(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(SynmlopsError, match=r"manifest.json: is missing or broken .*run `synmlops prepare`"):
        read_manifest(folder)


def test_missing_manifest_or_volume(folder: Path, tmp_path: Path) -> None:
    (folder / "train.h5").unlink()
    with pytest.raises(SynmlopsError, match=r"train.h5: is missing"):
        read_manifest(folder)
    with pytest.raises(SynmlopsError, match=r"manifest.json: is missing"):
        read_manifest(tmp_path / "nothing")


def test_truncated_volume_is_one_message(folder: Path) -> None:
    path = folder / "train.h5"
    path.write_bytes(path.read_bytes()[:-30_000])
    volume = read_manifest(folder).volumes["train"]
    with pytest.raises(SynmlopsError, match=r"train.h5: is truncated"):
        _ = volume.foreground_sum
    with pytest.raises(SynmlopsError, match=r"train.h5: is truncated"):
        volume.read("label", Box((0, 0, 0), (1, 1, 1)))
