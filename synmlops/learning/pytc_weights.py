"""Weights in checkpoints of PyTorch Connectomics v1: read without running anything, and renamed."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from synmlops.section import SynmlopsError

_STATE = "state_dict"
_AVERAGED = "n_averaged"
_PREFIX = r"^(module\.)+"
_MOST_NAMED = 6


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint file holds."""

    weights: dict[str, Tensor]  # by its own names, without a leading `module.`
    left: dict[str, str]  # other keys -> why they are of no use
    iteration: int


def read_tensors(path: Path) -> Tensors:
    """Read a checkpoint without running anything in it.

    Raises
    ------
    SynmlopsError
        If it is missing, cut short, holds objects that only code can make, or no weights.
    """
    tree = _load(path)
    if not isinstance(tree, Mapping) or not tree:
        raise SynmlopsError(f"{path}: holds no state dict; give a checkpoint of PyTorch Connectomics")
    state = tree.get(_STATE, tree)
    no_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if no_tensors or not state:
        raise SynmlopsError(
            f"{path}: holds no state dict, neither under {_STATE!r} nor by itself: {some(no_tensors)} "
            "is no tensor; give a checkpoint of PyTorch Connectomics"
        )
    left = {} if state is tree else {str(key): "of training alone" for key in tree if key != _STATE}
    weights = {}
    for key, value in state.items():
        if key == _AVERAGED:
            left[key] = f"count of averaged models ({int(value)})"
        else:
            weights[re.sub(_PREFIX, "", key)] = value
    infinite = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if infinite:
        raise SynmlopsError(f"{path}: {some(infinite)} are not finite; give an earlier checkpoint")
    iteration = tree.get("iteration")
    return Tensors(weights, left, iteration if isinstance(iteration, int) and iteration > 0 else 0)


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of odd pickles, refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        unknown = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if unknown:
            raise SynmlopsError(
                f"{path}: holds more than tensors ({', '.join(dict.fromkeys(unknown))}), and reading that "
                "could run any code, so it is refused; where you trust it, save its weights alone: "
                "torch.save({'state_dict': model.state_dict()}, ...)"
            ) from error
        raise SynmlopsError(
            f"{path}: not a checkpoint of PyTorch ({_first_line(error)}); get it again"
        ) from error
    except FileNotFoundError as error:
        raise SynmlopsError(f"{path}: no such file; give the .pth.tar that training wrote") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise SynmlopsError(
            f"{path}: not a whole checkpoint of PyTorch ({_first_line(error)}); get it again"
        ) from error


def from_pytc(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a PyTorch Connectomics v1 `unet_3d` or `unet_plus_3d` for ours.

    Parameters
    ----------
    weights : mapping of str to tensor
        The `state_dict` of its checkpoint, with or without a `module.` before each name; blocks `residual`
        or `residual_se`.

    Raises
    ------
    SynmlopsError
        If a name is none of these networks'.

    Examples
    --------
    >>> list(from_pytc({"module.up_layers.0.1.conv.1.0.weight": torch.zeros(8, 8, 1, 3, 3)}))
    ['ups.0.blocks.0.second.conv.weight']
    """
    names = {key: re.sub(_PREFIX, "", key) for key in weights}
    excited = any(".conv.1.fc." in name for name in names.values())
    renamed = {key: _our_name(name, excited=excited) for key, name in names.items()}
    foreign = [names[key] for key, ours in renamed.items() if ours is None]
    if foreign:
        raise SynmlopsError(
            f"weights: {some(foreign)}: no part of PyTorch Connectomics' unet_3d and unet_plus_3d with "
            "residual or residual_se blocks; give a checkpoint of these"
        )
    return {str(renamed[key]): value for key, value in weights.items()}


_BLOCK = r"(down|up)_layers\.(\d+)\.[12]\.conv"
_RULES = (
    (r"conv_in\.(\d\.\w+)", r"stem.@\1"),
    (r"conv_out\.0\.(\w+)", r"head.\1"),
    (r"feat_layers\.(\d+)\.(\d\.\w+)", r"features.\1.@\2"),
    (r"down_layers\.(\d+)\.1\.(\d\.\w+)", r"downs.\1.entry.@\2"),
    (r"up_layers\.(\d+)\.0\.(\d\.\w+)", r"ups.\1.entry.@\2"),
    (_BLOCK + r"\.0\.([01]\.\w+)", r"\1s.\2.blocks.0.first.@\3"),
    (_BLOCK + r"\.1\.([01]\.\w+)", r"\1s.\2.blocks.0.second.@\3"),
    (_BLOCK + r"\.1\.fc\.0\.weight", r"\1s.\2.blocks.0.excite.squeeze.weight"),
    (_BLOCK + r"\.1\.fc\.2\.weight", r"\1s.\2.blocks.0.excite.weigh.weight"),
    (r"non_local\.theta\.(\w+)", r"non_local.query.\1"),
    (r"non_local\.phi\.(\w+)", r"non_local.key.\1"),
    (r"non_local\.g\.(\w+)", r"non_local.value.\1"),
    (r"non_local\.W\.0\.(\w+)", r"non_local.out.\1"),
    (r"non_local\.W\.1\.(\w+)", r"non_local.norm.\1"),
)
"""Its names and ours; @0 stands for a convolution and @1 for the norm after it."""


def _our_name(name: str, *, excited: bool) -> str | None:
    if excited:  # there, the convolutions of a block lie one level deeper, beside squeeze-excite
        name = re.sub(r"\.conv\.0\.([01])\.([01])\.", r".conv.\1.\2.", name)
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours).replace("@0", "conv").replace("@1", "norm")
    return None


def some(names: Iterable[object]) -> str:
    """Name the first few.

    Examples
    --------
    >>> some("abcdefgh")
    'a, b, c, d, e, f and 2 more'
    """
    texts = [str(name) for name in names]
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
