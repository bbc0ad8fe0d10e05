"""Whether a bank is whole: every row, every file of weights, and what belongs to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Row, Table, select
from torch import Tensor

from kinprune.bank import schema
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.bank.claims import drop_expired
from kinprune.bank.record import Entry, Header, Record, record_problems, tensor_problems
from kinprune.bank.retrying import LostConnection, retried
from kinprune.bank.rows import entry_of, probe_of, units_of
from kinprune.bank.storage import Bank, drop_unreferenced, parts
from kinprune.bank.weights import unpack
from kinprune.errors import BankError, KinpruneError
from kinprune.units import Mask, UnitSpace
from kinprune.units.layout import Layout, size

OnRecord = Callable[[int, int], None]


class Problem(NamedTuple):
    """What is wrong with a record, by its number; None for what concerns the whole bank."""

    record: int | None
    what: str


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    ``records`` were looked at, and ``problems`` are errors. ``unreferenced`` are hashes of weights that no record
    refers to, and ``leftovers`` paths of files from broken-off writes: harmless, ``clean`` removes them.
    """

    records: int
    problems: tuple[Problem, ...]
    unreferenced: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(bank: Bank, *, weights: bool = True, on_record: OnRecord | None = None) -> Report:
    """Look at everything a bank holds, to the end whatever is damaged.

    Of every record: that no row was altered, that shapes and groups fit the unit space, that its numbers are finite,
    its ranking an order of each group and its mask empty nowhere, and that its weights are there; with ``weights``
    also that these are the bytes stored and fit the mask, tensor by tensor. Of the bank: that its own backbone is
    there and has its units, and that no row is without its record. ``on_record(done, of)`` is called after each.

    Raises:
        BankError: the database cannot be read at all, or the weights cannot be listed.
    """
    files = list(bank.store.files())  # before the rows: what is being written now is not called unreferenced
    stored = {file.digest for file in files if file.digest is not None}
    ids = _ids(bank)
    problems = [*_database_problems(bank), *_orphans(bank)]
    shapes: _Shapes | None = None
    if bank.header.backbone_weights not in stored:
        problems.append(Problem(None, f"the backbone's weights {bank.header.backbone_weights[:12]} are gone"))
    elif weights:
        try:
            shapes = _Shapes.of(bank)
        except LostConnection:
            raise
        except KinpruneError as error:
            problems.append(Problem(None, f"its backbone cannot be made, so no tensor's shape was checked: {error}"))
    referenced = {bank.header.backbone_weights}
    done = 0
    for part in parts(ids):
        for number, rows in _rows(bank, part):
            found = list(_record_problems(bank, number, rows, stored, shapes, weights))
            if not found or _is_there(bank, number):  # another process may have removed it meanwhile
                problems += [Problem(number, what) for what in found]
            if rows is not None and rows.record is not None:
                referenced.add(rows.record.weights)
            done += 1
            if on_record is not None:
                on_record(done, len(ids))
    unreferenced = stored - referenced
    if unreferenced:
        unreferenced -= bank.referenced()  # records that came while this one looked
    leftovers = tuple(file.path for file in files if file.digest is None)
    return Report(len(ids), tuple(problems), tuple(sorted(unreferenced)), leftovers)


def clean(bank: Bank, older_than_seconds: float = 86_400) -> tuple[str, ...]:
    """Remove files that no record refers to and that were written that long ago, and return their names.

    Claims that ran out go too. Weights are safe beside writers at any age. What a write that has not ended has begun
    is told by its age alone: give more seconds than any write lasts. Files whose age the file system does not know
    stay.

    Raises:
        BankError: a file cannot be removed.
    """
    drop_expired(bank)
    old = [
        file for file in bank.store.files() if (age := bank.store.age(file)) is not None and age >= older_than_seconds
    ]
    removed = drop_unreferenced(bank, [file.digest for file in old if file.digest is not None])
    for file in old:
        if file.digest is None:
            bank.store.discard(file.path)
            removed.append(file.path)
    return tuple(removed)


@dataclass(frozen=True)
class _Rows:
    record: Row[Any] | None
    probe: Row[Any] | None
    units: Row[Any] | None


def _rows(bank: Bank, ids: list[int]) -> Iterator[tuple[int, _Rows | None]]:
    """The rows of records; None where the database cannot read them (one of many spoils only itself)."""
    for start in range(0, len(ids), 50):
        part = ids[start : start + 50]
        try:
            yield from _read(bank, part)
        except LostConnection:
            raise
        except (KinpruneError, TypeError, ValueError):
            for number in part:
                try:
                    yield from _read(bank, [number])
                except LostConnection:
                    raise
                except (KinpruneError, TypeError, ValueError):
                    yield number, None


@retried
def _ids(bank: Bank) -> list[int]:
    with schema.reading(bank.engine) as connection:
        return list(connection.execute(select(schema.record.c.id).order_by(schema.record.c.id)).scalars())


@retried
def _read(bank: Bank, ids: list[int]) -> list[tuple[int, _Rows]]:
    found = []
    with schema.reading(bank.engine) as connection:
        for table, key in ((schema.record, "id"), (schema.probe, "record"), (schema.units, "record")):
            column = table.c[key]
            found.append({getattr(row, key): row for row in connection.execute(select(table).where(column.in_(ids)))})
    records, probes, units = found
    return [(number, _Rows(records.get(number), probes.get(number), units.get(number))) for number in ids]


@retried
def _is_there(bank: Bank, number: int) -> bool:
    with schema.reading(bank.engine) as connection:
        return connection.execute(select(schema.record.c.id).where(schema.record.c.id == number)).first() is not None


def _record_problems(
    bank: Bank, number: int, rows: _Rows | None, stored: set[str], shapes: _Shapes | None, weights: bool
) -> Iterator[str]:
    if rows is None or rows.record is None:
        yield f"record {number}: its rows cannot be read"
        return
    record: Record | None = None
    try:
        record = _decoded(bank.header, entry_of(rows.record), rows)
        yield from record_problems(bank.header, record)
    except (KinpruneError, TypeError, ValueError) as error:
        yield str(error)
    digest = rows.record.weights
    if digest not in stored and not bank.store.has(str(digest)):
        yield f"its weights {str(digest)[:12]} are gone"
    elif weights:
        try:
            content = bank.store.get(digest)
            tensors = unpack(content)
        except LostConnection:  # the server's fault, and no record's
            raise
        except BankError as error:
            yield str(error)
            return
        if len(content) != rows.record.weight_bytes:
            yield f"its weights have {len(content)} bytes, its row says {rows.record.weight_bytes}"
        yield from tensor_problems(tensors)
        if record is not None and shapes is not None:
            yield from shapes.problems(record, tensors)


def _decoded(header: Header, entry: Entry, rows: _Rows) -> Record:
    if rows.probe is None or rows.units is None:
        raise BankError(f"record {entry.id}: its {'probe' if rows.probe is None else 'ranking and scores'} are gone")
    if rows.probe.key != entry.key:
        raise BankError(f"record {entry.id}: its probe is another record's")
    if rows.probe.classes != len(entry.classes):
        raise BankError(
            f"record {entry.id}: its probe has {rows.probe.classes} classes, the record {len(entry.classes)}"
        )
    ranking, scores, kept = units_of(rows.units, entry.key, header)
    return Record(
        entry.key,
        entry.name,
        entry.classes,
        ranking,
        scores,
        Mask(kept, header.space),
        probe_of(rows.probe, header.features),
        entry.accuracy,
        {},
        entry.details,
    )


def _database_problems(bank: Bank) -> Iterator[Problem]:
    """What SQLite says of its own file; PostgreSQL checks its pages itself."""
    if bank.engine.dialect.name != "sqlite":
        return
    try:
        with schema.reading(bank.engine) as connection:
            answers = connection.exec_driver_sql("PRAGMA integrity_check(20)").scalars().all()
    except BankError as error:
        answers = [str(error)]
    for answer in answers:
        if answer != "ok":
            yield Problem(None, f"the database file is damaged: {answer}: restore the bank from a copy")


def _orphans(bank: Bank) -> Iterator[Problem]:
    for table, what in ((schema.probe, "a probe"), (schema.units, "a ranking")):
        try:
            for number in _without_record(bank, table):
                yield Problem(number, f"there is {what} of record {number}, and no such record: remove it")
        except LostConnection:
            raise
        except BankError as error:
            yield Problem(None, str(error))


@retried
def _without_record(bank: Bank, table: Table) -> list[int]:
    query = (
        select(table.c.record)
        .outerjoin(schema.record, schema.record.c.id == table.c.record)
        .where(schema.record.c.id.is_(None))
        .order_by(table.c.record)
    )
    with schema.reading(bank.engine) as connection:
        return list(connection.execute(query).scalars())


@dataclass(frozen=True, eq=False)
class _Shapes:
    """The tensors that a pruned model of the bank must have: the whole ones' shapes, and how a mask cuts them."""

    space: UnitSpace
    head: str
    whole: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, tuple[Layout, ...]]

    @classmethod
    def of(cls, bank: Bank) -> _Shapes:
        backbone = load_bank_backbone(bank, 2)
        space = bank_space(bank, backbone)
        named = [
            *backbone.model.named_parameters(remove_duplicate=False),
            *backbone.model.named_buffers(remove_duplicate=False),
        ]
        by_tensor = {id(tensor): space.tensors[name] for name, tensor in named if name in space.tensors}
        return cls(
            space,
            backbone.head,
            {name: tuple(tensor.shape) for name, tensor in backbone.model.state_dict().items()},
            {name: by_tensor.get(id(tensor), ()) for name, tensor in named},
        )

    def problems(self, record: Record, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with the tensors of a record."""
        counts = [int(np.count_nonzero(part)) for part in self.space.split(record.mask.kept)]
        for name, shape in self.whole.items():
            if name not in tensors:
                yield f"its weights have no {name}"
                continue
            layouts = self.layouts.get(name, ())
            cut = [size(layout, counts) for layout in layouts] if layouts else list(shape)
            if name in (f"{self.head}.weight", f"{self.head}.bias"):
                cut[0] = len(record.classes)
            found = list(tensors[name].shape)
            if found != cut:
                yield f"its weights {name} are {found}, expected {cut} of its mask"
        for name in sorted(set(tensors) - set(self.whole)):
            yield f"its weights have {name}, which is not in the backbone"
