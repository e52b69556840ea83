"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import TinyProject, make_blobs, pairs_in, tiny_params

from synmlops.learning.allocator import keep_freed_memory
from synmlops.params import DataParams
from synmlops.stages.prepare import run as run_prepare
from synmlops.volumes.prepared import ROLES

LONGEST_FIRST = (
    *("test_pipeline", "test_train_stage", "test_distributed", "test_infer", "test_tune", "test_engines"),
    *("test_tracking_server", "test_network_report", "test_evaluate", "test_baselines", "test_serving"),
)
"""Files that take more than half a minute: begun last, one of them would leave the other processes idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; within a file the order stays."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Undo what training and inference set for their process, which is that of all tests here."""
    yield
    keep_freed_memory(False)


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
