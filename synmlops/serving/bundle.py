"""What a registered model is made of: this package's code, pinned requirements, weights and settings."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

from synmlops.learning.checkpoint import load_model, save_model
from synmlops.params import InferParams
from synmlops.serving.pyfunc import SETTINGS, VOLUME, WEIGHTS
from synmlops.serving.sources import MODEL_CODE, copy_code, requirements
from synmlops.serving.wire import to_npy

WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Bundle:
    """A folder of what is handed to MLflow."""

    artifacts: dict[str, str]  # name -> file
    settings: dict[str, Any]  # how the network is used, operating point included
    script: Path  # what MLflow runs to get the model
    code: tuple[Path, ...]  # this package as far as serving needs it, and the user's own network
    requirements: tuple[str, ...]  # pins of what the code imports


def write_bundle(
    folder: Path,
    model_path: Path,
    *,
    infer: InferParams,
    operating_point: Mapping[str, Any] | None,
) -> Bundle:
    """Write weights, settings and code into an empty folder.

    The weights carry the operating point's threshold in their header, so that a program that reads nothing
    else decodes as `evaluate` did.

    Raises
    ------
    SynmlopsError
        If the model is missing or broken, or its network is the user's own and cannot come along.
    """
    model = load_model(model_path)
    meta = model.meta
    if operating_point is not None:
        meta = meta.model_copy(update={"threshold": operating_point["threshold"]})
    weights, settings = folder / WEIGHTS_FILE, folder / SETTINGS_FILE
    save_model(weights, model.network.state_dict(), meta)
    tree = {"infer": infer.model_dump(mode="json"), "operating_point": operating_point}
    settings.write_text(json.dumps(tree, indent=2) + "\n")
    script = Path(shutil.copy(MODEL_CODE, folder))
    artifacts = {WEIGHTS: str(weights), SETTINGS: str(settings)}
    name = meta.network.name
    return Bundle(
        artifacts,
        settings=tree,
        script=script,
        code=tuple(copy_code(folder / "code", name)),
        requirements=tuple(requirements(name)),
    )


def signature() -> ModelSignature:
    """Give the columns of request and answer."""
    number = DataType.double
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.binary, "probabilities"),
        ColSpec(Array(DataType.string), "channels"),
        ColSpec(DataType.long, "scale"),
        ColSpec(number, "threshold", required=False),
        ColSpec(Array(number), "voxel_nm"),
        ColSpec(DataType.string, "run_key"),
    ]
    return ModelSignature(inputs=Schema([ColSpec(DataType.binary, VOLUME)]), outputs=Schema(outputs))


def input_example() -> pd.DataFrame:
    """Give a request of one volume, small enough to read and to answer at once."""
    volume = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    return pd.DataFrame({VOLUME: [to_npy(volume)]})
