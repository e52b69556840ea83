"""What a dry run shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from synmlops.params import SynmlopsError
from synmlops.volumes.importers.survey import Survey, draw_synapses, name_of_outputs, render
from synmlops.volumes.prepared import POST, PRE

VOXEL_NM = (40.0, 8.0, 8.0)


def _shown(survey: Survey) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(survey))
    return captured.get()


def test_a_survey_lists_what_was_found_and_what_is_odd() -> None:
    text = _shown(
        Survey("a.hdf", (("synapses", "12"), ("voxel size", "40 x 4 x 4 nm")), ("3 have no cleft",))
    )
    assert [line.split() for line in text.splitlines()][:2] == [["a.hdf"], ["synapses", "12"]]
    assert "! 3 have no cleft" in text
    assert "nothing odd" not in text
    assert "nothing odd found" in _shown(Survey("a.hdf", ()))


def _colours(path: Path) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(np.asarray(Image.open(path)).reshape(-1, 3), axis=0)}


def test_sides_and_points_are_drawn_where_they_lie(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(90, 160, (5, 300, 300), np.uint8)
    sides = np.zeros(image.shape, np.uint8)
    sides[2, 140:150, 140:150], sides[2, 140:150, 160:170] = PRE, POST
    points = [[[2, 145, 145], [2, 145, 165]]]
    picture = tmp_path / "few.png"
    draw_synapses(picture, image=image, sides=sides.__getitem__, points_zyx=points, voxel_nm=VOXEL_NM)
    pixels = np.asarray(Image.open(picture)).astype(int)
    blue, orange = (np.abs(pixels - colour).sum(axis=-1) < 6 for colour in ((42, 143, 208), (224, 130, 20)))
    x_of_pre, x_of_post = (np.nonzero(where[60:])[1].mean() for where in (blue, orange))
    assert 35 < x_of_post - x_of_pre < 48  # 20 voxels of 8 nm, in a tile of 256 pixels for 1000 nm


def test_a_volume_without_image_and_sides_shows_its_points(tmp_path: Path) -> None:
    missing = [np.nan] * 3
    points = [[[1, 5, 5], [2, 9, 9]], [missing, [1, 5, 5]]]
    draw_synapses(
        tmp_path / "few.png", image=None, sides=None, points_zyx=points, voxel_nm=VOXEL_NM, titles=("a", "b")
    )
    assert {(42, 143, 208), (224, 130, 20)} <= _colours(tmp_path / "few.png")


def test_points_at_the_border_and_beyond_it_are_drawn(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(90, 160, (3, 40, 40), np.uint8)
    points = [[[0, 0, 0], [2, 39, 39]], [[-3, -50, 500], [9, 80, 80]]]
    draw_synapses(tmp_path / "few.png", image=image, sides=None, points_zyx=points, voxel_nm=VOXEL_NM)
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_the_synapses_drawn_are_spread_over_all(tmp_path: Path) -> None:
    points = np.arange(60).reshape(10, 2, 3)
    drawn: list[int] = []

    def sides(box: tuple[slice, slice, slice]) -> np.ndarray:
        drawn.append(box[0].start)
        return np.zeros([part.stop - part.start for part in box], np.uint8)

    draw_synapses(tmp_path / "few.png", image=None, sides=sides, points_zyx=points, voxel_nm=VOXEL_NM, n=3)
    assert drawn == [0, 24, 54]


def test_no_synapse_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no synapse"):
        draw_synapses(tmp_path / "few.png", image=None, sides=None, points_zyx=[], voxel_nm=VOXEL_NM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".."])
def test_outputs_do_not_leave_their_folder(name: str) -> None:
    with pytest.raises(SynmlopsError, match="must be a plain name"):
        name_of_outputs("sample", name)
