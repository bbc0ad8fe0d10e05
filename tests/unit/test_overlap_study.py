from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinprune import overlap_study as module
from kinprune.backbones import Backbone, load_backbone
from kinprune.bank import Bank
from kinprune.errors import BankError, BudgetError
from kinprune.overlap import expected_overlap
from kinprune.overlap_study import (
    OverlapStudy,
    compare_tasks,
    source_tasks,
    study_overlap,
    summarise_pair,
    summarise_study,
)
from kinprune.pair_statistics import Estimate
from kinprune.selection import Budget
from kinprune.units import UnitSpace, find_units
from kinprune.voting import counts_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from overlap_bank import family_records, make_bank

Make = Callable[..., Bank]


def loaded(name: str) -> tuple[Backbone, UnitSpace]:
    side = 16 if name == "tiny_net:tiny" else 32
    backbone = load_backbone(name, num_classes=3, image_size=side, random=name != "tiny_net:tiny")
    return backbone, find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)


@pytest.fixture(scope="module")
def tiny() -> tuple[Backbone, UnitSpace]:
    return loaded("tiny_net:tiny")


@pytest.fixture
def make(tiny: tuple[Backbone, UnitSpace], tmp_path: Path) -> Make:
    def bank(families: int, tasks: int, *, units: float, order: int = 1, name: str = "bank.db", seed: int = 0) -> Bank:
        records = family_records(*tiny, families, tasks, units=units, seed=seed)
        return make_bank(tmp_path / name, *tiny, records[::order])

    return bank


def known(found: Estimate) -> float:
    assert found.value is not None
    return found.value


def direction(target: Any, source: Any) -> float:
    """The mean over the target's class means of the best cosine with one of the source's, from the target's centre."""
    centre = target.mean(axis=0)
    best = []
    for one in target - centre:
        others = source - centre
        best.append(max(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) for other in others))
    return float(np.mean(best))


def slow_iou(space: UnitSpace, a: Any, b: Any) -> list[float]:
    found = []
    for start, stop in itertools.pairwise(space.offsets.tolist()):
        first = {unit for unit in range(start, stop) if a[unit]}
        second = {unit for unit in range(start, stop) if b[unit]}
        found.append(len(first & second) / len(first | second))
    return found


def slow_spearman(first: list[float], second: list[float]) -> float:
    ranks = [
        [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]
        for values in (first, second)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("model", ["tiny_net:tiny", "test_vit"])
def test_a_study_against_slow_loops(tmp_path: Path, model: str, keep: float | None) -> None:
    backbone, space = loaded(model)
    records = sorted(
        family_records(backbone, space, 3, 3, units=0.8), key=lambda record: record.key
    )  # 9 tasks, 36 pairs, quarters of 9
    bank = make_bank(tmp_path / "bank.db", backbone, space, records)
    study = study_overlap(bank, space, keep=keep)
    limits = None if keep is None else counts_for(space, Budget(keep=keep))[space.group_of]
    rows: list[tuple[float, float, int, list[float], list[float]]] = []
    for one, other in itertools.combinations(records, 2):
        a, b = (part.mask.kept if limits is None else part.ranking < limits for part in (one, other))
        halves = [part.probe.means.astype(np.float16).astype(np.float64) for part in (one, other)]
        shared = len({*one.classes} & {*other.classes})
        chance = expected_overlap(space.sizes, space.counts(a), space.counts(b)).tolist()
        similarity = (direction(*halves) + direction(*halves[::-1])) / 2
        rows.append((similarity, shared / len({*one.classes, *other.classes}), shared, slow_iou(space, a, b), chance))
    assert [entry.key for entry in study.tasks] == [record.key for record in records]
    assert study.possible == len(study.first) == 36
    places = {pair: place for place, pair in enumerate(itertools.combinations(range(9), 2))}
    order = [places[pair] for pair in zip(study.first.tolist(), study.second.tolist(), strict=True)]
    assert study.similarity == pytest.approx([rows[place][0] for place in order], abs=1e-5)
    assert study.names.tolist() == [rows[place][1] for place in order]
    assert study.shared.tolist() == [rows[place][2] for place in order]
    assert [kind.kind for kind in study.kinds] == list(dict.fromkeys(group.kind for group in space.groups))
    rows.sort(key=lambda row: row[0])
    for kind in study.kinds:
        columns = [place for place, group in enumerate(space.groups) if group.kind == kind.kind]
        for place, group in zip(columns, kind.groups, strict=True):
            assert (group.name, group.size) == (space.groups[place].name, space.groups[place].size)
            check_means(group.means, rows, [place])
        check_means(kind.means, rows, columns)
        pairs = [float(np.mean([row[3][place] for place in columns])) for row in rows]
        apart = [place for place, row in enumerate(rows) if row[2] == 0]
        by = kind.correlations
        similar = [row[0] for row in rows]
        assert known(by.class_means) == pytest.approx(slow_spearman(similar, pairs))
        assert known(by.class_names) == pytest.approx(slow_spearman([row[1] for row in rows], pairs))
        expected = slow_spearman([similar[place] for place in apart], [pairs[place] for place in apart])
        assert known(by.class_means_disjoint) == pytest.approx(expected)
        assert sorted(kind.pairs.tolist()) == pytest.approx(sorted(pairs))


def check_means(means: Any, rows: Any, columns: list[int]) -> None:
    """Rows are sorted by similarity."""

    def mean(some: Any) -> float | None:
        return float(np.mean([row[3][place] for row in some for place in columns])) if some else None

    assert means.chance == pytest.approx(np.mean([row[4][place] for row in rows for place in columns]))
    assert means.all.value == pytest.approx(mean(rows))
    assert means.most.value == pytest.approx(mean(rows[-9:]))
    assert means.least.value == pytest.approx(mean(rows[:9]))
    assert means.difference.value == pytest.approx(known(means.most) - known(means.least))
    for found, shared in ((means.none, {0}), (means.one, {1}), (means.more, {2, 3})):
        assert found.value == pytest.approx(mean([row for row in rows if row[2] in shared]))


def test_alike_tasks_that_share_masks_are_found_out(make: Make, tiny: tuple[Backbone, UnitSpace]) -> None:
    (kind,) = study_overlap(make(4, 5, units=0.9), tiny[1], keep=0.5).kinds
    means, by = kind.means, kind.correlations
    assert by.class_means.low is not None and by.class_means.low > 0.15
    assert by.class_names.low is not None and by.class_names.low > 0.15
    assert means.difference.low is not None and means.difference.low > 0.1
    assert means.all.low is not None and means.all.low > means.chance
    assert known(means.more) > known(means.none) + 0.2 and means.one == Estimate(None)


def test_random_masks_overlap_as_chance_has_it(make: Make, tiny: tuple[Backbone, UnitSpace]) -> None:
    (kind,) = study_overlap(make(6, 10, units=0, seed=3), tiny[1]).kinds
    assert known(kind.means.all) == pytest.approx(kind.means.chance, abs=0.01)
    for group in kind.groups:
        assert known(group.means.all) == pytest.approx(group.means.chance, abs=0.03)
    for found in (kind.means.difference, kind.correlations.class_means, kind.correlations.class_names):
        assert found.low is not None and found.high is not None and found.low < 0 < found.high


def same(one: OverlapStudy, other: OverlapStudy) -> bool:
    first, second = summarise_study(one), summarise_study(other)
    for found in (first, second):  # numbers in a bank follow the order in which records came
        for task in found["tasks"]:
            del task["id"]
    return first == second and np.array_equal(one.similarity, other.similarity)


@pytest.mark.parametrize("pairs", [40, 1000])
def test_the_order_in_a_bank_is_of_no_account_and_the_seed_decides(
    make: Make, tiny: tuple[Backbone, UnitSpace], pairs: int
) -> None:
    space = tiny[1]
    bank, turned = make(4, 3, units=0.5), make(4, 3, units=0.5, order=-1, name="turned.db")
    study = study_overlap(bank, space, pairs=pairs, seed=5)
    assert len(study.first) == min(pairs, 66) and study.possible == 66
    assert same(study, study_overlap(turned, space, pairs=pairs, seed=5))
    assert same(study, study_overlap(bank, space, source_tasks(bank)[::-1], pairs=pairs, seed=5))
    assert not same(study, study_overlap(bank, space, pairs=pairs, seed=6))


def test_parts_of_any_size_give_the_same(
    make: Make, tiny: tuple[Backbone, UnitSpace], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make(3, 3, units=0.5)
    study = study_overlap(bank, tiny[1])
    monkeypatch.setattr(module, "READ", 2)
    monkeypatch.setattr(module, "UNITS", 100)
    assert same(study, study_overlap(bank, tiny[1]))


def test_some_tasks_only(make: Make, tiny: tuple[Backbone, UnitSpace]) -> None:
    bank = make(3, 3, units=0.5)
    study = study_overlap(bank, tiny[1], source_tasks(bank, [2, 9, 4]))
    assert {entry.id for entry in study.tasks} == {2, 4, 9} and study.possible == 3
    assert study.kinds[0].means.all.low is None  # three tasks are too few for an interval


def test_two_tasks_beside_each_other(make: Make, tiny: tuple[Backbone, UnitSpace]) -> None:
    space = tiny[1]
    bank = make(2, 2, units=0.5)
    one, other = bank.entries([1, 2])
    pair = compare_tasks(bank, space, [one, other])
    masks = bank.lessons([1, 2]).kept
    assert [group.overlap for group in pair.groups] == slow_iou(space, *masks)
    assert [group.first for group in pair.groups] == space.counts(masks[0]).tolist()
    assert [group.second for group in pair.groups] == space.counts(masks[1]).tolist()
    assert pair.shared == ("a 0", "b 0") and pair.names == 0.5
    study = study_overlap(bank, space, [one, other])
    assert pair.similarity == pytest.approx(study.similarity[0], abs=1e-6)
    assert summarise_pair(pair)["groups"][0]["name"] == space.groups[0].name
    assert [group.means.all.value for group in study.kinds[0].groups] == [group.overlap for group in pair.groups]
    assert study.kinds[0].correlations.class_means == Estimate(None)


def test_bad_input_is_refused(make: Make, tiny: tuple[Backbone, UnitSpace]) -> None:
    bank = make(1, 2, units=0.5)
    with pytest.raises(BankError, match="no record 7"):
        source_tasks(bank, [1, 7])
    with pytest.raises(BankError, match="name one twice"):
        source_tasks(bank, [1, 1])
    with pytest.raises(BankError, match="two tasks or more, 1 is given"):
        source_tasks(bank, [1])
    with pytest.raises(BudgetError, match="keep"):
        study_overlap(bank, tiny[1], keep=1.5)
    with pytest.raises(BankError, match="0 pairs"):
        study_overlap(bank, tiny[1], pairs=0)
    with pytest.raises(BankError, match="expected two"):
        compare_tasks(bank, tiny[1], bank.entries([1]))
    bank.remove([1])
    with pytest.raises(BankError, match=r"1 is in the bank .*'kinprune bank build'"):
        study_overlap(bank, tiny[1])
