"""Files that appear under their name only when complete, and what tells files from others."""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file grows beyond what this place allows; choose another place",
    errno.EACCES: "you may not write there; change the permissions or choose another place",
    errno.EPERM: "you may not write there; change the permissions or choose another place",
    errno.EROFS: "that file system is read-only; choose another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder; move it away or choose another place",
    errno.EISDIR: "there is a folder of that name; move it away or choose another name",
    errno.EEXIST: "a file of that name is in the way; move it away or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "the folder does not exist and cannot be made; choose another place",
    errno.EIO: "the disk reports an error; check it or choose another place",
}
_ABANDONED_AFTER_S = 24 * 3600.0
_END_BYTES = 1 << 16


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; it becomes `path` if the block ends without an exception.

    The temporary file lies in the same folder (made if missing), hidden, with the same suffix, since
    writers choose a format by it. Whatever was at `path` stays untouched until the new file is complete.

    Raises
    ------
    SynmlopsError
        If the place is full, read-only, forbidden or otherwise cannot be written; the message names `path`.
    ValueError
        If the block ended without writing the temporary file.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target) as partial:
    ...     _ = partial.write_text("whole")
    ...     target.exists()
    False
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    partial = _partial_sibling(path)
    with plain_write_errors(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            yield partial
            if not partial.is_file():
                raise ValueError(f"{path}: nothing was written to the temporary path {partial.name}")
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary folder to fill; it replaces `path` if the block ends without an exception.

    An earlier folder at `path` is replaced as a whole, and stays as it was on failure.

    Raises
    ------
    SynmlopsError
        If the place cannot be written, or `path` is a file.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "out"
    >>> with atomic_folder(target) as partial:
    ...     _ = (partial / "a.txt").write_text("whole")
    >>> [p.name for p in target.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    partial = _partial_sibling(path)
    with plain_write_errors(path, partial):
        if path.exists() and not path.is_dir():
            raise SynmlopsError(f"{path}: is a file where a folder is to be written; move it away")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            partial.mkdir()
            yield partial
            _swap_in(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def plain_write_errors(path: Path, *own: Path) -> Iterator[None]:
    """Turn an OSError about `path` (or about the temporary paths `own`) into a SynmlopsError.

    An OSError about another file passes unchanged: its cause is not the place being written. HDF5's
    errors are recognised by the error number in their text; some of them are RuntimeErrors.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error_number(error)
        if number not in _REMEDIES or not _concerns(error, path, own):
            raise
        raise SynmlopsError(
            f"{path}: cannot be written ({os.strerror(number)}): {_REMEDIES[number]}"
        ) from error


def error_number(error: BaseException) -> int:
    """Give the system's error number of an exception, 0 if it has none.

    Examples
    --------
    >>> error_number(RuntimeError("file write failed: errno = 28, error message = 'No space ...'"))
    28
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"errno = (\d+)", str(error))
    return int(found.group(1)) if found else 0


def sha256_of(path: str | Path) -> str:
    """Give the SHA-256 of a file as 64 hex digits, read in pieces.

    Raises
    ------
    SynmlopsError
        If the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SynmlopsError(f"{path}: {error.strerror}; check the path") from error


def identity_of(files: Sequence[Path]) -> dict[str, Any]:
    """Tell files from others that take their place, without reading them through.

    Names, sizes and times of all count, and what the first, the middle and the last begin and end with: what
    is the same on every machine that reaches the files. Inodes and devices are not, and of times only whole
    seconds are, since a network file system may cut off the rest once it is no longer in a client's memory.

    Parameters
    ----------
    files : sequence of Path
        In an order that does not change; at least one.

    Returns
    -------
    identity : dict
        What JSON can hold: `files` and their `bytes`, when one was last `changed`, and a `digest` of it all.

    Raises
    ------
    SynmlopsError
        If a file is not there or cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = path.write_text("one")
    >>> os.utime(path, (0, 1e9))
    >>> identity_of([path])
    {'files': 1, 'bytes': 3, 'changed': '2001-09-09T01:46:40Z', 'digest': '58deaf555c8aab2e'}
    """
    digest, n_bytes, changed = hashlib.sha256(), 0, 0
    sampled = {0, len(files) // 2, len(files) - 1}
    for number, path in enumerate(files):
        try:
            state = path.stat()
            seconds = state.st_mtime_ns // 10**9
            digest.update(f"{path.name} {state.st_size} {seconds}\n".encode())
            if number in sampled:
                digest.update(_ends_of(path))
        except OSError as error:
            raise SynmlopsError(f"{path}: {error.strerror}; check the path") from error
        n_bytes, changed = n_bytes + state.st_size, max(changed, seconds)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(changed))
    return {"files": len(files), "bytes": n_bytes, "changed": when, "digest": digest.hexdigest()[:16]}


def _ends_of(path: Path) -> bytes:
    with path.open("rb") as file:
        begin = file.read(_END_BYTES)
        file.seek(max(file.tell(), path.stat().st_size - _END_BYTES))
        return begin + file.read(_END_BYTES)


def _partial_sibling(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left beside `path`, once it is a day old."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{12}}\.(partial|old){re.escape(path.suffix)}")
    for sibling in path.parent.iterdir():
        if pattern.fullmatch(sibling.name) is None:
            continue
        with suppress(OSError):  # another process may be tidying up too
            if time.time() - sibling.stat().st_mtime < _ABANDONED_AFTER_S:
                continue
            if sibling.is_dir():
                shutil.rmtree(sibling)
            else:
                sibling.unlink()


def _swap_in(new: Path, path: Path) -> None:
    if not path.exists():
        new.replace(path)
        return
    old = path.with_name(new.name.replace(".partial", ".old"))
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _concerns(error: OSError | RuntimeError, path: Path, own: tuple[Path, ...]) -> bool:
    names = (error.filename, error.filename2) if isinstance(error, OSError) else ()  # a copy names both ends
    named = [Path(name) for name in names if isinstance(name, str | Path)]
    if not named:
        return True
    return any(
        one in (path, *path.parents) or any(one == place or place in one.parents for place in own)
        for one in named
    )
