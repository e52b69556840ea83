"""Where a result comes from: project root, store, git commit, DVC experiment, machine.

Nothing here imports MLflow, so that a command can tell where records go without the seconds that takes.
"""

import getpass
import os
import re
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import synmlops

STATE_FOLDER = ".synmlops"
EMBEDDED = f"sqlite:///{STATE_FOLDER}/mlflow.db"
UNKNOWN = "unknown"
_WRITTEN_BY_DVC = ("dvc.lock", "params.yaml")  # what they hold is in the run itself
_GIT_SECONDS = 20


@dataclass(frozen=True)
class Lineage:
    """The state of code and machine when a stage began; "unknown" where it cannot be told."""

    commit: str
    dirty: bool  # code differs from the commit; params.yaml and dvc.lock do not count
    dvc_experiment: str | None
    host: str
    user: str
    version: str
    changed: tuple[str, ...] = field(default=())  # the files that make it dirty

    def tags(self) -> dict[str, str]:
        """Give the MLflow tags of this lineage; the `mlflow.` ones fill columns of its UI."""
        tags = {
            "mlflow.user": self.user,
            "mlflow.source.name": "synmlops",
            "mlflow.source.type": "PROJECT",
            "synmlops.commit": self.commit,
            "synmlops.dirty": str(self.dirty).lower(),
            "synmlops.host": self.host,
            "synmlops.version": self.version,
        }
        if self.commit != UNKNOWN:
            tags["mlflow.source.git.commit"] = self.commit
        if self.changed:
            tags["synmlops.dirty_files"] = ", ".join(self.changed)[:4000]
        if self.dvc_experiment:
            tags["synmlops.dvc_experiment"] = self.dvc_experiment
        return tags


def project_root(folder: Path | None = None) -> Path:
    """Give the folder that holds `.synmlops`: the same one inside and outside of `dvc repro`.

    `DVC_ROOT` where set (DVC sets it for every stage; in an experiment that runs in a temporary folder
    it names the real project), else the nearest folder from `folder` (default: here) upwards with a
    `.dvc`, else the nearest with dvc.yaml or params.yaml, else `folder` itself.
    """
    given = os.environ.get("DVC_ROOT")
    if given:
        return Path(given).resolve()
    here = (folder or Path.cwd()).resolve()
    lineage_up = (here, *here.parents)
    for names in ((".dvc",), ("dvc.yaml", "params.yaml")):
        for place in lineage_up:
            # a `.dvc` without config is a site cache (in a home folder), not a project
            if any((place / name / "config" if name == ".dvc" else place / name).is_file() for name in names):
                return place
    return here


def state_folder(root: Path) -> Path:
    """Give ROOT/.synmlops: metric files, resume checkpoints, the embedded store; never in git or DVC."""
    return root / STATE_FOLDER


def tracking_uri(root: Path) -> str:
    """Give the MLflow store: `MLFLOW_TRACKING_URI` if set, else SQLite under the project root."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return given or f"sqlite:///{state_folder(root) / 'mlflow.db'}"


def is_embedded(uri: str, root: Path) -> bool:
    """Whether `uri` is the SQLite store under the project root, which needs no server."""
    return uri == f"sqlite:///{state_folder(root) / 'mlflow.db'}"


def public_uri(uri: str, root: Path) -> str:
    """Give a store's address fit for a file that is shared: no credentials, no path of this machine.

    Examples
    --------
    >>> public_uri("https://ann:secret@mlflow.lab.org/path?token=x", Path("/p"))
    'https://mlflow.lab.org/path'
    >>> public_uri("sqlite:////p/.synmlops/mlflow.db", Path("/p"))
    'sqlite:///.synmlops/mlflow.db'
    """
    if is_embedded(uri, root):
        return EMBEDDED
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri.split("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def ui_command(root: Path) -> str:
    """Give the one line that opens the MLflow UI on this project's runs: a command or an address."""
    uri = tracking_uri(root)
    if urlsplit(uri).scheme in ("http", "https"):
        return f"open {public_uri(uri, root)}"
    shown = EMBEDDED if is_embedded(uri, root) and Path.cwd() == root else uri
    return f"MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri {shown}"


def experiment_name() -> str:
    """Give the MLflow experiment that runs go to: `MLFLOW_EXPERIMENT_NAME`, else "synmlops"."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or "synmlops"


def read_lineage(folder: Path | None = None) -> Lineage:
    """Read commit, changed files, DVC experiment and machine; asks git in `folder` (default: here)."""
    here = folder or Path.cwd()
    commit = _git(here, "rev-parse", "HEAD") or os.environ.get("DVC_EXP_BASELINE_REV") or UNKNOWN
    status = _git(here, "status", "--porcelain", "--untracked-files=all", "--ignore-submodules=dirty")
    changed = changed_code((status or "").splitlines())
    return Lineage(
        commit=commit.strip(),
        dirty=bool(changed),
        changed=changed,
        dvc_experiment=os.environ.get("DVC_EXP_NAME") or None,
        host=socket.gethostname() or UNKNOWN,
        user=_user(),
        version=synmlops.__version__,
    )


def changed_code(status: Iterable[str]) -> tuple[str, ...]:
    """Pick from `git status --porcelain` what makes a result differ from its commit.

    Tracked files that changed and new Python files. Not dvc.lock and params.yaml: DVC rewrites them in
    every experiment, and what they hold stands in the run as hashes and params.

    Examples
    --------
    >>> changed_code([" M synmlops/cli/tools.py", " M params.yaml", "?? notes.txt", "?? synmlops/new.py"])
    ('synmlops/cli/tools.py', 'synmlops/new.py')
    """
    changed = []
    for line in status:
        state, path = line[:2], line[3:].strip().strip('"')
        if path.rpartition("/")[2] in _WRITTEN_BY_DVC or (state == "??" and not path.endswith(".py")):
            continue
        changed.append(path)
    return tuple(changed)


def tag_name(name: str) -> str:
    """Make a name that MLflow takes as (part of) a tag key.

    Examples
    --------
    >>> tag_name("data/prepared/fold (1).h5")
    'data/prepared/fold _1_.h5'
    """
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:200]


def _git(folder: Path, *arguments: str) -> str | None:
    """Ask git without taking its index lock; None without git, a repository or a first commit."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without an entry in its password file
        return UNKNOWN
