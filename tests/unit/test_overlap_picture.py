from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinprune.bank import Accuracy, Entry
from kinprune.overlap_picture import (
    BASE,
    HEAD,
    LAYERS,
    PAIRS,
    TOP,
    PictureError,
    binned,
    check_picture,
    overlap_page,
    overlap_svg,
    place,
    short_names,
    shown,
    ticks,
    write_picture,
)
from kinprune.overlap_study import Correlations, GroupOverlap, KindOverlap, Means, OverlapStudy
from kinprune.pair_statistics import Estimate

SVG = "{http://www.w3.org/2000/svg}"


def means(value: float, chance: float = 0.1) -> Means:
    most = Estimate(value + 0.1, value, value + 0.2)
    return Means(chance, Estimate(value), most, Estimate(value), *(Estimate(None),) * 4)


def study(kinds: int = 1, names: tuple[str, ...] = ("a.0.w", "a.1.w")) -> OverlapStudy:
    """Three tasks and three pairs: similarity 0, .5 and 1, mean IoU .2, .3 and .4; the last shares a class."""
    entries = tuple(Entry(number, str(number), "t", ("x", "y"), Accuracy(1, 1, 1), "", "", 0) for number in range(1, 4))
    groups = tuple(GroupOverlap(name, 20, 2, means(0.2 + 0.1 * number)) for number, name in enumerate(names))
    by = Correlations(Estimate(0.5, 0.25, 0.75), Estimate(None), Estimate(0))
    kind = KindOverlap("filter", means(0.3), by, groups, np.array([0.2, 0.3, 0.4]))
    first, second = np.array([0, 0, 1]), np.array([1, 2, 2])
    shared, similarity = np.array([0, 0, 1]), np.array([0, 0.5, 1])
    return OverlapStudy(0.1, entries, 3, first, second, shared, shared / 3, similarity, (kind,) * kinds)


def circles(svg: str, kind: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [
        (float(found.attrib["cx"]), float(found.attrib["cy"]))
        for found in root.iter(f"{SVG}circle")
        if found.attrib["class"] == kind
    ]


def test_points_are_where_their_numbers_are() -> None:
    svg = overlap_svg(study(), name="net")
    # The highest of all is the upper end of an interval, .5: both axes go from 0 to .5.
    left, right = LAYERS
    gap = (right - left) / 2
    height = BASE - TOP
    assert circles(svg, "least") == [
        (left + gap / 2, pytest.approx(BASE - height * 0.4, abs=0.06)),
        (left + gap * 1.5, pytest.approx(BASE - height * 0.6, abs=0.06)),
    ]
    assert [y for _, y in circles(svg, "most")] == pytest.approx([BASE - height * 0.6, BASE - height * 0.8], abs=0.06)
    dots = {
        kind: [tuple(map(float, one)) for one in re.findall(r"M([\d.]+) ([\d.]+)h0", path)]
        for kind, path in re.findall(r'<path class="dots (apart|sharing)" d="([^"]+)"', svg)
    }
    left, right = PAIRS
    start, span = left + (right - left) * 0.03 / 1.06, (right - left) / 1.06
    assert [*dots["apart"], *dots["sharing"]] == [
        pytest.approx((start + span * x, BASE - height * y / 0.5), abs=0.06)
        for x, y in ((0, 0.2), (0.5, 0.3), (1, 0.4))
    ]
    chances = re.findall(r'<polyline class="chance" points="([^"]+)"', svg)
    heights = [float(point.split(",")[1]) for line in chances for point in line.split()]
    assert len(chances) == 2 and heights == pytest.approx([BASE - height * 0.2] * 6, abs=0.06)


@pytest.mark.parametrize("kinds", [1, 2])
def test_the_svg_needs_nothing_else_and_has_a_row_for_each_kind(kinds: int) -> None:
    svg = overlap_svg(study(kinds), name='a <b> & "c"')
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}title") is not None and 'a <b> & "c"' in "".join(root.itertext())
    assert float(root.attrib["height"]) > HEAD + kinds * BASE
    assert len([found for found in root.iter(f"{SVG}g")]) == kinds
    assert not re.findall(r"(?:href|src|url\(|@import|<script)", svg)
    assert svg.count("http") == 1  # the namespace
    words = " ".join(root.itertext())
    for expected in ("3 tasks, all 3 pairs", "best 0.1", "0.500 (0.250 to 0.750)", "chance", "forward order, a.*.w"):
        assert expected in words
    assert "prefers-color-scheme: dark" in svg


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_has_the_picture_and_the_numbers() -> None:
    one = study(2, ("first", "<second>"))
    page = overlap_page(one, name="net & co")
    assert overlap_svg(one, name="net & co") in page
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    row = ["<second>", "20", "2", "0.100", "0.300", "3.00", "0.300", "0.400 (0.300 to 0.500)", "not defined"]
    start = reader.cells.index("<second>")
    assert reader.cells[start : start + len(row)] == row
    assert "two or more" in reader.cells


def test_many_layers_of_long_names_are_still_a_picture() -> None:
    names = tuple(f"stage{number}.some_very_long_name_of_{number}" for number in range(120))
    one = study(names=names)
    groups = tuple(GroupOverlap(name, 9, 1, means(0.1)) for name in names)
    kind = KindOverlap("filter", means(0.1), one.kinds[0].correlations, groups, one.kinds[0].pairs)
    root = ElementTree.fromstring(overlap_svg(OverlapStudy(**{**vars(one), "kinds": (kind,)}), name="net"))
    labels = [found for found in root.iter(f"{SVG}text") if "rotate(-40" in found.attrib.get("transform", "")]
    assert 20 < len(labels) < 60


def test_nothing_that_varies_is_drawn_too() -> None:
    one = study(names=("only",))
    flat = OverlapStudy(**{**vars(one), "similarity": np.full(3, 0.25)})
    ElementTree.fromstring(overlap_svg(flat, name="net"))


def test_ticks_places_and_names() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 0.29) == [0, 0.1, 0.2]
    assert ticks(-0.13, 0.4) == [0, 0.2, 0.4]
    assert ticks(0.11, 0.52, 4) == [0.2, 0.4]
    assert place(0.25, 0, 1, 100, 20) == 80
    assert short_names(["blocks.0.mlp", "blocks.11.mlp"]) == (["0", "11"], "blocks.*.mlp")
    assert short_names(["layer1.0.conv1", "layer2.0.conv1"]) == (["layer1", "layer2"], "*.0.conv1")
    assert short_names(["first", "second"]) == (["first", "second"], "")
    assert short_names(["a.b"]) == (["a.b"], "")
    assert short_names(["a.b", "a.b.c"]) == (["b", "b.c"], "a.*")
    assert shown(Estimate(-0.0004, -0.2, 0)) == "0.000 (-0.200 to 0.000)"
    assert shown(Estimate(0.12345)) == "0.123" and shown(Estimate(None)) == "not defined"


def test_bins_hold_equally_many_and_keep_equals_together() -> None:
    x = np.array([4.0, 1, 2, 3])
    assert binned(x, 10 * x, 2) == [(1.5, 15), (3.5, 35)]
    assert binned(np.zeros(5), np.arange(5.0), 3) == [(0, 2)]
    tied = np.array([0.0] * 8 + [1, 2])
    assert binned(tied, tied, 5) == [(0, 0), (1.5, 1.5)]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "there.svg"
    there.write_text("mine")
    check_picture(there, overwrite=True)
    check_picture(tmp_path / "new" / "x.HTML")
    with pytest.raises(PictureError, match=r"is there already: .* --overwrite"):
        check_picture(there)
    with pytest.raises(PictureError, match=r"suffix '.png', expected a picture's: .svg or .html"):
        check_picture(tmp_path / "x.png")
    with pytest.raises(PictureError, match="no folder one may write to"):
        check_picture(there / "x.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(PictureError, match="is a folder"):
        check_picture(tmp_path / "folder.svg", overwrite=True)


def test_files_are_written_whole(tmp_path: Path) -> None:
    for name in ("x.svg", "deep/x.html"):
        write_picture(study(), tmp_path / name, name="net")
    assert (tmp_path / "x.svg").read_text() == overlap_svg(study(), name="net")
    assert (tmp_path / "deep" / "x.html").read_text() == overlap_page(study(), name="net")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["x.html", "x.svg"]
