"""The model as MLflow serves it: a table of volumes in, a table of probabilities out.

One row is one volume. The column `volume` holds the bytes of a `.npy` file, (z, y, x) uint8 or uint16; in
JSON bytes are base64. The answer has the columns of `ANSWER`; its `probabilities` are those that
`synmlops infer` writes for the same volume, byte for byte on the same kind of device.

This file and what it imports travel with a registered model (see `bundle`), so it imports nothing that
serving does not need.
"""

import base64
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel, PythonModelContext  # type: ignore[attr-defined]
from numpy.typing import NDArray

from synmlops.learning.checkpoint import Model, load_model
from synmlops.learning.predict import predict
from synmlops.params import SCALE, InferParams
from synmlops.serving.wire import from_npy, to_npy

WEIGHTS, SETTINGS = "weights", "settings"
"""The artifacts of a registered model, by name."""

VOLUME = "volume"
"""The only column of a request."""

ANSWER = ("probabilities", "channels", "scale", "threshold", "voxel_nm", "run_key")
"""The columns of an answer: c z y x bytes of a .npy file, the names along c, the grey level of probability 1,
the operating point (0 to 1, or null), the voxel size of the training data (z y x) and the run's key."""

_TIMEOUT = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"  # seconds; `mlflow models serve` sets it for its server
_TRIAL = 0.1  # of the timeout; first windows are slower than the rest, so no forecast is made before


class SynapseModel(PythonModel):
    """Predicts volumes, one at a time, on the GPU if there is one."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read weights and settings once, when the server starts."""
        settings = json.loads(Path(context.artifacts[SETTINGS]).read_text())
        self._infer = InferParams.model_validate(settings["infer"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Model = load_model(Path(context.artifacts[WEIGHTS]), device=device)
        self._one_at_a_time = Lock()  # the server has many threads, the device room for one volume

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer a request; there are no `params`.

        Raises
        ------
        MlflowException
            Status 400 if a volume cannot be read or would take longer than the server waits, 503 if others
            before it take that long.
        """
        images = [_image_of(value, row) for row, value in enumerate(model_input[VOLUME])]
        clock = _Clock(sum(image.size for image in images), _limit_s())
        if not self._one_at_a_time.acquire(timeout=-1 if clock.limit_s is None else clock.limit_s):
            raise MlflowException(
                f"the server was busy with other volumes for {clock.limit_s:g} s; send this one again later",
                error_code=TEMPORARILY_UNAVAILABLE,
            )
        try:
            rows = [self._answer(image, clock) for image in images]
        finally:
            self._one_at_a_time.release()
        return pd.DataFrame(rows, columns=list(ANSWER), dtype=object)

    def _answer(self, image: NDArray[Any], clock: "_Clock") -> dict[str, Any]:
        meta = self._model.meta
        slabs = predict(
            self._model,
            image,
            params=self._infer,
            progress=clock.progress_of(image),
        )
        try:
            probabilities = np.concatenate([slab for _, slab in slabs], axis=1)
        except torch.OutOfMemoryError as error:
            raise _refusal(
                f"{_size(image)} voxels do not fit the GPU's memory; send a smaller one"
            ) from error
        clock.voxels_done += image.size
        return {
            "probabilities": to_npy(probabilities),
            "channels": list(meta.channels),
            "scale": SCALE,
            "threshold": meta.threshold,
            "voxel_nm": list(meta.voxel_nm),
            "run_key": meta.run_key,
        }


@dataclass
class _Clock:
    """Tells early that a request will take longer than the server waits for its answer."""

    voxels: int
    limit_s: float | None
    started: float = field(default_factory=time.monotonic)
    voxels_done: int = 0

    def progress_of(self, image: NDArray[Any]) -> Callable[[int, int], None]:
        """Give the callback for one volume of the request; it raises as soon as time will not do."""

        def progress(done: int, total: int) -> None:
            elapsed = time.monotonic() - self.started
            if self.limit_s is None or elapsed < _TRIAL * self.limit_s:
                return
            expected = elapsed * self.voxels / (self.voxels_done + image.size * done / total)
            if expected > self.limit_s:
                raise _refusal(
                    f"{self.voxels} voxels would take about {expected:.0f} s and this server answers within "
                    f"{self.limit_s:g} s; send smaller volumes, or serve with a longer --timeout"
                )

        return progress


def _limit_s() -> float | None:
    """Seconds this server waits for an answer; None outside of a server."""
    text = os.environ.get(_TIMEOUT)
    return float(text) if text else None


def _image_of(value: Any, row: int) -> NDArray[Any]:
    """Read the volume of a row; text (from CSV) is base64, as in JSON."""
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) else value
        if not isinstance(raw, bytes | bytearray):
            raise ValueError(f"it is {type(raw).__name__}, not the bytes of a .npy file")
        return from_npy(bytes(raw), ndim=3)
    except ValueError as error:  # binascii.Error is one
        raise _refusal(f"row {row}, column {VOLUME}: {error}") from error


def _refusal(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def _size(image: NDArray[Any]) -> str:
    return " x ".join(map(str, image.shape))
