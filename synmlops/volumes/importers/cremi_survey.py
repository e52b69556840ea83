"""What was found in a CREMI file, in words and in a picture; and the import as a whole."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from synmlops.volumes.cremi import RAW
from synmlops.volumes.importers.cremi import CremiLabels, label_cremi, write_labels
from synmlops.volumes.importers.survey import Survey, draw_synapses, name_of_outputs
from synmlops.volumes.origin import made_by
from synmlops.volumes.store import open_volume
from synmlops.volumes.table import points_nm

_LISTED = 3  # of each kind; all stand in NAME_doubts.csv


@dataclass(frozen=True)
class CremiOptions:
    """How labels are derived; see `label_cremi`."""

    thickness_nm: float
    reach_nm: float
    leave_out_faulty: bool = False


def name_of(source: Path, name: str | None) -> str:
    """Give the name of the outputs; see `name_of_outputs`."""
    return name_of_outputs(source.stem, name)


def survey_cremi(source: Path, options: CremiOptions, picture: Path) -> Survey:
    """Derive labels, draw a few synapses, and write nothing else.

    Raises
    ------
    SynmlopsError
        As `label_cremi`, or if the picture cannot be written.
    """
    made = _labels(source, options)
    draw(made, picture)
    return survey_of(made)


def import_cremi(source: Path, dest: Path, options: CremiOptions, *, name: str | None = None) -> Survey:
    """Write DEST/NAME.h5, DEST/NAME_partners.parquet and DEST/NAME_doubts.csv, and say what is in them.

    Raises
    ------
    SynmlopsError
        As `label_cremi` and `write_labels`; nothing is written then.
    """
    chosen = name_of(source, name)
    made = _labels(source, options)
    origin = made_by("import cremi", {"source": source, **asdict(options)})
    write_labels(made, dest, chosen, attrs=origin)
    return survey_of(made)


def params_lines(dest: Path, name: str) -> list[str]:
    """Give what to put under `data` in params.yaml.

    Examples
    --------
    >>> params_lines(Path("data/cremi"), "a")[:3]
    ['train:', '  image: data/cremi/a.h5::image', '  label: data/cremi/a.h5::label']
    """
    volumes = {part: f"{dest / name}.h5::{part}" for part in ("image", "label", "neurons", "mask")}
    keys = volumes | {"partners": str(dest / f"{name}_partners.parquet"), "label_kind": "pairs"}
    order = ("image", "label", "label_kind", "neurons", "mask", "partners")
    return ["train:", *(f"  {key}: {keys[key]}" for key in order)]


def survey_of(made: CremiLabels) -> Survey:
    """Count what was found and what was masked."""
    table = made.partners
    shown = table[table.labelled]
    posts = shown.groupby("site").size()
    trusted = float(np.mean([(section != 0).mean() for section in made.mask]))
    labelled = float(np.mean([(section != 0).mean() for section in made.label]))
    voxel = " x ".join(f"{nm:g}" for nm in made.grid.voxel_nm)
    inner = " x ".join(map(str, made.label.shape))
    rows = (
        ("image", f"{' x '.join(map(str, made.shape_zyx))} voxels of {voxel} nm (z y x)"),
        ("labels", f"pairs, {inner} voxels from voxel {[part.start for part in made.box]}"),
        ("annotated pairs", f"{len(table)}, of {len(made.annotations.ids)} points"),
        (
            "labelled",
            f"{len(shown)} pairs in {len(posts)} sites, {int((posts > 1).sum())} of them polyadic",
        ),
        ("synapse", f"{labelled:.2%} of the labels' voxels"),
        ("trusted", f"{trusted:.2%} of the labels' voxels"),
    )
    return Survey(str(made.source), rows, _odd(made))


def _odd(made: CremiLabels) -> tuple[str, ...]:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for doubt in made.doubts:
        at = ", ".join(f"{c:.0f}" for c in doubt.at_nm)
        by_kind[doubt.kind].append(f"{doubt.what} at {at} nm")
    odd = []
    for kind, found in by_kind.items():
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        odd.append(f"masked: {len(found)} {kind} ({'; '.join(found[:_LISTED])}{more})")
    if made.label.shape != made.shape_zyx:
        odd.append("the image is larger than the labels: it is kept for context, and masked outside them")
    return tuple(odd)


def draw(made: CremiLabels, picture: Path) -> None:
    """Draw a few pairs with their labels; masked tissue is marked as such."""
    points = (points_nm(made.partners) - made.grid.offset_nm) / np.asarray(made.grid.voxel_nm)
    titles = [
        f"{pre} -> {post}" + ("" if labelled else " (masked)")
        for pre, post, labelled in zip(
            made.partners.pre_annotation, made.partners.post_annotation, made.partners.labelled, strict=True
        )
    ]
    with open_volume(f"{made.source}::{RAW}") as image:
        draw_synapses(
            picture,
            image=image,
            sides=made.sides,
            points_zyx=points,
            voxel_nm=made.grid.voxel_nm,
            titles=titles,
        )


def _labels(source: Path, options: CremiOptions) -> CremiLabels:
    return label_cremi(
        source,
        thickness_nm=options.thickness_nm,
        reach_nm=options.reach_nm,
        leave_out_faulty=options.leave_out_faulty,
    )
