import numpy as np
import pytest
import torch
from augment_tools import noisy
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest

from synmlops.learning.augment.intensity import (
    Bend,
    Coarsening,
    Curve,
    GaussianNoise,
    draw_coarsening,
    draw_cut_noise,
)
from synmlops.learning.augment.sections import DARK, GaussianBlur, Loss, Smear, draw_losses
from synmlops.learning_params import CutBlur, CutNoise, MissingSection
from synmlops.volumes.prepared import Box

SHAPE = (4, 24, 32)


def _image(seed: int = 0) -> torch.Tensor:
    return (noisy(SHAPE, seed).float() - 128) / 70


def test_brightness_contrast_and_inversion_by_hand() -> None:
    grey = torch.tensor([[[80.0, 100.0, 110.0]]])
    assert Curve().apply(grey.clone(), mean=100, std=10).flatten().tolist() == [-2, 0, 1]
    bent = Curve(invert=True, bends=(Bend(gamma=1.0, contrast=0.5, brightness=0.25),))
    assert bent.apply(grey.clone(), mean=100, std=10).flatten().tolist() == [1.25, 0.25, -0.25]


def test_gamma_bends_between_three_deviations_and_leaves_the_rest() -> None:
    values = torch.tensor([-5.0, -3.0, 0.0, 3.0, 5.0]).reshape(1, 1, 5)
    dark = Curve(bends=(Bend(gamma=2.0, contrast=1.0, brightness=0.0),))
    np.testing.assert_allclose(dark.apply(values, mean=0, std=1).flatten(), [-5, -3, -1.5, 3, 5], atol=1e-6)
    ramp = torch.linspace(-6, 6, 1000).reshape(1, 1, -1)
    light = Curve(bends=(Bend(gamma=0.75, contrast=1.0, brightness=0.0),)).apply(ramp, mean=0, std=1)
    assert (light.diff() > 0).all()


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_look_up_gives_what_each_voxel_would(invert: bool, n: int) -> None:
    bends = tuple(Bend(gamma=0.8 + 0.1 * k, contrast=1.2 - 0.1 * k, brightness=0.1 * k) for k in range(n))
    curve, image = Curve(invert, bends), noisy(SHAPE)
    assert curve.looks_up(image)
    looked_up = curve.look_up(image, mean=120.0, std=40.0)
    assert torch.allclose(looked_up, curve.apply(image.float(), mean=120.0, std=40.0), atol=1e-6)
    assert not curve.looks_up(image.to(torch.uint16))


def test_noise_is_normal_and_no_two_seeds_share_any() -> None:
    shape = (8, 128, 128)
    first, again, other = (torch.zeros(shape) for _ in range(3))
    for image, seed in ((first, 1), (again, 1), (other, 2)):
        GaussianNoise(0.5, seed).apply(image)
    assert torch.equal(first, again)
    assert kstest(first.flatten().numpy() / 0.5, "norm").pvalue > 0.01
    assert first.std() == pytest.approx(0.5, rel=0.01)
    values = torch.stack([first.flatten()[:-1], other.flatten()[:-1], first.flatten()[1:]])
    assert (torch.corrcoef(values) - torch.eye(3)).abs().max() < 0.015  # five deviations


def test_cut_noise_stays_in_its_box() -> None:
    image, box = torch.zeros(SHAPE), Box((1, 2, 3), (3, 12, 30))
    GaussianNoise(1.0, 5, box).apply(image)
    inside = image[box.slices]
    assert (inside != 0).all()
    assert int((image != 0).sum()) == inside.numel()


def test_coarsening_averages_blocks_in_its_box() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8).clone()
    Coarsening(Box((0, 2, 4), (1, 4, 8)), factor=2).apply(image)
    assert image[0, 2, 2:].tolist() == [18, 19, 24.5, 24.5, 26.5, 26.5]
    assert image[0, 3, 4:].tolist() == [24.5, 24.5, 26.5, 26.5]
    assert image[0, 4].tolist() == list(range(32, 40))


@pytest.mark.parametrize("sigma", [0.5, 1.5, 3.0])
def test_blur_is_gaussian_in_its_sections_alone(sigma: float) -> None:
    image = _image()
    blurred = image.clone()
    GaussianBlur(1, 3, sigma).apply(blurred)
    assert torch.equal(blurred[[0, 3]], image[[0, 3]])
    expected = gaussian_filter(image[1:3].numpy(), sigma, axes=(1, 2), mode="nearest", truncate=3.0)
    np.testing.assert_allclose(blurred[1:3], expected, atol=0.01)


def test_smear_spreads_a_point_along_its_line() -> None:
    image = torch.zeros(3, 9, 9)
    image[:, 4, 4] = 1
    Smear((0, 2), length=5, degrees=0.0).apply(image)
    assert image[0, 4].tolist() == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0])
    assert float(image[2].sum()) == pytest.approx(1)
    assert image[1, 4, 4] == 1
    flat = torch.full((1, 9, 9), 2.0)
    Smear((0,), length=4, degrees=30.0).apply(flat)
    assert torch.allclose(flat, torch.tensor(2.0))  # the border keeps its grey


def test_a_lost_section_is_filled_beyond_its_line() -> None:
    image = torch.ones(3, 4, 4)
    Loss(0, DARK).apply(image)
    Loss(1, 0.0, line=(0.0, 1.0, 0.0)).apply(image)
    assert (image[0] == DARK).all()
    assert image[1].tolist() == [[1, 1, 0, 0]] * 4
    assert (image[2] == 1).all()


def test_partly_lost_sections_keep_a_part_on_either_side_of_half() -> None:
    left = []
    for seed in range(200):
        params = MissingSection(probability=1, most=1, partly=1)
        (loss,) = draw_losses(np.random.default_rng(seed), params, SHAPE)
        image = torch.ones(SHAPE)
        loss.apply(image)
        left.append(float((image[loss.section] == 1).float().mean()))
    assert 0 < min(left) < 0.3
    assert 0.7 < max(left) < 1
    assert np.mean(left) == pytest.approx(0.5, abs=0.05)


def test_boxes_are_no_larger_than_their_share_and_lie_inside() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        noise = draw_cut_noise(rng, CutNoise(probability=1, share=0.5), SHAPE)
        coarse = draw_coarsening(rng, CutBlur(probability=1, share=0.5, factor=4), SHAPE)
        assert noise is not None
        assert noise.box is not None
        assert coarse is not None
        for box in (noise.box, coarse.box):
            for start, stop, size in zip(box.start_zyx, box.stop_zyx, SHAPE, strict=True):
                assert 0 <= start < stop <= size
                assert stop - start <= 0.5 * size
        assert 2 <= coarse.factor <= 4
        assert coarse.box.shape_zyx[1] % coarse.factor == 0
