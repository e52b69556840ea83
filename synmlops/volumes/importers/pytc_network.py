"""What the MODEL and DATASET sections of a PyTorch Connectomics v1 config say of its network.

Source: `connectomics/config/defaults.py` and `connectomics/model/arch/unet.py` of its branch v1.0.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from synmlops.learning_params import NetworkParams
from synmlops.section import CHANNELS, SynmlopsError, Zyx

Tree = Any
"""What a key may hold: whatever YAML knows."""

ARCHITECTURES = {"unet_3d": "pytc_unet", "unet_plus_3d": "plus_unet"}
"""Its names of networks, and ours."""

_BLOCKS = {"residual": False, "residual_se": True}  # with squeeze-excite
_NORMS = {"bn": "batch", "sync_bn": "batch", "gn": "group", "in": "instance"}
_ACTIVATIONS = {
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "elu": "elu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "efficient_swish": "silu",
    "none": "none",
}
_PADDINGS = ("zeros", "replicate", "reflect", "circular")
_GROUPS = 8


@dataclass(frozen=True)
class Outputs:
    """What the planes of a network's output stand for."""

    channels: tuple[str, ...]  # of `CHANNELS`, those it predicts
    exclusive: bool  # its planes are background, pre and post, under a softmax


def read_config(path: Path, base: Path | None = None) -> dict[str, dict[str, Tree]]:
    """Read a config over its base, as `--config-file` and `--config-base` do there; defaults are not added.

    Returns
    -------
    sections : dict
        Of each section its keys; text that is a Python value, such as "(False, True)" or "None", is that
        value.

    Raises
    ------
    SynmlopsError
        If a file is missing, or no YAML of sections and keys.
    """
    merged: dict[str, Tree] = {}
    for file in (path,) if base is None else (base, path):
        _merge(_read_sections(file), into=merged)
    return merged


def network_params_of(model: Mapping[str, Tree], *, is_isotropic: bool = False) -> NetworkParams:
    """Turn a MODEL section into our network, with v1's defaults for what it does not say.

    Parameters
    ----------
    model : mapping
        Keys of MODEL to values. Keys that say nothing of `unet_3d` and `unet_plus_3d` are not read.
    is_isotropic : bool
        DATASET.IS_ISOTROPIC, which overrides MODEL.ISOTROPY and makes the first and last convolution cubic.

    Raises
    ------
    SynmlopsError
        If a key asks for what is not supported (named, with what is), or keys do not fit each other.

    Examples
    --------
    >>> network = network_params_of({"ARCHITECTURE": "unet_plus_3d", "NORM_MODE": "gn", "FILTERS": [32, 64],
    ...     "ISOTROPY": [False, True], "BLOCK_TYPE": "residual_se"})
    >>> network.name, network.widths, network.kernels, network.pools
    ('plus_unet', (32, 64), ((1, 3, 3), (3, 3, 3)), ((2, 2, 2),))
    """
    name = ARCHITECTURES[_one_of(model, "ARCHITECTURE", "unet_3d", ARCHITECTURES)]
    widths = _filters_of(model)
    levels = [True] * len(widths) if is_isotropic else _isotropy_of(model, len(widths))
    norm = _one_of(model, "NORM_MODE", "bn", _NORMS)
    uneven = [width for width in widths if width % _GROUPS]
    if norm == "gn" and uneven:
        raise SynmlopsError(
            f"MODEL.FILTERS: group norm has {_GROUPS} groups, which do not divide {uneven[0]}; use multiples "
            f"of {_GROUPS}, or another MODEL.NORM_MODE"
        )
    return NetworkParams(
        name=name,
        stem_zyx=(1, 1, 1),
        widths=widths,
        kernels=tuple((3, 3, 3) if cubic else (1, 3, 3) for cubic in levels),
        pools=tuple((2, 2, 2) if cubic else (1, 2, 2) for cubic in levels[1:]),
        norm=_NORMS[norm],
        activation=_ACTIVATIONS[_one_of(model, "ACT_MODE", "elu", _ACTIVATIONS)],
        squeeze_excite=_BLOCKS[_one_of(model, "BLOCK_TYPE", "residual", _BLOCKS)],
        exclusive=_is_exclusive(model),
        padding=_one_of(model, "PAD_MODE", "replicate", _PADDINGS),
        pooling=_flag(model, "POOLING_LAYER"),
    )


def has_flat_ends(model: Mapping[str, Tree], *, is_isotropic: bool) -> bool:
    """Say whether all levels are cubic and yet the first and last convolution are not.

    Ours are cubic then: weights of 1 x 5 x 5 become 5 x 5 x 5 with zeros around them, which computes the
    same.

    Examples
    --------
    >>> has_flat_ends({"FILTERS": [8, 8], "ISOTROPY": [True, True]}, is_isotropic=False)
    True
    """
    return not is_isotropic and all(_isotropy_of(model, len(_filters_of(model))))


def outputs_of(model: Mapping[str, Tree]) -> Outputs:
    """Say what MODEL.TARGET_OPT makes of the output planes; without one, three planes are pre, post, union.

    Raises
    ------
    SynmlopsError
        If they are not those of synapses, or the image has several channels.
    """
    planes_in, planes = model.get("IN_PLANES", 1), model.get("OUT_PLANES", 1)
    if planes_in != 1:
        raise SynmlopsError(f"MODEL.IN_PLANES: images have one channel here, got {planes_in}; use 1")
    targets = model.get("TARGET_OPT", ["1"] if planes == len(CHANNELS) else ["0"])
    match targets, planes:
        case ["1"], 3:
            return Outputs(CHANNELS, exclusive=False)
        case ["1-1"], 3:
            return Outputs(CHANNELS, exclusive=True)
        case ["0"], 1:
            return Outputs(("union",), exclusive=False)
    raise SynmlopsError(
        f"MODEL.OUT_PLANES: {planes} with MODEL.TARGET_OPT {targets} is no network for synapses; supported "
        "are 3 with ['1'] (pre, post, union), 3 with ['1-1'] (background, pre, post) and 1 with ['0'] (union)"
    )


def is_isotropic(dataset: Mapping[str, Tree]) -> bool:
    """Read DATASET.IS_ISOTROPIC.

    Raises
    ------
    SynmlopsError
        If it is neither true nor false.
    """
    return _flag(dataset, "IS_ISOTROPIC", section="DATASET")


def grey_levels_of(dataset: Mapping[str, Tree]) -> tuple[float, float]:
    """Give mean and standard deviation, in levels of an 8-bit image, that DATASET normalises with.

    There, images are divided by 255, and then MEAN is subtracted and STD divided by (both 0.5 by default).

    Raises
    ------
    SynmlopsError
        If they are no numbers that could be.

    Examples
    --------
    >>> grey_levels_of({}), grey_levels_of({"MATCH_ACT": "sigmoid"})
    ((127.5, 127.5), (0.0, 255.0))
    """
    match _one_of(dataset, "MATCH_ACT", "none", ("none", "sigmoid", "tanh"), section="DATASET"):
        case "sigmoid":
            return 0.0, 255.0
        case "tanh":
            return 127.5, 127.5
    mean, std = dataset.get("MEAN", 0.5), dataset.get("STD", 0.5)
    if not _is_number(mean) or not _is_number(std) or not std > 0:
        raise SynmlopsError(
            f"DATASET.MEAN, DATASET.STD: must be numbers, the second above 0, got {mean!r}, {std!r}; "
            "the default is 0.5 for both"
        )
    return 255.0 * mean, 255.0 * std


def window_of(sections: Mapping[str, Mapping[str, Tree]]) -> Zyx | None:
    """Give the window of inference in voxels: INFERENCE.INPUT_SIZE, or MODEL.INPUT_SIZE; None if neither.

    Examples
    --------
    >>> window_of({"MODEL": {"INPUT_SIZE": [17, 257, 257]}})
    (17, 257, 257)
    """
    for section in ("INFERENCE", "MODEL"):
        match sections.get(section, {}).get("INPUT_SIZE"):
            case [int(z), int(y), int(x)] if min(z, y, x) > 0:
                return z, y, x
    return None


def _read_sections(path: Path) -> dict[str, Tree]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SynmlopsError(f"{path}: {error.strerror}; give the YAML file of the model") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynmlopsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise SynmlopsError(
            f"{path}: is no config of PyTorch Connectomics; it has sections MODEL, DATASET, SOLVER ... with "
            "keys below each"
        )
    decoded = _decode(tree)
    assert isinstance(decoded, dict)
    return decoded


def _decode(value: Tree) -> Tree:
    """Read text as a Python value where it is one, as yacs does; texts in lists stay texts."""
    if isinstance(value, dict):
        return {str(key): _decode(below) for key, below in value.items()}
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _merge(tree: Mapping[str, Tree], *, into: dict[str, Tree]) -> None:
    for key, value in tree.items():
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(value, into=below)
        else:
            into[key] = value


def _one_of(
    keys: Mapping[str, Tree],
    key: str,
    default: str,
    known: Mapping[str, object] | tuple[str, ...],
    *,
    section: str = "MODEL",
) -> Any:
    value = keys.get(key, default)
    if isinstance(value, str) and value in known:
        return value
    raise SynmlopsError(f"{section}.{key}: {value!r} is not supported; supported are {', '.join(known)}")


def _flag(keys: Mapping[str, Tree], key: str, *, section: str = "MODEL") -> bool:
    value = keys.get(key, False)
    if not isinstance(value, bool):
        raise SynmlopsError(f"{section}.{key}: must be true or false, got {value!r}")
    return value


def _filters_of(model: Mapping[str, Tree]) -> tuple[int, ...]:
    widths = model.get("FILTERS", [28, 36, 48, 64, 80])
    if (
        isinstance(widths, list | tuple)
        and len(widths) > 1
        and all(isinstance(width, int) and width > 0 for width in widths)
    ):
        return tuple(width for width in widths if isinstance(width, int))
    raise SynmlopsError(f"MODEL.FILTERS: must be two or more numbers of channels, got {widths!r}")


def _isotropy_of(model: Mapping[str, Tree], n_levels: int) -> list[bool]:
    levels = model.get("ISOTROPY", [False, False, False, True, True])
    if not isinstance(levels, list | tuple) or not all(isinstance(level, bool) for level in levels):
        raise SynmlopsError(f"MODEL.ISOTROPY: must be a list of true and false, got {levels!r}")
    if len(levels) != n_levels:
        raise SynmlopsError(
            f"MODEL.ISOTROPY: {len(levels)} levels, but MODEL.FILTERS has {n_levels}; give one for each"
        )
    return [bool(level) for level in levels]


def _is_exclusive(model: Mapping[str, Tree]) -> bool:
    targets = model.get("TARGET_OPT")
    return isinstance(targets, list | tuple) and "1-1" in targets


def _is_number(value: Tree) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
