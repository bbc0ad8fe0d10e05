"""Long lists of names are cut short where people read them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kinprune.bank import Accuracy, Entry
from kinprune.kin import Neighbour
from kinprune.quantities import SOME, some_names
from kinprune.report.kinship import PICTURED, neighbour_rows


@pytest.mark.parametrize(("count", "end"), [(2, "n0, n1"), (SOME, f"n{SOME - 1}"), (SOME + 1, " and 1 more")])
def test_some_names_says_how_many_it_leaves_out(count: int, end: str) -> None:
    found = some_names([f"n{number}" for number in range(count)])
    assert found.startswith("n0, n1") and found.endswith(end) and found.count(",") == min(count, SOME) - 1


def test_the_report_shows_what_a_broad_task_shares_first() -> None:
    names = tuple(f"n{number}" for number in range(PICTURED + 8))
    entry = Entry(1, "key", "broad", names, Accuracy(0.9, 0.5, 0.8), "2026-01-01", "0" * 64, 10)
    broad = Neighbour(entry, -1.0, (names[-1],))
    narrow = Neighbour(replace(entry, classes=names[:2]), -2.0, ())
    adapted: Any = SimpleNamespace(neighbours=(broad, narrow), weights=(0.6, 0.4))
    first, second = neighbour_rows(adapted)
    assert [card.name for card in first.classes] == [names[-1], *names[: PICTURED - 1]] and first.more == 8
    assert first.classes[0].shared and not first.classes[1].shared
    assert len(second.classes) == 2 and second.more == 0
