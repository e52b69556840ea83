"""The parts of params.yaml that training and inference read."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from synmlops.network_params import NetworkParams
from synmlops.section import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Precision,
    Section,
    Share,
    Size,
    Zyx,
)

__all__ = [
    "AugmentParams",
    "Blur",
    "CopyPaste",
    "CutBlur",
    "CutNoise",
    "Elastic",
    "FreeRotation",
    "InferParams",
    "Intensity",
    "LossParams",
    "Misalignment",
    "MissingSection",
    "MotionBlur",
    "NetworkParams",
    "Noise",
    "SamplingParams",
    "Scaling",
    "TrainParams",
    "WindowParams",
]


class SamplingParams(Section):
    """Which patches training sees."""

    patch_zyx: Zyx = (16, 96, 96)  # voxels
    batch_size: Count = 4  # patches of one step, over all processes
    reject_below: Size = 300  # trusted foreground voxels; a poorer patch is rejected ...
    reject_probability: Fraction = 0.95  # ... this often
    min_synapses: Size = 0  # synapses whose middle lies in the patch; with fewer it counts as poor too
    min_trusted: Fraction = 0.0  # share of voxels that the mask trusts; a patch with less is never drawn
    centred: Fraction = 0.0  # share of patches centred on a synapse, all synapses alike; no rejection there
    volume_weights: dict[str, Positive] = Field(
        {}
    )  # prepared volume to how often its positions are drawn; others 1


class FreeRotation(Section):
    """Rotation in plane by any angle."""

    probability: Fraction = 0.0
    degrees: Annotated[float, Field(ge=0, le=180)] = 180.0  # greatest angle, either way


class Scaling(Section):
    """Zoom in plane, drawn evenly on a logarithmic scale."""

    probability: Fraction = 0.0
    factor: Annotated[float, Field(ge=1, le=2)] = 1.25  # greatest, in or out


class Elastic(Section):
    """Smooth deformation in plane, the same for all sections of a patch."""

    probability: Fraction = 0.0
    displacement: NonNegative = 6.0  # voxels; standard deviation at the control points
    spacing: Annotated[float, Field(ge=4)] = 32.0  # voxels between control points


class Misalignment(Section):
    """Every section from one onward, or one section alone, is shifted and rotated in plane."""

    probability: Fraction = 0.1
    shift: Size = 12  # greatest, in voxels
    degrees: Annotated[float, Field(ge=0, le=45)] = 0.0  # greatest
    single: Fraction = 0.0  # share of cases in which one section alone is out of place


class MissingSection(Section):
    """Sections lost whole or in part: filled with the mean, or dark."""

    probability: Fraction = 0.05
    most: Count = 1  # sections in a patch
    partly: Fraction = 0.0  # share of lost sections of which a part, cut off by a line, is left


class Intensity(Section):
    """Brightness, contrast and gamma of the whole patch; greatest changes, drawn evenly."""

    probability: Fraction = 0.5
    brightness: NonNegative = 0.25  # standard deviations of the image
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.25
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.25
    per_section: Fraction = 0.0  # share of cases in which each section draws its own


class Noise(Section):
    """Gaussian noise."""

    probability: Fraction = 0.3
    deviation: NonNegative = 0.5  # greatest, in standard deviations of the image


class Blur(Section):
    """Gaussian blur in plane: of the whole patch, or of a run of sections (defocus)."""

    probability: Fraction = 0.0
    sigma: Positive = 1.5  # greatest, in voxels


class MotionBlur(Section):
    """Smear of some sections along one direction."""

    probability: Fraction = 0.0
    length: Annotated[int, Field(ge=2)] = 9  # greatest, in voxels
    most: Count = 2  # sections in a patch


class CutNoise(Section):
    """Noise in a box."""

    probability: Fraction = 0.0
    share: Fraction = 0.4  # greatest side of the box as a share of the patch's
    deviation: NonNegative = 0.5  # greatest, in standard deviations of the image


class CutBlur(Section):
    """A box at lower resolution: averaged over blocks in plane."""

    probability: Fraction = 0.0
    share: Fraction = 0.4  # greatest side of the box as a share of the patch's
    factor: Annotated[int, Field(ge=2)] = 4  # greatest side of a block, in voxels


class CopyPaste(Section):
    """Synapses of other places pasted into the patch, with their surroundings."""

    probability: Fraction = 0.0
    most: Count = 2  # synapses in a patch


class AugmentParams(Section):
    """Chances and strengths of what happens to a patch; probability 0 turns a line off."""

    flip: Fraction = 0.5  # each of z, y, x
    quarter_turn: Fraction = (
        0.5  # swaps y and x, and with flips gives all turns; all axes if voxels are isotropic
    )
    rotate: FreeRotation = FreeRotation()
    scale: Scaling = Scaling()
    elastic: Elastic = Elastic()
    misalign: Misalignment = Misalignment()
    copy_paste: CopyPaste = CopyPaste()
    blur: Blur = Blur()
    defocus: Blur = Blur(probability=0.1)
    motion_blur: MotionBlur = MotionBlur()
    intensity: Intensity = Intensity()
    invert: Fraction = 0.0  # of the whole patch
    noise: Noise = Noise()
    cut_noise: CutNoise = CutNoise()
    cut_blur: CutBlur = CutBlur()
    missing_section: MissingSection = MissingSection()


class LossParams(Section):
    """The sum of these terms, by weight; each is masked by what the label knows."""

    bce: NonNegative = 1.0  # binary cross-entropy with foreground weighting
    dice: NonNegative = 0.5
    # channel: a ratio for each channel over all patches, of squared probabilities; sample: one for each patch
    # over its channels together, as PyTorch Connectomics has it
    dice_form: Literal["channel", "sample"] = "channel"
    focal: NonNegative = 0.0
    focal_gamma: NonNegative = 2.0
    tversky: NonNegative = 0.0
    tversky_weights: tuple[NonNegative, NonNegative] = (0.3, 0.7)  # of false positives and false negatives
    cross_entropy: NonNegative = (
        0.0  # over background, pre and post with foreground weighting; exclusive networks
    )
    overlap: NonNegative = 0.0  # penalty where pre and post are both likely
    coarse: Fraction = 0.5  # weight of each coarser level under deep supervision, against the level before it
    foreground_weight_clip: tuple[Share, Share] = (0.2, 0.8)  # of the foreground share
    # foreground of all channels among the known voxels of all channels, or of one: what PyTorch Connectomics
    # divides by without a mask, and with one
    foreground_share: Literal["planes", "voxels"] = "planes"
    foreground_margin: Size = 0  # voxels in plane about the foreground of bce that weigh as it does

    @model_validator(mode="after")
    def _something_to_descend(self) -> Self:
        if not any((self.bce, self.dice, self.focal, self.tversky, self.cross_entropy)):
            raise ValueError(
                "loss: bce, dice, focal, tversky and cross_entropy are all 0, so nothing would be learnt; "
                "set one of them"
            )
        low, high = self.foreground_weight_clip
        if low > high:
            raise ValueError(f"loss.foreground_weight_clip: {low} is more than {high}; swap the two")
        if self.tversky and not any(self.tversky_weights):
            raise ValueError("loss.tversky_weights: both are 0, so no mistake would count; use [0.3, 0.7]")
        return self

    @model_validator(mode="after")
    def _options_are_read(self) -> Self:
        if self.foreground_margin and not self.bce:
            raise ValueError(
                f"loss.foreground_margin: {self.foreground_margin} is read by bce alone, which is 0; "
                "use 0, or give bce a weight"
            )
        return self


class WindowParams(Section):
    """The windows in which a network sees a volume."""

    window_zyx: Zyx = (16, 256, 256)  # up to an eighth more where one window fewer then does
    overlap: Annotated[float, Field(ge=0, le=0.75)] = 0.25  # share of a window that is context alone
    fade: Fraction = 0.0  # share of that context in which neighbouring windows fade into each other
    batch_size: Count | Literal["auto"] = "auto"  # windows; auto: 1 on a CPU, as many as fill a GPU
    precision: Precision = "auto"


class InferParams(WindowParams):
    """Windows, and what is done with them."""

    views: Literal[1, 4, 8, 16] = 1  # of each window: turned by flips in plane, with quarter turns, and in z
    merge: Literal["mean", "min", "max"] = "mean"  # of the views' and the models' probabilities
    intensity: Literal["training", "volume"] = "training"  # whose grey levels are taken for 0 and 1
    blend: Literal["none", "gaussian", "bump"] = "none"  # weights with which overlapping windows add up
    stride_zyx: Zyx | None = None  # voxels from one blended window to the next; null: by overlap

    @model_validator(mode="after")
    def _blending_makes_sense(self) -> Self:
        if self.blend != "none" and self.fade:
            raise ValueError(
                f"infer.fade: {self.fade} and infer.blend: {self.blend} are two ways to join windows; use one"
            )
        if self.stride_zyx is None:
            return self
        if self.blend == "none":
            raise ValueError(
                f"infer.stride_zyx: {list(self.stride_zyx)} is read where windows are blended; "
                "use null and infer.overlap, or infer.blend: gaussian"
            )
        for axis, stride, window in zip("zyx", self.stride_zyx, self.window_zyx, strict=True):
            if stride > window:
                raise ValueError(
                    f"infer.stride_zyx: {axis}={stride} leaves gaps between windows of {window}; "
                    f"use {window} or less"
                )
        return self

    @model_validator(mode="after")
    def _views_fit_window(self) -> Self:
        _, y, x = self.window_zyx
        if self.views >= 8 and y != x:
            raise ValueError(
                f"infer.views: {self.views} turns windows by 90 degrees, but infer.window_zyx is {y} x {x} "
                "in plane; use a square one, or infer.views: 4"
            )
        return self


class TrainParams(Section):
    """The optimisation."""

    start_from: str | None = None  # model file whose weights training begins with; null: random ones
    steps: Count = 2200
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Positive = 0.007
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of sgd
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "multistep", "poly", "constant"] = "cosine"  # after the warm-up
    milestones: tuple[Count, ...] = ()  # steps from which multistep goes down ...
    milestone_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # ... by this factor each time
    poly_power: Positive = 0.9
    warmup_steps: Size = 80
    warmup_from: Fraction = 0.0  # share of the learning rate that the warm-up begins with
    # before: the schedule begins after the warm-up; within: they begin together and multiply, steps counted
    # from 0, as in Detectron2 and PyTorch Connectomics
    warmup_form: Literal["before", "within"] = "before"
    gradient_clip: Positive = 1.0  # greatest norm
    accumulate: Count = 1  # parts that a process takes its share of the batch in, for less memory
    ema: Annotated[float, Field(ge=0, lt=1)] = (
        0.99  # decay of the averaged weights, which are validated and exported
    )
    validate_every: Count = 440  # steps
    early_stop: Size = 0  # validations in a row without a better score that end training; 0: never
    validation: WindowParams = WindowParams()  # apart from infer's own, so that changing that trains nothing
    checkpoint_every: Count = 100  # steps
    precision: Precision = "auto"  # bf16 where the device is fast in it

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError(
                f"train.milestones: multistep needs some; use [{self.steps * 2 // 3}], "
                "or another train.schedule"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"train.milestones: {list(self.milestones)} must rise")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps: {self.warmup_steps} are more than all {self.steps} steps; use "
                f"{self.steps // 10} or less"
            )
        return self
