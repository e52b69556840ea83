"""The house as docs/architecture.md lays it out: who imports whom, and what dvc.yaml says it depends on."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "synmlops"
FLOORS = (  # from the ground up; a room may import its own floor's modules and those below
    ("section", "network_params", "learning_params", "params", "explain", "layout", "progress"),
    ("volumes",),
    ("blockwise",),
    ("learning", "synapses", "view"),
    ("tracking",),
    ("serving",),
    ("tuning",),
    ("stages",),
    ("cli",),
    ("__main__",),
)
ONLY_IN = {
    "torch": {"learning", "serving"},
    "safetensors": {"learning", "serving"},
    "mlflow": {"tracking", "serving"},
    "dask": {"blockwise"},
    "neuroglancer": {"view"},
    "distributed": {"blockwise"},
}
WATCHED_BY_NO_STAGE = ("tracking", "serving", "cli", "progress", "explain")  # cannot change a stage's outputs
MODULES = sorted(PACKAGE.rglob("*.py"))


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _path_of(module: str) -> Path | None:
    stem = ROOT / module.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()), None)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    room = _room(_name(path))
    if room == "__init__":
        assert not [name for name in _imports(path) if name.startswith("synmlops")]
        return
    for name in _imports(path):
        if not name.startswith("synmlops."):
            continue
        other = _room(name)
        beside = floor[other] == floor[room] and other != room and floor[room] > 0
        assert floor[other] <= floor[room], f"{_name(path)} imports {name} from above"
        assert not beside, f"{_name(path)} imports {name} from the room beside"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in _imports(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        assert rooms is None or _room(_name(path)) in rooms, f"{_name(path)} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    """They run too seldom to notice that something has moved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("synmlops"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or _path_of(f"{node.module}.{alias.name}")


def test_stages_do_not_import_each_other() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        others = [name for name in _imports(path) if name.startswith("synmlops.stages")]
        assert not others, f"{path.name} imports {others}"


def _modules_that_can_change(stage: str) -> set[str]:
    """Follow the imports of a stage through the package."""
    seen: set[Path] = set()
    todo = [PACKAGE / "stages" / f"{stage}.py"]
    while todo:
        path = todo.pop()
        if path in seen or _room(_name(path)) in WATCHED_BY_NO_STAGE:
            continue
        seen.add(path)
        todo += [found for name in _imports(path) if (found := _path_of(name)) is not None]
    compiled = {source for path in seen for source in _sources_named_in(path)}
    return {str(path.relative_to(ROOT)) for path in seen | compiled if path.name != "__init__.py"}


def _sources_named_in(path: Path) -> Iterator[Path]:
    """Give the C++ files beside a module that it names."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".cpp")
        if named and path.with_name(node.value).is_file():
            yield path.with_name(node.value)


@pytest.mark.parametrize("pipeline", ["dvc.yaml", "examples/vnc/dvc.yaml"])
@pytest.mark.parametrize("stage", ["prepare", "train", "infer", "evaluate"])
def test_dvc_watches_the_code_that_can_change_a_stage(pipeline: str, stage: str) -> None:
    path = ROOT / pipeline
    deps = yaml.safe_load(path.read_text())["stages"][stage]["deps"]
    resolved = [(path.parent / dep).resolve() for dep in deps]
    watched = {str(dep.relative_to(ROOT)) for dep in resolved if PACKAGE in dep.parents}
    assert watched == _modules_that_can_change(stage)


@pytest.mark.parametrize("pipeline", ["dvc.yaml", "examples/vnc/dvc.yaml"])
def test_dvc_watches_every_section_of_the_params(pipeline: str) -> None:
    path = ROOT / pipeline
    stages = yaml.safe_load(path.read_text())["stages"].values()
    watched = [name for stage in stages for name in stage["params"]]
    params = yaml.safe_load((path.parent / "params.yaml").read_text())
    assert sorted(watched) == sorted(params)
