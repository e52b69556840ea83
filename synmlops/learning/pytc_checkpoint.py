"""Checkpoints of PyTorch Connectomics v1 as models of ours: same numbers, other names of weights.

Only tensors are read. Every key of the file becomes a weight, or is named with the reason why it does not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synmlops.learning.checkpoint import ModelMeta, save_model
from synmlops.learning.networks.registry import build_network
from synmlops.learning.pytc_weights import from_pytc, read_tensors, some
from synmlops.learning_params import InferParams
from synmlops.section import CHANNELS, Nm, SynmlopsError, Zyx
from synmlops.volumes.files import sha256_of
from synmlops.volumes.importers.pytc_network import (
    Outputs,
    grey_levels_of,
    has_flat_ends,
    is_isotropic,
    network_params_of,
    outputs_of,
    read_config,
    window_of,
)
from synmlops.volumes.importers.survey import Survey

_TRACKED = "num_batches_tracked"
_WINDOW = InferParams().window_zyx
_STATISTICS = (_TRACKED, "running_mean", "running_var")
_UNION = CHANNELS.index("union")


@dataclass(frozen=True)
class Imported:
    """A checkpoint as a model of ours, before it is written."""

    path: Path
    weights: dict[str, Tensor]
    meta: ModelMeta
    taken: int  # keys of the file that became weights
    left: dict[str, str]  # keys of the file that did not -> why
    made: dict[str, str]  # weights that the file does not hold -> where they come from
    notes: tuple[str, ...]  # what else was done, and what is worth knowing
    window_zyx: Zyx | None  # of its inference

    @property
    def parameters(self) -> int:
        """Count what training learns; statistics of batch norm are none."""
        own = (name for name in self.weights if not name.endswith(_STATISTICS))
        return sum(self.weights[name].numel() for name in own)

    def windows_here(self) -> Zyx:
        """Give the size for `infer.window_zyx` that is nearest to its own windows."""
        network = self.meta.network
        z, y, x = (
            size if network.takes_size(size, pool) else max(1, round(size / pool)) * pool
            for size, pool in zip(self.window_zyx or _WINDOW, network.total_pool_zyx(), strict=True)
        )
        return z, y, x

    def save(self, path: Path) -> None:
        """Write the model file."""
        save_model(path, self.weights, self.meta)

    def survey(self) -> Survey:
        """Say what was read and what became of it."""
        meta, network = self.meta, self.meta.network
        mean = f"grey level {meta.mean:g} is 0, {meta.mean + meta.std:g} is 1"
        levels = zip(network.widths, network.kernels, strict=True)
        rows = [
            ("network", f"{network.name}, {network.norm} norm, {network.activation}"),
            ("levels", ", ".join(f"{width} of {_by(kernel)}" for width, kernel in levels)),
            ("between levels", f"{'max pooling' if network.pooling else 'strides'} {_listed(network.pools)}"),
            ("squeeze-excite", "yes" if network.squeeze_excite else "no"),
            ("beyond the image", network.padding or "replicate"),
            ("channels", ", ".join(meta.channels) + (" (exclusive)" if network.exclusive else "")),
            ("parameters", f"{self.parameters:,}"),
            ("iteration", str(meta.step or "not said")),
            ("intensity", f"{mean} (8-bit images)"),
            ("voxel size", f"{_by(meta.voxel_nm)} nm"),
            ("receptive field, at most", f"{_by(network.receptive_field_zyx())} voxels"),
            ("windows are multiples of", _by(network.total_pool_zyx())),
            ("its own windows", _by(self.window_zyx) if self.window_zyx else "not said"),
            ("infer.window_zyx", f"{list(self.windows_here())}, or another that fits"),
            ("keys taken over", str(self.taken)),
            *((f"keys left: {why}", some(names)) for why, names in _by_reason(self.left).items()),
            *((f"weights made: {why}", some(names)) for why, names in _by_reason(self.made).items()),
        ]
        return Survey(f"checkpoint {self.path}", tuple(rows), self.notes)


def import_checkpoint(path: Path, config: Path, *, voxel_nm: Nm, base: Path | None = None) -> Imported:
    """Read a checkpoint and turn it into a model of ours.

    Parameters
    ----------
    path : Path
        A `.pth.tar` of its training, also of weight averaging, or a bare state dict.
    config : Path
        The YAML file it was trained with.
    voxel_nm : tuple of float
        Of the images it was trained on, along z, y, x; its configs do not say.
    base : Path, optional
        The file of `--config-base`.

    Raises
    ------
    SynmlopsError
        If a file is missing or broken, holds more than tensors and plain values, the network is none of those
        supported, or weights do not fit the config (with both shapes).
    """
    sections = read_config(config, base)
    try:
        return _converted(path, sections, voxel_nm=voxel_nm)
    except SynmlopsError as error:
        if base is None and not {"ARCHITECTURE", "FILTERS"} & sections.get("MODEL", {}).keys():
            raise SynmlopsError(
                f"{error}\n  ({config} names neither MODEL.ARCHITECTURE nor MODEL.FILTERS: where it was used "
                "with a --config-base, give that with --base)"
            ) from error
        raise


def _converted(path: Path, sections: Mapping[str, Any], *, voxel_nm: Nm) -> Imported:
    model, dataset = sections.get("MODEL", {}), sections.get("DATASET", {})
    cubic = is_isotropic(dataset)
    outputs, network = outputs_of(model), network_params_of(model, is_isotropic=cubic)
    mean, std = grey_levels_of(dataset)
    found = read_tensors(path)
    layout = _Layout(outputs, flat_ends=has_flat_ends(model, is_isotropic=cubic))
    built = build_network(network)
    shapes = {name.removeprefix("network."): value for name, value in built.state_dict().items()}
    weights, made = _fit(path, found.weights, shapes, layout)
    prefix = "network." if network.exclusive else ""
    meta = ModelMeta(
        network=network,
        channels=outputs.channels,
        mean=mean,
        std=std,
        voxel_nm=voxel_nm,
        step=found.iteration,
        imported=f"{path.name} sha256 {sha256_of(path)}",
    )
    return Imported(
        path,
        weights={prefix + name: weights[name] for name in shapes},
        meta=meta,
        taken=len(found.weights),
        left=found.left,
        made=made,
        notes=tuple(_notes(model, dataset, layout)),
        window_zyx=window_of(sections),
    )


@dataclass(frozen=True)
class _Layout:
    """How the first and last convolutions of the file differ from ours."""

    outputs: Outputs
    flat_ends: bool

    def theirs(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        """Give the shape that their weight has, from ours."""
        sizes = list(shape)
        if name.startswith("head."):
            sizes[0] = len(self.outputs.channels)
        if self.flat_ends and name in ("head.weight", "stem.conv.weight"):
            sizes[2] = 1
        return tuple(sizes)

    def ours(self, name: str, value: Tensor) -> Tensor:
        """Turn their weight into ours."""
        if self.flat_ends and name in ("head.weight", "stem.conv.weight"):
            value = torch.nn.functional.pad(value, (0, 0, 0, 0, 2, 2))
        if not name.startswith("head."):
            return value
        if self.outputs.exclusive:  # ours counts its third output against the background
            background, pre, post = value.unbind()
            return torch.stack([pre, post, -background])
        if self.outputs.channels == ("union",):
            nothing = torch.zeros_like(value[0])
            return torch.stack([value[0] if n == _UNION else nothing for n in range(len(CHANNELS))])
        return value


def _fit(
    path: Path, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], layout: _Layout
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give our weights, and which of them the file does not hold and why; refuse what does not fit."""
    try:
        renamed = from_pytc(theirs)
    except SynmlopsError as error:
        raise SynmlopsError(f"{path}: {error}") from error
    their_name = dict(zip(renamed, theirs, strict=True))
    made = {name: why for name in ours.keys() - renamed.keys() if (why := _made_without(name, ours, renamed))}
    wanted = {name: layout.theirs(name, ours[name].shape) for name in renamed if name in ours}
    shapes = [
        f"{their_name[name]} ({_by(renamed[name].shape)} in the file, {_by(shape)} by the config)"
        for name, shape in wanted.items()
        if tuple(renamed[name].shape) != shape
    ]
    foreign = [their_name[name] for name in renamed if name not in ours]
    missing = [name for name in ours if name not in renamed | made]
    problems = {"of another shape": shapes, "in the file alone": foreign, "in our network alone": missing}
    if any(problems.values()):
        listed = "\n  ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise SynmlopsError(
            f"{path}: does not fit the config{_hint(theirs, ours)}; give the config that it was trained with:"
            f"\n  {listed}"
        )
    filled = {name: ours[name] for name in made}
    return filled | {name: layout.ours(name, value) for name, value in renamed.items()}, made


def _made_without(name: str, ours: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> str | None:
    """Say why a weight of ours needs none of the file, or None if it does."""
    if name.endswith(_TRACKED):
        return "steps of batch norm, which its version of PyTorch did not count"
    norm = name.rpartition(".")[0]
    is_norm = norm.endswith("norm") and f"{norm}.running_mean" not in ours
    if is_norm and not any(key.startswith(f"{norm}.") for key in renamed):
        return "1 and 0, since its instance norm scales and shifts nothing"
    return None


def _hint(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Name what the file gives away."""
    has, makes = "non_local.g.weight" in theirs, "non_local.value.weight" in ours
    if has != makes:
        return f" (the file is of MODEL.ARCHITECTURE {'unet_plus_3d' if has else 'unet_3d'})"
    has = any(".fc." in key for key in theirs)
    if has != any(".excite." in key for key in ours):
        return f" (the file is of MODEL.BLOCK_TYPE {'residual_se' if has else 'residual'})"
    has = "conv_in.1.running_mean" in theirs
    if has != ("stem.norm.running_mean" in ours):
        return f" (the file is of MODEL.NORM_MODE {'bn or sync_bn' if has else 'gn or in'})"
    return ""


def _notes(model: Mapping[str, Any], dataset: Mapping[str, Any], layout: _Layout) -> Iterable[str]:
    if "TARGET_OPT" not in model and len(layout.outputs.channels) > 1:
        yield "MODEL.TARGET_OPT is not said: the three planes are taken for pre, post and union ('1')"
    if layout.outputs.exclusive:
        yield "planes of background, pre and post became pre, post and union that exclude each other"
    if layout.outputs.channels == ("union",):
        yield "one plane is taken for the union; pre and post are neither predicted nor decoded"
    if layout.flat_ends:
        yield "first and last convolution, 1 x 5 x 5 there, are 5 x 5 x 5 with zeros around"
    scale = dataset.get("DATA_SCALE", [1.0, 1.0, 1.0])
    if any(factor != 1 for factor in scale):
        yield f"DATASET.DATA_SCALE {list(scale)}: the voxel size must be that after scaling"


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    return {why: [name for name in reasons if reasons[name] == why] for why in Counter(reasons.values())}


def _by(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _listed(sizes: Iterable[Iterable[float]]) -> str:
    return ", ".join(_by(size) for size in sizes)
