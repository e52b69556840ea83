"""What a registered model is made of: this package's code, pinned requirements, weights and settings."""

import ast
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

import synmlops
from synmlops.learning.checkpoint import load_model, save_model
from synmlops.params import InferParams
from synmlops.serving.pyfunc import SETTINGS, VOLUME, WEIGHTS
from synmlops.serving.wire import to_npy

WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "settings.json"

_PACKAGE = Path(synmlops.__file__).parent
MODEL_CODE = _PACKAGE / "serving" / "model_code.py"


@dataclass(frozen=True)
class Bundle:
    """A folder of what is handed to MLflow."""

    artifacts: dict[str, str]  # name -> file
    settings: dict[str, Any]  # how the network is used, operating point included
    script: Path  # what MLflow runs to get the model
    code: Path  # the package, as far as serving needs it


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
        If the model is missing or broken.
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
    return Bundle(artifacts, settings=tree, script=script, code=copy_code(folder / "code"))


def copy_code(folder: Path) -> Path:
    """Copy the modules that serving imports to FOLDER/synmlops."""
    for path in code_files():
        target = folder / _PACKAGE.name / path.relative_to(_PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder / _PACKAGE.name


def code_files() -> list[Path]:
    """Give the files of this package that the served model imports, itself and through others."""
    found: set[Path] = set()
    waiting = [MODEL_CODE]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for name in imports_of(path) for file in _files_of(name)]
    return sorted(found - {MODEL_CODE})  # which MLflow copies itself


def imports_of(path: Path) -> set[str]:
    """Give the dotted names a file imports, at its top or inside of functions; `from a import b` gives a.b.

    Examples
    --------
    >>> sorted(imports_of(MODEL_CODE))
    ['mlflow.models.set_model', 'synmlops.serving.pyfunc.SynapseModel']
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # relative imports are not used in this package
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def requirements() -> list[str]:
    """Give a pin for each distribution that the code imports, at the version that is installed here.

    A build's local label (`+cpu`) is left out: the model runs on other builds too, and an index may not have
    this one.
    """
    modules = {name.partition(".")[0] for path in code_files() for name in imports_of(path)}
    providers = importlib.metadata.packages_distributions()
    pins = set()
    for module in modules - set(sys.stdlib_module_names) - {_PACKAGE.name}:
        names = providers.get(module, [])  # mlflow-skinny too provides `mlflow`
        for name in [module] if module in names else names:
            pins.add(f"{name.lower()}=={importlib.metadata.version(name).partition('+')[0]}")
    return sorted(pins)


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


def _files_of(name: str) -> list[Path]:
    """Give the files that importing a dotted name of this package runs; none if it is another's."""
    first, *rest = name.split(".")
    if first != _PACKAGE.name:
        return []
    files, place = [_PACKAGE / "__init__.py"], _PACKAGE
    for part in rest:
        module, package = place / f"{part}.py", place / part / "__init__.py"
        found = next((file for file in (package, module) if file.is_file()), None)
        if found is None:
            break  # a name inside the module
        files.append(found)
        place /= part
    return files
