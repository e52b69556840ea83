import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from synmlops.learning.checkpoint import (
    Model,
    ModelMeta,
    load_model,
    load_outline,
    load_state,
    read_meta,
    save_model,
    save_state,
)
from synmlops.learning.networks.registry import NETWORKS, build_network
from synmlops.params import NetworkParams, SynmlopsError

Load = Callable[[Path], Model]
NETWORK = NetworkParams(widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((1, 2, 2),), norm="batch")
META = ModelMeta(
    network=NETWORK,
    channels=("union",),
    mean=1 / 3,
    std=17.123456789012345,
    voxel_nm=(40.0, 4.6, 4.6),
    run_key="abc",
    fold="2",
    step=40,
    score=2 / 3,
    threshold=0.1,
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = build_network(NETWORK)
    network(torch.randn(2, 1, 2, 8, 8))  # moves the running statistics
    return network.state_dict()


@pytest.fixture
def path(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    save_model(tmp_path / "model.safetensors", weights, META)
    return tmp_path / "model.safetensors"


def test_model_comes_back_bit_by_bit(path: Path, weights: dict[str, Tensor]) -> None:
    model = load_model(path)
    loaded = model.network.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert {name: value.dtype for name, value in loaded.items()} == {n: v.dtype for n, v in weights.items()}
    assert model.meta == META == read_meta(path)
    assert not model.network.training


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, path: Path, weights: dict[str, Tensor]) -> None:
    save_model(tmp_path / "again.safetensors", dict(reversed(weights.items())), META)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_model_files_hold_no_pickle(path: Path) -> None:
    content = path.read_bytes()
    assert not zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"unknown|opcode|exhausted"):
        list(pickletools.genops(content))
    header = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"
    tensors = sum(v.numel() * 4 for v in load_model(path).network.state_dict().values())
    assert len(content) == 8 + header + tensors  # a JSON header and numbers, nothing else


def _write_foreign(path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)


@pytest.mark.parametrize("load", [load_model, load_outline])
def test_every_broken_model_file_is_one_message(path: Path, tmp_path: Path, load: Load) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for n in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:n])
        with pytest.raises(SynmlopsError, match=r"cut.safetensors: not a complete safetensors file"):
            load(cut)
    with pytest.raises(SynmlopsError, match=r"no.safetensors: no such model; run `synmlops train`"):
        load(tmp_path / "no.safetensors")
    with pytest.raises(SynmlopsError, match="not a complete safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_somebody_else(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    _write_foreign(tmp_path / "other.safetensors", metadata)
    with pytest.raises(SynmlopsError, match=r"other.safetensors: has no synmlops header"):
        load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize("header", ["{", "{}", '{"network": 1}', META.model_dump_json()[:-1] + ', "new": 1}'])
def test_header_of_another_version(tmp_path: Path, header: str) -> None:
    _write_foreign(tmp_path / "old.safetensors", {"synmlops": header})
    with pytest.raises(SynmlopsError, match=r"old.safetensors: its header is of another version") as caught:
        read_meta(tmp_path / "old.safetensors")
    assert "\n" not in str(caught.value)
    assert "errors.pydantic.dev" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_outline])
def test_weights_that_do_not_fit_their_network(
    tmp_path: Path, weights: dict[str, Tensor], load: Load
) -> None:
    wider = META.model_copy(update={"network": NETWORK.model_copy(update={"widths": (4, 8)})})
    save_model(tmp_path / "a.safetensors", weights, wider)
    with pytest.raises(SynmlopsError, match=r"a.safetensors: the weights do not fit"):
        load(tmp_path / "a.safetensors")
    weights.pop("head.bias")
    save_model(tmp_path / "a.safetensors", weights, META)
    with pytest.raises(SynmlopsError, match=r"a.safetensors: the weights do not fit"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", NETWORKS)
def test_an_outline_is_the_model_without_its_weights(tmp_path: Path, name: str) -> None:
    network = NETWORK.model_copy(update={"name": name, "stem_zyx": (1, 1, 1)})
    made = META.model_copy(update={"network": network})
    save_model(tmp_path / "a.safetensors", build_network(made.network).state_dict(), made)
    outline, model = load_outline(tmp_path / "a.safetensors"), load_model(tmp_path / "a.safetensors")
    assert outline.meta == model.meta
    assert {value.device.type for value in outline.network.state_dict().values()} == {"meta"}
    shapes = [
        {key: value.shape for key, value in one.network.state_dict().items()} for one in (outline, model)
    ]
    assert shapes[0] == shapes[1]


def test_unwritable_place_leaves_the_earlier_model(path: Path, weights: dict[str, Tensor]) -> None:
    before = path.read_bytes()
    with pytest.raises(SynmlopsError, match=r"is a file|cannot be written"):
        save_model(path / "below.safetensors", weights, META)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_state_comes_back(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    state = {"network": weights, "progress": {"step": 3, "best_score": None, "history": [{"loss": 0.1}]}}
    save_state(tmp_path / "deep" / "state.pt", state)
    loaded = load_state(tmp_path / "deep" / "state.pt")
    assert loaded is not None
    assert loaded["progress"] == state["progress"]
    assert all(torch.equal(loaded["network"][name], weights[name]) for name in weights)
    assert load_state(tmp_path / "no.pt") is None


class Evil:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_a_state_file_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"network": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(SynmlopsError, match=r"evil.pt: broken checkpoint .*delete it to start over"):
        load_state(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_broken_state_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"a": torch.zeros(1000)})
    whole = path.read_bytes()
    for content in (b"", b"garbage", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(SynmlopsError, match=r"state.pt: broken checkpoint") as caught:
            load_state(path)
        assert "\n" not in str(caught.value)
