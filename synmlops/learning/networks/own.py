"""A network of the user's own, named `my_pkg.my_net:build`: found, built and checked."""

import difflib
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from synmlops.learning_params import NetworkParams
from synmlops.section import CHANNELS, SynmlopsError

Build = Callable[[NetworkParams], nn.Module]
"""What a network's name stands for: builds it from the network section of the params."""

_THEIRS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What code that is not ours may raise and its author can mend."""


def find_builder(name: str) -> Build:
    """Import what a name such as `my_pkg.my_net:build` says, as Python finds modules here.

    The command line looks beside params.yaml too. Only code that lies on this machine runs: a model file
    names its network and brings none.

    Raises
    ------
    SynmlopsError
        If the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise SynmlopsError(f"network.name: {name!r} names no function; write my_pkg.my_net:build")
    module = _import(module_name)
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(attribute, callables, n=1)
    hint = f"did you mean {module_name}:{near[0]}?" if near else f"it has {', '.join(callables) or 'none'}"
    raise SynmlopsError(f"network.name: {module_name} has no function {attribute!r}; {hint}")


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except _THEIRS as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            file = f"{module_name.replace('.', '/')}.py"
            raise SynmlopsError(
                f"network.name: there is no module {error.name!r}; put {file} beside params.yaml, or install "
                "the package that holds it"
            ) from error
        raise SynmlopsError(
            f"network.name: {module_name} cannot be imported: {_what_happened(error)}; mend it, then try "
            f"python -c 'import {module_name}'"
        ) from error


def build_own(params: NetworkParams) -> nn.Module:
    """Build the network that `params.name` imports, and check it on a tiny patch.

    Raises
    ------
    SynmlopsError
        If it cannot be imported or built, is no `torch.nn.Module`, or gives something else than
        `check_network` wants.
    """
    builder = find_builder(params.name)
    try:
        network = builder(params)
    except _THEIRS as error:
        raise SynmlopsError(
            f"network.name: {params.name} failed: {_what_happened(error)}; it is called with the network "
            "section of the params and gives a torch.nn.Module"
        ) from error
    if not isinstance(network, nn.Module):
        raise SynmlopsError(
            f"network.name: {params.name} gave {type(network).__name__}, not a torch.nn.Module; it is called "
            "with the network section of the params"
        )
    check_network(network, params)
    return network


def check_network(network: nn.Module, params: NetworkParams) -> None:
    """Run a network on a tiny patch, in evaluation and in training mode; weights and statistics stay.

    In evaluation mode it maps (1, 1, z, y, x) to (1, 3, z, y, x) finite floating-point logits, for sizes that
    are multiples of the total pooling. In training mode likewise, or with deep supervision to a tuple of
    1 + `deep_supervision` of these, the finest first, each other one smaller by whole factors.

    Raises
    ------
    SynmlopsError
        If it does not; says what came and what is wanted.
    """
    z, y, x = (2 * pool for pool in params.total_pool_zyx())
    before = {name: value.detach().clone() for name, value in network.state_dict().items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        patch = torch.randn(1, 1, z, y, x)
        for training in (False, True):
            network.train(training)
            try:
                logits = network(patch)
            except _THEIRS as error:
                raise SynmlopsError(
                    f"network.name: {params.name} failed on a patch of {tuple(patch.shape)}: "
                    f"{_what_happened(error)}; sizes are multiples of {params.total_pool_zyx()}, the total "
                    "pooling that network.stem_zyx and network.pools, or network.options.total_pool_zyx, give"
                ) from error
            _check_logits(logits, params, patch_zyx=(z, y, x), training=training)
    network.load_state_dict(before)


def _check_logits(
    logits: object, params: NetworkParams, *, patch_zyx: tuple[int, int, int], training: bool
) -> None:
    """Compare with what `check_network` promises."""
    n_levels = 1 + params.deep_supervision if training else 1
    wanted = f"a tensor of (1, {len(CHANNELS)}, {', '.join(map(str, patch_zyx))})"
    if n_levels > 1:
        wanted = f"a tuple of {n_levels}: {wanted} and {n_levels - 1} smaller by whole factors"
    levels = logits if isinstance(logits, tuple) and n_levels > 1 else (logits,)
    fits = len(levels) == n_levels and all(
        _is_level(level, patch_zyx, finest=not depth) for depth, level in enumerate(levels)
    )
    if not fits:
        mode = "training" if training else "evaluation"
        raise SynmlopsError(
            f"network.name: {params.name} gave {_described(logits)} in {mode} mode for a patch of "
            f"(1, 1, {', '.join(map(str, patch_zyx))}); wanted is {wanted}, floating-point logits of "
            f"{', '.join(CHANNELS)}"
        )
    if not all(bool(level.isfinite().all()) for level in levels):
        raise SynmlopsError(
            f"network.name: {params.name} gave logits that are not finite for standard normal voxels; "
            "look at its initial weights"
        )


def _is_level(level: object, patch_zyx: tuple[int, int, int], *, finest: bool) -> bool:
    if not isinstance(level, Tensor) or not level.is_floating_point() or level.dim() != 5:
        return False
    n, channels, *sizes = level.shape
    if (n, channels) != (1, len(CHANNELS)) or 0 in sizes:
        return False
    return (
        tuple(sizes) == patch_zyx if finest else not any(p % s for p, s in zip(patch_zyx, sizes, strict=True))
    )


def _described(value: object) -> str:
    """Say what came in place of logits.

    Examples
    --------
    >>> _described((torch.zeros(1, 3), None))
    'a tuple of (1, 3) float32, NoneType'
    """
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(_described(one) for one in value) or 'nothing'}"
    return type(value).__name__


def _what_happened(error: BaseException) -> str:
    """Give the first line of an error and where in the user's code it arose."""
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    ours = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    if isinstance(error, SyntaxError) or not ours:
        return said
    return f"{said} ({Path(ours[-1].filename).name}, line {ours[-1].lineno})"


_PACKAGE = Path(__file__).parents[2]
