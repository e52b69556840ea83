"""Where the time of a training step goes, by kind of work."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS = {
    "convolution, forward": ("mkldnn_convolution", "cudnn_convolution", "slow_conv3d_forward"),
    "convolution, gradients": ("convolution_backward", "cudnn_convolution_backward"),
    "convolution, weight gradient": ("weight_gradient", "gather_weight_gradient"),
    "norm, squeeze-excite, activation": (
        "native_group_norm", "native_group_norm_backward", "elu", "elu_", "elu_backward", "mean", "div",
        "moments", "scale_shift", "scale_shift_sums", "scale_shift_gradient", "mul", "sigmoid",
        "adaptive_avg_pool3d", "_adaptive_avg_pool3d", "_adaptive_avg_pool3d_backward", "expand",
    ),
    "padding, copies, sums": (
        "replication_pad3d", "replication_pad3d_backward", "copy_", "fill_", "add", "add_", "empty", "zero_",
    ),
    "upsampling": (
        "upsample_trilinear3d", "upsample_trilinear3d_backward", "upsample_add", "upsample_gradient",
    ),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


def breakdown(step: Callable[[], object], device: torch.device) -> str:
    """Profile a step; give a table of seconds by kind of work.

    On a CPU these are seconds of the calling thread, which all threads work in; on a GPU, of its kernels.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        step()
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in recorded.events():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[_kind(event)] += own / 1e6
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return "\n".join(f"  {kind:36}{value:8.3f} s {value / total:6.1%}" for kind, value in ordered)


def _kind(event: object) -> str:
    """Name the kind of work of a profiler event, by its name and by what it is part of."""
    name = event.name.removeprefix("aten::")  # type: ignore[attr-defined]
    above = []
    parent = event  # type: ignore[assignment]
    while parent is not None:
        above.append(parent.name)
        parent = parent.cpu_parent
    if any(part.startswith("Optimizer.step") for part in above):
        return "optimiser"
    if "loss" in above or any("_Sums" in part or "_SumsBackward" in part for part in above):
        return "loss"
    if name in ("convolve", "gather_convolve"):
        is_backward = any("_ConvolutionBackward" in part for part in above)
        return "convolution, input gradient" if is_backward else "convolution, forward"
    return _KIND_OF.get(name, "other")
