"""The viewer: voxels served as the files hold them, at their place, to this machine alone, and drawn."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
from browser import CHROMIUM, look_at
from view_tools import CORNER_XYZ, SHAPE, Files, address, layer_of, paint, state_of, viewing, voxels_of

from synmlops.cli import main
from synmlops.params import SynmlopsError
from synmlops.stages import view
from synmlops.volumes.store import open_volume
from synmlops.volumes.table import read_table


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return paint(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def viewer(files: Files) -> Iterator[tuple[str, int]]:
    with viewing(*files.options) as running:
        yield running


def test_voxels_are_served_as_the_files_hold_them(files: Files, viewer: tuple[str, int]) -> None:
    url, _ = viewer
    state = state_of(url)
    image = voxels_of(url, layer_of(state, "image"), (5, 10, 2), (45, 90, 9))
    np.testing.assert_array_equal(image, files.image[2:9, 10:90, 5:45].T)
    pre, post = (
        voxels_of(url, layer_of(state, side), (0, 0, 0), SHAPE[::-1]).T.astype(int)
        for side in ("pre", "post")
    )
    np.testing.assert_array_equal(pre + post, files.instances)
    assert set(np.unique(pre)) == {0, 1, 3}
    neurons = voxels_of(url, layer_of(state, "neurons"), (0, 0, 0), SHAPE[::-1])
    assert neurons.dtype == np.uint64
    np.testing.assert_array_equal(neurons.T, files.instances)
    chances = voxels_of(url, layer_of(state, "probabilities"), (0, 0, 0, 0), (*SHAPE[::-1], 3), "1,1,1,1")
    with open_volume(f"{files.sources.probabilities}::probabilities", ndim=4) as volume:
        np.testing.assert_array_equal(chances.T, volume.read())
    coarse = voxels_of(url, layer_of(state, "pre"), (0, 0, 0), (28, 24, 12), "4,4,1")
    np.testing.assert_array_equal(coarse.T, pre[:, ::4, ::4])


def test_all_layers_lie_where_the_world_has_them(files: Files, viewer: tuple[str, int]) -> None:
    state = state_of(viewer[0])
    nm = {"x": [8e-9, "m"], "y": [8e-9, "m"], "z": [4e-8, "m"]}
    assert state["dimensions"] == nm
    for name in ("image", "neurons", "probabilities", "pre", "post"):
        transform = layer_of(state, name)["source"][0]["transform"]
        matrix = np.array(transform["matrix"])
        np.testing.assert_allclose(matrix[:3, -1], CORNER_XYZ)
        np.testing.assert_array_equal(matrix[:, :-1], np.eye(len(matrix)))
    table = read_table(files.folder / "partners.parquet")
    best = table.loc[table.confidence.idxmax()]
    assert best.site == 2
    lines = layer_of(state, "partners")["annotations"]
    assert [line["props"][1] for line in lines] == [2, 1]  # the most confident first
    for end in ("pre", "post"):
        point = np.array([best[f"{end}_{axis}"] for axis in "xyz"]) + CORNER_XYZ + 0.5
        np.testing.assert_allclose(lines[0]["pointA" if end == "pre" else "pointB"], point)
    middle = (np.array(lines[0]["pointA"]) + lines[0]["pointB"]) / 2
    assert np.abs(np.array(state["position"]) - middle).max() <= 0.5
    assert layer_of(state, "post")["segments"] == ["4"]
    assert layer_of(state, "probabilities")["visible"] is False  # the instances are seen


def test_surfaces_are_made_of_one_synapse(files: Files, viewer: tuple[str, int]) -> None:
    url, _ = viewer
    state = state_of(url)
    with urlopen(f"{address(url, layer_of(state, 'pre'), 'mesh')}/3", timeout=20) as answer:
        mesh = answer.read()
    n = int(np.frombuffer(mesh, "<u4", 1)[0])
    vertices_nm = np.frombuffer(mesh, "<f4", 3 * n, 4).reshape(n, 3) * 1e9
    z, y, x = (np.flatnonzero((files.instances == 3).any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    np.testing.assert_allclose(vertices_nm.min(axis=0), [x[0] * 8, y[0] * 8, z[0] * 40], atol=0.1)
    np.testing.assert_allclose(
        vertices_nm.max(axis=0), [x[-1] * 8 + 8, y[-1] * 8 + 8, z[-1] * 40 + 40], atol=0.1
    )
    for name, number in (("pre", 99), ("neurons", 3), ("neurons", 1), ("neurons", 4)):  # each answers at once
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address(url, layer_of(state, name), 'mesh')}/{number}", timeout=20)


def test_it_listens_on_this_machine_alone_and_wants_the_token(viewer: tuple[str, int]) -> None:
    url, pid = viewer
    listening = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    for wrong in (re.sub("[0-9a-f]{40}", "0" * 40, url), url.partition("/v/")[0]):
        with pytest.raises(HTTPError, match="404"):
            urlopen(wrong, timeout=20)
    root, _, token = url.rstrip("/").rpartition("/v/")
    with pytest.raises(HTTPError, match="403"):  # no credentials of this user's accounts
        urlopen(f"{root}/credentials/{token}", data=b"{}", timeout=20)


def test_ctrl_c_ends_it_in_order_and_a_port_in_use_is_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    with viewing(*files.options[:2], "--at", "3,20,40", end_by=signal.SIGINT) as (url, _):
        state = state_of(url)
        assert state["position"] == [43.5, 22.5, 5.5]
        assert [layer["name"] for layer in state["layers"]] == ["image"]
        port = url.partition("/v/")[0].rpartition(":")[2]
        with pytest.raises(SystemExit) as ended:
            _main("view", *files.options, "--no-browser", "--port", port)
    assert ended.value.code == 2
    assert f"--port {port}: is in use" in capsys.readouterr().err


def _main(*words: str) -> None:
    before, sys.argv = sys.argv, ["synmlops", *words]
    try:
        main()
    finally:
        sys.argv = before


def test_without_neuroglancer_it_says_how_to_get_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    with pytest.raises(SynmlopsError, match=r"pip install 'synmlops\[view\]'"):
        view.run(files.sources)


def test_an_address_of_another_machine_is_refused(files: Files) -> None:
    with pytest.raises(SynmlopsError, match=r"--bind 192\.0\.2\.1: cannot listen there"):
        view.run(files.sources, bind="192.0.2.1", browser=False)


def test_other_addresses_are_told_of(files: Files) -> None:
    command = [
        sys.executable,
        "-m",
        "synmlops",
        "view",
        "--no-browser",
        *files.options[:2],
        "--bind",
        "0.0.0.0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            break
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert "anybody who reaches 0.0.0.0" in said
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, which draws the page; apt-get install chromium")
def test_a_browser_draws_tissue_synapses_and_lines(files: Files, tmp_path: Path) -> None:
    with viewing(*files.options) as (url, _):
        page = look_at(url, tmp_path / "profile")
    root = url.partition("/v/")[0]
    assert page.title.startswith("synmlops: image.h5")
    outside = [one for one in page.requests if not one.startswith((f"{root}/", "blob:", "data:"))]
    assert outside == []
    assert any("/npz/" in one for one in page.requests)
    red, green, blue = np.moveaxis(page.picture[70:-40, 40:330].astype(int), 2, 0)  # the panel of x and y
    grey = (red == green) & (green == blue)
    assert len(np.unique(red[grey])) > 50  # tissue, not a plain ground
    assert np.count_nonzero(blue - red > 40) > 500  # pre
    assert np.count_nonzero((red - blue > 40) & (red - green > 15) & (green > blue)) > 500  # post
    assert np.count_nonzero((red - green > 80) & (blue - green > 60)) > 30  # the line
