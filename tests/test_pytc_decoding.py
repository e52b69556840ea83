"""The rule `polarity`: against a plain implementation on dense arrays, by block, and with many synapses."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.blockwise.grid import BlockGrid
from synmlops.params import EvaluateParams, PolarityParams, SynmlopsError
from synmlops.stages import decode
from synmlops.synapses.decoding import Decoding, decode_blocks
from synmlops.synapses.partners import partners_of
from synmlops.synapses.pytc_decoding import Scaled, scaled_shape
from synmlops.synapses.scores import refuse_unscorable
from synmlops.volumes.prepared import Box
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, open_volume
from synmlops.volumes.table import read_table

GRID = Grid((40.0, 8.0, 4.0), (400.0, 80.0, 12.0))


def decoded(
    probabilities: NDArray[np.uint8],
    block_zyx: tuple[int, int, int] | None = None,
    *,
    threshold: float = 0.5,
    **options: Any,
) -> tuple[NDArray[Any], Decoding]:
    shape = probabilities.shape[1], probabilities.shape[2], probabilities.shape[3]
    params = EvaluateParams(rule="polarity", polarity=PolarityParams(**options), min_side_voxels=2)
    made: list[NDArray[Any]] = []

    def out(kind: Any) -> Any:
        scale = params.polarity.scale_zyx
        made.append(np.zeros(scaled_shape(shape, scale), kind))
        return made[0] if scale == (1, 1, 1) else Scaled(made[0], shape, scale)

    decoding = decode_blocks(
        probabilities,
        blocks=BlockGrid(Box((0, 0, 0), shape), block_zyx or shape),
        grid=GRID,
        params=params,
        threshold=threshold,
        out=out,
    )
    return made[0], decoding


def plainly(
    probabilities: NDArray[np.uint8],
    *,
    threshold: float = 0.5,
    min_voxels: int = 128,
    dilate_yx: int = 5,
    exclusive: bool = False,
    semantic: bool = False,
    scale_zyx: tuple[float, float, float] = (1, 1, 1),
) -> NDArray[np.int64]:
    """Decode as the definition reads, with masks of the whole volume."""
    pre, post, union = probabilities > int(255 * threshold)
    if exclusive:
        background = 255 - probabilities[2]
        best = np.stack([background, *probabilities[:2]]).argmax(axis=0)
        pre, post, union = best == 1, best == 2, best != 0
    sides = []
    for side in (pre & union, post & union):
        objects = ndimage.label(side)[0]
        large = np.bincount(objects.ravel()) >= min_voxels
        sides.append(side & large[objects])
    number = np.int64(1)
    if not semantic:
        number = ndimage.label(ndimage.binary_dilation(union, np.ones((1, dilate_yx, dilate_yx))))[0]
    ids = np.maximum(sides[0] * (2 * number - 1), sides[1] * 2 * number)
    for axis, factor in enumerate(scale_zyx):
        n = int(ids.shape[axis] * factor)
        middle = (np.arange(n) + 0.5) * ids.shape[axis] / n
        ids = ids.take(middle.astype(int), axis=axis)
    return ids


def tangled(seed: int, shape: tuple[int, int, int] = (6, 19, 22)) -> NDArray[np.uint8]:
    """Make foreground of many sizes in which a voxel is often both pre and post."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((3, *shape)), (0, 0.5, 0.8, 0.8))
    spread = (smooth - smooth.mean()) / smooth.std()
    return (127 + 60 * (spread - rng.uniform(0.2, 1.4))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"min_voxels": 4, "dilate_yx": 1},
        {"min_voxels": 2, "dilate_yx": 3, "threshold": 0.4},
        {"min_voxels": 1, "dilate_yx": 7, "threshold": 0.6},
        {"min_voxels": 5, "dilate_yx": 3, "exclusive": True},
        {"min_voxels": 3, "semantic": True},
        {"min_voxels": 3, "dilate_yx": 1, "scale_zyx": (2, 0.6, 1.3)},
    ],
    ids=str,
)
def test_blocks_equal_the_definition(options: dict[str, Any]) -> None:
    for seed in range(2):
        probabilities = tangled(seed)
        expected = plainly(probabilities, **options)
        assert len(np.unique(expected)) > 2
        z, y, x = np.random.default_rng(seed).integers((2, 5, 5), (5, 16, 16)).tolist()
        for block_zyx in (None, (z, y, x)):
            ids, decoding = decoded(probabilities, block_zyx, **options)
            np.testing.assert_array_equal(ids, expected)
            if decoding.table is not None and "scale_zyx" not in options:
                assert decoding.n_sites == len(np.unique((ids[ids > 0] + 1) // 2))


def test_the_table_is_that_of_the_instances() -> None:
    probabilities = tangled(3, (6, 40, 40))
    for block_zyx in (None, (4, 16, 24)):
        ids, decoding = decoded(probabilities, block_zyx, min_voxels=3, dilate_yx=1)
        expected = partners_of(
            ids,
            voxel_nm=GRID.voxel_nm,
            offset_nm=GRID.offset_nm,
            probabilities_czyx=probabilities,
            min_side_voxels=2,
        )
        assert len(expected) > 5
        assert decoding.table is not None
        pd.testing.assert_frame_equal(decoding.table, expected, check_exact=True)


@pytest.mark.parametrize("n", [128, 32_768])
def test_ids_do_not_wrap(n: int) -> None:
    """The incumbent's wrap beyond 127 synapses, and beyond 32 767."""
    per_row = 181
    number = np.arange(n)
    y, x = 2 * (number // per_row), 3 * (number % per_row)
    probabilities = np.zeros((3, 1, int(y.max()) + 1, 3 * per_row), np.uint8)
    probabilities[0, 0, y, x] = probabilities[1, 0, y, x + 1] = 255
    probabilities[2, 0, y, x] = probabilities[2, 0, y, x + 1] = 255
    ids, decoding = decoded(probabilities, (1, 100, 100), min_voxels=1, dilate_yx=1)
    assert decoding.n_sites == n
    np.testing.assert_array_equal(ids[0, y, x], 2 * number.astype(np.int64) + 1)
    np.testing.assert_array_equal(ids[0, y, x + 1], 2 * number.astype(np.int64) + 2)
    assert (ids != 0).sum() == 2 * n


def test_what_is_both_goes_to_post_unless_its_post_object_is_too_small() -> None:
    probabilities = np.zeros((3, 1, 1, 12), np.uint8)
    probabilities[0, ..., :6], probabilities[1, ..., 4:9], probabilities[2] = 255, 255, 255
    assert decoded(probabilities, min_voxels=5)[0].ravel().tolist() == [1] * 4 + [2] * 5 + [0] * 3
    assert decoded(probabilities, min_voxels=6)[0].ravel().tolist() == [1] * 6 + [0] * 6
    ids, decoding = decoded(probabilities, min_voxels=7)
    assert not ids.any()
    assert decoding.n_sites == 0


# -- the command and the params ----------------------------------------------------------------------------


def written(path: Path, values: NDArray[np.uint8], *channels: str) -> Path:
    shape = values.shape[1], values.shape[2], values.shape[3]
    names = channels or ("pre", "post", "union")
    with probabilities_writer(path, shape, channels=names, grid=GRID) as data:
        data[...] = values
    return path


def run(source: Path, out: Path, *, suffix: str | None = None, **options: Any) -> decode.Written:
    params = EvaluateParams(
        rule="polarity", polarity=PolarityParams(min_voxels=3, dilate_yx=1, **options), min_side_voxels=2
    )
    return decode.run(source, out=out, params=params, threshold=0.5, block_zyx=(4, 8, 16), suffix=suffix)


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_the_command_writes_instances_and_table(tmp_path: Path, suffix: str) -> None:
    values = tangled(1)
    outcome = run(written(tmp_path / "p.h5", values), tmp_path / "out", suffix=suffix)
    with open_volume(tmp_path / "out" / f"instances{suffix}") as volume:
        np.testing.assert_array_equal(volume.read(), plainly(values, min_voxels=3, dilate_yx=1))
        assert volume.attrs["label_kind"] == "pairs"
    assert outcome.n_partners == len(read_table(tmp_path / "out" / "partners.parquet")) > 0


def test_semantic_instances_bring_no_table(tmp_path: Path) -> None:
    values = tangled(1)
    outcome = run(written(tmp_path / "p.h5", values), tmp_path / "out", semantic=True)
    with open_volume(tmp_path / "out" / "instances.h5") as volume:
        np.testing.assert_array_equal(volume.read(), plainly(values, min_voxels=3, semantic=True))
        assert volume.attrs["label_kind"] == "semantic"
    assert outcome.n_partners is None
    assert not (tmp_path / "out" / "partners.parquet").exists()
    assert "pre is 1 and post is 2" in outcome.notes[0]


def test_scaled_instances_lie_over_the_same_tissue(tmp_path: Path) -> None:
    values = tangled(1)
    outcome = run(written(tmp_path / "p.h5", values), tmp_path / "out", scale_zyx=(1, 2, 0.5))
    with open_volume(tmp_path / "out" / "instances.h5") as volume:
        expected = plainly(values, min_voxels=3, dilate_yx=1, scale_zyx=(1, 2, 0.5))
        np.testing.assert_array_equal(volume.read(), expected)
        assert volume.grid == Grid((40.0, 4.0, 8.0), (400.0, 78.0, 14.0))
    assert "voxels of the table are those of" in outcome.notes[0]


def test_a_scale_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "p.h5", tangled(1))
    with pytest.raises(SynmlopsError, match=r"--format zarr: .* use --format h5"):
        run(source, tmp_path / "out", suffix=".zarr", scale_zyx=(1, 2, 2))
    with pytest.raises(SynmlopsError, match=r"scale_zyx: \[0.1, 1.0, 1.0\] leaves no voxel of \(6, 19, 22\)"):
        run(source, tmp_path / "out", scale_zyx=(0.1, 1, 1))
    assert not (tmp_path / "out").exists()


def test_the_union_alone_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "p.h5", tangled(1)[2:], "union")
    with pytest.raises(SynmlopsError, match=r"polarity decodes pre, post and union, .* use rule: sites"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("option", [{"semantic": True}, {"scale_zyx": (1, 2, 2)}], ids=str)
def test_what_cannot_be_scored_is_refused(option: dict[str, Any]) -> None:
    (name,) = option
    params = EvaluateParams(rule="polarity", polarity=PolarityParams.model_validate(option))
    with pytest.raises(SynmlopsError, match=rf"evaluate\.polarity\.{name}: .*`synmlops decode`"):
        refuse_unscorable(params)
    refuse_unscorable(params.model_copy(update={"rule": "sites"}))


def test_an_even_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluate\.polarity\.dilate_yx: 4 is even, .* use 3 or 5"):
        PolarityParams(dilate_yx=4)
