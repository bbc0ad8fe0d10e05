"""Records written and read on SQLite and PostgreSQL: every field, order, removal, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy.exc import OperationalError

from kinprune.backbones import Backbone, load_backbone
from kinprune.bank import Accuracy, Bank, Record, check_backbone, check_space, create_bank, open_bank, storage, verify
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.units import Mask, UnitSpace, find_units

Make = Callable[..., Record]


def assert_equal(found: Record, put: Record) -> None:
    """The same record, in the precision that a bank keeps."""
    assert (found.key, found.name, found.classes) == (put.key, put.name, put.classes)
    assert found.accuracy == put.accuracy and found.details == put.details and found.mask == put.mask
    assert found.ranking.dtype == np.int64 and np.array_equal(found.ranking, put.ranking)
    assert found.scores.dtype == np.float16 and np.array_equal(found.scores, put.scores)
    for name in ("weights", "means"):
        stored = getattr(put.probe, name).astype(np.float16).astype(np.float32)
        assert np.array_equal(getattr(found.probe, name), stored), name
        assert getattr(found.probe, name).dtype == np.float32
    assert np.array_equal(found.probe.biases, put.probe.biases) and found.probe.biases.dtype == np.float32
    assert np.array_equal(found.probe.counts, put.probe.counts) and found.probe.counts.dtype == np.int64
    assert found.tensors.keys() == put.tensors.keys()
    for name, tensor in put.tensors.items():
        expected = tensor.half() if tensor.dtype == torch.float32 else tensor
        assert found.tensors[name].dtype == expected.dtype and torch.equal(found.tensors[name], expected), name


def test_every_field_comes_back(bank: Bank, make_record: Make) -> None:
    put = [make_record(seed, name=f"Apfelmännchen {seed} 苹果") for seed in range(3)]
    before = datetime.now(timezone.utc).replace(microsecond=0)
    assert [bank.add(record) for record in put] == [True, True, True]
    other = open_bank(bank.address)
    assert len(other) == 3 and other.keys() == {record.key for record in put}
    entries = other.entries()
    assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
    for entry, record in zip(entries, put, strict=True):
        assert_equal(other.record(entry), record)
        assert before <= datetime.fromisoformat(entry.created) <= datetime.now(timezone.utc) + timedelta(seconds=1)
        assert len(other.store.get(entry.weights)) == entry.weight_bytes
    assert verify(other).whole


def test_the_header_comes_back(bank: Bank, backbone: Backbone, space: UnitSpace) -> None:
    header = open_bank(bank.address).header
    assert header.spec == backbone.spec and header.preprocessing == backbone.preprocessing
    assert (header.backbone, header.space, header.stream) == (backbone.fingerprint, space.fingerprint, False)
    assert header.groups == tuple((group.name, group.size) for group in space.groups)
    assert header.features == 10 and header.units == len(space)


def test_the_backbone_comes_from_the_bank(bank: Bank, backbone: Backbone, space: UnitSpace) -> None:
    loaded = load_bank_backbone(bank, 7)
    assert loaded.fingerprint == backbone.fingerprint and loaded.spec.num_classes == 7
    state = loaded.model.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        if not name.startswith(f"{backbone.head}."):
            assert torch.equal(state[name], tensor), name
    assert bank_space(bank, loaded).fingerprint == space.fingerprint


def test_a_key_is_held_once(bank: Bank, make_record: Make) -> None:
    assert bank.add(make_record(0)) is True
    assert bank.add(make_record(1, key=make_record(0).key)) is False
    assert [entry.name for entry in bank.entries()] == ["fruit 0"]
    report = verify(bank)
    assert report.whole and report.unreferenced == ()


def test_probes_and_lessons_are_those_of_their_records(bank: Bank, make_record: Make) -> None:
    put = [make_record(seed) for seed in range(5)]
    for record in put:
        bank.add(record)
    chunks = list(bank.probes(chunk=2))
    assert [len(chunk.ids) for chunk in chunks] == [2, 2, 1]
    assert [key for chunk in chunks for key in chunk.keys] == [record.key for record in put]
    for probe, record in zip((probe for chunk in chunks for probe in chunk.probes), put, strict=True):
        assert np.array_equal(probe.biases, record.probe.biases)
    ids = np.concatenate([chunk.ids for chunk in chunks])
    lessons = bank.lessons(ids[[3, 0, 3]])  # in the order asked, as often as asked
    for row, number in enumerate((3, 0, 3)):
        assert np.array_equal(lessons.rankings[row], put[number].ranking)
        assert np.array_equal(lessons.scores[row], put[number].scores)
        assert np.array_equal(lessons.kept[row], put[number].mask.kept)
    assert [entry.key for entry in bank.entries(ids[[4, 1]])] == [put[4].key, put[1].key]
    nothing = bank.lessons([])
    assert nothing.rankings.shape == nothing.kept.shape == (0, bank.header.units)


def test_large_probes_come_in_smaller_chunks(bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        bank.add(make_record(seed))
    (whole,) = bank.probes()
    monkeypatch.setattr(storage, "CHUNK_BYTES", 2 * len(whole.contents[0]))
    monkeypatch.setattr(storage, "FETCHED", 1)
    for chunks in (list(bank.probes()), list(bank.probes(ids=whole.ids[::-1].tolist()))):
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        assert [content for chunk in chunks for content in chunk.contents] == list(whole.contents)
    after = list(bank.probes(after=int(whole.ids[2])))
    assert [key for chunk in after for key in chunk.keys] == list(whole.keys[3:])
    assert list(bank.probes(ids=[999])) == list(bank.probes(ids=[])) == []


def test_many_ids_are_read_in_several_statements(
    sqlite_bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART", 2)
    for seed in range(5):
        sqlite_bank.add(make_record(seed))
    ids = [5, 1, 2, 4, 3]
    assert [entry.id for entry in sqlite_bank.entries(ids)] == ids
    assert np.array_equal(sqlite_bank.lessons(ids).scores[0], make_record(4).scores)
    sqlite_bank.remove([1, 2, 3, 5])
    assert [entry.id for entry in sqlite_bank.entries()] == [4] and verify(sqlite_bank).unreferenced == ()


def test_removed_records_leave_shared_weights_until_the_last(bank: Bank, make_record: Make) -> None:
    first = make_record(0)
    bank.add(first)
    bank.add(make_record(1, tensors=first.tensors, mask=first.mask))
    bank.add(make_record(2))
    one, two, three = bank.entries()
    assert one.weights == two.weights != three.weights
    bank.remove([one.id])
    assert bank.tensors(two).keys() == first.tensors.keys()
    bank.remove([two.id])
    assert set(bank.store.digests()) == bank.referenced() == {three.weights, bank.header.backbone_weights}
    assert bank.add(first) and bank.entries()[-1].id > three.id  # no number is given twice
    assert verify(bank).whole


def test_what_is_not_there_is_named_and_nothing_removed(bank: Bank, make_record: Make) -> None:
    bank.add(make_record(0))
    [entry] = bank.entries()
    for ask in (bank.entries, bank.lessons, bank.remove):
        with pytest.raises(BankError, match="no record 77: 'kinprune bank ls'"):
            ask([entry.id, 77])
    assert len(bank) == 1 and verify(bank).whole
    with pytest.raises(BankError, match="no record"):
        bank.record(replace(entry, id=78))


def changed_probe(record: Record, **values: Any) -> Probe:
    return replace(record.probe, **values)


REFUSED: Sequence[tuple[str, Callable[[Record], dict[str, Any]]]] = (
    ("ranking are \\[29\\], expected \\[30\\]", lambda r: {"ranking": r.ranking[1:]}),
    ("ranking of second is no order", lambda r: {"ranking": np.where(np.arange(30) == 8, r.ranking[9], r.ranking)}),
    ("scores are not all finite", lambda r: {"scores": np.full(30, np.nan, np.float16)}),
    ("mask keeps no unit of third", lambda r: {"mask": Mask(np.arange(30) < 20, r.mask.fingerprint)}),
    ("mask is of another unit space", lambda r: {"mask": Mask(r.mask.kept, "f" * 64)}),
    ("probe's weights are \\[3, 9\\]", lambda r: {"probe": changed_probe(r, weights=r.probe.weights[:, 1:])}),
    ("class means are not all finite", lambda r: {"probe": changed_probe(r, means=r.probe.means * np.inf)}),
    ("over 65,504", lambda r: {"probe": changed_probe(r, means=r.probe.means + 1e6)}),
    ("fewer than two classes, or one twice", lambda r: {"classes": ("a", "b", "a")}),
    ("final accuracy is 1.5", lambda r: {"accuracy": Accuracy(0.5, 0.5, 1.5)}),
    ("start accuracy is nan", lambda r: {"accuracy": Accuracy(0.5, float("nan"), 0.5)}),
    ("no weights", lambda r: {"tensors": {}}),
    ("weights a are not all finite", lambda r: {"tensors": {"a": torch.tensor([torch.inf])}}),
    ("details are no JSON", lambda r: {"details": {"loss": float("nan")}}),
    ("details are no JSON", lambda r: {"details": {"path": Path()}}),
    ("key has 65 characters", lambda r: {"key": "k" * 65}),
    ("key has 0 characters", lambda r: {"key": ""}),
)


@pytest.mark.parametrize(("words", "change"), REFUSED, ids=[words for words, _ in REFUSED])
def test_a_record_that_does_not_fit_is_refused_before_anything_is_written(
    sqlite_bank: Bank, make_record: Make, words: str, change: Callable[[Record], dict[str, Any]]
) -> None:
    record = make_record(0)
    with pytest.raises(BankError, match=words):
        sqlite_bank.add(replace(record, **change(record)))
    assert len(sqlite_bank) == 0 and verify(sqlite_bank).unreferenced == ()


def test_whole_numbers_and_odd_names_do_not_break_the_seal(bank: Bank, make_record: Make) -> None:
    bank.add(make_record(0, accuracy=Accuracy(1, np.float32(0.1), 0), name="a\udcffb\0c"))  # type: ignore[arg-type]
    [entry] = bank.entries()
    assert entry.accuracy == Accuracy(1.0, float(np.float32(0.1)), 0.0) and entry.name == "a?b?c"
    assert verify(bank).whole


def test_weights_beyond_half_precision_are_kept_whole(sqlite_bank: Bank, make_record: Make) -> None:
    large, exact = torch.tensor([1e6, 1 / 3]), torch.tensor([0.1], dtype=torch.float64)
    sqlite_bank.add(make_record(0, tensors={"large": large, "exact": exact, "counter": torch.tensor(70_000)}))
    tensors = sqlite_bank.tensors(sqlite_bank.entries()[0])
    assert torch.equal(tensors["large"], large) and torch.equal(tensors["exact"], exact.half())
    assert tensors["counter"].dtype == torch.int64 and tensors["counter"] == 70_000


def test_an_add_that_breaks_off_before_its_rows_leaves_no_record(
    bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def insert(connection: Any, rows: Any) -> bool:
        real(connection, rows)
        raise OperationalError("INSERT", {}, Exception("disk full"))

    real = storage.insert_rows
    monkeypatch.setattr(storage, "insert_rows", insert)
    with pytest.raises(BankError, match="disk full"):
        bank.add(make_record(0))
    assert len(bank) == 0 and list(bank.probes()) == []
    assert len(verify(bank).unreferenced) == 1 and verify(bank).whole
    monkeypatch.undo()
    assert bank.add(make_record(0)) is True
    assert verify(bank).whole and verify(bank).unreferenced == ()


def test_weights_that_another_removes_meanwhile_are_written_again(
    bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes its record away, weights and all, between this one's weights and its rows."""
    real = storage.insert_rows

    def insert(connection: Any, rows: Any) -> bool:
        for digest in set(bank.store.digests()) - {bank.header.backbone_weights}:
            bank.store.remove(digest)
        return real(connection, rows)

    monkeypatch.setattr(storage, "insert_rows", insert)
    bank.add(make_record(0))
    assert verify(bank).whole


def test_a_bank_in_a_file_can_move_with_its_weights(sqlite_bank: Bank, make_record: Make, tmp_path: Path) -> None:
    sqlite_bank.add(make_record(0))
    sqlite_bank.close()
    (tmp_path / "elsewhere").mkdir()
    for name in ("bank.db", "bank.db.weights"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert not list(tmp_path.glob("bank.db*"))  # a closed bank has no other files
    moved = open_bank(tmp_path / "elsewhere" / "bank.db")
    assert_equal(moved.record(moved.entries()[0]), make_record(0))
    assert verify(moved).whole


def test_a_bank_in_a_file_can_be_renamed_with_its_weights(sqlite_bank: Bank, make_record: Make, tmp_path: Path) -> None:
    sqlite_bank.add(make_record(0))
    sqlite_bank.close()
    for ending in ("", ".weights"):
        (tmp_path / f"bank.db{ending}").rename(tmp_path / f"other.db{ending}")
    renamed = open_bank(tmp_path / "other.db")
    assert_equal(renamed.record(renamed.entries()[0]), make_record(0))
    assert renamed.add(make_record(1)) and verify(renamed).whole
    assert not (tmp_path / "bank.db.weights").exists()


def test_weights_go_wherever_fsspec_reaches(
    place: Any, backbone: Backbone, space: UnitSpace, make_record: Make, tmp_path: Path
) -> None:
    bank = create_bank(place.address, backbone, space, store=f"memory://{tmp_path.name}/weights")
    bank.add(make_record(0))
    assert_equal(bank.record(bank.entries()[0]), make_record(0))
    assert verify(bank).whole and not list(tmp_path.glob("*weights*"))
    bank.remove([bank.entries()[0].id])
    assert set(bank.store.digests()) == {bank.header.backbone_weights}


def test_a_store_that_has_weights_is_not_shared(bank: Bank, backbone: Backbone, space: UnitSpace) -> None:
    path = Path(bank.store.url)
    with pytest.raises(BankError, match="holds weights already: give the bank a folder of its own"):
        create_bank(path.parent / "other.db", backbone, space, store=str(path))


def test_a_store_that_fsspec_does_not_know_is_refused(tmp_path: Path, backbone: Backbone, space: UnitSpace) -> None:
    with pytest.raises(BankError, match="weights cannot be stored at ftps3://nowhere"):
        create_bank(tmp_path / "bank.db", backbone, space, store="ftps3://nowhere")


def test_a_shared_database_needs_a_place_for_weights(backbone: Backbone, space: UnitSpace) -> None:
    with pytest.raises(BankError, match="give --store"):
        create_bank("postgresql://kinprune@localhost/bank", backbone, space)


def test_another_backbone_is_refused_naming_what_differs(bank: Bank, backbone: Backbone) -> None:
    check_backbone(bank.header, backbone.fingerprint, backbone.spec, backbone.preprocessing)
    for name, options, words in (
        ("test_resnet", {"random": True, "image_size": 32}, "the model is test_resnet, the bank's is tiny_net:tiny"),
        ("tiny_net:tiny", {"image_size": 20}, r"its image_size is \(20, 20\), the bank's is \(16, 16\)"),
        ("tiny_net:tiny", {"image_size": 16, "seed": 1}, "its weights are not those"),
    ):
        other = load_backbone(name, num_classes=3, **options)  # type: ignore[arg-type]
        with pytest.raises(BankError, match=words):
            check_backbone(bank.header, other.fingerprint, other.spec, other.preprocessing)


def test_another_unit_space_is_refused(sqlite_bank: Bank, space: UnitSpace) -> None:
    check_space(sqlite_bank.header, space)
    other = load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    with pytest.raises(BankError, match=r"30 units of tiny_net:tiny at 16 pixels, without the residual stream"):
        check_space(sqlite_bank.header, find_units(other.model, (32, 32), head=other.head))


def test_an_empty_bank_is_a_bank(bank: Bank) -> None:
    assert bank and len(bank) == 0
