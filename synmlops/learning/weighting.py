"""How much a voxel weighs in the loss: the rarer class of its patch more."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from synmlops.params import CHANNELS, LossParams

_UNION = CHANNELS.index("union")


def foreground_weights(foreground: Tensor, valid: Tensor, *, clip: tuple[float, float]) -> Tensor:
    """Weigh the rarer class of each patch up.

    The foreground share f of the valid voxels is clipped, and the rarer class weighs larger over smaller,
    max(f, 1 - f) / min(f, 1 - f). Source: PyTorch Connectomics v1, weight "1".

    Parameters
    ----------
    foreground, valid : (n,) tensor
        Voxels of each patch, over its channels together.

    Returns
    -------
    weights : (n, 2) tensor
        Of background and of foreground; the lesser is 1.

    Examples
    --------
    >>> foreground_weights(torch.tensor([1.0, 6.0]), torch.tensor([4.0, 8.0]), clip=(0.05, 0.95))
    tensor([[1., 3.],
            [3., 1.]])
    """
    share = (foreground / valid.clamp(min=1e-6)).clamp(*clip)
    weights = torch.stack([share / (1 - share), (1 - share) / share], dim=-1)
    return weights.clamp(min=1)


def patch_weights(foreground: Tensor, valid: Tensor, *, params: LossParams) -> Tensor:
    """Weigh the rarer class of each patch up, its share taken as the params say.

    Parameters
    ----------
    foreground, valid : (n, 3) tensor
        Voxels of each channel of each patch.
    params : LossParams
        `foreground_weight_clip` and `foreground_share`.

    Returns
    -------
    weights : (n, 2) tensor
        Of background and of foreground.
    """
    voxels = valid.sum(1) if params.foreground_share == "planes" else valid[:, _UNION]
    return foreground_weights(foreground.sum(1), voxels, clip=params.foreground_weight_clip)


def weighed_as_foreground(targets: Tensor, *, margin: int) -> Tensor:
    """Give where a voxel weighs as foreground does: on it, and within a box about it in plane.

    Parameters
    ----------
    targets : (n, c, z, y, x) tensor
        0 or 1. What a mask hides is 0 there, so that nothing grows from it.
    margin : int
        Voxels along y and x.

    Examples
    --------
    >>> weighed_as_foreground(torch.tensor([0., 0., 0., 1.]).reshape(1, 1, 1, 1, 4), margin=1).flatten()
    tensor([0., 0., 1., 1.])
    """
    if not margin:
        return targets
    side = 2 * margin + 1
    return max_pool3d(targets, (1, side, side), stride=1, padding=(0, margin, margin))


def voxel_weights(targets: Tensor, valid: Tensor, *, params: LossParams) -> Tensor:
    """Give what each voxel of each channel weighs in the binary cross-entropy.

    Parameters
    ----------
    targets, valid : (n, 3, z, y, x) tensor
        0 or 1, as of `targets_of`.
    params : LossParams

    Returns
    -------
    weights : (n, 3, z, y, x) tensor
        0 where a voxel does not count.
    """
    sizes = (part.sum((2, 3, 4)) for part in (targets * valid, valid))
    weights = patch_weights(*sizes, params=params)
    of_background, of_foreground = weights.reshape(-1, 2, 1, 1, 1, 1).unbind(1)
    heavy = weighed_as_foreground(targets, margin=params.foreground_margin)
    return torch.lerp(of_background, of_foreground, heavy) * valid
