"""The page of evidence says what the rows say: its tables, its figures, and where a bank pays."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = [[f"a{number}", f"b{number}"] for number in range(6)]


@pytest.fixture(autouse=True)
def from_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def row(task: list[str], method: str, accuracy: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        **{"protocol": "vit", "model": "a", "stage": "test", "data": "d", "classes": task, "method": method},
        **{"keep": 0.1, "shots": None, "sources": None, "records": 11, "whole": 0.9, "accuracy": accuracy},
        **{"seconds": {"start": 10.0, "60": 20.0}, "details": {"similarity": [-1.0, -2.0]}, **more},
    }


def rows() -> Iterator[dict[str, Any]]:
    """Six tasks: the default 4 points above Taylor at first, 1 after 60 steps; kin better the nearer they are."""
    for number, task in enumerate(TASKS):
        better = number / 50
        yield row(task, "smsp", {"0": 0.70 + better, "15": 0.72 + better, "60": 0.74 + better})
        yield row(task, "taylor", {"0": 0.66 + better, "15": 0.70 + better, "60": 0.73 + better})
        yield row(task, "scratch, ten times the steps", {"60": 0.75}, seconds={"60": 130.0})
        yield row(task, "kin", {"0": 0.6 + better}, details={"similarity": [-1.0 + better, -2.0 + better]})
        for which, lost in (("random", 0.02), ("farthest", 0.05), ("all", -0.01)):
            yield row(task, f"kin, {which}", {"0": 0.6 + better - lost})
        for sources in (5, 20):
            yield row(task, "kin", {"0": 0.5 + better}, sources=sources)
        for method in ("smsp", "taylor"):
            yield row(task, method, {"0": 0.4 if method == "smsp" else 0.3}, shots=1)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "vit.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows()))
    unseen = [row(task, "smsp", {"0": 0.5, "15": 0.6, "60": 0.7}, data="trash") for task in TASKS[:2]]
    (folder / "vit-unseen.jsonl").write_text("".join(json.dumps(one) + "\n" for one in unseen))
    sized = [
        row(task, method, {"0": accuracy, "15": accuracy}, keep=keep, protocol="vit-broad")
        for task in TASKS
        for keep in (0.5, 0.2)
        for method, accuracy in (("smsp", 0.8), ("taylor", 0.77))
    ]
    (folder / "vit-broad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sized))
    shared = [row(task, "smsp", {"0": 0.9, "15": 0.9, "60": 0.9}, protocol="vit-all-classes") for task in TASKS]
    shared += [row(task, "taylor", {"0": 0.8, "15": 0.85}, protocol="vit-all-classes") for task in TASKS]
    (folder / "vit-all-classes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in shared))
    told = {"records": 11, "broad_records": 1, "narrow_seconds": 900.0, "broad_seconds": 300.0}
    (folder / "vit.bank.json").write_text(json.dumps(told))
    return folder


def page_of(*names: str) -> str:
    return "# Words\n" + "".join(f"\nBefore {name}\n<!-- table: {name} -->\nold\n<!-- end -->\n" for name in names)


def test_tables_and_figures_are_written_from_the_rows(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.study.evidence import main

    page, figures = tmp_path / "page.md", tmp_path / "figures"
    names = ("test vit", "steps", "sizes", "shots", "sources", "similarity", "parts", "unseen", "shared", "costs")
    page.write_text(page_of(*names))
    words = ["--results", str(results), "--page", str(page), "--figures", str(figures)]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["protocols"] == {"vit": 66}
    text = page.read_text()
    assert "old" not in text and all(f"Before {name}" in text for name in names)
    for line in (
        "| taylor | 6 | 90.0% | 71.0% | +4.0 (+4.0 to +4.0) `+` | 75.0% | +2.0 (+2.0 to +2.0) `+` | 78.0% |",
        "| taylor | 60 |",
        "| ViT-tiny | 0.2 | 15 | 6 | 80.0% | 77.0% | +3.0 (+3.0 to +3.0) |",
        "| ViT-tiny | taylor | 1 | 6 | 30.0% | +10.0 (+10.0 to +10.0) |",
        "| ViT-tiny | kin | 5 | 6 | 55.0% |  |",
        "| ViT-tiny | 6 | 1.00 | +2.0 (+2.0 to +2.0) | +5.0 (+5.0 to +5.0) | -1.0 (-1.0 to -1.0) |",
        "| ViT-tiny | kin | taylor | 6 | 65.0% | 71.0% | +6.0 (+6.0 to +6.0) |",
        "| ViT-tiny | trash | smsp | 2 | 50.0% | 60.0% | 70.0% |",
        "| ViT-tiny | taylor | 6 | 80.0% | +10.0 (+10.0 to +10.0) | 85.0% | +5.0 (+5.0 to +5.0) |  |  |",
        "| ViT-tiny | scratch, ten times the steps | 0.33 | 0.08 | 30 | 130 | 12 tasks | 3 tasks |",
        "| ViT-tiny | taylor | 0.33 | 0.08 | 30 | 30 | never | never |",
    ):
        assert line in text, f"{line}\n{text}"
    drawn = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert len(drawn) == 6 and all(content.startswith(b"<?xml") for content in drawn.values())
    assert b"taylor" in drawn["evidence-leads.svg"] and b"ViT-tiny" in drawn["evidence-costs.svg"]
    assert main(words) == 0
    assert page.read_text() == text and all((figures / name).read_bytes() == drawn[name] for name in drawn)


def test_what_cannot_be_written_is_refused(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.study.evidence import main

    page = tmp_path / "page.md"
    page.write_text(page_of("steps", "magic"))
    assert main(["--results", str(results), "--page", str(page), "--figures", str(tmp_path)]) == 2
    assert "'magic', expected one of" in capsys.readouterr().err and page.read_text() == page_of("steps", "magic")
    assert main(["--results", str(tmp_path), "--page", str(page)]) == 2
    assert "has no rows" in capsys.readouterr().err


def test_the_page_of_evidence_is_what_its_rows_give() -> None:
    from benchmarks.study.evidence import fill, read_results, tables

    page = (ROOT / "docs" / "evidence.md").read_text()
    results = read_results(ROOT / "benchmarks" / "results" / "study")
    assert fill(page, tables(results)) == page, "run: python -m benchmarks.study.evidence"


def test_a_bank_pays_where_it_saves() -> None:
    from benchmarks.study.costs import Costs

    costs = Costs(1000, 100, 10, {"slow": 110, "fast": 10})
    assert costs.pays_after("slow", costs.bank) == 10 and costs.pays_after("slow", costs.broad) == 1
    assert math.isinf(costs.pays_after("fast", costs.broad))


def test_steps_to_are_known_only_where_all_were_run() -> None:
    from benchmarks.study.statistics import rank_correlation, steps_to

    found = [row(task, "smsp", {"0": 0.7, "15": 0.799, "60": 0.8}) for task in TASKS]
    assert steps_to(found, "smsp") == 15 and steps_to(found, "smsp", 1.0) == 60 and steps_to(found, "taylor") is None
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [3, 2, 1]))
