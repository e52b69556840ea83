"""What happens to the files of a volume while nobody looks."""

import os
from pathlib import Path


def files_of(path: Path) -> list[Path]:
    """Give a file, or all in a folder."""
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def seen_elsewhere(path: Path) -> None:
    """Give files other inodes and times without fractions, as another machine may see the same ones."""
    for file in files_of(path):
        seconds = file.stat().st_mtime_ns // 10**9
        copy = file.with_name(f"{file.name}.copy")
        copy.write_bytes(file.read_bytes())
        os.utime(copy, (seconds, seconds))
        copy.replace(file)


def aged(path: Path, seconds: float = 0) -> None:
    """Date files to one moment, or some seconds after it."""
    for file in files_of(path):
        os.utime(file, (1e9 + 0.25 + seconds,) * 2)
