"""Where chunked volumes are: folders, web servers and buckets, through tensorstore's key-value stores.

Everything here ends: a server that is away is asked a few times, and one that goes silent is given up.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore as ts

from synmlops.params import SynmlopsError
from synmlops.volumes.chunk_headers import FORMATS, ZARR_HEADERS, bare_address
from synmlops.volumes.files import identity_of

STALLED_AFTER_S = 60.0
"""A server of which no answer, be it a chunk, has come whole for so long is given up."""

_REMOTE = ("http://", "https://", "gs://", "s3://")
# tensorstore's own 32 tries with up to 32 s between them would take a quarter of an hour to say that a server
# is away; these take ten seconds. Its http driver knows no time limit: see `Place.wait`.
_RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}
_CONTEXT = {
    "cache_pool": {"total_bytes_limit": 128 << 20},  # a chunk spans slabs, and is decoded once for them
    "http_request_retries": _RETRIES,
    "gcs_request_retries": _RETRIES,
    "s3_request_retries": _RETRIES,
}
_FAILURES = (
    ValueError,
    IndexError,
    NotImplementedError,
    OSError,
)  # what tensorstore raises; TimeoutError too


class Place:
    """A folder that holds a chunked volume or a part of one, here or on a server."""

    def __init__(self, source: str, *, context: Any = None) -> None:
        """Take a path or URL, with a format before it or not: `precomputed://gs://bucket/volume`."""
        every = (*ZARR_HEADERS, "attributes.json", "info")
        self.formats = FORMATS.get(source.partition("://")[0], every)
        self.address = bare_address(source)
        self.remote = self.address.startswith(_REMOTE)
        if "://" in self.address and not self.remote:
            raise SynmlopsError(
                f"{source}: unknown kind of address; give a path or one that begins with {', '.join(_REMOTE)}"
            )
        if self.remote:
            self.address = self.address.rstrip("/")
        else:
            self.address = str(Path(self.address).absolute())
        self.context = context or ts.Context(_CONTEXT)

    def __truediv__(self, path: str) -> "Place":
        inner = Place(f"{self.address}/{path}", context=self.context)
        inner.formats = self.formats
        return inner

    def parents(self, depth: int) -> Iterator[tuple["Place", str]]:
        """Give the folders above, and the path from each to here; a server's root is the last."""
        at, path = self, ""
        for _ in range(depth):
            above, _, last = at.address.rpartition("/")
            if not last or above.endswith(":/") or not above:
                return
            path = f"{last}/{path}".rstrip("/")
            at = Place(above, context=self.context)
            at.formats = self.formats
            yield at, path

    @property
    def kvstore(self) -> Any:
        """The store as JSON, as tensorstore's drivers take it."""
        if not self.remote:
            return {"driver": "file", "path": f"{self.address}/"}
        return ts.KvStore.Spec(f"{self.address}/").to_json()

    def headers(self, name: str) -> dict[str, Any]:
        """Read the headers that are there, as JSON by file name.

        A bucket may forbid to ask for what is not there, so a refusal counts only if no header could be read.

        Raises
        ------
        SynmlopsError
            If the server is away, nothing may be read, or a header is damaged.
        """
        with plain_errors(name):
            store = self.wait(ts.KvStore.open(self.kvstore, context=self.context))
            asked = {header: store.read(header) for header in self.formats}
        found, refused = {}, None
        for header, future in asked.items():
            try:
                with plain_errors(name):
                    result = self.wait(future)
            except Forbidden as error:
                refused = error
                continue
            if result.state == "value":
                found[header] = _json(f"{name}: {header}", result.value)
        if refused is not None and not found:
            raise refused
        return found

    def identity(self, name: str) -> dict[str, Any]:
        """Tell the headers that are there from others; of a server's, by what they say alone.

        Raises
        ------
        SynmlopsError
            As `headers`.
        """
        headers = self.headers(name)
        if not self.remote:
            return identity_of([Path(self.address) / header for header in headers])
        text = json.dumps(headers, sort_keys=True)
        return {"files": len(headers), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def wait(self, future: Any) -> Any:
        """Give a future's result.

        Raises
        ------
        TimeoutError
            If no answer of a server has come whole for `STALLED_AFTER_S`.
        """
        if not self.remote:
            return future.result()
        before = _bytes_read()
        while True:
            try:
                return future.result(timeout=STALLED_AFTER_S)
            except TimeoutError:
                now = _bytes_read()
                if now == before:
                    future.cancel()
                    raise
                before = now

    def arrays(self, headers: dict[str, Any]) -> list[str]:
        """List the arrays below a group; on a server only those that the group's header lists."""
        if self.remote:
            listed = headers.get("zarr.json", {}).get("consolidated_metadata") or {}
            nodes = listed.get("metadata", {})
            return sorted(path for path, node in nodes.items() if node.get("node_type") == "array")
        found = []
        for folder, names, files in os.walk(self.address):
            if _holds_array(Path(folder), files):
                found.append(Path(folder).relative_to(self.address).as_posix())
                names.clear()  # its chunks, of which there may be millions
        return sorted(found)


class Forbidden(SynmlopsError):
    """A place may not be read."""


@contextmanager
def plain_errors(name: str, part: str = "") -> Iterator[None]:
    """Turn what tensorstore raises into one SynmlopsError that names the volume and the part read."""
    try:
        yield
    except _FAILURES as error:
        # The status code, then words, then details in brackets: the whole specification of the store.
        text = " ".join(re.sub(r"\s*\[[\w ]+='.*", "", str(error), flags=re.DOTALL).split())
        code, _, words = text.partition(": ")
        if isinstance(error, TimeoutError):
            raise SynmlopsError(
                f"{name}: no answer of its server came for {STALLED_AFTER_S:g} s; check the network"
            ) from error
        if code in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise SynmlopsError(
                f"{name}: its server fails or does not answer ({words}); check the address and the network"
            ) from error
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or "os_error_code='13'" in str(error):
            raise Forbidden(
                f"{name}: may not be read ({words}); check the address, its permissions and your credentials"
            ) from error
        what = f"{part} is truncated or damaged" if part else "is damaged or of an unknown form"
        raise SynmlopsError(f"{name}: {what} ({words or text}); copy or make it again") from error


def _json(name: str, content: bytes) -> Any:
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise SynmlopsError(f"{name} is damaged ({error}); copy or make it again") from error
    if not isinstance(tree, dict):
        raise SynmlopsError(f"{name} is damaged (no JSON object); copy or make it again")
    return tree


def _holds_array(folder: Path, files: Sequence[str]) -> bool:
    if ".zarray" in files:
        return True
    for name, key in (("zarr.json", "chunk_grid"), ("attributes.json", "blockSize")):
        if name in files and f'"{key}"' in (folder / name).read_text(errors="replace"):
            return True
    return False


def _bytes_read() -> int:
    """Count what has come from all stores of this process; while one receives, others wait with it."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(
        value["value"] for one in metrics if one["name"].endswith("/bytes_read") for value in one["values"]
    )
