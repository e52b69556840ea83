"""A PyTorch Connectomics config as params.yaml, with a table of what became of each of its keys.

What the files do not set has the default of their version there, not ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from synmlops.explain import explain
from synmlops.learning_params import NetworkParams
from synmlops.params import Params
from synmlops.section import Nm, SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.importers.pytc_augment import take_augmentation
from synmlops.volumes.importers.pytc_draft import Draft, Fate, Row
from synmlops.volumes.importers.pytc_keys import Settings, read_settings
from synmlops.volumes.importers.pytc_learning import (
    Target,
    find_target,
    take_losses,
    take_network,
    take_sampling,
)
from synmlops.volumes.importers.pytc_network import grey_levels_of
from synmlops.volumes.importers.pytc_paths import Files, files_of
from synmlops.volumes.importers.pytc_running import PLACELESS, take_decoding, take_inference, take_training
from synmlops.volumes.store import open_volume

_UNNAMED = Files(image=("data/raw/image.h5",), label=("data/raw/label.h5",))
_BANDS = 4


@dataclass(frozen=True)
class Imported:
    """What a config became."""

    source: str
    version: str  # "v0" or "v1"
    params: Params
    rows: tuple[Row, ...]  # one for each key that the files set, by fate
    notes: tuple[str, ...]  # sentences: what to look at before training


def import_config(path: Path, *, base: Path | None = None, voxel_nm: Nm | None = None) -> Imported:
    """Turn a config, over its base, into our params.

    Parameters
    ----------
    path, base : Path
        As `--config-file` and `--config-base` take them there.
    voxel_nm : tuple of float, optional
        z y x, which its configs do not say.

    Raises
    ------
    SynmlopsError
        If a file cannot be read, has unknown keys or a value that cannot be, or nothing of it is ours: no
        target of synapses, no such network, no such loss.
    """
    return params_of(read_settings(path, base), voxel_nm=voxel_nm)


def params_of(settings: Settings, *, voxel_nm: Nm | None = None) -> Imported:
    """Turn settings into our params; see `import_config`."""
    draft = Draft(settings)
    for key, why in PLACELESS.items():
        draft.say(key, Fate.NONE, why=why)
    draft.set("seed", 0)
    target = find_target(draft)
    network = take_network(draft, target)
    has_mask = settings.get("DATASET.VALID_MASK_NAME") is not None
    take_sampling(draft, network, has_mask=has_mask)
    take_augmentation(draft, _zyx(draft.tree["sampling"]["patch_zyx"]))
    take_losses(draft, target, has_mask=has_mask)
    take_training(draft)
    take_inference(draft, network)
    take_decoding(draft, target)
    _take_data(draft, target, network, voxel_nm)
    params = _validated(draft)
    order, place = list(Fate), {key: n for n, key in enumerate(settings.given)}
    by_fate = sorted(draft.rows, key=lambda key: (order.index(draft.rows[key].fate), place[key]))
    rows = [draft.rows[key] for key in by_fate]
    draft.notes.extend(_ALWAYS)
    return Imported(settings.source, settings.version, params, tuple(rows), tuple(dict.fromkeys(draft.notes)))


def render_table(imported: Imported) -> RenderableType:
    """Lay out what became of each key, for a terminal."""
    table = Table(title=f"{imported.source} (PyTorch Connectomics {imported.version})", title_justify="left")
    for name, width in (("key and value there", 34), ("here", 30), ("why, or how", 30)):
        table.add_column(name, overflow="fold", ratio=width)
    for fate in Fate:
        rows = [row for row in imported.rows if row.fate is fate]
        if not rows:
            continue
        table.add_section()
        table.add_row(Text(f"{fate.value} ({len(rows)})", style="bold"))
        for row in rows:
            table.add_row(Text(f"{row.key}: {row.value}"), Text(row.ours), Text(row.why, style="dim"))
    notes = [Text(f"  ! {note}", style="yellow") for note in imported.notes]
    return Group(table, *notes)


def write_params(imported: Imported, out: Path, *, force: bool = False) -> None:
    """Write params.yaml, in which every field stands, with a line on each key that is not carried over.

    Raises
    ------
    SynmlopsError
        If `out` is there already and `force` is not given, or the place cannot be written.
    """
    if out.exists() and not force:
        raise SynmlopsError(f"{out}: is there already; give --out another file, or --force to replace it")
    with atomic_path(out) as partial:
        partial.write_text(as_yaml(imported), encoding="utf-8")


def as_yaml(imported: Imported) -> str:
    """Give the text of params.yaml."""
    lines = [
        f"# From {imported.source} of PyTorch Connectomics {imported.version}.",
        "# Every field stands here, since DVC compares this file; synmlops/params.py says what each means.",
    ]
    for fate in (Fate.CHANGED, Fate.NONE):
        keys = [row.key for row in imported.rows if row.fate is fate]
        if keys:
            lines.append(f"# {fate.value.capitalize()}: {', '.join(keys)}")
    tree = imported.params.model_dump(mode="json")
    dumped = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    return "\n".join([*(_wrapped(line) for line in lines), "", dumped])


def _wrapped(line: str, width: int = 110) -> str:
    """Break a comment into several at its spaces."""
    words, rows = line.split(" "), [""]
    for word in words:
        if len(rows[-1]) + 1 + len(word) > width:
            rows.append("#  ")
        rows[-1] += f" {word}" if rows[-1] else word
    return "\n".join(rows)


def _take_data(draft: Draft, target: Target, network: NetworkParams, voxel_nm: Nm | None) -> None:
    draft.set("data.voxel_nm", None if voxel_nm is None else list(voxel_nm))
    if voxel_nm is None:
        draft.notes.append(
            "its configs say no voxel size: set data.voxel_nm (--voxel-nm) unless the files do"
        )
    _take_scale(draft)
    for role in ("phantom", "train", "validation", "test", "split"):
        draft.set(f"data.{role}", None)
    train = _train_files(draft)
    _take_grey(draft, train)
    draft.set("data.train", _volumes(train, target.kind))
    _say_files(draft, "train", "DATASET.", train)
    _take_other_roles(draft, target, network, train)
    draft.notes.extend(train.notes)


def _train_files(draft: Draft) -> Files:
    """List what trains; a place to fill in where the config leaves it to the command line."""
    files = files_of(draft, "train")
    if files.image and files.label:
        return files
    unnamed = Files(files.image or _UNNAMED.image, files.label or _UNNAMED.label, files.mask, files.notes)
    if len(unnamed.label) != len(unnamed.image):
        labels = tuple(f"data/raw/label_{n + 1}.h5" for n in range(len(unnamed.image)))
        unnamed = Files(unnamed.image, labels, unnamed.mask, unnamed.notes)
    draft.notes.append(
        "the file names no training images or labels (a command line does, there): fill in data.train"
    )
    return unnamed


def _take_other_roles(draft: Draft, target: Target, network: NetworkParams, train: Files) -> None:
    """Validate and test on what is named for it; where that is not both, cross-validate over the training."""
    validation, test = files_of(draft, "validation"), _test_files(draft)
    taken = {*train.image, *validation.image}
    test = Files(image=tuple(path for path in test.image if path not in taken), notes=test.notes)
    if validation.image and validation.label and test.image:
        draft.set("data.validation", _volumes(validation, target.kind))
        draft.set("data.test", _volumes(test, None))
        draft.notes.extend((*validation.notes, *test.notes))
        _say_files(draft, "validation", "DATASET.VAL_", validation)
        _say_files(draft, "test", "INFERENCE.", test)
        return
    guard = network.receptive_field_zyx()[1]
    draft.set("data.split", {"axis": "y", "bands": _BANDS, "guard": guard})
    missing = "labelled validation volumes" if not validation.image else "images to test on"
    draft.notes.append(
        f"the file names no {missing}, so data.split scores by cross-validation: {_BANDS} bands of y, one "
        "model each; or name data.validation and data.test, and set split to null"
    )
    draft.say_all(
        "DATASET.VAL_IMAGE_NAME DATASET.VAL_LABEL_NAME DATASET.VAL_VALID_MASK_NAME",
        Fate.NONE,
        why="data.validation wants a data.test beside it; see the note on data.split",
    )
    shown = " ".join(test.image[:1]) or "IMAGE"
    tiled = _is_tiled(draft, "INFERENCE.DO_CHUNK_TITLE")
    draft.say_all(
        "INFERENCE.IMAGE_NAME INFERENCE.INPUT_PATH INFERENCE.IS_ABSOLUTE_PATH",
        Fate.NONE if tiled else Fate.RENAMED,
        why=_TILES if tiled else f"after training: synmlops infer --image {shown}",
    )


_ALWAYS = (
    "what the file leaves open has its version's default, such as all its augmentation, not ours",
    "two of its faults are not taken over: relabelling each crop, which swaps pre and post in part of the "
    "crops (REDUCE_LABEL), and ids that wrap above 127 and 32 767 synapses",
    "paths are relative to the folder you run in, as they are there",
)
_TILES = "tiles in JSON are not read: convert them to Zarr; volumes of any size are read by block"


def _test_files(draft: Draft) -> Files:
    for key in ("DATASET.DO_CHUNK_TITLE", "INFERENCE.DO_CHUNK_TITLE"):
        tiled = _is_tiled(draft, key)
        draft.say(key, Fate.NONE if tiled else Fate.CARRIED, why=_TILES if tiled else "no tiles")
    if _is_tiled(draft, "DATASET.DO_CHUNK_TITLE"):
        draft.notes.append(f"DATASET.DO_CHUNK_TITLE: {_TILES}, and name that in data.train")
    return Files() if _is_tiled(draft, "INFERENCE.DO_CHUNK_TITLE") else files_of(draft, "test")


def _is_tiled(draft: Draft, key: str) -> bool:
    """Whether volumes are JSON lists of tiles; INFERENCE falls back on DATASET."""
    if draft.settings.get(key) is None:
        key = "DATASET.DO_CHUNK_TITLE"
    return draft.flag(key)


def _say_files(draft: Draft, role: str, start: str, files: Files) -> None:
    named = (
        ("IMAGE", "image", files.image),
        ("LABEL", "label", files.label),
        ("VALID_MASK", "mask", files.mask),
    )
    for theirs, ours, paths in named:
        shown = ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
        draft.say(f"{start}{theirs}_NAME", Fate.RENAMED, f"data.{role}.{ours}: {shown}")
    if start in ("DATASET.", "INFERENCE."):
        keys = f"{start}INPUT_PATH {start}IS_ABSOLUTE_PATH"
        draft.say_all(keys, Fate.RENAMED, f"data.{role}.image", "joined to each name")


def _volumes(files: Files, kind: str | None) -> dict[str, Any]:
    """Give a role's volumes; one of a kind is a word, several are a list."""
    parts = {"image": files.image, "label": files.label, "mask": files.mask}
    given = {name: (paths[0] if len(paths) == 1 else list(paths)) for name, paths in parts.items() if paths}
    order = ("image", "label", "label_kind", "neurons", "mask", "partners")
    return {name: kind if name == "label_kind" else given.get(name) for name in order}


def _take_grey(draft: Draft, train: Files) -> None:
    """Take what is grey 0 and 1, said for 8 bits: other images are stretched to that first, there."""
    level, spread = grey_levels_of(draft.settings.section("DATASET"))
    wide = next(filter(_is_wide, train.image), None)
    keys, why = "DATASET.MEAN DATASET.STD DATASET.MATCH_ACT", "in grey levels of 8-bit images"
    if wide is None:
        draft.set("data.grey", [level, spread])
        draft.say_all(keys, Fate.RENAMED, f"data.grey: [{level:g}, {spread:g}]", why)
    else:
        draft.set("data.grey", None)
        why = f"{wide} is not of 8 bits: its own mean and deviation are taken"
        draft.say_all(keys, Fate.CHANGED, "data.grey: null", why)
        draft.notes.append(f"data.grey: {why}")
    stretched = draft.settings.given.get("DATASET.NORMALIZE_RANGE", True)
    why = "grey is taken as it is: stretch an image that does not use its whole range"
    draft.say("DATASET.NORMALIZE_RANGE", Fate.NONE if stretched else Fate.CARRIED, why=why)


def _is_wide(path: str) -> bool:
    """Whether an image that is there has more than 8 bits."""
    if not Path(path.partition("::")[0]).exists():
        return False
    try:
        with open_volume(path) as volume:
            return volume.dtype.itemsize > 1
    except SynmlopsError:
        return False  # what is wrong with it is for prepare, or a dry run, to say


def _take_scale(draft: Draft) -> None:
    """Take a scale of 1, 1/2, 1/3 ... as pooling."""
    scale = draft.list("DATASET.DATA_SCALE")
    pool = [round(1 / one) if isinstance(one, int | float) and 0 < one <= 1 else 0 for one in scale]
    fits = len(pool) == 3 and all(n and abs(1 / n - s) < 0.02 for n, s in zip(pool, scale, strict=True))
    draft.set("data.pool_zyx", pool if fits else [1, 1, 1])
    ours, why = f"data.pool_zyx: {pool}", "by means of voxels, not by splines"
    others = "DATASET.IMAGE_SCALE DATASET.LABEL_SCALE DATASET.VALID_MASK_SCALE INFERENCE.DATA_SCALE"
    draft.say_all(others, Fate.NONE, why="image, label and mask have the same voxels: data.pool_zyx")
    if not fits:
        why = "only 1, 1/2, 1/3 ... can be pooled; resample the files"
        draft.say("DATASET.DATA_SCALE", Fate.NONE, why=why)
        draft.notes.append(f"DATASET.DATA_SCALE {scale}: {why}")
        return
    is_one = pool == [1, 1, 1]
    draft.say("DATASET.DATA_SCALE", Fate.CARRIED if is_one else Fate.RENAMED, ours, "" if is_one else why)


def _validated(draft: Draft) -> Params:
    try:
        return Params.model_validate(draft.tree)
    except ValidationError as error:
        problems = explain(Params, draft.tree, error)
        listed = problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems", *problems])
        raise SynmlopsError(f"{draft.settings.source}: what it says is no params.yaml: {listed}") from error


def _zyx(values: list[int]) -> tuple[int, int, int]:
    z, y, x = values
    return z, y, x
