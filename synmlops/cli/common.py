"""What the commands share: the app, options, errors in plain words, readers of what is typed."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from synmlops.params import IncompleteError, SynmlopsError

if TYPE_CHECKING:
    from synmlops.volumes.prepared import Box

_Number = TypeVar("_Number", int, float)

app = typer.Typer(
    help="Find synaptic partners in electron-microscopy volumes and keep every experiment comparable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _find_modules_beside(params: Path) -> Path:
    """Have Python look for a network of the user's own beside params.yaml, after everywhere else."""
    folder = str(params.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return params


ParamsFile = Annotated[Path, typer.Option("--params", help="The params file.", callback=_find_modules_beside)]
PreparedFolder = Annotated[Path, typer.Option("--prepared", help="What prepare wrote.")]
ModelsFolder = Annotated[Path, typer.Option("--models", help="What train wrote.")]
PredictedFolder = Annotated[Path, typer.Option("--predicted", help="What infer wrote.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs to use; default: all there are, else the CPU.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one message and exit code 2, or 3 if all else was done."""
    try:
        yield
    except IncompleteError as error:
        print(f"synmlops: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None
    except SynmlopsError as error:
        from synmlops.learning.launch import tell_launcher

        if tell_launcher(error):
            raise SystemExit(2) from None
        hint = ""
        if "DVC_STAGE" in os.environ:
            hint = "\nDVC removed this stage's outputs before it ran; `dvc checkout` brings them back."
        print(f"synmlops: {error}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def three_numbers(text: str | None, option: str = "--voxel-nm") -> tuple[float, float, float] | None:
    """Read an option of three numbers."""
    return None if text is None else _triple(option, text, float, "three numbers, such as 40,8,8")


def three_voxels(option: str, text: str | None, *, least: int) -> tuple[int, int, int] | None:
    """Read an option of three whole numbers, none below LEAST."""
    if text is None:
        return None
    found = _triple(option, text, int, "three whole numbers z,y,x, such as 64,512,512")
    if min(found) < least:
        raise SynmlopsError(f"{option} {text}: must not be below {least}")
    return found


def _triple(
    option: str, text: str, kind: Callable[[str], _Number], wanted: str
) -> tuple[_Number, _Number, _Number]:
    try:
        z, y, x = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise SynmlopsError(f"{option} {text}: give {wanted}") from error
    return z, y, x


def box_of(roi: str | None) -> "Box | None":
    """Read --roi, `z0:z1,y0:y1,x0:x1`.

    Raises
    ------
    SynmlopsError
        If it is anything else, or empty.

    Examples
    --------
    >>> box_of("0:16,100:356,0:256")
    Box(start_zyx=(0, 100, 0), stop_zyx=(16, 356, 256))
    """
    from synmlops.volumes.prepared import Box

    if roi is None:
        return None
    try:
        (z0, z1), (y0, y1), (x0, x1) = (map(int, part.split(":")) for part in roi.split(","))
    except ValueError as error:
        raise SynmlopsError(
            f"--roi {roi}: give voxels as z0:z1,y0:y1,x0:x1, such as 0:16,0:256,0:256"
        ) from error
    box = Box((z0, y0, x0), (z1, y1, x1))
    if min(box.start_zyx) < 0 or min(box.shape_zyx) < 1:
        raise SynmlopsError(f"--roi {roi}: holds no voxel; each end lies after its start")
    return box


def suffix_of(format: str | None) -> str | None:
    """Read --format of a volume."""
    if format not in (None, "h5", "zarr"):
        raise SynmlopsError(f"--format {format}: must be h5 or zarr")
    return format and f".{format}"


def part_of(text: str | None) -> tuple[int, int]:
    """Read --part: the share and how many there are."""
    if text is None:
        return 1, 1
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise SynmlopsError(f"--part {text}: give a share and how many there are, such as 3/64")
    return int(number), int(of)
