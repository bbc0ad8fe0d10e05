"""``kinprune bank``: build a bank, look into it, and keep it in order."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from kinprune.cli import bank_options as own
from kinprune.cli.bank_build import add_command, build_command, kept_text, records_text, shown_address
from kinprune.cli.bank_progress import counted
from kinprune.cli.bank_tables import print_info, print_record, records_table
from kinprune.cli.help import Sectioned
from kinprune.cli.options import Json
from kinprune.cli.output import console, say
from kinprune.cli.running import guarded
from kinprune.errors import BankError
from kinprune.quantities import some_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kinprune.bank import Bank, Entry

LISTED = 100
"""Records that are listed where no limit is given."""

PART = 64
"""Records whose units are read at a time, for a list."""


@guarded
def ls_command(
    bank: own.Bank, limit: own.Limit = None, before: own.Before = None, json: Json = False
) -> dict[str, Any] | None:
    """List a bank's newest records: what each was pruned for, how good it is and what it takes."""
    from kinprune.bank import open_bank
    from kinprune.bank.listing import newest

    opened = open_bank(bank)
    total, shown = len(opened), newest(opened, LISTED if limit is None else limit, before)
    listed = [
        {**_described(entry), "kept_share": share} for entry, share in zip(shown, _shares(opened, shown), strict=True)
    ]
    if json:
        return {"bank": shown_address(bank), "total": total, "records": listed}
    if listed:
        console().print(records_table(listed))
    older = "" if before is None else f" before {before}"
    more = f" (--before {shown[0].id} lists older ones)" if shown and shown[0].id > 1 else ""
    some = f"; these are the {len(listed):,} newest{older}{more}" if len(listed) < total else ""
    console().print(f"{records_text(total)} in {shown_address(bank)}{some}.", soft_wrap=True)
    return None


@guarded
def show_command(bank: own.Bank, id: own.Id, json: Json = False) -> dict[str, Any] | None:
    """Show everything that a bank has of one record."""
    from kinprune.bank import open_bank

    opened = open_bank(bank)
    (entry,) = opened.entries([id])
    kept, start = {}, 0
    flags = opened.lessons([id]).kept[0]
    for name, width in opened.header.groups:
        kept[name] = flags[start : start + width].nonzero()[0].tolist()
        start += width
    found = {
        "bank": shown_address(bank),
        **_described(entry),
        "kept_share": float(flags.mean()),
        "weights": entry.weights,
        "kept": kept,
        "groups": dict(opened.header.groups),
        "details": dict(entry.details),
    }
    if json:
        return found
    print_record(found)
    return None


@guarded
def rm_command(bank: own.Bank, ids: own.Ids, yes: own.Yes = False, json: Json = False) -> dict[str, Any] | None:
    """Remove records, and the weights that no other record refers to."""
    from kinprune.bank import open_bank

    opened = open_bank(bank)
    wanted = list(dict.fromkeys(ids))
    _check_there(opened, wanted)
    if not yes and not _agreed(opened, wanted):
        say("nothing was removed")
        wanted = []
    if wanted:
        opened.remove(wanted)
    if json:
        return {"bank": shown_address(bank), "removed": wanted, "records": len(opened)}
    if wanted:
        console().print(f"{records_text(len(wanted))} removed, {len(opened):,} left.")
    return None


@guarded
def merge_command(
    target: own.Target, sources: own.Sources, store: own.Store = None, json: Json = False
) -> dict[str, Any] | None:
    """Copy the records of other banks of the same backbone into one, which is made if need be."""
    from kinprune.bank.merging import merge

    opened, others = _open_all(target, sources, store)
    answers = []
    for address, other in others:
        try:
            with counted(f"merging {shown_address(address)}") as on_record:
                added, present = merge(opened, other, on_record)
        except KeyboardInterrupt as interrupt:
            say(f"kinprune: interrupted; {kept_text(opened)}")
            raise typer.Exit(130) from interrupt
        answers.append({"bank": shown_address(address), "added": added, "present": present})
    if json:
        return {"bank": shown_address(target), "sources": answers, "records": len(opened)}
    shown = console()
    for answer in answers:
        shown.print(
            f"{answer['bank']}: {answer['added']:,} added, {answer['present']:,} already there.", soft_wrap=True
        )
    shown.print(f"{records_text(len(opened))} in {shown_address(target)}.", soft_wrap=True)
    return None


def _open_all(target: str, sources: Sequence[str], store: str | None) -> tuple[Bank, list[tuple[str, Bank]]]:
    """The bank to copy into and the others, which were found to be of one backbone before anything is copied."""
    from kinprune.bank import bank_exists, create_like, open_bank
    from kinprune.bank.merging import check_same

    others = [(address, open_bank(address)) for address in sources]
    found = open_bank(target) if bank_exists(target) else None
    if found is not None and store is not None:
        raise BankError("--store is for a new bank, and this one is there: leave out --store")
    first = others[0][1]
    for _, other in others:
        check_same(first.header if found is None else found.header, other.header)
    return create_like(target, first, store=store) if found is None else found, others


def verify_command(
    bank: own.Bank, clean: own.Clean = False, weights: own.CheckWeights = True, json: Json = False
) -> None:
    """Check that a bank is whole: every record, every file of weights. Exit code 1 where it is not, with each problem.

    With --clean, a whole bank is rid of old files that no record refers to; a damaged one is left as it is.
    """
    problems: list[str] = []
    _verify(bank, clean, weights, problems, json=json)
    if problems:
        raise typer.Exit(1)


@guarded
def _verify(bank: str, clean: bool, weights: bool, found: list[str], *, json: bool) -> dict[str, Any] | None:
    from kinprune.bank import open_bank
    from kinprune.bank.verification import clean as clean_bank
    from kinprune.bank.verification import verify

    opened = open_bank(bank)
    with counted("checking records") as on_record:
        report = verify(opened, weights=weights, on_record=on_record)
    found += [
        what if number is None or what.startswith("record ") else f"record {number}: {what}"
        for number, what in report.problems
    ]
    removed = list(clean_bank(opened)) if clean and report.whole else []
    if json:
        problems = [{"record": number, "what": what} for number, what in report.problems]
        lists = {"problems": problems, "unreferenced": list(report.unreferenced), "leftovers": list(report.leftovers)}
        return {
            "bank": shown_address(bank),
            "whole": report.whole,
            "records": report.records,
            **lists,
            "removed": removed,
        }
    shown = console()
    for line in found:
        shown.print(line, soft_wrap=True)
    count = f"{len(found)} problem{'' if len(found) == 1 else 's'}"
    state = "is whole" if report.whole else f"has {count}"
    shown.print(f"{shown_address(bank)} {state}: {records_text(report.records)} checked.", soft_wrap=True)
    unused = len(report.unreferenced) + len(report.leftovers)
    if clean and not report.whole:
        shown.print("Nothing was cleaned: files that seem unused may belong to what is damaged.")
    elif clean:
        shown.print(f"{len(removed)} unused files removed, {unused - len(removed)} younger than a day left.")
    elif unused:
        shown.print(f"{unused} files of weights belong to no record: --clean removes those older than a day.")
    return None


@guarded
def info_command(bank: own.Bank, json: Json = False) -> dict[str, Any] | None:
    """Say what a bank is about: its backbone, its units, and how much it holds."""
    from kinprune.bank import open_bank
    from kinprune.bank.claims import count_claims
    from kinprune.bank.listing import class_names, weight_bytes

    opened = open_bank(bank)
    header = opened.header
    found = {
        "bank": shown_address(bank),
        "schema": _schema(opened),
        "backbone": {**header.spec.to_json(), "fingerprint": header.backbone, "features": header.features},
        "preprocessing": header.preprocessing.to_json(),
        "space": {
            "fingerprint": header.space,
            "stream": header.stream,
            "units": header.units,
            "groups": dict(header.groups),
        },
        "records": len(opened),
        "under_way": count_claims(opened),
        "classes": len(class_names(opened)),
        "store": opened.store.shown,
        "bytes": {
            "database": _database_bytes(opened),
            "weights": weight_bytes(opened),
            "backbone": opened.store.size(header.backbone_weights),
        },
    }
    if json:
        return found
    print_info(found)
    return None


@guarded
def upgrade_command(bank: own.Bank, json: Json = False) -> dict[str, Any] | None:
    """Bring a bank that an older Kinprune made to this one's schema, in place."""
    from kinprune.bank import upgrade_bank

    before, after = upgrade_bank(bank)
    if json:
        return {"bank": shown_address(bank), "before": before, "after": after}
    what = "is up to date" if before == after else f"was upgraded from schema {before}"
    console().print(f"{shown_address(bank)} {what}: schema {after}.", soft_wrap=True)
    return None


def _described(entry: Entry) -> dict[str, Any]:
    """A record's line in JSON's own types."""
    return {
        "id": entry.id,
        "key": entry.key,
        "name": entry.name,
        "classes": list(entry.classes),
        "images": entry.details.get("images"),
        "accuracy_dense": entry.accuracy.dense,
        "accuracy_closed_form": entry.accuracy.start,
        "accuracy": entry.accuracy.final,
        "weight_bytes": entry.weight_bytes,
        "created": entry.created,
    }


def _shares(bank: Bank, entries: Sequence[Entry]) -> list[float]:
    """The share of all units that each record's model kept."""
    shares: list[float] = []
    for start in range(0, len(entries), PART):
        part = [entry.id for entry in entries[start : start + PART]]
        shares += bank.lessons(part).kept.mean(axis=1).tolist()
    return shares


def _check_there(bank: Bank, ids: Sequence[int]) -> None:
    """Refuse numbers of which no table has anything; what is left of a damaged record can be removed."""
    from sqlalchemy import select

    from kinprune.bank import schema
    from kinprune.bank.storage import parts

    columns = (schema.record.c.id, schema.probe.c.record, schema.units.c.record)
    queries = [select(column).where(column.in_(part)) for column in columns for part in parts(ids)]
    with schema.reading(bank.engine) as connection:
        there = {number for query in queries for number in connection.execute(query).scalars()}
    missing = [str(number) for number in ids if number not in there]
    if missing:
        raise BankError(f"the bank has no record {', '.join(missing)}: 'kinprune bank ls' lists them")


def _agreed(bank: Bank, ids: Sequence[int]) -> bool:
    for number in ids:
        try:
            (entry,) = bank.entries([number])
            say(f"{number}: {entry.name} ({some_names(entry.classes)})")
        except BankError as error:
            say(str(error))
    typer.echo(f"Remove {'it' if len(ids) == 1 else f'these {len(ids)}'}? [y/N] ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not answer:
        raise BankError("nobody answered whether the records are to be removed: give --yes")
    return answer.strip().lower() in ("y", "yes")


def _schema(bank: Bank) -> str:
    from kinprune.bank import schema

    with schema.reading(bank.engine) as connection:
        return schema.read_version(connection)


def _database_bytes(bank: Bank) -> int:
    """What the database takes: SQLite's pages, those not yet in its file among them; or what PostgreSQL says."""
    from kinprune.bank import schema

    postgresql = bank.engine.dialect.name == "postgresql"
    query = (
        "SELECT pg_database_size(current_database())"
        if postgresql
        else "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
    )
    with schema.reading(bank.engine) as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


bank_app = typer.Typer(
    name="bank",
    help="Build a bank of what pruning for earlier tasks taught, and keep it in order.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bank_app.command("build", cls=Sectioned)(build_command)
bank_app.command("add", cls=Sectioned)(add_command)
bank_app.command("ls", cls=Sectioned)(ls_command)
bank_app.command("show", cls=Sectioned)(show_command)
bank_app.command("info", cls=Sectioned)(info_command)
bank_app.command("verify", cls=Sectioned)(verify_command)
bank_app.command("merge", cls=Sectioned)(merge_command)
bank_app.command("rm", cls=Sectioned)(rm_command)
bank_app.command("upgrade", cls=Sectioned)(upgrade_command)
