"""The VNC data set comes in from a folder, an archive or a server, whole or not at all."""

import functools
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synmlops.params import SynmlopsError
from synmlops.volumes.importers.vnc import VOXEL_NM, import_vnc, survey_vnc
from synmlops.volumes.store import Grid, open_volume


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make a small data set: 4 sections, two synapses in the lower half and one in the upper."""
    rng = np.random.default_rng(0)
    for stack in ("stack1", "stack2"):
        (tmp_path / "vnc" / stack / "raw").mkdir(parents=True)
        for z in range(4):
            section = rng.integers(0, 255, (40, 30), np.uint8)
            Image.fromarray(section).save(tmp_path / "vnc" / stack / "raw" / f"{z:02d}.tif")
    (tmp_path / "vnc/stack1/synapses").mkdir()
    for z in range(4):
        label = np.zeros((40, 30), bool)
        label[5:8, 5:8] = z < 2
        label[30 + z, 4 + z] = True  # 26-connected from section to section
        label[25:28, 20:25] = z == 3
        # black-and-white as in most sections, or 0 and 255 as in some
        section = Image.fromarray(label) if z != 2 else Image.fromarray(label.astype(np.uint8) * 255)
        section.save(tmp_path / f"vnc/stack1/synapses/{z:02d}.png")
    return tmp_path / "vnc"


def _check(dest: Path) -> None:
    with open_volume(dest / "stack1_image.h5") as image, open_volume(dest / "stack1_label.h5") as label:
        assert image.shape == label.shape == (4, 40, 30)
        assert image.dtype == label.dtype == np.uint8
        assert image.grid == label.grid == Grid(VOXEL_NM)
        assert label.attrs["label_kind"] == "union"
        assert np.unique(label.read()).tolist() == [0, 1]
        assert label.memmap() is not None


def test_a_folder(source: Path, tmp_path: Path) -> None:
    found = import_vnc(source, tmp_path / "out", bands=2)
    first, second = found.stacks
    assert (first.synapses, first.per_band, first.shape_zyx) == (3, (1, 2), (4, 40, 30))
    assert first.foreground_share == pytest.approx((18 + 4 + 15) / 4800)
    assert second.label is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "stack1_image.h5",
        "stack1_label.h5",
        "stack2_image.h5",
    ]
    _check(tmp_path / "out")


def _zip_of(source: Path, tmp_path: Path) -> str:
    return str(_zip(source, tmp_path / "vnc.zip"))


@pytest.mark.parametrize("given", [lambda source, _: source, _zip_of])
def test_a_survey_writes_a_picture_alone(
    source: Path, tmp_path: Path, given: Callable[[Path, Path], str | Path]
) -> None:
    shutil.rmtree(source / "stack2")
    where = given(source, tmp_path)
    before = set(tmp_path.rglob("*"))
    survey = survey_vnc(where, tmp_path / "survey.png")
    rows = dict(survey.rows)
    assert rows["stack1 image"] == "4 x 40 x 30 voxels, uint8"
    assert rows["stack1 label"].startswith("union: 3 synapses, 0.77% of the voxels")
    assert survey.odd == ("the data set has stack1 and stack2, here is stack1 alone",)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "survey.png"}
    with Image.open(tmp_path / "survey.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == (0x8A, 0x63, 0xC9)).all(axis=1).sum() > 100  # outlines of synapses of unknown side


def test_a_survey_of_a_faulty_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match=r"02.tif: is truncated"):
        survey_vnc(_spoil(source, "truncated"), tmp_path / "survey.png")
    assert not (tmp_path / "survey.png").exists()


def test_the_real_data(shared: Callable[[str], Path], tmp_path: Path) -> None:
    (found,) = import_vnc(shared("data/vnc"), tmp_path / "out").stacks
    assert found.shape_zyx == (20, 1024, 640)
    assert found.synapses == 33
    assert found.per_band == (4, 8, 13, 8)
    assert found.foreground_share == pytest.approx(0.0062, abs=1e-4)


def _zip(source: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(source.rglob("*")):
            packed.write(path, Path("groundtruth-master") / path.relative_to(source))
        packed.writestr("groundtruth-master/README.md", "x")
    return target


def _tar(source: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz") as packed:
        packed.add(source, "groundtruth-master")
    return target


@pytest.mark.parametrize(("pack", "name"), [(_zip, "vnc.zip"), (_tar, "vnc.tar.gz")])
def test_an_archive(source: Path, tmp_path: Path, pack: Callable[..., Path], name: str) -> None:
    archive = pack(source, tmp_path / name)
    found = import_vnc(str(archive), tmp_path / "out")
    assert found.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    _check(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", "vnc", name])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_an_address(source: Path, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    digest = hashlib.sha256(_zip(source, tmp_path / "web" / "vnc.zip").read_bytes()).hexdigest()
    handler = functools.partial(_Quiet, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/vnc.zip"
            found = import_vnc(url, tmp_path / "out", sha256=digest, show_progress=False)
        finally:
            server.shutdown()
            thread.join()
    assert found.sha256 == digest
    assert found.archive is not None
    assert found.archive.parent == tmp_path
    _check(tmp_path / "out")
    again = import_vnc(url, tmp_path / "again" / ".." / "out", show_progress=False)  # the server is gone
    assert again.sha256 == digest


def _spoil(source: Path, how: str) -> Path:
    raw, synapses = source / "stack1/raw", source / "stack1/synapses"
    if how == "nowhere":
        return source / "elsewhere"
    if how == "other folder":
        shutil.rmtree(source / "stack1")
    elif how == "no synapses":
        shutil.rmtree(synapses)
    elif how == "gap":
        (raw / "01.tif").unlink()
    elif how == "fewer synapses":
        (synapses / "03.png").unlink()
    elif how == "fewer raw":
        (raw / "03.tif").unlink()
    elif how == "truncated":
        (raw / "02.tif").write_bytes((raw / "02.tif").read_bytes()[:700])
    elif how == "truncated label":
        (synapses / "02.png").write_bytes((synapses / "02.png").read_bytes()[:60])
    elif how == "other shape":
        Image.fromarray(np.zeros((40, 31), np.uint8)).save(synapses / "02.png")
    elif how == "16 bit":
        for z in range(4):
            Image.fromarray(np.zeros((40, 30), np.uint16)).save(raw / f"{z:02d}.tif")
    elif how == "no number":
        (raw / "02.tif").rename(raw / "two.tif")
    return source


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nowhere", "there is no such folder or archive"),
        ("other folder", "holds no stack1/raw"),
        ("no synapses", "synapses: is missing"),
        ("gap", "raw: section 1 is missing"),
        ("fewer synapses", r"synapses: has no section 3, which .*03.tif belongs to"),
        ("fewer raw", r"raw: has no section 3, which .*03.png belongs to"),
        ("truncated", "02.tif: is truncated"),
        ("truncated label", "02.png: is truncated"),
        ("other shape", r"02.png: is \(40, 31\), the other sections are \(40, 30\)"),
        ("16 bit", "its sections are uint16"),
        ("no number", "gives no section number"),
    ],
)
def test_a_faulty_source_writes_nothing(source: Path, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(SynmlopsError, match=message):
        import_vnc(_spoil(source, how), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_import_keeps_the_earlier_one(source: Path, tmp_path: Path) -> None:
    import_vnc(source, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SynmlopsError):
        import_vnc(_spoil(source, "truncated"), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def _evil_zip(target: Path) -> None:
    with zipfile.ZipFile(target, "w") as packed:
        packed.writestr("../../stack1/raw/00.tif", "x")


def _evil_tar(target: Path) -> None:
    with tarfile.open(target, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("/stack1/raw/00.tif"), io.BytesIO())


def _linking_tar(target: Path) -> None:
    """Try to write through a link to a folder outside."""
    with tarfile.open(target, "w") as packed:
        link = tarfile.TarInfo("stack1/raw")
        link.type, link.linkname = tarfile.SYMTYPE, str(target.parent)
        packed.addfile(link)
        member = tarfile.TarInfo("stack1/raw/00.tif")
        member.size = 1
        packed.addfile(member, io.BytesIO(b"x"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_evil_zip, "leads out of the folder"),
        (_evil_tar, "leads out of the folder"),
        (_linking_tar, "00.tif: is truncated"),  # unpacked as a file inside, where the link was left out
    ],
)
def test_an_archive_cannot_write_elsewhere(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "box").mkdir()
    make(tmp_path / "box" / "evil")
    with pytest.raises(SynmlopsError, match=message):
        import_vnc(tmp_path / "box" / "evil", tmp_path / "box" / "out")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["box", "box/evil"]


@pytest.mark.parametrize(("pack", "keep"), [(_zip, 0.5), (_tar, 0.5), (_zip, 0.0)])
def test_a_broken_archive_is_named(
    source: Path, tmp_path: Path, pack: Callable[..., Path], keep: float
) -> None:
    whole = pack(source, tmp_path / "whole").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(SynmlopsError, match=r"cut\.zip: is truncated or no zip or tar archive"):
        import_vnc(tmp_path / "cut.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checksum_is_held(source: Path, tmp_path: Path) -> None:
    archive = _zip(source, tmp_path / "vnc.zip")
    with pytest.raises(SynmlopsError, match=r"vnc\.zip: has SHA-256 .*, not abc"):
        import_vnc(archive, tmp_path / "out", sha256="abc")
    assert archive.exists()  # the user's own file is not removed
    with pytest.raises(SynmlopsError, match="a checksum is for an archive"):
        import_vnc(source, tmp_path / "out", sha256="abc")
