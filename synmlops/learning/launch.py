"""Several processes from one command: torch's elastic launcher, and how a worker says why it stopped."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from synmlops.params import SynmlopsError

_STOP_FILE = "SYNMLOPS_STOP_FILE"
MAX_RESTARTS = 3
"""How often a group is started again after a worker died; it goes on from its last checkpoint."""


def is_worker() -> bool:
    """Whether torchrun, or our own launcher, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(n_processes: int, argv: Sequence[str]) -> None:
    """Run `python -m synmlops ARGV` in several processes under torch's elastic launcher.

    A worker that dies has the whole group started again. An error that a user can mend is raised here, once.

    Raises
    ------
    SynmlopsError
        If a worker met one, or the group died more often than `MAX_RESTARTS`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    _silence("torch.distributed.elastic")  # what matters is said below, or by the workers themselves
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    options = ["--standalone", f"--nproc-per-node={n_processes}", f"--max-restarts={MAX_RESTARTS}"]
    with TemporaryDirectory(prefix="synmlops-") as folder:
        stop_file = Path(folder) / "stop"
        os.environ[_STOP_FILE] = str(stop_file)
        try:
            run(get_args_parser().parse_args([*options, "-m", "synmlops", *argv]))  # type: ignore[no-untyped-call]
        except SignalException as error:  # Ctrl-C, or whoever ends jobs here; the workers have been ended
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            if stop_file.exists():
                raise SynmlopsError(stop_file.read_text()) from None
            rank, failure = error.get_first_failure()
            raise SynmlopsError(
                f"process {rank} ended with exit code {failure.exitcode}, after {MAX_RESTARTS} restarts of "
                "the group; its own message stands above. The same command goes on from the last checkpoint"
            ) from None
        finally:
            del os.environ[_STOP_FILE]


def _silence(package: str) -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def restarts_so_far() -> int:
    """How often this worker's group was started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def tell_launcher(error: SynmlopsError) -> bool:
    """Leave the reason of a worker's end for `launch` to raise; False if nobody waits for it."""
    path = os.environ.get(_STOP_FILE)
    if not is_worker() or path is None:
        return False
    Path(path).write_text(str(error))
    return True


def leave_crash(crash: str) -> None:
    """Note a worker's crash and where; the same one again is no accident, and all must stop.

    Without our launcher nobody starts the group again, and nothing is noted.
    """
    path = os.environ.get(_STOP_FILE)
    if not is_worker() or path is None:
        return
    note = Path(path).with_name("crash")
    if note.exists() and note.read_text() == crash:
        Path(path).write_text(
            f"a worker ended twice with {crash}; its traceback stands above. That is no accident, so the "
            "group is not started again"
        )
    note.write_text(crash)


def leave_if_stopped() -> None:
    """End a worker that was started again although another has said why all must stop."""
    path = os.environ.get(_STOP_FILE)
    if path is not None and Path(path).exists():
        raise SystemExit(2)
