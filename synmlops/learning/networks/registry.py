"""The networks, by name: image patch in, one logit per channel and voxel out.

A network is a `torch.nn.Module` that maps (n, 1, z, y, x) normalised intensity to (n, 3, z, y, x) logits in
the order of `CHANNELS`, for sizes that are multiples of the params' `total_pool_zyx`. In training mode with
deep supervision it gives a tuple of these, the finest first. A name of the params stands for a function that
builds it from `NetworkParams`: one of `NETWORKS`, or one of the user's own, `my_pkg.my_net:build`.
"""

import difflib

import torch
from torch import nn

from synmlops.learning.networks.layers import Exclusive
from synmlops.learning.networks.light_unet import light_unet
from synmlops.learning.networks.own import Build, build_own
from synmlops.learning.networks.plus_unet import plus_unet
from synmlops.learning.networks.pytc_unet import pytc_unet
from synmlops.learning.networks.residual_unet import residual_unet
from synmlops.learning_params import NetworkParams
from synmlops.section import SynmlopsError

NETWORKS: dict[str, Build] = {
    "residual_unet": residual_unet,
    "light_unet": light_unet,
    "plus_unet": plus_unet,
    "pytc_unet": pytc_unet,
}
"""What a name without a colon stands for; imported by name, so that DVC and a bundle see the modules."""


def build_network(params: NetworkParams) -> nn.Module:
    """Build the network that `params.name` names, with its convolutions in channels-last memory format.

    Raises
    ------
    SynmlopsError
        If the name is not known, or a network of the user's own does not do what one must.
    """
    if ":" in params.name:
        network = build_own(params)
    elif params.name in NETWORKS:
        network = NETWORKS[params.name](params)
    else:
        near = difflib.get_close_matches(params.name, NETWORKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SynmlopsError(
            f"network.name: {params.name!r} is not known; {hint}choose from {', '.join(NETWORKS)}, or name a "
            "function of yours as my_pkg.my_net:build"
        )
    for weight in network.parameters():
        if weight.dim() == 5:  # strides of 1 x 1 x 1 are as its gradient has them, for DDP
            is_point = weight.shape[2:].numel() == 1
            layout = torch.contiguous_format if is_point else torch.channels_last_3d
            weight.data = weight.data.clone(memory_format=layout)
    return Exclusive(network) if params.exclusive else network
