"""The scores of an evaluation as a table for the terminal."""

import json
from pathlib import Path

from synmlops.params import SynmlopsError


def score_table(folder: Path) -> str:
    """Give the main scores of an evaluation as an aligned text table.

    Raises
    ------
    SynmlopsError
        If there is no evaluation.
    """
    path = folder / "metrics.json"
    try:
        metrics: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"{path}: cannot be read ({error}); run `synmlops evaluate` or `dvc checkout`"
        ) from error
    names = {
        "voxel_union": "union voxels",
        "voxel_pre": "pre voxels",
        "voxel_post": "post voxels",
        "detection": "synapses (IoU)",
        "detection_centroid": "synapses (centroid)",
        "partner": "partners",
        "partner_neurons": "partners, same neurons",
    }
    rows = [f"{'':24}{'F1':>8}{'precision':>11}{'recall':>8}"]
    for key, title in names.items():
        if f"{key}_f1" in metrics:
            f1, precision, recall = (metrics[f"{key}_{part}"] for part in ("f1", "precision", "recall"))
            rows.append(f"{title:24}{f1:8.3f}{precision:11.3f}{recall:8.3f}")
    if "direction_accuracy" in metrics:
        rows.append(f"{'direction accuracy':24}{metrics['direction_accuracy']:8.3f}")
    rows.append(f"{'threshold':24}{metrics['threshold']:8.3f}")
    return "\n".join(rows)
