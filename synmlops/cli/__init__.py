"""The `synmlops` command: one Typer command per stage and tool, nothing else."""

from synmlops.cli import checkpoint, cremi, exchange, exports, pipeline, points, pytc, records, tools
from synmlops.cli.common import app, plain_errors

__all__ = [
    "app",
    "checkpoint",
    "cremi",
    "exchange",
    "exports",
    "main",
    "pipeline",
    "points",
    "pytc",
    "records",
    "tools",
]


def main() -> None:
    """Run the command line."""
    with plain_errors():
        app()
