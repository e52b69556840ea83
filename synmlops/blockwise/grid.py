"""A region of a volume cut into blocks: every voxel is written by exactly one of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from synmlops.volumes.prepared import Box


@dataclass(frozen=True)
class Block:
    """A part of a volume that is computed and written at once.

    Attributes
    ----------
    index : int
        Its number in the grid: z slowest, x fastest.
    place_zyx : tuple of int
        Its place among the blocks.
    write : Box
        The voxels that it alone writes, in voxels of the volume.
    """

    index: int
    place_zyx: tuple[int, int, int]
    write: Box

    def read(self, halo_zyx: Sequence[int], within: Box) -> Box:
        """Give the write region and a margin about it, as far as there are voxels.

        Examples
        --------
        >>> block = Block(0, (0, 0, 0), Box((0, 0, 0), (8, 8, 8)))
        >>> block.read((1, 2, 2), within=Box((0, 0, 0), (8, 9, 64)))
        Box(start_zyx=(0, 0, 0), stop_zyx=(8, 9, 10))
        """
        return grown(self.write, halo_zyx, within=within)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a region; those at its far ends may be smaller.

    Examples
    --------
    >>> grid = BlockGrid(Box((0, 0, 0), (20, 64, 64)), (8, 64, 64))
    >>> grid.counts_zyx, len(grid), grid[2].write
    ((3, 1, 1), 3, Box(start_zyx=(16, 0, 0), stop_zyx=(20, 64, 64)))
    """

    region: Box
    block_zyx: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(self.block_zyx) < 1 or min(self.region.shape_zyx) < 1:
            raise ValueError(f"a region of {self.region.shape_zyx} has no blocks of {self.block_zyx}")

    @property
    def counts_zyx(self) -> tuple[int, int, int]:
        """Blocks along each axis."""
        z, y, x = (math.ceil(n / b) for n, b in zip(self.region.shape_zyx, self.block_zyx, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.counts_zyx)

    def __getitem__(self, index: int) -> Block:
        """Give a block by its number.

        Raises
        ------
        IndexError
            If there is none of this number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there are blocks 0 to {len(self) - 1}, not {index}")
        _, n_y, n_x = self.counts_zyx
        return self.at((index // (n_y * n_x), index // n_x % n_y, index % n_x))

    def __iter__(self) -> Iterator[Block]:
        z, y, x = self.counts_zyx
        for place in product(range(z), range(y), range(x)):
            yield self.at(place)

    def at(self, place_zyx: tuple[int, int, int]) -> Block:
        """Give the block at a place among the blocks."""
        z, y, x = place_zyx
        _, n_y, n_x = self.counts_zyx
        starts = [
            at + place * size
            for at, place, size in zip(self.region.start_zyx, place_zyx, self.block_zyx, strict=True)
        ]
        stops = [
            min(start + size, stop)
            for start, size, stop in zip(starts, self.block_zyx, self.region.stop_zyx, strict=True)
        ]
        write = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
        return Block((z * n_y + y) * n_x + x, place_zyx, write)

    def meeting(self, box: Box) -> Iterator[Block]:
        """Give the blocks that share voxels with a box.

        Examples
        --------
        >>> grid = BlockGrid(Box((0, 0, 0), (20, 64, 64)), (8, 64, 64))
        >>> [block.index for block in grid.meeting(Box((7, 0, 0), (9, 1, 1)))]
        [0, 1]
        """
        inner = grown(box, (0, 0, 0), within=self.region).moved(-at for at in self.region.start_zyx)
        z, y, x = (
            range(start // size, math.ceil(stop / size)) if start < stop else range(0)
            for start, stop, size in zip(inner.start_zyx, inner.stop_zyx, self.block_zyx, strict=True)
        )
        for place in product(z, y, x):
            yield self.at(place)


def grown(box: Box, margin_zyx: Sequence[int], *, within: Box) -> Box:
    """Give a box with a margin on every side, cut to another box.

    Examples
    --------
    >>> grown(Box((4, 4, 4), (8, 8, 8)), (1, 0, 9), within=Box((0, 0, 0), (8, 8, 64)))
    Box(start_zyx=(3, 4, 0), stop_zyx=(8, 8, 17))
    """
    starts = [
        max(low, at - by) for low, at, by in zip(within.start_zyx, box.start_zyx, margin_zyx, strict=True)
    ]
    stops = [
        min(high, at + by) for high, at, by in zip(within.stop_zyx, box.stop_zyx, margin_zyx, strict=True)
    ]
    return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
