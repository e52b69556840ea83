"""What training sees of a patch, before and after augmentation, for a picture."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from synmlops.learning.feed import Drawn, Feed
from synmlops.learning.losses import foreground_weights
from synmlops.learning.targets import targets_of


@dataclass(frozen=True)
class Look:
    """A patch as it lies in its volume and as the network gets it; arrays are (z, y, x)."""

    drawn: Drawn
    image: NDArray[np.float32]  # normalised
    sides: NDArray[np.uint8]
    seen_image: NDArray[np.float32]  # normalised
    seen_sides: NDArray[np.uint8]
    weight: NDArray[np.float32]  # of each voxel in the loss, 0 where it does not count


def look_at(feed: Feed, step: int, index: int, *, clip: tuple[float, float]) -> Look:
    """Make patch `index` of the batch of a step, as training does.

    Parameters
    ----------
    feed : Feed
        On the CPU.
    step, index : int
    clip : tuple of float
        `loss.foreground_weight_clip`.
    """
    patch = feed.patch(step, index)
    draw = patch.chances.draw
    targets, valid = targets_of(patch.sides[None], torch.tensor([draw.known]))
    foreground, n_valid = ((targets * valid).sum()[None], valid.sum()[None])
    of_background, of_foreground = foreground_weights(foreground, n_valid, clip=clip)[0].tolist()
    counts = valid[0].amax(dim=0)
    is_foreground = (targets * valid)[0].amax(dim=0)
    weight = counts * (of_background + (of_foreground - of_background) * is_foreground)
    return Look(
        drawn=patch.chances.drawn,
        image=((draw.image - feed.mean) / feed.std).astype(np.float32),
        sides=np.array(draw.sides),
        seen_image=patch.image.numpy(),
        seen_sides=patch.sides.numpy(),
        weight=weight.numpy(),
    )
