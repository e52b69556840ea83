"""Serves a viewer state on one address until the process is told to end."""

import errno
import ipaddress
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import neuroglancer

from synmlops.params import SynmlopsError


@contextmanager
def served(state: Any, *, bind: str, port: int) -> Iterator[str]:
    """Serve a state; give the URL, whose token is the key to it.

    Parameters
    ----------
    state : neuroglancer.ViewerState
    bind : str
        Address to listen on, and no other.
    port : int
        0 takes a free one.

    Raises
    ------
    SynmlopsError
        If the port is in use or may not be taken, or the address is none of this machine.
    """
    _try_to_listen(bind, port)
    neuroglancer.set_server_bind_address(bind, port)
    # without credentials: the page could otherwise ask for those of the user's cloud account
    viewer = neuroglancer.Viewer(allow_credentials=False)
    try:
        viewer.set_state(state)
        yield _url(viewer.get_viewer_url(), bind)
    finally:
        neuroglancer.stop()


def wait_for_end(ready: Callable[[], None]) -> None:
    """Wait for SIGINT or SIGTERM; `ready` is called once they end this in order."""
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        ready()
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_browser(url: str) -> bool:
    """Open a page in a browser with a window; False if there is none: one of text would take the terminal."""
    windows = not sys.platform.startswith("linux") or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return windows and webbrowser.open(url)


def is_local(bind: str) -> bool:
    """Say whether only this machine reaches an address.

    Examples
    --------
    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"


def _url(url: str, bind: str) -> str:
    """Put an IPv6 address in brackets, which neuroglancer leaves out."""
    return url.replace(f"//{bind}:", f"//[{bind}]:") if ":" in bind else url


def _try_to_listen(bind: str, port: int) -> None:
    """Refuse an address before neuroglancer tries it, which leaves a socket open where it fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as error:
        raise _refused(error, bind, port) from error


def _refused(error: OSError, bind: str, port: int) -> SynmlopsError:
    if error.errno == errno.EADDRINUSE:
        return SynmlopsError(f"--port {port}: is in use; give another, or 0 for a free one")
    if error.errno == errno.EACCES:
        return SynmlopsError(f"--port {port}: may not be taken; give one from 1024 on, or 0 for a free one")
    return SynmlopsError(f"--bind {bind}: cannot listen there ({error}); give an address of this machine")
