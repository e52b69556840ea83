"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TinyProject, make_blobs, pairs_in, tiny_params

from synmlops.params import DataParams
from synmlops.stages.prepare import run as run_prepare
from synmlops.volumes.prepared import ROLES


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Give a path below the shared data: $SYNMLOPS_SHARED, else `shared` beside the repository."""
    root = Path(os.environ.get("SYNMLOPS_SHARED", Path(__file__).parents[2] / "shared"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"{path} is not there; set SYNMLOPS_SHARED to the folder that holds {name}")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Prepare three volumes of blobs, one for each role; nothing may write there."""
    root = tmp_path_factory.mktemp("tiny")
    paths = {role: make_blobs(n).write(root / f"{role}.h5") for n, role in enumerate(ROLES)}
    data = DataParams(
        train=pairs_in(paths["train"]), validation=pairs_in(paths["validation"]), test=pairs_in(paths["test"])
    )
    manifest, _ = run_prepare(data, out=root / "prepared")
    return TinyProject(root / "prepared", manifest, tiny_params(data))
