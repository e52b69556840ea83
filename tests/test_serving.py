"""A registered model: what is in it, what it answers, and that it needs no repository and no pickle."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from synmlops.learning.checkpoint import ModelMeta, load_model, read_meta, save_model
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import predict_array
from synmlops.params import InferParams, NetworkParams, SynmlopsError
from synmlops.serving.client import predict_over_http
from synmlops.serving.registry import RegisteredVersion, load_registered, register, register_file
from synmlops.serving.wire import from_npy, to_npy
from synmlops.tracking.record import RunRecord
from synmlops.tracking.store import KEY_TAG, prepare_mlflow

prepare_mlflow()
from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.pyfunc import PythonModelContext  # type: ignore[attr-defined]  # noqa: E402

from synmlops.serving import bundle  # noqa: E402
from synmlops.serving.pyfunc import SynapseModel  # noqa: E402

KEY = "0f" * 16
INFER = InferParams(window_zyx=(8, 32, 32), overlap=0.25, batch_size=2, precision="float32")
TRAINED = ("post", "union")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".bin")


def a_volume(shape: tuple[int, ...] = (9, 45, 51), dtype: type = np.uint8) -> NDArray[Any]:
    """Larger than a window along every axis, and odd."""
    return np.random.default_rng(7).integers(0, 256, shape).astype(dtype)


def encoded(array: NDArray[Any]) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def a_model(path: Path, *, seed: int = 3, run_key: str = KEY) -> Path:
    network = NetworkParams(widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((2, 2, 2),))
    torch.manual_seed(seed)
    meta = ModelMeta(
        network=network,
        channels=TRAINED,
        mean=127.0,
        std=70.0,
        voxel_nm=(40.0, 8.0, 8.0),
        run_key=run_key,
        fold="all",
        step=5,
        score=0.25,
    )
    weights = build_network(network).state_dict()
    weights["head.bias"] += 2.0  # away from "all background", so that probabilities spread over the range
    save_model(path, weights, meta)
    return path


def a_record(key: str = KEY) -> RunRecord:
    return RunRecord(
        key=key,
        stage="train",
        mlflow_run_id=None,
        tracking_uri="sqlite:///.synmlops/mlflow.db",
        parent_key=None,
        commit="unknown",
        dirty=False,
        dvc_experiment=None,
        data={},
        params={"train.steps": 5},
        logs={},
        created="2026-01-02T03:04:05+00:00",
    )


@dataclass(frozen=True)
class Project:
    root: Path
    model: Path
    point: Path
    metrics: Path
    uri: str

    def register(self, model: Path | None = None, **more: Any) -> RegisteredVersion:
        given = {"record": a_record(), "infer": INFER, "operating_point": self.point, "metrics": self.metrics}
        return register(model or self.model, **{**given, **more})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    point, metrics = root / "operating_point.json", root / "metrics.json"
    point.write_text(json.dumps({"all": {"threshold": 0.375, "source": "validation", "voxel_f1": 0.8}}))
    metrics.write_text(json.dumps({"partner_f1": 0.75, "voxel": {"f1": {"union": 0.5}}, "true": 12}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = f"sqlite:///{root}/.synmlops/mlflow.db"
        yield Project(root, a_model(root / "model.safetensors"), point, metrics, uri)


@pytest.fixture(scope="module")
def first(project: Project) -> RegisteredVersion:
    return project.register()


# -- the model, in this process --------------------------------------------------------------------------


@pytest.fixture
def served(project: Project, tmp_path: Path) -> SynapseModel:
    made = bundle.write_bundle(tmp_path, project.model, infer=INFER, operating_point={"threshold": 0.375})
    model = SynapseModel()
    model.load_context(context(made.artifacts))
    return model


def context(artifacts: dict[str, str]) -> PythonModelContext:
    return PythonModelContext(artifacts, None)  # type: ignore[no-untyped-call]


def status(error: MlflowException) -> int:
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def ask(model: SynapseModel, *values: Any) -> pd.DataFrame:
    return model.predict(context({}), pd.DataFrame({"volume": list(values)}))


def expected(project: Project, volume: NDArray[Any]) -> NDArray[np.uint8]:
    """What `infer` writes: the channels that the model was trained on."""
    return predict_array(load_model(project.model), volume, params=INFER)


def test_rows_are_answered_as_infer_would_with_the_trained_channels_alone(
    project: Project, served: SynapseModel
) -> None:
    volumes = [a_volume(), a_volume((3, 7, 5), np.uint16)]
    answer = ask(served, *map(to_npy, volumes))
    for volume, row in zip(volumes, answer.to_dict(orient="records"), strict=True):
        probabilities = from_npy(row["probabilities"], ndim=4)
        assert np.array_equal(probabilities, expected(project, volume))
        assert row["channels"] == list(TRAINED)
        assert (row["scale"], row["threshold"], row["run_key"]) == (255, 0.375, KEY)
        assert row["voxel_nm"] == [40.0, 8.0, 8.0]
    assert len(np.unique(expected(project, volumes[0]))) > 20  # a constant would compare equal too easily


@pytest.mark.parametrize("value", [None, 3.0, "no base64!", b"hello"])
def test_a_bad_row_is_a_bad_request_that_names_it(served: SynapseModel, value: Any) -> None:
    with pytest.raises(MlflowException, match="row 1, column volume") as caught:
        ask(served, to_npy(a_volume()), value)
    assert status(caught.value) == 400


def test_what_takes_too_long_is_refused_early(served: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0.0001")
    with pytest.raises(MlflowException, match=r"answers within 0\.0001 s; send smaller volumes") as caught:
        ask(served, to_npy(a_volume()))
    assert status(caught.value) == 400
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "600")
    assert len(ask(served, to_npy(a_volume()))) == 1  # and the model is free again


def test_a_busy_server_says_so_in_time(served: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0.05")
    with served._one_at_a_time, pytest.raises(MlflowException, match="busy") as caught:
        ask(served, to_npy(a_volume()))
    assert status(caught.value) == 503


# -- the registry ----------------------------------------------------------------------------------------


def test_a_version_carries_operating_point_and_scores(project: Project, first: RegisteredVersion) -> None:
    assert (first.version, first.uri) == (1, "models:/synmlops@champion")
    assert "made from the record" in first.notes[0]  # the store did not know the run
    client = MlflowClient(project.uri)
    version = client.get_model_version_by_alias("synmlops", "champion")
    assert version.run_id == first.run_id
    assert version.tags[KEY_TAG] == KEY
    tags = {name.removeprefix("synmlops."): value for name, value in version.tags.items()}
    assert tags["threshold"] == "0.375"
    assert (tags["channels"], tags["voxel_nm"]) == ("post,union", "40,8,8")
    assert (tags["partner_f1"], tags["voxel.f1.union"]) == ("0.7500", "0.5000")
    assert "true" not in tags
    run = client.get_run(first.run_id)
    assert run.data.tags[KEY_TAG] == KEY
    assert run.info.status == "FINISHED"
    assert run.outputs is not None
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [version.source]


def test_a_registered_model_is_loaded_with_its_operating_point(
    project: Project, first: RegisteredVersion
) -> None:
    for uri in (first.uri, "models:/synmlops/1"):
        model = load_registered(uri)
        assert model.meta == load_model(project.model).meta.model_copy(update={"threshold": 0.375})
        probabilities = predict_array(model, a_volume(), params=INFER)
        assert np.array_equal(probabilities, expected(project, a_volume()))


def test_another_registration_makes_a_version_and_moves_its_alias_alone(
    project: Project, first: RegisteredVersion, tmp_path: Path
) -> None:
    def aliases(client: MlflowClient) -> dict[str, int]:
        names = client.get_registered_model("moving").aliases
        return {alias: int(version) for alias, version in names.items()}

    client = MlflowClient(project.uri)
    ended = client.get_run(first.run_id).info.end_time
    other = a_model(tmp_path / "model.safetensors", seed=4)
    second = project.register(other, name="moving")
    third = project.register(other, name="moving", alias="challenger", operating_point=None)
    assert (second.version, third.version) == (1, 2)
    assert aliases(client) == {"champion": 1, "challenger": 2}
    assert load_registered(third.uri).meta.threshold is None
    fourth = project.register(other, name="moving")
    assert fourth.version == 3
    assert aliases(client) == {"champion": 3, "challenger": 2}
    assert {second.run_id, third.run_id, fourth.run_id} == {first.run_id}  # the pipeline's one run
    assert client.get_run(first.run_id).info.end_time == ended


def test_a_model_that_no_run_trained_gets_a_run(project: Project, tmp_path: Path) -> None:
    """An incumbent's network, as `synmlops import checkpoint` writes it."""
    network = NetworkParams(
        name="pytc_unet",
        stem_zyx=(1, 1, 1),
        widths=(8, 8),
        kernels=((1, 3, 3), (3, 3, 3)),
        pools=((2, 2, 2),),
    )
    meta = ModelMeta(
        network=network, channels=TRAINED, mean=127.5, std=127.5, voxel_nm=(40, 8, 8), imported="a.pth.tar"
    )
    path = tmp_path / "imported.safetensors"
    save_model(path, build_network(network).state_dict(), meta)
    made = register_file(path, infer=INFER, threshold=0.25, name="imported")
    assert load_registered(made.uri).meta == meta.model_copy(update={"threshold": 0.25})
    client = MlflowClient(project.uri)
    tags = client.get_model_version_by_alias("imported", "champion").tags
    assert (tags["synmlops.imported"], tags["synmlops.threshold"]) == ("a.pth.tar", "0.25")
    run = client.get_run(made.run_id)
    assert (run.info.status, run.data.params["network.name"]) == ("FINISHED", "pytc_unet")
    with pytest.raises(SynmlopsError, match=r"--threshold.*1\.5"):
        register_file(path, infer=INFER, threshold=1.5, name="imported")
    with pytest.raises(SynmlopsError, match=r"trained by run 0f0f.*--models"):
        register_file(project.model, infer=INFER, name="imported")


def test_registering_leaves_the_process_as_it_was(project: Project, first: RegisteredVersion) -> None:
    assert not [path for path in sys.path if path.endswith("/code")]
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Path("no/such.safetensors")}, r"no/such\.safetensors: no such model; run"),
        ({"operating_point": Path("no/such.json")}, r"no/such\.json: No such file.*synmlops evaluate"),
        ({"metrics": Path("no/such.json")}, r"no/such\.json: No such file"),
        ({"alias": "v2"}, "'v2' cannot be an alias"),
        ({"alias": "latest"}, "'latest' cannot be an alias"),
        ({"alias": "a b"}, "'a b' cannot be an alias"),
        ({"name": "a/b"}, "'a/b' cannot name a model"),
        ({"record": a_record("ab" * 16)}, "was trained by run 0f0f"),
    ],
)
def test_what_cannot_be_registered_is_one_message(
    project: Project, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SynmlopsError, match=message):
        project.register(**change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not whole JSON"),
        ("[]", "no JSON object"),
        ('{"1": {"threshold": 0.5}}', "no fold 'all'.*it has 1"),
        ('{"all": {"threshold": 1.5}}', r"fold all is 1\.5; it must be from 0 to 1"),
        ('{"all": {"threshold": true}}', "is True"),
    ],
)
def test_a_bad_operating_point_is_one_message(
    project: Project, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "point.json"
    path.write_text(text)
    with pytest.raises(SynmlopsError, match=message):
        project.register(operating_point=path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/synmlops@nobody", "models:/synmlops@nobody: .*nobody.*synmlops register"),
        ("models:/stranger/1", "models:/stranger/1: .*stranger.*synmlops register"),
        ("synmlops", "names no registered model; write models:/synmlops@champion"),
        ("models:/synmlops@champion/artifacts", "names no registered model"),
    ],
)
def test_what_is_not_registered_is_one_message(
    project: Project, first: RegisteredVersion, uri: str, message: str
) -> None:
    with pytest.raises(SynmlopsError, match=message):
        load_registered(uri)


def test_a_store_that_is_away_is_one_message(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SynmlopsError, match="is MLFLOW_TRACKING_URI right and the server up"):
        project.register()


# -- the server ------------------------------------------------------------------------------------------

# Python runs this at its start. The package is installed where these tests run, so the server could import
# that one: with this it may come from a registered model's folder of code and from nowhere else.
HIDE_PACKAGE = """
import sys
from importlib.machinery import PathFinder

class FromModelsAlone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "synmlops":
            return None
        spec = PathFinder.find_spec(name, [p for p in sys.path if p.endswith("/code")])
        if spec is None:
            raise ModuleNotFoundError("synmlops is hidden from this process", name=name)
        print("synmlops comes from", spec.origin, file=sys.stderr, flush=True)
        return spec

sys.meta_path.insert(0, FromModelsAlone)
"""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    cwd: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lonely_environment(hook: Path, uri: str) -> dict[str, str]:
    (hook / "sitecustomize.py").write_text(HIDE_PACKAGE)
    kept = {name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "PYTHONPATH")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",  # for uvicorn
        "PYTHONPATH": str(hook),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


@pytest.fixture(scope="module")
def server(
    project: Project, first: RegisteredVersion, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    empty, hook = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("hook")
    environment = lonely_environment(hook, project.uri)
    alone = [sys.executable, "-c", "import synmlops"]
    refused = subprocess.run(alone, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert "synmlops is hidden from this process" in refused.stderr  # the hook works

    port, log = free_port(), hook / "log"
    command = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "-m", first.uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=empty, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        await_ping(f"http://127.0.0.1:{port}", process, log)
        yield Server(f"http://127.0.0.1:{port}", log, empty)
    finally:
        end_group(process)


def await_ping(url: str, process: subprocess.Popen[bytes], log: Path, *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5) as response:
                assert response.status == 200
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"no ping within {seconds} s:\n{log.read_text()}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and its children: all are in the group that the process leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and group_lives(process):
            time.sleep(0.1)
    process.wait(timeout=10)


def group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def post(url: str, body: bytes, kind: str = "application/json") -> Any:
    request = urllib.request.Request(f"{url}/invocations", data=body, headers={"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["predictions"]


@pytest.mark.slow
def test_a_served_model_answers_byte_for_byte_what_infer_gives(project: Project, server: Server) -> None:
    volume = a_volume()
    answer = predict_over_http(server.url, volume)
    assert answer.probabilities.shape == (2, 9, 45, 51)
    assert answer.probabilities.tobytes() == expected(project, volume).tobytes()
    assert replace(answer, probabilities=volume) == type(answer)(
        volume, TRAINED, 255, 0.375, (40.0, 8.0, 8.0), KEY
    )
    with ThreadPoolExecutor(3) as threads:
        shapes = [(8, 32, 32), (2, 3, 4), (17, 33, 65)]
        volumes = [a_volume(shape, np.uint16) for shape in shapes]
        for sent, got in zip(
            volumes, threads.map(lambda one: predict_over_http(server.url, one), volumes), strict=True
        ):
            assert got.probabilities.tobytes() == expected(project, sent).tobytes()


@pytest.mark.slow
def test_the_served_code_is_the_models_own(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("synmlops comes from")]
    assert lines
    assert all(line.endswith("/code/synmlops/__init__.py") for line in lines)
    assert not any(server.cwd.iterdir())


@pytest.mark.slow
def test_csv_and_parquet_requests_are_answered_too(project: Project, server: Server) -> None:
    raw = to_npy(a_volume())
    parquet, csv = io.BytesIO(), io.StringIO()
    pd.DataFrame({"volume": [raw]}).to_parquet(parquet)
    pd.DataFrame({"volume": [base64.b64encode(raw).decode()]}).to_csv(csv, index=False)
    for body, kind in [
        (parquet.getvalue(), "application/vnd.apache.parquet"),
        (csv.getvalue().encode(), "text/csv"),
    ]:
        (answer,) = post(server.url, body, kind)
        probabilities = from_npy(base64.b64decode(answer["probabilities"]), ndim=4)
        assert np.array_equal(probabilities, expected(project, a_volume()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"dataframe_records": [{"volume": encoded(a_volume().astype(np.float32))}]},
            "float32; send uint8 or uint16",
        ),
        ({"dataframe_records": [{"volume": "bm90IG5weQ=="}]}, "not the bytes of a .npy file"),
        ({"dataframe_records": [{"image": "bm90IG5weQ=="}]}, "missing inputs ['volume']"),
        ({"dataframe_records": [{"volume": None}]}, "volume"),
        ({"volume": 1}, "exactly one of the input fields"),
    ],
)
def test_a_bad_request_is_answered_with_400_and_one_message(
    server: Server, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(HTTPError) as caught:
        post(server.url, json.dumps(body).encode())
    assert caught.value.code == 400
    answer = json.load(caught.value)
    assert message in answer["message"]
    assert "Traceback" not in json.dumps(answer)


@pytest.mark.slow
def test_the_client_passes_a_refusal_on(server: Server) -> None:
    with pytest.raises(SynmlopsError, match=r"refused the volume \(400\): row 0, column volume: .*2 axes"):
        predict_over_http(server.url, a_volume()[0])


def test_the_client_says_where_nobody_answers() -> None:
    with pytest.raises(SynmlopsError, match=r"no answer .*mlflow models serve"):
        predict_over_http(f"http://127.0.0.1:{free_port()}", a_volume())


def test_no_pickle_is_in_a_registered_model(project: Project, first: RegisteredVersion) -> None:
    files = [path for path in (project.root / ".synmlops" / "artifacts").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"MLmodel", "model_code.py", "model.safetensors", "settings.json", "requirements.txt"} <= names
    assert not [path for path in files if path.suffix in PICKLES or "__pycache__" in path.parts]
    others = [path for path in files if path.suffix != ".safetensors"]  # which begins with any number
    assert not [path for path in others if path.read_bytes()[:1] == b"\x80"]  # how a pickle begins
    described = [
        path.read_text() for path in files if path.name == "MLmodel"
    ]  # one of each version registered
    assert not [text for text in described if "python_model:" in text]  # the key of a pickled one
    assert any("0.375" in text for text in described)


OWN_NETWORK = """
from torch import nn
from own_parts import body

def build(params):
    return body(params.options["width"])
"""
OWN_PARTS = """
from torch import nn

def body(width):
    return nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.ReLU(), nn.Conv3d(width, 3, 1))
"""
ASK_ALONE = """
import sys
import mlflow.pyfunc
from test_serving_example import example
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict(example())
sys.stdout.buffer.write(answer["probabilities"][0])
"""


@pytest.mark.slow
def test_a_network_of_the_users_own_is_served_without_its_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, hook = tmp_path / "beside", tmp_path / "hook"
    beside.mkdir()
    hook.mkdir()
    (beside / "own_net.py").write_text(OWN_NETWORK)
    (beside / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(beside)
    meta = read_meta(project.model).model_copy(
        update={"network": NetworkParams(name="own_net:build", options={"width": 5})}
    )
    path = tmp_path / "model.safetensors"
    save_model(path, build_network(meta.network).state_dict(), meta)
    version = project.register(path, name="own", operating_point=None)
    volume = a_volume()
    (hook / "test_serving_example.py").write_text(
        f"import pandas as pd\ndef example():\n    return pd.DataFrame({{'volume': [{to_npy(volume)!r}]}})\n"
    )
    alone = subprocess.run(
        [sys.executable, "-c", ASK_ALONE, version.uri],
        cwd=hook,
        env=lonely_environment(hook, project.uri),
        capture_output=True,
        check=True,
    )
    answer = from_npy(alone.stdout, ndim=4)
    assert answer.tobytes() == predict_array(load_model(path), volume, params=INFER).tobytes()
    assert b"/code/synmlops/__init__.py" in alone.stderr
