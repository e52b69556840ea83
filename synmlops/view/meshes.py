"""Volumes as neuroglancer serves them, and surfaces of single synapses: never of a whole volume."""

from collections.abc import Sequence
from typing import Any

import neuroglancer
import numpy as np
import pandas as pd
from neuroglancer import _neuroglancer as compiled
from neuroglancer.local_volume import InvalidObjectIdForMesh
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.progress import say
from synmlops.view.arrays import ViewedArray
from synmlops.view.scene import Placed

MOST_DOWNSAMPLED = 16
"""Voxels that one of a coarse view may stand for. The viewer begins with the coarsest chunks about the start,
64 voxels cubed; as files have one scale, 16 times as many voxels, 4 million, are read for each."""

_BOX_COLUMNS = ["z0", "y0", "x0", "z1", "y1", "x1"]
_MARGIN = np.array([[-1], [1]])  # voxels before and after a box, so that surfaces are closed
_MOST_VOXELS = 1 << 26
"""Of a synapse's box; a mesh of a larger one is not made, for a table may hold anything."""


class SiteBoxes:
    """Where each site of a partner table lies, in voxels of the instances.

    Parameters
    ----------
    table : DataFrame
        Its voxel indices may be counted from elsewhere; its nm say where.
    instances : Placed
    """

    def __init__(self, table: pd.DataFrame, instances: Placed) -> None:
        voxel, offset = np.array(instances.grid.voxel_nm), np.array(instances.grid.offset_nm)
        self._shape = np.array(instances.volume.shape)
        lowest = table.groupby("site")[_BOX_COLUMNS[:3]].min()
        self._boxes = lowest.join(table.groupby("site")[_BOX_COLUMNS[3:]].max())
        self._shift = np.zeros(3, int)
        if len(table):
            first = table.iloc[0]
            nm = first[["pre_z_nm", "pre_y_nm", "pre_x_nm"]].to_numpy(float)
            counted = first[["pre_z", "pre_y", "pre_x"]].to_numpy(int)
            self._shift = np.rint((nm - offset) / voxel).astype(int) - counted

    def around(self, instance: int) -> tuple[slice, ...] | None:
        """Give the box of an instance's site with a voxel about it; None if there is no such site."""
        site = (instance + 1) // 2
        if site not in self._boxes.index:
            return None
        corners = self._boxes.loc[site].to_numpy(int).reshape(2, 3) + self._shift + _MARGIN
        low, high = np.clip(corners, 0, self._shape)
        if (high <= low).any() or np.prod(high - low) > _MOST_VOXELS:
            return None
        return tuple(slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))


class LazyVolume(neuroglancer.LocalVolume):  # type: ignore[misc]  # the package has no types
    """A local volume that makes surfaces from one synapse's voxels; neuroglancer's reads all there are."""

    def __init__(
        self, array: ViewedArray, voxel_nm: Sequence[float], *, kind: str, boxes: SiteBoxes | None = None
    ) -> None:
        self._array, self._voxel_zyx, self._boxes = array, np.array(voxel_nm), boxes
        self._told: set[str] = set()
        super().__init__(
            array,
            dimensions=dimensions(voxel_nm, channels=array.ndim == 4),
            volume_type=kind,
            max_downsampling=MOST_DOWNSAMPLED,
        )

    def get_encoded_subvolume(self, *args: Any, **kwargs: Any) -> Any:
        """Give a chunk; one that cannot be read is told of once, and missing in the page."""
        try:
            return super().get_encoded_subvolume(*args, **kwargs)
        except SynmlopsError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                say([str(error)])
            raise ValueError(str(error)) from error  # which neuroglancer answers without a traceback

    def get_object_mesh(self, object_id: int) -> bytes:
        """Give the surface of an instance as neuroglancer's client reads it."""
        box = None if self._boxes is None else self._boxes.around(object_id)
        if box is None:
            raise InvalidObjectIdForMesh
        voxels = np.pad(self._array.read(box) == object_id, 1).astype(np.uint8)
        start = np.array([part.start - 1 for part in box])
        mesh = compiled.OnDemandObjectMeshGenerator(voxels, [1.0] * 3, [0.0] * 3, max_quadrics_error=-1.0)
        found = mesh.get_mesh(1)
        if found is None:
            raise InvalidObjectIdForMesh
        return _moved(found, start[::-1], self._voxel_zyx[::-1] * 1e-9)


def dimensions(voxel_nm: Sequence[float], *, channels: bool = False) -> Any:
    """Give neuroglancer's name for a voxel size: x, y, z, and a channel axis that only shaders see."""
    names, scales, units = ["x", "y", "z"], list(voxel_nm)[::-1], ["nm"] * 3
    if channels:
        names, scales, units = [*names, "c^"], [*scales, 1], [*units, ""]
    return neuroglancer.CoordinateSpace(names=names, scales=scales, units=units)


def _moved(mesh: bytes, start_xyz: NDArray[Any], voxel_m: NDArray[Any]) -> bytes:
    """Move a mesh from voxels, whose middles are at their indices and in the viewer half on, to metres."""
    n = int(np.frombuffer(mesh, "<u4", 1)[0])
    vertices = np.frombuffer(mesh, "<f4", 3 * n, 4).reshape(n, 3)
    placed = ((vertices + start_xyz + 0.5) * voxel_m).astype("<f4")
    moved: bytes = mesh[:4] + placed.tobytes() + mesh[4 + 12 * n :]
    return moved
