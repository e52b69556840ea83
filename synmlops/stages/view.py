"""The view command: volumes and partners in the browser, from files or a folder of decode or evaluate."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from synmlops.layout import probabilities_file
from synmlops.params import SynmlopsError
from synmlops.progress import say
from synmlops.view.scene import Nm, Sources, open_scene, start_of
from synmlops.volumes.hdf5 import list_datasets
from synmlops.volumes.prepared import Fold, Manifest, Region, read_manifest

INSTANCES = ("instances.h5", "instances.zarr")  # as decode names them


def run(
    sources: Sources,
    *,
    at_zyx: tuple[int, int, int] | None = None,
    site: int | None = None,
    bind: str = "127.0.0.1",
    port: int = 0,
    browser: bool = True,
) -> None:
    """Show volumes and partners in the browser until SIGINT or SIGTERM.

    Parameters
    ----------
    sources : Sources
    at_zyx : tuple of int, optional
        Voxel of the image to begin at.
    site : int, optional
        Site to begin at; by default that of the most confident partner.
    bind : str
        Address to listen on.
    port : int
        0 takes a free one.
    browser : bool
        Whether to open a browser where there is one.

    Raises
    ------
    SynmlopsError
        If neuroglancer is not installed, a file is missing, the files do not fit together, or the address or
        port cannot be had.
    """
    if find_spec("neuroglancer") is None:
        raise SynmlopsError(
            "the viewer needs neuroglancer, which is not installed; pip install 'synmlops[view]'"
        )
    with open_scene(sources) as scene:
        start = start_of(scene, at_zyx=at_zyx, site=site)
        from synmlops.view.layers import MOST_LINES, state_of
        from synmlops.view.server import is_local, open_browser, served, wait_for_end

        say(scene.notes)
        if scene.table is not None and len(scene.table) > MOST_LINES:
            say([f"of {len(scene.table)} partners, the {MOST_LINES} nearest to the start are drawn"])
        with served(state_of(scene, start), bind=bind, port=port) as url:
            if not is_local(bind):
                say(
                    [f"anybody who reaches {bind} and has this URL sees the data; its token is the only lock"]
                )

            def ready() -> None:
                print(f"start: voxel {','.join(map(str, start.zyx))} (z,y,x) of the image; {start.what}")
                print(f"{url}\nCtrl-C ends it", flush=True)
                if browser:
                    open_browser(url)

            wait_for_end(ready)


def sources_in(folder: Path, *, region: str | None, prepared: Path, predicted: Path) -> dict[str, Any]:
    """Find what there is to look at in the folder of decode or of evaluate, as fields of `Sources`.

    Parameters
    ----------
    folder : Path
    region : str, optional
        Of those that evaluate scored; by default the first.
    prepared, predicted : Path
        What prepare and infer wrote; of use for evaluate's folder alone. Probabilities need not be there.

    Raises
    ------
    SynmlopsError
        If the folder is of neither, lacks the region or any of the prepared data, or has instances twice.
    """
    if (folder / "instances").is_dir() and (folder / "operating_point.json").is_file():
        return _evaluated(folder, region, prepared, predicted)
    found = [folder / name for name in INSTANCES if (folder / name).exists()]
    if not found:
        raise SynmlopsError(
            f"{folder}: holds neither instances.h5 or instances.zarr, as decode writes, nor instances/ and "
            "operating_point.json, as evaluate does; name the files by --instances and --partners"
        )
    if region is not None:
        raise SynmlopsError(f"--region {region}: decode's folder {folder} has no regions; leave it out")
    if len(found) > 1:
        raise SynmlopsError(f"{folder}: holds {' and '.join(INSTANCES)}; name one by --instances")
    partners = folder / "partners.parquet"
    return {"instances": str(found[0]), "partners": partners if partners.exists() else None}


def sources_of(found: dict[str, Any], given: dict[str, Any], *, voxel_nm: Nm | None) -> Sources:
    """Put together what was found in a folder and what was given, which comes first.

    Raises
    ------
    SynmlopsError
        If there is no image.

    Examples
    --------
    >>> found = {"image": "a.h5", "instances": "b.h5"}
    >>> sources_of(found, {"image": None, "instances": "c.h5"}, voxel_nm=None).instances
    'c.h5'
    """
    chosen = found | {name: value for name, value in given.items() if value is not None}
    if "image" not in chosen:
        raise SynmlopsError("which image? Give --image em.h5; what decode writes does not say it")
    return replace(Sources(**chosen), voxel_nm=voxel_nm)


def _evaluated(folder: Path, name: str | None, prepared: Path, predicted: Path) -> dict[str, Any]:
    manifest = read_manifest(prepared)
    fold, region = _region(folder, manifest, name)
    volume = manifest.volumes[region.volume]
    partners = folder / "partners" / f"{region.name}.parquet"
    probabilities = predicted / probabilities_file(fold.name, "test", region.name)
    has_neurons = "neurons" in list_datasets(volume.path)
    return {
        "image": f"{volume.path}::image",
        "neurons": f"{volume.path}::neurons" if has_neurons else None,
        "instances": str(folder / "instances" / f"{region.name}.h5"),
        "partners": partners if partners.exists() else None,
        "probabilities": probabilities if probabilities.exists() else None,
        "threshold": _threshold(folder / "operating_point.json", fold.name),
    }


def _region(folder: Path, manifest: Manifest, name: str | None) -> tuple[Fold, Region]:
    regions = {
        region.name: (fold, region)
        for fold in manifest.folds
        for region in fold.test
        if (folder / "instances" / f"{region.name}.h5").exists()
    }
    if not regions:
        raise SynmlopsError(
            f"{folder}: holds the instances of no test region of the prepared data; --prepared names others"
        )
    if name is not None and name not in regions:
        raise SynmlopsError(f"--region {name}: {folder} has {', '.join(regions)}")
    return regions[name or next(iter(regions))]


def _threshold(path: Path, fold: str) -> float:
    try:
        return float(json.loads(path.read_text())[fold]["threshold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SynmlopsError(
            f"{path}: says no threshold for fold {fold} ({error}); run `synmlops evaluate`"
        ) from error
