"""The code that travels with a registered model: this package's, and that of a network of the user's own."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from synmlops.params import SynmlopsError
from synmlops.serving.sources import MODEL_CODE, copy_code, requirements, sources_of

BUILT_IN = "residual_unet"
Write = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write modules into a folder where Python finds them."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "beside" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "beside")
        return tmp_path / "beside"

    return write


def test_the_code_that_travels_is_what_serving_imports_and_no_more() -> None:
    package = MODEL_CODE.parents[1]
    names = {source.file.relative_to(package).as_posix() for source in sources_of(BUILT_IN)}
    needed = {"__init__.py", "params.py", "learning/predict.py", "serving/pyfunc.py"}
    networks = {f"learning/networks/{name}" for name in ("registry.py", "light_unet.py", "kernels.cpp")}
    assert needed | networks <= names
    rooms = {name.partition("/")[0] for name in names if "/" in name}
    assert rooms == {"learning", "serving", "volumes"}
    assert "serving/registry.py" not in names


def test_requirements_are_exact_pins_of_what_is_installed() -> None:
    pins = dict(pin.split("==") for pin in requirements(BUILT_IN))
    assert {"mlflow", "numpy", "pandas", "pydantic", "pyyaml", "safetensors", "torch"} <= set(pins)
    assert not {"dvc", "typer", "matplotlib", "scikit-learn", "mlflow-skinny"} & set(pins)
    assert pins["torch"] == torch.__version__.partition("+")[0]


def test_a_users_module_brings_its_package_and_what_that_imports(beside: Write, tmp_path: Path) -> None:
    beside(
        {
            "a_pkg/__init__.py": "",
            "a_pkg/deep/__init__.py": "",
            "a_pkg/deep/net.py": "from ..parts import block\nimport a_beside, psutil, synmlops.only_beside",
            "a_pkg/parts.py": "block = 1",
            "a_pkg/lazily_imported.py": "",
            "a_beside.py": "from a_further import thing",
            "a_further/__init__.py": "thing = 1",
            "unrelated.py": "import matplotlib",
            "parts.py": "",
            "synmlops/only_beside.py": "",  # as in a checkout of this package, which must not replace it
        }
    )  # fmt: skip
    network = "a_pkg.deep.net:build"
    top = copy_code(tmp_path / "code", network)
    assert [path.name for path in top] == ["a_beside.py", "a_further", "a_pkg", "synmlops"]
    brought = {path.relative_to(tmp_path / "code").as_posix() for path in (tmp_path / "code").rglob("*.py")}
    own = {name for name in brought if not name.startswith("synmlops/")}
    assert own == {
        "a_pkg/__init__.py",
        "a_pkg/deep/__init__.py",
        "a_pkg/deep/net.py",
        "a_pkg/parts.py",
        "a_pkg/lazily_imported.py",
        "a_beside.py",
        "a_further/__init__.py",
    }
    assert "synmlops/params.py" in brought
    assert "synmlops/only_beside.py" not in brought
    pins = {pin.partition("==")[0] for pin in requirements(network)}
    assert "psutil" in pins
    assert not {"matplotlib", "a_pkg", "a_beside"} & pins


def test_a_folder_without_init_and_a_network_in_a_packages_init_come_along(
    beside: Write, tmp_path: Path
) -> None:
    beside({"b_plain/net.py": "", "b_other.py": "", "c_pkg/__init__.py": "", "c_pkg/more.py": ""})
    assert {path.name for path in copy_code(tmp_path / "one", "b_plain.net:build")} == {"b_plain", "synmlops"}
    assert {path.name for path in copy_code(tmp_path / "two", "c_pkg:build")} == {"c_pkg", "synmlops"}


def test_an_installed_network_is_pinned_not_copied(tmp_path: Path) -> None:
    assert [path.name for path in copy_code(tmp_path / "code", "rich.table:Table")] == ["synmlops"]
    assert any(pin.startswith("rich==") for pin in requirements("rich.table:Table"))


def test_what_is_no_python_file_cannot_come_along() -> None:
    with pytest.raises(SynmlopsError, match=r"network.name: _ctypes_none is no Python file \(None\)"):
        sources_of("_ctypes_none:build")
    with pytest.raises(SynmlopsError, match=r"network.name: sys is no Python file"):
        sources_of("sys:build")
