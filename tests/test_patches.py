from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor
from tiny import TinyProject
from typer.testing import CliRunner

from synmlops.cli import app
from synmlops.learning.distributed import Ranks
from synmlops.learning.feed import Feed
from synmlops.learning.look import look_at
from synmlops.learning.loop import feed_of
from synmlops.learning.sampling import train_regions
from synmlops.learning.trainer import Recipe
from synmlops.params import AugmentParams, LossParams, Params, SynmlopsError
from synmlops.stages.patches import alone, run
from synmlops.volumes.prepared import UNTRUSTED, Manifest
from synmlops.volumes.tint import COLOURS


def _with(params: Params, **augment: object) -> Params:
    return params.model_copy(update={"augment": AugmentParams(**{**params.augment.model_dump(), **augment})})


def _feed(params: Params, manifest: Manifest) -> Feed:
    """Give what the training loop takes its batches from."""
    regions = train_regions(manifest.folds[0], manifest, patch_zyx=params.sampling.patch_zyx)
    alone = Ranks(0, 1, torch.device("cpu"))
    return feed_of(Recipe.of(params), regions, mean=manifest.mean, std=manifest.std, ranks=alone)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_the_sheet_shows_the_very_patches_of_training(tiny_project: TinyProject, tmp_path: Path) -> None:
    """Draws, voxels and sides of each patch are those of the batch that the training loop takes."""
    params, manifest = _with(tiny_project.params, rotate={"probability": 0.5}), tiny_project.manifest
    titles = run(params, prepared=tiny_project.prepared, out=tmp_path / "sheet.png", step=5, n=4)
    with _feed(params, manifest) as feed:
        batches = [feed.batch(step) for step in (5, 6)]  # of two patches each
        draws = [draw for batch in batches for draw in batch.draws]
        assert titles == [f"step {5 + n // 2}, patch {n % 2}: {draw}" for n, draw in enumerate(draws)]
        for n in range(4):
            look = look_at(feed, 5 + n // 2, n % 2, loss=LossParams(foreground_weight_clip=(0.2, 0.8)))
            assert (look.seen_image == batches[n // 2].image[n % 2].numpy()).all()
            assert (look.seen_sides == batches[n // 2].sides[n % 2].numpy()).all()


def test_weights_are_those_of_the_loss(tiny_project: TinyProject) -> None:
    """The rarer class of the trusted voxels weighs as many times more as it is rarer, over all channels."""
    params, manifest = (
        _with(tiny_project.params, misalign={"probability": 1, "shift": 8}),
        tiny_project.manifest,
    )
    with _feed(params, manifest) as feed:
        look = look_at(feed, 1, 0, loss=LossParams(foreground_weight_clip=(0.001, 0.999)))
    trusted = look.seen_sides != UNTRUSTED
    foreground = trusted & (look.seen_sides > 0)
    share = 2 * foreground.sum() / (3 * trusted.sum())  # each foreground voxel is in union and in one side
    expected = np.where(foreground, (1 - share) / share, 1.0) * trusted
    assert share > 0
    np.testing.assert_allclose(look.weight, expected, rtol=1e-5)


def test_targets_are_drawn_over_their_image_and_nowhere_else(
    tiny_project: TinyProject, tmp_path: Path
) -> None:
    """A quarter turn swaps y and x, and so the outlines; 24 voxels take 240 pixels."""
    out, params = tmp_path / "sheet.png", tiny_project.params
    params = params.model_copy(update={"augment": alone(params.augment, "quarter_turn")})
    run(params, prepared=tiny_project.prepared, out=out, step=1, n=1)
    pixels = _pixels(out)[100:340]  # below legend and title; above the cuts along z
    for side in ("pre", "post"):
        is_side = (pixels == ImageColor.getrgb(COLOURS[side])).all(axis=-1)
        image, target, seen_image, seen_target, weight = (
            is_side[:, 10 + n * 250 :][:, 8:232]
            for n in range(5)  # without the ticks
        )
        assert target.any()
        assert not any(tile.any() for tile in (image, seen_image, weight))
        assert (seen_target[8:232] == target[8:232].T).all()
        assert (seen_target != target).any()


def test_command(tiny_project: TinyProject, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_project.params.model_dump(mode="json")))

    def call(*flags: str) -> list[str]:
        given = ["--params", str(tmp_path / "params.yaml"), "--prepared", str(tiny_project.prepared)]
        result = CliRunner().invoke(app, ["patches", *given, "--out", str(tmp_path / "a.png"), *flags])
        if isinstance(result.exception, SynmlopsError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    every = call("--all", "--step", "3")
    assert [line.partition(":")[0] for line in every[:-1]] == list(AugmentParams.model_fields)
    assert len({line.partition(":")[2] for line in every[:-1]}) == 1  # one patch, for all to be compared
    tall = _pixels(tmp_path / "a.png").shape
    assert len(call("--only", "elastic", "--n", "3")) == 4
    short = _pixels(tmp_path / "a.png")
    assert short.shape[1] == tall[1]
    assert short.shape[0] < tall[0]
    first = call("--n", "2")
    before = _pixels(tmp_path / "a.png")
    assert call("--n", "2") == first
    assert (_pixels(tmp_path / "a.png") == before).all()
    assert call("--n", "2", "--seed", "8") != first
    assert call("--n", "2", "--step", "2") != first
    with pytest.raises(
        SynmlopsError, match=r"--only elastics: no augmentation; did you mean elastic\? there are"
    ):
        call("--only", "elastics")
    with pytest.raises(SynmlopsError, match=r"--fold 7: there is none of this name; there are all"):
        call("--fold", "7")
    with pytest.raises(SynmlopsError, match=r"--only noise goes without --all"):
        call("--only", "noise", "--all")
