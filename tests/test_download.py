"""A download survives what a network does, and gives a complete, checked file or none."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synmlops.params import SynmlopsError
from synmlops.volumes.importers.download import download

DATA = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@dataclass
class Behaviour:
    """What the server does; a test changes it."""

    data: bytes = DATA
    etag: str | None = '"v1"'
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # bytes of the body, one entry per answer
    stall: bool = False
    status: list[int] = field(default_factory=list)  # answers before the first good one
    length: bool = True
    asked: list[str | None] = field(default_factory=list)  # Range header of each request


class _Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        how = self.behaviour
        how.asked.append(self.headers.get("Range"))
        if how.status:
            return self.send_error(how.status.pop(0))
        start = self._start()
        if start >= len(how.data) > 0:
            return self.send_error(416)
        body = how.data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(how.data) - 1}/{len(how.data)}")
        if how.etag:
            self.send_header("ETag", how.etag)
        if how.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how.drop_after:
            self.wfile.write(body[: how.drop_after.pop(0)])
            self.wfile.flush()
            if how.stall:
                threading.Event().wait(1.5)
        else:
            self.wfile.write(body)
        return None

    def _start(self) -> int:
        how, asked = self.behaviour, self.headers.get("Range")
        if not how.ranges or asked is None or self.headers.get("If-Range") != how.etag:
            return 0
        return int(asked.removeprefix("bytes=").rstrip("-"))

    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Site:
    url: str
    behaviour: Behaviour


@pytest.fixture
def site() -> Iterator[Site]:
    behaviour = Behaviour()
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Site(f"http://127.0.0.1:{server.server_port}/vnc.zip", behaviour)
        server.shutdown()
        thread.join()


def _get(site: Site, dest: Path, **options: Any) -> str:
    return download(site.url, dest, **({"pause_s": 0.01, "show_progress": False, "timeout_s": 5} | options))


def test_a_download_is_whole_checked_and_kept(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "deep" / "a.zip"
    assert _get(site, dest, sha256=DIGEST.upper()) == DIGEST
    assert dest.read_bytes() == DATA
    assert list(dest.parent.iterdir()) == [dest]
    assert _get(site, dest) == DIGEST
    assert len(site.behaviour.asked) == 1  # the second call asked for nothing


def test_a_dropped_connection_is_taken_up_where_it_ended(site: Site, tmp_path: Path) -> None:
    site.behaviour.drop_after = [100_000, 50_000]
    assert _get(site, tmp_path / "a.zip") == DIGEST
    assert site.behaviour.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_silent_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.behaviour.drop_after, site.behaviour.stall = [1000], True
    assert _get(site, tmp_path / "a.zip", timeout_s=0.2) == DIGEST
    assert site.behaviour.asked == [None, "bytes=1000-"]


def test_a_later_call_goes_on(site: Site, tmp_path: Path) -> None:
    site.behaviour.drop_after = [100_000, 0]
    with pytest.raises(SynmlopsError, match=r"dropped after 100000 of 300000 bytes, 2 times in a row.*kept"):
        _get(site, tmp_path / "a.zip", tries=2)
    assert not (tmp_path / "a.zip").exists()
    site.behaviour.asked.clear()
    assert _get(site, tmp_path / "a.zip") == DIGEST
    assert site.behaviour.asked == ["bytes=100000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_changed_file_starts_over(site: Site, tmp_path: Path) -> None:
    site.behaviour.drop_after = [100_000]
    with pytest.raises(SynmlopsError):
        _get(site, tmp_path / "a.zip", tries=1)
    site.behaviour.data, site.behaviour.etag = DATA[::-1], '"v2"'
    assert _get(site, tmp_path / "a.zip") == hashlib.sha256(DATA[::-1]).hexdigest()


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}])
def test_without_ranges_or_a_version_it_starts_over(
    site: Site, tmp_path: Path, change: dict[str, Any]
) -> None:
    for name, value in change.items():
        setattr(site.behaviour, name, value)
    site.behaviour.drop_after = [100_000]
    assert _get(site, tmp_path / "a.zip") == DIGEST


def test_a_server_that_does_not_say_the_length(site: Site, tmp_path: Path) -> None:
    site.behaviour.length = False
    assert _get(site, tmp_path / "a.zip") == DIGEST


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.behaviour.status = [503, 429]
    assert _get(site, tmp_path / "a.zip") == DIGEST


def test_a_complete_part_is_not_asked_for_again_and_again(site: Site, tmp_path: Path) -> None:
    """Killed between the last byte and the renaming, the next call finds nothing missing."""
    site.behaviour.drop_after = [299_999]
    with pytest.raises(SynmlopsError):
        _get(site, tmp_path / "a.zip", tries=1)
    with (tmp_path / "a.zip.part").open("ab") as file:
        file.write(DATA[-1:])
    assert _get(site, tmp_path / "a.zip") == DIGEST


@pytest.mark.parametrize("status", [404, 403])
def test_a_refusal_is_one_message_at_once(site: Site, tmp_path: Path, status: int) -> None:
    site.behaviour.status = [status]
    with pytest.raises(SynmlopsError, match=rf"vnc.zip: the server answers {status}.*check the address"):
        _get(site, tmp_path / "a.zip")
    assert len(site.behaviour.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/a.zip"
    with pytest.raises(SynmlopsError, match=r"cannot be reached .*refused.*3 times in a row; check the net"):
        download(url, tmp_path / "a.zip", tries=3, pause_s=0.01, show_progress=False)


def test_a_wrong_checksum_removes_the_file(site: Site, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SynmlopsError, match=rf"has SHA-256 {DIGEST}, not 1234, and was removed"):
            _get(site, tmp_path / "a.zip", sha256="1234")
        assert not (tmp_path / "a.zip").exists()
    assert _get(site, tmp_path / "a.zip", sha256=DIGEST) == DIGEST


def test_another_kind_of_address(tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match="no http or https address"):
        download("ftp://example.org/a.zip", tmp_path / "a.zip")


def test_a_place_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SynmlopsError, match="cannot be written"):
        _get(site, tmp_path / "file" / "a.zip")


def test_progress_is_shown(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _get(site, tmp_path / "a.zip", show_progress=True)
    assert "download a.zip" in capfd.readouterr().err
