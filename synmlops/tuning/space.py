"""tune.yaml: which params a search may change, and to what.

train.learning_rate: {low: 0.001, high: 0.02, log: true}
network.blocks: {low: 1, high: 3}
train.optimizer: [adamw, sgd]
network:                     # values that go together
  - {widths: [32, 64], kernels: [[1, 3, 3], [3, 3, 3]], pools: [[1, 2, 2]]}
  - {widths: [48, 96], kernels: [[1, 3, 3], [3, 3, 3]], pools: [[1, 2, 2]]}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from pydantic import ValidationError

from synmlops.explain import explain, nearest_key
from synmlops.params import Params, load_params
from synmlops.section import NonNegative, Section, SynmlopsError
from synmlops.tuning.params_file import leaves

SEARCHED = ("seed", "network", "sampling", "augment", "loss", "train")
"""Sections that training depends on and the prepared data do not."""

_DIGITS = 4  # significant, of a number that is drawn


class _Range(Section):
    low: float
    high: float
    log: bool = False
    step: NonNegative | None = None


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    def draw(self, trial: optuna.trial.BaseTrial, key: str) -> int | float:
        """Ask for a number; one that is not whole has four significant digits, as it will be written."""
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(key, int(self.low), int(self.high), step=step, log=self.log)
        value = trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def ends(self) -> tuple[Any, ...]:
        """Give the values that params must take if they take all."""
        kind = int if self.whole else float
        return kind(self.low), kind(self.high)


@dataclass(frozen=True)
class Choices:
    """Some values of any kind."""

    values: tuple[Any, ...]

    def draw(self, trial: optuna.trial.BaseTrial, key: str) -> Any:
        """Ask for one; Optuna knows them as JSON."""
        return json.loads(str(trial.suggest_categorical(key, [json.dumps(value) for value in self.values])))

    def ends(self) -> tuple[Any, ...]:
        """Give all values."""
        return self.values


@dataclass(frozen=True)
class Space:
    """What a search may change: dotted key to its values."""

    entries: Mapping[str, Range | Choices]

    def draw(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Ask a trial for a value of each; dotted keys of single params to values."""
        values: dict[str, Any] = {}
        for key, entry in self.entries.items():
            values |= _as_leaves(key, entry.draw(trial, key))
        return values

    def as_text(self) -> dict[str, str]:
        """Give each entry as text, to compare and to show."""
        return {key: json.dumps(vars(entry), sort_keys=True) for key, entry in self.entries.items()}


def read_space(path: Path, *, base: Path) -> Space:
    """Read tune.yaml.

    Parameters
    ----------
    path : Path
    base : Path
        The params file that trials start from.

    Raises
    ------
    SynmlopsError
        If the file is missing or no YAML, a key is unknown (with the nearest known one) or not of training,
        or a value is one that its param does not take.
    """
    params = load_params(base)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SynmlopsError(
            f"{path}: {error.strerror}; write one, such as train.learning_rate: "
            "{low: 0.001, high: 0.02, log: true}, or give --space"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynmlopsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or not given:
        raise SynmlopsError(f"{path}: names no params; write one, such as loss.dice: [0.0, 0.5, 1.0]")
    known = params.model_dump(mode="json")
    entries = {str(key): _entry(path, str(key), value, known=known) for key, value in given.items()}
    overlap = sorted(key for key in entries for other in entries if key.startswith(f"{other}."))
    if overlap:
        raise SynmlopsError(f"{path}: {overlap[0]} stands below another key of the file; keep one of the two")
    for key, entry in entries.items():
        for value in entry.ends():
            _check(path, key, value, now=_value_at(path, key, known), base=base)
    return Space(entries)


def _entry(path: Path, key: str, given: Any, *, known: dict[str, Any]) -> Range | Choices:
    now = _value_at(path, key, known)
    if isinstance(given, list):
        if len(given) < 2:
            raise SynmlopsError(f"{path}: {key}: {given} leaves no choice; give two values or more")
        return Choices(tuple(given))
    if not isinstance(given, dict):
        raise SynmlopsError(
            f"{path}: {key}: must be a list of choices or {{low: ..., high: ...}}, got {given!r}"
        )
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise SynmlopsError(f"{path}: {key}: is no number (now {now!r}); give a list of choices")
    try:
        limits = _Range.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"{key}.{line}" for line in explain(_Range, given, error))
        raise SynmlopsError(f"{path}: {problems}") from error
    problem = _problem_of(limits, whole=isinstance(now, int))
    if problem:
        raise SynmlopsError(f"{path}: {key}: {problem}")
    return Range(limits.low, limits.high, limits.log, limits.step or None, isinstance(now, int))


def _problem_of(limits: _Range, *, whole: bool) -> str:
    if limits.low >= limits.high:
        return f"low {limits.low:g} must be less than high {limits.high:g}"
    if limits.log and limits.low <= 0:
        return f"low {limits.low:g} has no logarithm; raise it, or leave out log"
    if limits.log and limits.step:
        return "log and step exclude each other; leave one out"
    if whole and any(number % 1 for number in (limits.low, limits.high, limits.step or 1)):
        return "is a whole number; so must low, high and step be"
    return ""


def _value_at(path: Path, key: str, known: dict[str, Any]) -> Any:
    """Give the present value of a param or section.

    Raises
    ------
    SynmlopsError
        If there is none, or training does not depend on it.
    """
    section = key.partition(".")[0]
    if section == "data":
        raise SynmlopsError(
            f"{path}: {key}: the prepared data depend on it, and all trials share them; search below "
            f"{', '.join(SEARCHED)}"
        )
    if section in known and section not in SEARCHED:
        raise SynmlopsError(f"{path}: {key}: no training depends on it; search below {', '.join(SEARCHED)}")
    node: Any = known
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            near = nearest_key(Params, key)
            raise SynmlopsError(f"{path}: {key}: unknown key" + (f"; did you mean {near}?" if near else ""))
        node = node[part]
    return node


def _check(path: Path, key: str, value: Any, *, now: Any, base: Path) -> None:
    """Refuse a value that could not be trained even if nothing else changed."""
    if isinstance(now, dict) and not isinstance(value, dict):
        raise SynmlopsError(f"{path}: {key}: is a section; each choice must be a section too, got {value!r}")
    try:
        load_params(base, overrides=_as_leaves(key, value))
    except SynmlopsError as error:
        raise SynmlopsError(
            f"{path}: {key}: {json.dumps(value)} does not work. {error}; if it takes another param to work, "
            "give both as the choices of their section"
        ) from error


def _as_leaves(key: str, value: Any) -> dict[str, Any]:
    return leaves(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
