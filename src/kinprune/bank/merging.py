"""One bank's records into another of the same backbone: what was built in two places comes together."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select

from kinprune.bank import schema
from kinprune.bank.listing import known, pages
from kinprune.bank.record import Header, check_backbone
from kinprune.bank.retrying import retried
from kinprune.bank.rows import Rows, altered, entry_of, probe_of, units_of
from kinprune.bank.storage import Bank, write_rows
from kinprune.errors import BankError


def merge(target: Bank, source: Bank, on_record: Callable[[int, int], None] | None = None) -> tuple[int, int]:
    """Copy the source's records and their weights into the target; returns how many were added and were there.

    Records keep the moment they were made and all else, bit for bit, except their number. Each is written whole or
    not at all, so that a merge that was stopped can be run again. ``on_record(done, of)`` is called after each.

    Raises:
        BankError: the banks are not of the same backbone and unit space (nothing is copied), or a record of the
            source is damaged (those before it are copied).
    """
    check_same(target.header, source.header)
    count, added, done = len(source), 0, 0
    for page in pages(source):
        have = known(target, list(page.values()))
        for number, key in page.items():
            done += 1
            if key not in have:
                rows = _rows(source, number)
                added += write_rows(target, rows, source.store.get(rows.record["weights"]))
            if on_record is not None:
                on_record(done, max(count, done))  # a record may have come while others were copied
    return added, done - added


def check_same(target: Header, source: Header) -> None:
    """Refuse, naming what differs, banks that are not of one backbone and unit space."""
    check_backbone(target, source.backbone, source.spec, source.preprocessing)
    if source.stream != target.stream:
        having = ("with", "without") if source.stream else ("without", "with")
        raise BankError(
            f"the source's unit space is {having[0]} the residual stream, the target's {having[1]}: "
            "merge banks of the same units"
        )
    for what, its, ours in (
        ("unit space", source.space[:12], target.space[:12]),
        ("preprocessing", source.preprocessing, target.preprocessing),
    ):
        if its != ours:
            raise BankError(
                f"the source's {what} is {its}, the target's {ours}: merge banks made by versions of Kinprune that "
                "find the same units"
            )


@retried
def _rows(source: Bank, number: int) -> Rows:
    """A record's rows as they are, once they are known to be whole."""
    with schema.reading(source.engine) as connection:
        record = connection.execute(select(schema.record).where(schema.record.c.id == number)).first()
        probe = connection.execute(select(schema.probe).where(schema.probe.c.record == number)).first()
        units = connection.execute(select(schema.units).where(schema.units.c.record == number)).first()
    if record is None:
        raise BankError(f"record {number} was removed from the source while it was merged: merge again")
    entry = entry_of(record)
    if probe is None or units is None or probe.key != entry.key:
        raise BankError(altered(number, "probe or ranking"))
    probe_of(probe, source.header.features)
    units_of(units, entry.key, source.header)
    return Rows(
        {name: value for name, value in record._mapping.items() if name != "id"},
        {name: value for name, value in probe._mapping.items() if name != "record"},
        {name: value for name, value in units._mapping.items() if name != "record"},
    )
