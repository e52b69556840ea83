"""What a network costs and how far it sees: parameters, receptive field, arithmetic, memory."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synmlops.learning.networks.fast_norm import SqueezeExcite
from synmlops.learning.networks.plus_unet import NonLocal
from synmlops.learning.networks.registry import build_network
from synmlops.learning.precision import autocast
from synmlops.learning_params import NetworkParams, TrainParams
from synmlops.section import SynmlopsError, Zyx

AFFORDABLE_GFLOP = 100.0
"""Most arithmetic for measuring a receptive field: some seconds on two cores."""

_STATISTICS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, NonLocal)
_OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes; a batch of n patches takes `fixed + n * patch`."""

    fixed: int  # weights, their gradients and averages, state of the optimiser
    patch: (
        int  # what the forward pass of one patch leaves for the backward pass, or the peak of both on a GPU
    )
    how: str  # what was measured, on which device, in which precision

    def of_batch(self, n: int) -> int:
        """Give the bytes of a batch of n patches."""
        return self.fixed + n * self.patch


@dataclass(frozen=True)
class NetworkReport:
    """What `synmlops network` tells."""

    name: str
    parameters: int
    total_pool_zyx: Zyx
    field_zyx: Zyx  # what the params promise, in voxels; data.split.guard goes by it
    measured_zyx: Zyx | None  # by gradients from the middle voxel; None if that would take too long
    gflop_per_megavoxel: float  # of the forward pass; training takes three times as much
    patch_zyx: Zyx
    memory: Memory

    def advice(self) -> tuple[str, ...]:
        """Say what does not go together, and what to do; empty if nothing."""
        lines = []
        smaller = [
            f"{axis}={patch} of {field}"
            for axis, patch, field in zip("zyx", self.patch_zyx, self.field_zyx, strict=True)
            if patch < field
        ]
        if smaller:
            lines.append(
                f"the patch is smaller than the receptive field ({', '.join(smaller)}): training never shows "
                "all that a voxel sees in a large window; enlarge sampling.patch_zyx if memory allows"
            )
        pairs = zip("zyx", self.measured_zyx or (), self.field_zyx, strict=False)
        wider = [f"{axis}={width} of {field}" for axis, width, field in pairs if width > field]
        if wider:
            lines.append(
                f"the network reaches further than the params promise ({', '.join(wider)}): set "
                "network.options.receptive_field_zyx, so that data.split.guard keeps tissue apart"
            )
        return tuple(lines)


def report_on(
    network: NetworkParams, *, train: TrainParams, patch_zyx: Zyx, device: torch.device
) -> NetworkReport:
    """Build a network and measure it.

    Parameters
    ----------
    network : NetworkParams
    train : TrainParams
        Optimiser and precision decide over memory.
    patch_zyx : tuple of int
        Voxels of a training patch; multiples of the total pooling.
    device : torch.device
        Where memory is measured.

    Raises
    ------
    SynmlopsError
        If the network cannot be built, or a GPU's memory does not hold a single patch.
    """
    built = build_network(network)
    gflop = gflop_per_megavoxel(built, patch_zyx)
    return NetworkReport(
        name=network.name,
        parameters=sum(weight.numel() for weight in built.parameters()),
        total_pool_zyx=network.total_pool_zyx(),
        field_zyx=network.receptive_field_zyx(),
        measured_zyx=measured_field(built, network, gflop_per_megavoxel=gflop),
        gflop_per_megavoxel=gflop,
        patch_zyx=patch_zyx,
        memory=training_memory(built, train=train, patch_zyx=patch_zyx, device=device),
    )


def gflop_per_megavoxel(network: nn.Module, patch_zyx: Zyx) -> float:
    """Count the arithmetic of convolutions and matrix products in a forward pass, per million voxels.

    A multiplication and an addition count as two. Shapes alone are propagated; where a network's code needs
    values, it runs on the CPU.

    Examples
    --------
    >>> round(gflop_per_megavoxel(nn.Conv3d(1, 3, (1, 3, 3), padding=(0, 1, 1)), (4, 8, 8)), 3)
    0.054
    """
    mapping = {torch.ops.aten.mkldnn_convolution: _onednn_flop}  # which torch's table does not know
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    own = copy.deepcopy(network).eval()
    try:
        shapes = copy.deepcopy(own).to("meta")
        with counter, torch.no_grad():
            shapes(torch.empty(1, 1, *patch_zyx, device="meta"))
    except (NotImplementedError, RuntimeError):
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with counter, torch.no_grad():
            own(torch.zeros(1, 1, *patch_zyx))
    return counter.get_total_flops() / math.prod(patch_zyx) / 1e3


def _onednn_flop(
    image: Sequence[int],
    weight: Sequence[int],
    *rest: object,
    out_shape: Sequence[int] = (),
    **more: object,
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def measured_field(network: nn.Module, params: NetworkParams, *, gflop_per_megavoxel: float) -> Zyx | None:
    """Find how wide the input is that moves the middle output voxel of a network, along z, y and x.

    Gradients are followed through a copy whose norms are in evaluation mode; group and instance norm and
    squeeze-excite, which see a whole patch's means, and the non-local block are left out of it. What is found
    is a lower bound, since some gradients vanish.

    Returns
    -------
    width_zyx : tuple of int or None
        None if it would take more than `AFFORDABLE_GFLOP`, or the network cannot run in double precision.
    """
    pool, field = params.total_pool_zyx(), params.receptive_field_zyx()
    z, y, x = ((f // p + 3) * p for f, p in zip(field, pool, strict=True))  # so that more would be seen
    if 2 * gflop_per_megavoxel * z * y * x / 1e6 > AFFORDABLE_GFLOP:
        return None
    # in double precision, since fast float32 convolutions leave round-off beside what they reach
    bare = _without_statistics(copy.deepcopy(network)).double().eval().requires_grad_(False)
    image = torch.randn(1, 1, z, y, x, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    try:
        bare(image)[0, :, z // 2, y // 2, x // 2].sum().backward()
    except (NotImplementedError, RuntimeError):
        return None  # a network that is made for float32 alone
    assert image.grad is not None
    at = image.grad[0, 0].nonzero()
    if not len(at):
        return None
    depth, height, width = (at.max(0).values - at.min(0).values + 1).tolist()
    return depth, height, width


def _without_statistics(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _STATISTICS):
                setattr(module, name, nn.Identity())
            elif isinstance(child, SqueezeExcite):
                setattr(module, name, None)  # as a block without it
    return network


def training_memory(
    network: nn.Module, *, train: TrainParams, patch_zyx: Zyx, device: torch.device
) -> Memory:
    """Measure what training a patch takes.

    On a GPU the peak of forward and backward pass; on a CPU the bytes that the forward pass keeps for the
    backward pass, each storage once.
    """
    sizes = [weight.numel() * weight.element_size() for weight in network.parameters()]
    # weights, gradients, averaged weights
    fixed = sum(sizes) * (3 + _OPTIMIZER_COPIES[train.optimizer])
    own = copy.deepcopy(network).to(device).train()
    image = torch.zeros(1, 1, *patch_zyx, device=device)
    if device.type == "cuda":
        kept = _peak_on_gpu(own, image, train) - sum(sizes)  # gradients stand in `fixed`
        how = f"peak on {torch.cuda.get_device_name(device)}"
    else:
        kept = _kept_for_backward(own, image, train)
        how = "counted on the CPU: what the forward pass keeps"
    with autocast(device, train.precision):
        bf16 = torch.is_autocast_enabled(device.type)
    return Memory(fixed=fixed, patch=kept, how=f"{how}, {'bf16' if bf16 else 'float32'}")


def _peak_on_gpu(network: nn.Module, image: Tensor, train: TrainParams) -> int:
    torch.cuda.reset_peak_memory_stats(image.device)
    before = torch.cuda.memory_allocated(image.device)
    try:
        _loss(network, image, train).backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError as error:
        size = " x ".join(map(str, image.shape[2:]))
        raise SynmlopsError(
            f"sampling.patch_zyx: one patch of {size} voxels does not fit the memory of "
            f"{torch.cuda.get_device_name(image.device)}; lower it (here: --patch) or network.widths"
        ) from error
    return torch.cuda.max_memory_allocated(image.device) - before


def _kept_for_backward(network: nn.Module, image: Tensor, train: TrainParams) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    storages: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return kept  # and so stays alive, and no other gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        loss = _loss(network, image, train)
    n_bytes = sum(storages.values())
    loss.backward()  # type: ignore[no-untyped-call]  # which says that it can be trained
    return n_bytes


def _loss(network: nn.Module, image: Tensor, train: TrainParams) -> Tensor:
    with autocast(image.device, train.precision):
        logits = network(image)
    levels = logits if isinstance(logits, tuple) else (logits,)
    return torch.stack([torch.sigmoid(level.float()).mean() for level in levels]).sum()
