"""How a volume was made, as attributes of its file: by which command, with which options."""

import json
from collections.abc import Mapping
from typing import Any

import synmlops

MADE_BY, MADE_WITH = "made_by", "made_with"


def made_by(command: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Give the attributes that say how a volume was made.

    Parameters
    ----------
    command : str
    options : mapping
        Of the command; those that are None are left out, and what JSON does not know is written as text.

    Examples
    --------
    >>> made_by("import points", {"radius_nm": 60.0, "units": None})["made_with"]
    '{"radius_nm": 60.0}'
    """
    given = {name: value for name, value in options.items() if value is not None}
    return {
        MADE_BY: f"synmlops {synmlops.__version__} {command}",
        MADE_WITH: json.dumps(given, default=str),
    }


def origin_of(attrs: Mapping[str, Any]) -> str:
    """Say in a line how a volume was made; empty if its attributes do not.

    Examples
    --------
    >>> origin_of({"made_by": "synmlops 0.1.0 import x", "made_with": '{"reach_nm": 150.0, "crop": true}'})
    'synmlops 0.1.0 import x: reach_nm 150.0, crop true'
    >>> origin_of({"made_by": "hand"}), origin_of({})
    ('hand', '')
    """
    try:
        options = json.loads(attrs.get(MADE_WITH, "{}"))
        listed = ", ".join(f"{name} {_word(value)}" for name, value in options.items())
    except (TypeError, ValueError, AttributeError):  # another program's attribute of that name
        listed = str(attrs[MADE_WITH])
    return ": ".join(part for part in (str(attrs.get(MADE_BY, "")), listed) if part)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
