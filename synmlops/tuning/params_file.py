"""Params files with other values: comments, order and layout stay as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from synmlops.section import SynmlopsError
from synmlops.volumes.files import atomic_path


def rewrite(source: Path, target: Path, values: Mapping[str, Any]) -> None:
    """Write `source` to `target` with some values changed; the two may be the same file.

    Parameters
    ----------
    source, target : Path
    values : mapping
        Dotted key to plain value: number, text, bool, None, list or dict. A section that is not there, or
        is null, is made.

    Raises
    ------
    SynmlopsError
        If `target` cannot be written, or `source` holds no keys.
    """
    yaml = _yaml()
    tree = yaml.load(source)
    if not isinstance(tree, CommentedMap):
        raise SynmlopsError(f"{source}: holds no keys; start from the params.yaml of the project")
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        section = tree
        for parent in parents:
            if not isinstance(section.get(parent), CommentedMap):
                section[parent] = CommentedMap()
            section = section[parent]
        _set(section, leaf, value)
    with atomic_path(target) as partial, partial.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested params as dotted keys; unlike `params.flatten` with lists and empty dicts as they are.

    Examples
    --------
    >>> leaves({"seed": 0, "network": {"widths": [4, 6], "options": {}}})
    {'seed': 0, 'network.widths': [4, 6], 'network.options': {}}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        flat |= leaves(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return flat


def _set(section: CommentedMap, name: str, value: Any) -> None:
    """Change a value in place, since the comment behind a list hangs on the list."""
    old = section.get(name)
    if isinstance(old, CommentedSeq) and isinstance(value, list):
        if not old:  # else the first item would start a line
            old.fa.set_flow_style()
        old[:] = value
    elif isinstance(value, list):
        section[name] = CommentedSeq(value)
        section[name].fa.set_flow_style()
    elif old != value or type(old) is not type(value):
        section[name] = value


class _Representer(RoundTripRepresenter):
    """Writes floats so that all readers take them for numbers: 1.0e-05, since PyYAML reads 1e-05 as text."""

    def represent_float(self, data: float) -> ScalarNode:
        text = repr(data)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 10_000
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), _write_null)
    return yaml


def _write_null(representer: RoundTripRepresenter, data: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
