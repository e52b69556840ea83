"""A params.yaml in the making, and what became of each key of a PyTorch Connectomics config."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from synmlops.section import SynmlopsError, Zyx
from synmlops.volumes.importers.pytc_keys import Settings


class Fate(StrEnum):
    """What became of a key."""

    CARRIED = "carried over"  # same meaning, same value, under our name
    RENAMED = "renamed"  # same meaning, said in other words or units
    CHANGED = "changed in meaning"
    NONE = "no counterpart"


@dataclass(frozen=True)
class Row:
    """One key of the config in the table."""

    key: str  # as the file spells it
    value: object
    fate: Fate
    ours: str = ""  # "train.steps: 200000"; empty where there is none
    why: str = ""


@dataclass
class Draft:
    """Our params as a tree, and a row for each key that was looked at; a key has one row, the last."""

    settings: Settings
    tree: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, ours: str, value: Any) -> None:
        """Set one of our params by its dotted name."""
        *parents, leaf = ours.split(".")
        node = self.tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value

    def take(
        self, key: str, ours: str, value: Any = None, *, why: str = "", fate: Fate | None = None
    ) -> None:
        """Set one of our params from a key: to its own value, or to another that stands for it."""
        theirs = self.settings.get(key)
        value = theirs if value is None else value
        self.set(ours, value)
        same = _plain(value) == _plain(theirs)
        self.say(key, fate or (Fate.CARRIED if same else Fate.RENAMED), f"{ours}: {_short(value)}", why)

    def say(self, key: str, fate: Fate, ours: str = "", why: str = "") -> None:
        """Say what became of a key, if the files set it."""
        if key in self.settings.given:
            written = self.settings.spelled.get(key, key)
            self.rows[key] = Row(written, self.settings.given[key], fate, ours, why)

    def say_all(self, keys: str, fate: Fate, ours: str = "", why: str = "") -> None:
        """Say the same of several keys, with spaces between."""
        for key in keys.split():
            self.say(key, fate, ours, why)

    # what a key may be

    def number(self, key: str, *, least: float | None = None, most: float | None = None) -> float:
        """Give a number within limits, inclusive."""
        value = self.settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "must be a number")
        if (least is not None and value < least) or (most is not None and value > most):
            wanted = f"from {least:g}" if most is None else f"from {least or 0:g} to {most:g}"
            raise self.wrong(key, f"must be a number {wanted}")
        return value

    def share(self, key: str) -> float:
        """Give a number from 0 to 1."""
        return float(self.number(key, least=0, most=1))

    def whole(self, key: str, *, least: int | None = None) -> int:
        """Give a whole number."""
        value = self.number(key, least=least)
        if value != int(value):
            raise self.wrong(key, "must be a whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        """Give true or false; 0 and 1 count as such."""
        value = self.settings.get(key)
        if value in (True, False):
            return bool(value)
        raise self.wrong(key, "must be true or false")

    def text(self, key: str) -> str:
        """Give text."""
        value = self.settings.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "must be text")
        return value

    def list(self, key: str) -> list[Any]:
        """Give a list; None is an empty one."""
        value = self.settings.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise self.wrong(key, "must be a list")
        return [*value]

    def zyx(self, key: str) -> Zyx:
        """Give three whole numbers from 1."""
        match self.settings.get(key):
            case [int(z), int(y), int(x)] if min(z, y, x) >= 1:
                return z, y, x
        raise self.wrong(key, "must be three whole numbers from 1, z y x")

    def wrong(self, key: str, wanted: str) -> SynmlopsError:
        """Give the error of a value that cannot be."""
        written = self.settings.spelled.get(key, key)
        return SynmlopsError(f"{written}: {wanted}, got {self.settings.get(key)!r} ({self.settings.source})")


def _plain(value: object) -> object:
    """Lists and tuples alike, numbers alike, to compare what YAML and Python write differently."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _short(value: object) -> str:
    """Write a value as YAML would, on one line.

    Examples
    --------
    >>> _short(None), _short(True), _short((8, 256, 256)), _short({"probability": 0.5})
    ('null', 'true', '[8, 256, 256]', '{probability: 0.5}')
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(_short, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_short(below)}' for key, below in value.items())}}}"
        case float():
            return f"{value:g}"
    return str(value)
