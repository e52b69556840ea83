"""Training on one process: what it learns, keeps, resumes and refuses."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyProject
from torch import Tensor, nn

from synmlops.learning.checkpoint import Model, ModelMeta, save_model, save_state
from synmlops.learning.distributed import Ranks
from synmlops.learning.loop import LOG_EVERY, Fitted, Recipe, Row, feed_of, fit
from synmlops.learning.losses import LossTerms, compute_loss
from synmlops.learning.networks.registry import build_network
from synmlops.learning.optim import learning_rate_at
from synmlops.learning.sampling import LabelledRegion
from synmlops.learning.states import States
from synmlops.learning.trainer import Trainer
from synmlops.params import CHANNELS, NetworkParams, SynmlopsError
from synmlops.volumes.prepared import Box

ALONE = Ranks(rank=0, n_ranks=1, device=torch.device("cpu"))


class Interrupted(Exception):
    """What ends a training from outside."""


@dataclass
class Watcher:
    """Remembers what it is told, and may interrupt once a step is saved or logged."""

    stop_saved: int | None = None
    stop_logged: int | None = None
    rows: list[tuple[int, Row]] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    alarms: list[tuple[int, str]] = field(default_factory=list)

    def logged(self, step: int, row: Row) -> None:
        self.rows.append((step, row))
        if step == self.stop_logged:
            raise Interrupted

    def saved(self, step: int) -> None:
        self.saves.append(step)
        if step == self.stop_saved:
            raise Interrupted

    def alarm(self, step: int, message: str) -> None:
        self.alarms.append((step, message))


def _validate(model: Model) -> float:
    """Score by the weights alone, so that it depends on nothing but the model."""
    return float(sum(value.double().abs().sum() for value in model.network.state_dict().values()))


@dataclass(frozen=True)
class Bench:
    """What is trained on; `fit` with some of the recipe changed."""

    project: TinyProject
    states: Path

    def recipe(self, **train: Any) -> Recipe:
        recipe = Recipe.of(self.project.params)
        return replace(recipe, train=recipe.train.model_copy(update=train))

    def fit(
        self,
        *,
        recipe: Recipe | None = None,
        observer: Watcher | None = None,
        validate: Callable[[Model], float] | None = _validate,
        ranks: Ranks = ALONE,
        kind: Any = "pairs",
        **train: Any,
    ) -> Fitted:
        recipe = recipe or self.recipe(**train)
        volume = replace(self.project.manifest.volumes["train"], kind=kind)
        meta = ModelMeta(
            network=recipe.network, channels=CHANNELS, mean=128, std=20, voxel_nm=volume.grid.voxel_nm
        )
        return fit(
            recipe,
            [LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))],
            meta=meta,
            ranks=ranks,
            states=self.states,
            validate=validate,
            observer=observer or Watcher(),
        )

    def at(self, name: str) -> "Bench":
        """Give the same with checkpoints of its own."""
        return replace(self, states=self.states.with_name(name))

    def state(self) -> dict[str, Any]:
        """Read its newest checkpoint."""
        state = States(self.states).load()
        assert state is not None
        return state


@pytest.fixture
def bench(tiny_project: TinyProject, tmp_path: Path) -> Bench:
    return Bench(tiny_project, tmp_path / "states")


@pytest.fixture(scope="module")
def whole(tiny_project: TinyProject, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Train without an interruption."""
    return Bench(tiny_project, tmp_path_factory.mktemp("whole")).fit()


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "stop",
    [{"stop_saved": 4}, {"stop_saved": 8}, {"stop_saved": 12}, {"stop_logged": 6}, {"stop_logged": 10}],
    ids=str,
)
def test_resumed_is_uninterrupted(bench: Bench, whole: Fitted, stop: dict[str, Any]) -> None:
    """Wherever it is cut: weights bit by bit, best step, score and every point of the curves."""
    with pytest.raises(Interrupted):
        bench.fit(observer=Watcher(**stop))
    resumed = bench.fit()
    assert _same(resumed.last, whole.last)
    assert _same(resumed.best, whole.best)
    assert (resumed.best_step, resumed.best_score) == (whole.best_step, whole.best_score)
    assert resumed.history == whole.history
    curve = [row["step"] for row in resumed.history if "loss" in row]
    assert curve == [6, 10, 12]
    assert [row["step"] for row in resumed.history if "validation_f1" in row] == [6, 12]


def test_interrupted_twice(bench: Bench, whole: Fitted) -> None:
    for stop in (4, 8):
        with pytest.raises(Interrupted):
            bench.fit(observer=Watcher(stop_saved=stop))
    assert _same(bench.fit().last, whole.last)


def test_a_finished_training_is_not_begun_again(bench: Bench) -> None:
    done, watcher = bench.fit(), Watcher()
    again = bench.fit(observer=watcher)
    assert (watcher.rows, watcher.saves) == ([], [])
    assert _same(again.last, done.last)
    assert again.history == done.history


def _curve(fitted: Fitted) -> list[Row]:
    """Give the points of the loss curve, without those of validation."""
    return [row for row in fitted.history if "loss" in row]


def test_every_point_of_the_curve_is_the_mean_since_the_last(bench: Bench) -> None:
    fine = _curve(bench.at("fine").fit(validate_every=1))
    coarse = _curve(bench.fit(validate=None))
    assert [row["step"] for row in fine] == list(range(1, 13))
    spans = {LOG_EVERY: (0, 10), 12: (10, 12)}
    assert [row["step"] for row in coarse] == list(spans)
    for row in coarse:
        low, high = spans[int(row["step"])]
        for name in ("loss", "bce", "dice", "gradient_norm"):
            mean = sum(point[name] for point in fine[low:high]) / (high - low)
            assert row[name] == pytest.approx(mean, rel=1e-5)
        assert row["learning_rate"] == fine[high - 1]["learning_rate"]


def test_how_often_it_is_saved_changes_nothing(bench: Bench) -> None:
    often, rarely = bench.at("often").fit(checkpoint_every=1), bench.fit(checkpoint_every=100)
    assert _same(often.last, rarely.last)
    assert often.history == rarely.history


def test_observer_hears_of_every_row_and_checkpoint(bench: Bench) -> None:
    watcher = Watcher()
    fitted = bench.fit(observer=watcher)
    assert [{"step": float(step), **row} for step, row in watcher.rows] == fitted.history
    assert watcher.saves == [4, 8, 12]


def test_it_learns(bench: Bench) -> None:
    history = bench.fit(validate=None, steps=60, checkpoint_every=20).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_the_seed_decides(bench: Bench) -> None:
    one = bench.fit(steps=2)
    same = bench.at("same").fit(steps=2)
    other = bench.at("other").fit(recipe=replace(bench.recipe(steps=2), seed=8))
    assert _same(one.last, same.last)
    assert not _same(one.last, other.last)


def test_best_is_the_highest_validation_score_and_the_first_of_equals(bench: Bench) -> None:
    scores = iter([0.2, 0.9, 0.9, 0.1])
    seen: list[dict[str, Tensor]] = []

    def validate(model: Model) -> float:
        assert not model.network.training
        seen.append({name: value.clone() for name, value in model.network.state_dict().items()})
        return next(scores)

    fitted = bench.fit(validate=validate, validate_every=3)
    assert (fitted.best_step, fitted.best_score) == (6, 0.9)
    assert _same(fitted.best, seen[1])
    assert _same(fitted.last, seen[3])
    assert not _same(fitted.best, fitted.last)


def test_without_validation_the_last_weights_are_the_model(bench: Bench) -> None:
    fitted = bench.fit(validate=None)
    assert _same(fitted.best, fitted.last)
    assert (fitted.best_step, fitted.best_score) == (12, None)


def test_averaged_weights_follow_their_formula(bench: Bench) -> None:
    """Averaged = decay x averaged + (1 - decay) x weights, decay being (1 + n) / (10 + n) up to `ema`."""
    raw: list[dict[str, Tensor]] = []

    class Keeper(Watcher):
        def saved(self, step: int) -> None:
            raw.append(bench.state()["network"])

    fitted = bench.fit(observer=Keeper(), validate=None, steps=5, checkpoint_every=1, ema=0.3)
    torch.manual_seed(bench.project.params.seed)
    averaged = build_network(bench.project.params.network).state_dict()
    for step, weights in enumerate(raw, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        averaged = {name: decay * averaged[name] + (1 - decay) * weights[name] for name in averaged}
    torch.testing.assert_close(fitted.last, averaged)
    plain = bench.at("plain").fit(validate=None, steps=5, checkpoint_every=5, ema=0.0)
    torch.testing.assert_close(plain.last, bench.at("plain").state()["network"])


def test_optimiser_descends_at_the_rate_of_the_schedule(bench: Bench) -> None:
    curve, train = _curve(bench.fit(validate_every=1)), bench.recipe().train
    assert [row["learning_rate"] for row in curve] == [learning_rate_at(n, train) for n in range(1, 13)]
    assert bench.state()["optimizer"]["param_groups"][0]["lr"] == curve[-1]["learning_rate"]


def _break_at(call: int, how: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., LossTerms]:
    calls = 0

    def broken(logits: Tensor, *args: Any, **kwargs: Any) -> LossTerms:
        nonlocal calls
        calls += 1
        loss = compute_loss(logits, *args, **kwargs)
        return replace(loss, total=how(loss.total, logits)) if calls == call else loss

    return broken


@pytest.mark.parametrize(
    ("step", "how"),
    [
        (5, lambda total, logits: total * float("nan")),
        (8, lambda total, logits: total + float("inf")),
        (5, lambda total, logits: total + (0 * logits).sum().sqrt()),  # 0, but of slope nan
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(
    bench: Bench, whole: Fitted, monkeypatch: pytest.MonkeyPatch, how: Any, step: int
) -> None:
    monkeypatch.setattr("synmlops.learning.trainer.compute_loss", _break_at(step, how))
    watcher = Watcher()
    with pytest.raises(
        SynmlopsError, match=rf"finite at step {step} .*train at .*lower train.learn"
    ) as caught:
        bench.fit(observer=watcher)
    assert watcher.saves == [4]
    assert watcher.alarms == [(step, str(caught.value))]
    monkeypatch.undo()
    assert _same(bench.fit().last, whole.last)  # from the good checkpoint


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_step_that_is_not_finite_moves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe, volume = bench.recipe(optimizer=optimizer), bench.project.manifest.volumes["train"]
    meta = ModelMeta(network=recipe.network, channels=CHANNELS, mean=128, std=20, voxel_nm=(40, 8, 8))
    trainer = Trainer(recipe, meta=meta, ranks=ALONE)
    monkeypatch.setattr(
        "synmlops.learning.trainer.compute_loss", _break_at(2, lambda total, logits: total + float("inf"))
    )
    seen = []
    regions = [LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))]
    with feed_of(recipe, regions, mean=meta.mean, std=meta.std, ranks=ALONE) as feed:
        for step in (1, 2, 3):
            trainer.progress.step = step
            trainer.descend(feed.batch(step))
            seen.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
    assert _same(seen[1], seen[0])
    assert not _same(seen[2], seen[1])


def test_a_learning_rate_far_too_high_stops(bench: Bench) -> None:
    with pytest.raises(SynmlopsError, match="stopped being finite"):
        bench.fit(learning_rate=1e30, validate=None)


def test_a_channel_that_collapses_raises_the_alarm(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on overlap so high that one side is given up for good; the other two channels learn."""
    monkeypatch.setattr("synmlops.learning.alarms.QUIET_STEPS", 100)
    watcher, recipe = Watcher(), bench.recipe(steps=120, checkpoint_every=120, warmup_steps=10)
    loss = recipe.loss.model_copy(update={"overlap": 100.0})
    bench.fit(recipe=replace(recipe, loss=loss), observer=watcher, validate=None)
    [(step, message)] = watcher.alarms
    assert step in (100, 110, 120)
    assert re.match(rf"(pre|post): predicts nothing since step {step - 99} ", message)


@pytest.mark.parametrize(("terms", "same"), [({"dice": 0.0}, True), ({}, False)])
def test_a_batch_in_parts_is_the_batch(bench: Bench, terms: dict[str, float], same: bool) -> None:
    """To float32 where losses add up; Dice is that of each part."""
    recipe = bench.recipe(steps=4, checkpoint_every=4)
    recipe = replace(
        recipe,
        loss=recipe.loss.model_copy(update=terms),
        sampling=recipe.sampling.model_copy(update={"batch_size": 4}),
    )
    whole = bench.at("whole").fit(recipe=recipe, validate=None)
    in_parts = replace(recipe, train=recipe.train.model_copy(update={"accumulate": 2}))
    parts = bench.fit(recipe=in_parts, validate=None)
    close = [torch.allclose(whole.last[k], parts.last[k], rtol=1e-3, atol=1e-5) for k in whole.last]
    assert all(close) is same
    assert parts.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3 if same else 0.2)


def test_parts_that_do_not_divide_a_batch(bench: Bench) -> None:
    with pytest.raises(SynmlopsError, match=r"train.accumulate: the 2 patches .* in 3 equal .*one of 1, 2$"):
        bench.fit(accumulate=3)


def test_early_stop_after_so_many_validations_without_a_better_score(bench: Bench) -> None:
    """Three in a row; the count survives an interruption, and a stopped training is not gone on with."""

    def run(where: Bench, scores: list[float], watcher: Watcher | None = None) -> Fitted:
        left = iter(scores)
        return where.fit(validate=lambda model: next(left), validate_every=2, early_stop=3, observer=watcher)

    whole = run(bench.at("whole"), [0.5, 0.4, 0.5, 0.2])
    assert (whole.best_step, whole.last_step) == (2, 8)
    with pytest.raises(Interrupted):
        run(bench, [0.5, 0.4], Watcher(stop_saved=4))
    watcher = Watcher()
    resumed = run(bench, [0.5, 0.2], watcher)
    assert (resumed.best_step, resumed.last_step) == (2, 8)
    assert _same(resumed.last, whole.last)
    assert watcher.saves == [8]
    assert run(bench, []).last_step == 8


def test_dropout_resumes_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers draw depends on the step alone: neither on what came before nor on validation."""

    def with_dropout(params: NetworkParams) -> nn.Module:
        return nn.Sequential(build_network(params), nn.Dropout(0.2))

    def draws(model: Model) -> float:
        return float(torch.rand(()))

    monkeypatch.setattr("synmlops.learning.trainer.build_network", with_dropout)
    whole = bench.at("whole").fit(validate=None)
    with pytest.raises(Interrupted):
        bench.fit(validate=draws, observer=Watcher(stop_saved=8))
    assert _same(bench.fit(validate=draws).last, whole.last)


def test_a_broken_checkpoint_falls_back_to_the_one_before(
    bench: Bench, whole: Fitted, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        bench.fit(observer=Watcher(stop_saved=12))
    newest, before = States(bench.states).paths()
    assert [newest.name, before.name] == ["step_00000012.pt", "step_00000008.pt"]
    newest.write_bytes(newest.read_bytes()[:-100])
    watcher = Watcher()
    assert _same(bench.fit(observer=watcher).last, whole.last)
    assert watcher.saves == [12]
    assert "step_00000012.pt: broken checkpoint" in (said := capsys.readouterr().err)
    assert "Going on from step_00000008.pt" in said
    for path in States(bench.states).paths():
        path.write_bytes(b"PK")
    with pytest.raises(SynmlopsError, match=r"step_00000008.pt: broken checkpoint .*delete it"):
        bench.fit()


def test_sigterm_saves_the_step_it_came_in(
    bench: Bench, whole: Fitted, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a validation, which may take long and is done after the resume; within one, it ends at once."""

    class Ender(Watcher):
        def logged(self, step: int, row: Row) -> None:
            super().logged(step, row)
            if step == 6 and "loss" in row:
                os.kill(os.getpid(), signal.SIGTERM)

    def validate_and_end(model: Model) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # where the signal is heard
        return 0.0

    with pytest.raises(SystemExit) as caught:
        bench.fit(observer=Ender())
    assert caught.value.code == 128 + signal.SIGTERM
    assert bench.state()["progress"]["step"] == 6
    assert "asked to end; step 6 is saved" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.fit(validate=validate_and_end)
    assert bench.state()["progress"]["step"] == 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = bench.fit()
    assert _same(resumed.last, whole.last)
    assert resumed.history == whole.history


def test_a_full_disk_ends_training_and_loses_nothing_before(bench: Bench, whole: Fitted) -> None:
    """The limit on a file's size is reached by the second checkpoint, which holds the best weights too."""
    with pytest.raises(Interrupted):
        bench.fit(observer=Watcher(stop_saved=4))
    size = States(bench.states).paths()[0].stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, before[1]))
    try:
        with pytest.raises(SynmlopsError, match=r"step_00000008.pt: cannot be written"):
            bench.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in bench.states.iterdir()] == ["step_00000004.pt"]
    assert _same(bench.fit().last, whole.last)


def test_union_labels_teach_only_the_union(bench: Bench) -> None:
    """With weight decay off, the heads of unknown channels stay what they were."""
    fitted = bench.fit(kind="union", validate=None, weight_decay=0.0)
    torch.manual_seed(bench.project.params.seed)
    before = build_network(bench.project.params.network).state_dict()["head.weight"]
    changed = (fitted.last["head.weight"] - before).abs().flatten(1).amax(dim=1).reshape(3, -1) > 1e-6
    assert changed.any(dim=1).tolist() == [False, False, True]


def test_batch_that_ranks_cannot_share(bench: Bench) -> None:
    with pytest.raises(SynmlopsError, match=r"sampling.batch_size: 2 cannot be shared by 3 .*multiple of 3"):
        bench.fit(ranks=Ranks(0, 3, torch.device("cpu")))


def test_batch_norm_over_cpu_processes_is_refused(bench: Bench) -> None:
    network = bench.project.params.network.model_copy(update={"norm": "batch"})
    with pytest.raises(SynmlopsError, match=r"network.norm: batch norm over several CPU processes"):
        bench.fit(recipe=replace(bench.recipe(), network=network), ranks=Ranks(0, 2, torch.device("cpu")))


def test_batch_norm_resumes_too(bench: Bench) -> None:
    """Running statistics and their counters are part of the state and of the average."""
    network = bench.project.params.network.model_copy(update={"norm": "batch"})
    recipe = replace(bench.recipe(), network=network)
    whole = bench.at("whole").fit(recipe=recipe)
    with pytest.raises(Interrupted):
        bench.fit(recipe=recipe, observer=Watcher(stop_saved=4))
    resumed = bench.fit(recipe=recipe)
    assert _same(resumed.last, whole.last)
    assert int(resumed.last["down_blocks.0.0.norm1.num_batches_tracked"]) == 12


@pytest.mark.parametrize("missing", ["network", "optimizer", "averaged", "progress", "collapse"])
def test_checkpoint_of_another_version(bench: Bench, missing: str) -> None:
    bench.fit(steps=2)
    state = bench.state()
    del state[missing]
    save_state(States(bench.states).paths()[0], state)
    with pytest.raises(SynmlopsError, match=r"states: a checkpoint of another version .*delete it"):
        bench.fit()


def test_training_begins_with_the_weights_of_a_model_file(
    bench: Bench, whole: Fitted, tmp_path: Path
) -> None:
    """The learning rate lets them stay where they begin; another network's are refused."""
    network, path = bench.recipe().network, tmp_path / "start.safetensors"
    meta = ModelMeta(network=network, channels=CHANNELS, mean=128, std=20, voxel_nm=(40.0, 8.0, 8.0))
    save_model(path, whole.last, meta)
    still = {
        "steps": 1,
        "learning_rate": 1e-12,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "start_from": str(path),
    }
    begun = bench.fit(**still).last
    for name, weight in whole.last.items():
        torch.testing.assert_close(begun[name], weight, atol=1e-6, rtol=0)
    wider = replace(bench.recipe(**still), network=network.model_copy(update={"widths": (8, 8)}))
    with pytest.raises(
        SynmlopsError, match=r"train\.start_from.*network\.widths: \[4, 6\] there, \[8, 8\] here"
    ):
        bench.at("other").fit(recipe=wider)
    with pytest.raises(SynmlopsError, match=r"train\.start_from: .*none\.safetensors: no such model"):
        bench.at("other").fit(**still | {"start_from": str(tmp_path / "none.safetensors")})
