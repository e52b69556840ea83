"""A picture sheet of what training sees: patches before and after augmentation, and what they weigh."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pydantic import BaseModel

from synmlops.learning.distributed import Ranks, pick_device
from synmlops.learning.look import Look, look_at
from synmlops.learning.loop import Recipe, feed_of
from synmlops.learning.sampling import train_regions
from synmlops.params import AugmentParams, Params, SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.prepared import Fold, Manifest, read_manifest
from synmlops.volumes.tint import CODES, COLOURS, UNTRUSTED_COLOUR, Rgb, tinted

_TILE = 256  # pixels that the longer side of a section takes at least
_GAP, _LINE, _TICK = 10, 20, 8  # pixels
_TICK_COLOUR = "#f7d84a"
_GREY_RANGE = 3.0  # standard deviations from black to mid grey, and on to white
_COLUMNS = ("image", "its target", "image as seen", "target as seen", "loss weight")
_INK, _SOFT, _PAPER = "#1c2126", "#5b636b", "#ffffff"


@dataclass(frozen=True)
class _Row:
    title: str
    look: Look
    section: int  # of the patch as it lies in its volume
    seen_section: int


def run(
    params: Params,
    *,
    prepared: Path,
    out: Path,
    step: int,
    n: int,
    fold: str | None = None,
    only: str | None = None,
    each: bool = False,
) -> list[str]:
    """Draw patches of a training, and write them as a PNG.

    Parameters
    ----------
    params : Params
        The seed is that of the training whose patches are wanted.
    prepared : Path
        What prepare wrote.
    out : Path
        The PNG.
    step : int
        Step whose batch is shown; where `n` is larger than a batch, those of the next steps follow.
    n : int
        Patches.
    fold : str, optional
        Default: the first.
    only : str, optional
        Key of `augment`: this is done to every patch and nothing else.
    each : bool
        Instead of n patches, show one patch in one row for each augmentation, done alone.

    Returns
    -------
    titles : list of str
        One for each row.

    Raises
    ------
    SynmlopsError
        If there is no such fold or augmentation, or the PNG cannot be written.
    """
    manifest = read_manifest(prepared)
    chosen = _fold_of(manifest, fold)
    if each:
        names = list(AugmentParams.model_fields)
        rows = [row for name in names for row in _rows(params, manifest, chosen, step, 1, name)]
    else:
        rows = list(_rows(params, manifest, chosen, step, n, only))
    voxel_nm = next(iter(manifest.volumes.values())).grid.voxel_nm
    heading = (
        f"seed {params.seed}, fold {chosen.name}, patch {' x '.join(map(str, params.sampling.patch_zyx))}"
    )
    with atomic_path(out) as temporary:
        draw_sheet(rows, heading=heading, voxel_nm=voxel_nm).save(temporary, format="PNG")
    return [row.title for row in rows]


def alone(augment: AugmentParams, name: str) -> AugmentParams:
    """Give augmentation in which one thing always happens and nothing else ever does.

    Examples
    --------
    >>> one = alone(AugmentParams(), "noise")
    >>> one.noise.probability, one.flip, one.intensity.probability
    (1.0, 0.0, 0.0)
    """
    names = list(AugmentParams.model_fields)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SynmlopsError(f"--only {name}: no augmentation; {hint}there are {', '.join(names)}")
    changed: dict[str, BaseModel | float] = {}
    for key in names:
        part, chance = getattr(augment, key), float(key == name)
        changed[key] = (
            part.model_copy(update={"probability": chance}) if isinstance(part, BaseModel) else chance
        )
    return augment.model_copy(update=changed)


def _fold_of(manifest: Manifest, name: str | None) -> Fold:
    folds = {fold.name: fold for fold in manifest.folds}
    if name is None:
        return manifest.folds[0]
    if name not in folds:
        raise SynmlopsError(f"--fold {name}: there is none of this name; there are {', '.join(folds)}")
    return folds[name]


def _rows(
    params: Params, manifest: Manifest, fold: Fold, step: int, n: int, only: str | None
) -> Iterator[_Row]:
    """Make n patches from a step on."""
    sampling, recipe = params.sampling, Recipe.of(params)
    if only is not None:
        recipe = replace(recipe, augment=alone(params.augment, only))
    regions = train_regions(fold, manifest, patch_zyx=sampling.patch_zyx)
    ranks = Ranks(rank=0, n_ranks=1, device=pick_device(gpus=0))
    with feed_of(recipe, regions, mean=manifest.mean, std=manifest.std, ranks=ranks) as feed:
        for number in range(n):
            at, index = step + number // sampling.batch_size, number % sampling.batch_size
            look = look_at(feed, at, index, loss=params.loss)
            place = f"step {at}, patch {index}: "
            if only is None:
                yield _Row(f"{place}{look.drawn}", look, *_telling_sections(look))
            else:
                unnamed = replace(look.drawn, augmentations=())
                yield _Row(f"{only}: {place}{unnamed}", look, *_changed_section(look))


def _telling_sections(look: Look) -> tuple[int, int]:
    """Choose the section with most foreground, before and after; the middle one if there is none."""
    before, after = (_foreground(sides).sum(axis=(1, 2)) for sides in (look.sides, look.seen_sides))
    middle = len(before) // 2
    return tuple(int(count.argmax()) if count.any() else middle for count in (before, after))  # type: ignore[return-value]


def _changed_section(look: Look) -> tuple[int, int]:
    """Choose the one with most foreground among the sections that differ at least half as much as any.

    One augmentation alone leaves the sections in their places, but for flips and turns along z.
    """
    change = np.abs(look.seen_image - look.image).mean(axis=(1, 2))
    count = _foreground(look.seen_sides).sum(axis=(1, 2))
    section = int(np.where(change >= change.max() / 2, count, -1).argmax())
    return section, section


def _foreground(sides: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.isin(sides, tuple(CODES.values()))


def draw_sheet(rows: Sequence[_Row], *, heading: str, voxel_nm: tuple[float, float, float]) -> Image.Image:
    """Draw rows of tiles under a heading and a legend.

    A tile is a section and, below it, the patch cut along z and x where the section's ticks are.
    """
    tiles = [_tiles_of(row, voxel_nm) for row in rows]
    height, width = tiles[0][0].shape[:2]
    top = 3 * _LINE + 2 * _GAP
    sheet = Image.new(
        "RGB",
        (len(_COLUMNS) * (width + _GAP) + _GAP, top + len(rows) * (height + _LINE + _GAP) + _GAP),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    large, small = (ImageFont.load_default(size=size) for size in (15, 13))
    pen.text((_GAP, _GAP), f"What training sees: {heading}", fill=_INK, font=large)
    _draw_legend(pen, (_GAP, _GAP + _LINE), small)
    for column, name in enumerate(_COLUMNS):
        pen.text((_GAP + column * (width + _GAP), _GAP + 2 * _LINE), name, fill=_INK, font=small)
    for number, (row, parts) in enumerate(zip(rows, tiles, strict=True)):
        y = top + number * (height + _LINE + _GAP)
        weights = ", ".join(f"{value:.3g}" for value in np.unique(row.look.weight))
        where = f"section {row.section}, seen {row.seen_section}; weights {weights}"
        pen.text((_GAP, y), f"{row.title}; {where}", fill=_SOFT, font=small)
        for column, part in enumerate(parts):
            sheet.paste(Image.fromarray(part), (_GAP + column * (width + _GAP), y + _LINE))
    return sheet


def _draw_legend(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    x, y = at
    for name, colour in {**COLOURS, "not trusted": UNTRUSTED_COLOUR}.items():
        pen.rectangle((x, y + 3, x + 12, y + 14), fill=colour)
        pen.text((x + 18, y), name, fill=_SOFT, font=font)
        x += 18 + int(font.getlength(name)) + 2 * _GAP
    pen.text(
        (x, y),
        "below each section: the patch cut along z (downwards) and x, at the ticks",
        fill=_SOFT,
        font=font,
    )


def _tiles_of(row: _Row, voxel_nm: tuple[float, float, float]) -> list[Rgb]:
    look = row.look
    before, after = _grey(look.image), _grey(look.seen_image)
    at = (row.section, _telling_line(look.sides[row.section]))
    seen_at = (row.seen_section, _telling_line(look.seen_sides[row.seen_section]))
    volumes = (
        (before, at),
        (tinted(before, look.sides), at),
        (after, seen_at),
        (tinted(after, look.seen_sides), seen_at),
        (_weight_colours(look.weight), seen_at),
    )
    return [_tile(colours, *where, voxel_nm) for colours, where in volumes]


def _tile(colours: Rgb, section: int, y: int, voxel_nm: tuple[float, float, float]) -> Rgb:
    """Give a section of a (z, y, x, 3) volume and its cut along z and x, enlarged without smoothing."""
    depth, height, width, _ = colours.shape
    scale = max(1, _TILE // max(height, width))
    in_proportion = round(scale * voxel_nm[0] / voxel_nm[2])
    tall = max(1, min(in_proportion, height * scale // 3 // depth))
    plane = colours[section].repeat(scale, axis=0).repeat(scale, axis=1)
    for edge in (slice(0, _TICK), slice(-_TICK, None)):
        plane[y * scale : y * scale + 2, edge] = ImageColor.getrgb(_TICK_COLOUR)
    cut = colours[:, y].repeat(tall, axis=0).repeat(scale, axis=1)
    line = np.full((3, plane.shape[1], 3), 255, np.uint8)
    return np.concatenate([plane, line, cut])


def _telling_line(sides: NDArray[np.uint8]) -> int:
    """Choose the y of a section with most foreground; the middle one if there is none."""
    count = _foreground(sides).sum(axis=1)
    return int(count.argmax()) if count.any() else len(count) // 2


def _grey(image: NDArray[np.float32]) -> Rgb:
    """Show normalised intensity on a scale that is the same before and after."""
    grey = ((image / _GREY_RANGE + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return grey[..., None].repeat(3, axis=-1)


def _weight_colours(weight: NDArray[np.float32]) -> Rgb:
    """Show 0 as black, the greatest weight of the patch as bright."""
    colours = mpl.colormaps["inferno"](weight / max(float(weight.max()), 1e-6))
    return (np.asarray(colours)[..., :3] * 255).astype(np.uint8)
