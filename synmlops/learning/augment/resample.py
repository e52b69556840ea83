"""Turning, curve and geometry of a patch on a CPU, compiled: the same labels as in torch, and the same image.

A flip or a quarter turn is a way to step through the voxels as they lie, so none of them is copied for it.
"""

from pathlib import Path

import torch
from torch import Tensor

from synmlops.learning.augment.geometry import Geometry
from synmlops.learning.augment.intensity import Curve
from synmlops.learning.augment.orient import Orientation
from synmlops.learning.native import Compiled, compiled

_MOST = 2**31
"""Voxels of a box, whose places are 32-bit numbers."""


def suits(image: Tensor, sides: Tensor) -> bool:
    """Whether `read` can do it: on a CPU, for which there is a compiler."""
    on_cpu = image.device.type == sides.device.type == "cpu"
    return on_cpu and image.numel() < _MOST and _functions().library is not None


def read(
    geometry: Geometry, curve: Curve, image: Tensor, sides: Tensor, *, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Give the patch's image, normalised and bent, and its labels, of a source that `suits`.

    Parameters
    ----------
    geometry : Geometry
    curve : Curve
    image : tensor of `geometry.source_zyx`
        uint8, uint16 or float32.
    sides : tensor of `geometry.source_zyx`
        Of any integer type.
    mean, std : float
        Of the image's grey values.

    Returns
    -------
    image : float32 tensor of the patch's shape
        New.
    sides : tensor of the patch's shape and the labels' type
        May be a view of what came in.
    """
    is_bent = image.dtype == torch.uint8  # whatever the curve, 256 values are the fewest to compute
    tables = curve.tables(mean=mean, std=std, device=image.device) if is_bent else None
    if geometry.is_sampled:
        value, sides = _sample(geometry, image, tables, sides)
    else:
        value = _move(geometry, image, tables)
        sides = geometry.move(geometry.orientation.apply(sides))
    return (value if is_bent else curve.apply(value, mean=mean, std=std)), sides


def _functions() -> Compiled:
    return compiled(Path(__file__).with_name("resample.cpp"), "-ffp-contract=off")


def _move(geometry: Geometry, image: Tensor, tables: Tensor | None) -> Tensor:
    """Cut the runs of a box that is only shifted."""
    value = torch.empty(geometry.patch_zyx)
    for first, stop, slipped in geometry.runs():
        run = slice(first, stop)
        view = _view(geometry.orientation, image, value[run].shape, (first, *geometry.start_of(slipped)))
        _functions().call("turn", image, image.element_size(), view, *_of_run(tables, run), value[run])
    return value


def _sample(geometry: Geometry, image: Tensor, tables: Tensor | None, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate the runs of a box."""
    n, height, width = geometry.patch_zyx
    _, *box_yx = geometry.box_zyx
    assert min(box_yx) > 1  # as `ROUNDING` leaves it: four voxels lie around every place
    value, labels = torch.empty(n, height, width), torch.empty((n, height, width), dtype=sides.dtype)
    moves = geometry.displacement(image.device)
    for first, stop, slipped in geometry.runs():
        run = slice(first, stop)
        views = [
            _view(geometry.orientation, of, (stop - first, *box_yx), (first, 0, 0)) for of in (image, sides)
        ]
        _functions().call(
            "sample",
            *(image, image.element_size(), views[0], *_of_run(tables, run)),
            *(sides, sides.element_size(), views[1]),
            *(moves, torch.tensor(geometry.rows_of(slipped)), height, width),
            *(value[run], labels[run]),
        )
    return value, labels


def _of_run(tables: Tensor | None, run: slice) -> tuple[Tensor | None, int]:
    if tables is None:
        return None, 0
    return (tables[run] if len(tables) > 1 else tables), len(tables)


def _view(
    orientation: Orientation,
    voxels: Tensor,
    shape_zyx: tuple[int, ...],
    start_zyx: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """Describe a box of the turned voxels: its first voxel, the steps along its axes, its shape."""
    origin, steps = 0, []
    for axis, start in enumerate(start_zyx):
        of = orientation.axes[axis]
        step = voxels.stride(of)
        if axis in orientation.flips:
            origin += (voxels.shape[of] - 1) * step
            step = -step
        origin += start * step
        steps.append(step)
    return torch.tensor([origin, *steps, *shape_zyx])
