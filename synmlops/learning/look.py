"""What training sees of a patch, before and after augmentation, for a picture."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from synmlops.learning.feed import Drawn, Feed
from synmlops.learning.targets import targets_of
from synmlops.learning.weighting import voxel_weights
from synmlops.params import LossParams


@dataclass(frozen=True)
class Look:
    """A patch as it lies in its volume and as the network gets it; arrays are (z, y, x)."""

    drawn: Drawn
    image: NDArray[np.float32]  # normalised
    sides: NDArray[np.uint8]
    seen_image: NDArray[np.float32]  # normalised
    seen_sides: NDArray[np.uint8]
    weight: NDArray[np.float32]  # greatest of its channels' in the loss, 0 where none counts


def look_at(feed: Feed, step: int, index: int, *, loss: LossParams) -> Look:
    """Make patch `index` of the batch of a step, as training does.

    Parameters
    ----------
    feed : Feed
        On the CPU.
    step, index : int
    loss : LossParams
        How foreground is weighed.
    """
    patch = feed.patch(step, index)
    draw = patch.chances.draw
    targets, valid = targets_of(patch.sides[None], torch.tensor([draw.known]))
    weight = voxel_weights(targets * valid, valid, params=loss)[0].amax(dim=0)
    return Look(
        drawn=patch.chances.drawn,
        image=((draw.image - feed.mean) / feed.std).astype(np.float32),
        sides=np.array(draw.sides),
        seen_image=patch.image.numpy(),
        seen_sides=patch.sides.numpy(),
        weight=weight.numpy(),
    )
