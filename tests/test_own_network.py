"""A network of the user's own: found beside params.yaml, checked once, and refused with one message."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from synmlops.learning.networks.registry import build_network
from synmlops.params import NetworkParams, SynmlopsError

GOOD = """
from torch import nn

def build(params):
    return Net(params.deep_supervision, params.options.get("width", 4))

class Net(nn.Module):
    def __init__(self, deep, width):
        super().__init__()
        self.deep = deep
        self.body = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.Dropout(), nn.Conv3d(width, 3, 1)
        )

    def forward(self, image):
        fine = self.body(image)
        if not (self.training and self.deep):
            return fine
        return (fine, *(nn.functional.avg_pool3d(fine, (1, 2**n, 2**n)) for n in range(1, self.deep + 1)))
"""

Write = Callable[[str], str]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of a name of its own where Python finds it; give the network's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        module = f"net_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(text)
        return f"{module}:build"

    return write


def named(name: str, **more: object) -> NetworkParams:
    return NetworkParams.model_validate({"name": name, **more})


def test_it_is_built_from_the_params_and_checking_leaves_no_trace(own: Write) -> None:
    torch.manual_seed(3)
    network = build_network(named(own(GOOD), options={"width": 5}))
    after = torch.rand(1)
    torch.manual_seed(3)
    sys.modules[type(network).__module__].build(named(own(GOOD), options={"width": 5}))
    assert torch.equal(after, torch.rand(1)), "the check drew from the generator that training draws from"
    assert network.body[0].out_channels == 5
    assert network.training
    assert network.body[1].num_batches_tracked == 0
    assert torch.equal(network.body[1].running_mean, torch.zeros(5))


def test_it_may_give_coarser_levels_and_exclude_channels(own: Write) -> None:
    network = build_network(named(own(GOOD), deep_supervision=2, exclusive=True))
    levels = network(torch.randn(1, 1, 2, 16, 16))
    assert [tuple(level.shape[2:]) for level in levels] == [(2, 16, 16), (2, 8, 8), (2, 4, 4)]


TWO_CHANNELS = GOOD.replace("nn.Conv3d(width, 3, 1)", "nn.Conv3d(width, 2, 1)")
FLAT = GOOD.replace("self.body(image)", "self.body(image[:, 0])")
WHOLE_NUMBERS = GOOD.replace("self.body(image)", "self.body(image).long()")
ALWAYS_A_TUPLE = GOOD.replace("not (self.training and self.deep)", "not self.training")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import nonsense_xyz",
            r"cannot be imported: ModuleNotFoundError.*nonsense_xyz.* \(net_.*py, line 1\)",
        ),
        ("def build(:", "cannot be imported: SyntaxError"),
        ("def biuld(params): ...", r"no function 'build'; did you mean net_\w+:biuld"),
        ("build = 3", "no function 'build'; it has none"),
        ("def build(params): return {}", "gave dict, not a torch.nn.Module"),
        ("def build(): return 1", "failed: TypeError: .*positional argument"),
        ("def build(params):\n    return params.widht", r"failed: AttributeError: .*widht.*line 2\)"),
        (TWO_CHANNELS, r"gave \(1, 2, .* wanted is a tensor of \(1, 3"),
        (GOOD.replace("padding=1", "padding=0"), "gave .* in evaluation mode .* wanted is"),
        (WHOLE_NUMBERS, "gave .* int64 in evaluation mode"),
        (FLAT, r"failed on a patch of .*ValueError.*line \d+\); sizes are multiples of \(2, 16, 16\)"),
        (GOOD.replace("self.body(image)", "self.body(image) / 0"), "not finite"),
        (ALWAYS_A_TUPLE, "gave a tuple of .* in training mode"),
    ],
)
def test_what_is_wrong_with_it_is_one_message(own: Write, text: str, said: str) -> None:
    with pytest.raises(SynmlopsError, match=said):
        build_network(named(own(text)))


def test_levels_are_counted_and_must_be_smaller_by_whole_factors(own: Write) -> None:
    name = own(GOOD.replace("range(1, self.deep + 1)", "range(1, self.deep)"))
    with pytest.raises(
        SynmlopsError, match=r"in training mode .* wanted is a tuple of 3: a tensor of .* and 2 smaller"
    ):
        build_network(named(name, deep_supervision=2))


def test_a_module_that_is_not_there_says_where_to_put_it() -> None:
    with pytest.raises(SynmlopsError, match=r"no module 'my_pkg'; put my_pkg/my_net\.py beside params.yaml"):
        build_network(named("my_pkg.my_net:build"))
    with pytest.raises(SynmlopsError, match="'my_net:' names no function"):
        build_network(named("my_net:"))


def test_it_states_its_own_pooling_and_reach() -> None:
    params = named(
        "a:b", options={"total_pool_zyx": [1, 4, 4], "receptive_field_zyx": [9, 33, 33], "depth": 3}
    )
    assert params.total_pool_zyx() == (1, 4, 4)
    assert params.receptive_field_zyx() == (9, 33, 33)
    with pytest.raises(ValueError, match=r"options.total_pool_zyx: must be three numbers .* got \(1, 4\)"):
        named("a:b", options={"total_pool_zyx": [1, 4]})
    with pytest.raises(ValueError, match="residual_unet reads none, got depth"):
        named("residual_unet", options={"depth": 3})
