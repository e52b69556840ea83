"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


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
