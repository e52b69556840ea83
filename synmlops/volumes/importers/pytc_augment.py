"""The AUGMENTOR section of a PyTorch Connectomics config, in our `augment` params.

Source of what a key does there: `connectomics/data/augmentation` of branch v1.0. There, grey is 0 to 1; here
it counts in standard deviations of the image.
"""

import math
from typing import Any

from synmlops.section import Zyx
from synmlops.volumes.importers.pytc_draft import Draft, Fate, _short

GREY_DEVIATION = 0.2
"""What is taken for the standard deviation of grey from 0 to 1; of EM it is 0.15 to 0.25."""

_SMOOTHED = math.sqrt(1 / 3) / (2 * math.sqrt(math.pi))
"""Deviation of noise from -1 to 1 after a Gaussian filter in plane, times the filter's sigma."""

_GREY_SHIFT = 0.15  # half of its fixed brightness and contrast factors, 0.3
_GAMMA = 0.5  # its gamma is 0.5 to 2, ours 1 - g to 1 + g
_FACTOR = 1.25  # its rescaling, 0.8 to 1.25


def take_augmentation(draft: Draft, patch_zyx: Zyx) -> None:
    """Take chances and strengths of augmentation; what it has no word for is off."""
    on = draft.flag("AUGMENTOR.ENABLED")
    draft.say("AUGMENTOR.ENABLED", Fate.RENAMED, "augment" if on else "augment: every chance 0")
    _off(draft)
    chances = {name: _chance(draft, name, on=on) for name in _PARTS}
    _take_orientation(draft, chances)
    for name in ("RESCALE", "ELASTIC", "MISALIGNMENT"):
        _PARTS[name](draft, chances, patch_zyx)
    for name in ("GRAYSCALE", "MISSINGSECTION", "MOTIONBLUR", "CUTBLUR", "CUTNOISE", "COPYPASTE"):
        _PARTS[name](draft, chances, patch_zyx)
    for name in _PARTS:
        skipped = draft.settings.given.get(f"AUGMENTOR.{name}.SKIP")
        why = "nothing is skipped here" + (", image and labels follow geometry alike" if skipped else "")
        draft.say(f"AUGMENTOR.{name}.SKIP", Fate.CARRIED if skipped == [] else Fate.NONE, why=why)


def _off(draft: Draft) -> None:
    """Turn off all that it has no word for."""
    for name in ("blur", "defocus", "noise"):
        draft.set(f"augment.{name}.probability", 0.0)
    draft.set("augment.invert", 0.0)


def _chance(draft: Draft, name: str, *, on: bool) -> float:
    enabled = draft.flag(f"AUGMENTOR.{name}.ENABLED")
    chance = draft.share(f"AUGMENTOR.{name}.P")
    return chance if on and enabled else 0.0


def _set(draft: Draft, name: str, ours: str, value: Any, *, why: str, keys: str = "") -> None:
    """Set one of our augmentations, and say so of its chance and of what else it took."""
    if isinstance(value, dict):
        for key, below in value.items():
            draft.set(f"augment.{ours}.{key}", below)
    else:
        draft.set(f"augment.{ours}", value)
    fate = Fate.CHANGED if why else Fate.RENAMED
    for key in ("ENABLED", "P", *keys.split()):
        draft.say(f"AUGMENTOR.{name}.{key}", fate, f"augment.{ours}: {_short(value)}", why)


def _take_orientation(draft: Draft, chances: dict[str, float]) -> None:
    """Take flips and turns by 90 degrees together: ours are a flip of each axis, and a swap of y and x."""
    right_angles = draft.settings.get("AUGMENTOR.ROTATE.ROT90") is not False
    turn, flip = chances["ROTATE"] * right_angles, chances["FLIP"]
    swap = 0.5 * turn * (1 - 0.5 * flip) + 0.5 * flip * (1 - 0.5 * turn)
    _set(draft, "FLIP", "flip", 0.5 * flip, why="chance of each axis")
    draft.say("AUGMENTOR.FLIP.DO_ZTRANS", Fate.CHANGED, why="z is swapped too where voxels are isotropic")
    free = 0.0 if right_angles else chances["ROTATE"]
    draft.set("augment.quarter_turn", swap)
    draft.set("augment.rotate.probability", free)
    draft.set("augment.rotate.degrees", 180.0)
    ours = f"augment.quarter_turn: {swap:g}; augment.rotate.probability: {free:g}"
    why = "chance that y and x are swapped, by turns and by flips; without flips, some turns are mirrored"
    fate = Fate.RENAMED if flip == 1 else Fate.CHANGED
    for key in ("ENABLED", "P", "ROT90"):
        draft.say(f"AUGMENTOR.ROTATE.{key}", fate, ours, why)


def _take_scale(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    value = {"probability": chances["RESCALE"], "factor": _FACTOR}
    _set(
        draft, "RESCALE", "scale", value, why="y and x by one factor, always (FIX_ASPECT)", keys="FIX_ASPECT"
    )


def _take_elastic(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    sigma = draft.number("AUGMENTOR.ELASTIC.SIGMA", least=0.1)
    deviation = _SMOOTHED * draft.number("AUGMENTOR.ELASTIC.ALPHA", least=0) / sigma
    value = {
        "probability": chances["ELASTIC"],
        "displacement": round(deviation, 2),
        "spacing": max(4.0, 2 * sigma),
    }
    why = "of the same deviation: ALPHA is a strength before the filter there, ours is what is left of it"
    _set(draft, "ELASTIC", "elastic", value, why=why, keys="ALPHA SIGMA")


def _take_misalignment(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    shift = draft.whole("AUGMENTOR.MISALIGNMENT.DISPLACEMENT", least=0)
    room = max(1.0, (min(patch_zyx[1:]) - shift) / 2 * 1.42)
    turns = draft.share("AUGMENTOR.MISALIGNMENT.ROTATE_RATIO")
    degrees = 2 * math.degrees(math.asin(min(1.0, shift / 2 / room))) * turns
    value = {
        "probability": chances["MISALIGNMENT"],
        "shift": shift,
        "degrees": round(min(45.0, degrees), 2),
        "single": 0.5,
    }
    why = "shift and rotation come together here, the angle times ROTATE_RATIO"
    _set(draft, "MISALIGNMENT", "misalign", value, why=why, keys="DISPLACEMENT ROTATE_RATIO")


def _take_grey(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    value = {
        "probability": chances["GRAYSCALE"],
        "brightness": round(_GREY_SHIFT / GREY_DEVIATION, 3),
        "contrast": _GREY_SHIFT,
        "gamma": _GAMMA,
        "per_section": 0.0,
    }
    why = "its fixed strengths, in standard deviations and about the mean"
    _set(draft, "GRAYSCALE", "intensity", value, why=why)


def _take_missing(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    """Take lost sections and lost parts of sections, which are one thing here."""
    whole, part = chances["MISSINGSECTION"], chances["MISSINGPARTS"]
    sections = draft.whole("AUGMENTOR.MISSINGSECTION.NUM_SECTION", least=1)
    value = {
        "probability": round(1 - (1 - whole) * (1 - part), 4),
        "most": max(sections, patch_zyx[0] // 4) if part else sections,
        "partly": round(part / (whole + part), 4) if whole + part else 0.0,
    }
    why = "one chance for whole and partly lost sections, which are filled here, cut out or barred there"
    _set(draft, "MISSINGSECTION", "missing_section", value, why=why, keys="NUM_SECTION")
    _set(draft, "MISSINGPARTS", "missing_section", value, why=why, keys="ITER")


def _take_motion_blur(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    value = {
        "probability": chances["MOTIONBLUR"],
        "length": max(2, draft.whole("AUGMENTOR.MOTIONBLUR.KERNEL_SIZE", least=1)),
        "most": draft.whole("AUGMENTOR.MOTIONBLUR.SECTIONS", least=1),
    }
    why = "length and sections are the greatest here, and the direction is any"
    _set(draft, "MOTIONBLUR", "motion_blur", value, why=why, keys="KERNEL_SIZE SECTIONS")


def _take_cut_blur(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    value = {
        "probability": chances["CUTBLUR"],
        "share": draft.share("AUGMENTOR.CUTBLUR.LENGTH_RATIO"),
        "factor": max(2, round(draft.number("AUGMENTOR.CUTBLUR.DOWN_RATIO_MAX", least=1))),
    }
    why = "sizes are the greatest here; the least factor is 2, in plane"
    keys = "LENGTH_RATIO DOWN_RATIO_MIN DOWN_RATIO_MAX DOWNSAMPLE_Z"
    _set(draft, "CUTBLUR", "cut_blur", value, why=why, keys=keys)


def _take_cut_noise(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    scale = draft.number("AUGMENTOR.CUTNOISE.SCALE", least=0)
    value = {
        "probability": chances["CUTNOISE"],
        "share": draft.share("AUGMENTOR.CUTNOISE.LENGTH_RATIO"),
        "deviation": round(scale / math.sqrt(3) / GREY_DEVIATION, 3),
    }
    why = "normal noise in standard deviations of the image, not even noise in shares of the range"
    _set(draft, "CUTNOISE", "cut_noise", value, why=why, keys="LENGTH_RATIO SCALE")


def _take_copies(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    value = {"probability": chances["COPYPASTE"]}
    why = "synapses of elsewhere are pasted here, with their surroundings; those of the patch there"
    _set(draft, "COPYPASTE", "copy_paste", value, why=why, keys="AUG_THRES")


def _nothing(draft: Draft, chances: dict[str, float], patch_zyx: Zyx) -> None:
    """Taken together with another."""


_PARTS = {
    "ROTATE": _nothing,
    "FLIP": _nothing,
    "RESCALE": _take_scale,
    "ELASTIC": _take_elastic,
    "GRAYSCALE": _take_grey,
    "MISSINGPARTS": _nothing,
    "MISSINGSECTION": _take_missing,
    "MISALIGNMENT": _take_misalignment,
    "MOTIONBLUR": _take_motion_blur,
    "CUTBLUR": _take_cut_blur,
    "CUTNOISE": _take_cut_noise,
    "COPYPASTE": _take_copies,
}
