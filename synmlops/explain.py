"""What is wrong with a params file, one line for each problem: pydantic's errors in words, missing keys."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of {max_length}",
}
_LONGEST_VALUE = 60  # characters of a value that a message repeats


@dataclass(frozen=True)
class _Complaint:
    key: str
    wanted: str  # "" if the line is complete without
    got: object = None
    line: str = ""


def explain(model: type[BaseModel], tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Put a validation error into words: dotted key, what is allowed, what arrived; one line each.

    Parameters
    ----------
    model : type
        The model that refused.
    tree : mapping
        What it refused.
    error : ValidationError

    Examples
    --------
    >>> class Loss(BaseModel):
    ...     bce: float
    >>> try:
    ...     _ = Loss.model_validate({"bce": "much"})
    ... except ValidationError as error:
    ...     explain(Loss, {"bce": "much"}, error)
    ["bce: must be a number, got 'much'"]
    """
    errors = error.errors()
    complaints = [_complaint(model, tree, one, among=errors) for one in errors]
    lines: dict[str, None] = {}
    for first in complaints:
        if first.line:
            lines.update(dict.fromkeys(first.line.splitlines()))
        elif not any(other.key.startswith(first.key + "[") for other in complaints):
            wanted = dict.fromkeys(other.wanted for other in complaints if other.key == first.key)
            lines[f"{first.key}: must be {' or '.join(wanted)}, got {_short(first.got)}"] = None
    return list(lines)


def missing_keys(
    model: type[BaseModel], tree: Mapping[str, Any], *, complete: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Give the keys that a file leaves to their default, and that default as YAML.

    Only models derived from `complete` must be written out.
    """
    for name, field in model.model_fields.items():
        if name in tree:
            for below in _models_of(field.annotation):
                if isinstance(tree[name], Mapping):
                    yield from missing_keys(below, tree[name], complete=complete, prefix=f"{prefix}{name}.")
        elif issubclass(model, complete) and field.default is not PydanticUndefined:
            yield prefix + name, _as_yaml(field.default)


def _complaint(
    model: type[BaseModel], tree: Mapping[str, Any], error: ErrorDetails, *, among: Sequence[ErrorDetails]
) -> _Complaint:
    kind, parts = error["type"], error["loc"]
    if kind == "missing" and isinstance(parts[-1], int):  # a tuple too short misses one item per error
        key, got = _locate(tree, parts[:-1])
        length = 1 + max(int(one["loc"][-1]) for one in among if one["loc"][:-1] == parts[:-1])
        return _Complaint(key, f"a list of {length}", got)
    key, got = _locate(tree, parts)
    if kind in ("extra_forbidden", "invalid_key"):
        near = nearest_key(model, key)
        return _Complaint(key, "", line=f"{key}: unknown key" + (f"; did you mean {near}?" if near else ""))
    if kind == "missing":
        return _Complaint(key, "", line=f"{key} is missing; add it")
    if kind == "value_error":
        return _Complaint(key, "", line=error["msg"].removeprefix("Value error, "))
    if kind in ("model_type", "model_attributes_type"):
        return _Complaint(key, "a section of keys", got)
    wanted = _WANTED.get(kind)
    if wanted is None:
        return _Complaint(key, "", line=f"{key}: {error['msg']}, got {_short(got)}")
    return _Complaint(key, wanted.format(**error.get("ctx", {})), got)


def nearest_key(model: type[BaseModel], key: str) -> str | None:
    """Give the known key that was probably meant: first in the same section, then anywhere.

    Examples
    --------
    >>> class Loss(BaseModel):
    ...     bce: float
    >>> class All(BaseModel):
    ...     loss: Loss
    >>> nearest_key(All, "loss.bec"), nearest_key(All, "bce"), nearest_key(All, "window")
    ('loss.bce', 'loss.bce', None)
    """
    known = _known_keys(model)
    section, _, leaf = key.rpartition(".")
    beside = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == section]
    near = difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    namesakes = [one for one in known if one.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, namesakes or known, n=1, cutoff=0.0 if namesakes else 0.6)
    return near[0] if near else None


def _locate(tree: object, parts: Sequence[int | str]) -> tuple[str, object]:
    """Follow pydantic's path through the file: the key as a user would write it, and what stands there.

    Names that pydantic gives to the branches of a union are left out.
    """
    key, node = "", tree
    for part in parts:
        if isinstance(node, Mapping):
            key, node = f"{key}.{part}" if key else str(part), node.get(part)
        elif isinstance(part, int) and isinstance(node, Sequence) and not isinstance(node, str):
            key, node = f"{key}[{part}]", node[part] if part < len(node) else None
    return key, node


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for below in _models_of(field.annotation):
            keys += _known_keys(below, f"{prefix}{name}.")
    return keys


def _models_of(annotation: Any) -> Sequence[type[BaseModel]]:
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _as_yaml(value: object) -> str:
    """Give a default as one line of YAML.

    Examples
    --------
    >>> _as_yaml((1, 2, 2)), _as_yaml(None), _as_yaml("group")
    ('[1, 2, 2]', 'null', 'group')
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else _listed(value)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _listed(value: object) -> object:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def _short(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " ..."
