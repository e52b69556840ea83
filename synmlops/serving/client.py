"""Ask a served model for probabilities over HTTP; needs neither MLflow nor torch."""

import base64
import json
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.serving.wire import from_npy, to_npy


@dataclass(frozen=True)
class Answer:
    """What a served model says of a volume."""

    probabilities: NDArray[np.uint8]  # c z y x
    channels: tuple[str, ...]  # names along c: those the model was trained on
    scale: int  # grey level of probability 1
    threshold: float | None  # the model's operating point, 0 to 1
    voxel_nm: tuple[float, float, float]  # of the volumes it was trained on, z y x
    run_key: str  # of the run that trained it


def predict_over_http(url: str, volume: NDArray[Any], *, timeout_s: float = 600.0) -> Answer:
    """Send a volume to a served model and read its answer.

    Parameters
    ----------
    url : str
        Where the server listens: `http://127.0.0.1:5001`, with or without `/invocations`.
    volume : (z, y, x) array of uint8 or uint16
        At the voxel size the model was trained on; smaller than a window is fine.
    timeout_s : float
        How long to wait; the server has a limit of its own (`mlflow models serve --timeout`).

    Raises
    ------
    SynmlopsError
        If nobody answers there, or the server refuses the volume; the message says why.
    ValueError
        If the volume is neither uint8 nor uint16.
    """
    row = {"volume": base64.b64encode(to_npy(volume)).decode()}
    body = json.dumps({"dataframe_records": [row]}).encode()
    address = f"{url.rstrip('/').removesuffix('/invocations')}/invocations"
    request = Request(address, data=body, headers={"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)["predictions"][0]
    except HTTPError as error:
        raise SynmlopsError(f"{url}: refused the volume ({error.code}): {_reason(error)}") from error
    except (URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise SynmlopsError(
            f"{url}: no answer ({reason}); is the model served there (`mlflow models serve`)?"
        ) from error
    return Answer(
        probabilities=from_npy(base64.b64decode(answer["probabilities"]), ndim=4),
        channels=tuple(answer["channels"]),
        scale=answer["scale"],
        threshold=answer["threshold"],
        voxel_nm=tuple(answer["voxel_nm"]),
        run_key=answer["run_key"],
    )


def _reason(error: HTTPError) -> str:
    """Give the message of MLflow's error, without the request it repeats."""
    text = error.read().decode(errors="replace")
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip() or str(error.reason)
    return message.rpartition("\nError: ")[2]
