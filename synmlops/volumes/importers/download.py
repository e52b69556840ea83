"""Download one file over HTTP: resumed after a drop, checked, and complete or not there at all."""

import http.client
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from synmlops.params import SynmlopsError
from synmlops.volumes.files import plain_write_errors, sha256_of

_PIECE = 1 << 20  # bytes between two looks at the progress bar
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # a server that is busy, not one that says no
_DROPPED = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class _Dropped(Exception):
    """The connection ended early; what was read so far is kept."""


@dataclass
class _Partial:
    """A started download: the bytes in `path`, and beside them which version of the file they are of."""

    path: Path
    url: str
    version: str | None = None  # ETag or modification date, as If-Range wants it
    total: int | None = None  # bytes, None if the server does not say
    done: bool = field(default=False)

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def _notes(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def load(self) -> None:
        """Take up an earlier attempt at the same URL, or forget it."""
        try:
            notes = json.loads(self._notes.read_text())
            same = notes["url"] == self.url
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if same and self.path.exists():
            self.version, self.total = notes["version"], notes["total"]
        else:
            self.forget()

    def save(self) -> None:
        notes = {key: value for key, value in asdict(self).items() if key not in ("path", "done")}
        self._notes.write_text(json.dumps(notes))

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)
        self.version = self.total = None

    def finish(self, dest: Path) -> None:
        self.path.replace(dest)
        self._notes.unlink(missing_ok=True)


def download(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    timeout_s: float = 30.0,
    tries: int = 5,
    pause_s: float = 1.0,
    show_progress: bool = True,
) -> str:
    """Download a file, unless it is there already, and give its SHA-256.

    A dropped connection is taken up where it ended, in this call and in a later one, as long as the server
    says that the file is still the same; otherwise the download starts over.

    Parameters
    ----------
    url : str
        http or https.
    dest : Path
        The file. What is unfinished lies beside it as `.part`.
    sha256 : str, optional
        What the file must have.
    timeout_s : float
        Longest silence of the server.
    tries : int
        Failures in a row, without a byte gained, before giving up.
    pause_s : float
        Wait after the first of them; it doubles with each.
    show_progress : bool
        Draw a bar with the time left on standard error.

    Raises
    ------
    SynmlopsError
        If the address is wrong, the server cannot be reached or refuses, the disk is full, or the file is
        not the one that `sha256` names.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise SynmlopsError(f"{url}: is no http or https address; download the file and give its path")
    with plain_write_errors(dest, dest.parent):
        dest.parent.mkdir(parents=True, exist_ok=True)
        if not dest.exists():
            partial = _Partial(dest.with_name(dest.name + ".part"), url)
            partial.load()
            with _progress(dest.name, show_progress) as progress:
                _fetch_all(partial, progress, timeout_s=timeout_s, tries=tries, pause_s=pause_s)
            _refuse_other(partial.path, sha256, url)
            partial.finish(dest)
    return _refuse_other(dest, sha256, url)


def _fetch_all(
    partial: _Partial, progress: Progress, *, timeout_s: float, tries: int, pause_s: float
) -> None:
    failures = 0
    while not partial.done:
        before = partial.size
        try:
            _fetch(partial, progress, timeout_s=timeout_s)
        except _Dropped as drop:
            failures = 1 if partial.size > before else failures + 1
            if failures >= tries:
                kept = f"; {partial.size} bytes are kept, run it again to go on" if partial.size else ""
                raise SynmlopsError(
                    f"{partial.url}: {drop}, {failures} times in a row; "
                    f"check the network and the address{kept}"
                ) from drop
            time.sleep(pause_s * 2 ** (failures - 1))


def _fetch(partial: _Partial, progress: Progress, *, timeout_s: float) -> None:
    """Go on from what there is, until the file is complete or the connection drops."""
    headers = {"User-Agent": "synmlops", "Accept-Encoding": "identity"}
    if partial.size and partial.version is None:
        partial.forget()
    if partial.size and partial.version is not None:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": partial.version}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(partial.url, headers=headers), timeout=timeout_s
        ) as answer:
            _prepare_to_append(partial, answer)
            _append(partial, answer, progress)
    except urllib.error.HTTPError as error:
        _explain_refusal(partial, error)
    except urllib.error.URLError as error:
        raise _Dropped(f"the server cannot be reached ({error.reason})") from error
    except _DROPPED as error:
        raise _Dropped(f"the connection dropped ({error or type(error).__name__})") from error
    if partial.total is not None and partial.size < partial.total:
        raise _Dropped(f"the connection dropped after {partial.size} of {partial.total} bytes")
    if partial.total is not None and partial.size > partial.total:
        partial.forget()
        raise _Dropped("the server sent more than it announced")
    partial.done = True


def _prepare_to_append(partial: _Partial, answer: Any) -> None:
    """Start over unless the server sends exactly what is missing of the same file."""
    length = answer.headers.get("Content-Length")
    if answer.status == 206:
        changed = partial.version != (answer.headers.get("ETag") or partial.version)
        span, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] == str(partial.size) and not changed:
            partial.total = int(total) if total.isdecimal() else None
            return
        partial.forget()
        raise _Dropped("the server sent a part of another file, or another part")
    partial.forget()
    etag = answer.headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else None
    partial.version = strong or answer.headers.get("Last-Modified")
    partial.total = int(length) if length is not None and length.isdecimal() else None
    partial.save()


def _append(partial: _Partial, answer: Any, progress: Progress) -> None:
    task = progress.task_ids[0]
    progress.update(task, total=partial.total, completed=partial.size)
    with partial.path.open("ab") as file:
        while piece := answer.read1(_PIECE):
            file.write(piece)
            progress.advance(task, len(piece))


def _explain_refusal(partial: _Partial, error: urllib.error.HTTPError) -> None:
    with error:
        if error.code == 416 and partial.size:
            if partial.size == partial.total:
                return  # nothing is missing
            partial.forget()
            raise _Dropped("the server does not know the rest of the file") from error
        if error.code in _TRY_AGAIN:
            raise _Dropped(f"the server answers {error.code} {error.reason}") from error
        raise SynmlopsError(
            f"{partial.url}: the server answers {error.code} {error.reason}; check the address, "
            "or download the file another way and give its path"
        ) from error


def _refuse_other(path: Path, sha256: str | None, url: str) -> str:
    found = sha256_of(path)
    if sha256 is not None and found != sha256.lower().strip():
        path.unlink()
        raise SynmlopsError(
            f"{path}: has SHA-256 {found}, not {sha256}, and was removed; {url} changed, or the checksum "
            "is of another file"
        )
    return found


def _progress(name: str, show: bool) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )
    progress.add_task(f"download {name}", total=None)
    return progress
