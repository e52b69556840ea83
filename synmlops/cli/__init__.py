"""The `synmlops` command: one Typer command per stage and tool, nothing else."""

import importlib
from pathlib import Path

from synmlops.cli import exchange, pipeline, records, tools
from synmlops.cli.common import app, plain_errors

__all__ = ["app", "exchange", "main", "pipeline", "records", "tools"]

for _name in ("pytc", "checkpoint", "cremi", "points", "exports"):  # TEMPORARY
    if (Path(__file__).parent / f"{_name}.py").exists():
        importlib.import_module(f"synmlops.cli.{_name}")


def main() -> None:
    """Run the command line."""
    with plain_errors():
        app()
