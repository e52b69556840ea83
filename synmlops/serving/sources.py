"""The code that a registered model needs: of this package, and of a network of the user's own."""

import ast
import importlib.metadata
import importlib.util
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import synmlops
from synmlops.section import SynmlopsError

_PACKAGE = Path(synmlops.__file__).parent
MODEL_CODE = _PACKAGE / "serving" / "model_code.py"


@dataclass(frozen=True)
class Source:
    """A Python file and the folder from which it is imported."""

    file: Path
    root: Path

    @property
    def place(self) -> Path:
        """Where it lies below its root."""
        return self.file.relative_to(self.root)


def sources_of(network: str) -> list[Source]:
    """Give the files that a served model imports, itself and through others, and C++ code beside them.

    Parameters
    ----------
    network : str
        Name of the model's network. For one of the user's own, `my_pkg.my_net:build`, its module comes along
        with the rest of its package and the modules beside it that these import; an installed package does
        not, since `requirements` pins it.

    Raises
    ------
    SynmlopsError
        If the user's module has no Python file that could come along.
    """
    ours = _PACKAGE.parent
    found = _closure([Source(MODEL_CODE, ours)])
    found |= {Source(file, ours) for source in found for file in source.file.parent.glob("*.cpp")}
    module, colon, _ = network.partition(":")
    if colon and not _is_installed(module):
        found |= _closure(list(_own_sources(module)))
    return sorted(found - {Source(MODEL_CODE, ours)}, key=lambda source: source.place)  # MLflow copies that


def copy_code(folder: Path, network: str) -> list[Path]:
    """Copy the files of `sources_of` below a folder; give what then lies at its top."""
    for source in sources_of(network):
        target = folder / source.place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file, target)
    return sorted(folder.iterdir())


def requirements(network: str) -> list[str]:
    """Give a pin for each distribution that the code imports, at the version that is installed here.

    A build's local label (`+cpu`) is left out: the model runs on other builds too, and an index may not have
    this one.
    """
    sources = sources_of(network)
    own = {source.place.parts[0].removesuffix(".py") for source in sources}
    python = [source for source in sources if source.file.suffix == ".py"]
    modules = {name.partition(".")[0] for source in python for name in imports_of(source)}
    module, colon, _ = network.partition(":")
    if colon:
        modules.add(module.partition(".")[0])
    providers = importlib.metadata.packages_distributions()
    pins = set()
    for name in modules - set(sys.stdlib_module_names) - own:
        distributions = providers.get(name, [])  # mlflow-skinny too provides `mlflow`
        for one in [name] if name in distributions else distributions:
            pins.add(f"{one.lower()}=={importlib.metadata.version(one).partition('+')[0]}")
    return sorted(pins)


def imports_of(source: Source) -> set[str]:
    """Give the dotted names a file imports, at its top or inside of functions; `from a import b` gives a.b.

    Relative imports are left out: this package has none, and a user's package comes along as a whole.

    Examples
    --------
    >>> sorted(imports_of(Source(MODEL_CODE, MODEL_CODE.parents[2])))
    ['mlflow.models.set_model', 'synmlops.serving.pyfunc.SynapseModel']
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _closure(waiting: list[Source]) -> set[Source]:
    found: set[Source] = set()
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += [one for name in imports_of(source) for one in _sources_below(source.root, name)]
    return found


def _sources_below(root: Path, name: str) -> list[Source]:
    """Give the files below a root that importing a dotted name runs; none if it is found elsewhere."""
    if root != _PACKAGE.parent and name.partition(".")[0] == _PACKAGE.name:
        return []  # beside the user's module, in a checkout of this package
    files, place = [], root
    for part in name.split("."):
        module, package = place / f"{part}.py", place / part / "__init__.py"
        found = next((file for file in (package, module) if file.is_file()), None)
        if found is not None:
            files.append(Source(found, root))
        place /= part
        if found == module or not place.is_dir():
            break  # what follows is a name inside the module
    return files


def _own_sources(module: str) -> Iterator[Source]:
    """Give the files of the package that holds the user's module, or the module alone."""
    spec = importlib.util.find_spec(module)
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    if file is None or file.suffix != ".py" or not file.is_file():
        raise SynmlopsError(
            f"network.name: {module} is no Python file ({file}), so the registered model could not bring it "
            "along; put its source beside params.yaml, or install it as a package"
        )
    depth = module.count(".") + (file.name == "__init__.py")
    root = file.parents[depth]
    top = root / module.partition(".")[0]
    files = sorted(top.rglob("*.py")) if top.is_dir() else [file]
    yield from (Source(one, root) for one in files)


def _is_installed(module: str) -> bool:
    """Whether pip put a module's files where it puts packages; an editable install leaves them elsewhere."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    places = [
        *site.getsitepackages(),
        site.getusersitepackages(),
        *map(sysconfig.get_path, ("purelib", "platlib")),
    ]
    return any(Path(spec.origin).is_relative_to(place) for place in places)
