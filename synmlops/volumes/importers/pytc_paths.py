"""Which files a PyTorch Connectomics config names: its rules for INPUT_PATH, `@`, lists and list files.

Paths stay as its users write them: relative to the folder that a command is run in, not to the config.
Source: `connectomics/data/dataset/build.py` of branch v1.0.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from synmlops.section import SynmlopsError
from synmlops.volumes.hdf5 import HDF5_SUFFIXES, list_datasets
from synmlops.volumes.importers.pytc_draft import Draft

_PATTERNS = ("*.png", "*.tif", "*.tiff")


@dataclass(frozen=True)
class Files:
    """The files of one role, one image each; an empty tuple where the config names none."""

    image: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def files_of(draft: Draft, role: str) -> Files:
    """List the files of a role as `open_volume` takes them.

    Parameters
    ----------
    draft : Draft
    role : {"train", "validation", "test"}
        What trains (DATASET.IMAGE_NAME ...), validates (DATASET.VAL_IMAGE_NAME ...), or is predicted
        (INFERENCE.IMAGE_NAME, below INFERENCE.INPUT_PATH where that is set).

    Raises
    ------
    SynmlopsError
        If a list file is missing, a name is no path, or there are more folders or labels than images.
    """
    start = {"train": "DATASET.", "validation": "DATASET.VAL_", "test": "INFERENCE."}[role]
    parts = ("IMAGE",) if role == "test" else ("IMAGE", "LABEL", "VALID_MASK")
    found: dict[str, list[str]] = {}
    notes: list[str] = []
    for part in parts:
        key = f"{start}{part}_NAME"
        found[part] = [_chosen(path, notes) for path in _paths(draft, key, role=role, notes=notes)]
        if found[part] and found["IMAGE"] and len(found[part]) != len(found["IMAGE"]):
            raise SynmlopsError(
                f"{key}: names {len(found[part])} files, but {start}IMAGE_NAME {len(found['IMAGE'])}; give "
                f"one for each ({draft.settings.source})"
            )
    image, label, mask = (tuple(found.get(part, ())) for part in ("IMAGE", "LABEL", "VALID_MASK"))
    return Files(image, label, mask, tuple(notes))


def _paths(draft: Draft, key: str, *, role: str, notes: list[str]) -> list[str]:
    settings = draft.settings
    if settings.get(key) in (None, "", []):
        return []
    folder_key, absolute_key = "DATASET.INPUT_PATH", "DATASET.IS_ABSOLUTE_PATH"
    if role == "test":
        folder_key = _set_one("INFERENCE.INPUT_PATH", folder_key, draft)
        absolute_key = _set_one("INFERENCE.IS_ABSOLUTE_PATH", absolute_key, draft)
    names = listed(draft, key)
    if draft.flag(absolute_key):
        return names
    folders = listed(draft, folder_key)
    if len(folders) not in (1, len(names)):
        raise SynmlopsError(
            f"{folder_key}: names {len(folders)} folders, but {key} {len(names)} files; give one folder, or "
            f"one for each ({settings.source})"
        )
    folders = folders * len(names) if len(folders) == 1 else folders
    joined = [os.path.join(folder, name) for folder, name in zip(folders, names, strict=True)]  # noqa: PTH118
    if not is_list_file(settings.get(key)):
        return joined
    # there, names from a list file are joined to the folder once as they are read, and once more after
    twice = [os.path.join(folder, path) for folder, path in zip(folders, joined, strict=True)]  # noqa: PTH118
    if twice != joined and all(map(os.path.exists, twice)) and not any(map(os.path.exists, joined)):
        notes.append(f"{key}: the files lie where PyTorch Connectomics looks, with {folder_key} joined twice")
        return twice
    return joined


def _set_one(key: str, otherwise: str, draft: Draft) -> str:
    return otherwise if draft.settings.get(key) is None else key


def is_list_file(name: object) -> bool:
    """Whether a name is that of a text file which lists paths, one a line."""
    return isinstance(name, str) and name.endswith(".txt")


def listed(draft: Draft, key: str) -> list[str]:
    """Give the names of a key: a list, text with `@` between them, or a `.txt` file with one a line.

    Raises
    ------
    SynmlopsError
        If the file cannot be read or a name is no text.
    """
    value = draft.settings.get(key)
    if is_list_file(value):
        try:
            lines = Path(str(value)).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text"
            raise SynmlopsError(
                f"{key}: the list {value} cannot be read ({reason}); run in the folder that it is named from"
            ) from error
        return [line.strip() for line in lines if line.strip()]
    names = value.split("@") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) and one.strip() for one in names):
        raise draft.wrong(key, "must be a path, paths with @ between them, or a list of paths")
    return [str(one).strip() for one in names]


def _chosen(path: str, notes: list[str]) -> str:
    """Name what there is read of a path: the sections of a pattern, the first dataset of an HDF5 file."""
    folder, _, last = path.rpartition("/")
    if last in _PATTERNS:
        notes.append(f"{path}: {folder or '.'} is read as a folder of sections")
        return folder or "."
    file = Path(path)
    if file.suffix.lower() not in HDF5_SUFFIXES or not file.is_file():
        return path
    try:
        names = list(list_datasets(file))
    except SynmlopsError:
        return path  # opening it says what is wrong
    first = sorted({name.split("/")[0] for name in names})
    if len(names) < 2 or first[0] not in names:
        return path
    notes.append(f"{path}: holds {len(names)} datasets; the first, {first[0]}, is the one read there")
    return f"{path}::{first[0]}"
