"""``kinprune bank add`` of what was adapted: the record that ``kinprune adapt`` wrote goes into a bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinprune.errors import BankError

if TYPE_CHECKING:
    from kinprune.bank import Bank, Record

TaskOrRecord = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Labelled images, as for build: one source task; or the directory of an adapted model, or the "
        "record.safetensors in it, with no options but --bank and --json.",
    ),
]

FITTING = {"data", "bank", "json", "help"}
"""The parameters of ``bank add`` that mean something where a record is added: the others say how to prune."""


def record_file(data: str) -> Path | None:
    """The file of the record that DATA is or holds; None where DATA are images.

    Raises:
        BankError: DATA is an artifact without a record, or a folder of artifacts.
    """
    from kinprune.artifact.storage import DESCRIPTION, RECORD

    place = Path(data).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        return place
    if not place.is_dir():
        return None
    if (place / RECORD).is_file():
        return place / RECORD
    if (place / DESCRIPTION).is_file():
        raise BankError(
            f"{place} holds an artifact without {RECORD}: write it with this version's 'kinprune adapt', or give the "
            "labelled images to have the model pruned for them"
        )
    inside = sorted(path.parent for path in place.glob(f"*/{RECORD}"))
    if inside:
        raise BankError(f"{place} holds {len(inside)} adapted models: add one of them, such as {inside[0]}")
    return None


def refuse_options(context: typer.Context, record: Path) -> None:
    """Refuse, by name, options that say how to prune: the record's model is pruned already."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in FITTING and _is_given(context, str(parameter.name))
    ]
    if given:
        raise BankError(
            f"{record} is the record of an adapted model, to which {', '.join(given)} cannot be applied: leave out "
            f"{', '.join(given)}"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def add_record(record: Path, address: str) -> tuple[Bank, Record, bool]:
    """Read a record's file into a bank that is there; says whether it was added, or was there already."""
    from kinprune.bank import open_bank, read_record

    bank = open_bank(address)
    read = read_record(record, bank.header)
    return bank, read, bank.add(read)
