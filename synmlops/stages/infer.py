"""The infer stage: probabilities of the validation and test regions, or of any volume with any model."""

from pathlib import Path
from typing import Any

import numpy as np

from synmlops.layout import RUN_FILE, model_file, probabilities_file
from synmlops.learning.checkpoint import Model, load_model
from synmlops.learning.distributed import pick_device
from synmlops.learning.predict import Image, predict
from synmlops.params import CHANNELS, InferParams, Params, SynmlopsError, sections
from synmlops.progress import say, track
from synmlops.tracking.record import RunRecord
from synmlops.tracking.runs import StageRun
from synmlops.volumes.files import atomic_folder, sha256_of
from synmlops.volumes.labels import IMAGE_DTYPES, check_image
from synmlops.volumes.prepared import Box, PreparedVolume, Region, read_manifest
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, open_volume, split_joined

VALIDATED_ROLES = ("validation", "test")


def run(params: Params, *, prepared: Path, models: Path, out: Path, gpus: int | None = None) -> RunRecord:
    """Predict the validation and test regions of every fold into OUT.

    Parameters
    ----------
    params : Params
    prepared, models : Path
        What prepare and train wrote.
    out : Path
        Folder that appears when all is done: `FOLD/ROLE/REGION.h5` and `run.json`.
    gpus : int, optional
        0 computes on the CPU. By default a GPU is used where there is one.

    Returns
    -------
    record : RunRecord
        The run that was written into.
    """
    manifest, trained = read_manifest(prepared), RunRecord.read(models / RUN_FILE)
    device = pick_device(gpus)
    files = [model_file(fold.name) for fold in manifest.folds]
    digests = {name: sha256_of(models / name) for name in files}
    with (
        StageRun.attach("infer", params=sections(params, "infer"), record=trained, data=digests) as run,
        atomic_folder(out) as folder,
    ):
        voxels = 0
        for fold in manifest.folds:
            model = load_model(models / model_file(fold.name), device=device)
            for role in VALIDATED_ROLES:
                for region in getattr(fold, role):
                    volume = manifest.volumes[region.volume]
                    predict_region(
                        model,
                        volume,
                        region,
                        folder / probabilities_file(fold.name, role, region.name),
                        params=params.infer,
                    )
                    voxels += int(np.prod(region.box.shape_zyx))
        run.log_metrics({"infer_voxels": float(voxels)}, step=0)
        run.record.write(folder / RUN_FILE)
    say(run.notes)
    return run.record


def run_on_images(
    images: str,
    *,
    model: str,
    out: Path,
    params: InferParams,
    gpus: int | None = None,
    voxel_nm: tuple[float, float, float] | None = None,
) -> list[Path]:
    """Predict any volumes with a model: OUT/STEM.h5 for each, a file of probabilities.

    Parameters
    ----------
    images : str
        Volumes, joined with `@`.
    model : str
        A file of train, or `models:/NAME@ALIAS` of the registry.
    out : Path
    params : InferParams
    gpus : int, optional
    voxel_nm : tuple of float, optional
        Voxel size of all volumes; by default what each file says.

    Raises
    ------
    SynmlopsError
        If a volume cannot be read, its voxel size is unknown or not that of the model, or two volumes would
        be written to one file.
    """
    sources = split_joined(images)
    stems = [Path(source.partition("::")[0]).stem for source in sources]
    if len(set(stems)) < len(stems):
        raise SynmlopsError(
            f"--image {images}: two volumes of one name would be written to one file; rename one"
        )
    loaded = _load(model, pick_device(gpus))
    written = []
    for source, stem in zip(sources, stems, strict=True):
        with open_volume(source) as image:
            if image.dtype.name not in IMAGE_DTYPES:  # which is read through only to say what is wrong
                check_image(image)
            grid = _known_grid(image.grid, image.name, voxel_nm, loaded)
            write_probabilities(loaded, image, out / f"{stem}.h5", grid=grid, params=params)
            written.append(out / f"{stem}.h5")
    return written


def _load(model: str, device: Any) -> Model:
    if not model.startswith("models:/"):
        return load_model(Path(model), device=device)
    from synmlops.serving.registry import load_registered  # MLflow is slow to import and rarely needed here

    return load_registered(model, device=device)


def predict_region(
    model: Model,
    volume: PreparedVolume,
    region: Region,
    path: Path,
    *,
    params: InferParams,
) -> None:
    """Predict a region with the context that the volume has around it, and write the region alone."""
    reach = tuple(n // 2 for n in model.meta.network.receptive_field_zyx())
    context = _grown(region.box, reach, volume.shape_zyx)
    inner = region.box.moved(-start for start in context.start_zyx).slices
    write_probabilities(
        model,
        volume.image[context.slices],
        path,
        grid=volume.grid.cropped(region.box.start_zyx),
        params=params,
        inner=inner,
    )


def write_probabilities(
    model: Model,
    image: Image,
    path: Path,
    *,
    grid: Grid,
    params: InferParams,
    inner: tuple[slice, slice, slice] | None = None,
) -> None:
    """Predict an image slab by slab into a file of probabilities.

    Only the channels that the model was trained on are written. Where `inner` is given, that region alone.
    """
    z_span, y_span, x_span = inner or tuple(slice(0, n) for n in image.shape)
    shape = (z_span.stop - z_span.start, y_span.stop - y_span.start, x_span.stop - x_span.start)
    kept = [CHANNELS.index(name) for name in model.meta.channels]
    with (
        probabilities_writer(path, shape, channels=model.meta.channels, grid=grid) as out,
        track(f"infer {path.stem}", image.shape[0]) as report,
    ):
        for z, slab in predict(model, image, params=params):
            low, high = max(z, z_span.start), min(z + slab.shape[1], z_span.stop)
            if low < high:
                piece = slab[kept, low - z : high - z, y_span, x_span]
                out[:, low - z_span.start : high - z_span.start] = piece
            report(min(z + slab.shape[1], image.shape[0]), "sections")


def _grown(box: Box, reach: tuple[int, ...], shape: tuple[int, int, int]) -> Box:
    starts = [max(0, start - r) for start, r in zip(box.start_zyx, reach, strict=True)]
    stops = [min(n, stop + r) for stop, r, n in zip(box.stop_zyx, reach, shape, strict=True)]
    return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))


def _known_grid(
    grid: Grid | None, name: str, voxel_nm: tuple[float, float, float] | None, model: Model
) -> Grid:
    if voxel_nm is not None:
        grid = Grid(voxel_nm, grid.offset_nm if grid is not None else (0.0, 0.0, 0.0))
    if grid is None:
        raise SynmlopsError(f"{name}: does not say its voxel size; give --voxel-nm z,y,x")
    if not np.allclose(grid.voxel_nm, model.meta.voxel_nm, rtol=0.1):
        raise SynmlopsError(
            f"{name}: voxels of {grid.voxel_nm} nm, but the model was trained on {model.meta.voxel_nm}; "
            "resample the image, or use a model for this voxel size"
        )
    return grid
