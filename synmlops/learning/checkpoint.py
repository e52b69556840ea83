"""Models and resume checkpoints on disk: no pickle is executed, and a file appears only when complete."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from synmlops.learning.networks.registry import build_network
from synmlops.params import NetworkParams, Section, SynmlopsError, flatten
from synmlops.volumes.files import atomic_path


class ModelMeta(Section):
    """What a model file says beside its weights."""

    network: NetworkParams
    channels: tuple[str, ...]  # those it was trained on
    mean: float  # of the training images, in grey levels
    std: float
    voxel_nm: tuple[float, float, float]
    run_key: str = ""
    fold: str = ""
    step: int = 0
    score: float | None = None  # validation score, where there was a validation
    threshold: float | None = None  # operating point, once it is known
    imported: str = ""  # file that it was converted from, and its digest


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode and what it needs to be used."""

    network: nn.Module
    meta: ModelMeta


def save_model(path: Path, weights: dict[str, Tensor], meta: ModelMeta) -> None:
    """Write weights as safetensors, the meta in the file's header."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"synmlops": meta.model_dump_json()})


def load_model(path: Path, *, device: str | torch.device = "cpu") -> Model:
    """Read what `save_model` wrote.

    Raises
    ------
    SynmlopsError
        If the file is missing, cut short, not a synmlops model, or its weights do not fit its network.
    """
    meta = read_meta(path)
    network = build_network(meta.network)
    with _plain_misfit(path), safe_open(path, framework="pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)
    return Model(network.to(device).eval(), meta)


def load_outline(path: Path) -> Model:
    """See that a model file is whole and fits its network, without its weights: they lie on torch's `meta`.

    A network of the user's own is built for all that, since it is tried on a patch.

    Raises
    ------
    SynmlopsError
        As `load_model`.
    """
    meta, nowhere = read_meta(path), torch.device("meta")
    with nullcontext() if ":" in meta.network.name else nowhere:
        network = build_network(meta.network)
    with _plain_misfit(path), safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        outline = {name: torch.empty(shape, device=nowhere) for name, shape in shapes.items()}
        network.load_state_dict(outline, assign=True)
    return Model(network.eval(), meta)


def load_start(path: Path, network: NetworkParams) -> Model:
    """Read the model that a training of `network` begins with.

    Raises
    ------
    SynmlopsError
        If the file is no whole model, or its network is another (naming the keys that differ).
    """
    try:
        model = load_model(path)
    except SynmlopsError as error:
        raise SynmlopsError(f"train.start_from: {error}") from error
    theirs, ours = flatten(model.meta.network), flatten(network)
    others = [
        f"network.{key}: {theirs[key]} there, {ours[key]} here"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    if others:
        raise SynmlopsError(
            f"train.start_from: {path} is of another network ({'; '.join(others)}); set them as they are "
            "there, or train.start_from: null"
        )
    return model


def read_meta(path: Path) -> ModelMeta:
    """Read the header of a model file alone."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("synmlops")
    except FileNotFoundError as error:
        raise SynmlopsError(f"{path}: no such model; run `synmlops train` or `dvc checkout` first") from error
    except (SafetensorError, OSError) as error:
        raise SynmlopsError(
            f"{path}: not a complete safetensors file ({error}); get it again or train"
        ) from error
    if header is None:
        raise SynmlopsError(
            f"{path}: has no synmlops header, so its network is unknown; use a file of `synmlops train`"
        )
    try:
        return ModelMeta.model_validate_json(header)
    except ValidationError as error:
        raise SynmlopsError(
            f"{path}: its header is of another version of synmlops ({_first_line(error)}); train again"
        ) from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume checkpoint: nested dicts of tensors and plain values.

    Raises
    ------
    SynmlopsError
        If the disk is full or the place cannot be written; what was at `path` is as it was.
    """
    content = BytesIO()  # torch's own writer does not say that the disk is full
    torch.save(state, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a resume checkpoint; None if there is none.

    Raises
    ------
    SynmlopsError
        If the file is broken.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        raise SynmlopsError(
            f"{path}: broken checkpoint ({_first_line(error)}); delete it to start over"
        ) from error
    return state


@contextmanager
def _plain_misfit(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise SynmlopsError(f"{path}: the weights do not fit the network it names: {error}") from error


def _first_line(error: Exception) -> str:
    """Leave out the advice that torch and pydantic add, which is not for the user of a command."""
    return str(error).partition("\n")[0].partition(" (1)")[0]
