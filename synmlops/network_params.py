"""The network's part of params.yaml: its levels, what it is made of, how far it sees."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from synmlops.section import Count, Section, Size, Zyx

STATED = ("total_pool_zyx", "receptive_field_zyx")
"""Options by which a network of the user's own says what the levels do not."""

_OF_ZEROS = ("residual_unet", "light_unet")  # networks without a choice of padding and pooling
_OF_PYTC = ("plus_unet", "pytc_unet")  # PyTorch Connectomics' networks


class NetworkParams(Section):
    """A 3-D encoder-decoder, from full resolution (level 0) down."""

    name: str = "residual_unet"  # or light_unet, plus_unet, pytc_unet, or yours: my_pkg.my_net:build
    stem_zyx: Zyx = (1, 4, 4)  # voxels folded into channels at the input and unfolded at the output
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (48, 64, 96)  # channels, one per level
    kernels: tuple[Zyx, ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3))  # one per level
    pools: tuple[Zyx, ...] = ((1, 2, 2), (2, 2, 2))  # between levels: one fewer
    blocks: Count = 1  # residual blocks of two convolutions per level and side
    norm: Literal["group", "batch", "instance"] = "group"
    activation: Literal["relu", "silu", "elu", "leaky_relu", "gelu", "none"] = "relu"
    padding: Literal["zeros", "replicate", "reflect", "circular"] | None = None  # null: the network's own
    pooling: bool = False  # plus_unet, pytc_unet: max pooling between levels instead of strided convolutions
    squeeze_excite: bool = False  # each residual block weighs its channels by their means over the patch
    deep_supervision: Size = 0  # coarser levels of the decoder that training gives a loss of their own
    exclusive: bool = False  # softmax over background, pre and post, instead of a sigmoid for each channel
    options: dict[str, bool | int | float | str | tuple[int, ...] | None] = Field(
        {}
    )  # what a network of your own reads beside these, and the two keys of `stated_zyx`

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        n = len(self.widths)
        if len(self.kernels) != n or len(self.pools) != n - 1:
            raise ValueError(
                f"network: {n} widths want {n} kernels and {n - 1} pools, "
                f"got {len(self.kernels)} and {len(self.pools)}"
            )
        even = [k for k in self.kernels if any(size % 2 == 0 for size in k)]
        if even:
            raise ValueError(f"network.kernels: sizes must be odd, got {list(even[0])}")
        if self.deep_supervision > n - 1:
            raise ValueError(
                f"network.deep_supervision: {self.deep_supervision} levels, but {n} widths have {n - 1} "
                f"coarser levels; use {n - 1} or less"
            )
        return self

    @model_validator(mode="after")
    def _options_are_read(self) -> Self:
        if self.options and ":" not in self.name:
            raise ValueError(
                f"network.options: {self.name} reads none, got {', '.join(self.options)}; use {{}}, or name "
                "a network of yours"
            )
        for key in STATED:
            value = self.options.get(key)
            if value is not None and not _is_size_zyx(value):
                raise ValueError(
                    f"network.options.{key}: must be three numbers of voxels from 1, z y x, got {value!r}"
                )
        return self

    @model_validator(mode="after")
    def _borders_and_pools_are_known(self) -> Self:
        if self.name not in _OF_ZEROS:
            return self
        if self.padding not in (None, "zeros"):
            raise ValueError(
                f"network.padding: {self.name} has zeros beyond the image, got {self.padding}; use null, or "
                "network.name: pytc_unet"
            )
        if self.pooling:
            raise ValueError(
                f"network.pooling: {self.name} has strided convolutions alone; use false, or network.name: "
                "pytc_unet"
            )
        return self

    def stated_zyx(self, key: str) -> tuple[int, int, int] | None:
        """Give what the options of a network of your own state, or None.

        `total_pool_zyx` where its pooling is not that of `stem_zyx` and `pools`, and `receptive_field_zyx`
        where its reach is not that of a residual U-Net with these kernels. Both are three numbers of voxels.

        Examples
        --------
        >>> own = NetworkParams(name="my_net:build", options={"total_pool_zyx": (1, 16, 16)})
        >>> own.total_pool_zyx(), NetworkParams().stated_zyx("total_pool_zyx")
        ((1, 16, 16), None)
        """
        value = self.options.get(key)
        if not isinstance(value, tuple):
            return None
        z, y, x = value
        return z, y, x

    def total_pool_zyx(self) -> tuple[int, int, int]:
        """Voxels that one voxel of the lowest level covers; patches are multiples of it, see `takes_size`."""
        stated = self.stated_zyx("total_pool_zyx")
        if stated is not None:
            return stated
        steps = (self.stem_zyx, *self.pools)
        z, y, x = (math.prod(step[axis] for step in steps) for axis in range(3))
        return z, y, x

    def takes_size(self, size: int, pool: int) -> bool:
        """Say whether a patch or window may have this size where the total pooling is `pool`.

        A multiple, for all networks. For those that upsample with aligned corners also one voxel more: then
        the voxels of all levels lie upon each other, which is how PyTorch Connectomics trains them.

        Examples
        --------
        >>> NetworkParams().takes_size(257, 16)
        False
        >>> NetworkParams(name="pytc_unet", stem_zyx=(1, 1, 1)).takes_size(257, 16)
        True
        """
        aligned = self.name in _OF_PYTC and not self.pooling
        return size % pool == 0 or (aligned and size % pool == 1)

    def receptive_field_zyx(self) -> tuple[int, int, int]:
        """Width in voxels of the input that can move one output voxel, along z, y and x.

        Counts the convolutions of encoder and decoder; an upper bound, held by a test on gradients. What
        group and instance norm, squeeze-excite and the non-local block of plus_unet see of the whole patch is
        not counted: inference reads no further than half this width beyond a region, so a guard of this width
        keeps it from all that training saw, whatever a network could see.
        """
        stated = self.stated_zyx("receptive_field_zyx")
        if stated is not None:
            return stated
        z, y, x = (self._receptive_field(axis) for axis in range(3))
        return z, y, x

    def _receptive_field(self, axis: int) -> int:
        if self.name in _OF_PYTC:
            return self._receptive_field_of_pytc(axis)
        step = self.stem_zyx[axis]
        reach = self.kernels[0][axis] // 2 * step  # the stem's convolution, then those of the blocks
        for level, kernel in enumerate(self.kernels):
            sides = 1 if level == len(self.kernels) - 1 else 2
            reach += sides * 2 * self.blocks * (kernel[axis] // 2) * step
            if level < len(self.pools):
                step *= self.pools[level][axis]
        return 2 * reach + step

    def _receptive_field_of_pytc(self, axis: int) -> int:
        """Count what leads down and the blocks, and interpolation on the way up."""
        half = [kernel[axis] // 2 for kernel in self.kernels]
        in_blocks = [0 if axis == 0 else 2 * self.blocks * n for n in half]  # residual blocks are flat
        is_flat = axis == 0 and any(kernel[0] == 1 for kernel in self.kernels)
        reach, step = 0 if is_flat else 2 * 2, 1  # of the first and the last convolution, five voxels wide
        reach += half[0] + in_blocks[0]
        for level, pool in enumerate(self.pools, start=1):
            reach += in_blocks[level] * step  # the blocks above this level, which have its kernel
            into = step  # a strided convolution
            step *= pool[axis]
            reach += half[level] * (step if self.pooling else into)
            # the blocks of this level, and up from it: a convolution, and a voxel beside by interpolation
            reach += (in_blocks[level] + half[level] + 1) * step
        return 2 * reach + step


def _is_size_zyx(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and min(value) >= 1
