"""Network, targets, losses, sampling and optimisation of a PyTorch Connectomics config, in our params.

Source of what a key does there: branch v1.0 of github.com/zudi-lin/pytorch_connectomics,
`connectomics/model/loss`, `engine/solver`, `data/dataset/dataset_volume.py` and `data/utils`.
"""

from dataclasses import dataclass
from typing import Any

from synmlops.learning_params import NetworkParams
from synmlops.section import SynmlopsError, Zyx
from synmlops.volumes.importers.pytc_draft import Draft, Fate
from synmlops.volumes.importers.pytc_network import network_params_of

WEIGHT_CLIP = [0.05, 0.95]
"""Between what the foreground share is clipped where WEIGHT_OPT is "1"."""

EVEN = [0.5, 0.5]
"""A clip that gives background and foreground the same weight."""

NO_CLIPPING = 1e6
"""A norm of gradients that is never reached."""

_OVERLAP_INSIDE = 4.0  # the factor that our overlap penalty has inside


@dataclass(frozen=True)
class Target:
    """The target that is ours among MODEL.TARGET_OPT."""

    option: str
    index: int  # its place, and that of its losses
    kind: str  # of labels
    exclusive: bool


def find_target(draft: Draft) -> Target:
    """Choose the target that is of synapses, and say that the others have no counterpart.

    Raises
    ------
    SynmlopsError
        If there is none.
    """
    key = "MODEL.TARGET_OPT"
    options = draft.list(key)
    known = {"1": ("pairs", False), "1-1": ("pairs", True), "0": ("union", False)}
    index = next((options.index(option) for option in known if option in options), None)
    if index is None:
        raise SynmlopsError(
            f"{key}: none of {options} is of synapses; taken over are ['1'] (pre, post, union), ['1-1'] "
            f"(background, pre, post) and ['0'] (union) ({draft.settings.source})"
        )
    option = options[index]
    kind, exclusive = known[option]
    others = [one for one in options if one != option]
    ours = f"data.train.label_kind: {kind}" + ("; network.exclusive: true" if exclusive else "")
    if others:
        why = (
            f"of {options}, {option} is taken over; there is no counterpart of {', '.join(map(str, others))}"
        )
        draft.say(key, Fate.CHANGED, ours, why)
    else:
        draft.say(key, Fate.RENAMED, ours)
    return Target(option, index, kind, exclusive)


def take_network(draft: Draft, target: Target) -> NetworkParams:
    """Take the network, v0's as the nearest of ours.

    Raises
    ------
    SynmlopsError
        If it is flat, of an architecture that is not here, or sees more than grey.
    """
    for key in ("DATASET.DO_2D",):
        if draft.flag(key):
            raise SynmlopsError(f"{key}: 2-D networks have no counterpart here; use a 3-D one (DO_2D: false)")
        draft.say(key, Fate.CARRIED, why="all networks here are 3-D")
    if draft.number("MODEL.IN_PLANES") != 1:
        raise draft.wrong("MODEL.IN_PLANES", "images have one channel here, use 1")
    isotropic = draft.flag("DATASET.IS_ISOTROPIC")
    if draft.settings.version == "v0":
        network = _network_of_v0(draft, exclusive=target.exclusive)
    else:
        given = draft.settings.section("MODEL") | {"TARGET_OPT": [target.option]}
        network = network_params_of(given, is_isotropic=isotropic)
    draft.set("network", network.model_dump(mode="json"))
    how = Fate.CHANGED if draft.settings.version == "v0" else Fate.RENAMED
    why = "rebuilt as the nearest network here; weights of v0 are not read" if how is Fate.CHANGED else ""
    draft.say("MODEL.ARCHITECTURE", how, f"network.name: {network.name}", why)
    squeeze = f"network.squeeze_excite: {str(network.squeeze_excite).lower()}"
    draft.say("MODEL.BLOCK_TYPE", Fate.RENAMED, squeeze)
    draft.say("MODEL.FILTERS", Fate.CARRIED, f"network.widths: {list(network.widths)}")
    draft.say("MODEL.NORM_MODE", Fate.RENAMED, f"network.norm: {network.norm}")
    draft.say("MODEL.ACT_MODE", Fate.CARRIED, f"network.activation: {network.activation}")
    draft.say("MODEL.PAD_MODE", Fate.CARRIED, f"network.padding: {network.padding}")
    draft.say("MODEL.POOLING_LAYER", Fate.CARRIED, f"network.pooling: {str(network.pooling).lower()}")
    levels = "network.kernels, network.pools"
    draft.say_all("MODEL.ISOTROPY DATASET.IS_ISOTROPIC", Fate.RENAMED, levels, "size of each level's kernels")
    draft.say("MODEL.IN_PLANES", Fate.CARRIED, why="images have one channel")
    draft.say("MODEL.OUT_PLANES", Fate.RENAMED, why="follows from data.train.label_kind, network.exclusive")
    return network


def _network_of_v0(draft: Draft, *, exclusive: bool) -> NetworkParams:
    """Give v0's unet_residual_3d as our residual U-Net: its widths, kernels and pooling in plane alone."""
    architecture = draft.text("MODEL.ARCHITECTURE")
    if architecture not in ("unet_residual_3d", "unet_3d"):  # the latter is what is not given
        raise draft.wrong("MODEL.ARCHITECTURE", "must be unet_residual_3d in a config of v0")
    norms = {"bn": "batch", "sync_bn": "batch", "gn": "group", "in": "instance"}
    norm, activation = draft.text("MODEL.NORM_MODE"), draft.text("MODEL.ACT_MODE")
    if norm not in norms:
        raise draft.wrong("MODEL.NORM_MODE", f"must be one of {', '.join(norms)}")
    if activation not in ("relu", "elu", "leaky_relu"):
        raise draft.wrong("MODEL.ACT_MODE", "must be relu, elu or leaky")
    widths = draft.list("MODEL.FILTERS")
    if len(widths) < 2 or not all(isinstance(width, int) and width > 0 for width in widths):
        raise draft.wrong("MODEL.FILTERS", "must be two or more numbers of channels")
    below = len(widths) - 1
    return NetworkParams.model_validate(
        {
            "name": "residual_unet",
            "stem_zyx": (1, 1, 1),
            "widths": widths,
            "kernels": [(1, 3, 3)] + [(3, 3, 3)] * below,
            "pools": [(1, 2, 2)] * below,
            "norm": norms[norm],
            "activation": activation,
            "exclusive": exclusive,
        }
    )


def take_sampling(draft: Draft, network: NetworkParams, *, has_mask: bool) -> None:
    """Take patch, batch and the rule of rejection."""
    patch = fitted(draft.zyx("MODEL.INPUT_SIZE"), network)
    take_size(draft, "MODEL.INPUT_SIZE", "sampling.patch_zyx", patch)
    draft.say("MODEL.OUTPUT_SIZE", Fate.RENAMED, why="the same as the patch, always")
    key, batch = "SOLVER.SAMPLES_PER_BATCH", draft.whole("SOLVER.SAMPLES_PER_BATCH", least=1)
    many = _is_distributed(draft) and draft.settings.version == "v1"
    gpus = draft.whole("SYSTEM.NUM_GPUS", least=1) if many else 1
    why = f"{batch} a GPU of {gpus}; ours is of all together" if many else "of all GPUs together"
    draft.take(key, "sampling.batch_size", batch * gpus, why=why)
    least = draft.whole("DATASET.REJECT_SAMPLING.SIZE_THRES")
    draft.take("DATASET.REJECT_SAMPLING.SIZE_THRES", "sampling.reject_below", max(0, least))
    chance = draft.share("DATASET.REJECT_SAMPLING.P")
    draft.take("DATASET.REJECT_SAMPLING.P", "sampling.reject_probability", chance)
    diversity = draft.whole("DATASET.REJECT_SAMPLING.DIVERSITY")
    ids = max(0, diversity - 1)  # the background counts there
    draft.take(
        "DATASET.REJECT_SAMPLING.DIVERSITY",
        "sampling.min_synapses",
        -(-ids // 2),
        why="counts ids and background there, synapses whose middle is in the patch here",
        fate=Fate.CHANGED if ids else Fate.CARRIED,
    )
    if has_mask:
        draft.take("DATASET.VALID_RATIO", "sampling.min_trusted", draft.share("DATASET.VALID_RATIO"))
    else:
        draft.set("sampling.min_trusted", 0.0)
        draft.say("DATASET.VALID_RATIO", Fate.NONE, why="without VALID_MASK_NAME it does nothing")
    draft.set("sampling.centred", 0.0)
    draft.set("sampling.volume_weights", {})


def _is_distributed(draft: Draft) -> bool:
    return (
        draft.flag("SYSTEM.DISTRIBUTED")
        or draft.flag("DATASET.DISTRIBUTED")
        or draft.settings.get("SYSTEM.PARALLEL") == "DDP"
    )


def fitted(size_zyx: Zyx, network: NetworkParams) -> Zyx:
    """Give the size if the network takes it, else the nearest multiple, the smaller of two as near.

    Examples
    --------
    >>> fitted((17, 257, 257), NetworkParams(stem_zyx=(1, 2, 2), pools=((2, 2, 2), (1, 2, 2))))
    (16, 256, 256)
    >>> fitted((17, 257, 250), NetworkParams(name="plus_unet", stem_zyx=(1, 1, 1), pools=((2, 8, 8),) * 2))
    (17, 257, 256)
    """
    z, y, x = (
        size if network.takes_size(size, pool) else max(pool, (2 * size + pool - 1) // (2 * pool) * pool)
        for size, pool in zip(size_zyx, network.total_pool_zyx(), strict=True)
    )
    return z, y, x


def take_size(draft: Draft, key: str, ours: str, size: Zyx) -> None:
    """Set a size, and say so where it is not the one in the file."""
    same = list(size) == list(draft.zyx(key))
    fate = Fate.CARRIED if same else Fate.CHANGED
    why = "" if same else "the nearest that the network takes"
    draft.take(key, ours, list(size), fate=fate, why=why)


def take_losses(draft: Draft, target: Target, *, has_mask: bool) -> None:
    """Take the losses of the target, its weights, and the penalty on overlap.

    Raises
    ------
    SynmlopsError
        If none of its losses has a counterpart, or the lists do not fit each other.
    """
    names, weights = _of_target(draft, "LOSS_OPTION", target), _of_target(draft, "LOSS_WEIGHT", target)
    masks = _of_target(draft, "WEIGHT_OPT", target)
    if not len(names) == len(weights) == len(masks):
        raise SynmlopsError(
            f"MODEL.LOSS_OPTION, LOSS_WEIGHT, WEIGHT_OPT: have {len(names)}, {len(weights)} and {len(masks)} "
            f"entries for target {target.option}; give one each ({draft.settings.source})"
        )
    loss: dict[str, Any] = dict.fromkeys(("bce", "dice", "focal", "tversky", "cross_entropy", "overlap"), 0.0)
    loss |= {"foreground_weight_clip": EVEN, "foreground_share": "voxels" if has_mask else "planes"}
    lost: list[str] = []
    for place, (name, weight) in enumerate(zip(names, weights, strict=True)):
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            raise draft.wrong("MODEL.LOSS_WEIGHT", "must be numbers from 0, a list for each target")
        options = _kwargs(draft, target.index, place)
        lost += _take_loss(loss, str(name), float(weight), str(masks[place]), options, target)
    if not any(loss[name] for name in ("bce", "dice", "focal", "tversky", "cross_entropy")):
        raise SynmlopsError(
            f"MODEL.LOSS_OPTION: {names} has no counterpart; taken over are WeightedBCE, "
            "WeightedBCEWithLogitsLoss, DiceLoss, WSDiceLoss, JaccardLoss, WeightedBCEFocalLoss and, with "
            f"target 1-1, WeightedCE ({draft.settings.source})"
        )
    _take_penalty(draft, loss, lost)
    for name, value in loss.items():
        draft.set(f"loss.{name}", value)
    _say_losses(draft, loss, lost)


def _of_target(draft: Draft, name: str, target: Target) -> list[Any]:
    lists = draft.list(f"MODEL.{name}")
    if target.index < len(lists) and isinstance(lists[target.index], list | tuple):
        return [*lists[target.index]]
    raise draft.wrong(f"MODEL.{name}", "must be a list of lists, one for each of MODEL.TARGET_OPT")


def _kwargs(draft: Draft, index: int, place: int) -> dict[str, Any]:
    keys, values = draft.list("MODEL.LOSS_KWARGS_KEY"), draft.list("MODEL.LOSS_KWARGS_VAL")
    try:
        return dict(zip(keys[index][place] or (), values[index][place] or (), strict=True))
    except (IndexError, TypeError):
        return {}
    except ValueError as error:
        raise draft.wrong("MODEL.LOSS_KWARGS_VAL", "must have a value for each of LOSS_KWARGS_KEY") from error


def _take_loss(
    loss: dict[str, Any], name: str, weight: float, mask: str, options: dict[str, Any], target: Target
) -> list[str]:
    """Add one loss; give in words what of it is lost or changed."""
    unread = [f"{name}: {key}" for key in options]
    if name in ("WeightedBCE", "WeightedBCEWithLogitsLoss") and not target.exclusive:
        loss["bce"] += weight
        return unread + _weigh(loss, mask)
    if name in ("DiceLoss", "WSDiceLoss") and not target.exclusive:
        loss["dice"] += weight
        loss["dice_form"] = "sample"
        return unread if name == "DiceLoss" else [*unread, "WSDiceLoss is taken for DiceLoss"]
    if name == "JaccardLoss" and not target.exclusive:
        loss |= {"tversky": loss["tversky"] + weight, "tversky_weights": [1.0, 1.0]}
        return [*unread, "JaccardLoss is the Tversky loss with weights 1 and 1"]
    if name == "WeightedBCEFocalLoss" and not target.exclusive:
        loss["focal"] += weight
        loss["focal_gamma"] = float(options.get("gamma", 2.0))
        return [*_weigh(loss, mask), "WeightedBCEFocalLoss: its alpha is our foreground weight"]
    if name == "WeightedCE" and target.exclusive:
        loss["cross_entropy"] += weight
        return _weigh_classes(loss, options.get("class_weight"), mask)
    return [f"{name} has no counterpart"]


def _weigh(loss: dict[str, Any], mask: str) -> list[str]:
    """Set foreground weights as WEIGHT_OPT has them."""
    if mask[:1] == "1":
        loss["foreground_weight_clip"] = WEIGHT_CLIP
        loss["foreground_margin"] = 1 if mask == "1-1" else 0
        return []
    return [] if mask[:1] == "0" else [f"weight {mask} has no counterpart: all voxels weigh the same"]


def _weigh_classes(loss: dict[str, Any], weights: Any, mask: str) -> list[str]:
    """Set weights of classes: a foreground share that is clipped to one value weighs the same everywhere."""
    if weights is None:
        return _weigh(loss, mask)
    try:
        background, pre, post = (float(weight) for weight in weights)
        share = background / (background + (pre + post) / 2)
    except (TypeError, ValueError, ZeroDivisionError):
        return [f"class_weight {weights} is not three numbers above 0: all classes weigh the same"]
    loss["foreground_weight_clip"] = [share, share]
    lost = [] if pre == post else ["pre and post weigh the same here, the mean of the two"]
    least = min(background, (pre + post) / 2)
    return lost if least == 1 else [*lost, f"the lesser weight is 1 here, {least:g} there"]


def _take_penalty(draft: Draft, loss: dict[str, Any], lost: list[str]) -> None:
    """Take the penalty on overlap of pre and post, the one regularisation that is of synapses."""
    names, weights = draft.list("MODEL.REGU_OPT"), draft.list("MODEL.REGU_WEIGHT")
    others = [str(name) for name in names if name != "Nonoverlap"]
    if "Nonoverlap" in names:
        place = names.index("Nonoverlap")
        if place >= len(weights) or not isinstance(weights[place], int | float):
            raise draft.wrong("MODEL.REGU_WEIGHT", "must have a number for each of REGU_OPT")
        loss["overlap"] = weights[place] / _OVERLAP_INSIDE
    ours = f"loss.overlap: {loss['overlap']:g}"
    why = "ours has the factor 4 inside" + (f"; no counterpart of {', '.join(others)}" if others else "")
    if names and not loss["overlap"]:
        draft.say_all("MODEL.REGU_OPT MODEL.REGU_WEIGHT MODEL.REGU_TARGET", Fate.NONE, why=f"no {others[0]}")
        return
    draft.say("MODEL.REGU_OPT", Fate.CHANGED if others else Fate.RENAMED, ours, why if names else "")
    draft.say("MODEL.REGU_WEIGHT", Fate.RENAMED, ours, why if names else "")
    draft.say("MODEL.REGU_TARGET", Fate.RENAMED, why="the overlap is always that of pre and post")


def _say_losses(draft: Draft, loss: dict[str, Any], lost: list[str]) -> None:
    terms = [f"loss.{name}: {loss[name]:g}" for name in ("bce", "dice", "focal", "tversky", "cross_entropy")]
    kept = ", ".join(term for term in terms if not term.endswith(": 0"))
    why = "; ".join(dict.fromkeys(lost))
    draft.say("MODEL.LOSS_OPTION", Fate.CHANGED if lost else Fate.RENAMED, kept, why)
    draft.say("MODEL.LOSS_WEIGHT", Fate.CHANGED if lost else Fate.CARRIED, kept)
    clip = loss["foreground_weight_clip"]
    ours = f"loss.foreground_weight_clip: [{clip[0]:.3g}, {clip[1]:.3g}]"
    draft.say("MODEL.WEIGHT_OPT", Fate.RENAMED, ours, "the same for all losses but Dice, which has none")
    fate = Fate.RENAMED if loss["cross_entropy"] else Fate.CHANGED
    draft.say_all("MODEL.LOSS_KWARGS_KEY MODEL.LOSS_KWARGS_VAL", fate, ours, why)
    draft.say("MODEL.OUTPUT_ACT", Fate.RENAMED, why="each loss has its own; no key is needed")
