"""What the network should say: the `sides` codes of a patch as one plane per channel."""

import torch
from torch import Tensor

from synmlops.params import CHANNELS
from synmlops.volumes.prepared import BACKGROUND, POST, PRE, UNTRUSTED


def targets_of(sides: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Turn side codes into targets and the mask of where they count.

    Parameters
    ----------
    sides : (n, z, y, x) uint8 tensor
        Codes of `synmlops.volumes.prepared`.
    known : (n, 3) bool tensor
        Which channels each patch's label knows, in the order of `CHANNELS`.

    Returns
    -------
    targets, valid : (n, 3, z, y, x) float32 tensor
        0 or 1 each; a loss counts only where `valid` is 1.

    Examples
    --------
    >>> sides = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8).reshape(1, 1, 1, 5)
    >>> targets, valid = targets_of(sides, torch.tensor([[False, False, True]]))
    >>> targets[0, 2].flatten().tolist(), valid[0, 2].flatten().tolist()
    ([0.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0])
    >>> float(valid[0, 0].sum())
    0.0
    """
    trusted = sides != UNTRUSTED
    planes = {"pre": sides == PRE, "post": sides == POST, "union": (sides != BACKGROUND) & trusted}
    targets = torch.stack([planes[name] for name in CHANNELS], dim=1).float()
    valid = trusted[:, None] & known[:, :, None, None, None]
    return targets, valid.float()
