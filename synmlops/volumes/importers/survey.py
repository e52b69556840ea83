"""What a dry run of an importer shows: what it found, what is odd, a picture of a few synapses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.tint import COLOURS, tinted

Box = tuple[slice, slice, slice]
SidesIn = Callable[[Box], NDArray[np.uint8]]

_WINDOW_NM = 1000.0  # width of a tile's tissue
_TILE, _GAP, _LINE = 256, 10, 20  # pixels
_COLUMNS = 3
_INK, _SOFT, _PAPER = "#1c2126", "#5b636b", "#ffffff"


@dataclass(frozen=True)
class Survey:
    """What an importer found, before it writes anything."""

    title: str
    rows: tuple[tuple[str, str], ...]  # what, and its value
    odd: tuple[str, ...] = ()  # sentences: what a user should look at before going on


def name_of_outputs(default: str, given: str | None) -> str:
    """Give the name of what an import writes: that of its source unless another is asked for.

    Raises
    ------
    SynmlopsError
        If the name is no plain one.

    Examples
    --------
    >>> name_of_outputs("sample", None), name_of_outputs("sample", "a")
    ('sample', 'a')
    """
    chosen = default if given is None else given
    if chosen in ("", "..") or Path(chosen).name != chosen:
        raise SynmlopsError(f"--name {chosen}: must be a plain name, such as sample_a")
    return chosen


def render(survey: Survey) -> RenderableType:
    """Lay a survey out for a terminal."""
    table = Table.grid(padding=(0, 2))
    for row in survey.rows:
        table.add_row(*row)
    odd = [Text(f"  ! {sentence}", style="yellow") for sentence in survey.odd]
    return Group(Text(survey.title, style="bold"), table, *odd or [Text("  nothing odd found")])


def draw_synapses(
    path: Path,
    *,
    image: Any,
    sides: SidesIn | None,
    points_zyx: ArrayLike,
    voxel_nm: tuple[float, float, float],
    titles: Sequence[str] = (),
    n: int = 6,
) -> None:
    """Draw a few synapses, each as the bare section and with sides and points over it.

    A tile is the section of the pre point (of the post point where there is none), about a micrometre wide.
    A dot is a point that lies in the section, a ring one in another; a line leads from pre to post. A point
    without another has the colour of the union.

    Parameters
    ----------
    path : Path
        PNG.
    image : (Z, Y, X) array-like of uint8 or uint16, or None
        Sliced where tiles are; without one the tissue is black. Its shape bounds the tiles, else the points
        do.
    sides : callable or None
        Gives codes of `synmlops.volumes.prepared` in a box.
    points_zyx : (K, 2, 3) array of float
        Pre and post in voxels; NaN where there is none.
    voxel_nm : tuple of float
    titles : sequence of str
        One each of the K, else they are numbered from 1.
    n : int
        How many of the K are drawn, spread evenly over them.

    Raises
    ------
    ValueError
        If there are no points.
    """
    points = np.asarray(points_zyx, np.float64).reshape(-1, 2, 3)
    if not len(points):
        raise ValueError("points_zyx: there is no synapse to draw")
    shown = np.unique(np.linspace(0, len(points) - 1, min(n, len(points))).round().astype(int))
    shape = image.shape if image is not None else np.nanmax(points, axis=(0, 1)).astype(int) + 2
    tiles = [_tile(image, sides, points[k], shape=shape, voxel_nm=voxel_nm) for k in shown]
    names = [titles[k] if titles else f"synapse {k + 1}" for k in shown]
    with atomic_path(path) as temporary:
        _sheet(tiles, names, total=len(points)).save(temporary, format="PNG")


def _tile(
    image: Any,
    sides: SidesIn | None,
    ends_zyx: NDArray[np.float64],
    *,
    shape: Sequence[int],
    voxel_nm: tuple[float, float, float],
) -> Image.Image:
    centre = ends_zyx[0] if np.isfinite(ends_zyx[0]).all() else ends_zyx[1]
    half = np.maximum(np.array([0.0, _WINDOW_NM / 2, _WINDOW_NM / 2]) / voxel_nm, (0, 8, 8))
    last = np.array(shape) - 1
    low = (centre - half).round().astype(int).clip(0, last)
    high = ((centre + half).round().astype(int) + 1).clip(low + 1, last + 1)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    box = (z, y, x)
    sized = tuple(part.stop - part.start for part in box)
    grey = _stretched(np.asarray(image[box])) if image is not None else np.zeros(sized, np.uint8)
    plain = grey[..., None].repeat(3, axis=-1)
    over = plain if sides is None else tinted(plain, sides(box))
    side = np.array([_TILE, _TILE])
    scale = side / half[1:] / 2  # pixels of a voxel along y, x
    tile = Image.new("RGB", (2 * _TILE + 2, _TILE), _PAPER)
    for column, colours in enumerate((plain, over)):
        wide, tall = round(sized[2] * scale[1]), round(sized[1] * scale[0])
        part = Image.fromarray(colours[0]).resize(
            (min(wide, _TILE), min(tall, _TILE)), Image.Resampling.NEAREST
        )
        tile.paste(part, (column * (_TILE + 2), 0))
    _draw_ends(ImageDraw.Draw(tile), ends_zyx, start_zyx=low, scale=scale)
    return tile


def _draw_ends(
    pen: ImageDraw.ImageDraw,
    ends_zyx: NDArray[np.float64],
    *,
    start_zyx: NDArray[Any],
    scale: NDArray[np.float64],
) -> None:
    """Draw the points of one synapse, and the line between them, over the right half of a tile."""
    at = (ends_zyx[:, 1:] - start_zyx[1:] + 0.5) * scale
    places = [(_TILE + 2 + float(x), float(y)) if np.isfinite(y) else None for y, x in at]
    pre, post = places
    if pre and post:
        pen.line([pre, post], fill="#ffffff", width=2)
    for name, place, z in zip(("pre", "post"), places, ends_zyx[:, 0], strict=True):
        if place is None:
            continue
        colour = COLOURS[name if pre and post else "union"]
        in_section = round(float(z)) == start_zyx[0]
        x, y = place
        fill = colour if in_section else None
        pen.ellipse(
            (x - 5, y - 5, x + 5, y + 5),
            fill=fill,
            outline="#ffffff" if in_section else colour,
            width=2,
        )


def _stretched(section: NDArray[Any]) -> NDArray[np.uint8]:
    """Spread the grey levels between the first and the last per cent over black to white."""
    low, high = np.percentile(section, (1, 99))
    scaled = (section.astype(np.float32) - low) / max(high - low, 1)
    return np.asarray((scaled * 255).clip(0, 255).astype(np.uint8))


def _sheet(tiles: Sequence[Image.Image], names: Sequence[str], *, total: int) -> Image.Image:
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    top = 2 * _LINE + _GAP
    size = (columns * (width + _GAP) + _GAP, top + rows * (height + _LINE + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size=points) for points in (15, 13))
    pen.text((_GAP, _GAP), f"{len(tiles)} of {total} synapses", fill=_INK, font=large)
    x = _GAP
    for name, colour in COLOURS.items():
        pen.rectangle((x, _GAP + _LINE + 3, x + 12, _GAP + _LINE + 14), fill=colour)
        pen.text((x + 18, _GAP + _LINE), name, fill=_SOFT, font=small)
        x += 18 + int(small.getlength(name)) + 2 * _GAP
    pen.text((x, _GAP + _LINE), "ring: the point lies in another section", fill=_SOFT, font=small)
    for k, (tile, name) in enumerate(zip(tiles, names, strict=True)):
        at = (_GAP + k % columns * (width + _GAP), top + k // columns * (height + _LINE + _GAP))
        pen.text(at, name, fill=_SOFT, font=small)
        sheet.paste(tile, (at[0], at[1] + _LINE))
    return sheet
