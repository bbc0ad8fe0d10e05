"""Sketches rule out most of a large bank, follow it as it changes, and are never more than a help."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import insert

from kinprune.bank import Bank, ProbeChunk, Record, open_bank, schema, sketches
from kinprune.bank.coding import encode_probe
from kinprune.bank.rows import rows_of
from kinprune.bank.sketches import sketch_folder
from kinprune.bank.weights import pack
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.kin import Search, find_kin
from kinprune.transferability import Target, leading, transferability

Make = Callable[..., Record]
RECORDS, SKETCHED = 2500, 1024
"""Records of the bank, and of a sketch, which ends with a chunk that is read."""


@pytest.fixture(autouse=True)
def small_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "RECORDS", SKETCHED)
    monkeypatch.setattr(leading, "LEADERS", 20)
    monkeypatch.setattr(leading, "LEADERS_EACH", 1)


@pytest.fixture(scope="module")
def template(backbone: object, space: object, make_record: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of many records of two kinds, without sketches."""
    from kinprune.bank import create_bank

    folder = tmp_path_factory.mktemp("sketches")
    bank = create_bank(folder / "bank.db", backbone, space)  # type: ignore[arg-type]
    write(bank, make_record(0), RECORDS)
    bank.close()
    return folder


@pytest.fixture
def bank(template: Path, tmp_path: Path) -> Bank:
    shutil.copytree(template, tmp_path / "copy")
    return open_bank(tmp_path / "copy" / "bank.db")


def write(bank: Bank, like: Record, count: int, seed: int = 0) -> None:
    random, content = np.random.default_rng(seed), pack(like.tensors)
    bank.store.put(content)
    tables: dict[str, list[dict[str, object]]] = {"record": [], "probe": [], "units": []}
    for number in range(1, count + 1):
        classes = 3 if number % 5 else 4
        shape = (classes, bank.header.features)
        weights, means = (random.normal(size=shape).astype(np.float32) for _ in range(2))
        probe = Probe(weights, weights[:, 0], means, np.full(classes, 9))
        names = tuple(f"class {place}" for place in range(classes))
        rows = rows_of(replace(like, key=f"{seed}-{number:06d}", probe=probe, classes=names), bank.header, content)
        tables["record"].append({"id": number, **rows.record})
        tables["probe"].append({"record": number, **rows.probe})
        tables["units"].append({"record": number, **rows.units})
    with schema.writing(bank.engine) as connection:
        for table, values in tables.items():
            connection.execute(insert(schema.metadata.tables[table]), values)


def own_means(bank: Bank) -> NDArray[np.float64]:
    return 2 * np.random.default_rng(1).normal(size=(3, bank.header.features))


def target_of(bank: Bank) -> Target:
    labels = np.arange(300, dtype=np.int64) % 3
    features = own_means(bank)[labels] + np.random.default_rng(2).normal(size=(300, bank.header.features))
    return Target(features.astype(np.float32), labels, 3)


def found(bank: Bank, count: int = 5) -> list[tuple[str, float]]:
    near = find_kin(bank, target_of(bank), (), Search(count=count))
    return [(neighbour.entry.key, neighbour.similarity) for neighbour in near]


def files(bank: Bank) -> list[Path]:
    return sorted(Path(f"{bank.address}.sketches").glob("*"))


def read(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many probes each search looks at, from here on."""
    counts: list[int] = []
    real = ProbeChunk.by_classes

    def counted(chunk: ProbeChunk, places: NDArray[np.int64]) -> object:
        counts.append(len(chunk))
        return real(chunk, places)

    monkeypatch.setattr(ProbeChunk, "by_classes", counted)
    return counts


def test_the_second_search_finds_the_same_and_reads_little(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(bank)
    assert [path.name[:41] for path in files(bank)] == [f"{a:020d}-{b:020d}" for a, b in ((0, 1024), (1024, 2048))]
    counts = read(bank, monkeypatch)
    assert found(bank) == first
    # Two per cent of two sketches, and what is newer than both.
    assert sum(counts) == 2 * 21 + RECORDS - 2048


def test_the_best_are_found_among_real_ones(bank: Bank) -> None:
    target, scores = target_of(bank), dict[str, float]()
    for chunk in bank.probes():
        for places, sources in chunk.by_classes(np.arange(len(chunk))):
            scores |= zip((chunk.keys[p] for p in places), transferability("leep", target, sources), strict=True)
    found(bank)
    best = sorted(scores, key=lambda key: -scores[key])[:5]
    assert [key for key, _ in found(bank)] == best


def test_those_left_out_take_no_place(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """More are hidden than a sketch calls likely, the nearest of all."""
    ranked = [neighbour.entry.key for neighbour in find_kin(bank, target_of(bank), (), Search(which="all"))]
    near = [neighbour.entry.key for neighbour in find_kin(bank, target_of(bank), (), without=set(ranked[:100]))]
    assert len(files(bank)) == 2  # that search had none
    counts = read(bank, monkeypatch)
    again = [neighbour.entry.key for neighbour in find_kin(bank, target_of(bank), (), without=set(ranked[:100]))]
    assert sum(counts) == 2 * 21 + RECORDS - 2048
    assert len(again) == 10 and not set(again) & set(ranked[:100]) and len(set(again) & set(near)) >= 9
    with pytest.raises(BankError, match="no record to learn from"):
        find_kin(bank, target_of(bank), (), without=set(ranked))


def test_they_follow_the_bank(bank: Bank, make_record: Make) -> None:
    first = found(bank)
    means = own_means(bank).astype(np.float32)
    weights = means - means.mean(axis=0)
    probe = Probe(weights, -(weights * (means + means.mean(axis=0))).sum(axis=1) / 2, means, np.full(3, 9))
    assert bank.add(replace(make_record(7), key="the very task", probe=probe))
    with_new = found(bank)
    assert with_new[0][0] == "the very task" and with_new[1:] == first[:-1]
    gone = bank.find([first[0][0]])[first[0][0]]
    bank.remove([gone.id])
    assert [key for key, _ in found(bank)][:4] == ["the very task", *(key for key, _ in first[1:4])]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "foreign"])
def test_damaged_ones_are_made_again(bank: Bank, harm: str, place: int) -> None:
    first, whole = found(bank), [path.read_bytes() for path in files(bank)]
    path = files(bank)[place]
    content = bytearray(whole[place])
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": whole[place][:-9], "empty": b"", "foreign": b"{}" * 99}[harm])
    (path.parent / "notes.txt").write_text("mine")
    assert found(bank) == first
    assert [path.read_bytes() for path in files(bank) if path.suffix != ".txt"] == whole
    assert (path.parent / "notes.txt").read_text() == "mine" and found(bank) == first


def test_those_of_another_bank_are_seen_through(
    bank: Bank, template: Path, make_record: Make, tmp_path: Path, backbone: object, space: object
) -> None:
    from kinprune.bank import create_bank

    found(bank)
    other = create_bank(tmp_path / "other.db", backbone, space)  # type: ignore[arg-type]
    write(other, make_record(0), RECORDS, seed=1)
    expected = found(other)
    made = [path.name for path in files(other)]
    shutil.rmtree(f"{other.address}.sketches")
    shutil.copytree(f"{bank.address}.sketches", f"{other.address}.sketches")
    assert found(other) == expected and [path.name for path in files(other)] == made


def test_a_bank_beside_which_nothing_can_be_written_is_read_as_it_is(bank: Bank) -> None:
    expected = found(bank)
    shutil.rmtree(f"{bank.address}.sketches")
    Path(f"{bank.address}.sketches").write_text("something else")
    assert found(bank) == expected == found(bank)
    assert Path(f"{bank.address}.sketches").read_text() == "something else"


def test_other_measures_and_the_farthest_look_at_all(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(bank)
    find_kin(bank, target, ())
    for search in (Search("logme"), Search(which="farthest")):
        counts = read(bank, monkeypatch)
        find_kin(bank, target, (), search)
        assert sum(counts) == RECORDS
        monkeypatch.undo()


def test_a_small_bank_has_none(sqlite_bank: Bank, make_record: Make) -> None:
    sqlite_bank.add(make_record(0))
    assert len(found(sqlite_bank)) == 1 and files(sqlite_bank) == []


def test_a_servers_bank_has_them_in_the_users_cache(
    make_database: Callable[[], str],
    make_record: Make,
    backbone: object,
    space: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kinprune.bank import create_bank

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    banks = [
        create_bank(make_database(), backbone, space, store=str(tmp_path / f"weights{number}"))  # type: ignore[arg-type]
        for number in range(2)
    ]
    for seed, bank in enumerate(banks):
        write(bank, make_record(0), RECORDS, seed=seed)
    first = [found(bank) for bank in banks]
    folders = [sketch_folder(bank) for bank in banks]
    assert {folder.parent for folder in folders} == {tmp_path / "cache" / "kinprune" / "sketches"}
    assert [len(list(folder.iterdir())) for folder in folders] == [2, 2] and folders[0] != folders[1]
    counts = read(banks[0], monkeypatch)
    assert found(banks[0]) == first[0]
    assert sum(counts) == 2 * 21 + RECORDS - 2048
    assert found(banks[1]) == first[1]


def test_a_bank_in_a_folder_that_cannot_be_written_has_them_there_too(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sketches.os, "access", lambda *_: False)  # root may write everywhere
    expected = found(bank)
    assert files(bank) == [] and len(list(sketch_folder(bank).iterdir())) == 2
    assert found(bank) == expected


def test_few_numbers_tell_the_likely_where_features_are_many() -> None:
    """Features and probes of 200 dimensions that vary in some directions more than in others."""
    random, width, tasks = np.random.default_rng(0), 200, 1000
    directions = random.normal(size=(40, width)) * np.linspace(2, 0.2, 40)[:, None]
    classes = 3 + random.normal(size=(60, 40)) @ directions
    chosen = np.array([random.choice(60, 3, replace=False) for _ in range(tasks)])
    means = classes[chosen].astype(np.float32)
    weights = (means - means.mean(axis=1, keepdims=True)) / 300
    biases = -(weights * (means + means.mean(axis=1, keepdims=True))).sum(axis=2) / 2
    contents = tuple(encode_probe(Probe(*parts, np.full(3, 9))) for parts in zip(weights, biases, means, strict=True))
    keys = tuple(f"{number}" for number in range(tasks))
    chunk = ProbeChunk(np.arange(1, tasks + 1), keys, np.full(tasks, 3), contents, width)
    draft = sketches.Draft.of(0, chunk)
    draft.add(chunk)
    sketch = draft.sketch()
    ((_, sources),) = chunk.by_classes(np.arange(tasks))
    hits = []
    for seed in range(10):
        labels = np.repeat(np.arange(3), 60)
        features = classes[np.random.default_rng(seed).choice(60, 3, replace=False)][labels]
        features = features + 4 * random.normal(size=features.shape)
        target = Target(features.astype(np.float32), labels, 3)
        true = 1 + np.argsort(-transferability("leep", target, sources))[:3]
        hits.append(len(set(true.tolist()) & set(sketch.likely(target, np.array([], dtype=np.uint64)))))
    assert sketch.parts[0].weights.shape == (tasks, 3, sketches.RANK) and sum(hits) >= 29
