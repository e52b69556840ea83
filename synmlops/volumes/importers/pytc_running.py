"""Optimisation, inference and decoding of a PyTorch Connectomics config; and what has no place here.

Source of what a key does there: branch v1.0 of github.com/zudi-lin/pytorch_connectomics,
`connectomics/engine` and `connectomics/utils/process.py`.
"""

from synmlops.learning_params import NetworkParams
from synmlops.section import Zyx
from synmlops.volumes.importers.pytc_draft import Draft, Fate
from synmlops.volumes.importers.pytc_learning import NO_CLIPPING, Target, fitted, take_size

_SCHEDULES = {
    "WarmupMultiStepLR": "multistep",
    "MultiStepLR": "multistep",
    "WarmupCosineLR": "cosine",
    "OneCycle": "cosine",
    "ReduceLROnPlateau": "constant",
}
_EMA_FOR_SWA = 0.999


def take_training(draft: Draft) -> None:
    """Take optimiser, schedule and what is saved when."""
    steps = draft.whole("SOLVER.ITERATION_TOTAL", least=1)
    draft.take("SOLVER.ITERATION_TOTAL", "train.steps", steps)
    draft.take(
        "SOLVER.ITERATION_SAVE",
        "train.checkpoint_every",
        draft.whole("SOLVER.ITERATION_SAVE", least=1),
        why="checkpoints are for going on; the best and the last weights are kept as models",
    )
    draft.take(
        "SOLVER.ITERATION_VAL",
        "train.validate_every",
        draft.whole("SOLVER.ITERATION_VAL", least=1),
        why="by F1 over whole regions, not by loss",
    )
    _take_optimizer(draft)
    _take_schedule(draft, steps)
    _take_swa(draft)
    precision = "auto"
    if "MODEL.MIXED_PRECESION" in draft.settings.given and not draft.flag("MODEL.MIXED_PRECESION"):
        precision = "float32"
    draft.set("train.precision", precision)
    draft.say(
        "MODEL.MIXED_PRECESION", Fate.RENAMED, f"train.precision: {precision}", "bfloat16 where it is fast"
    )


def _take_optimizer(draft: Draft) -> None:
    name = draft.text("SOLVER.NAME")
    if name not in ("SGD", "Adam", "AdamW"):
        raise draft.wrong("SOLVER.NAME", "must be SGD, Adam or AdamW")
    why = "momentum is Nesterov's here" if name == "SGD" else ""
    fate = Fate.CHANGED if why else Fate.RENAMED
    draft.take("SOLVER.NAME", "train.optimizer", name.lower(), why=why, fate=fate)
    draft.take("SOLVER.BASE_LR", "train.learning_rate", draft.number("SOLVER.BASE_LR"))
    draft.take("SOLVER.WEIGHT_DECAY", "train.weight_decay", draft.number("SOLVER.WEIGHT_DECAY", least=0))
    draft.take("SOLVER.MOMENTUM", "train.momentum", draft.number("SOLVER.MOMENTUM", least=0))
    for key, value in (
        ("SOLVER.WEIGHT_DECAY_NORM", 0),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0),
        ("SOLVER.BIAS_LR_FACTOR", 1),
    ):
        same = draft.number(key) == value
        why = "norms and biases have no decay and the common rate here"
        draft.say(key, Fate.CARRIED if same else Fate.NONE, why=why)
    usual = [float(beta) for beta in draft.list("SOLVER.BETAS")] == [0.9, 0.999]
    draft.say("SOLVER.BETAS", Fate.CARRIED if usual else Fate.NONE, why="always 0.9 and 0.999")
    _take_clipping(draft)


def _take_clipping(draft: Draft) -> None:
    enabled = draft.flag("SOLVER.CLIP_GRADIENTS.ENABLED")
    value = draft.number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", least=1e-9) if enabled else NO_CLIPPING
    draft.set("train.gradient_clip", value)
    keys = "ENABLED CLIP_TYPE CLIP_VALUE NORM_TYPE"
    why = "by the norm of all gradients together; by value or weight by weight there"
    for key in keys.split():
        draft.say(
            f"SOLVER.CLIP_GRADIENTS.{key}",
            Fate.CHANGED if enabled else Fate.RENAMED,
            f"train.gradient_clip: {value:g}",
            why if enabled else "never reached: gradients are not clipped",
        )


def _take_schedule(draft: Draft, steps: int) -> None:
    name = draft.text("SOLVER.LR_SCHEDULER_NAME")
    if name not in _SCHEDULES:
        raise draft.wrong("SOLVER.LR_SCHEDULER_NAME", f"must be one of {', '.join(_SCHEDULES)}")
    schedule = _SCHEDULES[name]
    milestones = [int(step) for step in draft.list("SOLVER.STEPS")] if schedule == "multistep" else []
    if schedule == "multistep" and not milestones:
        schedule = "constant"
    near = name in ("OneCycle", "ReduceLROnPlateau")
    draft.take(
        "SOLVER.LR_SCHEDULER_NAME",
        "train.schedule",
        schedule,
        why="the nearest there is" if near else "",
        fate=Fate.CHANGED if near else Fate.RENAMED,
    )
    draft.take("SOLVER.STEPS", "train.milestones", milestones, fate=None if milestones else Fate.NONE)
    if not milestones:
        draft.say("SOLVER.STEPS", Fate.NONE, why=f"{name} has no steps")
    draft.take("SOLVER.GAMMA", "train.milestone_factor", draft.number("SOLVER.GAMMA"))
    warms = name.startswith("Warmup")
    warmup = draft.whole("SOLVER.WARMUP_ITERS", least=0) if warms else 0
    draft.take(
        "SOLVER.WARMUP_ITERS",
        "train.warmup_steps",
        min(warmup, steps),
        why="" if warms else f"{name} does not warm up",
    )
    start = draft.share("SOLVER.WARMUP_FACTOR")
    draft.take("SOLVER.WARMUP_FACTOR", "train.warmup_from", start)
    draft.set("train.warmup_form", "within")
    linear = draft.settings.get("SOLVER.WARMUP_METHOD") == "linear"
    why = "" if linear else "the warm-up is linear here, always"
    draft.say(
        "SOLVER.WARMUP_METHOD", Fate.CARRIED if linear else Fate.CHANGED, "train.warmup_form: within", why
    )


def _take_swa(draft: Draft) -> None:
    """Averaged weights are a running mean here, from the first step on."""
    enabled = draft.flag("SOLVER.SWA.ENABLED")
    ema = _EMA_FOR_SWA if enabled else 0.0
    draft.set("train.ema", ema)
    ours, why = f"train.ema: {ema:g}", "a running mean of the weights, without a rate or steps of its own"
    draft.say("SOLVER.SWA.ENABLED", Fate.CHANGED if enabled else Fate.RENAMED, ours, why if enabled else "")
    keys = " ".join(
        f"SOLVER.SWA.{key}" for key in ("LR_FACTOR", "START_ITER", "MERGE_ITER", "BN_UPDATE_ITER")
    )
    draft.say_all(keys, Fate.NONE, why=why if enabled else "averaging is off")


def take_inference(draft: Draft, network: NetworkParams) -> None:
    """Take windows, blending and views, and validate with the same windows."""
    key = "MODEL.INPUT_SIZE" if draft.settings.get("INFERENCE.INPUT_SIZE") is None else "INFERENCE.INPUT_SIZE"
    theirs = draft.zyx(key)
    window = fitted(theirs, network)
    if key == "INFERENCE.INPUT_SIZE":
        take_size(draft, key, "infer.window_zyx", window)
    else:
        draft.set("infer.window_zyx", list(window))
        draft.say("INFERENCE.INPUT_SIZE", Fate.RENAMED, f"infer.window_zyx: {list(window)}", "as the patch")
    draft.say("INFERENCE.OUTPUT_SIZE", Fate.RENAMED, why="the same as the window, always")
    stride = _stride(draft, window)
    blending = draft.text("INFERENCE.BLENDING")
    if blending not in ("gaussian", "bump"):
        raise draft.wrong("INFERENCE.BLENDING", "must be gaussian or bump")
    draft.take("INFERENCE.BLENDING", "infer.blend", blending)
    overlap = round(min(0.75, max(0.0, 1 - max(s / w for s, w in zip(stride, window, strict=True)))), 3)
    draft.set("infer.overlap", overlap)
    draft.set("infer.fade", 0.0)
    batch = draft.whole("INFERENCE.SAMPLES_PER_BATCH", least=1)
    draft.take("INFERENCE.SAMPLES_PER_BATCH", "infer.batch_size", batch)
    draft.set("infer.precision", "auto")
    draft.set("infer.intensity", "training")
    _take_views(draft, window)
    draft.set(
        "train.validation",
        {"window_zyx": list(window), "overlap": 0.25, "fade": 0.0, "batch_size": batch, "precision": "auto"},
    )


def _stride(draft: Draft, window: Zyx) -> Zyx:
    theirs = draft.zyx("INFERENCE.STRIDE")
    z, y, x = (min(step, size) for step, size in zip(theirs, window, strict=True))
    fate = Fate.CARRIED if (z, y, x) == theirs else Fate.CHANGED
    why = "" if (z, y, x) == theirs else "no longer than the window"
    draft.take("INFERENCE.STRIDE", "infer.stride_zyx", [z, y, x], fate=fate, why=why)
    return z, y, x


def _take_views(draft: Draft, window: Zyx) -> None:
    number = draft.settings.get("INFERENCE.AUG_NUM")
    if number not in (None, 0, 1, 4, 8, 16):
        raise draft.wrong("INFERENCE.AUG_NUM", "must be None, 4, 8 or 16")
    views = int(number) if isinstance(number, int) and number else 1
    oblong = views >= 8 and window[1] != window[2]
    draft.take(
        "INFERENCE.AUG_NUM",
        "infer.views",
        4 if oblong else views,
        why="more views want a window that is square in plane" if oblong else "",
        fate=Fate.CHANGED if oblong else None,
    )
    mode = draft.text("INFERENCE.AUG_MODE")
    if mode not in ("mean", "min", "max"):
        raise draft.wrong("INFERENCE.AUG_MODE", "must be mean, min or max")
    draft.take("INFERENCE.AUG_MODE", "infer.merge", mode)


def take_decoding(draft: Draft, target: Target) -> None:
    """Decode as `polarity2instance` does by default; the config says nothing of it."""
    if target.kind != "pairs":
        return
    draft.set("evaluate.rule", "polarity")
    draft.set("evaluate.threshold", 0.5)
    draft.set("evaluate.polarity.exclusive", target.exclusive)
    draft.notes.append(
        "evaluate.rule: polarity decodes as polarity2instance does by default, but for ids, which do not "
        "wrap above 127 synapses; evaluate.rule: sites takes touching synapses apart"
    )


_ELSEWHERE = "of a network that is not here"

NO_PLACE = {
    "SYSTEM.NUM_GPUS": "an option of `synmlops train` and `infer`: --gpus",
    "SYSTEM.NUM_CPUS": "patches are read by threads; all cores are used",
    "SYSTEM.DISTRIBUTED SYSTEM.PARALLEL SYSTEM.DISTRIBUTED_BACKEND": "several GPUs always share each batch",
    "SYSTEM.DEBUG": "no debug mode",
    "MODEL.BACKBONE MODEL.DEPLOY_MODE MODEL.BLOCKS MODEL.KERNEL_SIZES MODEL.ATTENTION": _ELSEWHERE,
    "MODEL.SWIN_UNETR_FEATURE_SIZE MODEL.DEPTHS MODEL.SWIN_UNETR_NUM_HEADS MODEL.NORM_NAME": _ELSEWHERE,
    "MODEL.SWIN_UNETR_DROPOUT_RATE MODEL.ATTN_DROP_RATE MODEL.DROPOUT_PATH_RATE MODEL.NORMALIZE": _ELSEWHERE,
    "MODEL.USE_CHECKPOINT MODEL.SPATIAL_DIMS MODEL.DOWNSAMPLE MODEL.USE_V2 MODEL.POS_EMBED": _ELSEWHERE,
    "MODEL.UNETR_FEATURE_SIZE MODEL.HIDDEN_SIZE MODEL.MLP_DIM MODEL.UNETR_NUM_HEADS": _ELSEWHERE,
    "MODEL.CONV_BLOCK MODEL.RES_BLOCK MODEL.UNETR_DROPOUT_RATE": _ELSEWHERE,
    "MODEL.APE MODEL.DROP_PATH_RATE MODEL.DROP_RATE MODEL.EMBED_DIM MODEL.FROZEN_STAGES": _ELSEWHERE,
    "MODEL.MLP_RATIO MODEL.NUM_HEADS MODEL.OUT_INDICES MODEL.PATCH_NORM MODEL.PATCH_SIZE": _ELSEWHERE,
    "MODEL.QKV_BIAS MODEL.QK_SCALE MODEL.SWIN_ISOTROPY MODEL.USE_CONV MODEL.WINDOW_SIIE": _ELSEWHERE,
    "MODEL.DOWNSAMPLE_BEFORE MODEL.AUX_OUT": _ELSEWHERE,
    "MODEL.TARGET_OPT_MULTISEG_SPLIT": "labels have one channel here",
    "MODEL.LABEL_EROSION MODEL.LABEL_DILATION": "labels are taken as they are; change the files",
    "MODEL.EMBEDDING MODEL.HEAD_DEPTH": "v1 reads neither; networks of v0 are rebuilt without",
    "MODEL.PRE_MODEL MODEL.PRE_MODEL_ITER MODEL.PRE_MODEL_LAYER MODEL.PRE_MODEL_LAYER_SELECT": (
        "convert the weights with `synmlops import checkpoint`, then name them in train.start_from"
    ),
    "MODEL.FINETUNE MODEL.EXACT MODEL.SIZE_MATCH": (
        "weights must fit as a whole; see `synmlops import checkpoint`"
    ),
    "MODEL.RETURN_FEATS INFERENCE.MODEL_RETURN_FEATS": "networks give probabilities alone",
    "DATASET.SCALE_FACTOR": "for super-resolution, which is not here",
    "DATASET.LABEL_VAST DATASET.LABEL_MAG": "labels are taken as they are; convert the files",
    "DATASET.LABEL_BINARY": "label_kind union takes any value but 0 for synapse",
    "DATASET.LOAD_2D DATASET.DROP_CHANNEL DATASET.INPUT_CHANNELS_2D": "volumes are 3-D with one channel",
    "DATASET.REDUCE_LABEL": (
        "labels keep their ids: relabelling each crop swaps pre and post in part of the crops (its fault)"
    ),
    "DATASET.PAD_SIZE DATASET.PAD_MODE DATASET.VAL_PAD_SIZE INFERENCE.PAD_SIZE INFERENCE.UNPAD": (
        "nothing is padded: patches and windows reach the border, and the network pads by itself"
    ),
    "DATASET.ENSURE_MIN_SIZE": "a volume smaller than a patch is an error",
    "DATASET.DATA_CHUNK_NUM DATASET.DATA_CHUNK_IND DATASET.CHUNK_IND_SPLIT DATASET.DATA_CHUNK_STRIDE": (
        "volumes of any size are read by block; shares of a job: `synmlops infer --part`"
    ),
    "DATASET.DATA_CHUNK_ITER DATASET.DATA_COORD_RANGE": "patches come from the whole volumes; crop the files",
    "DATASET.DISTRIBUTED": "each process draws from all volumes",
    "DATASET.REJECT_SAMPLING.NUM_TRIAL": "drawing again costs a look-up, so there is no limit",
    "DATASET.REJECT_SAMPLING.AFTER_AUG": "counted before augmentation, over the patch",
    "DATASET.PRE_LOAD_DATA": "volumes are memory-mapped",
    "DATASET.DATA_INVALID_THRES": "name a mask and use sampling.min_trusted",
    "DATASET.OUTPUT_PATH INFERENCE.OUTPUT_PATH INFERENCE.OUTPUT_NAME": (
        "the stages write below models/ and data/; --out of the commands changes it"
    ),
    "AUGMENTOR.SMOOTH": "labels keep their outlines",
    "AUGMENTOR.ADDITIONAL_TARGETS_NAME AUGMENTOR.ADDITIONAL_TARGETS_TYPE": "labels and masks follow, always",
    "SOLVER.ITERATION_STEP": "v1 does not read it; see train.accumulate",
    "SOLVER.ITERATION_RESTART": "training goes on from its own checkpoints; train.start_from begins anew",
    "MONITOR.LOG_OPT MONITOR.VIS_OPT MONITOR.ITERATION_NUM": "runs are recorded in MLflow",
    "INFERENCE.TENSORSTORE_PATH": "name a Zarr, N5 or precomputed volume by its path or URL",
    "INFERENCE.DO_SINGLY INFERENCE.DO_SINGLY_START_INDEX INFERENCE.DO_SINGLY_STEP": (
        "volumes are predicted one by one, by block"
    ),
    "INFERENCE.TEST_ID INFERENCE.TEST_NUM": "shares of a job: `synmlops infer --part 3/64`",
    "INFERENCE.OUTPUT_ACT": "sigmoid, or softmax of an exclusive network, always",
    "INFERENCE.OUTPUT_SCALE": "probabilities have the voxels of the prepared image",
    "INFERENCE.DO_EVAL": "networks predict in evaluation mode, always",
    "INFERENCE.DO_3D INFERENCE.MODEL_OUTPUT_ID": "all is 3-D, and all known channels are written",
}
"""Keys without a counterpart, and why."""

PLACELESS = {key: why for keys, why in NO_PLACE.items() for key in keys.split()}
