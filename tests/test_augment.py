import numpy as np
import torch

from synmlops.learning.augment import GREATEST_SHIFT, augment
from synmlops.params import AugmentParams
from synmlops.volumes.prepared import UNTRUSTED

NONE = AugmentParams(flip=0, transpose=0, intensity=0, noise=0, blur=0, missing_section=0, misalign=0)


def _rngs(n: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(n)]


def test_nothing_happens_at_chance_zero() -> None:
    image, sides = torch.randn(3, 4, 8, 8), torch.randint(0, 3, (3, 4, 8, 8), dtype=torch.uint8)
    out = augment(image, sides, rngs=_rngs(3), params=NONE)
    assert torch.equal(out[0], image)
    assert torch.equal(out[1], sides)


def test_labels_follow_geometry_exactly() -> None:
    """The image carries the codes: wherever a voxel lands, its label lands too. A thousand patches."""
    params = AugmentParams(
        flip=0.5, transpose=0.5, intensity=0, noise=0, blur=0, missing_section=0, misalign=0.7
    )
    sides = torch.randint(0, 3, (1000, 4, 16, 16), dtype=torch.uint8)
    image, moved = augment(sides.float(), sides, rngs=_rngs(1000), params=params)
    trusted = moved != UNTRUSTED
    assert torch.equal(image[trusted], moved[trusted].float())
    changed = (moved != sides).flatten(1).any(dim=1).float().mean()
    assert changed > 0.9
    lost = (~trusted).float().mean()
    assert 0 < lost < GREATEST_SHIFT / 16


def test_flips_reach_all_eight_corners() -> None:
    sides = torch.zeros(200, 2, 4, 4, dtype=torch.uint8)
    sides[:, 0, 0, 0] = 1
    params = NONE.model_copy(update={"flip": 0.5})
    _, moved = augment(sides.float(), sides, rngs=_rngs(200), params=params)
    assert len({tuple(one.nonzero()[0].tolist()) for one in moved}) == 8


def test_intensity_leaves_labels_alone_and_stays_finite() -> None:
    params = AugmentParams(flip=0, transpose=0, intensity=1, noise=1, blur=1, missing_section=1, misalign=0)
    image, sides = torch.randn(50, 4, 16, 16), torch.randint(0, 3, (50, 4, 16, 16), dtype=torch.uint8)
    changed, same = augment(image, sides, rngs=_rngs(50), params=params)
    assert torch.equal(same, sides)
    assert changed.isfinite().all()
    assert not torch.equal(changed, image)


def test_a_patch_does_not_depend_on_its_place_in_the_batch() -> None:
    image, sides = torch.randn(4, 4, 16, 16), torch.randint(0, 3, (4, 4, 16, 16), dtype=torch.uint8)
    whole = augment(image, sides, rngs=_rngs(4), params=AugmentParams())
    alone = augment(image[2:3], sides[2:3], rngs=_rngs(4)[2:3], params=AugmentParams())
    assert torch.equal(whole[0][2], alone[0][0])
    assert torch.equal(whole[1][2], alone[1][0])
