"""params.yaml as typed, frozen models: the data, evaluation, and all sections together.

Every field of every section must stand in params.yaml: DVC compares files, so a default that stood in
code alone could change without any stage noticing. `load_params` names a missing key with its default.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from synmlops.explain import explain, missing_keys
from synmlops.learning_params import (
    AugmentParams,
    InferParams,
    LossParams,
    NetworkParams,
    SamplingParams,
    TrainParams,
    WindowParams,
)
from synmlops.section import (
    CHANNELS,
    SCALE,
    Fraction,
    IncompleteError,
    LabelKind,
    Nm,
    NonNegative,
    Positive,
    Precision,
    Section,
    Size,
    SynmlopsError,
    Zyx,
)

__all__ = [
    "CHANNELS",
    "SCALE",
    "AugmentParams",
    "DataParams",
    "EvaluateParams",
    "IncompleteError",
    "InferParams",
    "LabelKind",
    "LossParams",
    "NetworkParams",
    "Params",
    "PhantomParams",
    "PolarityParams",
    "Precision",
    "SamplingParams",
    "Section",
    "SplitParams",
    "SynmlopsError",
    "TrainParams",
    "VolumeSet",
    "WindowParams",
    "flatten",
    "load_params",
    "sections",
]


class PhantomParams(Section):
    """A phantom of EM tissue (see `synmlops.volumes.phantom`), made by prepare where this is set."""

    size_zyx: Zyx = (32, 384, 384)  # voxels of each volume
    voxel_nm: Nm = (40.0, 8.0, 8.0)
    train_seeds: Annotated[tuple[Size, ...], Field(min_length=1)] = (1, 2, 3, 4)
    validation_seeds: tuple[Size, ...] = (11,)
    test_seeds: tuple[Size, ...] = (21,)
    synapses_per_um3: Positive = 2.0
    polyadic: Fraction = 0.6  # share of the synapses with two to four posts
    lookalikes: NonNegative = 2.0  # per synapse: vesicles without density, density without vesicles ...
    noise: NonNegative = 1.0  # 1 is the default phantom, 2 doubles its noise
    jitter: NonNegative = 1.0  # the same for section-to-section jitter and contrast drift

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        seeds = [*self.train_seeds, *self.validation_seeds, *self.test_seeds]
        double = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if double:
            raise ValueError(
                f"data.phantom: seed {double[0]} stands more than once in train_seeds, validation_seeds and "
                "test_seeds, so the same tissue would come up twice; give each volume its own seed"
            )
        return self


class VolumeSet(BaseModel):
    """Volumes of one role. Each field is a list, or one string with `@` between the paths.

    A path may name its dataset: `a.h5::volumes/raw`. `label_kind` is one word for all, or one each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str | tuple[str, ...]
    label: str | tuple[str, ...] | None = None
    label_kind: LabelKind | tuple[LabelKind, ...] | None = None
    neurons: str | tuple[str, ...] | None = None  # segmentation: neuron id of each voxel
    mask: str | tuple[str, ...] | None = None  # non-zero where the label can be trusted
    partners: str | tuple[str, ...] | None = None  # true partner tables (Parquet)


class SplitParams(Section):
    """Cross-validation by region: the training volumes are cut into bands along one axis."""

    axis: Literal["z", "y", "x"] = "y"
    bands: Annotated[int, Field(ge=2)] = 4  # one fold per band, in which that band is the test region
    guard: Size = 64  # voxels left out of training on either side of a test band


class DataParams(Section):
    """Where the volumes come from: a phantom, or files for each role, or files and a split by region."""

    voxel_nm: Nm | None = None  # z y x; overrides what the files say
    grey: tuple[float, Positive] | None = None  # level and range taken for 0 and 1; null: mean and deviation
    pool_zyx: Zyx = (1, 1, 1)  # mean pooling of the image (and any-of pooling of labels) in prepare
    phantom: PhantomParams | None = None
    train: VolumeSet | None = None
    validation: VolumeSet | None = None
    test: VolumeSet | None = None
    split: SplitParams | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.phantom is None) == (self.train is None):
            raise ValueError("data: set either phantom or train (volume files), and the other to null")
        if self.phantom is not None and (self.validation or self.test or self.split):
            raise ValueError(
                "data: a phantom brings its own validation and test; set those and split to null"
            )
        if self.split is not None and (self.validation is not None or self.test is not None):
            raise ValueError("data: split takes its test regions from train; set validation and test to null")
        if self.train is not None and self.split is None and (self.validation is None or self.test is None):
            raise ValueError("data: give validation and test volumes, or a split that takes bands of train")
        return self


class PolarityParams(Section):
    """What the rule `polarity` reads beside `threshold`; see `synmlops.synapses.pytc_decoding`."""

    min_voxels: Size = 128  # a smaller object of one side is dropped
    dilate_yx: Annotated[int, Field(ge=1)] = 5  # side of the box by which the union grows before labelling
    exclusive: bool = False  # a voxel is what is likeliest: background, pre or post; no threshold
    semantic: bool = False  # 1 for pre and 2 for post instead of instances; `synmlops decode` alone
    scale_zyx: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)  # of the instances; the same

    @model_validator(mode="after")
    def _box_has_a_middle(self) -> Self:
        if self.dilate_yx % 2 == 0:
            raise ValueError(
                f"evaluate.polarity.dilate_yx: {self.dilate_yx} is even, so the box has no middle; use "
                f"{self.dilate_yx - 1} or {self.dilate_yx + 1}"
            )
        return self


class EvaluateParams(Section):
    """Decoding and scores."""

    threshold: Literal["auto"] | Fraction = "auto"  # auto: best on validation, by voxel F1
    rule: Literal["sites", "polarity"] = "sites"  # what decodes; polarity reads the section of this name
    min_voxels: Size = 600  # a smaller instance is dropped
    side_threshold: Fraction = 0.5  # share of the union threshold that a side must reach
    min_side_voxels: Size = 100  # a smaller post piece is no partner
    split: Literal["none", "pre", "watershed"] = "pre"  # how touching synapses are taken apart
    polarity: PolarityParams = PolarityParams()  # the rule of PyTorch Connectomics' polarity2instance
    iou: Fraction = 0.5  # two instances match from here
    centroid_nm: Positive = 200.0  # ... or, in the second count, within this distance
    radius_nm: Positive = 400.0  # a partner matches if both ends are within this distance


class Params(Section):
    """All of params.yaml."""

    seed: Size = 0
    data: DataParams
    network: NetworkParams = NetworkParams()
    sampling: SamplingParams = SamplingParams()
    augment: AugmentParams = AugmentParams()
    loss: LossParams = LossParams()
    train: TrainParams = TrainParams()
    infer: InferParams = InferParams()
    evaluate: EvaluateParams = EvaluateParams()

    @model_validator(mode="after")
    def _windows_fit_network(self) -> Self:
        pool = self.network.total_pool_zyx()
        windows = {
            "sampling.patch_zyx": self.sampling.patch_zyx,
            "infer.window_zyx": self.infer.window_zyx,
            "train.validation.window_zyx": self.train.validation.window_zyx,
        }
        problems = [
            f"{key}: {axis}={n} is not a multiple of {p}, "
            f"the total pooling along {axis}; next: {n + p - n % p}"
            for key, size in windows.items()
            for axis, n, p in zip("zyx", size, pool, strict=True)
            if not self.network.takes_size(n, p)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _reflections_fit_windows(self) -> Self:
        if self.network.padding != "reflect":
            return self
        sizes = {"sampling.patch_zyx": self.sampling.patch_zyx, "infer.window_zyx": self.infer.window_zyx}
        sizes["train.validation.window_zyx"] = self.train.validation.window_zyx
        for key, size in sizes.items():
            for axis, n, pool in zip("zyx", size, self.network.total_pool_zyx(), strict=True):
                if n < 2 * pool:
                    raise ValueError(
                        f"{key}: {axis}={n} leaves one voxel at the lowest level, with nothing to "
                        f"reflect; use {2 * pool} or more, or network.padding: replicate"
                    )
        return self

    @model_validator(mode="after")
    def _loss_fits_network(self) -> Self:
        if self.loss.cross_entropy and not self.network.exclusive:
            raise ValueError(
                "loss.cross_entropy: wants background, pre and post to exclude each other; set "
                "network.exclusive: true, or use loss.bce"
            )
        return self

    @model_validator(mode="after")
    def _decoding_fits_network(self) -> Self:
        if self.evaluate.rule == "polarity" and self.evaluate.polarity.exclusive > self.network.exclusive:
            raise ValueError(
                "evaluate.polarity.exclusive: takes the likeliest of background, pre and post, which only a "
                "network whose channels exclude each other tells; use false, or network.exclusive: true"
            )
        return self

    @model_validator(mode="after")
    def _early_stop_has_a_score(self) -> Self:
        if self.train.early_stop and self.data.split is not None:
            raise ValueError(
                f"train.early_stop: {self.train.early_stop}, but a cross-validation has no validation region "
                "to score; use 0 with data.split, or give data.validation"
            )
        return self

    @model_validator(mode="after")
    def _guard_spans_receptive_field(self) -> Self:
        split = self.data.split
        if split is None:
            return self
        field = self.network.receptive_field_zyx()["zyx".index(split.axis)]
        if split.guard < field:
            raise ValueError(
                f"data.split.guard: {split.guard} voxels along {split.axis} is narrower than the network's "
                f"receptive field, so training would see test tissue; use {field} or more"
            )
        return self


def load_params(path: Path, *, overrides: dict[str, Any] | None = None) -> Params:
    """Read params.yaml.

    Parameters
    ----------
    path : Path
        A YAML file in which every field stands.
    overrides : dict, optional
        Dotted key to value, set before validation: `{"data.voxel_nm": [40, 8, 8]}`.

    Raises
    ------
    SynmlopsError
        If the file is missing or no YAML. Every key that is unknown (with the nearest known one), missing
        (with its default) or has a value that does not fit is named in one message; the rules that span
        sections are looked at once each section is right by itself.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SynmlopsError(
            f"{path}: {error.strerror}; run in the project folder or give --params"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynmlopsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise SynmlopsError(f"{path}: holds no keys; start from the params.yaml of the project")
    for dotted, value in (overrides or {}).items():
        _set_dotted(tree, dotted, value)
    params, problems = None, []
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        problems = explain(Params, tree, error)
    hinted = {line.partition("did you mean ")[2].rstrip("?") for line in problems}
    for key, default in missing_keys(Params, tree, complete=Section):
        if key not in hinted:
            problems.append(f"{key} is missing; add it (default: {default})")
    if params is None or problems:
        listed = problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems", *problems])
        raise SynmlopsError(f"{path}: {listed}")
    return params


def flatten(tree: BaseModel | dict[str, Any]) -> dict[str, str | int | float | bool | None]:
    """Give nested params as dotted keys; a tuple becomes its JSON-like text.

    Examples
    --------
    >>> flatten(SplitParams())
    {'axis': 'y', 'bands': 4, 'guard': 64}
    """
    nested = tree.model_dump(mode="json") if isinstance(tree, BaseModel) else tree
    flat: dict[str, str | int | float | bool | None] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{below}": leaf for below, leaf in flatten(value).items()}
        else:
            flat[key] = str(value) if isinstance(value, list) else value
    return flat


def sections(params: Params, *names: str) -> dict[str, str | int | float | bool | None]:
    """Flatten some sections of params.yaml: what one stage depends on.

    Examples
    --------
    >>> sections(Params(data=DataParams(phantom=PhantomParams())), "seed", "loss")["loss.bce"]
    1.0
    """
    return flatten(params.model_dump(mode="json", include=set(names)))


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        below = tree.get(parent)
        if not isinstance(below, dict):
            below = tree[parent] = {}
        tree = below
    tree[leaf] = value
