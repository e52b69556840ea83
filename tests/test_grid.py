"""Blocks of a region."""

import numpy as np
import pytest

from synmlops.blockwise.grid import BlockGrid, grown
from synmlops.volumes.prepared import Box


@pytest.mark.parametrize("block", [(8, 16, 16), (5, 7, 9), (100, 100, 100), (1, 40, 40)])
def test_every_voxel_is_written_once(block: tuple[int, int, int]) -> None:
    region = Box((3, 0, 10), (23, 40, 50))
    writes = np.zeros((23, 40, 50), int)
    grid = BlockGrid(region, block)
    for index, one in enumerate(grid):
        assert one == grid[index]
        writes[one.write.slices] += 1
    assert index == len(grid) - 1
    assert (writes[region.slices] == 1).all()
    assert writes.sum() == np.prod(region.shape_zyx)


def test_blocks_that_meet_a_box_are_those_that_share_voxels() -> None:
    grid = BlockGrid(Box((2, 0, 0), (20, 30, 30)), (4, 10, 10))
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.integers(-3, 28, 3)
        box = Box(tuple(low.tolist()), tuple((low + rng.integers(1, 12, 3)).tolist()))
        sharing = [
            block.index
            for block in grid
            if all(
                a.start < b.stop and b.start < a.stop
                for a, b in zip(block.write.slices, box.slices, strict=True)
            )
        ]
        assert [block.index for block in grid.meeting(box)] == sharing


def test_a_margin_ends_where_the_voxels_do() -> None:
    assert grown(Box((0, 5, 5), (2, 9, 9)), (4, 4, 4), within=Box((0, 0, 6), (3, 100, 100))) == Box(
        (0, 1, 6), (3, 13, 13)
    )


@pytest.mark.parametrize(("stop", "block"), [((4, 4, 4), (0, 4, 4)), ((4, 0, 4), (4, 4, 4))])
def test_no_blocks_are_refused(stop: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="has no blocks"):
        BlockGrid(Box((0, 0, 0), stop), block)


def test_a_number_out_of_the_grid_is_refused() -> None:
    with pytest.raises(IndexError, match="0 to 3, not 4"):
        BlockGrid(Box((0, 0, 0), (4, 4, 4)), (1, 4, 4))[4]
