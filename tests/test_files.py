"""Files appear under their name only when complete, and a place that cannot be written is named."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_folder, atomic_path, identity_of, sha256_of


def _write_and_stop(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as partial:
        _write_and_stop(partial)
    assert target.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_path_keeps_the_suffix_and_folders_are_made(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.npy"
    with atomic_path(target) as partial:
        np.save(partial, np.arange(3))  # would append .npy to another suffix
    assert np.load(target).tolist() == [0, 1, 2]


def test_a_block_that_writes_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")],
)
def test_errors_of_the_place_name_the_file_and_the_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(SynmlopsError, match=remedy) as caught, atomic_path(target):
        raise OSError(number, os.strerror(number))
    assert str(target) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/input.h5")


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "in_the_way").write_text("")
    target = tmp_path / "in_the_way" / "a.txt"
    with pytest.raises(SynmlopsError, match=r"a\.txt: cannot be written"), atomic_path(target):
        pass


def test_a_full_disk_met_by_hdf5_is_one_message(tmp_path: Path) -> None:
    """A limit on file size makes real writes fail inside HDF5, as a full disk does."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from synmlops.volumes.store import write_hdf5\n"
        "from synmlops.params import SynmlopsError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    write_hdf5(sys.argv[1], {'main': np.ones((8, 512, 1024), np.uint8)}, grid=None)\n"
        "except SynmlopsError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "big.h5"
    done = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True, check=False)
    assert "big.h5: cannot be written (File too large)" in done.stdout, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SynmlopsError, match="may not write"), atomic_path(tmp_path / "a") as partial:
        partial.write_text("")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("")
    with atomic_folder(target) as partial:
        (partial / "new.txt").write_text("")
        assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_folder_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as partial:
        _write_and_stop(partial / "new.txt")
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_swap_brings_the_earlier_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, plain = tmp_path / "out", Path.replace
    target.mkdir()
    (target / "old.txt").write_text("")

    def refuse(self: Path, to: Path) -> Path:
        if to == target and ".partial" in self.name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return plain(self, to)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(SynmlopsError, match="disk reports an error"), atomic_folder(target):
        pass
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_where_a_folder_is_to_be_written_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(SynmlopsError, match="is a file"), atomic_folder(target):
        pass
    assert target.read_text() == "mine"


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".a.0123456789ab.partial.h5", tmp_path / ".a.0123456789ac.partial.h5"
    other = tmp_path / ".b.0123456789ab.partial.h5"
    for path in (old, fresh, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    with atomic_path(tmp_path / "a.h5") as partial:
        partial.write_text("x")
    assert not old.exists()
    assert fresh.exists()
    assert other.exists()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")
    with pytest.raises(SynmlopsError, match="No such file"):
        sha256_of(tmp_path / "b")


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    """DVC tells outputs apart by their bytes."""
    from synmlops.volumes.store import Grid, write_hdf5

    for name in ("a.h5", "b.h5"):
        write_hdf5(tmp_path / name, {"main": np.eye(3)[None]}, grid=Grid((1, 1, 1)), attrs={"k": "v"})
        time.sleep(1.1)  # HDF5 can store times, in seconds
    assert sha256_of(tmp_path / "a.h5") == sha256_of(tmp_path / "b.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["k"] == "v"


def test_an_identity_is_of_all_files_but_reads_few(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.tif" for n in range(9)]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]) * 300_000)
        os.utime(file, (1e9, 1e9))
    before = identity_of(files)
    assert (before["files"], before["bytes"], before["changed"]) == (9, 2_700_000, "2001-09-09T01:46:40Z")
    for number in (1, 4, 8):
        os.utime(files[number], (1e9, 2e9))
        assert identity_of(files)["digest"] != before["digest"]
        os.utime(files[number], (1e9, 1e9))
    with files[8].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(files[8], (1e9, 1e9))
    assert identity_of(files)["digest"] != before["digest"]
    assert identity_of(files[::-1])["digest"] != identity_of(files)["digest"]
    files[3].unlink()
    with pytest.raises(SynmlopsError, match=r"3\.tif: No such file"):
        identity_of(files)
