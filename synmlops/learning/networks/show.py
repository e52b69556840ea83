"""A network's report as a table on a terminal, as plain lines elsewhere, and as JSON for scripts."""

import json

from rich.console import Console
from rich.table import Table

from synmlops.learning.networks.report import NetworkReport
from synmlops.section import Nm, Zyx


def show(report: NetworkReport, *, batch: int, voxel_nm: Nm | None) -> None:
    """Print a report, and below it what does not go together."""
    rows = lines_of(report, batch=batch, voxel_nm=voxel_nm)
    console = Console()
    if console.is_terminal:
        table = Table(show_header=False, title=f"network {report.name}")
        for title, value in rows:
            table.add_row(title, value)
        console.print(table)
        for advice in report.advice():
            console.print(advice)
        return
    print(f"network {report.name}")
    longest = max(len(title) for title, _ in rows)
    for title, value in rows:
        print(f"{title:{longest}}  {value}")
    for advice in report.advice():
        print(advice)


def lines_of(report: NetworkReport, *, batch: int, voxel_nm: Nm | None) -> list[tuple[str, str]]:
    """Give the rows of the table: what it is, how much."""
    memory = report.memory
    return [
        ("parameters", f"{report.parameters:,}"),
        ("patches are multiples of", _voxels(report.total_pool_zyx)),
        ("receptive field, at most", _extent(report.field_zyx, voxel_nm)),
        (
            "receptive field, by gradients",
            "not measured: too long, or not possible in double precision"
            if report.measured_zyx is None
            else _extent(report.measured_zyx, voxel_nm),
        ),
        ("forward pass", f"{report.gflop_per_megavoxel:.1f} GFLOP per megavoxel"),
        ("training", f"{3 * report.gflop_per_megavoxel:.1f} GFLOP per megavoxel"),
        ("memory beside patches", f"{_mib(memory.fixed)} (weights, gradients, averages, optimiser)"),
        (f"memory of a patch of {_voxels(report.patch_zyx)}", f"{_mib(memory.patch)} ({memory.how})"),
        (f"memory of a batch of {batch}", _mib(memory.of_batch(batch))),
    ]


def as_json(report: NetworkReport, *, batch: int, voxel_nm: Nm | None) -> str:
    """Give the report as a JSON object; sizes in voxels and nm along z, y, x, memory in bytes."""
    memory = report.memory
    tree = {
        "name": report.name,
        "parameters": report.parameters,
        "total_pool_zyx": report.total_pool_zyx,
        "receptive_field_zyx": report.field_zyx,
        "receptive_field_nm": _in_nm(report.field_zyx, voxel_nm),
        "measured_field_zyx": report.measured_zyx,
        "gflop_per_megavoxel": report.gflop_per_megavoxel,
        "patch_zyx": report.patch_zyx,
        "memory": {
            "fixed": memory.fixed,
            "patch": memory.patch,
            "batch_size": batch,
            "batch": memory.of_batch(batch),
            "how": memory.how,
        },
        "advice": report.advice(),
    }
    return json.dumps(tree, indent=1)


def _extent(size_zyx: Zyx, voxel_nm: Nm | None) -> str:
    """Give a size in voxels, and in nm where the voxel size is known.

    Examples
    --------
    >>> _extent((3, 92, 92), (40.0, 8.0, 8.0))
    '3 x 92 x 92 voxels, 120 x 736 x 736 nm'
    """
    in_nm = _in_nm(size_zyx, voxel_nm)
    nm = "" if in_nm is None else f", {' x '.join(f'{size:.0f}' for size in in_nm)} nm"
    return f"{_voxels(size_zyx)} voxels{nm}"


def _in_nm(size_zyx: Zyx, voxel_nm: Nm | None) -> list[float] | None:
    if voxel_nm is None:
        return None
    return [n * nm for n, nm in zip(size_zyx, voxel_nm, strict=True)]


def _voxels(size_zyx: Zyx) -> str:
    return " x ".join(map(str, size_zyx))


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
