"""The alarm of a channel that says nothing: when it sounds, and when it does not."""

import pytest
import torch
from torch import Tensor

from synmlops.learning import alarms
from synmlops.learning.alarms import CollapseWatch
from synmlops.learning.distributed import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, n_ranks=1, device=CPU)


def _patches(*, on: float, elsewhere: float, foreground: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Give logits, targets and mask of 64 voxels; `post` says what is asked, pre and union are good."""
    targets = torch.zeros(1, 3, 4, 4, 4)
    targets.flatten(2)[:, :, :foreground] = 1
    said = torch.where(targets > 0, 0.9, 0.1)
    said[:, 1] = torch.where(targets[:, 1] > 0, on, elsewhere)
    return torch.logit(said), targets, torch.ones_like(targets)


def _after(steps: int, watch: CollapseWatch, *, first: int = 10, **patch: float) -> list[str]:
    heard = []
    for step in range(first, first + steps, 10):
        watch.add(*_patches(**patch))  # type: ignore[arg-type]
        heard += watch.judge(step, 10, ranks=ALONE)
    return heard


@pytest.mark.parametrize(
    "patch",
    [{"on": 1e-4, "elsewhere": 1e-4}, {"on": 0.12, "elsewhere": 0.12}, {"on": 0.15, "elsewhere": 0.01}],
)
def test_a_channel_that_says_nothing_is_named_once_and_so_is_its_recovery(patch: dict[str, float]) -> None:
    watch = CollapseWatch(CPU)
    assert _after(190, watch, **patch) == []
    [message] = _after(400, watch, first=200, **patch)
    assert message.startswith("post: predicts nothing since step 1 (step 200")
    assert f"{patch['on']:.3f} on foreground, {patch['elsewhere']:.3f} elsewhere" in message
    assert _after(10, watch, first=600, on=0.6, elsewhere=0.1) == ["post: recovered at step 600"]
    assert _after(190, watch, first=610, **patch) == []


@pytest.mark.parametrize("patch", [{"on": 0.3, "elsewhere": 0.05}, {"on": 0.15, "elsewhere": 0.6}])
def test_a_channel_that_says_something_or_too_much_has_not_collapsed(patch: dict[str, float]) -> None:
    assert _after(1000, CollapseWatch(CPU), **patch) == []


def test_without_foreground_nothing_is_told_from_silence() -> None:
    watch = CollapseWatch(CPU)
    assert _after(1000, watch, on=0.0, elsewhere=1e-4, foreground=0) == []
    assert _after(190, watch, on=1e-4, elsewhere=1e-4) == []
    assert _after(500, watch, on=0.0, elsewhere=1e-4, foreground=0) == []  # neither counted nor forgotten
    assert len(_after(10, watch, on=1e-4, elsewhere=1e-4)) == 1


def test_what_is_masked_is_not_heard() -> None:
    watch = CollapseWatch(CPU)
    heard = []
    for step in range(10, alarms.QUIET_STEPS + 10, 10):
        logits, targets, valid = _patches(on=1e-4, elsewhere=1e-4)
        logits[..., 3], valid[..., 3] = 20, 0
        watch.add(logits, targets, valid)
        heard += watch.judge(step, 10, ranks=ALONE)
    assert [message.partition(":")[0] for message in heard] == ["post"]


def test_it_goes_on_from_a_checkpoint() -> None:
    watch, quiet = CollapseWatch(CPU), {"on": 1e-4, "elsewhere": 1e-4}
    assert _after(100, watch, **quiet) == []
    watch.add(*_patches(on=0.9, elsewhere=0.1))  # heard before the checkpoint, judged after it
    watch.settle(ALONE)
    resumed = CollapseWatch(CPU)
    resumed.restore(watch.state())
    assert _after(190, resumed, first=110, **quiet) == []
    again = CollapseWatch(CPU)
    again.restore(resumed.state())
    assert len(_after(20, again, first=300, **quiet)) == 1
