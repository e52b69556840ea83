"""The infer stage: probabilities of the validation and test regions, or of any volume with any models."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from synmlops.layout import RUN_FILE, model_file, probabilities_file
from synmlops.learning.block_prediction import Source
from synmlops.learning.checkpoint import read_meta, save_model
from synmlops.learning.volume_prediction import Advance, Engine, predict_volume
from synmlops.params import IncompleteError, InferParams, Params, SynmlopsError, flatten, sections
from synmlops.progress import say
from synmlops.tracking.record import RunRecord
from synmlops.tracking.runs import StageRun
from synmlops.volumes.files import atomic_folder, sha256_of
from synmlops.volumes.labels import IMAGE_DTYPES, check_image
from synmlops.volumes.prepared import Box, box_within, read_manifest
from synmlops.volumes.resampled import Resampled
from synmlops.volumes.store import Grid, Volume, open_volume, split_joined

VALIDATED_ROLES = ("validation", "test")
METRICS_EVERY_S = 10.0
"""Seconds between two points of progress within a volume."""
SAME_VOXELS = 0.1
"""Voxel sizes that differ by less than this share are taken for the same."""


@dataclass(frozen=True)
class View:
    """How a volume is looked at: what of it, and at which voxel size.

    Attributes
    ----------
    voxel_nm : tuple of float, optional
        Voxel size of all volumes; by default what each file says.
    roi : Box, optional
        What of it is predicted, in its own voxels.
    mask : str, optional
        A volume, non-zero where probabilities are wanted.
    resample : bool
        Whether a volume of another voxel size than the model's is resampled to that on the fly.
    """

    voxel_nm: tuple[float, float, float] | None = None
    roi: Box | None = None
    mask: str | None = None
    resample: bool = False


def run(
    params: Params, *, prepared: Path, models: Path, out: Path, engine: Engine | None = None
) -> RunRecord:
    """Predict the validation and test regions of every fold into OUT.

    Parameters
    ----------
    params : Params
    prepared, models : Path
        What prepare and train wrote.
    out : Path
        Folder that appears when all is done: `FOLD/ROLE/REGION.h5` and `run.json`.
    engine : Engine, optional
        By default a process for each GPU, or this process.

    Returns
    -------
    record : RunRecord
        The run that was written into.
    """
    manifest, trained = read_manifest(prepared), RunRecord.read(models / RUN_FILE)
    files = [model_file(fold.name) for fold in manifest.folds]
    digests = {name: sha256_of(models / name) for name in files}
    with (
        StageRun.attach("infer", params=sections(params, "infer"), record=trained, data=digests) as run,
        atomic_folder(out) as folder,
    ):
        todo = [
            (fold.name, role, region)
            for fold in manifest.folds
            for role in VALIDATED_ROLES
            for region in getattr(fold, role)
        ]
        progress = _Progress(run, [region.box for *_, region in todo])
        for fold_name, role, region in todo:
            volume = manifest.volumes[region.volume]
            predict_volume(
                Source(f"{volume.path}::image", region.box, volume.grid),
                [models / model_file(fold_name)],
                folder / probabilities_file(fold_name, role, region.name),
                params=params.infer,
                engine=engine or Engine(),
                told=progress.told,
            )
            progress.end_volume()
        run.record.write(folder / RUN_FILE)
    say(run.notes)
    return run.record


def run_on_images(
    images: str,
    *,
    models: Sequence[str],
    out: Path,
    params: InferParams,
    engine: Engine | None = None,
    view: View | None = None,
    suffix: str | None = None,
    tracked: bool = False,
) -> list[Path]:
    """Predict any volumes with one model or several: OUT/NAME.h5 or .zarr for each.

    Parameters
    ----------
    images : str
        Volumes, joined with `@`.
    models : sequence of str
        Files of train or `models:/NAME@ALIAS` of the registry; their probabilities are merged.
    out : Path
    params : InferParams
    engine : Engine, optional
        By default a process for each GPU, or this process.
    view : View, optional
    suffix : str, optional
        `.h5` or `.zarr`; by default HDF5, or Zarr where several machines write.
    tracked : bool
        Whether this becomes a run in MLflow, with what was given, the models' digests, and progress.

    Returns
    -------
    written : list of Path
        The outputs that are whole now; one that waits for the other parts is not among them.

    Raises
    ------
    SynmlopsError
        If a volume cannot be read, its voxel size is unknown or not that of the model, two volumes would be
        written to one file, or an output is of something else.
    IncompleteError
        If blocks of a volume could not be read; all else is done.
    """
    engine, view = engine or Engine(), view or View()
    sources = split_joined(images)
    suffix = suffix or (".zarr" if engine.shared else ".h5")
    if engine.shared and suffix == ".h5":
        raise SynmlopsError("--format h5: several machines cannot write one HDF5 file; use --format zarr")
    outputs = [out / (_stem(source) + suffix) for source in sources]
    if len(set(outputs)) < len(outputs):
        raise SynmlopsError(
            f"--image {images}: two volumes of one name would be written to one file; rename one"
        )
    written, problems = [], []
    with ExitStack() as stack:
        files = [_local(model, stack) for model in models]
        model_nm = read_meta(files[0]).voxel_nm
        seen = [_source(image, view, model_nm=model_nm) for image in sources]
        run = stack.enter_context(_start_run(images, models, files, params)) if tracked else None
        progress = _Progress(run, [source.region for source in seen])
        for source, output in zip(seen, outputs, strict=True):
            try:
                if predict_volume(source, files, output, params=params, engine=engine, told=progress.told):
                    written.append(output)
            except IncompleteError as error:
                problems.append(str(error))
            progress.end_volume()
    if problems:
        raise IncompleteError("\n".join(problems))
    return written


class _Progress:
    """How far several volumes are, as metrics of a run: now and then, and at the end of each.

    Parameters
    ----------
    run : StageRun or None
        Without one nothing is logged.
    regions : sequence of Box
        All that will be predicted, in order.
    """

    def __init__(self, run: StageRun | None, regions: Sequence[Box]) -> None:
        self._run, self._began, self._step = run, time.monotonic(), 0
        self._later = [prod(region.shape_zyx) / 1e6 for region in regions]
        self._done, self._here, self._logged = 0.0, 0.0, 0.0

    def told(self, advance: Advance) -> None:
        """Take note of a block; what an earlier call did of the volume counts for nothing."""
        block = advance.megavoxels / advance.blocks
        self._here = min(advance.megavoxels, self._later[0])  # blocks at the border are smaller
        if time.monotonic() - self._logged >= METRICS_EVERY_S:
            self._log(left=block * (advance.of - advance.blocks))

    def end_volume(self) -> None:
        """Take note that the next volume begins."""
        self._log(left=0.0)
        self._later.pop(0)
        self._done, self._here = self._done + self._here, 0.0

    def _log(self, left: float) -> None:
        self._logged = time.monotonic()
        if self._run is None:
            return
        done = self._done + self._here
        rate = done / max(self._logged - self._began, 1e-9)
        self._step += 1
        values = {"infer_megavoxels": done, "infer_megavoxels_per_s": rate}
        if done:
            values["infer_seconds_left"] = (left + sum(self._later[1:])) / rate
        self._run.log_metrics(values, step=self._step)


def _start_run(images: str, models: Sequence[str], files: Sequence[Path], params: InferParams) -> StageRun:
    """Begin a run of its own for volumes that no pipeline prepared."""
    given = {"image": images, "model": "@".join(models)}
    digests = {f"model{n}" if n else "model": sha256_of(path) for n, path in enumerate(files)}
    return StageRun.start(
        stage="infer", params=flatten({"infer": params.model_dump(mode="json")}) | given, data=digests
    )


def _local(model: str, stack: ExitStack) -> Path:
    """Give a file of a model; one of the registry becomes a temporary one."""
    if not model.startswith("models:/"):
        return Path(model)
    from synmlops.serving.registry import load_registered  # MLflow is slow to import and rarely needed here

    loaded = load_registered(model, device="cpu")
    path = Path(stack.enter_context(TemporaryDirectory())) / "model.safetensors"
    save_model(path, loaded.network.state_dict(), loaded.meta)
    return path


def _stem(source: str) -> str:
    """Name the output of a volume.

    Examples
    --------
    >>> _stem("a/b.h5::raw"), _stem("https://host/data/em.zarr/0"), _stem("precomputed://gs://bucket/em/")
    ('b', 'em', 'em')
    """
    parts = [part for part in source.partition("::")[0].split("/") if part]
    named = [part for part in parts if Path(part).suffix in (".zarr", ".n5")]
    return Path((named or parts)[-1]).stem


def _source(image: str, view: View, *, model_nm: tuple[float, float, float]) -> Source:
    """Settle what of a volume is seen, and at which voxels."""
    with open_volume(image) as volume:
        if volume.dtype.name not in IMAGE_DTYPES:  # which is read through only to say what is wrong
            check_image(volume)
        grid = _known_grid(volume, view.voxel_nm)
        factors = _factors(volume.name, grid, model_nm, resample=view.resample)
        roi = box_within(view.roi, volume.shape, volume.name)
        shape = Resampled(volume, factors).shape
    starts = [int(at / factor) for at, factor in zip(roi.start_zyx, factors, strict=True)]
    stops = [
        min(n, max(start + 1, round(at / factor)))
        for start, at, factor, n in zip(starts, roi.stop_zyx, factors, shape, strict=True)
    ]
    return Source(
        _absolute(image),
        Box(_three(starts), _three(stops)),
        grid.pooled(factors),
        factors,
        view.mask and _absolute(view.mask),
    )


def _factors(
    name: str, grid: Grid, model_nm: tuple[float, float, float], *, resample: bool
) -> tuple[float, float, float]:
    """Give the voxel size that the model wants in voxels of the file."""
    z, y, x = (wanted / has for wanted, has in zip(model_nm, grid.voxel_nm, strict=True))
    if all(abs(factor - 1) <= SAME_VOXELS for factor in (z, y, x)):
        return 1.0, 1.0, 1.0
    if not resample:
        raise SynmlopsError(
            f"{name}: voxels of {grid.voxel_nm} nm, but the model was trained on {model_nm}; add --resample, "
            "or use a model for this voxel size"
        )
    return z, y, x


def _absolute(source: str) -> str:
    """Give a source as processes that start elsewhere find it."""
    return source if "://" in source else str(Path(source).absolute())


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = values
    return z, y, x


def _known_grid(volume: Volume, voxel_nm: tuple[float, float, float] | None) -> Grid:
    if voxel_nm is not None:
        return Grid(voxel_nm, volume.grid.offset_nm if volume.grid is not None else (0.0, 0.0, 0.0))
    if volume.grid is None:
        raise SynmlopsError(f"{volume.name}: does not say its voxel size; give --voxel-nm z,y,x")
    return volume.grid
