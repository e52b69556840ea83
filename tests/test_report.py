"""The report as its reader's browser gets it."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from synmlops.synapses.metrics import score_instances
from synmlops.synapses.partners import partners_of
from synmlops.tracking.mistakes import mistakes_of
from synmlops.tracking.overlays import outline
from synmlops.tracking.report import RegionView, ReportContent, write_report

VOXEL_NM = (40.0, 8.0, 8.0)
SHAPE = (6, 60, 80)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def links(self) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "href")
        ]

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            name == tag and all(attrs.get(key.rstrip("_")) == value for key, value in attributes.items())
            for name, attrs in self.tags
        )


def put(labels: np.ndarray, site: int, corner: tuple[int, int, int], *, swapped: bool = False) -> None:
    """Put a site of 3 x 10 x 20 voxels: pre on the left, post on the right."""
    z, y, x = corner
    sides = (2 * site, 2 * site - 1) if swapped else (2 * site - 1, 2 * site)
    labels[z : z + 3, y : y + 10, x : x + 10] = sides[0]
    labels[z : z + 3, y : y + 10, x + 10 : x + 20] = sides[1]


def region(*, sides: bool = True, known: bool = True, name: str = "test_21") -> RegionView:
    """A region with one synapse found, one missed, one false and one the wrong way round."""
    true, predicted = np.zeros((2, *SHAPE), np.uint16)
    put(true, 1, (0, 2, 2))
    put(true, 2, (0, 30, 2))
    put(true, 3, (3, 2, 50))
    put(predicted, 1, (0, 2, 2))
    put(predicted, 2, (3, 2, 50), swapped=True)
    put(predicted, 3, (2, 40, 50))
    if not sides:
        true, predicted = (true + 1) // 2, (predicted + 1) // 2
    tables = [partners_of(volume, voxel_nm=VOXEL_NM) if sides else None for volume in (predicted, true)]
    return RegionView(
        name=name,
        fold="all",
        image=np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8),
        predicted=predicted,
        true=true if known else None,
        sides=sides,
        predicted_partners=tables[0],
        true_partners=tables[1] if known else None,
        voxel_nm=VOXEL_NM,
        offset_nm=(0.0, 1000.0, 0.0),
    )


@pytest.fixture
def content() -> ReportContent:
    scores = {"voxel_union_f1": 0.8123, "voxel_union_precision": 0.7, "detection_f1": 0.6667}
    scores |= {
        "detection_true": 3.0,
        "detection_predicted": 3.0,
        "direction_accuracy": 0.5,
        "partner_f1": 0.25,
    }
    return ReportContent(
        title="Phantom <b>& co</b>",
        run={"run key": "6a0d2f6c", "commit": "26eaa35"},
        scores=scores,
        thresholds={"all": 0.42},
        threshold_source="best on validation",
        per_region=pd.DataFrame({"region": ["test_21"], "detection_f1": [0.6667], "partner_true": [1234]}),
        params={"seed": 3, "evaluate.iou": 0.5, "evaluate.mask": None},
        curves=pd.DataFrame(
            {"step": range(1500), "loss": np.linspace(1, 0.1, 1500), "validation_f1": [np.nan] * 1499 + [0.8]}
        ),
        precision_recall=pd.DataFrame(
            {
                "channel": "union",
                "threshold": [0.2, 0.4],
                "precision": [0.5, 0.9],
                "recall": [1, 0.5],
                "f1": 0.6,
            }
        ),
        regions=[region()],
        notes=["one <region> was left out"],
    )


@pytest.fixture
def empty() -> ReportContent:
    nothing = pd.DataFrame()
    return ReportContent("Nothing", {}, {}, {}, "", nothing, {}, nothing, nothing, [], [])


def written(content: ReportContent, folder: Path) -> Page:
    write_report(content, folder / "report.html")
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page(folder / "report.html")


def test_scores_thresholds_and_lineage_stand_in_the_text(content: ReportContent, tmp_path: Path) -> None:
    text = written(content, tmp_path).text
    for part in ("0.812", "0.667", "0.500", "0.250", "0.420", "best on validation", "6a0d2f6c", "26eaa35"):
        assert part in text
    assert "Synapse voxel F1 0.812 precision" not in text  # recall is not known: no half a line
    assert "Detection F1 0.667 3 true · 3 predicted" in text
    assert "1 234" in text
    assert "iou 0.5" in text


def test_what_users_name_is_escaped(content: ReportContent, tmp_path: Path) -> None:
    named = dataclasses.replace(content, regions=[region(name='<script>"x"'), region(name="b")])
    page = written(named, tmp_path)
    assert page.count("script") == 0
    assert page.count("region") == 0
    assert "Phantom <b>& co</b>" in page.text
    assert '<script>"x"' in page.text


def test_nothing_outside_the_file_is_asked_for(content: ReportContent, tmp_path: Path) -> None:
    page = written(content, tmp_path)
    links = page.links()
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "http" not in re.sub(r"data:[^\"]*", "", (tmp_path / "report.html").read_text(encoding="utf-8"))
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors == {attrs["id"] for tag, attrs in page.tags if tag == "h2"}


def test_images_are_whole(content: ReportContent, tmp_path: Path) -> None:
    links = [link for link in written(content, tmp_path).links() if link.startswith("data:image/jpeg")]
    sizes = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).size for link in links]
    assert (80, 60) in sizes  # a section
    assert len(sizes) == 2 + 3  # sections that show all sites; missed, false, reversed


def test_each_mistake_says_where_it_is(content: ReportContent, tmp_path: Path) -> None:
    text = written(content, tmp_path).text
    missed = text[text.index("Missed · 1") : text.index("False · 1")]
    assert "site 2 · 600 voxels" in missed
    z, y, x = (int(part) for part in re.search(r"voxel (\d+), (\d+), (\d+)", missed).groups())
    assert region().true[z, y, x] in (3, 4)
    assert f"{40 * z}, {1000 + 8 * y}, {8 * x} nm" in missed
    assert "site 3 · 600 voxels" in text[text.index("False · 1") : text.index("Reversed · 1")]
    assert "site 3 · 600 voxels · predicted site 2, IoU 1.00" in text[text.index("Reversed · 1") :]


def test_without_sides_there_is_no_word_of_polarity(content: ReportContent, tmp_path: Path) -> None:
    union = {
        name: value for name, value in content.scores.items() if not name.startswith(("direc", "partner"))
    }
    page = written(dataclasses.replace(content, regions=[region(sides=False)], scores=union), tmp_path)
    for word in ("Direction", "Reversed", "pre", "Partner"):
        assert not re.search(rf"\b{word}\b", page.text)
    assert "predicted synapse" in page.text
    assert page.count("path", class_="area union") > 0
    assert "Missed · 1" in page.text


def test_without_truth_only_the_prediction_is_shown(content: ReportContent, tmp_path: Path) -> None:
    page = written(dataclasses.replace(content, regions=[region(known=False)], scores={}), tmp_path)
    assert "Nothing could be scored" in page.text
    assert "only the prediction is drawn" in page.text
    assert "Mistakes" not in page.text
    assert "true pre" not in page.text


def test_a_region_without_synapses_still_shows_its_tissue(content: ReportContent, tmp_path: Path) -> None:
    full = region()
    bare = dataclasses.replace(
        full, predicted=np.zeros_like(full.predicted), true=np.zeros_like(full.predicted)
    )
    page = written(dataclasses.replace(content, regions=[bare]), tmp_path)
    assert "0 predicted, 0 true" in page.text
    assert page.text.count("None.") == 3


def test_nothing_at_all_still_reads(empty: ReportContent, tmp_path: Path) -> None:
    page = written(empty, tmp_path)
    assert "Nothing could be scored" in page.text
    assert page.count("img") == page.count("image") == 0
    assert [link for link in page.links() if link != "#run"] == []


def test_unknown_scores_are_listed_and_nan_is_a_dash(empty: ReportContent, tmp_path: Path) -> None:
    scores = {"rand_index": 0.5, "voxel_union_f1": float("nan")}
    text = written(dataclasses.replace(empty, scores=scores), tmp_path).text
    assert "rand index 0.500" in text
    assert "Synapse voxel F1 –" in text  # noqa: RUF001
    assert "nan" not in text


def test_same_content_gives_the_same_bytes(content: ReportContent, tmp_path: Path) -> None:
    for name in "ab":
        write_report(content, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_many_large_regions_stay_below_five_megabytes(content: ReportContent, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 1400, 1400), np.uint16)
    labels = np.zeros(image.shape, np.uint16)
    labels[:, 5:1395:40, 5:1395:40] = np.arange(1, 1 + 35 * 35).reshape(35, 35)
    large = dataclasses.replace(
        region(sides=False), image=image, predicted=labels, true=np.zeros_like(labels)
    )
    page = written(dataclasses.replace(content, regions=[large] * 14), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert "4 more regions are scored but not drawn" in page.text
    assert "False · 12 of 17" in page.text


def test_volumes_of_different_shape_are_refused(content: ReportContent, tmp_path: Path) -> None:
    odd = dataclasses.replace(region(), true=np.zeros((1, 2, 3), np.uint16))
    with pytest.raises(ValueError, match="test_21"):
        write_report(dataclasses.replace(content, regions=[odd]), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_those_of_the_detection_score() -> None:
    view = region()
    scores = score_instances(view.predicted, view.true, pairs=True, voxel_nm=VOXEL_NM, iou=0.5)
    kinds = [mistake.kind for mistake in mistakes_of(view.predicted, view.true, sides=True, iou=0.5)]
    assert kinds.count("missed") == scores.by_iou.fn == 1
    assert kinds.count("false") == scores.by_iou.fp == 1
    assert kinds.count("reversed") == scores.direction.matched - scores.direction.right == 1


def test_outline_encloses_the_mask() -> None:
    """Fill the path by the even-odd rule: what is inside is the mask again, holes and corners included."""
    mask = np.random.default_rng(1).random((12, 17)) < 0.5
    filled = np.zeros(mask.shape, bool)
    for loop in re.findall(r"M[^z]*z", outline(mask)):
        x, y = (int(value) for value in re.match(r"M(\d+) (\d+)", loop).groups())
        start = x, y
        steps = [(kind, int(value)) for kind, value in re.findall(r"([HV])(\d+)", loop)]
        for kind, value in [*steps, ("H" if steps[-1][0] == "V" else "V", start[steps[-1][0] == "H"])]:
            if kind == "H":
                x = value
                continue
            low, high = sorted((y, value))
            filled[low:high, x:] ^= True
            y = value
        assert (x, y) == start
    np.testing.assert_array_equal(filled, mask)
