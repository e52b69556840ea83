"""Test-time augmentation: the same tissue seen from several sides, and the answers turned back."""

from dataclasses import dataclass
from itertools import product

from torch import Tensor

_Z, _Y, _X = -3, -2, -1


@dataclass(frozen=True)
class View:
    """Flips of some axes after y and x have changed places, or not.

    Examples
    --------
    >>> import torch
    >>> view = View(swap=True, flips=(-1,))
    >>> image = torch.tensor([[[1, 2], [3, 4]]])
    >>> view.turn(image).tolist(), view.turn_back(view.turn(image)).equal(image)
    ([[[3, 1], [4, 2]]], True)
    """

    swap: bool = False
    flips: tuple[int, ...] = ()

    def turn(self, voxels: Tensor) -> Tensor:
        """Turn a (..., z, y, x) tensor."""
        turned = voxels.transpose(_Y, _X) if self.swap else voxels
        return turned.flip(self.flips) if self.flips else turned

    def turn_back(self, voxels: Tensor) -> Tensor:
        """Undo `turn`."""
        turned = voxels.flip(self.flips) if self.flips else voxels
        return turned.transpose(_Y, _X) if self.swap else turned


def views_of(n: int) -> tuple[View, ...]:
    """Give 1, 4 (flips in plane), 8 (and quarter turns) or 16 views (and flips along z); the first is plain.

    Examples
    --------
    >>> [len(set(views_of(n))) for n in (1, 4, 8, 16)]
    [1, 4, 8, 16]
    """
    if n == 1:
        return (View(),)
    axes = (_Y, _X) if n < 16 else (_Z, _Y, _X)
    swaps = (False, True) if n >= 8 else (False,)
    return tuple(
        View(swap, tuple(axis for axis, flipped in zip(axes, chosen, strict=True) if flipped))
        for swap in swaps
        for chosen in product((False, True), repeat=len(axes))
    )
