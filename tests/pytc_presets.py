"""The settings behind examples/pytc, of files of PyTorch Connectomics; run this to write the presets anew."""

from pathlib import Path
from typing import Any

from synmlops.volumes.importers.pytc_config import Imported, params_of, write_params
from synmlops.volumes.importers.pytc_keys import settings_of

FOLDER = Path(__file__).parents[1] / "examples" / "pytc"
_V1 = "commit 7ec3284 (branch v1.0)"

Sections = dict[str, dict[str, Any]]

_JWR15: Sections = {
    "SYSTEM": {"NUM_GPUS": 2, "NUM_CPUS": 16},
    "MODEL": {
        "ARCHITECTURE": "unet_plus_3d",
        "BLOCK_TYPE": "residual_se",
        "INPUT_SIZE": [17, 257, 257],
        "OUTPUT_SIZE": [17, 257, 257],
        "IN_PLANES": 1,
        "OUT_PLANES": 3,
        "TARGET_OPT": ["1"],
        "NORM_MODE": "gn",
        "FILTERS": [32, 64, 96, 128, 192],
    },
    "DATASET": {
        "IMAGE_NAME": ["vol3/im_Yx2.h5", "vol4/im_Yx2.h5"],
        "LABEL_NAME": ["vol3/syn_Yx2.h5", "vol4/syn_Yx2.h5"],
        "INPUT_PATH": "datasets/JWR15/roi_8x8x3um/",
        "PAD_SIZE": [4, 48, 48],
        "DISTRIBUTED": True,
        "REJECT_SAMPLING": {"SIZE_THRES": 2000, "P": 0.95},
        "DATA_CHUNK_NUM": [20, 7, 8],
    },
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupCosineLR",
        "BASE_LR": 0.04,
        "ITERATION_STEP": 1,
        "ITERATION_SAVE": 5000,
        "ITERATION_TOTAL": 200000,
        "SAMPLES_PER_BATCH": 2,
    },
    "INFERENCE": {
        "INPUT_SIZE": [33, 257, 257],
        "OUTPUT_SIZE": [33, 257, 257],
        "OUTPUT_ACT": ["sigmoid"],
        "IS_ABSOLUTE_PATH": False,
        "DO_CHUNK_TITLE": 1,
        "INPUT_PATH": "datasets/JWR15/",
        "IMAGE_NAME": "jwr15.json",
        "PAD_SIZE": [8, 128, 128],
        "AUG_MODE": "mean",
        "AUG_NUM": None,
        "STRIDE": [16, 128, 128],
        "SAMPLES_PER_BATCH": 4,
    },
}
_BCE_DICE = {
    "LOSS_OPTION": [["WeightedBCEWithLogitsLoss", "DiceLoss"]],
    "LOSS_WEIGHT": [[1.0, 0.5]],
    "WEIGHT_OPT": [["1", "0"]],
    "OUTPUT_ACT": [["none", "sigmoid"]],
}
_PARTNERS: Sections = {
    "SYSTEM": {"NUM_GPUS": 4, "NUM_CPUS": 8},
    "MODEL": {
        "ARCHITECTURE": "unet_residual_3d",
        "INPUT_SIZE": [8, 256, 256],
        "OUTPUT_SIZE": [8, 256, 256],
        "IN_PLANES": 1,
        "OUT_PLANES": 3,
        "LOSS_OPTION": [["WeightedBCE", "DiceLoss"]],
        "LOSS_WEIGHT": [[1.0, 1.0]],
        "TARGET_OPT": ["1"],
        "WEIGHT_OPT": [["1", "0"]],
        "FILTERS": [32, 64, 128, 256, 256],
    },
    "DATASET": {
        "PAD_SIZE": [4, 128, 128],
        "REJECT_SAMPLING": {"SIZE_THRES": 1000, "P": 0.9},
    },
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "BASE_LR": 0.001,
        "ITERATION_STEP": 1,
        "ITERATION_SAVE": 5000,
        "ITERATION_TOTAL": 50000,
        "SAMPLES_PER_BATCH": 8,
        "STEPS": [45000, 47500],
    },
    "MONITOR": {"VIS_OPT": [1, 16]},
    "INFERENCE": {
        "AUG_MODE": "mean",
        "AUG_NUM": 4,
        "STRIDE": [4, 128, 128],
        "SAMPLES_PER_BATCH": 16,
        "INPUT_SIZE": [8, 256, 256],
        "OUTPUT_SIZE": [8, 256, 256],
        "PAD_SIZE": [4, 128, 128],
    },
}


def _over_jwr15(name: str, model: dict[str, Any], **others: dict[str, Any]) -> tuple[str, Sections]:
    tree = {section: keys | others.get(section, {}) for section, keys in _JWR15.items()}
    tree["MODEL"] = tree["MODEL"] | model
    return f"configs/JWR15/synapse/JWR15-Synapse-{name}.yaml over JWR15-Synapse-Base.yaml, {_V1},", tree


PRESETS: dict[str, tuple[str, Sections]] = {
    "jwr15_bce": _over_jwr15(
        "BCE",
        {
            "LOSS_OPTION": [["WeightedBCEWithLogitsLoss"]],
            "LOSS_WEIGHT": [[1.0]],
            "WEIGHT_OPT": [["1"]],
            "OUTPUT_ACT": [["none"]],
        },
    ),
    "jwr15_bce_dice": _over_jwr15("BCE-DICE", _BCE_DICE),
    "jwr15_bce_dice_overlap": _over_jwr15(
        "BCE-DICE-Regu",
        _BCE_DICE | {"REGU_OPT": ["Nonoverlap"], "REGU_TARGET": [[0]], "REGU_WEIGHT": [4.0]},
    ),
    "jwr15_exclusive_ce": _over_jwr15(
        "Semantic-CE",
        {
            "TARGET_OPT": ["1-1"],
            "LOSS_OPTION": [["WeightedCE"]],
            "LOSS_KWARGS_KEY": [[["class_weight"]]],
            "LOSS_KWARGS_VAL": [[[[1.0, 10.0, 10.0]]]],
            "LOSS_WEIGHT": [[1.0]],
            "WEIGHT_OPT": [["0"]],
            "OUTPUT_ACT": [["none"]],
        },
        INFERENCE={"OUTPUT_ACT": ["softmax"]},
    ),
    "synaptic_partner_segmentation": (
        "configs/Synaptic-Partner-Segmentation.yaml, commit ee7dd71,",
        _PARTNERS,
    ),
}
"""By name: where the settings come from, and the settings."""


def imported(name: str) -> Imported:
    """Give what the importer makes of a preset's settings."""
    source, tree = PRESETS[name]
    return params_of(settings_of(tree, source=source))


def preset_file(name: str) -> Path:
    """Name a preset's file."""
    return FOLDER / f"{name}.yaml"


if __name__ == "__main__":
    for each in PRESETS:
        write_params(imported(each), preset_file(each), force=True)
