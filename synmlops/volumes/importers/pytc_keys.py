"""The keys of PyTorch Connectomics v0 and v1 configs, their defaults, and how older ones are spelled today.

Source: `connectomics/config/config.py` (v0) and `connectomics/config/defaults.py` (v1) in the history of
github.com/zudi-lin/pytorch_connectomics up to branch v1.0, commit 7ec3284.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from synmlops.section import SynmlopsError
from synmlops.volumes.importers.pytc_network import Tree, read_config


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(" ".join(lines).split())


_SKIPPABLE = _words(
    "ROTATE RESCALE FLIP ELASTIC GRAYSCALE MISSINGPARTS MISSINGSECTION MISALIGNMENT MOTIONBLUR CUTBLUR",
    "CUTNOISE COPYPASTE",
)

_KEYS = {
    "SYSTEM": "NUM_GPUS NUM_CPUS DISTRIBUTED PARALLEL DISTRIBUTED_BACKEND DEBUG",
    "MODEL": (
        "ARCHITECTURE BLOCK_TYPE BACKBONE DEPLOY_MODE FILTERS BLOCKS KERNEL_SIZES ATTENTION ISOTROPY "
        "TARGET_OPT TARGET_OPT_MULTISEG_SPLIT LABEL_EROSION LABEL_DILATION WEIGHT_OPT LOSS_OPTION OUTPUT_ACT "
        "LOSS_WEIGHT LOSS_KWARGS_KEY LOSS_KWARGS_VAL IN_PLANES OUT_PLANES PAD_MODE NORM_MODE ACT_MODE "
        "POOLING_LAYER MIXED_PRECESION EMBEDDING HEAD_DEPTH INPUT_SIZE OUTPUT_SIZE REGU_OPT REGU_TARGET "
        "REGU_WEIGHT FINETUNE EXACT SIZE_MATCH PRE_MODEL PRE_MODEL_LAYER PRE_MODEL_ITER RETURN_FEATS AUX_OUT "
        "SWIN_UNETR_FEATURE_SIZE DEPTHS SWIN_UNETR_NUM_HEADS NORM_NAME SWIN_UNETR_DROPOUT_RATE "
        "ATTN_DROP_RATE DROPOUT_PATH_RATE NORMALIZE USE_CHECKPOINT SPATIAL_DIMS DOWNSAMPLE USE_V2 "
        "UNETR_FEATURE_SIZE HIDDEN_SIZE MLP_DIM UNETR_NUM_HEADS POS_EMBED CONV_BLOCK RES_BLOCK "
        "UNETR_DROPOUT_RATE"
    ),
    "DATASET": (
        "DATA_SCALE IMAGE_SCALE LABEL_SCALE VALID_MASK_SCALE SCALE_FACTOR IMAGE_NAME LABEL_NAME "
        "VALID_MASK_NAME VAL_IMAGE_NAME VAL_LABEL_NAME VAL_VALID_MASK_NAME VAL_PAD_SIZE LABEL_VAST "
        "INPUT_PATH OUTPUT_PATH IS_ABSOLUTE_PATH IS_ISOTROPIC DO_2D LOAD_2D DROP_CHANNEL REDUCE_LABEL "
        "PAD_SIZE PAD_MODE ENSURE_MIN_SIZE NORMALIZE_RANGE LABEL_BINARY LABEL_MAG DO_CHUNK_TITLE "
        "DATA_CHUNK_NUM DATA_CHUNK_IND CHUNK_IND_SPLIT DATA_COORD_RANGE DATA_CHUNK_STRIDE DATA_CHUNK_ITER "
        "VALID_RATIO REJECT_SAMPLING.SIZE_THRES REJECT_SAMPLING.DIVERSITY REJECT_SAMPLING.P "
        "REJECT_SAMPLING.NUM_TRIAL MEAN STD MATCH_ACT DISTRIBUTED"
    ),
    "AUGMENTOR": (
        "ENABLED SMOOTH ADDITIONAL_TARGETS_NAME ADDITIONAL_TARGETS_TYPE ROTATE.ROT90 RESCALE.FIX_ASPECT "
        "FLIP.DO_ZTRANS ELASTIC.ALPHA ELASTIC.SIGMA MISSINGPARTS.ITER MISSINGSECTION.NUM_SECTION "
        "MISALIGNMENT.DISPLACEMENT MISALIGNMENT.ROTATE_RATIO MOTIONBLUR.SECTIONS MOTIONBLUR.KERNEL_SIZE "
        "CUTBLUR.LENGTH_RATIO CUTBLUR.DOWN_RATIO_MIN CUTBLUR.DOWN_RATIO_MAX CUTBLUR.DOWNSAMPLE_Z "
        "CUTNOISE.LENGTH_RATIO CUTNOISE.SCALE COPYPASTE.AUG_THRES "
        + " ".join(f"{name}.{key}" for name in _SKIPPABLE for key in ("ENABLED", "P", "SKIP"))
    ),
    "SOLVER": (
        "NAME LR_SCHEDULER_NAME ITERATION_STEP ITERATION_SAVE ITERATION_TOTAL ITERATION_VAL "
        "ITERATION_RESTART BASE_LR BIAS_LR_FACTOR WEIGHT_DECAY_BIAS MOMENTUM BETAS WEIGHT_DECAY "
        "WEIGHT_DECAY_NORM GAMMA STEPS WARMUP_FACTOR WARMUP_ITERS WARMUP_METHOD SAMPLES_PER_BATCH "
        "CLIP_GRADIENTS.ENABLED CLIP_GRADIENTS.CLIP_TYPE CLIP_GRADIENTS.CLIP_VALUE CLIP_GRADIENTS.NORM_TYPE "
        "SWA.ENABLED SWA.LR_FACTOR SWA.START_ITER SWA.MERGE_ITER SWA.BN_UPDATE_ITER"
    ),
    "MONITOR": "LOG_OPT VIS_OPT ITERATION_NUM",
    "INFERENCE": (
        "INPUT_SIZE OUTPUT_SIZE TENSORSTORE_PATH INPUT_PATH IMAGE_NAME OUTPUT_PATH OUTPUT_NAME "
        "IS_ABSOLUTE_PATH DO_CHUNK_TITLE DO_SINGLY DO_SINGLY_START_INDEX DO_SINGLY_STEP PAD_SIZE UNPAD "
        "OUTPUT_ACT STRIDE BLENDING AUG_MODE AUG_NUM DATA_SCALE OUTPUT_SCALE DO_EVAL TEST_NUM TEST_ID "
        "SAMPLES_PER_BATCH MODEL_RETURN_FEATS"
    ),
}

V1_KEYS = frozenset(f"{section}.{key}" for section, keys in _KEYS.items() for key in keys.split())
"""Every key of v1, with dots."""

ALIASES = {
    "MODEL.POOING_LAYER": "MODEL.POOLING_LAYER",
    "MODEL.BATCH_SIZE": "SOLVER.SAMPLES_PER_BATCH",
    "SOLVER.MILESTONES": "SOLVER.STEPS",
    "SOLVER.MAX_ITER": "SOLVER.ITERATION_TOTAL",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.ITERATION_SAVE",
    "DATASET.ISOTROPIC": "DATASET.IS_ISOTROPIC",
    "DATASET.NORMALIZE": "DATASET.NORMALIZE_RANGE",
    "DATASET.REJECT_SIZE_THRES": "DATASET.REJECT_SAMPLING.SIZE_THRES",
    "DATASET.REJSAMP_SIZE_THRES": "DATASET.REJECT_SAMPLING.SIZE_THRES",
    "DATASET.REJECT_P": "DATASET.REJECT_SAMPLING.P",
    "DATASET.REJSAMP_P": "DATASET.REJECT_SAMPLING.P",
    "DATASET.DATA_CHUNK_NUM_IND": "DATASET.DATA_CHUNK_IND",
    "DATASET.LABEL_EROSION": "MODEL.LABEL_EROSION",
    "DATASET.AUG_ZTRANS": "AUGMENTOR.FLIP.DO_ZTRANS",
    "INFERENCE.IN_PLANES": "MODEL.IN_PLANES",
    "INFERENCE.OUT_PLANES": "MODEL.OUT_PLANES",
    "AUGMENTOR.USE_COPY_PASTE": "AUGMENTOR.COPYPASTE.ENABLED",
    "AUGMENTOR.ELASTIC_ALPHA": "AUGMENTOR.ELASTIC.ALPHA",
    "AUGMENTOR.ELASTIC_SIGMA": "AUGMENTOR.ELASTIC.SIGMA",
    "AUGMENTOR.FLIP_DO_ZTRANS": "AUGMENTOR.FLIP.DO_ZTRANS",
    "AUGMENTOR.MISALIGNMENT_DISPLACEMENT": "AUGMENTOR.MISALIGNMENT.DISPLACEMENT",
    **{
        old: f"AUGMENTOR.{name}.{new}"
        for name in _SKIPPABLE
        for old, new in ((f"AUGMENTOR.{name}", "ENABLED"), (f"AUGMENTOR.{name}_P", "P"))
    },
}
"""Keys of older versions and what v1 calls them; the meaning is the same."""

_OLD_VALUES: dict[str, dict[Tree, Tree]] = {
    "MODEL.PAD_MODE": {"rep": "replicate"},
    "MODEL.ACT_MODE": {"leaky": "leaky_relu"},
}

_OLD_ALONE = _words(
    "MODEL.PRE_MODEL_LAYER_SELECT MODEL.APE MODEL.DROP_PATH_RATE MODEL.DROP_RATE MODEL.EMBED_DIM",
    "MODEL.FROZEN_STAGES MODEL.MLP_RATIO MODEL.NUM_HEADS MODEL.OUT_INDICES MODEL.PATCH_NORM MODEL.PATCH_SIZE",
    "MODEL.QKV_BIAS MODEL.QK_SCALE MODEL.SWIN_ISOTROPY MODEL.USE_CONV MODEL.WINDOW_SIIE",
    "MODEL.DOWNSAMPLE_BEFORE DATASET.DATA_INVALID_THRES DATASET.PRE_LOAD_DATA DATASET.INPUT_CHANNELS_2D",
    "DATASET.REJECT_SAMPLING.AFTER_AUG INFERENCE.DO_3D INFERENCE.MODEL_OUTPUT_ID",
)
"""Keys that only versions between v0 and v1 had."""

KNOWN_KEYS = V1_KEYS | set(ALIASES) | set(_OLD_ALONE)
"""Every key that a config of v0 or v1 may have."""

_MARKS_OF_V0 = _words(
    "DATASET.PRE_LOAD_DATA DATASET.DATA_INVALID_THRES DATASET.REJECT_SAMPLING.AFTER_AUG INFERENCE.DO_3D",
    "INFERENCE.MODEL_OUTPUT_ID MODEL.PRE_MODEL_LAYER_SELECT DATASET.DATA_CHUNK_NUM_IND",
)

_DEFAULTS: dict[str, Tree] = {  # of what the import reads
    "SYSTEM.NUM_GPUS": 4, "SYSTEM.DISTRIBUTED": False, "SYSTEM.PARALLEL": "DP",
    "MODEL.ARCHITECTURE": "unet_3d", "MODEL.FILTERS": [28, 36, 48, 64, 80], "MODEL.NORM_MODE": "bn",
    "MODEL.ACT_MODE": "elu", "MODEL.PAD_MODE": "replicate",
    "MODEL.TARGET_OPT": ["0"], "MODEL.WEIGHT_OPT": [["1"]], "MODEL.LOSS_OPTION": [["WeightedBCE"]],
    "MODEL.LOSS_WEIGHT": [[1.0]], "MODEL.LOSS_KWARGS_KEY": None, "MODEL.LOSS_KWARGS_VAL": None,
    "MODEL.REGU_OPT": None, "MODEL.REGU_TARGET": None, "MODEL.REGU_WEIGHT": None,
    "MODEL.IN_PLANES": 1, "MODEL.MIXED_PRECESION": False, "MODEL.INPUT_SIZE": [8, 256, 256],
    "MODEL.PRE_MODEL": "", "MODEL.LABEL_EROSION": None, "MODEL.LABEL_DILATION": None,
    "DATASET.DATA_SCALE": [1.0, 1.0, 1.0], "DATASET.IMAGE_NAME": None, "DATASET.LABEL_NAME": None,
    "DATASET.VALID_MASK_NAME": None, "DATASET.VAL_IMAGE_NAME": None, "DATASET.VAL_LABEL_NAME": None,
    "DATASET.VAL_VALID_MASK_NAME": None, "DATASET.INPUT_PATH": "path/to/input",
    "DATASET.IS_ABSOLUTE_PATH": False, "DATASET.IS_ISOTROPIC": False, "DATASET.DO_2D": False,
    "DATASET.DO_CHUNK_TITLE": 0, "DATASET.VALID_RATIO": 0.5, "DATASET.DISTRIBUTED": False,
    "DATASET.REJECT_SAMPLING.SIZE_THRES": -1, "DATASET.REJECT_SAMPLING.DIVERSITY": -1,
    "DATASET.REJECT_SAMPLING.P": 0.95, "DATASET.MEAN": 0.5, "DATASET.STD": 0.5, "DATASET.MATCH_ACT": "none",
    "AUGMENTOR.ENABLED": True,
    **{f"AUGMENTOR.{name}.ENABLED": name != "COPYPASTE" for name in _SKIPPABLE},
    "AUGMENTOR.ROTATE.ROT90": True, "AUGMENTOR.ROTATE.P": 1.0, "AUGMENTOR.RESCALE.P": 0.5,
    "AUGMENTOR.FLIP.P": 1.0, "AUGMENTOR.ELASTIC.P": 0.75, "AUGMENTOR.ELASTIC.ALPHA": 16.0,
    "AUGMENTOR.ELASTIC.SIGMA": 4.0, "AUGMENTOR.GRAYSCALE.P": 0.75, "AUGMENTOR.MISSINGPARTS.P": 0.9,
    "AUGMENTOR.MISSINGSECTION.P": 0.5, "AUGMENTOR.MISSINGSECTION.NUM_SECTION": 2,
    "AUGMENTOR.MISALIGNMENT.P": 0.5, "AUGMENTOR.MISALIGNMENT.DISPLACEMENT": 16,
    "AUGMENTOR.MISALIGNMENT.ROTATE_RATIO": 0.5, "AUGMENTOR.MOTIONBLUR.P": 0.5,
    "AUGMENTOR.MOTIONBLUR.SECTIONS": 2, "AUGMENTOR.MOTIONBLUR.KERNEL_SIZE": 11, "AUGMENTOR.CUTBLUR.P": 0.5,
    "AUGMENTOR.CUTBLUR.LENGTH_RATIO": 0.4, "AUGMENTOR.CUTBLUR.DOWN_RATIO_MAX": 8.0,
    "AUGMENTOR.CUTNOISE.P": 0.75, "AUGMENTOR.CUTNOISE.LENGTH_RATIO": 0.4, "AUGMENTOR.CUTNOISE.SCALE": 0.3,
    "AUGMENTOR.COPYPASTE.P": 0.8,
    "SOLVER.NAME": "SGD", "SOLVER.LR_SCHEDULER_NAME": "MultiStepLR", "SOLVER.ITERATION_SAVE": 5000,
    "SOLVER.ITERATION_TOTAL": 40000, "SOLVER.ITERATION_VAL": 5000, "SOLVER.BASE_LR": 0.001,
    "SOLVER.BIAS_LR_FACTOR": 1.0, "SOLVER.WEIGHT_DECAY_BIAS": 0.0, "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.MOMENTUM": 0.9, "SOLVER.BETAS": [0.9, 0.999], "SOLVER.WEIGHT_DECAY": 0.0001, "SOLVER.GAMMA": 0.1,
    "SOLVER.STEPS": [30000, 35000], "SOLVER.WARMUP_FACTOR": 0.001, "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.WARMUP_METHOD": "linear", "SOLVER.SAMPLES_PER_BATCH": 2, "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.SWA.ENABLED": False,
    "INFERENCE.INPUT_SIZE": None, "INFERENCE.INPUT_PATH": None, "INFERENCE.IMAGE_NAME": None,
    "INFERENCE.IS_ABSOLUTE_PATH": None, "INFERENCE.DO_CHUNK_TITLE": None, "INFERENCE.STRIDE": [4, 128, 128],
    "INFERENCE.BLENDING": "gaussian", "INFERENCE.AUG_MODE": "mean", "INFERENCE.AUG_NUM": None,
    "INFERENCE.SAMPLES_PER_BATCH": 4,
}  # fmt: skip

_DEFAULTS_OF_V0: dict[str, Tree] = {"AUGMENTOR.ROTATE.P": 0.5, "SOLVER.SAMPLES_PER_BATCH": 16}
"""Where v0 began with something else (commit 0054a77, branch v0.20)."""


@dataclass(frozen=True)
class Settings:
    """A config with every key known, by its name in v1, with dots.

    Attributes
    ----------
    source : str
        The file, or both, as the user named them.
    version : str
        "v0" or "v1".
    given : mapping
        What the files set.
    spelled : mapping
        How the files spell a key that v1 spells otherwise.
    """

    source: str
    version: str
    given: Mapping[str, Tree]
    spelled: Mapping[str, str]

    def get(self, key: str) -> Tree:
        """Give what the files set, else the version's default."""
        if key in self.given:
            return self.given[key]
        if self.version == "v0" and key in _DEFAULTS_OF_V0:
            return _DEFAULTS_OF_V0[key]
        return _DEFAULTS[key]

    def section(self, name: str) -> dict[str, Tree]:
        """Give what the files set in one section, by key."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.given.items() if key.startswith(start)}


def read_settings(path: Path, base: Path | None = None) -> Settings:
    """Read a config over its base and see to it that v0 or v1 knows every key.

    Raises
    ------
    SynmlopsError
        If a file cannot be read, is of another tool or version, or has keys that neither version knows: all
        are named, with the nearest known ones.
    """
    source = str(path) if base is None else f"{path} over {base}"
    for file in (path,) if base is None else (base, path):
        _refuse_newer(file)
    tree = read_config(path, base)
    if not tree:
        raise SynmlopsError(f"{source}: sets nothing; give a config with sections MODEL, DATASET, SOLVER ...")
    return settings_of(tree, source=source)


def _refuse_newer(path: Path) -> None:
    """Refuse a config of version 2, whose sections are in small letters, by its name."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return  # read_config says what is wrong
    if isinstance(tree, dict) and {"model", "data", "system", "defaults"} & set(tree):
        raise SynmlopsError(
            f"{path}: is a config of PyTorch Connectomics 2 (Hydra), which is not taken over; give one of v0 "
            "or v1, with sections MODEL, DATASET, SOLVER, INFERENCE"
        )


def settings_of(tree: Mapping[str, Mapping[str, Tree]], *, source: str) -> Settings:
    """Check the keys of a config that is a tree already; see `read_settings`.

    Examples
    --------
    >>> settings = settings_of({"MODEL": {"POOING_LAYER": True}}, source="a.yaml")
    >>> settings.given, settings.spelled, settings.version
    ({'MODEL.POOLING_LAYER': True}, {'MODEL.POOLING_LAYER': 'MODEL.POOING_LAYER'}, 'v1')
    """
    flat = dict(_flatten(tree))
    _refuse_unknown(flat, source)
    given: dict[str, Tree] = {}
    spelled: dict[str, str] = {}
    for written, value in flat.items():
        key = written if written in V1_KEYS else ALIASES.get(written, written)
        if key in given:
            raise SynmlopsError(
                f"{source}: {spelled.get(key, key)} and {written} are two names of one key; keep one of them"
            )
        if key != written:
            spelled[key] = written
        given[key] = _OLD_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    return Settings(source, _version_of(flat), given, spelled)


def _flatten(tree: Mapping[str, Tree] | Mapping[str, Mapping[str, Tree]], above: str = "") -> Iterator[
    tuple[str, Tree]
]:  # fmt: skip
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{above}{key}.")
        elif not isinstance(value, Mapping):
            yield f"{above}{key}", value


def _refuse_unknown(flat: Mapping[str, Tree], source: str) -> None:
    unknown = [key for key in flat if key not in KNOWN_KEYS]
    if not unknown:
        return
    if not any(key in KNOWN_KEYS for key in flat):
        raise SynmlopsError(
            f"{source}: is a config of another tool or version (it sets {unknown[0]}, and nothing that "
            "PyTorch Connectomics v0 or v1 knows); give one with sections MODEL, DATASET, SOLVER, INFERENCE"
        )
    named = [f"{key}{_hint(key)}" for key in unknown]
    keys = "a key" if len(unknown) == 1 else f"{len(unknown)} keys"
    raise SynmlopsError(
        f"{source}: has {keys} that PyTorch Connectomics v0 and v1 do not know: {', '.join(named)}; correct "
        "or remove what is not theirs"
    )


def _hint(key: str) -> str:
    near = difflib.get_close_matches(key, sorted(KNOWN_KEYS), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _version_of(flat: Mapping[str, Tree]) -> str:
    """Tell v0 by what only it has: networks, padding, one activation for all losses."""
    architecture = flat.get("MODEL.ARCHITECTURE")
    if isinstance(architecture, str):
        return "v0" if architecture.startswith("unet_residual") else "v1"
    is_v0 = (
        flat.get("MODEL.PAD_MODE") == "rep"
        or isinstance(flat.get("MODEL.OUTPUT_ACT"), str)
        or any(key in _MARKS_OF_V0 for key in flat)
    )
    return "v0" if is_v0 else "v1"
