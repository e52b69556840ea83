import numpy as np
import pytest

from synmlops.params import CHANNELS, EvaluateParams
from synmlops.synapses.instances import sites_of
from synmlops.synapses.partners import partners_of
from synmlops.synapses.scores import Scores, Tables, decode, score_region, true_instances
from synmlops.synapses.voxels import voxel_histograms
from synmlops.volumes.prepared import POST, PRE, SIDE_UNKNOWN, UNTRUSTED

VOXEL_NM = (40.0, 8.0, 8.0)
PARAMS = EvaluateParams(min_voxels=4, min_side_voxels=2)


def _sides() -> np.ndarray:
    """Two synapses of 2 x 4 x 8 voxels, pre on the left of post."""
    sides = np.zeros((4, 20, 40), np.uint8)
    for y, x in ((2, 4), (12, 24)):
        sides[1:3, y : y + 4, x : x + 4] = PRE
        sides[1:3, y : y + 4, x + 4 : x + 8] = POST
    return sides


def _perfect(sides: np.ndarray) -> np.ndarray:
    return np.stack([sides == PRE, sides == POST, sides != 0]).astype(np.uint8) * np.uint8(255)


def _score(probabilities: np.ndarray, sides: np.ndarray) -> Scores:
    histograms = voxel_histograms(probabilities, sides, names=CHANNELS, known=CHANNELS)
    true = true_instances(sides, "semantic", sides=True)
    predicted = decode(probabilities, threshold=0.5, params=PARAMS)
    tables = Tables(
        partners_of(predicted, voxel_nm=VOXEL_NM), partners_of(true, voxel_nm=VOXEL_NM), with_neurons=False
    )
    return score_region(
        histograms,
        predicted,
        true,
        threshold=0.5,
        voxel_nm=VOXEL_NM,
        tables=tables,
        params=PARAMS,
    )


def test_a_perfect_prediction_scores_one_everywhere() -> None:
    flat = _score(_perfect(_sides()), _sides()).flat()
    assert flat["detection_true"] == flat["detection_predicted"] == 2
    for name in ("voxel_union", "voxel_pre", "voxel_post", "detection", "detection_centroid", "partner"):
        assert flat[f"{name}_f1"] == 1
    assert flat["direction_accuracy"] == 1


def test_swapped_sides_ruin_direction_and_side_voxels_but_not_detection() -> None:
    swapped = _perfect(_sides())[[1, 0, 2]]
    flat = _score(swapped, _sides()).flat()
    assert flat["detection_f1"] == flat["voxel_union_f1"] == 1
    assert flat["direction_accuracy"] == flat["voxel_pre_f1"] == flat["voxel_post_f1"] == 0


def test_scores_of_regions_pool_their_counts() -> None:
    good = _score(_perfect(_sides()), _sides())
    nothing = _score(np.zeros((3, 4, 20, 40), np.uint8), _sides())
    both = (good + nothing).flat()
    assert both["detection_true"] == 4
    assert both["detection_recall"] == 0.5
    assert both["detection_precision"] == 1


def test_a_union_only_region_adds_no_partner_score() -> None:
    union = Scores()
    assert "partner_f1" not in union.flat()
    assert "partner_f1" in (union + _score(_perfect(_sides()), _sides())).flat()


def test_untrusted_voxels_and_unknown_channels_do_not_count() -> None:
    sides = _sides()
    sides[:, :, 20:] = UNTRUSTED
    found = voxel_histograms(_perfect(_sides()), sides, names=CHANNELS, known=("union",))
    assert set(found) == {"union"}
    assert found["union"].foreground.sum() == 2 * 4 * 8
    assert found["union"].background.sum() == 4 * 20 * 20 - 2 * 4 * 8


@pytest.mark.parametrize(("kind", "sided"), [("pairs", True), ("semantic", True), ("union", False)])
def test_true_instances_of_every_kind_are_the_same_synapses(kind: str, sided: bool) -> None:
    sides = _sides()
    pairs = np.where(sides == PRE, 1, np.where(sides == POST, 2, 0))
    pairs[:, 10:] = np.where(pairs[:, 10:] > 0, pairs[:, 10:] + 2, 0)
    label = {"pairs": pairs.astype(np.uint16), "semantic": sides, "union": (sides > 0) * SIDE_UNKNOWN}[kind]
    found = true_instances(label.astype(np.uint16), kind, sides=sided)  # type: ignore[arg-type]
    whole = sites_of(found) if sided else found
    assert np.array_equal(whole, sites_of(pairs.astype(np.uint16)))
    if sided:
        assert np.array_equal(found, pairs)
