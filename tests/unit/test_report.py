"""The report of an adaptation, on real small ones: what it says, what it escapes, and that it needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kinprune as kp
from kinprune import quantities, report
from kinprune.adapt_plan import AdaptPlan
from kinprune.adapted import summarise_adapted
from kinprune.building import Source, build, sample_sources
from kinprune.devices.goal import plain_goal
from kinprune.evaluation import Evaluation
from kinprune.kin import Search
from kinprune.report import ReportError, Tried, charts, render_report, write_report
from kinprune.report.answers import matrix_of, sample_answers
from kinprune.report.charts import (
    BOTTOM,
    COLOURS,
    LEFT,
    RIGHT,
    TOP,
    Reference,
    Scale,
    Series,
    chart,
    linear_axis,
    log_axis,
    log_ticks,
    ticks,
)
from kinprune.report.pictures import thumbnail
from kinprune.report.sizes import size_name, size_rows, smallest

SOURCE_CLASSES = ("ant", "bat", "cow", "dog", "eel")
CLASSES = ("apple", "bat", "plum")
HOSTILE = ("<script>alert('1')</script>", '" onload="x" &amp; \'', "鳥と木 עץ", "a" * 90, "{{ 7 * 6 }}\x07")
PLAN = kp.Plan(kp.Budget(keep=0.3), rounds=1, score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
QUICK = AdaptPlan(search=Search(count=3), recipe=kp.Recipe(steps=2, batch_size=8, evaluations=2))
FAMILY = (kp.Budget(keep=0.6), kp.Budget(keep=0.2), kp.Budget(keep=0.4))
VOID = {"br", "hr", "img", "input", "link", "meta"}


@dataclass(frozen=True, eq=False)
class World:
    """A bank of four tasks, how to make tasks of any classes for it, and one adaptation to a family of sizes."""

    bank: kp.Bank
    make_task: Callable[..., kp.DecodedTask]
    task: kp.DecodedTask
    adapted: kp.Adapted

    def adapt(self, task: kp.DecodedTask, *budgets: kp.Budget, **changes: Any) -> kp.Adapted:
        return kp.adapt(task, self.bank, budgets, replace(QUICK, **changes))


@pytest.fixture(scope="module")
def world(
    make_folder: Callable[..., Path], make_pixels: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> World:
    root = tmp_path_factory.mktemp("report")
    known = make_folder(root / "known", SOURCE_CLASSES, 8, 36)
    backbone = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    bank = kp.create_bank(root / "bank.db", backbone, kp.find_units(backbone.model, (32, 32), head=backbone.head))
    build(bank, sample_sources([Source(str(known))], 4, 2), PLAN)

    def make_task(classes: tuple[str, ...], name: str = "fruit") -> kp.DecodedTask:
        pixels = [make_pixels(name, number, 32) for name in classes for number in range(10)]
        labels = np.repeat(np.arange(len(classes)), 10)
        return kp.decode(kp.task_from_arrays(np.stack(pixels), labels, classes, name=name), backbone.preprocessing)

    task = make_task(CLASSES)
    adapted = kp.adapt(task, bank, FAMILY, QUICK)
    return World(bank, make_task, task, adapted)


class Page(HTMLParser):
    """A page read by the standard parser: its elements' attributes, its text, and whether all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.wrong = "", list[str](), list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, found in self.elements for key, value in found.items() if key == name and value]

    def numbers(self) -> set[float]:
        """The exact values behind what is shown rounded."""
        return {float(value["value"] or "nan") for tag, value in self.elements if tag == "data"}


def drawings(text: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def check_alone(text: str) -> Page:
    """Well-formed, and nothing is fetched, run or linked to."""
    page = Page(text)
    assert not page.wrong and not page.open
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert all(value.startswith("data:image/") for value in page.attributes("src"))
    assert not page.attributes("href") and not page.attributes("srcset")
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    styles = " ".join([*re.findall(r"<style>(.*?)</style>", text, re.DOTALL), *page.attributes("style")])
    assert "url(" not in styles and "@import" not in styles and "http" not in re.sub('data:[^"]*', "", text)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert set(" ".join(page.attributes("aria-labelledby")).split()) <= set(ids)
    assert all("alt" in found for tag, found in page.elements if tag == "img")
    assert all("scope" in found for tag, found in page.elements if tag == "th")
    for drawing in drawings(text):
        assert drawing.get("aria-hidden") or (drawing.find("title") is not None and drawing.find("desc") is not None)
    return page


def test_the_report_says_what_the_summary_says(world: World) -> None:
    summary = summarise_adapted(world.adapted)
    text = render_report(world.adapted, world.task, latencies=[8.5, 4.25, None, 2.5])
    page = check_alone(text)
    shown = page.numbers()
    for size in summary["sizes"]:
        assert {size["accuracy"], size["accuracy_closed_form"], size["accuracy_dense"]} <= shown
        assert {size[cost] for cost in ("params", "macs", "weight_bytes", "peak_memory_bytes")} <= shown
        assert set(size["kept"].values()) <= shown
    assert {summary["whole"]["parameters"], summary["whole"]["macs"]} <= shown
    assert len(summary["neighbours"]) == 3
    for row in summary["neighbours"]:
        assert {row["weight"], row["similarity"], row["accuracy"]} <= shown
        assert f"record {row['id']}" in page.text and all(name in page.text for name in row["classes"])
    for group in world.adapted.space.groups:
        assert f"<code>{group.name}</code>" in text
    assert {8.5, 4.25, 2.5} <= shown and "ONNX Runtime" in page.text
    for stage in summary["seconds"]:
        assert stage in page.text
    assert summary["versions"]["torch"] in page.text and world.adapted.backbone.fingerprint in page.text
    # The family's two charts, accuracy and loss; a legend's mark is hidden.
    assert sum(drawing.get("role") == "img" for drawing in drawings(text)) == 4


def test_shared_classes_are_marked(world: World) -> None:
    has_bat = sum("bat" in neighbour.entry.classes for neighbour in world.adapted.neighbours)
    page = Page(render_report(world.adapted, world.task))
    marked = [found for tag, found in page.elements if tag == "li" and "shared" in (found.get("class") or "").split()]
    assert len(marked) == has_bat > 0
    other = world.make_task(("apple", "pear"))
    assert "No class is also one of this task's" in Page(render_report(world.adapt(other, FAMILY[0]), other)).text


def test_one_size_without_steps_and_two_classes(world: World) -> None:
    task = world.make_task(("apple", "pear"))
    adapted = world.adapt(task, kp.Budget(keep=0.3), recipe=kp.Recipe(steps=0))
    text = render_report(adapted, task)
    page = check_alone(text)
    assert "No step was made" in page.text and "ONNX Runtime" not in page.text
    assert not [drawing for drawing in drawings(text) if drawing.get("role") == "img"]


def test_twenty_classes(world: World) -> None:
    task = world.make_task(tuple(f"kind {number}" for number in range(20)), name="many")
    adapted = world.adapt(task, kp.Budget(keep=0.5), recipe=kp.Recipe(steps=0))
    page = check_alone(render_report(adapted, task))
    cells = [found for tag, found in page.elements if tag == "td" and "cell" in (found.get("class") or "").split()]
    assert len(cells) == 2 * 20 * 20  # the size and the whole model
    assert all(f"kind {number}" in page.text for number in range(20))


def test_names_are_escaped(world: World) -> None:
    neighbours = [
        replace(one, entry=replace(one.entry, name=HOSTILE[0], classes=HOSTILE[:2]), shared=HOSTILE[:1])
        for one in world.adapted.neighbours
    ]
    task = replace(world.make_task(HOSTILE), name=f"</title>{HOSTILE[0]}")
    adapted = replace(world.adapt(task, *FAMILY), neighbours=tuple(neighbours))
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    text = render_report(adapted, task, samples=dict.fromkeys(HOSTILE, image))
    page = check_alone(text)  # no script, no attribute that begins with "on"
    assert all(name in page.text for name in HOSTILE)
    assert any(HOSTILE[1] in value for value in page.attributes("alt"))
    assert html.escape(HOSTILE[2]) in text


def test_what_is_no_unicode_is_written(world: World, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, world.adapted, replace(world.task, name="caf\udce9"))
    assert "caf\\udce9" in path.read_text(encoding="utf-8")


def test_samples_are_shown_beside_their_classes(world: World) -> None:
    name = world.adapted.neighbours[0].entry.classes[0]
    images = torch.randint(0, 255, (2, 3, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    page = check_alone(render_report(world.adapted, world.task, samples={name: images, "unknown": images[:0]}))
    expected = thumbnail(images[0])
    having = sum(name in neighbour.entry.classes for neighbour in world.adapted.neighbours)
    assert page.attributes("src").count(expected) == having > 0
    without = check_alone(render_report(world.adapted, world.task))
    assert expected not in without.attributes("src") and name in without.text


def test_the_same_input_gives_the_same_file(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    for path in (first, second, first):
        write_report(path, world.adapted, world.task, latencies=[1.0, None, None, None])
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"<!doctype html>\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.html", "second.html"]


def test_a_failure_leaves_the_old_report(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ReportError, match="No space left"):
        write_report(path, world.adapted, world.task)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    adapted, task = world.adapted, world.task
    uint8, latencies = torch.zeros(3, 8, 8, dtype=torch.uint8), [1.0, 2.0, 3.0, 4.0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"samples": {"ant": uint8}}, "class 'ant'"),
        ({"samples": {"ant": uint8[None].float()}}, "expected uint8"),
        ({"latencies": latencies[:3]}, "expected 4"),
        ({"tried": [Tried(0.5)]}, "1 exports were tried, expected 3"),
        ({"latencies": [*latencies[:3], -1.0]}, "above 0"),
        ({"latencies": [float("nan"), *latencies[1:]]}, "above 0"),
        ({"task": world.make_task(("apple", "pear"))}, "give the task that was adapted to"),
    ]
    for changes, said in cases:
        with pytest.raises(ReportError, match=said):
            write_report(tmp_path / "no.html", adapted, changes.pop("task", task), **changes)
    for place in (tmp_path, tmp_path / "absent" / "report.html"):
        with pytest.raises(ReportError, match="cannot be written"):
            write_report(place, adapted, task)
    assert not list(tmp_path.iterdir())


def test_limits_are_asked_and_reached(world: World) -> None:
    whole = world.adapted.whole
    task = world.task
    adapted = world.adapt(task, kp.Budget(keep=0.5, macs=whole.macs // 3), kp.Budget(parameters=whole.parameters))
    (both, loose) = size_rows(adapted)
    costs = adapted.sizes[0].selection.costs
    assert [limit.met for limit in both.limits] == [True, True]
    assert [limit.reached.value for limit in both.limits] == [costs.units, costs.macs]
    assert both.limits[0].reached.share == pytest.approx(costs.units / whole.units / 0.5)
    assert both.limits[1].reached.share == pytest.approx(costs.macs / (whole.macs // 3))
    assert loose.limits[0].reached.share == 1 and "units" not in loose.name
    # What no model can keep: every layer has at least one unit.
    small = world.adapt(task, kp.Budget(keep=1e-6), reconstruct=False)
    (least,) = size_rows(small)
    assert not least.limits[0].met and any("at least one" in note for note in least.notes)
    assert "Not all that was asked for is met" in render_report(small, task)


def test_an_export_that_answers_worse_is_told(world: World) -> None:
    first, *others = world.adapted.sizes
    accuracies = [sized.final.accuracy for sized in world.adapted.sizes]
    tried = [Tried(accuracies[0] - 0.05, 4_200_000), *(Tried(accuracy) for accuracy in accuracies[1:])]
    text = render_report(world.adapted, world.task, tried=tried)
    assert text.count("Exported in") == 1
    assert f"it answers {accuracies[0] - 0.05:.1%} of the test images: \u22125.0 points" in text
    assert "4.2 MB of memory, measured in ONNX Runtime." in text
    eight = replace(first, goal=plain_goal(first.budget, world.adapted.space, "int8"))
    told = render_report(
        replace(world.adapted, sizes=(eight, *others)), world.task, tried=[Tried(a) for a in accuracies]
    )
    assert "Exported in int8" in told and "0.0 points" in told and ", int8" in told


def test_sizes_have_names_of_their_own(world: World) -> None:
    assert size_name(kp.Budget(keep=0.125)) == "12.5% of units"
    budget = kp.Budget(keep=0.1, parameters=1_500_000, weight_bytes=4_000_000)
    assert size_name(budget) == "10% of units, 1.5 M parameters, 4 MB of weights"
    twice = replace(world.adapted, sizes=(world.adapted.sizes[0], world.adapted.sizes[0]))
    assert len({row.name for row in size_rows(twice)}) == 2
    assert smallest(world.adapted) == 1


def test_answers_are_the_models_own(world: World) -> None:
    sized = world.adapted.sizes[1]
    assert sample_answers(sized, world.task, 0).all_right == round(sized.final.accuracy * sized.final.n)
    # On the training images, with every other one called what it is not, there are more of both than are shown.
    labels = (world.task.train.labels + torch.arange(len(world.task.train)) % 2) % 3
    split = kp.Split(world.task.train.images.repeat(3, 1, 1, 1), labels.repeat(3))
    task = replace(world.task, test=split)
    answers = sample_answers(sized, task, 0)
    assert answers == sample_answers(sized, task, 0) != sample_answers(sized, task, 1)
    assert len(answers.right) == len(answers.wrong) == 12
    probabilities = kp.predict(sized.model, split.images, task.preprocessing)
    wrong = probabilities.argmax(dim=1) != split.labels
    for one in (*answers.right, *answers.wrong):
        place = one.number - 1
        assert one.true == CLASSES[int(split.labels[place])]
        assert one.answer == CLASSES[int(probabilities[place].argmax())]
        assert one.probability == pytest.approx(float(probabilities[place].max()))
    assert all(one.true == one.answer for one in answers.right) and all(one.true != one.answer for one in answers.wrong)
    assert (answers.all_right, answers.all_wrong) == (int((~wrong).sum()), int(wrong.sum()))
    surest = probabilities[wrong].max(dim=1).values.sort(descending=True).values[:12].tolist()
    assert [one.probability for one in answers.wrong] == pytest.approx(surest)


def test_a_matrix_by_hand() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 4]])
    evaluation = Evaluation(0.7, 1.0, counts, (0.75, None, 4 / 6), 10)
    matrix = matrix_of("small", evaluation, ("a", "b", "c"))
    assert [[cell.count for cell in row.cells] for row in matrix.rows] == counts.tolist()
    assert [cell.share for cell in matrix.rows[0].cells] == [0.75, 0.25, 0]
    assert [row.right for row in matrix.rows] == ["75.0%", quantities.NOTHING, "66.7%"]
    assert [(pair.true, pair.answer, pair.count, pair.images) for pair in matrix.commonest] == [
        ("c", "a", 2, 6),
        ("a", "b", 1, 4),
    ]
    many = Evaluation(1.0, 0.0, np.eye(31, dtype=np.int64), (1.0,) * 31, 31)
    assert matrix_of("many", many, tuple(map(str, range(31)))).rows == ()


def test_known_values_land_on_known_pixels() -> None:
    assert Scale(0, 10, 50, 426).at(5) == 238
    assert Scale(0, 1, 208, 12).at(0.25) == 159  # upwards: 208 - 196 / 4
    assert Scale(1e4, 1e8, 0, 400, logarithmic=True).at(1e5) == pytest.approx(100)
    x = linear_axis("Steps", [0, 60], str, LEFT, RIGHT, least_step=1)
    y = linear_axis("", [0.5, 1.0], str, BOTTOM, TOP, within=(0, 1))
    assert (x.scale.low, x.scale.high, y.scale.low, y.scale.high) == (0, 60, 0.5, 1)
    drawn = ET.fromstring(
        chart(
            "one",
            "Title <",
            "About & it",
            x,
            y,
            [Series(0, ((0, 0.5), (30, 0.75), (60, 1.0)))],
            Reference(0.75, "r", 15),
        )
    )
    line = drawn.find(".//polyline")
    # Across (50 + 426) / 2, up (208 + 12) / 2.
    assert line is not None and line.get("points") == "50,208 238,110 426,12"
    circles = [(one.get("cx"), one.get("cy")) for one in drawn.iter("circle")]
    assert circles == [("50", "208"), ("238", "110"), ("426", "12")]
    level = drawn.find("g[@class='reference']/line")
    cross = drawn.find("g[@class='reference']/path")
    assert level is not None and level.get("y1") == level.get("y2") == "110"
    assert cross is not None and cross.get("d") == "M139,105L149,115 M139,115L149,105"
    assert drawn.findtext("title") == "Title <" and drawn.findtext("desc") == "About & it"


def test_what_is_not_finite_is_left_out() -> None:
    x, y = linear_axis("", [0, 4], str, LEFT, RIGHT), linear_axis("", [0, 1], str, BOTTOM, TOP)
    drawn = chart("c", "t", "d", x, y, [Series(1, ((0, 0.0), (2, float("nan")), (4, float("inf"))))])
    assert len(list(ET.fromstring(drawn).iter("polygon"))) == 1 and "nan" not in drawn and "inf" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (0.766, 0.832, [0.76, 0.78, 0.8, 0.82, 0.84]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3, 3, [2.8, 2.9, 3.0, 3.1, 3.2]),
    ],
)
def test_ticks_are_round_and_span(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_logarithmic_ticks() -> None:
    assert log_ticks(8e5, 7e6) == [1e6, 2e6, 5e6]
    assert log_ticks(500, 2e6) == [1e3, 1e4, 1e5, 1e6]
    close = log_ticks(5.01e6, 5.2e6)
    assert len(close) >= 2 and all(5.01e6 <= value <= 5.2e6 for value in close)
    axis = log_axis("", [7.0], str, 0, 1)
    assert axis.scale.low < 7 < axis.scale.high and axis.scale.at(7) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [(605e3, 1.33e6, 2.23e6), (12.2e6, 55e6), (3e6, 9.9e6), (1.0, 1e9), (5e6,)])
def test_labels_of_a_logarithmic_axis_have_room(values: tuple[float, ...]) -> None:
    axis = log_axis("", values, quantities.count, charts.LEFT, charts.RIGHT)
    assert len(axis.ticks) >= 2 and [value for value, _ in axis.ticks] == sorted(value for value, _ in axis.ticks)
    for (low, left), (high, right) in pairwise(axis.ticks):
        assert axis.scale.at(high) - axis.scale.at(low) >= charts.CHARACTER * (len(left) + len(right)) / 2
    if values[0] == 605e3:
        assert 1e6 in dict(axis.ticks)


def test_thumbnails_are_the_images() -> None:
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[0, :, 100:] = 255
    address = thumbnail(image, 50)
    head, _, body = address.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/jpeg;base64" and picture.size == (50, 25)
    assert picture.getpixel((5, 12)) == pytest.approx((0, 0, 0), abs=12)
    assert picture.getpixel((45, 12)) == pytest.approx((255, 0, 0), abs=12)
    assert Image.open(io.BytesIO(base64.b64decode(thumbnail(image[:, :8, :8]).partition(",")[2]))).size == (8, 8)


def test_numbers_for_people() -> None:
    assert [quantities.count(value) for value in (12, 1240, 999_600, 2_536_325)] == ["12", "1.24 k", "1 M", "2.54 M"]
    assert [quantities.byte_count(value) for value in (12, 4_620_000)] == ["12 B", "4.62 MB"]
    assert [quantities.round_percent(value) for value in (0, 0.001, 0.2, 0.999, 1)] == [
        "0%",
        "<1%",
        "20%",
        ">99%",
        "100%",
    ]
    assert [quantities.points(value) for value in (0.016, -0.05, -0.0001)] == ["+1.6", f"{quantities.MINUS}5.0", "0.0"]
    assert [quantities.seconds(value) for value in (0.0149, 4.21, 99.97, 200)] == [
        "0.01 s",
        "4.2 s",
        "1 min 40 s",
        "3 min 20 s",
    ]
    assert [quantities.setting(value) for value in (True, None, 1e-4, 3, "a")] == ["yes", "none", "0.0001", "3", "a"]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_and_marks_can_be_read_in_light_and_dark() -> None:
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split("@media screen")[:2])
    assert light.keys() == dark.keys() and f"series-{COLOURS - 1}" in light
    assert style.count("#") == 2 * len(light)  # no colour but these
    for tokens in (light, dark):
        for ground in ("paper", "wash"):
            for name in tokens.keys() - {"paper", "wash", "line"}:
                first, second = sorted((luminance(tokens[name]), luminance(tokens[ground])))
                assert (second + 0.05) / (first + 0.05) >= 4.5, (name, ground)
